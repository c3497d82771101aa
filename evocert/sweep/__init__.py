"""``evocert sweep``: every cell of a grid as a run of its own, several at once, whatever is interrupted or fails."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evocert.errors import InputError
from evocert.sweep.display import Terminal
from evocert.sweep.folder import Folder, State
from evocert.sweep.grid import Cell, Plan, plan
from evocert.sweep.process import Process, threads_for_each

__all__ = ["Outcome", "SweepStopped", "plan", "sweep"]

POLL_SECONDS = 0.1


class SweepStopped(Exception):  # noqa: N818 (no error: the user's wish)
    """The user stopped the sweep: the message says what is kept, and how to go on."""


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        folder: its folder.
        finished: the run folders of the finished cells, in the order of the grid.
        failed: for each failed cell a line that says why and where its log is.
    """

    folder: Path
    finished: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def sweep(plan: Plan, out: Path | None, jobs: int, display: Terminal) -> Outcome:
    """Run what is not finished of a sweep; what was interrupted or has failed before is continued.

    Args:
        plan: its cells.
        out: its folder: new, empty, or of the same sweep before; None: the plan's own.
        jobs: how many cells work at a time, each with an equal share of the threads.

    Raises:
        InputError: the folder is another sweep's, or is in use.
        SweepStopped: by Ctrl-C or SIGTERM.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: allowed is 1 or more")
    folder = Folder(out or plan.folder, plan)
    with contextlib.closing(folder):
        states = {cell: folder.state(cell) for cell in plan.cells}
        waiting = [cell for cell in plan.cells if states[cell] is not State.FINISHED]
        jobs = min(jobs, len(plan.cells))
        threads = threads_for_each(jobs)
        finished = len(plan.cells) - len(waiting)
        display.say(
            f"{plan.problem}: {len(plan.cells)} cells, {finished} of them finished; {jobs} at a time with {threads} "
            f"{'thread' if threads == 1 else 'threads'} each  ->  {folder.path}"
        )
        outcome = Outcome(folder.path)
        work = _Work(folder, waiting, jobs, threads, display)
        try:
            with _interrupts() as interrupted:
                while work.goes_on():
                    if interrupted:
                        work.stop(interrupted)
                        break
                    time.sleep(POLL_SECONDS)
        finally:
            display.stop()
            work.kill()
        outcome.finished = [folder.cell(cell) for cell in plan.cells if (folder.cell(cell) / "results.json").is_file()]
        if interrupted and len(outcome.finished) + len(work.failed) < len(plan.cells):
            raise SweepStopped(
                f"sweep {folder.path} was stopped; {len(outcome.finished)} of {len(plan.cells)} cells are finished, and the "
                "same command goes on"
            )
        outcome.failed = work.failed
        return outcome


class _Work:
    """The cells that are not finished yet, and the processes of some of them."""

    def __init__(self, folder: Folder, waiting: list[Cell], jobs: int, threads: int, display: Terminal) -> None:
        self._folder, self._waiting, self._jobs, self._threads = folder, list(waiting), jobs, threads
        self._display = display
        self._running: list[Process] = []
        self._busy: set[Cell] = set()  # of those that wait, the ones of which the user was told why
        self.failed: list[str] = []

    def goes_on(self) -> bool:
        """Notice ends, start what there is room for, show it. False when nothing is left."""
        for process in list(self._running):
            if (status := process.ended()) is not None:
                self._running.remove(process)
                self._note_end(process, status)
        for cell in list(self._waiting):
            if len(self._running) >= self._jobs:
                break
            self._try_start(cell)
        left = len(self._waiting)
        state = f"{left} waiting" + (f", {len(self.failed)} failed" if self.failed else "")
        self._display.show(self._running, state)
        return bool(self._running or self._waiting)

    def _try_start(self, cell: Cell) -> None:
        """Start a cell, unless another process is at work in it: one of a sweep that was killed, which ends by itself."""
        try:
            state = self._folder.state(cell)
            if state is State.BUSY:
                if cell not in self._busy:
                    self._busy.add(cell)
                    self._display.say(f"{cell.name}  another process is at work in it; it is waited for")
                return
            self._waiting.remove(cell)
            if state is State.FINISHED:  # by that other process
                self._display.say(f"{cell.name}  finished")
                return
            if state is State.NEW and not self._folder.problem_unchanged():
                raise InputError(f"problem file {self._folder.plan.path} was changed since the sweep began")
            self._running.append(Process(cell, self._folder, state, self._threads))
            self._display.say(f"{cell.name}  {'resumed' if self._running[-1].resumes else 'started'}")
        except (InputError, OSError) as error:
            if cell in self._waiting:
                self._waiting.remove(cell)
            self._fail(cell, " ".join(str(error).split()))

    def _note_end(self, process: Process, status: int) -> None:
        cell = process.cell
        if status == 0 and (self._folder.cell(cell) / "results.json").is_file():
            self._display.say(f"{cell.name}  finished")
        else:
            how = f"was killed by signal {-status}" if status < 0 else f"exit status {status}"
            self._fail(cell, f"{how}: {process.reason()}; its log is {self._folder.keep_log(cell)}")

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failed.append(f"cell {cell.name} failed: {reason}")
        self._display.say(f"{cell.name}  failed")

    def stop(self, interrupted: list[int]) -> None:
        """Ask all to write their checkpoints and end, and wait for them, or for a second Ctrl-C."""
        self._display.stop()
        if self._running:
            self._display.say(f"stopping {len(self._running)} cells, which write their checkpoints")
        for process in self._running:
            process.stop()
        while len(interrupted) < 2 and (self._running):
            self._running = [process for process in self._running if process.ended() is None]
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """Whatever still works, after a second Ctrl-C or an error."""
        for process in self._running:
            process.kill()
        self._running = []


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """``with _interrupts() as interrupted``: a list that Ctrl-C and SIGTERM append to."""
    interrupted: list[int] = []

    def note(number: int, frame: Any) -> None:
        interrupted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
