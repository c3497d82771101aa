"""The process of one cell: ``evocert run`` or ``evocert resume``, its threads, its progress and its end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evocert.sweep.folder import Folder, State
from evocert.sweep.grid import Cell

_LAUNCH = "from evocert.orphans import end_with; end_with({parent}); from evocert.cli import main; main()"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LAST = 4096  # bytes at the end of a log that are searched for its last line


def threads_for_each(jobs: int) -> int:
    """The share of one of so many jobs in the processors of this process, or in the threads that the user allows."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdecimal() and int(allowed) > 0:
        count = min(count, int(allowed))
    return max(1, count // jobs)


class Process:
    """A cell at work."""

    def __init__(self, cell: Cell, folder: Folder, state: State, threads: int) -> None:
        self.cell, self.folder, self.resumes = cell, folder, state is State.BEGUN
        run = str(folder.cell(cell))
        if self.resumes:
            arguments = ["resume", run]
        else:
            settings = [part for override in cell.overrides for part in ("--set", override)]
            arguments = ["run", str(folder.plan.path), "--run-dir", run, *settings]
        command = [sys.executable, "-c", _LAUNCH.format(parent=os.getpid()), *arguments]
        log = folder.keep_log(cell) if self.resumes else folder.log(cell)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(_THREADS, str(threads))},
                # Ctrl-C in a terminal goes to the whole group: a second one would end a run before its checkpoint.
                start_new_session=True,
            )
        self.progress = Progress(folder.cell(cell) / "metrics.jsonl")

    def ended(self) -> int | None:
        """The exit status, or None while it works."""
        status = self._process.poll()
        if status is not None:
            self.folder.keep_log(self.cell)
        return status

    def stop(self) -> None:
        """As Ctrl-C: it writes a checkpoint and ends."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """At once; what it has written is kept."""
        self._process.kill()
        self._process.wait()
        self.folder.keep_log(self.cell)

    def reason(self) -> str:
        """Of a failure: the last line of its log."""
        return last_line(self.folder.keep_log(self.cell)).removeprefix("evocert: ") or "it said nothing"


class Progress:
    """How far a run is, read from its metrics.jsonl as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.generation = 0
        self.natural = self.certified = float("nan")

    def update(self) -> None:
        try:
            with self._path.open("rb") as file:
                if self._read > os.fstat(file.fileno()).st_size:  # a resumed run cuts what lies after its checkpoint
                    self._read = 0
                file.seek(self._read)
                new = file.read()
        except OSError:  # not yet
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.splitlines()
        generation, validation = _last(lines, "generation"), _last(lines, "validation")
        self.generation = generation.get("generation", self.generation)
        self.natural = validation.get("natural", self.natural)
        self.certified = validation.get("certified", self.certified)


def last_line(path: Path) -> str:
    """Of a log; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _last(lines: Sequence[bytes], event: str) -> dict[str, Any]:
    """The last row of a kind; only that one is parsed, which is what costs."""
    beginning = f'{{"event": "{event}"'.encode()
    line = next((line for line in reversed(lines) if line.startswith(beginning)), b"{}")
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:  # damaged: resume says so
        return {}
    return row
