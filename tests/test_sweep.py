"""``evocert sweep``: what its cells are, what is refused before any starts, and that killing it costs nothing but time."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from evocert import cli
from evocert.errors import InputError
from evocert.sweep import _Work, plan
from evocert.sweep.display import Terminal
from evocert.sweep.folder import Folder, State
from evocert.sweep.process import Progress, last_line, threads_for_each

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", width=2, eps=0.02, generations=40, batch_size=8, popsize=4, stdev_init=0.02, center_learning_rate=0.02,
    validations=4, checkpoint_seconds=0, attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""
COMMAND = [sys.executable, "-c", "from evocert.cli import main; main()", "sweep"]


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(PROBLEM)
    return path


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """A command line that must end in one line, with nothing started."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments, words=()):
        monkeypatch.setattr(sys, "argv", ["evocert", "sweep", *map(str, arguments)])
        try:
            status = cli._status()
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
        for word in words:
            assert str(word) in err, f"{word!r} is not in {err!r}"
        assert not (tmp_path / "runs").exists()

    return check


class TestGrid:
    def test_seeds_are_outermost(self, problem):
        found = plan(problem, ["method=pgpe,rgs", "bound=ibp,deeppoly"], "0,1", ["popsize=6"])
        assert [cell.name for cell in found.cells] == [
            f"method-{method}_bound-{bound}_seed-{seed}"
            for seed in (0, 1)
            for method in ("pgpe", "rgs")
            for bound in ("ibp", "deeppoly")
        ]
        assert found.cells[1].overrides == ("popsize=6", "seed=0", "method=pgpe", "bound=deeppoly")
        assert {cell.generations for cell in found.cells} == {40}

    def test_bars_part_values_with_commas(self, problem):
        found = plan(problem, ["mean=0.1|0.1,0.2"], None, [])
        assert [cell.overrides for cell in found.cells] == [("mean=0.1",), ("mean=0.1,0.2",)]

    def test_names_are_safe_and_different(self, problem):
        folders = ["a b/é", "a b/ü", "A b/ü", "x" * 300]
        found = plan(problem, ["eps=2/255,8/255", f"data_dir={'|'.join(folders)}"], None, [])
        names = [cell.name for cell in found.cells]
        assert len({name.lower() for name in names}) == 8
        assert all(re.fullmatch(r"[A-Za-z0-9.+_-]{1,140}", name) for name in names)
        assert names[0].startswith("eps-2-255_data_dir-")

    def test_paths_do_not_depend_on_the_folder_any_more(self, problem, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (cell,) = plan(problem, ["data_dir=here"], None, []).cells
        assert cell.overrides == (f"data_dir={tmp_path / 'here'}",)

    def test_the_folder_is_found_again(self, problem):
        first = plan(problem, ["bound=ibp,deeppoly"], "0,1", [])
        assert first.folder.parts[:2] == ("runs", "sweeps")
        assert plan(problem, ["bound=deeppoly,ibp"], "1,0", []).folder == first.folder
        assert plan(problem, ["bound=ibp,deeppoly"], "0,2", []).folder != first.folder
        problem.write_text(PROBLEM + "\n")
        assert plan(problem, ["bound=ibp,deeppoly"], "0,1", []).folder != first.folder


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), ("--grid", "--seeds")),
            (("--grid", "bound"), ("bound", "KEY=A,B")),
            (("--grid", "=ibp"), ("=ibp", "KEY=A,B")),
            (("--grid", "bound="), ("bound=", "empty")),
            (("--grid", "bound=ibp,"), ("bound=ibp,", "empty")),
            (("--grid", "bound=ibp,ibp"), ("ibp", "repeated")),
            (("--grid", "eps=0.1,1/10"), ("eps=1/10", "the same as")),
            (("--grid", "bound=ibp", "--grid", "bound=deeppoly"), ("bound", "once")),
            (("--grid", "restarts=1", "--grid", "attack.restarts=2"), ("attack.restarts", "once")),
            (("--grid", "bund=ibp"), ("--grid bund", "bound")),
            (("--grid", "bound=ibp,box"), ("bound=box", "deeppoly")),
            (("--grid", "popsize=4,5"), ("popsize=5", "even")),
            (("--grid", "popsize=4,many"), ("popsize=many", "whole number")),
            (
                ("--grid", "method=pgpe,grad", "--set", "stdev_learning_rate=0.1"),
                ("method=grad", "stdev_learning_rate"),
            ),
            (("--grid", "bound=ibp", "--set", "bound=ibp"), ("--set bound=ibp", "varies")),
            (("--grid", "bound=ibp", "--set", "popsze=4"), ("popsze", "popsize")),
            (("--grid", "bound=ibp", "--set", "popsize"), ("popsize", "KEY=VALUE")),
            (("--seeds", "0,1,0"), ("--seeds 0,1,0", "repeated")),
            (("--seeds", "0,01,1"), ("--seeds 0,01,1", "repeated")),
            (("--seeds", ""), ("--seeds", "whole numbers")),
            (("--seeds", "0,,1"), ("--seeds 0,,1", "whole numbers")),
            (("--seeds", "-1"), ("--seeds -1", "whole numbers")),
            (("--seeds", "9999999999999999999"), ("seed=9999999999999999999", "2**63")),
            (("--seeds", "0", "--grid", "seed=1"), ("--seeds 0", "grid")),
            (("--seeds", "0", "--jobs", "0"), ("--jobs 0", "1 or more")),
            (("--seeds", "0", "--jobs", "two"), ("two", "whole number")),
        ],
    )
    def test_arguments(self, problem, refused, arguments, words):
        refused(problem, *arguments, words=words)

    def test_problem_files(self, refused, tmp_path):
        refused("absent.py", "--seeds", "0", words=["absent.py"])
        (tmp_path / "mine.py").write_text("experiment = 3\n")
        refused("mine.py", "--seeds", "0", words=["mine.py", "int"])

    def test_folders(self, problem, refused, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        refused(problem, "--seeds", "0", "--out", tmp_path / "full", words=[tmp_path / "full", "not empty"])
        refused(problem, "--seeds", "0", "--out", problem, words=[problem])
        assert (tmp_path / "full" / "mine").read_text() == "mine"

    def test_another_sweeps_folder(self, problem, refused, tmp_path):
        out = tmp_path / "sweep"
        Folder(out, plan(problem, ["bound=ibp"], "0,1", [])).close()
        refused(problem, "--grid", "bound=ibp", "--seeds", "0,1,2", "--out", out, words=[out, "cells", "--out"])
        refused(
            problem, "--grid", "bound=ibp", "--seeds", "0,1", "--set", "eps=0.1", "--out", out, words=[out, "cells"]
        )
        (out / "sweep.json").write_text("{")
        refused(problem, "--grid", "bound=ibp", "--seeds", "0,1", "--out", out, words=["sweep.json"])
        (out / "sweep.json").write_text("[]")
        refused(problem, "--grid", "bound=ibp", "--seeds", "0,1", "--out", out, words=["sweep.json"])
        problem.write_text(PROBLEM + "\n")
        refused(problem, "--grid", "bound=ibp", "--seeds", "0,1", "--out", out, words=["problem_sha256"])

    def test_a_second_sweep_at_once(self, problem, refused, tmp_path):
        with contextlib.closing(Folder(tmp_path / "sweep", plan(problem, [], "0", []))):
            refused(problem, "--seeds", "0", "--out", tmp_path / "sweep", words=["another sweep is at work"])


class TestFolder:
    @pytest.fixture
    def folder(self, problem, tmp_path):
        with contextlib.closing(Folder(tmp_path / "sweep", plan(problem, [], "0", []))) as folder:
            yield folder

    @pytest.fixture
    def cell(self, folder):
        return folder.plan.cells[0]

    def begin(self, folder, cell, **changes):
        path = folder.cell(cell)
        path.mkdir()
        config = {"problem_sha256": folder.plan.sha256, "overrides": list(cell.overrides), **changes}
        (path / "config.json").write_text(json.dumps(config))
        return path

    def test_states(self, folder, cell):
        assert folder.state(cell) is State.NEW
        path = self.begin(folder, cell)
        assert folder.state(cell) is State.BEGUN
        with (path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert folder.state(cell) is State.BUSY
        assert folder.state(cell) is State.BEGUN  # the lock file of a process that is gone
        (path / "results.json").write_text("{}")
        assert folder.state(cell) is State.FINISHED

    def test_a_cell_of_a_killed_sweep_is_waited_for(self, folder, cell, capsys):
        path = self.begin(folder, cell)
        work = _Work(folder, [cell], 1, 1, Terminal())
        with (path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert work.goes_on()
            assert work.goes_on()
        (path / "results.json").write_text("{}")
        assert not work.goes_on()
        assert work.failed == []
        out = capsys.readouterr().out
        assert (out.count("waited for"), out.count("finished")) == (1, 1)

    def test_a_problem_file_that_changes_meanwhile_starts_no_more(self, folder, cell, problem):
        problem.write_text(PROBLEM + "\n")
        work = _Work(folder, [cell], 1, 1, Terminal())
        assert not work.goes_on()
        assert "was changed since the sweep began" in work.failed[0]

    def test_what_a_run_left_before_it_began_is_removed(self, folder, cell):
        path = folder.cell(cell)
        path.mkdir()
        for name in ("problem.py", "split.json", ".lock", ".config.json.tmp"):
            (path / name).write_text("")
        assert folder.state(cell) is State.NEW
        assert not path.exists()

    def test_what_is_not_the_sweeps_is_not_touched(self, folder, cell):
        path = folder.cell(cell)
        path.mkdir()
        (path / "mine").write_text("mine")
        with pytest.raises(InputError, match="no run of this sweep"):
            folder.state(cell)
        assert (path / "mine").exists()

    @pytest.mark.parametrize("change", [{"problem_sha256": "0"}, {"overrides": []}])
    def test_another_run_in_its_place(self, folder, cell, change):
        self.begin(folder, cell, **change)
        with pytest.raises(InputError, match="another run"):
            folder.state(cell)

    def test_the_log_goes_into_the_run_folder_once_there_is_one(self, folder, cell):
        folder.log(cell).write_text("first\n")
        assert folder.keep_log(cell) == folder.log(cell)
        path = self.begin(folder, cell)
        assert folder.keep_log(cell) == path / "sweep.log"
        folder.log(cell).write_text("second\n")
        assert folder.keep_log(cell).read_text() == "first\nsecond\n"
        assert not folder.log(cell).exists()


def test_progress_is_read_as_it_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path)
    progress.update()
    assert progress.generation == 0
    rows = [{"event": "generation", "generation": n, "certified": 0.9} for n in (1, 2)]
    rows.insert(1, {"event": "validation", "generation": 1, "natural": 0.5, "certified": 0.25})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"event": "generation", "gener')
    progress.update()
    assert (progress.generation, progress.natural, progress.certified) == (2, 0.5, 0.25)
    path.write_text(text + '{"event": "generation", "generation": 3}\n')
    progress.update()
    assert progress.generation == 3
    path.write_text(text)  # a resumed run cuts what lies after its checkpoint
    progress.update()
    assert progress.generation == 2


def test_the_last_line_of_a_log(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 10_000 + b"\nevocert: what went wrong \xff\n\n")
    assert last_line(tmp_path / "log") == "evocert: what went wrong \N{REPLACEMENT CHARACTER}"
    assert last_line(tmp_path / "absent") == ""


def test_threads_are_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [threads_for_each(jobs) for jobs in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads_for_each(2) == 2


def metrics(folder):
    """Of each cell, without what depends on the clock."""
    found = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{key: value for key, value in row.items() if key != "timing"} for row in rows]
    return found


def running(folder):
    """The processes that are at work in a sweep's folder."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if str(folder) in line]


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_it_had_not_been(problem, tmp_path):
    arguments = [str(problem), "--grid", "bound=ibp,crown-ibp", "--grid", "method=pgpe,rgs", "--jobs", "2"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    done = subprocess.run([*COMMAND, *arguments, "--out", str(whole)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "certified by crown-ibp" in done.stdout
    assert all((whole / name / "sweep.log").is_file() for name in metrics(whole))

    with subprocess.Popen([*COMMAND, *arguments, "--out", str(pieces)], stdout=subprocess.PIPE, text=True) as process:
        while len(list(pieces.glob("*/checkpoint.pt"))) < 1:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not list(pieces.glob("*/results.json")), "it was to be killed in the middle"
    # At once: the cells of the killed sweep may still be writing their checkpoints, and are waited for.
    done = subprocess.run([*COMMAND, *arguments, "--out", str(pieces)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed" in done.stdout
    assert metrics(pieces) == metrics(whole)
    assert len(metrics(pieces)) == 4
    assert running(pieces) == []

    before = {path: path.stat().st_mtime_ns for path in pieces.glob("*/*")}
    done = subprocess.run([*COMMAND, *arguments, "--out", str(pieces)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "4 cells, 4 of them finished" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in pieces.glob("*/*")}


@pytest.mark.slow
def test_ctrl_c_stops_all_with_checkpoints(problem, tmp_path):
    out = tmp_path / "sweep"
    settings = ["--seeds", "0,1,2", "--jobs", "2", "--set", "generations=100000", "--set", "checkpoint_seconds=1000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, str(problem), *settings, "--out", str(out)], stdout=pipe, stderr=pipe, text=True
    ) as process:
        while len([path for path in out.glob("*/metrics.jsonl") if path.stat().st_size]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == f"evocert: sweep {out} was stopped; 0 of 3 cells are finished, and the same command goes on\n"
    assert "stopping 2 cells" in said
    assert len(list(out.glob("*/checkpoint.pt"))) == 2
    assert all("checkpoint at generation" in path.read_text() for path in out.glob("*/sweep.log"))
    assert running(out) == []


@pytest.mark.slow
def test_a_failure_does_not_stop_the_others_and_is_tried_again(problem, tmp_path):
    out, data = tmp_path / "sweep", tmp_path / "data"
    command = [*COMMAND, str(problem), "--grid", f"init_from=none|{data}", "--out", str(out), "--set", "generations=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"init_from={data}: no such run folder" in done.stderr
    (log,) = out.glob("*.log")
    assert str(log) in done.stderr
    assert "none" in done.stdout  # the other's row
    (finished,) = out.glob("*/results.json")
    subprocess.run(["cp", "-r", finished.parent, data], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 cells, 1 of them finished" in done.stdout
    assert len(list(out.glob("*/results.json"))) == 2
    assert not list(out.glob("*.log"))


def test_a_cell_is_bound_to_its_sweep_before_anything_heavy_is_imported():
    code = "import sys, evocert.orphans; print([m for m in ('torch', 'rich', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
