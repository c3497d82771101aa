"""The run folder: creation, atomic writes, cutting of metrics, checkpoints and what is done when they are damaged."""

import fcntl
import json
import os
from contextlib import closing

import pytest
import torch

from evocert.errors import InputError
from evocert.runs import CHECKPOINT, PREVIOUS, Run


def rows(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", "toy")
    run.write_bytes("problem.py", b"")
    run.write_json("config.json", {})
    yield run
    run.close()


class TestFolder:
    def test_is_named_by_problem_and_time(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        one, other = Run.create(None, "toy"), Run.create(None, "toy")
        one.close()
        other.close()
        assert one.path.parent == other.path.parent
        assert one.path.parts[:2] == ("runs", "toy")
        assert one.path != other.path

    def test_may_exist_if_it_is_empty(self, tmp_path):
        (tmp_path / "a").mkdir()
        with closing(Run.create(tmp_path / "a", "toy")) as run:
            assert run.path == tmp_path / "a"

    def test_must_not_hold_anything(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InputError, match="is not empty"):
            Run.create(tmp_path, "toy")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_must_not_be_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(InputError, match="there is a file of that name"):
                Run.create(path, "toy")

    def test_must_be_writable(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # root may write anywhere
        with pytest.raises(InputError, match="cannot be written to: Permission denied"):
            Run.create(tmp_path / "a", "toy")

    def test_has_one_process_at_work_also_while_another_leaves(self, run, monkeypatch):
        """Between its opening the lock file and its locking it, the last holder may have removed that file."""
        real, left = fcntl.flock, []

        def flock(file, operation):
            if not left:
                left.append(True)
                run.close()
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with closing(Run.open(run.path)), pytest.raises(InputError, match="another process is at work"):
            Run.open(run.path)

    def test_has_one_process_at_work(self, run):
        with pytest.raises(InputError, match="another process is at work"):
            Run.open(run.path)
        run.close()
        Run.open(run.path).close()

    def test_that_is_none_is_refused(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(InputError, match=r"no run folder that can be resumed: it has no config\.json"):
                Run.open(path)

    def test_is_cleaned_of_what_a_killed_process_left(self, run):
        (run.path / f".{CHECKPOINT}.tmp").write_bytes(b"half")
        (run.path / ".network.onnx-abc").mkdir()
        run.close()
        Run.open(run.path).close()
        assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "problem.py"]


class TestWrites:
    def test_leave_the_old_file_when_they_fail(self, run, monkeypatch):
        run.write_json("results.json", {"a": 1})

        def full(number):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            run.write_json("results.json", {"a": 2})
        assert json.loads((run.path / "results.json").read_text()) == {"a": 1}
        assert not list(run.path.glob(".*.tmp"))

    def test_refuse_numbers_that_json_has_not(self, run):
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_json("results.json", {"a": float("nan")})
        assert not (run.path / "results.json").exists()


class TestMetrics:
    def test_are_cut_after_the_checkpoint(self, run):
        run.open_metrics(0, pytest.fail)
        for generation in range(1, 6):
            run.log({"event": "generation", "generation": generation, "x": float("nan") if generation == 2 else 1.5})
        run._metrics.write('{"event": "generation", "gen')
        run.close()
        run.open_metrics(3, pytest.fail)
        run.log({"event": "generation", "generation": 4, "x": 0.25})
        assert [r["generation"] for r in rows(run)] == [1, 2, 3, 4]
        assert [r["x"] for r in rows(run)] == [1.5, None, 1.5, 0.25]

    def test_that_are_damaged_are_left_out_and_mentioned(self, run):
        """A damaged row costs itself, not the good ones after it."""
        rows_there = [b'{"generation": 1}\n', b"\x00\x00\n", b'{"generation": 3}\n', b'{"generation": 4}\n']
        (run.path / "metrics.jsonl").write_bytes(b"".join(rows_there))
        said = []
        run.open_metrics(3, said.append)
        assert [r["generation"] for r in rows(run)] == [1, 3]
        (line,) = said
        assert "has 1 damaged rows, which are left out, and lacks 1 of 3 generations" in line

    def test_that_are_gone_are_mentioned(self, run):
        said = []
        run.open_metrics(2, said.append)
        assert "lacks 2 of 2 generations" in said[0]

    def test_are_flushed_row_by_row(self, run):
        run.open_metrics(0, pytest.fail)
        run.log({"generation": 1})
        assert rows(run) == [{"generation": 1}]


class TestCheckpoints:
    def save(self, run, *generations):
        for generation in generations:
            run.save_checkpoint({"generation": generation, "x": torch.full((8,), float(generation))})

    def test_give_the_last_and_keep_the_one_before(self, run):
        assert run.load_checkpoint(pytest.fail) is None
        self.save(run, 1, 2, 3)
        assert run.load_checkpoint(pytest.fail)["generation"] == 3
        assert torch.load(run.path / PREVIOUS, weights_only=True)["generation"] == 2

    @pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "other", "one bit of a tensor"])
    def test_that_are_damaged_are_named_and_passed_over(self, run, damage):
        self.save(run, 1, 2)
        path = run.path / CHECKPOINT
        content = path.read_bytes()
        if damage == "other":
            torch.save([1, 2], path)
        else:
            place = content.index(torch.full((8,), 2.0).numpy().tobytes())
            flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            path.write_bytes(
                {
                    "one bit of a tensor": flipped,
                    "cut": content[: len(content) // 2],
                    "zeros": b"\0" * len(content),
                    "empty": b"",
                }[damage]
            )
        said = []
        assert run.load_checkpoint(said.append)["generation"] == 1
        assert str(path) in said[0]
        assert "corrupted" in said[0]
        assert f"{PREVIOUS}, at generation 1" in said[1]
        (run.path / PREVIOUS).write_bytes(b"x")
        with pytest.raises(InputError, match=f"no checkpoint can be read .{CHECKPOINT}, {PREVIOUS}"):
            run.load_checkpoint(said.append)

    def test_are_never_without_a_good_one_while_they_are_written(self, run, monkeypatch):
        """Stopped before each of the calls that change the folder, as a kill would."""
        self.save(run, 1, 2)

        class KilledError(Exception):
            pass

        calls = []
        for name in ("fsync", "link", "replace"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name), calls))
        self.save(run, 3)
        total = len(calls)
        assert total >= 4
        for stop in range(total):
            monkeypatch.undo()
            self.save(run, 3)
            calls.clear()
            for name in ("fsync", "link", "replace"):
                monkeypatch.setattr(os, name, self._counted(getattr(os, name), calls, stop, KilledError))
            with pytest.raises(KilledError):
                self.save(run, 4)
            # The last call only makes the new name last.
            assert run.load_checkpoint(pytest.fail)["generation"] == (4 if stop == total - 1 else 3)
        monkeypatch.undo()
        self.save(run, 4, 5)
        assert run.load_checkpoint(pytest.fail)["generation"] == 5
        assert torch.load(run.path / PREVIOUS, weights_only=True)["generation"] == 4

    def test_need_no_links(self, run, monkeypatch):
        """FAT and some network file systems have none."""

        def refuse(*args):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        self.save(run, 1, 2)
        assert torch.load(run.path / PREVIOUS, weights_only=True)["generation"] == 1

    def _counted(self, function, calls, stop=None, error=None):
        def call(*args):
            calls.append(function.__name__)
            if stop is not None and len(calls) > stop:
                raise error
            return function(*args)

        return call
