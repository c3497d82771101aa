"""The command line: exit statuses, and one line on stderr for whatever a user can get wrong."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from evocert import cli

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", width=2, eps=0.02, generations=6, batch_size=8, popsize=4, stdev_init=0.02, center_learning_rate=0.02,
    validations=2, checkpoint_seconds=0, attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(PROBLEM)
    return path


def refused(outcome, *words):
    status, out, err = outcome
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("evocert: ")
    for word in words:
        assert str(word) in err, f"{word!r} is not in {err!r}"


class TestDone:
    def test_a_run_ends_with_a_table_and_what_it_wrote(self, evocert, problem, tmp_path):
        status, out, err = evocert("run", problem, "--run-dir", tmp_path / "run", "--seed", 3, "--set", "popsize=6")
        assert (status, err) == (0, "")
        for words in (
            "generation 6/6",
            "loss",
            "eps 0.0200",
            "natural",
            "certified",
            "left",
            "under attack (PGD), eps = 0.02",
        ):
            assert words in out
        assert "certified by ibp, eps = 0.02" in out
        assert "from random weights, seed 3" in out
        for name in ("results.json", "network.onnx"):
            assert str(tmp_path / "run" / name) in out
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert (config["seed"], config["popsize"]) == (3, 6)

    def test_quiet_is_one_line(self, evocert, problem, tmp_path):
        status, out, err = evocert("run", problem, "--run-dir", tmp_path / "run", "--quiet")
        assert (status, err) == (0, "")
        assert out.count("\n") == 1
        assert out.startswith(str(tmp_path / "run"))

    def test_version_and_help(self, evocert):
        assert evocert("--version")[:2] == (0, f"evocert {cli.evocert.__version__}\n")
        for command in ((), ("run",), ("resume",)):
            status, out, err = evocert(*command, "--help")
            assert (status, err) == (0, "")
            assert "Usage: evocert" in out


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("rum",), ("'rum'", "run")),
            (("run",), ("Missing argument",)),
            (("run", "toy.py", "--bad"), ("--bad",)),
            (("run", "toy.py", "--seed", "x"), ("--seed",)),
            (("resume",), ("Missing argument",)),
        ],
    )
    def test_by_the_parser(self, evocert, arguments, words):
        refused(evocert(*arguments), *words)

    def test_no_command_prints_the_help(self, evocert):
        status, out, err = evocert()
        assert (status, err) == (2, "")
        assert "Usage: evocert" in out

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ("popsze=3", ("popsze", "popsize")),
            ("popsize", ("popsize", "KEY=VALUE")),
            ("popsize=abc", ("popsize=abc", "whole number")),
            ("popsize=2.5", ("popsize=2.5", "whole number")),
            ("popsize=5", ("popsize=5", "even")),
            ("stdev_init=0", ("stdev_init=0", "over 0")),
            ("stdev_init=nan", ("stdev_init",)),
            ("eps=1.5", ("eps=1.5", "0 to 1")),
            ("eps=-0.1", ("eps=-0.1", "0 to 1")),
            ("batch_size=100000", ("batch_size=100000", "1 to 1295")),
            ("bound=box", ("bound='box'", "ibp")),
            ("network=cnn6", ("network='cnn6'", "cnn3")),
            ("optimizer=adamm", ("optimizer='adamm'", "adam")),
            ("optimizer_config.momentum=0.5", ("momentum", "beta1")),
            ("ranking_method=best", ("ranking_method='best'", "centered")),
            ("end=0.5", ("end", "eps_schedule.end", "learning_rate_schedule.end")),
            ("eps_schedule.shape=round", ("round", "linear")),
            ("download=maybe", ("download=maybe", "true or false")),
            ("memory_budget=lots", ("memory_budget='lots'", "2GiB")),
            ("memory_budget=1KiB", ("memory_budget=1024", "would do")),
            ("data=mnits", ("mnits", "mnist")),
            ("device=gpu", ("device='gpu'", "cuda:0")),
            ("device=cuda:0", ("device=cuda:0", "cpu")),
        ],
    )
    def test_settings(self, evocert, problem, tmp_path, setting, words):
        refused(evocert("run", problem, "--run-dir", tmp_path / "run", "--set", setting), *words)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("import evocert\n", ("no experiment",)),
            ("experiment = 3\n", ("type int",)),
            ("x = (\n", ("line 1",)),
            ("\n\nraise ValueError('mine')\n", ("line 3", "ValueError", "mine")),
            ("import sys\nsys.exit(4)\n", ("SystemExit",)),
            ("import nothing_of_that_name\n", ("nothing_of_that_name",)),
            (PROBLEM.replace("popsize=4", "popsize='4'"), ("popsize", "'4'", "whole number")),
            (PROBLEM.replace("popsize=4", "popsizes=4"), ("popsizes",)),
            (
                PROBLEM.replace('"digits"', '"digits", network=torch.nn.ReLU').replace(
                    "evocert\n", "evocert, torch\n", 1
                ),
                ("ReLU",),
            ),
        ],
    )
    def test_problem_files(self, evocert, tmp_path, content, words):
        (tmp_path / "mine.py").write_text(content)
        refused(evocert("run", tmp_path / "mine.py", "--run-dir", tmp_path / "run"), *words)

    def test_files_that_are_no_problem_files(self, evocert, tmp_path):
        (tmp_path / "mine.txt").write_text(PROBLEM)
        (tmp_path / "binary.py").write_bytes(bytes(range(256)))
        for name in ("absent.py", "mine.txt", "binary.py", "."):
            refused(evocert("run", tmp_path / name), name)

    def test_layers_without_a_bound(self, evocert, tmp_path):
        layers = "nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))"
        content = PROBLEM.replace("width=2", f"network={layers}").replace(
            "import evocert", "import evocert\nfrom torch import nn"
        )
        (tmp_path / "mine.py").write_text(content)
        refused(evocert("run", tmp_path / "mine.py", "--run-dir", tmp_path / "run"), "GELU", "'2'", "Conv2d")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x_train": None}, ("x_train",)),
            ({"x_train": np.zeros((20, 8, 8), np.uint8)}, ("x_train", "[20, 8, 8]")),
            ({"x_train": np.full((20, 1, 8, 8), 2.0)}, ("x_train", "2")),
            ({"x_train": np.full((20, 1, 8, 8), np.nan)}, ("x_train",)),
            ({"y_train": np.arange(20) % 3 - 1}, ("y_train", "-1")),
            ({"y_test": np.full(20, 9)}, ("y_test", "9")),
            ({"y_train": np.zeros(20)}, ("y_train", "float64")),
        ],
    )
    def test_arrays(self, evocert, problem, tmp_path, change, words):
        images, labels = np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 3
        arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **change}
        np.savez(tmp_path / "mine.npz", **{k: v for k, v in arrays.items() if v is not None})
        refused(evocert("run", problem, "--set", "data=npz", "--set", f"data_path={tmp_path / 'mine.npz'}"), *words)

    def test_data_that_is_absent(self, evocert, problem, tmp_path):
        where = ["--set", f"data_dir={tmp_path / 'nowhere'}", "--set", "download=false"]
        refused(evocert("run", problem, "--set", "data=mnist", *where), "nowhere")

    def test_run_folders(self, evocert, problem, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        refused(evocert("run", problem, "--run-dir", tmp_path / "full"), tmp_path / "full", "not empty")
        refused(evocert("run", problem, "--run-dir", problem), problem)
        refused(evocert("resume", tmp_path / "full"), tmp_path / "full")
        assert evocert("run", problem, "--run-dir", tmp_path / "run", "--quiet")[0] == 0
        refused(evocert("resume", tmp_path / "run"), "is finished")


class TestFailed:
    def test_a_full_disk(self, evocert, problem, tmp_path, monkeypatch):
        from evocert.runs import Run

        def full(run, state):
            raise OSError(28, "No space left on device", str(run.path / "checkpoint.pt"))

        monkeypatch.setattr(Run, "save_checkpoint", full)
        status, _, err = evocert("run", problem, "--run-dir", tmp_path / "run", "--quiet")
        assert status == 1
        assert err.count("\n") == 1
        assert "No space left on device" in err
        assert f"evocert resume {tmp_path / 'run'}" in err

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried …"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            MemoryError(),
        ],
    )
    def test_memory_that_is_not_there(self, evocert, problem, tmp_path, monkeypatch, error):
        def fail(*args):
            raise error

        monkeypatch.setattr("evocert.training._validate", fail)
        status, _, err = evocert("run", problem, "--run-dir", tmp_path / "run", "--quiet")
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith("evocert: out of memory; a smaller memory_budget")

    def test_a_loss_that_is_never_finite(self, evocert, problem, tmp_path):
        settings = ["--set", "stdev_init=1e30", "--run-dir", tmp_path / "run", "--quiet"]
        status, _, err = evocert("run", problem, *settings)
        assert status == 1
        assert err.count("\n") == 1
        assert "no member had a finite loss in 3 generations" in err


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(problem, tmp_path):
    """In a process of its own, as a user would."""
    command = [sys.executable, "-c", "from evocert.cli import main; main()"]
    folder = tmp_path / "my run"
    arguments = ["run", str(problem), "--run-dir", str(folder), "--set", "generations=100000"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert f"evocert resume '{folder}'" in err
    assert os.listdir(folder).count(".lock") == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "resume"])
@pytest.mark.parametrize("pause", [0.3, 1.5])
def test_ctrl_c_before_the_training_is_answered(problem, tmp_path, command, pause):
    python = [sys.executable, "-c", "from evocert.cli import main; main()"]
    arguments = [str(problem)] if command == "run" else [str(tmp_path / "run")]
    if command == "resume":
        subprocess.run([*python, "run", str(problem), "--run-dir", str(tmp_path / "run"), "--quiet"], check=True)
        (tmp_path / "run" / "results.json").unlink()
    with subprocess.Popen([*python, command, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        time.sleep(pause)
        process.send_signal(2)
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert err.startswith("evocert: ")


@pytest.mark.slow
@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_a_stdout_that_takes_nothing_costs_nothing(problem, tmp_path, stdout):
    command = f"exec {sys.executable} -c 'from evocert.cli import main; main()' run {problem} --run-dir '{tmp_path}/ü' {stdout}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, env=environment)
    assert done.stderr.count("\n") <= 1
    assert done.returncode == 0
    assert (tmp_path / "ü" / "results.json").is_file()


@pytest.mark.slow
def test_a_reader_that_goes_away_costs_nothing(problem, tmp_path):
    """``evocert run … | head -1``: the run goes on in silence."""
    command = [sys.executable, "-c", "from evocert.cli import main; main()", "run", str(problem)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "run")], stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout.readline().startswith("toy: pgpe with ibp")
        process.stdout.close()
        assert process.stderr.read() == "evocert: stdout was closed; the run goes on in silence\n"
    assert process.returncode == 0
    assert (tmp_path / "run" / "results.json").is_file()
