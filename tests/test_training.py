"""A whole run: records, determinism, and continuing after every way of being stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from evocert import evaluation, networks, training
from evocert.bounds import BOUNDS, read_network
from evocert.bounds.tiles import LANES
from evocert.centres import CentreAverage, Selection
from evocert.data import channel_statistics, load
from evocert.display import Silent
from evocert.errors import InputError
from evocert.problem import CertifiedTraining, NonFiniteFitnessError
from evocert.problem_files import load_problem
from evocert.runs import CHECKPOINT, Run
from evocert.searchers import METHODS
from evocert.training import Interrupted, Unwritable, resume, start

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", network="cnn3", width=2, eps=0.02, generations=12, batch_size=8, popsize=4,
    stdev_init=0.02, center_learning_rate=0.02, eps_schedule=evocert.Schedule("linear", end=0.5, first=0.0),
    learning_rate_schedule=evocert.Schedule("cosine", last=0.1), stdev_schedule=evocert.Schedule("linear", last=0.5),
    natural_every=3, validations=4, checkpoint_seconds=0, attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""
RECORDS = {
    "problem.py",
    "config.json",
    "environment.json",
    "split.json",
    "metrics.jsonl",
    "network.onnx",
    "results.json",
}


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(PROBLEM)
    return path


def rows(folder, *, timing=False):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in row.items() if k != "timing"} for row in lines]


def same(one, other):
    """Whether two checkpoints agree in every bit but the seconds."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, torch.Tensor):
        return (
            torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
            if one.is_floating_point()
            else torch.equal(one, other)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def checkpoint(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)


def outcome(folder):
    results = json.loads((folder / "results.json").read_text())
    return {k: v for k, v in results.items() if k != "train_seconds"}


@pytest.fixture
def reference(problem, tmp_path):
    """The run that nothing has interrupted."""
    start(problem, [], tmp_path / "reference", Silent())
    return tmp_path / "reference"


class TestRecords:
    def test_are_those_of_the_contract(self, problem, reference):
        files = {p.name for p in reference.iterdir()}
        assert files >= RECORDS | {CHECKPOINT}
        assert not [f for f in files if f.startswith(".")]
        config = json.loads((reference / "config.json").read_text())
        assert config["popsize"] == 4
        assert config["bound"] == "ibp"  # a default
        assert config["problem"] == "toy"
        assert set(config["tile"]) == {"members", "images", "at_once", "chunk_parts"}
        assert (reference / "problem.py").read_bytes() == problem.read_bytes()
        split = json.loads((reference / "split.json").read_text())
        data = load("digits")
        assert split["test"]["indices"] == data.test.indices.tolist()
        results = json.loads((reference / "results.json").read_text())
        assert list(results) == [
            "problem", "method", "bound", "eps", "dataset", "split", "examples", "seed", "generations", "init_from",
            "train_seconds", "evaluations", "accuracy",
        ]  # fmt: skip
        accuracy = results["accuracy"]
        assert results["examples"] == len(data.test)
        assert 0 <= accuracy["certified"]["ibp"] <= accuracy["attacked"] <= accuracy["natural"] <= 1

    def test_metrics_have_every_generation_once_and_timing_apart(self, reference):
        found = [(row["event"], row["generation"]) for row in rows(reference)]
        generations = [("generation", g) for g in range(1, 13)]
        validations = [("validation", g) for g in (3, 6, 9, 12)]
        assert sorted(found) == sorted(generations + validations)
        first, *_, last = [r for r in rows(reference, timing=True) if r["event"] == "generation"]
        assert first["eps"] == 0
        assert last["eps"] == pytest.approx(0.02)
        assert first["sigma"] == pytest.approx(0.02)
        assert last["sigma"] == pytest.approx(0.02 * (1 - 0.5 * 11 / 12))
        assert {"seconds", "sample", "bounds", "update"} <= first["timing"].keys()
        assert "natural_loss" in first
        assert "natural_loss" not in last
        validation = next(r for r in rows(reference, timing=True) if r["event"] == "validation")
        assert validation["timing"]["validate"] > 0

    def test_onnx_is_the_chosen_centre(self, reference):
        state = checkpoint(reference)
        module = networks.cnn3((1, 8, 8), 10, mean=[0.0], std=[1.0], width=2)
        config = json.loads((reference / "config.json").read_text())
        assert config["mean"] is None
        data = load("digits")
        statistics = channel_statistics(data.train)
        module[0] = networks.Normalize(*statistics)
        networks.with_parameters(module, state["best"]["centre"])
        images = data.test.batch(slice(0, 5))[0]
        session = onnxruntime.InferenceSession(reference / "network.onnx")
        logits = [session.run(None, {session.get_inputs()[0].name: image[None].numpy()})[0][0] for image in images]
        torch.testing.assert_close(torch.tensor(np.array(logits)), module(images).detach(), rtol=1e-4, atol=1e-5)

    def test_n_generations_are_n_updates(self, reference):
        """The centre at the end has moved once more than the one whose population was evaluated last."""
        state = checkpoint(reference)
        assert int(state["searcher"]["optimizer"]["state"][0]["step"]) == 12
        assert not state["searcher"]["pending"]

    def test_select_last_takes_the_last(self, problem, tmp_path, reference):
        start(problem, ["select=last", "validations=1"], tmp_path / "last", Silent())
        assert torch.equal(checkpoint(tmp_path / "last")["searcher"]["mu"], checkpoint(reference)["searcher"]["mu"])
        data = load("digits")
        assert outcome(tmp_path / "last")["examples"] == len(data.test)

    def test_a_seed_decides_everything_and_another_changes_it(self, problem, tmp_path, reference):
        start(problem, [], tmp_path / "again", Silent())
        assert rows(tmp_path / "again") == rows(reference)
        assert same(checkpoint(tmp_path / "again"), checkpoint(reference))
        start(problem, ["seed=1"], tmp_path / "other", Silent())
        assert rows(tmp_path / "other") != rows(reference)
        split, other = (json.loads((f / "split.json").read_text()) for f in (reference, tmp_path / "other"))
        assert split["test"] == other["test"]
        assert split["validation"] != other["validation"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "double"])
    def test_a_module_in_another_precision_is_trained_in_float32(self, tmp_path, dtype):
        """What is certified, attacked and handed over is one and the same network, not a rounded one."""
        file = tmp_path / "mine.py"
        network = (
            f"network=lambda shape, classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).{dtype}()"
        )
        file.write_text("import torch\n" + PROBLEM.replace('network="cnn3", width=2', network))
        start(file, [], tmp_path / "run", Silent())
        centre = checkpoint(tmp_path / "run")["best"]["centre"]
        assert centre.dtype == torch.float32
        images = load("digits").test.batch(slice(0, 5))[0]
        session = onnxruntime.InferenceSession(tmp_path / "run" / "network.onnx")
        logits = [session.run(None, {session.get_inputs()[0].name: image[None].numpy()})[0][0] for image in images]
        weight, bias = centre[:640].reshape(10, 64), centre[640:]
        torch.testing.assert_close(torch.tensor(np.array(logits)), images.flatten(1) @ weight.T + bias)

    @pytest.mark.parametrize("generations", [1, 2, 3])
    def test_any_number_of_generations_will_do(self, problem, tmp_path, generations):
        start(problem, [f"generations={generations}"], tmp_path / "short", Silent())
        found = rows(tmp_path / "short")
        assert [r["generation"] for r in found if r["event"] == "generation"] == list(range(1, generations + 1))
        assert found[-1]["event"] == "validation"

    def test_a_warm_start_begins_where_the_other_run_ended(self, problem, tmp_path, reference):
        start(problem, [f"init_from={reference}", "generations=1"], tmp_path / "warm", Silent())
        assert outcome(tmp_path / "warm")["init_from"] == str(reference)
        folder = tmp_path / "warm"
        best = checkpoint(reference)["best"]["centre"]
        moved = (checkpoint(folder)["searcher"]["mu"] - best).abs()
        assert 0 < moved.max() <= 0.021  # one step of Adam
        start(
            problem, [f"init_from={reference}", "generations=1", "center_learning_rate=1e-9"], tmp_path / "b", Silent()
        )
        torch.testing.assert_close(checkpoint(tmp_path / "b")["searcher"]["mu"], best, rtol=0, atol=1e-8)
        first = r"the first layer that differs is there 1: Conv2d\(1, 2, .*\), here 1: Conv2d\(1, 3, .*\): allowed is the same"
        with pytest.raises(InputError, match=first):
            start(problem, [f"init_from={reference}", "width=3"], tmp_path / "wide", Silent())
        with pytest.raises(
            InputError, match=r"there 6: Linear\(.*out_features=10.*\), here 6: Linear\(.*out_features=512"
        ):
            start(problem, [f"init_from={reference}", "network=cnn4"], tmp_path / "wide", Silent())
        with pytest.raises(InputError, match="no such run folder"):
            start(problem, ["init_from=absent"], tmp_path / "absent", Silent())
        assert not (tmp_path / "wide").exists()

    def test_a_warm_start_takes_the_network_that_was_handed_over(self, problem, tmp_path):
        """The last one where the other run selects the last, though another may have validated better."""
        start(problem, ["select=last", "center_learning_rate=0.3"], tmp_path / "last", Silent())
        state = checkpoint(tmp_path / "last")
        assert not torch.equal(state["best"]["centre"], state["searcher"]["mu"])
        settings = [f"init_from={tmp_path / 'last'}", "generations=1", "center_learning_rate=1e-9"]
        start(problem, settings, tmp_path / "warm", Silent())
        warm = checkpoint(tmp_path / "warm")["searcher"]["mu"]
        torch.testing.assert_close(warm, state["searcher"]["mu"], rtol=0, atol=1e-7)


