"""Training curves, and what a budget buys: certified and natural accuracy over generations and over time."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from evocert.compare.read import Curve, read_curve
from evocert.compare.rows import Comparison, Figure, Row
from evocert.errors import InputError

AXES = {"generations": "generations", "seconds": "seconds of training, without validations"}
BUDGET = "budget"
CURVES = {"certified": "certified by the bound trained with (%)", "natural": "natural (%)"}
# Okabe and Ito's colours, told apart by the colour-blind too, without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
LINE = 130  # letters in a line of the legend
POINTS = 200  # at which the curves of several seeds are averaged


def plot(comparison: Comparison, path: Path, by: str | None = None) -> None:
    """Draw the curves of all rows; seeds are a line, their mean, in a band of one standard deviation to each side.

    Args:
        comparison: the table that they belong to.
        path: a .png file.
        by: a key of ``AXES``, or None for a column of panels each; or ``BUDGET`` for the figures of the test part over the
            time that their generations took, with a line through rows that differ by how many these are alone.

    Raises:
        InputError: metrics are damaged, or the file cannot be written.
    """
    figure = _budgets(comparison) if by == BUDGET else _curves(comparison, list(AXES) if by is None else [by])
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"--plot {path} cannot be written to: {error.strerror}") from error


def _curves(comparison: Comparison, axes: Sequence[str]) -> Canvas:
    curves = [[read_curve(run.path) for run in row.runs] for row in comparison.rows]
    names = [comparison.names(row) for row in comparison.rows]
    styles = _styles(names)
    # With one axis the two panels are beside each other, with two each axis has its column.
    rows, columns = (len(CURVES), len(axes)) if len(axes) > 1 else (1, len(CURVES))
    labels = [_label(name, row) for name, row in zip(names, comparison.rows, strict=True)]
    figure, panels = _canvas(rows, columns, labels)
    lines: list[Any] = []
    for panel, (name, axis) in zip(panels, product(CURVES, axes), strict=True):
        drawn = [_draw(panel, row, axis, name, style) for row, style in zip(curves, styles, strict=True)]
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel(CURVES[name])
        panel.set_xlim(left=0)
        lines = lines or drawn
    for panel in panels:
        panel.set_ylim(bottom=0)  # now that all is drawn: panels of a row share it
    _finish(figure, lines, labels, _title(comparison, "validation part", "bands"))
    return figure


def _budgets(comparison: Comparison) -> Canvas:
    """A point for each row, at its mean time of training: its mean, and a bar of one standard deviation to each side."""
    lines: list[list[Row]] = []
    for row in comparison.rows:
        alike = (line for line in lines if _but_generations(line[0]) == _but_generations(row))
        # A row that repeats another one's seeds is no other budget.
        line = next((line for line in alike if row.first.identity not in [one.first.identity for one in line]), None)
        if line is None:
            lines.append([row])
        else:
            line.append(row)
    names = [comparison.names(max(line, key=lambda row: len(row.runs))) for line in lines]
    names = [{key: words for key, words in name.items() if key != "generations"} for name in names]
    labels = [_label(name, max(line, key=lambda row: len(row.runs))) for name, line in zip(names, lines, strict=True)]
    seconds = {
        id(row): statistics.fmean(read_curve(run.path).seconds[-1] for run in row.runs) for row in comparison.rows
    }
    shown: dict[str, Callable[[Row], Figure | None]] = {CURVES["certified"]: lambda row: row.certified(row.first.bound)}
    if comparison.total_is_common:
        shown = {
            "certified in total by evocert certify (%)": lambda row: row.certify(lambda one: one.certified["total"])
        }
    shown[CURVES["natural"]] = lambda row: row.figure(lambda run: run.natural)
    figure, panels = _canvas(1, len(shown), labels, share=False)
    drawn: list[Any] = []
    for panel, (words, figure_of) in zip(panels, shown.items(), strict=True):
        drawn = []
        for line, style in zip(lines, _styles(names), strict=True):
            points = [(seconds[id(row)], found) for row in line if (found := figure_of(row)) is not None]
            points.sort(key=lambda point: point[0])
            x, y = [at for at, _ in points], [100 * found.mean for _, found in points]
            bars = [100 * (found.deviation or 0.0) for _, found in points]
            drawn.append(panel.errorbar(x, y, bars, marker="o", markersize=4, capsize=2, elinewidth=0.8, **style))
        if min(seconds.values()) > 0:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(AXES["seconds"])
        panel.set_ylabel(words)
    _finish(figure, drawn, labels, _title(comparison, "test part", "bars"))
    return figure


def _but_generations(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.first.settings.items() if key != "generations"}


def _canvas(rows: int, columns: int, labels: Sequence[str], *, share: bool = True) -> tuple[Canvas, list[Any]]:
    """An empty figure with room for a legend, and its panels."""
    figure = Canvas(
        figsize=(10, 3.4 * rows + 0.6 + 0.22 * -(-len(labels) // _legend_columns(labels))),
        layout="constrained",
        dpi=150,
    )
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey="row" if share else "none").flat)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(3, LINE // (max(map(len, labels)) + 8)))  # a line's sample takes the room of 8 letters


def _finish(figure: Canvas, lines: Sequence[Any], labels: Sequence[str], title: str) -> None:
    figure.suptitle(title, fontsize="medium")
    ncols = _legend_columns(labels)
    figure.legend(lines, labels, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3.2)


def _draw(panel: Any, curves: Sequence[Curve], axis: str, name: str, style: dict[str, Any]) -> Any:
    """The curves of one row, one for each seed; returns the line."""
    if len(curves) == 1:
        x = np.array(getattr(curves[0], axis))
        (line,) = panel.plot(x, 100 * np.array(getattr(curves[0], name)), marker=_marker(x), **style)
        return line
    # Seeds are validated at other seconds each: they are averaged where all of them have been.
    first = max(getattr(curve, axis)[0] for curve in curves)
    last = min(getattr(curve, axis)[-1] for curve in curves)
    x = np.linspace(first, max(first, last), POINTS)
    values = 100 * np.stack([np.interp(x, getattr(curve, axis), getattr(curve, name)) for curve in curves])
    mean, deviation = values.mean(0), values.std(0, ddof=1)
    panel.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
    (line,) = panel.plot(x, mean, marker=_marker(x), **style)
    return line


def _marker(x: np.ndarray) -> str:
    """One validation alone makes no line."""
    return "o" if x[0] == x[-1] else ""


def _styles(names: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """One for each line: colours for bounds and dashes for the rest of its name, if there are enough of both."""
    bounds = list(dict.fromkeys(name["bound"] for name in names))
    rest = [tuple(words for key, words in name.items() if key != "bound") for name in names]
    others = list(dict.fromkeys(rest))
    pairs = [(bounds.index(name["bound"]), others.index(words)) for name, words in zip(names, rest, strict=True)]
    good = 1 < len(bounds) <= len(COLOURS) and len(others) <= len(DASHES) and len(set(pairs)) == len(pairs)
    if not good:
        pairs = [(number % len(COLOURS), number // len(COLOURS) % len(DASHES)) for number in range(len(pairs))]
    return [{"color": COLOURS[colour], "linestyle": DASHES[dash], "linewidth": 1.6} for colour, dash in pairs]


def _label(name: Mapping[str, str], row: Row) -> str:
    words = shorten(", ".join(name.values()), LINE - 20, placeholder=" …")
    return words + (f" ({len(row.runs)} seeds)" if len(row.runs) > 1 else "")


def _title(comparison: Comparison, part: str, spread: str) -> str:
    """What all lines share, and what shows the spread of seeds."""
    first = comparison.rows[0].first
    parts = [] if comparison.varies(lambda run: run.problem) else [first.problem]
    parts += [] if comparison.varies(lambda run: run.eps) else [f"eps = {first.eps:.4g}"]
    seeds = any(len(row.runs) > 1 for row in comparison.rows)
    return ", ".join([*parts, part]) + (f"; {spread}: one standard deviation over seeds" if seeds else "")
