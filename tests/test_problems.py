"""Every problem file runs, for a few generations on small settings: on real data where a copy is at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from evocert.display import Silent
from evocert.problem_files import load_problem
from evocert.training import start

PROBLEMS = Path(__file__).parent.parent / "problems"
SHORT = ["generations=2", "popsize=4", "validations=1", "attack.steps=2", "attack.restarts=1"]


def run(name, tmp_path, *more):
    _, results = start(PROBLEMS / f"{name}.py", [*SHORT, *more], tmp_path / "run", Silent())
    assert (tmp_path / "run" / "network.onnx").stat().st_size > 1000
    return results


def images(path, shape, classes, dtype):
    """An .npz of random images, 60 of each part."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        pixels = generator.integers(0, 256, (60, *shape))
        arrays[f"x_{part}"] = pixels.astype(np.uint8) if dtype == np.uint8 else (pixels / 255).astype(dtype)
        arrays[f"y_{part}"] = np.arange(60) % classes
    np.savez(path, **arrays)


@pytest.mark.parametrize("path", sorted(PROBLEMS.glob("*.py")), ids=lambda path: path.stem)
def test_every_file_says_how_it_is_run(path):
    command = path.read_text().split('"""')[1]
    assert (
        f"problems/{path.name}" in command or path.stem.removesuffix("_deeppoly").removesuffix("_crown_ibp") in command
    )
    if path.stem != "own_data":  # whose arrays are the reader's
        experiment = load_problem(path).experiment
        assert experiment.problem == path.stem


@pytest.mark.parametrize("method", ["grad", "rgs", "pgpe"])
def test_rows_of_the_study_differ_by_their_bound_alone(method):
    """Within a method: all start at the same weights, see the same images, and have as many generations."""
    rows = {}
    for bound in ("ibp", "crown-ibp", "deeppoly"):
        name = f"mnist_tiny_{method}" + ("" if bound == "ibp" else f"_{bound.replace('-', '_')}")
        rows[bound] = load_problem(PROBLEMS / f"{name}.py").experiment
        assert (rows[bound].method, rows[bound].bound) == (method, bound)
    settings = [
        {name: value for name, value in row.settings().items() if name not in ("bound", "problem")}
        for row in rows.values()
    ]
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize("data", ["mnist_w16", "cifar10_w16"])
def test_methods_of_the_study_share_network_and_schedules(data):
    base = load_problem(PROBLEMS / f"{data}.py").experiment.settings()
    assert (base["network"], base["width"], base["method"], base["bound"]) == ("cnn3", 16, "grad", "ibp")
    of_the_method = {"problem", "method", "mixture", "popsize", "batch_size"}
    of_the_method |= {"control_points", "stdev_init", "stdev_by_use"}
    for method in ("rgs", "pgpe", "sabr", "mtl-ibp"):
        row = load_problem(PROBLEMS / f"{data}_{method.replace('-', '_')}.py").experiment.settings()
        assert row["method"] == method
        assert {name for name in base if base[name] != row[name]} <= of_the_method


def test_cifar10_rows_of_the_study(tmp_path):
    images(tmp_path / "subset.npz", (3, 32, 32), 10, np.uint8)
    data = ["data=npz", f"data_path={tmp_path / 'subset.npz'}", "batch_size=4", "width=2", "eps=8/255"]
    results = run("cifar10_w16_pgpe", tmp_path, *data, "control_points=2", "bound=crown-ibp")
    assert results["eps"] == pytest.approx(8 / 255)
    assert set(results["accuracy"]["certified"]) == {"ibp", "crown-ibp"}


@pytest.mark.parametrize("method", ["grad", "rgs", "pgpe"])
def test_digits_of_the_study(tmp_path, method):
    name = "digits_tiny_pgpe" if method == "pgpe" else "digits_tiny"
    results = run(name, tmp_path, f"method={method}", "bound=crown-ibp")
    assert results["method"] == method
    assert set(results["accuracy"]["certified"]) == {"ibp", "crown-ibp"}


def test_digits(tmp_path):
    assert run("digits_cnn3", tmp_path)["examples"] == 359


@pytest.mark.slow
@pytest.mark.skipif(
    "EVOCERT_DATA" not in os.environ, reason="EVOCERT_DATA names no folder with MNIST and Fashion-MNIST"
)
@pytest.mark.parametrize(("name", "eps"), [("mnist_cnn3", 0.1), ("fashion_cnn3", 0.1)])
def test_torchvision_data(name, eps, tmp_path):
    results = run(name, tmp_path, "download=false", "batch_size=64")
    assert results["examples"] == 10_000
    assert results["eps"] == eps


def test_cifar10_on_an_npz(tmp_path):
    images(tmp_path / "subset.npz", (3, 32, 32), 10, np.uint8)
    results = run("cifar10_cnn3", tmp_path, "data=npz", f"data_path={tmp_path / 'subset.npz'}", "batch_size=8")
    assert results["examples"] == 60
    assert results["eps"] == pytest.approx(2 / 255)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data_path"] == str(tmp_path / "subset.npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_own_data(tmp_path, dtype):
    """The template, with images that are no squares and four classes."""
    images(tmp_path / "mine.npz", (2, 6, 10), 4, dtype)
    assert run("own_data", tmp_path, f"data_path={tmp_path / 'mine.npz'}", "batch_size=8")["examples"] == 60


def test_own_data_looks_beside_itself():
    assert load_problem(PROBLEMS / "own_data.py").experiment.data_path == str(PROBLEMS.resolve() / "my_images.npz")