class _Stopping(Silent):
    """Does something in the middle of the run."""

    def __init__(self, at, action):
        self.at, self.action = at, action

    def generation(self, generation, loss, eps, stdev):
        if generation == self.at:
            self.action()


class _KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


def _kill():
    raise _KilledError


def _check_killed_is_whole(problem, overrides, tmp_path, at):
    """A run that is killed in generation ``at`` and resumed is in every record the one that was not. Both are in tmp_path."""
    start(problem, overrides, tmp_path / "whole", Silent())
    with pytest.raises(_KilledError):
        start(problem, overrides, tmp_path / "killed", _Stopping(at, _kill))
    assert checkpoint(tmp_path / "killed")["generation"] == at - 1
    resume(tmp_path / "killed", Silent())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert same(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


class TestResume:
    @pytest.mark.parametrize("at", [1, 2, 5, 11, 12])
    def test_after_a_kill_is_bit_for_bit(self, problem, tmp_path, reference, at):
        folder = tmp_path / "killed"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(at, _kill))
        resume(folder, Silent())
        assert rows(folder) == rows(reference)
        assert same(checkpoint(folder), checkpoint(reference))
        assert outcome(folder) == outcome(reference)
        assert (folder / "network.onnx").read_bytes() == (reference / "network.onnx").read_bytes()

    @pytest.mark.parametrize("overrides", [["optimizer=clipup"], ["optimizer=none"], ["ranking_method=centered"], [
        "stdev_learning_rate=0.1", "stdev_schedule.shape=constant", "stdev_schedule.last=1",
    ], ["symmetric=false"]], ids=["clipup", "plain", "centered", "sigma", "asymmetric"])  # fmt: skip
    def test_holds_for_every_kind_of_pgpe(self, problem, tmp_path, overrides):
        _check_killed_is_whole(problem, overrides, tmp_path, 6)

    def test_after_ctrl_c_too(self, problem, tmp_path, reference):
        folder = tmp_path / "stopped"
        with pytest.raises(Interrupted) as stopped:
            start(
                problem, ["checkpoint_seconds=1000"], folder, _Stopping(7, lambda: os.kill(os.getpid(), signal.SIGINT))
            )
        assert stopped.value.run_path == folder
        assert checkpoint(folder)["generation"] == 7
        resume(folder, Silent())
        assert rows(folder) == rows(reference)
        assert same(checkpoint(folder), checkpoint(reference))

    def test_after_the_training_only_evaluates(self, problem, tmp_path, reference, monkeypatch):
        folder = tmp_path / "trained"
        with monkeypatch.context() as patch:
            patch.setattr(training.evaluation, "evaluate", lambda *args, **kwargs: _kill())
            with pytest.raises(_KilledError):
                start(problem, [], folder, Silent())
        assert not (folder / "results.json").exists()
        before = checkpoint(folder)
        resume(folder, _Stopping(12, _kill))
        assert outcome(folder) == outcome(reference)
        assert same(before, checkpoint(folder))

    def test_after_ctrl_c_while_it_is_evaluated(self, problem, tmp_path, reference, monkeypatch):
        folder = tmp_path / "stopped"
        with monkeypatch.context() as patch:
            patch.setattr(training.evaluation, "evaluate", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(Interrupted):
                start(problem, [], folder, Silent())
        assert not (folder / "results.json").exists()
        resume(folder, Silent())
        assert outcome(folder) == outcome(reference)

    def test_falls_back_to_the_previous_checkpoint(self, problem, tmp_path, reference, capsys):
        folder = tmp_path / "damaged"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(8, _kill))
        path = folder / CHECKPOINT
        path.write_bytes(path.read_bytes()[:1000])
        resume(folder, Silent())
        said = capsys.readouterr().err
        assert f"{path} is corrupted" in said
        assert "at generation 6" in said
        assert rows(folder) == rows(reference)
        assert same(checkpoint(folder), checkpoint(reference))

    def test_before_the_first_checkpoint_starts_again(self, problem, tmp_path, reference):
        folder = tmp_path / "early"
        with pytest.raises(_KilledError):
            start(problem, ["checkpoint_seconds=1000"], folder, _Stopping(4, _kill))
        assert not (folder / CHECKPOINT).exists()
        resume(folder, Silent())
        assert rows(folder) == rows(reference)

    def test_refuses_a_finished_run(self, reference):
        before = {p.name: p.read_bytes() for p in reference.iterdir()}
        with pytest.raises(InputError, match="is finished: its results are in"):
            resume(reference, Silent())
        assert {p.name: p.read_bytes() for p in reference.iterdir()} == before

    def test_refuses_a_changed_copy_and_mentions_a_changed_original(self, problem, tmp_path, capsys):
        folder = tmp_path / "run"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(8, _kill))
        copy = folder / "problem.py"
        copy.write_text(PROBLEM + "\n# mine\n")
        with pytest.raises(InputError, match=r"problem\.py was changed since the run began"):
            resume(folder, Silent())
        copy.write_text(PROBLEM)
        problem.write_text("raise SystemExit")
        resume(folder, Silent())
        assert "was changed since; the run's own copy is used" in capsys.readouterr().err

    def test_finds_what_lies_beside_the_original(self, tmp_path):
        """Imports and data of the problem file, from another current folder, and with the original gone."""
        (tmp_path / "side").mkdir()
        (tmp_path / "side" / "my_settings.py").write_text("POPSIZE = 4\n")
        file = tmp_path / "side" / "mine.py"
        file.write_text("import my_settings\n" + PROBLEM.replace("popsize=4", "popsize=my_settings.POPSIZE"))
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "run", _Stopping(8, _kill))
        sys.modules.pop("my_settings", None)
        file.unlink()
        resume(tmp_path / "run", Silent())

    def test_after_the_training_tells_its_loggers_all_that_they_would_have_heard(self, problem, tmp_path, monkeypatch):
        """The end of a run reads the last population's status, which the process that resumes has not evaluated."""
        heard = []
        file = tmp_path / "heard.py"
        file.write_text(PROBLEM.replace("checkpoint", "loggers=[listen], checkpoint") + "\n")
        file.write_text("import builtins\nlisten = builtins._listen\n" + file.read_text())

        def listen(searcher):
            searcher.end_of_run_hook.append(lambda status: heard.append({k: status[k] for k in ("mean_eval", "iter")}))

        monkeypatch.setattr("builtins._listen", listen, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(training.evaluation, "evaluate", lambda *args, **kwargs: _kill())
            with pytest.raises(_KilledError):
                start(file, [], tmp_path / "run", Silent())
        resume(tmp_path / "run", Silent())
        assert heard[0] == heard[1]
        assert heard[0]["iter"] == 12

    def test_goes_on_with_the_checkpoints_after_a_fallback(self, problem, tmp_path, reference, capsys):
        """The damaged file must not become the previous good one: killed again, the run still has one to fall back to."""
        folder = tmp_path / "damaged"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(8, _kill))
        path = folder / CHECKPOINT
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(_KilledError):
            resume(folder, _Stopping(8, _kill))  # one checkpoint is written, at generation 7
        path.write_bytes(path.read_bytes()[:1000])
        resume(folder, Silent())
        assert "at generation 6" in capsys.readouterr().err
        assert same(checkpoint(folder), checkpoint(reference))

    @pytest.mark.parametrize("lacking", ["trained", "searcher", "searcher.mu", "searcher.optimizer"])
    def test_falls_back_where_something_is_lacking(self, problem, tmp_path, reference, capsys, lacking):
        folder = tmp_path / "lacking"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(8, _kill))
        state = checkpoint(folder)
        *outer, key = lacking.split(".")
        del (state[outer[0]] if outer else state)[key]
        torch.save(state, folder / CHECKPOINT)
        resume(folder, Silent())
        assert f"is corrupted (it lacks '{key}')" in capsys.readouterr().err
        assert same(checkpoint(folder), checkpoint(reference))

    def test_does_not_need_what_the_checkpoint_has(self, problem, tmp_path, reference):
        folder = tmp_path / "warm"
        with pytest.raises(_KilledError):
            start(problem, [f"init_from={reference}"], folder, _Stopping(8, _kill))
        shutil.rmtree(reference)
        resume(folder, Silent())
        assert outcome(folder)["init_from"] == str(reference)

    def test_refuses_other_data(self, tmp_path):
        generator = np.random.default_rng(0)
        arrays = {"x_train": generator.random((60, 1, 8, 8)), "x_test": generator.random((20, 1, 8, 8))}
        arrays |= {f"y_{part}": np.arange(len(arrays[f"x_{part}"])) % 10 for part in ("train", "test")}
        file = tmp_path / "toy.py"
        file.write_text(PROBLEM.replace('data="digits"', 'data="mine.npz", validation_fraction=0.3'))
        np.savez(tmp_path / "mine.npz", **arrays)
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "run", _Stopping(8, _kill))
        np.savez(tmp_path / "mine.npz", **{**arrays, "x_test": arrays["x_test"][::-1]})
        with pytest.raises(InputError, match=r"the data are not those that run .* began with: test in its split\.json"):
            resume(tmp_path / "run", Silent())
        np.savez(tmp_path / "mine.npz", **arrays)
        resume(tmp_path / "run", Silent())

    def test_finds_a_relative_data_folder_from_elsewhere(self, problem, tmp_path, monkeypatch):
        """EVOCERT_DATA as it was when the run began, absolute in config.json."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("EVOCERT_DATA", "images")
        assert load_problem(problem, ["data=mnist"]).experiment.data_dir == str(tmp_path / "images")
        assert load_problem(problem, ["data=mnist", "data_dir=x"]).experiment.data_dir == str(tmp_path / "x")
        assert load_problem(problem).experiment.data_dir is None

    @pytest.mark.parametrize("moved", ["the run alone", "both together"])
    def test_finds_what_lies_beside_the_original_after_a_move(self, tmp_path, moved):
        (tmp_path / "home" / "runs").mkdir(parents=True)
        (tmp_path / "home" / "my_settings.py").write_text("POPSIZE = 4\n")
        file = tmp_path / "home" / "mine.py"
        file.write_text("import my_settings\n" + PROBLEM.replace("popsize=4", "popsize=my_settings.POPSIZE"))
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "home" / "runs" / "one", _Stopping(8, _kill))
        if moved == "the run alone":
            (tmp_path / "home" / "runs" / "one").rename(tmp_path / "one")
            resume(tmp_path / "one", Silent())
        else:
            (tmp_path / "home").rename(tmp_path / "moved")
            resume(tmp_path / "moved" / "runs" / "one", Silent())

    def test_gives_a_module_of_the_file_the_same_weights(self, tmp_path):
        """Before the first checkpoint the run begins again: with the random weights that it began with."""
        file = tmp_path / "mine.py"
        network = "network=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))"
        file.write_text("import torch\n" + PROBLEM.replace('network="cnn3", width=2', network))
        torch.manual_seed(5)
        start(file, [], tmp_path / "whole", Silent())
        torch.manual_seed(6)
        with pytest.raises(_KilledError):
            start(file, ["checkpoint_seconds=1000"], tmp_path / "killed", _Stopping(4, _kill))
        torch.manual_seed(7)
        resume(tmp_path / "killed", Silent())
        assert rows(tmp_path / "killed") == rows(tmp_path / "whole")

    def test_finds_weights_beside_the_original(self, tmp_path):
        """``__file__`` is the original's, so that what lies beside it is found from the copy too."""
        torch.manual_seed(0)
        torch.save(torch.nn.Linear(64, 10).state_dict(), tmp_path / "weights.pt")
        file = tmp_path / "mine.py"
        head = (
            "from pathlib import Path\nimport torch\nlinear = torch.nn.Linear(64, 10)\n"
            "linear.load_state_dict(torch.load(Path(__file__).parent / 'weights.pt'))\n"
        )
        network = "network=torch.nn.Sequential(torch.nn.Flatten(), linear)"
        file.write_text(head + PROBLEM.replace('network="cnn3", width=2', network))
        start(file, [], tmp_path / "whole", Silent())
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "killed", _Stopping(8, _kill))
        resume(tmp_path / "killed", Silent())
        assert rows(tmp_path / "killed") == rows(tmp_path / "whole")

    @pytest.mark.parametrize("setting", ['data="mine.npz"', 'data="npz", data_path="mine.npz"'])
    def test_finds_data_that_were_moved_with_the_problem_file(self, tmp_path, setting):
        generator = np.random.default_rng(0)
        arrays = {"x_train": generator.random((60, 1, 8, 8)), "x_test": generator.random((20, 1, 8, 8))}
        arrays |= {f"y_{part}": np.arange(len(arrays[f"x_{part}"])) % 10 for part in ("train", "test")}
        (tmp_path / "home").mkdir()
        np.savez(tmp_path / "home" / "mine.npz", **arrays)
        file = tmp_path / "home" / "toy.py"
        file.write_text(PROBLEM.replace('data="digits"', f"{setting}, validation_fraction=0.3"))
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "home" / "run", _Stopping(8, _kill))
        (tmp_path / "home").rename(tmp_path / "moved")
        resume(tmp_path / "moved" / "run", Silent())

    def test_refuses_a_changed_module_beside_the_problem_file(self, tmp_path):
        helper, file = tmp_path / "my_network.py", tmp_path / "mine.py"
        helper.write_text(
            "from torch import nn\n\ndef build(shape, classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, classes))\n"
        )
        changed = PROBLEM.replace('network="cnn3", width=2', "network=my_network.build")
        file.write_text(f"import my_network\n{changed}")
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "run", _Stopping(8, _kill))
        before = helper.read_text()
        helper.write_text(before.replace("ReLU", "Tanh"))
        with pytest.raises(InputError, match=r"the module my_network beside .* was changed since the run began"):
            resume(tmp_path / "run", Silent())
        helper.write_text(before)
        resume(tmp_path / "run", Silent())

    def test_where_a_problem_file_goes_to_another_folder(self, tmp_path, monkeypatch):
        """What is relative on the command line stays relative to where the user is."""
        (tmp_path / "side").mkdir()
        (tmp_path / "side" / "my_settings.py").write_text("POPSIZE = 4\n")
        head = "import os, pathlib\nos.chdir(pathlib.Path(__file__).parent)\nimport my_settings\n"
        (tmp_path / "side" / "mine.py").write_text(head + PROBLEM.replace("popsize=4", "popsize=my_settings.POPSIZE"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(_KilledError):
            start(Path("side/mine.py"), [], Path("run"), _Stopping(8, _kill))
        resume(Path("run"), Silent())
        assert (tmp_path / "run" / "results.json").is_file()

    @pytest.mark.parametrize("hook", ["log_hook", "end_of_run_hook"])
    @pytest.mark.parametrize("error", ["ValueError('mine')", "SystemExit(3)", "ConnectionError('server gone')"])
    def test_a_hook_that_fails_costs_nothing_but_itself(self, tmp_path, capsys, hook, error):
        file = tmp_path / "mine.py"
        head = f"def bad(status):\n    raise {error}\n\ndef listen(searcher):\n    searcher.{hook}.append(bad)\n\n"
        file.write_text(head + PROBLEM.replace("checkpoint", "loggers=[listen], checkpoint"))
        start(file, [], tmp_path / "run", Silent())
        assert (tmp_path / "run" / "results.json").is_file()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"the logger or hook bad failed ({error.partition('(')[0]}: " in said

    @pytest.mark.filterwarnings("ignore:.*inplace.*")  # pandas', of EvoTorch's PandasLogger
    def test_keeps_the_rows_of_a_pandas_logger(self, problem, tmp_path):
        file = tmp_path / "pandas_rows.py"
        file.write_text(PROBLEM.replace("checkpoint", 'loggers=["PandasLogger"], checkpoint'))
        with pytest.raises(_KilledError):
            start(file, [], tmp_path / "run", _Stopping(8, _kill))
        resume(tmp_path / "run", Silent())
        lines = (tmp_path / "run" / "pandas.csv").read_text().splitlines()
        assert [line.partition(",")[0] for line in lines] == ["iter", *map(str, range(1, 13))]
        start(file, [], tmp_path / "whole", Silent())
        assert lines == (tmp_path / "whole" / "pandas.csv").read_text().splitlines()

    @pytest.mark.filterwarnings("ignore:.*inplace.*")
    def test_gives_each_pandas_logger_a_table(self, tmp_path):
        file = tmp_path / "two.py"
        both = 'loggers=["PandasLogger", ("PandasLogger", {"interval": 3})], checkpoint'
        file.write_text(PROBLEM.replace("checkpoint", both))
        start(file, [], tmp_path / "run", Silent())
        names = ("pandas.csv", "pandas-2.csv")
        assert [len((tmp_path / "run" / name).read_text().splitlines()) for name in names] == [13, 5]

    def test_says_which_checkpoint_there_is(self, problem, tmp_path):
        def twice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted, match="it has no checkpoint yet and begins again"):
            start(problem, ["checkpoint_seconds=1000"], tmp_path / "early", _Stopping(4, twice))
        with pytest.raises(Interrupted, match="checkpoint at generation 3"):
            start(problem, [], tmp_path / "later", _Stopping(4, twice))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("tile", {"members": "2", "images": 16}),
            ("tile", {"members": 2}),
            ("tile", 3),
            ("overrides", [1]),
            ("overrides", "popsize=4"),
            ("problem_file", None),
            ("problem", 5),
            ("data_dir", 1),
            ("popsize", 8),
            ("popsize", None),
        ],
    )
    def test_refuses_a_damaged_config(self, problem, tmp_path, key, value):
        folder = tmp_path / "run"
        with pytest.raises(_KilledError):
            start(problem, [], folder, _Stopping(8, _kill))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=rf"config\.json: {key}="):
            resume(folder, Silent())

    def test_a_full_disk_loses_nothing(self, problem, tmp_path, reference, monkeypatch):
        folder = tmp_path / "full"
        real, written = Run.log, []

        def log(run, row):
            written.append(row)
            if len(written) == 9:
                run._metrics.write('{"torn')
                raise OSError(28, "No space left on device")
            real(run, row)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", log)
            with pytest.raises(Unwritable, match="No space left"):
                start(problem, [], folder, Silent())
        resume(folder, Silent())
        assert rows(folder) == rows(reference)
        assert same(checkpoint(folder), checkpoint(reference))


