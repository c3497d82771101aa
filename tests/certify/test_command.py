"""``evocert certify``: what it takes, and one line on stderr for whatever a user can get wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from evocert.certify import cascade, records, solver
from evocert.certify.command import Request, prepare
from evocert.certify.records import Records
from evocert.export.onnx import export_onnx
from evocert.files import Lock
from evocert.finished import load_finished

FAST = ("--methods", "ibp", "--examples", 5, "--quiet")


def refused(outcome, *words):
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("evocert: ")
    for word in words:
        assert str(word) in err, f"{word!r} is not in {err!r}"


@pytest.fixture
def model(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run's network alone, and a current folder for what is written beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "model.onnx").write_bytes((trained / "network.onnx").read_bytes())
    return tmp_path / "model.onnx"


class TestDone:
    def test_a_run_ends_with_a_table_and_where_it_is_on_record(self, evocert, run_folder):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_folder.iterdir()}
        status, out, err = evocert("certify", run_folder, "--methods", "ibp,exact", "--examples", 20)
        assert (status, err) == (0, "")
        for words in (
            "20 test images, eps = 0.06",
            "natural",
            "certified first by ibp",
            "certified in total",
            "undecided",
        ):
            assert words in out
        assert str(run_folder / "certify.json") in out
        assert str(run_folder / "certify.jsonl") in out
        after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
        assert after == before  # results.json among them
        new = {path.name for path in run_folder.iterdir()} - {path.name for path in before}
        assert new - {"certify-counterexamples"} == {"certify.json", "certify.jsonl"}

    def test_quiet_is_one_line(self, evocert, run_folder):
        status, out, err = evocert("certify", run_folder, *FAST)
        assert (status, err) == (0, "")
        assert out.count("\n") == 1
        content = json.loads((run_folder / "certify.json").read_text())
        assert out.startswith(f"{run_folder / 'certify.json'}  natural {content['natural']:.4f}")

    def test_a_second_time_says_what_was_on_record(self, evocert, run_folder):
        arguments = ("certify", run_folder, "--methods", "ibp", "--examples", 12)
        assert "on record" not in evocert(*arguments)[1]
        status, out, _ = evocert(*arguments)
        assert status == 0
        assert "12 test images, 12 on record" in out

    def test_the_figures_are_those_of_the_run(self, evocert, run_folder):
        """Of the same bound on the same images, found by other code."""
        assert evocert("certify", run_folder, "--methods", "ibp", "--quiet")[0] == 0
        content = json.loads((run_folder / "certify.json").read_text())
        accuracy = json.loads((run_folder / "results.json").read_text())["accuracy"]
        assert content["natural"] == pytest.approx(accuracy["natural"])
        assert content["certified"]["total"] == pytest.approx(accuracy["certified"]["ibp"])

    def test_a_file_is_judged_as_the_run_that_wrote_it(self, evocert, run_folder, model):
        arguments = ("--methods", "ibp,exact", "--examples", 30, "--eps", "0.1", "--quiet")
        assert evocert("certify", run_folder, *arguments)[0] == 0
        status, out, err = evocert("certify", model, "--data", "digits", *arguments)
        assert (status, err) == (0, "")
        assert out.startswith("certify-model/certify.json")

        def rows(path):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            return [(line["index"], line["label"], line["prediction"], line["verdict"], line["by"]) for line in lines]

        assert sorted(rows(Path("certify-model/certify.jsonl"))) == sorted(rows(run_folder / "certify.jsonl"))

    def test_weights_beside_the_file_are_replayed_with_it(self, model):
        """As exporters write large networks."""
        network = onnx.load(model)
        onnx.save(network, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
        assert (model.parent / "weights.bin").stat().st_size > 1000
        subject = prepare(Request(model, "digits", eps=0.1)).subject
        images = torch.rand(4, 1, 8, 8)
        torch.testing.assert_close(subject.onnx_logits(images), subject.module(images).detach(), rtol=1e-4, atol=1e-4)

    def test_examples_that_are_listed(self, evocert, run_folder, tmp_path):
        (tmp_path / "mine.txt").write_text("7, 3\n3 358\n")
        assert evocert("certify", run_folder, "--methods", "ibp", "--indices", tmp_path / "mine.txt", "--quiet")[0] == 0
        rows = [json.loads(line)["index"] for line in (run_folder / "certify.jsonl").read_text().splitlines()]
        assert rows == [3, 7, 358]

    def test_a_radius_may_be_a_fraction(self, evocert, run_folder):
        assert evocert("certify", run_folder, "--eps", "2/255", *FAST)[0] == 0
        assert json.loads((run_folder / "certify.json").read_text())["key"]["eps"] == 2 / 255

    def test_another_folder_for_the_records(self, evocert, run_folder, tmp_path):
        before = sorted(run_folder.iterdir())
        assert evocert("certify", run_folder, "--out", tmp_path / "a" / "b", *FAST)[0] == 0
        assert (tmp_path / "a" / "b" / "certify.jsonl").is_file()
        assert sorted(run_folder.iterdir()) == before

    def test_other_data(self, evocert, run_folder, tmp_path):
        generator = np.random.default_rng(0)
        arrays = {f"x_{part}": generator.uniform(0, 1, (20, 1, 8, 8)).astype(np.float32) for part in ("train", "test")}
        labels = {f"y_{part}": np.arange(20) // 2 for part in ("train", "test")}
        np.savez(tmp_path / "mine.npz", **arrays, **labels)
        assert evocert("certify", run_folder, "--data", tmp_path / "mine.npz", "--methods", "ibp", "--quiet")[0] == 0
        content = json.loads((run_folder / "certify.json").read_text())
        assert content["examples"] == 20

    def test_help(self, evocert):
        status, out, err = evocert("certify", "--help")
        assert (status, err) == (0, "")
        for name in (
            "--data",
            "--eps",
            "--examples",
            "--indices",
            "--methods",
            "--timeout",
            "--workers",
            "--out",
            "--quiet",
        ):
            assert name in out


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--methods", "ibp,magic"), ("method 'magic'", "ibp", "exact")),
            (("--methods", ""), ("method ''", "allowed")),
            (("--methods", "ibp,exact,ibp"), ("ibp,exact,ibp", "once")),
            (("--eps", "-0.1"), ("eps", "-0.1")),
            (("--eps", "nan"), ("eps", "nan")),
            (("--eps", "inf"), ("eps", "inf")),
            (("--eps", "wide"), ("eps", "wide")),
            (("--eps", "1/0"), ("eps", "1/0")),
            (("--timeout", "0"), ("timeout", "0")),
            (("--timeout", "nan"), ("timeout", "nan")),
            (("--timeout", "soon"), ("timeout", "soon")),
            (("--workers", "0"), ("workers", "0")),
            (("--workers", "2.5"), ("2.5", "whole number")),
            (("--examples", "0"), ("examples is 0", "359")),
            (("--examples", "-3"), ("examples is -3", "359")),
            (("--examples", "360"), ("examples is 360", "359")),
            (("--examples", "many"), ("many", "whole number")),
            (("--indices", "absent.txt"), ("absent.txt", "No such file")),
            (("--indices", "."), ("indices .", "directory")),
            (("--data", "mnits"), ("mnits", "mnist")),
            (("--data", "absent.npz"), ("absent.npz",)),
            (("--speed", "3"), ("--speed",)),
        ],
    )
    def test_options(self, evocert, run_folder, arguments, words):
        refused(evocert("certify", run_folder, *arguments), *words)
        assert not list(run_folder.glob("certify*"))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", ("0 to 358",)),
            (b"1 two 3", ("whole numbers", "two")),
            (b"1.5", ("whole numbers", "1.5")),
            (b"3 359", ("0 to 358",)),
            (b"-1", ("0 to 358",)),
            (b"\xff\xfe", ("whole numbers",)),
        ],
    )
    def test_lists(self, evocert, run_folder, tmp_path, content, words):
        (tmp_path / "mine.txt").write_bytes(content)
        refused(
            evocert("certify", run_folder, "--indices", tmp_path / "mine.txt"), "indices", tmp_path / "mine.txt", *words
        )

    def test_two_choices_of_examples(self, evocert, run_folder, tmp_path):
        (tmp_path / "mine.txt").write_text("1")
        refused(
            evocert("certify", run_folder, "--examples", 3, "--indices", tmp_path / "mine.txt"), "examples and indices"
        )

    def test_nothing_there(self, evocert, tmp_path):
        refused(evocert("certify", tmp_path / "absent"), tmp_path / "absent", "no such run folder or ONNX file")
        refused(evocert("certify", tmp_path), tmp_path, "no run folder")
        refused(evocert("certify"), "Missing argument")

    def test_a_run_that_is_not_finished(self, evocert, run_folder):
        (run_folder / "results.json").unlink()
        refused(evocert("certify", run_folder), "not finished", f"evocert resume {run_folder}")

    @pytest.mark.parametrize("damage", ["gone", "torn", "another"])
    def test_a_run_whose_onnx_file_is_not_its_own(self, evocert, run_folder, damage):
        """Counterexamples would be replayed in something else."""
        path = run_folder / "network.onnx"
        if damage == "gone":
            path.unlink()
        elif damage == "torn":
            path.write_bytes(path.read_bytes()[:300])
        else:
            found = load_finished(run_folder)
            with torch.no_grad():
                next(found.module.parameters()).mul_(1.1)
            export_onnx(found.module, path, found.data.test.batch(slice(0, 2))[0])
        words = {"gone": "no network.onnx", "torn": "cannot be run", "another": "another network"}
        refused(evocert("certify", run_folder, *FAST), run_folder, words[damage])

    @pytest.mark.parametrize(
        ("shape", "classes", "words"),
        [
            ((1, 9, 8), 10, ("[1, 9, 8]", "[1, 8, 8]")),
            ((3, 8, 8), 10, ("[3, 8, 8]",)),
            ((1, 8, 8), 12, ("12", "10 outputs")),
        ],
    )
    def test_data_that_do_not_fit(self, evocert, run_folder, tmp_path, shape, classes, words):
        images, labels = np.zeros((48, *shape), np.uint8), np.arange(48) % classes
        np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
        refused(evocert("certify", run_folder, "--data", tmp_path / "mine.npz"), *words)

    def test_a_file_needs_data_and_a_radius(self, evocert, model):
        refused(evocert("certify", model, "--eps", "0.1"), model, "--data is needed")
        refused(evocert("certify", model, "--data", "digits"), model, "--eps is needed")

    @pytest.mark.parametrize("content", [b"", b"no model", "torn"])
    def test_files_that_are_no_network(self, evocert, model, content):
        model.write_bytes(model.read_bytes()[:500] if content == "torn" else content)
        refused(evocert("certify", model, "--data", "digits", "--eps", "0.1"), model, "ONNX")

    def test_a_file_with_a_layer_without_a_bound(self, evocert, model):
        network = onnx.load(model)
        next(node for node in network.graph.node if node.op_type == "Relu").op_type = "Softplus"
        onnx.save(network, model)
        refused(evocert("certify", model, "--data", "digits", "--eps", "0.1"), model, "Softplus")

    def test_records_that_cannot_be_read(self, evocert, run_folder):
        assert evocert("certify", run_folder, *FAST)[0] == 0
        lines = (run_folder / "certify.jsonl").read_text().splitlines()
        (run_folder / "certify.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
        refused(evocert("certify", run_folder, *FAST), "certify.jsonl, line 2", "move the file away")

    def test_a_place_for_records_that_is_a_file(self, evocert, run_folder):
        refused(evocert("certify", run_folder, "--out", run_folder / "config.json", *FAST), "config.json", "written")

    def test_two_processes_in_one_folder(self, evocert, run_folder):
        """The lock is of the file, not of the process: a second one is refused in this process, too."""
        lock = Lock(run_folder / ".certify.lock", "")
        refused(evocert("certify", run_folder, *FAST), run_folder, "another process is certifying there")
        lock.release()
        assert evocert("certify", run_folder, *FAST)[0] == 0


def full(*arguments):
    raise OSError(28, "No space left on device")


class TestFailed:
    @pytest.mark.parametrize("where", ["first", "rows", "summary", "point"])
    def test_a_full_disk(self, evocert, run_folder, where):
        arguments = ("certify", run_folder, "--methods", "ibp,exact", "--eps", "0.1", "--examples", 40, "--quiet")
        write = Records.write
        with pytest.MonkeyPatch.context() as patch:
            if where == "first":
                patch.setattr("evocert.files.os.replace", full)
            elif where == "rows":
                patch.setattr(records, "os", SimpleNamespace(fsync=full))
            elif where == "summary":
                patch.setattr(Records, "write", lambda self, what: full() if "settings" in what else write(self, what))
            else:
                patch.setattr(Records, "store", full)
            status, out, err = evocert(*arguments)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert "No space left on device" in err
        assert not (run_folder / ".certify.lock").exists()
        assert evocert(*arguments)[0] == 0  # with what is on record
        assert json.loads((run_folder / "certify.json").read_text())["examples"] == 40

    def test_memory_that_is_not_there(self, evocert, run_folder, monkeypatch):
        def fail(*arguments, **options):
            raise MemoryError

        monkeypatch.setattr(cascade, "pgd", fail)
        status, _, err = evocert("certify", run_folder, *FAST)
        assert (status, err.count("\n")) == (1, 1)
        assert "out of memory" in err

    def test_bounds_that_fit_no_memory(self, evocert, run_folder, monkeypatch):
        def refuse(*arguments):
            raise ValueError("memory_budget=1 is too small: 400 would do")

        monkeypatch.setattr(cascade, "choose_tile", refuse)
        refused(evocert("certify", run_folder, *FAST), "method ibp", "400 would do")


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_in_one_line(prepared):
    """As where memory is short."""
    subject = prepared.subject
    with solver.Solver(subject, 0.1, 30.0, 2) as several:
        image, label = prepared.part.batch(torch.tensor([0]))
        jobs = [(image[0], int(label))] * 4
        found = several.solved(jobs)
        next(found)
        for process in several._pool._processes.values():
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            assert int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1  # Ctrl-C is the parent's affair
            process.kill()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(OSError, match="was killed, most likely for want of memory"):
            list(found) + list(several.solved(jobs))


@pytest.mark.slow
@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_a_stdout_that_takes_nothing_costs_nothing(run_folder, stdout):
    call = f"exec {sys.executable} -c 'from evocert.cli import main; main()' certify '{run_folder}' {stdout}"
    call = call.replace(stdout, f"--methods ibp --examples 5 {stdout}")
    done = subprocess.run(["bash", "-c", call], stderr=subprocess.PIPE, text=True)
    assert done.stderr.count("\n") <= 1
    assert done.returncode == 0, done.stderr
    assert (run_folder / "certify.jsonl").read_text().count("\n") == 5
