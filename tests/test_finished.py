"""Finished runs, read back."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from evocert.display import Silent
from evocert.errors import InputError
from evocert.finished import load_finished
from evocert.runs import CHECKPOINT, PREVIOUS
from evocert.training import start

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", width=2, eps=0.02, generations=6, batch_size=8, popsize=4, stdev_init=0.02, center_learning_rate=0.02,
    validations=3, checkpoint_seconds=0, attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""


@pytest.fixture(scope="module", params=["best", "last", "batch norm"])
def finished(request, tmp_path_factory):
    """A run, and the folder of its problem file."""
    folder = tmp_path_factory.mktemp("finished")
    change = 'network="cnn7_bn", width=1' if request.param == "batch norm" else f'select="{request.param}", width=2'
    (folder / "toy.py").write_text(PROBLEM.replace("width=2", change))
    start(folder / "toy.py", [], folder / "run", Silent())
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """One that may be damaged."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def state_of(folder):
    """Every file with its bytes and times."""
    paths = sorted(folder.rglob("*"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def test_the_network_is_that_of_the_onnx_file(finished):
    found = load_finished(finished / "run")
    images = found.data.test.batch(slice(0, 50))[0]
    session = onnxruntime.InferenceSession(finished / "run" / "network.onnx")
    name = session.get_inputs()[0].name
    expected = torch.tensor(np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in images]))
    with torch.no_grad():
        assert not found.module.training
        logits = found.module(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.network.logits(found.parameters[None], images)[0], expected, rtol=1e-5, atol=1e-5)
    assert logits.std(0).min() > 1e-4  # a constant would agree with anything


def test_what_it_was_judged_on(finished):
    found = load_finished(finished / "run")
    assert found.eps == 0.02
    assert found.results == json.loads((finished / "run" / "results.json").read_text())
    assert found.path == finished / "run"
    with torch.no_grad():
        images, labels = found.data.test.batch(slice(0, len(found.data.test)))
        natural = (found.module(images).argmax(1) == labels).double().mean()
    assert float(natural) == pytest.approx(found.results["accuracy"]["natural"])


def test_nothing_is_changed(finished):
    before, random = state_of(finished), torch.get_rng_state()
    load_finished(finished / "run")
    assert state_of(finished) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_it_may_move(copy):
    parameters = load_finished(copy).parameters
    target = copy.parent / "elsewhere"
    copy.rename(target)
    assert torch.equal(load_finished(target).parameters, parameters)


@pytest.mark.parametrize("name", ["config.json", "problem.py", "network.onnx"])
def test_a_folder_that_is_not_whole(copy, name):
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{copy}.* has no {name}"):
        load_finished(copy)


def test_a_run_that_is_not_finished(copy):
    (copy / "results.json").unlink()
    with pytest.raises(InputError, match=f"not finished: evocert resume {copy}"):
        load_finished(copy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", "{", "results.json cannot be read"),
        ("config.json", "[]", "config.json holds a list"),
        ("split.json", "{", "split.json cannot be read"),
        ("split.json", "{}", "the data are not those"),
        ("problem.py", PROBLEM + "\n# mine\n", "was changed since the run began"),
    ],
)
def test_damaged_files(copy, name, content, words):
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=words):
        load_finished(copy)


def test_other_data(copy):
    split = json.loads((copy / "split.json").read_text())
    split["test"]["indices"] = split["test"]["indices"][::-1]
    (copy / "split.json").write_text(json.dumps(split))
    with pytest.raises(InputError, match=r"the data are not those .*test"):
        load_finished(copy)


def test_a_checkpoint_that_is_gone(copy):
    (copy / CHECKPOINT).unlink()
    (copy / PREVIOUS).unlink()
    with pytest.raises(InputError, match="has no checkpoint"):
        load_finished(copy)


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_the_checkpoint_before_the_last_is_another_network(copy, damage, capsys):
    """With it the records would be about a network that network.onnx and results.json are not about."""
    content = (copy / CHECKPOINT).read_bytes()
    (copy / CHECKPOINT).unlink() if damage == "gone" else (copy / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="no checkpoint can be read"):
        load_finished(copy)
    assert "not the run's last" in capsys.readouterr().err


def test_a_checkpoint_of_another_network(copy):
    state = torch.load(copy / CHECKPOINT, weights_only=True)
    state["searcher"]["mu"] = torch.cat([state["searcher"]["mu"], torch.zeros(1)])
    state["best"]["centre"] = torch.cat([state["best"]["centre"], torch.zeros(1)])
    torch.save(state, copy / CHECKPOINT)
    with pytest.raises(InputError, match="no checkpoint can be read"):
        load_finished(copy)