class TestMethods:
    """Those that follow gradients; all the rest of this file is about pgpe."""

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "pgpe"])
    def test_run(self, problem, tmp_path, name):
        folder = tmp_path / "run"
        start(problem, [f"method={name}", "generations=4", "clip_norm=5", "l1=1e-5"], folder, Silent())
        assert {p.name for p in folder.iterdir()} >= RECORDS
        results = outcome(folder)
        assert (results["method"], results["generations"]) == (name, 4)
        accuracy = results["accuracy"]
        assert 0 <= accuracy["certified"]["ibp"] <= accuracy["attacked"] <= accuracy["natural"] <= 1
        found = [row for row in rows(folder) if row["event"] == "generation"]
        assert [row["generation"] for row in found] == [1, 2, 3, 4]
        assert all(row["mean_eval"] > 0 for row in found)
        sigmas = [0.02 * (1 - 0.5 * done / 4) for done in range(4)] if name == "rgs" else [0.0] * 4
        assert [row["sigma"] for row in found] == pytest.approx(sigmas)
        certified = name in ("grad", "rgs")
        assert [set(row) & {"certified", "natural_loss"} for row in found] == [
            {"certified", "natural_loss"} if certified and done % 3 == 0 else {"certified"} if certified else set()
            for done in range(4)
        ]
        state = checkpoint(folder)
        assert int(state["searcher"]["optimizer"]["state"][0]["step"]) == 4
        config = json.loads((folder / "config.json").read_text())
        assert (config["method"], config["clip_norm"], config["l1"]) == (name, 5.0, 1e-5)

    @pytest.mark.parametrize("name", ["grad", "rgs", "sabr"])
    def test_resumed_are_bit_for_bit(self, problem, tmp_path, name):
        overrides = [f"method={name}", "optimizer_config.amsgrad=true", "train_attack_steps=2"]
        start(problem, overrides, tmp_path / "whole", Silent())
        killed, stopped = tmp_path / "killed", tmp_path / "stopped"
        with pytest.raises(_KilledError):
            start(problem, overrides, killed, _Stopping(6, _kill))
        interrupt = _Stopping(7, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            start(problem, [*overrides, "checkpoint_seconds=1000"], stopped, interrupt)
        assert checkpoint(killed)["generation"] == 5
        assert checkpoint(stopped)["generation"] == 7
        for folder in (killed, stopped):
            resume(folder, Silent())
            assert rows(folder) == rows(tmp_path / "whole")
            assert same(checkpoint(folder), checkpoint(tmp_path / "whole"))
            assert outcome(folder) == outcome(tmp_path / "whole")
            assert (folder / "network.onnx").read_bytes() == (tmp_path / "whole" / "network.onnx").read_bytes()

    def test_that_meet_nothing_finite_stop_with_their_records(self, problem, tmp_path, monkeypatch):
        folder, losses = tmp_path / "run", CertifiedTraining._losses

        def overflowing(self, *found):
            return losses(self, *found) * (torch.nan if self.generation >= 5 else 1)

        with monkeypatch.context() as patch:
            patch.setattr(CertifiedTraining, "_losses", overflowing)
            with pytest.raises(NonFiniteFitnessError, match="in 3 generations in a row"):
                start(problem, ["method=grad"], folder, Silent())
        found = [row for row in rows(folder) if row["event"] == "generation"]
        assert [row["mean_eval"] is None for row in found] == [False] * 5 + [True] * 2
        assert [row["nonfinite_evals"] for row in found] == [0] * 5 + [1, 2]
        assert checkpoint(folder)["searcher"]["mu"].isfinite().all()
        assert not (folder / "results.json").exists()


STAGES = """
import dataclasses
experiment = dataclasses.replace(experiment, stages=[
    {"method": "pgd", "generations": 5, "batch_size": 16, "center_learning_rate": 0.01, "train_attack_steps": 2},
    {"method": "rgs", "bound": "crown-ibp", "generations": 4, "stdev_init": 0.001, "regulariser": 0.5, "l1": 1e-4},
], control_points=2, generations=6, averaging=0.5, loggers=["PandasLogger"])
"""


class TestStages:
    """Pre-train, then smooth."""

    @pytest.fixture
    def staged(self, tmp_path):
        path = tmp_path / "staged.py"
        path.write_text(PROBLEM + STAGES)
        return path

    def test_follow_each_other_from_centre_to_centre(self, staged, tmp_path):
        start(staged, [], tmp_path / "all", Silent())
        found = [row for row in rows(tmp_path / "all") if row["event"] == "generation"]
        assert [row["generation"] for row in found] == list(range(1, 16))
        assert [row["stage"] for row in found] == [1] * 5 + [2] * 4 + [3] * 6
        assert [row["eps"] for row in found[5:9]] == pytest.approx([0, 0.01, 0.02, 0.02])  # a schedule of its own
        assert [row["sigma"] for row in found[4:6]] == [0, pytest.approx(0.001)]
        results = json.loads((tmp_path / "all" / "results.json").read_text())
        assert results["generations"] == 15
        attacked = 5 * 16 * (2 + 1)  # by two steps, and then once more
        assert results["evaluations"] == {"values": 6 * 8 * 4, "gradients": attacked + 4 * 8 * 4 + 6 * 8 * 2}
        config = json.loads((tmp_path / "all" / "config.json").read_text())
        assert len(config["stage_tiles"]) == 2
        table = (tmp_path / "all" / "pandas.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in table[1:]] == [str(i) for i in range(1, 16)]

    def test_are_what_runs_from_one_another_would_be(self, problem, staged, tmp_path):
        """The second stage's one step begins where a run of the first stage alone ends."""
        alike = '"batch_size": 40, "method": "grad", "generations": 3, "center_learning_rate": 0.01'
        staged.write_text(PROBLEM + STAGES.split("[")[0] + f"[{{{alike}}}], select='last')")
        settings = ["method=grad", "center_learning_rate=0.01", "batch_size=40", "select=last"]
        start(staged, [*settings, "generations=1"], tmp_path / "staged", Silent())
        start(problem, [*settings, "generations=3"], tmp_path / "first", Silent())
        one, other = (checkpoint(tmp_path / name)["searcher"] for name in ("staged", "first"))
        step = (one["mu"] - other["mu"]).abs()
        # Adam's first step is its learning rate in every coordinate that has a gradient.
        assert step.max() == pytest.approx(0.01, rel=1e-3)
        assert (step[step > 1e-6] > 0.009).float().mean() > 0.9

    @pytest.mark.parametrize("stop", [3, 6, 8, 10, 13])
    def test_go_on_bit_for_bit(self, staged, tmp_path, stop):
        """Within a stage, and at the seams."""
        _check_killed_is_whole(staged, [], tmp_path, stop)

    def test_draw_noise_of_their_own(self, problem):
        loaded = load_problem(problem, [])
        stages = [{"method": "rgs"}, {}]
        parts = training.build(dataclasses.replace(loaded.experiment, stages=stages))
        drawn = []
        for stage in parts.stages:
            parts.enter(stage)
            drawn.append(torch.empty(100).normal_(generator=parts.problem.generator))
        assert len({tuple(noise.tolist()) for noise in drawn}) == 3
        alone = training.build(loaded.experiment)  # a run without stages draws what it always drew
        assert torch.equal(torch.empty(100).normal_(generator=alone.problem.generator), drawn[0])

    def test_by_gradients_need_no_actors_where_evolution_has_them(self, problem):
        experiment = dataclasses.replace(load_problem(problem, []).experiment, num_actors=2, stages=[{"method": "pgd"}])
        assert [stage.num_actors for stage in experiment.course] == [0, 2]

    def test_the_best_is_of_the_last(self, staged, tmp_path):
        start(staged, ["validations=15"], tmp_path / "run", Silent())
        assert checkpoint(tmp_path / "run")["best"]["generation"] > 9

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            ('[{"eps": 0.1}]', r"a setting of stage 1='eps': allowed are bound, method, train_eps"),
            ('[{"method": "pgd"}, {"seed": 1}]', "a setting of stage 2='seed': allowed are"),
            ('[{"network": "cnn5"}]', "a setting of stage 1='network': allowed are"),
            ('[{"batch_sise": 3}]', r"a setting of stage 1='batch_sise': allowed are .*did you mean batch_size"),
            ('[{"method": "rgs", "stdev_init": 0}]', r"stage 1: stdev_init=0\.0: allowed is a finite number over 0"),
            ('[{}, {"generations": 0}]', "stage 2: generations=0: allowed is 1 or more"),
            ('["pgd"]', "stages, number 1='pgd': allowed is a mapping of settings"),
            ('[{"batch_size": 10**6}]', "batch_size=1000000: allowed is 1 to"),
        ],
    )
    def test_that_contradict_leave_no_run_folder(self, staged, tmp_path, stages, message):
        staged.write_text(PROBLEM.replace("validations=4,", f"validations=4, stages={stages},"))
        with pytest.raises(InputError, match=message):
            start(staged, [], tmp_path / "run", Silent())
        assert not (tmp_path / "run").exists()


