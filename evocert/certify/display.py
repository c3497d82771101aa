"""What a user sees of a certification: the running figures, and a table in the end."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evocert.certify.records import Records, Row
from evocert.display import PLAIN_SECONDS, REFRESH_SECONDS, Output, clock, percent


class Silent:
    """Reports nothing."""

    def begin(self, title: str, total: int, done: int) -> None:
        pass

    def working(self, method: str, examples: int) -> None:
        pass

    def decided(self, rows: Sequence[Row]) -> None:
        pass

    def stop(self) -> None:
        pass


class Terminal:
    """Two live lines where stdout is a terminal, otherwise a plain line every ten seconds."""

    def __init__(self) -> None:
        self._output = Output(highlight=False)
        self._live: Live | None = None
        self._counts: Counter[str] = Counter()
        self._total = self._before = self._done = 0
        self._method = ""
        self._began = self._shown = 0.0

    def begin(self, title: str, total: int, done: int) -> None:
        say(self._output, f"{title}: {total} test images" + (f", {done} on record" if done else ""))
        self._total, self._before, self._began = total, done, time.monotonic()
        if self._output.is_terminal:
            self._live = Live(console=self._output, auto_refresh=False)
            self._live.start()

    def working(self, method: str, examples: int) -> None:
        self._method = f"{method} on {examples}"
        self._show(now=self._live is not None)  # a method may take a minute, in which nothing else is reported

    def decided(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._counts[row.verdict] += 1
        self._done += len(rows)
        if rows:
            self._show(now=self._done == self._total)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, *, now: bool) -> None:
        moment = time.monotonic()
        if moment - self._shown < (REFRESH_SECONDS if self._live else PLAIN_SECONDS) and not now:
            return
        self._shown = moment
        new = self._done - self._before
        left = clock((moment - self._began) / new * (self._total - self._done)) if new > 0 else "-"
        count, method = f"{self._done}/{self._total}", self._method if self._done < self._total else ""
        if self._live is None:
            words = [count, f"{left} left", method, self._state()]
            say(self._output, "  ".join(filter(None, words)))
            return
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_row(count, ProgressBar(total=self._total, completed=self._done), method, f"{left} left")
        self._live.update(Group(line, Text(self._state(), no_wrap=True, overflow="ellipsis")), refresh=True)

    def _state(self) -> str:
        """Parts of what is decided so far."""
        if not self._done:
            return ""
        counts = self._counts
        parts = {
            "natural": self._done - counts["misclassified"],
            "certified": counts["certified"],
            "broken": counts["attacked"],
            "undecided": counts["undecided"],
        }
        return "  ".join(f"{name} {percent(count / self._done)}" for name, count in parts.items())


def show_summary(content: dict[str, Any], records: Records, quiet: bool) -> None:
    """The table at the end, or one line for scripts."""
    output, certified = Output(highlight=False), content["certified"]
    if quiet:
        figures = {name: content[name] for name in ("natural", "attacked", "undecided")} | {
            "certified": certified["total"]
        }
        line = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        say(output, f"{records.path('json')}  {line}")
    else:
        table = Table(safe_box=True)
        table.add_column(f"{content['examples']} test images, eps = {content['settings']['eps']:.4g}")
        table.add_column("percent", justify="right")
        table.add_row("natural", percent(content["natural"]))
        table.add_row("not broken by a counterexample", percent(content["attacked"]))
        for name, value in certified.items():
            if name != "total":
                table.add_row(f"certified first by {name}", percent(value))
        table.add_row("certified in total", percent(certified["total"]), end_section=True)
        table.add_row("undecided", percent(content["undecided"]))
        say(output, table)
        say(output, f"{clock(content['seconds'])} of work; {records.path('json')}")
        say(output, str(records.path("jsonl")))
    if (second := content.get("second_opinion")) is not None:
        output.print(
            f"{second['verifier']} on {second['asked']} of them: proved {second['proved']}, refuted {second['refuted']}, "
            f"undecided {second['undecided']}; {second['agree']} agree with evocert",
            markup=False,
            soft_wrap=True,
        )
    for found in content["contradictions"]:
        line = f"example {found['index']} is certified by {found['certified_by']} and broken by {found['broken_by']}"
        say(output, f"CONTRADICTION: {line}")


def say(output: Output, what: str | Table) -> None:
    """Prints, if it can: what is on record is worth more than a stdout that takes nothing."""
    try:
        output.print(what, markup=False, soft_wrap=isinstance(what, str))
        sys.stdout.flush()
    except OSError:  # a disk that is full, or what else stdout may be
        output.on_broken_pipe()
