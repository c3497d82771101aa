"""What a user sees of a run: one live line in a terminal, a plain line now and then elsewhere, a table in the end."""

import sys
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

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


class Terminal:
    """Live where stdout is a terminal, otherwise a plain line every ten seconds."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = self._console.is_terminal
        self._natural = self._certified = float("nan")
        self._progress: Progress | None = None
        self._began = self._shown = 0.0
        self._first = self._generations = 0

    def start(self, title: str, generation: int, generations: int) -> None:
        self.say(title)
        self._began, self._shown = time.monotonic(), 0.0
        self._first, self._generations = generation, generations
        if self._live:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[rest]}"), console=self._console)
            self._progress.add_task("", total=generations, completed=generation, rest="")
            self._progress.start()

    def generation(self, generation: int, loss: float, eps: float, stdev: float) -> None:
        now = time.monotonic()
        last = generation == self._generations
        if now - self._shown < (REFRESH_SECONDS if self._live else PLAIN_SECONDS) and not last:
            return
        self._shown = now
        rate = (generation - self._first) / max(now - self._began, 1e-9)
        left = _clock((self._generations - generation) / max(rate, 1e-9))
        state = (
            f"loss {loss:.4f}  eps {eps:.4f}  sigma {stdev:.4g}  validation: natural {_percent(self._natural)} "
            f"certified {_percent(self._certified)}"
        )
        if self._progress is not None:
            task = self._progress.task_ids[0]
            described = f"generation {generation}/{self._generations}  {state}"
            self._progress.update(task, completed=generation, description=described, rest=f"{rate:.0f}/s  {left} left")
        else:
            self._print(f"generation {generation}/{self._generations}  {state}  {rate:.1f}/s  {left} left")

    def validation(self, natural: float, certified: float) -> None:
        self._natural, self._certified = natural, certified

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, soft_wrap=True)
        else:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
        sys.stdout.flush()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def show_results(results: dict[str, Any], folder: Path, written: list[str]) -> None:
    """The table at the end of a run, and the paths of what it wrote."""
    console = Console(highlight=False)
    title = (
        f"{results['problem']}: {results['method']} with {results['bound']}, {results['generations']} generations in "
        f"{_clock(results['train_seconds'])}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column(f"accuracy on {results['examples']} {results['split']} images")
    table.add_column("percent", justify="right")
    table.add_row("natural", _percent(results["accuracy"]["natural"]))
    radius = f"eps = {results['eps']:.4g}"
    table.add_row(f"under attack (PGD), {radius}", _percent(results["accuracy"]["attacked"]))
    for name, value in results["accuracy"]["certified"].items():
        table.add_row(f"certified by {name}, {radius}", _percent(value))
    start = "random weights" if results["init_from"] is None else f"warm start from {results['init_from']}"
    table.caption = f"from {start}, seed {results['seed']}"
    table.caption_justify = "left"
    console.print(table)
    for name in written:
        console.print(str(folder / name), markup=False, soft_wrap=True)


def summary(results: dict[str, Any], folder: Path) -> str:
    """One line for scripts."""
    accuracy = results["accuracy"]
    certified = "  ".join(f"certified.{name} {value:.4f}" for name, value in accuracy["certified"].items())
    return f"{folder}  natural {accuracy['natural']:.4f}  attacked {accuracy['attacked']:.4f}  {certified}"


def _percent(fraction: float) -> str:
    return "-" if fraction != fraction else f"{100 * fraction:.1f} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
