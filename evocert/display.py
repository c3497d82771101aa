"""What a user sees of a run: one live line in a terminal, a plain line now and then elsewhere, a table in the end."""

import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
REFRESH_SECONDS = 0.2


class Display(Protocol):
    """Where a run reports to."""

    def start(self, title: str, generation: int, generations: int) -> None: ...
    def generation(self, generation: int, loss: float, eps: float, stdev: float) -> None: ...
    def validation(self, natural: float, certified: float) -> None: ...
    def say(self, line: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Reports nothing."""

    def start(self, title: str, generation: int, generations: int) -> None:
        pass

    def generation(self, generation: int, loss: float, eps: float, stdev: float) -> None:
        pass

    def validation(self, natural: float, certified: float) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Output(Console):
    """A console that outlives its reader."""

    def on_broken_pipe(self) -> None:
        """Whoever read stdout is gone (``| head``, a ``tee`` that was killed). The run is worth more than its display."""
        if not self.quiet:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print("evocert: stdout was closed; the run goes on in silence", file=sys.stderr)


class Terminal:
    """Two live lines where stdout is a terminal, otherwise a plain line every ten seconds."""

    def __init__(self) -> None:
        self._console = Output(highlight=False)
        self._natural = self._certified = float("nan")
        self._live: Live | None = None
        self._began = self._shown = 0.0
        self._first = self._generations = 0

    def start(self, title: str, generation: int, generations: int) -> None:
        self.say(title)
        self._began, self._shown = time.monotonic(), 0.0
        self._first, self._generations = generation, generations
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def generation(self, generation: int, loss: float, eps: float, stdev: float) -> None:
        now = time.monotonic()
        if now - self._shown < (REFRESH_SECONDS if self._live else PLAIN_SECONDS) and generation != self._generations:
            return
        self._shown = now
        rate = (generation - self._first) / max(now - self._began, 1e-9)
        pace = f"{rate:.3g}/s  {clock((self._generations - generation) / max(rate, 1e-9))} left"
        count = f"generation {generation}/{self._generations}"
        state = (
            f"loss {loss:.4f}  eps {eps:.4f}  sigma {stdev:.3g}  "
            f"validation: natural {percent(self._natural)} certified {percent(self._certified)}"
        )
        if self._live is None:
            self.say(f"{count}  {pace}  {state}")
            return
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(count, ProgressBar(total=self._generations, completed=generation), pace)
        self._live.update(Group(line, Text(state, no_wrap=True, overflow="ellipsis")), refresh=True)

    def validation(self, natural: float, certified: float) -> None:
        self._natural, self._certified = natural, certified

    def say(self, line: str) -> None:
        try:
            self._console.print(line, markup=False, soft_wrap=True)
            sys.stdout.flush()
        except OSError:  # a disk that is full, or what else stdout may be
            self._console.on_broken_pipe()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def show_results(results: dict[str, Any], folder: Path, written: list[str]) -> None:
    """The table at the end of a run, and the paths of what it wrote."""
    console = Output(highlight=False)
    start = "random weights" if results["init_from"] is None else f"the weights of {results['init_from']}"
    title = (
        f"{results['problem']}: {results['method']} with {results['bound']}, {results['generations']} generations in "
        f"{clock(results['train_seconds'])}\nfrom {start}, seed {results['seed']}"
    )
    table = Table(safe_box=True)
    table.add_column(f"accuracy on {results['examples']} {results['split']} images")
    table.add_column("percent", justify="right")
    accuracy, radius = results["accuracy"], f"eps = {results['eps']:.4g}"
    table.add_row("natural", percent(accuracy["natural"]))
    table.add_row(f"under attack (PGD), {radius}", percent(accuracy["attacked"]))
    for name, value in accuracy["certified"].items():
        table.add_row(f"certified by {name}, {radius}", percent(value))
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for name in written:
        console.print(str(folder / name), markup=False, soft_wrap=True)


def summary(results: dict[str, Any], folder: Path) -> str:
    """One line for scripts."""
    accuracy = results["accuracy"]
    certified = "  ".join(f"certified.{name} {value:.4f}" for name, value in accuracy["certified"].items())
    return f"{folder}  natural {accuracy['natural']:.4f}  attacked {accuracy['attacked']:.4f}  {certified}"


def percent(fraction: float) -> str:
    return "-" if fraction != fraction else f"{100 * fraction:.1f} %"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
