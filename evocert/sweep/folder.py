"""A sweep's folder: sweep.json, one run folder for each cell, and what state each is in."""

import fcntl
import hashlib
import json
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

from evocert.compare import SWEEP
from evocert.errors import InputError
from evocert.files import Lock, write_atomically
from evocert.sweep.grid import IDENTITY, Cell, Plan

_LOCK = ".sweep.lock"
LOG = "sweep.log"  # in a cell's folder: what its processes have said
# What a run that is killed before it has a config.json may leave.
_BEGINNINGS = {"problem.py", "environment.json", "split.json", ".lock"}


class State(Enum):
    """Of a cell."""

    NEW = "new"
    BEGUN = "begun"
    FINISHED = "finished"
    BUSY = "busy"  # another process is at work in it


class Folder:
    """The folder of one sweep, held by one process.

    Raises:
        InputError: it is another sweep's, is not empty, or cannot be written to; or another process is at work in it.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        try:
            path.mkdir(parents=True, exist_ok=True)
            left = {file.name for file in path.iterdir()} - {f".{SWEEP}.tmp", _LOCK}  # of a sweep killed at its start
            if left and SWEEP not in left:
                raise InputError(
                    f"folder {path} is not empty: allowed is a new one, an empty one, or that of this sweep"
                )
            self._lock = Lock(path / _LOCK, f"folder {path}: another sweep is at work in it")
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"folder {path}: there is a file of that name") from error
        except OSError as error:
            raise InputError(f"folder {path} cannot be written to: {error.strerror}") from error
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.release()

    def _check(self) -> None:
        """Whether sweep.json is of this sweep; a new one is written."""
        file, record = self.path / SWEEP, self.plan.record()
        if not file.exists():
            try:
                write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())
            except OSError as error:
                raise InputError(f"folder {self.path} cannot be written to: {error.strerror}") from error
            return
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged: allowed is what evocert sweep wrote there") from error
        differing = [key for key in IDENTITY if not isinstance(found, dict) or found.get(key) != record[key]]
        if differing:
            raise InputError(
                f"folder {self.path} is of another sweep, {', '.join(differing)} in its {SWEEP} differ: allowed is another "
                "--out, or the command that it began with"
            )

    def cell(self, cell: Cell) -> Path:
        return self.path / cell.name

    def log(self, cell: Cell) -> Path:
        """Where the cell's process writes: a run begins in an empty folder, so its log is beside it until it ends."""
        return self.path / f"{cell.name}.log"

    def keep_log(self, cell: Cell) -> Path:
        """The log into the cell's folder, if that has become one; returns where it is."""
        beside, inside = self.log(cell), self.cell(cell) / LOG
        if not (self.cell(cell) / "config.json").is_file():
            return beside
        if beside.exists():
            with inside.open("ab") as file:
                file.write(beside.read_bytes())
            beside.unlink()
        return inside

    def state(self, cell: Cell) -> State:
        """What is to be done with a cell. What a run left that had not begun yet is removed.

        Raises:
            InputError: its folder is of something else.
        """
        path = self.cell(cell)
        if not path.exists():
            return State.NEW
        if _is_locked(path / ".lock"):
            return State.BUSY
        if (path / "config.json").is_file():
            self._check_config(path, cell)
            return State.FINISHED if (path / "results.json").is_file() else State.BEGUN
        left = list(path.iterdir()) if path.is_dir() else [path]
        if any(
            not (file.name in _BEGINNINGS or (file.name.startswith(".") and file.name.endswith(".tmp")))
            for file in left
        ):
            raise InputError(f"{path} is no run of this sweep: allowed is what the sweep wrote there")
        shutil.rmtree(path)
        return State.NEW

    def _check_config(self, path: Path, cell: Cell) -> None:
        file = path / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_bytes())
            found = (config["problem_sha256"], config["overrides"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged: allowed is what the run wrote there") from error
        if found != (self.plan.sha256, list(cell.overrides)):
            raise InputError(f"{path} is of another run: allowed is the one that the sweep began there")

    def problem_unchanged(self) -> bool:
        """Whether the problem file is still what the sweep began with."""
        try:
            return hashlib.sha256(self.plan.path.read_bytes()).hexdigest() == self.plan.sha256
        except OSError:
            return False


def _is_locked(path: Path) -> bool:
    """Whether a live process holds the lock file; one of a dead process is free."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        pass
    return False