ADD = CentreAverage.add


class TestAveraging:
    def test_is_what_is_validated_and_handed_over(self, problem, tmp_path):
        """Of few generations almost equally weighted: half way between the first and the last, as the searcher goes."""
        settings = ["method=grad", "averaging=0.999", "select=last", "validations=12", "checkpoint_seconds=0"]
        start(problem, settings, tmp_path / "run", Silent())
        state = checkpoint(tmp_path / "run")
        onnx = onnxruntime.InferenceSession(tmp_path / "run" / "network.onnx")
        image = np.zeros((1, 1, 8, 8), np.float32)
        logits = onnx.run(None, {onnx.get_inputs()[0].name: image})[0]
        found = load_problem(tmp_path / "run" / "problem.py", settings)
        parts = training.build(found.experiment)
        for name, close in (("average", True), ("mu", False)):
            centre = state["average"] if name == "average" else state["searcher"]["mu"]
            own = networks.with_parameters(parts.module, centre)(torch.zeros(1, 1, 8, 8)).detach().numpy()
            assert np.allclose(own, logits, atol=1e-5) == close

    def test_goes_on_bit_for_bit(self, problem, tmp_path):
        _check_killed_is_whole(problem, ["averaging=0.8"], tmp_path, 7)

    def test_takes_in_every_centre_of_pgpe(self, problem, tmp_path, monkeypatch):
        """Which reports the one that was evaluated, and has one more in the end."""
        seen = []
        monkeypatch.setattr(CentreAverage, "add", lambda self, centre: seen.append(centre) or ADD(self, centre))
        start(problem, ["averaging=0.5", "select=last"], tmp_path / "run", Silent())
        assert len(seen) == 12 + 1
        assert torch.equal(seen[-1], checkpoint(tmp_path / "run")["searcher"]["mu"])
        steps = torch.stack(seen).diff(dim=0).abs().amax(1)
        assert (steps[1:] > 0).all()
        assert steps.max() < 2 * steps[:3].max()  # none was left out

    def test_weighs_by_age(self):
        average = CentreAverage(0.5)
        for value in (1.0, 2.0, 4.0):
            average.add(torch.tensor([value, -value]))
        expected = (0.25 * 1 + 0.5 * 2 + 4) / 1.75
        torch.testing.assert_close(average.value, torch.tensor([expected, -expected]))


