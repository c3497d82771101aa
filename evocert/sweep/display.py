"""What a user sees of a sweep: a live line for each running cell in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from evocert.display import Output, clock, percent
from evocert.sweep.process import Process

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 30.0


class Terminal:
    """Where a sweep reports to."""

    def __init__(self) -> None:
        self._console = Output(highlight=False)
        self._live: Live | None = None
        self._shown = time.monotonic()
        self._seen: dict[str, tuple[float, int]] = {}  # cell -> when and at which generation it was first seen here

    def say(self, line: str) -> None:
        try:
            self._console.print(line, markup=False, soft_wrap=True)
            sys.stdout.flush()
        except OSError:  # a disk that is full, or what else stdout may be
            self._console.on_broken_pipe()

    def show(self, running: Sequence[Process], state: str) -> None:
        """How far the running cells are, now and then. ``state``: of the whole sweep, in words."""
        now = time.monotonic()
        live = self._console.is_terminal
        if now - self._shown < (REFRESH_SECONDS if live else PLAIN_SECONDS):
            return
        self._shown = now
        lines = [self._line(process, now) for process in running]
        if not live:
            for name, count, _, _, rest in lines:
                self.say(f"{name}  {count}  {rest}")
            return
        table = Table.grid(expand=True, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=2)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        for name, count, done, total, rest in lines:
            table.add_row(name, count, ProgressBar(total=total, completed=done), rest)
        table.add_row(state)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def _line(self, process: Process, now: float) -> tuple[str, str, int, int, str]:
        """Name, count, generations done and in all, and the rest in words."""
        process.progress.update()
        done, total, name = process.progress.generation, process.cell.generations, process.cell.name
        began, first = self._seen.setdefault(name, (now, done)) if done else (now, 0)
        left = clock((now - began) / (done - first) * (total - done)) + " left" if done > first else ""
        certified = process.progress.certified
        words = (
            "starting" if not done else left if certified != certified else f"certified {percent(certified)}  {left}"
        )
        return name, f"{done}/{total}", done, total, words.strip()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
