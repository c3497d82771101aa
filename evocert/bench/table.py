"""A bench report for the eyes: tables of at most 100 columns."""

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDTH = 100
BUSY = 0.4  # other processes for each thread, from which on ratios are not to be trusted
LEGEND = """\
per s, ms: network-images, median; the whole population at once, in the tiles that evocert chooses
passes: time over that of a forward pass of the same population, in the same run; ibp's floor is 2
MiB: what a call takes, above the level before it, in a fresh process with Numba's loops
M ops: million multiply-adds that the structured algorithm needs for a network-image
of floor: what share of ms these would take at the rate of the large product
loop: one network after another, dense coefficients on whole maps, on so many members and images
x: their time over ours, by network-image; off by: their largest difference from our bounds"""
LIRPA = """\
auto_LiRPA {version}: one network after another, on {members} members; the same images and threads;
  first all images at once, then the best of 1, 2 and 8 at once; its CROWN is off by more, since it
  keeps IBP's intervals where they decide a neuron for all images at once"""


class Tables:
    """Prints a report as it comes in; in between a terminal shows what is being measured."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = WIDTH
        self._live: Live | None = None

    def say(self, line: str) -> None:
        """Something that takes a while begins."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def stop(self) -> None:
        """Nothing is being measured any more."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def header(self, report: dict[str, Any]) -> None:
        made, rate, load = report["environment"], report["multiply_adds_per_second"], report["load"]
        self._print(
            f"evocert {made['evocert']} bench, {report['date']}\n"
            f"{made['device']}, {made['threads']} threads; torch {made['torch']}, Python {made['python']}\n"
            f"rate of a large float32 product: {_number(rate / 1e9)} thousand million multiply-adds a second\n"
            f"load average before: {load:.1f}"
        )
        if load > BUSY * made["threads"]:
            self._print(
                "the machine is busy: threads that share an operation, as the loops' do, wait for each other then, and\n"
                "lose far more than tiles of one thread each; ratios to the loops come out too high"
            )

    def network(self, found: dict[str, Any]) -> None:
        rows = found["bounds"]
        self._print(
            f"\n{found['network']} w={found['width']} on {'x'.join(map(str, found['input_shape']))}, "
            f"D = {found['parameters']:,}; {found['members']} members, {found['images']} images, eps = {found['eps']:.4g}\n"
            f"images: {found['data']}\nweights: {found['weights']}"
        )
        for table in (_own(rows), _loop(rows), _auto_lirpa(rows)):
            if table.row_count:
                self._console.print(table)
        for remark in _remarks(rows):
            self._print(remark)

    def footer(self, report: dict[str, Any]) -> None:
        self._print(f"\n{LEGEND}")
        theirs = [row["auto_lirpa"] for found in report["networks"] for row in found["bounds"]]
        measured = [each for each in theirs if each and "failed" not in each]
        if measured:
            self._print(LIRPA.format(**measured[0]))
        if report["auto_lirpa"]:
            self._print(report["auto_lirpa"])

    def _print(self, text: str) -> None:
        self.stop()
        self._console.print(text, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(safe_box=True)
    table.add_column("bound")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _own(rows: list[dict[str, Any]]) -> Table:
    table = _table("per s", "ms", "passes", "MiB", "M ops", "of floor")
    for row in rows:
        times = row["per_second"], row["milliseconds"], row["forward_passes"]
        operations, share = _number(row["operations"] / 1e6), f"{100 * row['floor_share']:.1f} %"
        table.add_row(row["bound"], *map(_number, times), _memory(row["peak"]), operations, share)
    return table


def _loop(rows: list[dict[str, Any]]) -> Table:
    table = _table("loop ms", "x", "members", "images", "off by")
    for row in rows:
        if loop := row["loop"]:
            times = _number(loop["milliseconds"]), _number(loop["ratio"])
            sizes = str(loop["members"]), str(loop["images"])
            table.add_row(row["bound"], *times, *sizes, f"{loop['largest_difference']:.0e}")
    return table


def _auto_lirpa(rows: list[dict[str, Any]]) -> Table:
    table = _table("auto_LiRPA ms", "x", "MiB", "best at", "ms", "x", "MiB", "off by")
    for row in rows:
        theirs = row["auto_lirpa"]
        if theirs and "failed" not in theirs:
            every, best = (
                [_number(part["milliseconds"]), _number(part["ratio"]), _memory(part["peak"])]
                for part in (theirs["all_images"], theirs["best_chunk"])
            )
            chunk, difference = theirs["best_chunk"]["images"], theirs["largest_difference"]
            table.add_row(row["bound"], *every, str(chunk), *best, f"{difference:.0e}")
    return table


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    """What no column has room for."""
    found = []
    for row in rows:
        name, peak, loop, theirs = row["bound"], row["peak"], row["loop"], row["auto_lirpa"]
        if row["undecided"] is not None:
            shares = ", ".join(f"{100 * share:.0f} %" for share in row["undecided"])
            found.append(f"{name}: undecided by one layer's interval, in order: {shares}")
        if isinstance(peak, str):
            found.append(f"{name}: its memory could not be measured: {peak}")
        if loop and not loop["agrees"]:
            found.append(f"{name}: the loop DISAGREES, by {loop['largest_difference']:.2g}")
        if theirs and "failed" in theirs:
            found.append(f"{name}: auto_LiRPA's {theirs['method']} failed: {theirs['failed']}")
    return found


def _memory(peak: int | str) -> str:
    return "-" if isinstance(peak, str) else f"{peak / 2**20:,.0f}"


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"
