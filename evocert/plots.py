"""Training curves: certified and natural accuracy on the validation part, over generations and over time."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evocert.compare.read import Curve, read_curve
from evocert.compare.rows import Comparison, Row
from evocert.errors import InputError

AXES = {"generations": "generations", "seconds": "seconds of training, without validations"}
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
        by: a key of ``AXES``, or None for a column of panels each.

    Raises:
        InputError: metrics are damaged, or the file cannot be written.
    """
    axes = list(AXES) if by is None else [by]
    curves = [[read_curve(run.path) for run in row.runs] for row in comparison.rows]
    styles = _styles(comparison)
    # With one axis the two panels are beside each other, with two each axis has its column.
    rows, columns = (len(CURVES), len(axes)) if len(axes) > 1 else (1, len(CURVES))
    labels = [_label(comparison, row) for row in comparison.rows]
    ncols = max(1, min(3, LINE // (max(map(len, labels)) + 8)))  # a line's sample takes the room of 8 letters
    lines_of_legend = -(-len(labels) // ncols)
    figure = Figure(figsize=(10, 3.4 * rows + 0.6 + 0.22 * lines_of_legend), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey="row").flat)
    lines: list[Any] = []
    for panel, (name, axis) in zip(panels, product(CURVES, axes), strict=True):
        drawn = [_draw(panel, row, axis, name, style) for row, style in zip(curves, styles, strict=True)]
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel(CURVES[name])
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        lines = lines or drawn
    for panel in panels:
        panel.set_ylim(bottom=0)  # now that all is drawn: panels of a row share it
    figure.suptitle(_title(comparison), fontsize="medium")
    figure.legend(lines, labels, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3.2)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"--plot {path} cannot be written to: {error.strerror}") from error


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


def _styles(comparison: Comparison) -> list[dict[str, Any]]:
    """One for each row: colours for bounds and dashes for the rest of its name, if there are enough of both."""
    names = [comparison.names(row) for row in comparison.rows]
    bounds = list(dict.fromkeys(name["bound"] for name in names))
    rest = [tuple(words for key, words in name.items() if key != "bound") for name in names]
    others = list(dict.fromkeys(rest))
    pairs = [(bounds.index(name["bound"]), others.index(words)) for name, words in zip(names, rest, strict=True)]
    good = 1 < len(bounds) <= len(COLOURS) and len(others) <= len(DASHES) and len(set(pairs)) == len(pairs)
    if not good:
        pairs = [(number % len(COLOURS), number // len(COLOURS) % len(DASHES)) for number in range(len(pairs))]
    return [{"color": COLOURS[colour], "linestyle": DASHES[dash], "linewidth": 1.6} for colour, dash in pairs]


def _label(comparison: Comparison, row: Row) -> str:
    words = shorten(", ".join(comparison.names(row).values()), LINE - 20, placeholder=" …")
    return words + (f" ({len(row.runs)} seeds)" if len(row.runs) > 1 else "")


def _title(comparison: Comparison) -> str:
    """What all curves share, and what the bands are."""
    first = comparison.rows[0].first
    parts = [] if comparison.varies(lambda run: run.problem) else [first.problem]
    parts += [] if comparison.varies(lambda run: run.eps) else [f"eps = {first.eps:.4g}"]
    band = "; bands: one standard deviation over seeds" if any(len(row.runs) > 1 for row in comparison.rows) else ""
    return ", ".join([*parts, "validation part"]) + band