class TestPatience:
    def test_counts_since_the_last_that_was_better(self):
        selection = Selection(patience=2)
        counts = []
        for certified, settled in [(0.5, False), (0.4, False), (0.5, True), (0.6, True), (0.6, True), (0.1, True)]:
            selection.consider({"certified": certified, "settled": settled}, settled=settled)
            counts.append((selection.worse, selection.exhausted))
        assert counts == [(0, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
        assert selection.best == {"certified": 0.6, "settled": True}
        assert not Selection(patience=0).exhausted

    def test_ends_a_run_that_gets_no_better(self, problem, tmp_path, capsys):
        """With a step so small that nothing changes, all validations are alike; those while eps rises do not count."""
        settings = ["generations=40", "validations=20", "center_learning_rate=1e-12", "patience=3", "method=grad"]
        start(problem, settings, tmp_path / "run", Silent())
        found = [row for row in rows(tmp_path / "run") if row["event"] == "validation"]
        assert found[-1]["generation"] == 24  # eps is whole at 20, and 2 generations lie between validations
        results = outcome(tmp_path / "run")
        assert results["generations"] == 24
        assert results["evaluations"] == {"values": 0, "gradients": 24 * 8}

    def test_hands_over_what_it_validated(self, problem, tmp_path):
        """No update that was pending when it stopped."""
        settings = ["generations=40", "validations=20", "eps_schedule.shape=constant", "patience=1", "select=last"]
        start(problem, [*settings, "center_learning_rate=0.3"], tmp_path / "run", Silent())
        state = checkpoint(tmp_path / "run")
        assert state["generation"] < 40
        parts = training.build(load_problem(tmp_path / "run" / "problem.py", settings).experiment)
        natural, certified = evaluation.validate(
            parts.problem.network, state["searcher"]["mu"], parts.data.validation, 0.02, "ibp", 2**30
        )
        last = [row for row in rows(tmp_path / "run") if row["event"] == "validation"][-1]
        assert (last["natural"], last["certified"]) == (natural, certified)

    def test_lets_a_run_go_on_that_gets_better(self, problem, tmp_path):
        start(problem, ["patience=20", "validations=12"], tmp_path / "run", Silent())
        assert outcome(tmp_path / "run")["generations"] == 12

    def test_a_run_that_ended_early_resumes_as_ended(self, problem, tmp_path):
        settings = ["generations=40", "validations=20", "center_learning_rate=1e-12", "patience=3", "method=grad"]
        _check_killed_is_whole(problem, settings, tmp_path, 22)


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["device=cuda:7"], "device=cuda:7: no such CUDA device here"),
            (["batch_size=100000"], "batch_size=100000: allowed is 1 to"),
            (["memory_budget=1KB"], "memory_budget"),
            (["depth=3"], "the network cnn3 has no depth"),
            (["method=rgs", "stdev_init=0"], r"stdev_init=0\.0: allowed is a finite number over 0, with method=rgs"),
            (["method=grad", "num_actors=2"], "num_actors=2: allowed is 0, with method=grad"),
            (["control_points=3"], "control_points=3: allowed is 0 or an even number"),
            (["control_points=2", "symmetric=false"], "symmetric=False: allowed is True, with control_points=2"),
            (["control_points=2", "ranking_method=nes"], "ranking_method='nes': allowed is raw, with control_points=2"),
            (["averaging=1"], r"averaging=1\.0: allowed is 0 or more, less than 1"),
            (["patience=-1"], "patience=-1: allowed is 0 or more"),
            (["weight_decay=-1"], r"weight_decay=-1\.0: allowed is a finite number, 0 or more"),
            (["method=grad", "regulariser=inf"], "regulariser=inf: allowed is a finite number, 0 or more"),
            (["initialisation=xavier"], "initialisation='xavier': allowed are default, shi"),
            (["method=sabr", "stdev_learning_rate=0.1"], r"stdev_learning_rate=0\.1: allowed is 0, with method=sabr"),
            (["method=mtl-ibp", "mixture=1.5"], r"mixture=1\.5: allowed is 0 to 1"),
            (["method=sabr", "mixture=-0.1"], r"mixture=-0\.1: allowed is 0 to 1"),
            (["method=pgd", "train_attack_steps=0"], "train_attack_steps=0: allowed is 1 or more"),
            (["method=pgd", "train_attack_step=0"], r"train_attack_step=0\.0: allowed is a finite number over 0"),
            (["method=grad", "clip_norm=0"], r"clip_norm=0\.0: allowed is a finite number over 0, or none"),
            (["method=grad", "l1=-1"], r"l1=-1\.0: allowed is a finite number, 0 or more"),
            (["method=rgs", "popsize=5"], "popsize=5: allowed is an even number, with symmetric=true"),
            (["method=RGS"], r"method='RGS': allowed are pgpe, .*exp-ibp, pgd, standard \(did you mean rgs\?\)"),
            (["mean=0.1,0.2", "std=1,1"], "the images have 1 channels"),
            (["data=mnist", "data_dir=nowhere", "download=false"], "nowhere"),
        ],
    )
    def test_leaves_no_run_folder(self, problem, tmp_path, overrides, message):
        with pytest.raises(InputError, match=message):
            start(problem, overrides, tmp_path / "run", Silent())
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("existed", [True, False])
    @pytest.mark.parametrize("failure", ["loggers", "disk"])
    def test_that_comes_to_light_late_leaves_no_run_folder(self, tmp_path, monkeypatch, existed, failure):
        file, folder = tmp_path / "toy.py", tmp_path / "runs" / "run"
        file.write_text(PROBLEM.replace("checkpoint", 'loggers=[("StdOutLogger", {"interval": 0})], checkpoint'))
        if existed:
            folder.mkdir(parents=True)
        if failure == "disk":
            real = Run.write_json

            def full(run, name, content):
                if name == "config.json":
                    raise OSError(28, "No space left on device")
                real(run, name, content)

            monkeypatch.setattr(Run, "write_json", full)
        with pytest.raises((InputError, OSError), match=r"interval=0: allowed is 1 or more|No space left"):
            start(file, [], folder, Silent())
        assert set(tmp_path.rglob("*")) == {file, *([tmp_path / "runs", folder] if existed else [])}

    def test_a_budget_that_only_the_training_would_do_with(self, problem, tmp_path):
        """The evaluation is in float64: that it needs more must be known before the training, not after."""
        network = read_network(networks.cnn3((1, 8, 8), 10, mean=[0.0], std=[1.0], width=2), (1, 8, 8))
        cost = BOUNDS["ibp"].cost(network, torch.device("cpu"))
        smallest = 4 * (cost.member + LANES * cost.pair)
        for budget in (smallest - 1, smallest, 2 * smallest - 1):
            with pytest.raises(InputError, match=f"memory_budget={budget} bytes is too small"):
                start(problem, [f"memory_budget={budget}"], tmp_path / "run", Silent())
        assert not (tmp_path / "run").exists()
        start(problem, [f"memory_budget={2 * smallest}"], tmp_path / "run", Silent())

    def test_a_network_that_has_no_place_in_an_onnx_file(self, tmp_path):
        """Known before the training, not after it."""
        file = tmp_path / "odd.py"
        layers = "torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)"
        file.write_text(
            "import torch\n"
            + PROBLEM.replace(
                'network="cnn3", width=2', f"network=lambda shape, classes: torch.nn.Sequential({layers})"
            )
        )
        with pytest.raises(InputError, match="BatchNormalization"):
            start(file, [], tmp_path / "run", Silent())
        assert not (tmp_path / "run").exists()

    def test_a_network_with_too_few_outputs(self, tmp_path):
        file = tmp_path / "few.py"
        network = "network=lambda shape, classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))"
        file.write_text("import torch\n" + PROBLEM.replace('network="cnn3", width=2', network))
        with pytest.raises(InputError, match="3 outputs and data='digits' 10 classes"):
            start(file, [], tmp_path / "run", Silent())


