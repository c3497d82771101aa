"""The benchmark folder: its content, that the parts agree with each other and with the run, and that it is whole or absent."""

import ast
import csv
import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import evocert as package
from evocert.data import Part
from evocert.errors import InputError
from evocert.export import benchmark, eran, generate_properties
from evocert.export.benchmark import Request, export
from evocert.export.onnx import ExportError, export_onnx, export_onnx_of_normalised
from evocert.export.vnnlib import read_property
from evocert.finished import load_finished
from evocert.modules import Normalize

EXAMPLES = 30


@pytest.fixture(scope="session")
def finished(run_folder):
    return load_finished(run_folder)


@pytest.fixture(scope="session")
def folders(run_folder, tmp_path_factory):
    """One export of each kind: folder by (vnnlib, normalisation, suffix)."""
    kinds = [("1.0", "folded", ""), ("1.0", "outside", ""), ("2.0", "outside", ""), ("2.0", "folded", ".gz")]
    top = tmp_path_factory.mktemp("exports")
    for number, (vnnlib, normalisation, suffix) in enumerate(kinds):
        export(Request(run_folder, top / str(number), EXAMPLES, 20, vnnlib, normalisation, suffix))
    return {kind: top / str(number) for number, kind in enumerate(kinds)}


@pytest.fixture(
    params=[("1.0", "folded", ""), ("1.0", "outside", ""), ("2.0", "outside", ""), ("2.0", "folded", ".gz")]
)
def folder(request, folders):
    return folders[request.param]


def sidecar_of(folder):
    return json.loads((folder / "toy.json").read_text())


def onnx_of(folder):
    path = folder / sidecar_of(folder)["onnx"]
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def instances(folder):
    return list(csv.reader((folder / "instances.csv").read_text().splitlines()))


class TestFolder:
    def test_what_is_in_it(self, folder):
        gz = ".gz" if list(folder.glob("onnx/*.gz")) else ""
        indices = sidecar_of(folder)["selection"]["indices"]
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
            f"onnx/toy.onnx{gz}",
            *(f"vnnlib/toy_{index}.vnnlib{gz}" for index in indices),
            "instances.csv",
            "generate_properties.py",
            "images.npz",
            "toy.json",
            "eran/images.csv",
            "eran/README.md",
        }
        assert instances(folder) == [
            [f"onnx/toy.onnx{gz}", f"vnnlib/toy_{index}.vnnlib{gz}", "20"] for index in indices
        ]
        assert (folder / "generate_properties.py").read_bytes() == Path(generate_properties.__file__).read_bytes()

    def test_sidecar(self, folder, folders, finished):
        vnnlib, normalisation, _ = next(kind for kind, path in folders.items() if path == folder)
        sidecar = sidecar_of(folder)
        assert sidecar["name"] == "toy"
        assert sidecar["evocert"] == package.__version__
        assert sidecar["sha256"] == hashlib.sha256(onnx_of(folder)).hexdigest()
        assert (sidecar["data"], sidecar["part"], sidecar["layout"]) == ("digits", "test", "NCHW")
        assert (sidecar["input_shape"], sidecar["num_classes"]) == ([1, 1, 8, 8], 10)
        assert (sidecar["eps"], sidecar["vnnlib"], sidecar["timeout"]) == (0.03, vnnlib, 20)
        assert sidecar["normalisation"] == {
            "where": normalisation,
            "mean": [float(np.float32(0.3))],
            "std": [float(np.float32(0.4))],
        }
        assert sidecar["input_units"].startswith("[0, 1] pixels" if normalisation == "folded" else "(x - mean) / std")
        assert 0 <= sidecar["onnx_difference"] < 1e-4

    def test_properties_are_of_the_images_that_are_classified_correctly(self, folder, finished):
        images, labels = finished.data.test.batch(slice(0, EXAMPLES))
        with torch.no_grad():
            correct = finished.module(images).argmax(1) == labels
        assert 3 < int(correct.sum()) < EXAMPLES, "a network for which there is something to test"
        selection = sidecar_of(folder)["selection"]
        assert selection["indices"] == torch.nonzero(correct).flatten().tolist()
        assert selection["misclassified"] == torch.nonzero(~correct).flatten().tolist()
        assert selection["labels"] == labels[correct].tolist()
        assert selection["published_indices"] == finished.data.test.indices[:EXAMPLES][correct].tolist()
        assert selection["accuracy"] == float(correct.double().mean())
        assert selection["seed"] is None

    def test_network(self, folder, finished):
        """By ONNX Runtime on inputs that are computed here, and by torch: the logits of the sidecar."""
        sidecar, content = sidecar_of(folder), onnx_of(folder)
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        assert not {node.op_type for node in model.graph.node} & {"Sub", "Div", "BatchNormalization"}
        images, _ = finished.data.test.batch(torch.tensor(sidecar["selection"]["indices"]))
        inputs = images.numpy()
        if sidecar["normalisation"]["where"] == "outside":
            inputs = (inputs - np.float32(sidecar["normalisation"]["mean"])) / np.float32(
                sidecar["normalisation"]["std"]
            )
        session = onnxruntime.InferenceSession(content)
        logits = np.concatenate([session.run(None, {"input": image[None]})[0] for image in inputs])
        assert np.array_equal(logits, sidecar["selection"]["logits"])
        with torch.no_grad():
            assert np.allclose(finished.module(images).numpy(), logits, atol=1e-5, rtol=1e-5)

    def test_boxes(self, folder, finished):
        sidecar = sidecar_of(folder)
        shift, scale = (0.0, 1.0)
        if sidecar["normalisation"]["where"] == "outside":
            shift, scale = sidecar["normalisation"]["mean"][0], sidecar["normalisation"]["std"][0]
        for index, (_, name, _) in zip(sidecar["selection"]["indices"], instances(folder), strict=True):
            found = read_property(folder / name)
            images, labels = finished.data.test.batch(slice(index, index + 1))
            centre = images[0].double().numpy().ravel()
            assert np.allclose(found.lower * scale + shift, np.maximum(centre - 0.03, 0), atol=1e-15)
            assert np.allclose(found.upper * scale + shift, np.minimum(centre + 0.03, 1), atol=1e-15)
            assert (found.label, found.classes) == (int(labels), 10)
            assert found.targets == tuple(k for k in range(10) if k != int(labels))

    def test_folded_is_the_run_s_own_file(self, folders, run_folder):
        assert onnx_of(folders["1.0", "folded", ""]) == (run_folder / "network.onnx").read_bytes()
        assert onnx_of(folders["2.0", "folded", ".gz"]) == (run_folder / "network.onnx").read_bytes()

    def test_folded_and_outside_say_the_same(self, folders):
        one, other = folders["1.0", "folded", ""], folders["1.0", "outside", ""]
        assert [row[1] for row in instances(one)] == [row[1] for row in instances(other)]
        logits = [np.array(sidecar_of(f)["selection"]["logits"]) for f in (one, other)]
        assert np.allclose(*logits, atol=1e-5, rtol=1e-5)

    def test_eran(self, folder, finished):
        rows = list(csv.reader((folder / "eran" / "images.csv").read_text().splitlines()))
        images, labels = finished.data.test.batch(slice(0, EXAMPLES))
        assert [int(row[0]) for row in rows] == labels.tolist()
        values = np.array([row[1:] for row in rows], np.float64).reshape(EXAMPLES, 8, 8)
        assert np.allclose(values / 255, images[:, 0].numpy(), atol=1e-15)
        readme = (folder / "eran" / "README.md").read_text()
        for words in ("--dataset mnist", "--epsilon 0.03", "not whole numbers", "--num_tests 30"):
            assert words in readme
        outside = sidecar_of(folder)["normalisation"]["where"] == "outside"
        assert ("--mean 0.3000000119" if outside else "--mean 0 --std 1 ") in readme
        assert ("gzip -dk" in readme) == bool(list(folder.glob("onnx/*.gz")))

    def test_the_same_again_is_the_same_in_every_byte(self, run_folder, folders, tmp_path):
        export(Request(run_folder, tmp_path / "again", EXAMPLES, 20, "2.0", "folded", ".gz"))
        before = folders["2.0", "folded", ".gz"]
        for path in before.rglob("*"):
            if path.is_file() and path.suffix != ".npz":  # in which zip keeps the time of day
                assert path.read_bytes() == (tmp_path / "again" / path.relative_to(before)).read_bytes()