@pytest.mark.slow
class TestProcesses:
    def test_killed_at_random_moments_and_resumed(self, problem, tmp_path):
        """With -9, from outside, wherever it strikes."""
        settings = ["--set", "generations=1500", "--set", "checkpoint_seconds=0.1"]
        command = [sys.executable, "-c", "from evocert.cli import main; main()"]
        subprocess.run(
            [*command, "run", str(problem), *settings, "--run-dir", str(tmp_path / "whole"), "--quiet"], check=True
        )
        folder = tmp_path / "killed"
        arguments = ["run", str(problem), *settings, "--run-dir", str(folder), "--quiet"]
        for pause in (0.3, 1.1):
            process = subprocess.Popen([*command, *arguments])
            self._wait_for(folder, process)
            time.sleep(pause)
            process.kill()
            process.wait()
            arguments = ["resume", str(folder), "--quiet"]
        assert len(rows_or_none(folder)) < 1500
        subprocess.run([*command, *arguments], check=True)
        assert rows(folder) == rows(tmp_path / "whole")
        assert same(checkpoint(folder), checkpoint(tmp_path / "whole"))

    def _wait_for(self, folder: Path, process):
        """Until this process has written metrics of its own."""
        path = folder / "metrics.jsonl"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.02)

    def test_actors_change_nothing(self, problem, tmp_path):
        command = [sys.executable, "-c", "from evocert.cli import main; main()", "run", str(problem), "--quiet"]
        for name, actors in (("alone", 0), ("two", 2)):
            arguments = ["--set", f"num_actors={actors}", "--run-dir", str(tmp_path / name)]
            done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
            assert done.stderr == ""
        assert rows(tmp_path / "alone") == rows(tmp_path / "two")
        assert same(checkpoint(tmp_path / "alone"), checkpoint(tmp_path / "two"))


def rows_or_none(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return lines[:-1]