class TestEran:
    def test_order_and_whole_numbers(self, tmp_path):
        pixels = (np.arange(24).reshape(2, 3, 2, 2) * 10 / np.float32(255)).astype(np.float32)
        sidecar = {
            "name": "n",
            "onnx": "onnx/n.onnx",
            "eps": 2 / 255,
            "normalisation": {"where": "folded", "mean": None, "std": None},
        }
        eran.write(tmp_path / "eran", sidecar, pixels, np.array([7, 1]))
        first, second = (tmp_path / "eran" / "images.csv").read_text().splitlines()
        assert first == "7,0,40,80,10,50,90,20,60,100,30,70,110"  # height, width, channel
        assert second.startswith("1,120,160,200,130")
        readme = (tmp_path / "eran" / "README.md").read_text()
        assert "--mean 0 0 0 --std 1 1 1 " in readme
        assert "They are whole numbers." in readme
        assert f"--epsilon {2 / 255!r}" in readme
        assert "not these, of 3x2x2" in readme

    def test_every_byte_is_whole(self):
        pixels = generate_properties.as_pixels(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), 255.0)
        assert eran._values(pixels[0]) == [str(value) for value in range(256)]


@pytest.mark.parametrize(("dtype", "count", "scale"), [(torch.uint8, 256, 255.0), (torch.uint8, 17, 16.0)])
def test_pixels_are_those_of_the_data(dtype, count, scale):
    images = torch.arange(count).reshape(1, 1, 1, count).to(dtype)
    part = Part(images, torch.zeros(1, dtype=torch.int64), torch.arange(1), scale)
    assert np.array_equal(part.batch(slice(0, 1))[0].numpy(), generate_properties.as_pixels(images.numpy(), scale))


def test_a_tie_is_not_correct():
    logits = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [np.nan, 0.0], [1.0, np.nan]])
    assert generate_properties.classified_correctly(logits, np.zeros(5, np.int64)).tolist() == [True, *[False] * 4]


class TestGenerate:
    def drawn(self, folder, seed):
        done = subprocess.run(
            [sys.executable, "generate_properties.py", str(seed)], cwd=folder, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return {path.name: path.read_bytes() for path in (folder / "vnnlib").iterdir()}

    def test_an_image_has_one_text(self, run_folder, tmp_path):
        """All of the test part is exported, so that every image that is drawn has a text to be compared with."""
        for kind in (("1.0", "folded", ""), ("2.0", "outside", ".gz")):
            whole, few = (tmp_path / f"{size}-{kind[0]}" for size in ("whole", "few"))
            export(Request(run_folder, whole, 359, 1, *kind))
            export(Request(run_folder, few, 20, 60, *kind))
            expected = {path.name: path.read_bytes() for path in (whole / "vnnlib").iterdir()}
            before = {path.name: path.read_bytes() for path in (few / "vnnlib").iterdir()}
            assert before.items() <= expected.items()
            network = onnx_of(few)
            draws = [self.drawn(few, seed) for seed in (3, 4, 3)]
            for found in draws:
                assert found.items() <= expected.items()
                assert len(found) == len(before)
            assert draws[0] == draws[2]
            assert len({*draws[0], *draws[1], *before}) > len(before)
            assert onnx_of(few) == network
            rows, selection = instances(few), sidecar_of(few)["selection"]
            assert [row[1].removeprefix("vnnlib/") for row in rows] == [
                f"toy_{index}.vnnlib{kind[2]}" for index in selection["indices"]
            ]
            assert {row[2] for row in rows} == {"60"}
            assert selection["seed"] == 3
            assert len(selection["labels"]) == len(selection["logits"]) == len(rows)
            assert {path.name for path in few.iterdir()} == {path.name for path in whole.iterdir()}

    def test_bad_seeds(self, folders):
        for arguments in ([], ["-1"], ["x"], ["1", "2"]):
            command = [sys.executable, folders["1.0", "folded", ""] / "generate_properties.py", *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 2
            assert "Traceback" not in done.stderr

    def test_it_needs_little(self):
        tree = ast.parse(Path(generate_properties.__file__).read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name.split(".")[0] for name in names} <= {"numpy", "onnxruntime", *sys.stdlib_module_names}


class TestCommand:
    def test_defaults(self, evocert, run_folder, finished, tmp_path):
        status, out, err = evocert("export", run_folder)
        try:
            assert (status, err) == (0, "")
            folder = run_folder / "export-1.0-folded"
            assert out.splitlines()[-1] == str(folder)
            selection = sidecar_of(folder)["selection"]
            assert len(selection["indices"]) + len(selection["misclassified"]) == 100
            assert {row[2] for row in instances(folder)} == {"100"}
            assert f"{len(selection['indices'])} properties of the first 100 test images" in out
            refused(evocert("export", run_folder), folder, "not empty")
        finally:
            subprocess.run(["rm", "-r", run_folder / "export-1.0-folded"], check=True)

    def test_options(self, evocert, run_folder, tmp_path):
        (tmp_path / "out").mkdir()
        arguments = ("--out", tmp_path / "out", "--examples", 9, "--timeout", 0.5, "--vnnlib", "2.0", "--gz")
        assert evocert("export", run_folder, *arguments, "--normalisation", "outside")[::2] == (0, "")
        sidecar = sidecar_of(tmp_path / "out")
        assert (sidecar["vnnlib"], sidecar["normalisation"]["where"], sidecar["timeout"]) == ("2.0", "outside", 0.5)
        assert all(row[0] == "onnx/toy.onnx.gz" and row[2] == "0.5" for row in instances(tmp_path / "out"))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--examples", "0"), ("examples=0", "1 to 359")),
            (("--examples", "360"), ("examples=360", "1 to 359")),
            (("--examples", "x"), ("--examples", "'x'", "whole number")),
            (("--timeout", "0"), ("timeout=0", "over 0")),
            (("--timeout", "-3"), ("timeout=-3", "over 0")),
            (("--timeout", "nan"), ("timeout=nan", "over 0")),
            (("--timeout", "inf"), ("timeout=inf", "over 0")),
            (("--timeout", "x"), ("--timeout", "'x'")),
            (("--timeout", "21601"), ("timeout=21601", "6 in all", "timeout=")),
            (
                ("--examples", "359", "--timeout", "600"),
                ("timeout=600", "6 in all", "timeout=", "examples=36 would do"),
            ),
            (("--vnnlib", "3.0"), ("vnnlib=3.0", "1.0 and 2.0")),
            (("--normalisation", "inside"), ("normalisation=inside", "folded and outside")),
        ],
    )
    def test_bad_values(self, evocert, run_folder, tmp_path, arguments, words):
        refused(evocert("export", run_folder, "--out", tmp_path / "a" / "out", *arguments), *words)
        assert list(tmp_path.iterdir()) == []

    def test_what_would_do_does(self, evocert, run_folder, tmp_path):
        arguments = ["export", run_folder, "--out", tmp_path / "out"]
        status, _, err = evocert(*arguments, "--examples", "200", "--timeout", "500")
        assert status == 2
        advice = err.rpartition("; ")[2].removesuffix(" would do\n").split(" or ")
        assert len(advice) == 2
        for number, change in enumerate(advice):
            options = {"timeout": "500", "examples": "200", **dict([change.split("=")])}
            flags = [word for name, value in options.items() for word in (f"--{name}", value)]
            assert evocert(*arguments[:-1], tmp_path / f"out{number}", *flags)[0] == 0

    def test_six_hours_are_allowed_and_a_second_more_is_not(self):
        benchmark._check_count(216, 300, 100.0)
        with pytest.raises(InputError, match=r"timeout=100: for 217 .*; timeout=99 or examples=216 would do"):
            benchmark._check_count(217, 300, 100.0)
        with pytest.raises(InputError, match=r"; examples=43200 would do"):
            benchmark._check_count(43201, 50_000, 0.5)

    def test_no_finished_run(self, evocert, run_folder, tmp_path):
        refused(evocert("export", tmp_path / "absent"), tmp_path / "absent", "no run folder")
        refused(evocert("export", run_folder / "config.json"), "config.json", "no run folder")
        refused(evocert("export"), "Missing argument")
        for name, words in (("results.json", "is not finished"), ("network.onnx", "no network.onnx")):
            copy = tmp_path / name
            subprocess.run(["cp", "-r", run_folder, copy], check=True)
            (copy / name).unlink()
            refused(evocert("export", copy), copy, words)
            assert not list(copy.glob("*export*"))

    def test_a_folder_that_is_there(self, evocert, run_folder, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        for out in (tmp_path / "file", tmp_path / "full", tmp_path / "file" / "below"):
            refused(evocert("export", run_folder, "--out", out), out)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]

    def test_a_network_without_normalisation(self, run_folder, finished, tmp_path, monkeypatch):
        """Folded changes nothing then; outside is refused."""
        own = nn.Sequential(nn.Identity(), *finished.module)
        monkeypatch.setattr(benchmark, "load_finished", lambda path: dataclasses.replace(finished, module=own))
        with pytest.raises(InputError, match=r"normalisation=outside.*Identity.*Normalize.*folded"):
            export(Request(run_folder, tmp_path / "out", 5, normalisation="outside"))
        assert list(tmp_path.iterdir()) == []
        done = export(Request(run_folder, tmp_path / "out", 30))
        assert done.sidecar["normalisation"] == {"where": "none", "mean": None, "std": None}
        assert "--mean 0 --std 1 " in (tmp_path / "out" / "eran" / "README.md").read_text()

    def test_no_image_is_classified_correctly(self, run_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(generate_properties, "classified_correctly", lambda logits, labels: labels < 0)
        with pytest.raises(InputError, match=r"examples=3: .* none of the first 3"):
            export(Request(run_folder, tmp_path / "out", 3))
        assert list(tmp_path.iterdir()) == []


class TestWholeOrAbsent:
    @pytest.mark.parametrize(
        ("error", "status"),
        [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130), (MemoryError(), 1)],
    )
    @pytest.mark.parametrize("there", [True, False])
    def test_what_fails_late_leaves_nothing(self, evocert, run_folder, tmp_path, monkeypatch, error, status, there):
        def fail(folder, *rest):
            (folder.parent / "half").write_text("half")
            assert (folder.parent / "instances.csv").is_file()
            raise error

        monkeypatch.setattr(eran, "write", fail)
        out = tmp_path / "new" / "out"
        if there:
            out.mkdir(parents=True)
        found = evocert("export", run_folder, "--out", out, "--examples", 12)
        assert found[0] == status
        assert found[2].count("\n") == 1
        assert str(out) in found[2] or not isinstance(error, OSError)
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["new", "new/out"] * there

    def test_a_property_that_is_read_back_otherwise(self, run_folder, tmp_path, monkeypatch):
        def wrong(path):
            found = read_property(path)
            return dataclasses.replace(found, upper=found.upper + 1e-12)

        monkeypatch.setattr(benchmark, "read_property", wrong)
        with pytest.raises(ExportError, match="is not read back"):
            export(Request(run_folder, tmp_path / "out", 12))
        assert list(tmp_path.iterdir()) == []

    def test_through_a_link(self, run_folder, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        export(Request(run_folder, tmp_path / "link", 12))
        assert (tmp_path / "real" / "instances.csv").is_file()
        assert sorted(os.listdir(tmp_path)) == ["link", "real"]


class TestOutside:
    def test_any_channels(self, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Sequential(Normalize([0.2, 0.9, 0.5], [0.5, 0.2, 0.3]), nn.Conv2d(3, 4, 3, padding=1)),
            nn.ReLU(), nn.Flatten(), nn.Linear(144, 5),
        )  # fmt: skip
        images = torch.rand(4, 3, 6, 6)
        export_onnx_of_normalised(module, tmp_path / "outside.onnx", images)
        export_onnx(module, tmp_path / "folded.onnx", images)
        mean, std = torch.tensor([0.2, 0.9, 0.5])[:, None, None], torch.tensor([0.5, 0.2, 0.3])[:, None, None]
        inputs = {"outside": (images - mean) / std, "folded": images}
        logits = [
            onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"input": given[:1].numpy()})[0]
            for name, given in inputs.items()
        ]
        assert np.allclose(*logits, atol=1e-5)
        nodes = [node.op_type for node in onnx.load(tmp_path / "outside.onnx").graph.node]
        assert nodes == ["Conv", "Relu", "Flatten", "Gemm"]
        assert not isinstance(module[0], Normalize), "the module keeps its layers"

    def test_a_subclass_may_compute_something_else(self, tmp_path):
        class Own(Normalize):
            pass

        module = nn.Sequential(Own([0.1], [1.0]), nn.Flatten(), nn.Linear(4, 2))
        with pytest.raises(InputError, match="Own"):
            export_onnx_of_normalised(module, tmp_path / "a.onnx", torch.rand(1, 1, 2, 2))


def refused(outcome, *words):
    status, out, err = outcome
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("evocert: ")
    for word in words:
        assert str(word) in err, f"{word!r} is not in {err!r}"
