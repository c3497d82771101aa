"""A comparison for the eyes, as Markdown, CSV or JSON."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.measure import Measurement
from rich.table import Table

from evocert.compare.rows import Comparison, Figure, Row
from evocert.display import Output, clock
from evocert.errors import InputError
from evocert.files import write_atomically

PIPE_WIDTH = 400  # where stdout is no terminal, lines are as long as the table needs
# What a run writes once: never to be replaced by a table.
_RECORDS = ("results.json", "config.json", "environment.json", "split.json", "certify.json", "sweep.json")


def show(comparison: Comparison) -> None:
    """The tables in the terminal, and every warning and note below them."""
    console = Output(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    wide = console.options.update(width=PIPE_WIDTH)
    for title, names, lines in _tables(comparison):
        table = Table(safe_box=True)
        for name in names:
            table.add_column(name, justify="left" if name in _WORDS else "right")
        for cells in lines:
            table.add_row(*cells)
        console.print(title, markup=False, soft_wrap=True)
        if Measurement.get(console, wide, table).minimum <= console.width:
            console.print(table)
            continue
        for cells in lines:  # a paragraph each, where the terminal is too narrow for words to stay whole
            pairs = zip(names, cells, strict=True)
            console.print("  " + "; ".join(f"{name} {cell}" for name, cell in pairs if cell), markup=False)
    for line in _remarks(comparison):
        console.print(line, markup=False, soft_wrap=True)


def writer(path: Path) -> Callable[[Comparison], None]:
    """What writes a comparison to a file, by the file's end.

    Raises:
        InputError: at once, the end is none that is known, or there is no such folder; later, it cannot be written.
    """
    check_end("--out", path, FORMATS)
    if path.name in _RECORDS:
        raise InputError(f"--out {path}: a run's own record has that name, allowed is another one")
    text = FORMATS[path.suffix.lower()]

    def write(comparison: Comparison) -> None:
        try:
            write_atomically(path, text(comparison).encode())
        except OSError as error:
            raise InputError(f"--out {path} cannot be written to: {error.strerror}") from error

    return write


def check_end(option: str, path: Path, ends: Iterable[str]) -> None:
    """Raises InputError where a file's name has none of the ends, or no file of that name can be made."""
    if path.suffix.lower() not in ends:
        raise InputError(f"{option} {path}: allowed are files that end in {', '.join(ends)}")
    if path.is_dir():
        raise InputError(f"{option} {path}: it is a folder, allowed is a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")


def markdown(comparison: Comparison) -> str:
    """Tables of GitHub's kind, with their warnings as quotations."""
    parts = []
    for title, names, lines in _tables(comparison):
        rule = ["---" if name in _WORDS else "---:" for name in names]
        rows = [[cell.replace("|", "\\|") for cell in line] for line in (names, rule, *lines)]
        parts.append(title + "\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    parts += [f"> {line}\n" for line in _remarks(comparison)]
    return "\n".join(parts)


def comma_separated(comparison: Comparison) -> str:
    """One line a row, accuracies as fractions, deviations in columns of their own; empty where there is none."""
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        first = row.first
        line: dict[str, Any] = {
            "problem": first.problem, "method": first.method, "bound": first.bound, "eps": first.eps, "data": first.data,
            "examples": first.examples, "generations": row.generations,
            "seeds": " ".join(map(str, row.seeds)),
        }  # fmt: skip
        for name, figure in _figures(comparison, row).items():
            line[name] = None if figure is None else figure.mean
            line[f"{name}_deviation"] = None if figure is None else figure.deviation
        if comparison.stages:
            line["certify.examples"] = row.certifications[0].examples if row.certifications else None
            line["certify.seeds"] = len(row.certifications)
        lines.append(line | row.differs)
    file = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)  # problems differ in settings of their own each
    table = csv.DictWriter(file, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return file.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything, accuracies as fractions."""
    rows = [
        {
            "problem": row.first.problem,
            "method": row.first.method,
            "bound": row.first.bound,
            "eps": row.first.eps,
            "data": row.first.data,
            "examples": row.first.examples,
            "generations": int(row.generations) if row.generations.isdecimal() else row.generations,
            "settings": row.differs,
            "seeds": row.seeds,
            "runs": [str(run.path) for run in row.runs],
            "figures": {
                name: None if figure is None else asdict(figure) for name, figure in _figures(comparison, row).items()
            },
            "certify": {
                "examples": row.certifications[0].examples,
                "methods": list(row.certifications[0].methods),
                "timeout": row.certifications[0].timeout,
            }
            if row.certifications
            else None,
        }
        for row in comparison.rows
    ]
    content = {"rows": rows, "warnings": comparison.warnings, "notes": comparison.notes}
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {".md": markdown, ".csv": comma_separated, ".json": as_json}


def _figures(comparison: Comparison, row: Row) -> dict[str, Figure | None]:
    """Every figure of a row by its dotted name; the same names for every row."""
    figures = _accuracies(comparison, row) | {
        "train_seconds": row.figure(lambda run: run.train_seconds),
        "evaluations.values": row.evaluated("values"),
        "evaluations.gradients": row.evaluated("gradients"),
    }
    if _has(comparison):
        figures |= {f"certify.{name}": figure for name, figure in _certify(comparison, row).items()}
    return figures


def _accuracies(comparison: Comparison, row: Row) -> dict[str, Figure | None]:
    """Of results.json."""
    return {
        "natural": row.figure(lambda run: run.natural),
        "attacked": row.figure(lambda run: run.attacked),
        **{f"certified.{bound}": row.certified(bound) for bound in comparison.bounds},
    }


def _certify(comparison: Comparison, row: Row) -> dict[str, Figure | None]:
    return {
        "natural": row.certify(lambda one: one.natural),
        "attacked": row.certify(lambda one: one.attacked),
        **{stage: row.certify(lambda one, stage=stage: one.certified.get(stage)) for stage in comparison.stages},  # type: ignore[misc]
        "total": row.certify(lambda one: one.certified["total"]),
        "undecided": row.certify(lambda one: one.undecided),
    }


def _has(comparison: Comparison) -> bool:
    """Whether evocert certify was at work anywhere."""
    return any(row.certifications for row in comparison.rows)


_WORDS = ("problem", "data", "method", "bound", "settings", "seeds")
_Table = tuple[str, list[str], list[list[str]]]  # title, names of the columns, lines


def _tables(comparison: Comparison) -> list[_Table]:
    """What results.json says, and what certify.json says where there is one; what all rows share is in the title."""
    shared, names, keys = _keys(comparison)
    bounds = [f"certified by {bound}" for bound in comparison.bounds]
    spread = "mean ± standard deviation over seeds" if any(len(row.runs) > 1 for row in comparison.rows) else ""
    counted = any(row.evaluated("values") for row in comparison.rows)
    words = "losses: of one network on one image, alone + with gradients" if counted else ""
    title = ", ".join(filter(None, [*shared, "accuracies in percent", spread, words]))
    lines = [
        [
            *key,
            *(_percent(figure, len(row.runs)) for figure in _accuracies(comparison, row).values()),
            _clock(row.figure(lambda run: run.train_seconds)),
            *([_evaluated(row)] if counted else []),
        ]
        for key, row in zip(keys, comparison.rows, strict=True)
    ]
    tables = [(title, [*names, "natural", "attacked", *bounds, "training", *(["losses"] if counted else [])], lines)]
    if _has(comparison):
        tables.append(
            (
                "evocert certify, in percent of the examples; certified first by each stage, and in total",
                [*names, "examples", "natural", "not broken", *comparison.stages, "total", "undecided"],
                [
                    [
                        *key,
                        f"{row.certifications[0].examples} of {row.first.examples}",
                        *(_percent(figure, len(row.runs)) for figure in _certify(comparison, row).values()),
                    ]
                    for key, row in zip(keys, comparison.rows, strict=True)
                    if row.certifications
                ],
            )
        )
    return tables


def _keys(comparison: Comparison) -> tuple[list[str], list[str], list[list[str]]]:
    """What all rows share, in words; the columns that tell rows apart; and each row's entries there."""
    columns: list[tuple[str, Callable[[Row], str], str]] = [
        ("problem", lambda row: row.first.problem, "{}"),
        ("data", lambda row: f"{row.first.examples} of {row.first.data}", "test images: {}"),
        ("method", lambda row: row.first.method, ""),
        ("bound", lambda row: row.first.bound, ""),
        ("eps", lambda row: f"{row.first.eps:.4g}", "eps = {}"),
        ("settings", lambda row: row.settings, ""),
        ("generations", lambda row: row.generations, "{} generations"),
        ("seeds", lambda row: _seeds(row.seeds), ""),
    ]
    shared, names, entries = [], [], []
    for name, of, words in columns:
        values = [of(row) for row in comparison.rows]
        if words and len(set(values)) == 1:
            shared.append(words.format(values[0]))
        elif any(values):
            names.append(name)
            entries.append(values)
    return shared, names, [list(line) for line in zip(*entries, strict=True)]


def _seeds(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds)) + (f" ({len(seeds)})" if len(seeds) > 1 else "")


def _percent(figure: Figure | None, runs: int) -> str:
    if figure is None:
        return "-"
    spread = "" if figure.deviation is None else f" ± {100 * figure.deviation:.1f}"
    return f"{100 * figure.mean:.1f}{spread}" + (f" ({figure.count} of {runs})" if figure.count < runs else "")


def _evaluated(row: Row) -> str:
    """Millions of losses, alone and with gradients."""
    figures = [row.evaluated(kind) for kind in ("values", "gradients")]
    return " + ".join("-" if figure is None else f"{figure.mean / 1e6:.3g} M" for figure in figures)


def _clock(figure: Figure) -> str:
    return clock(figure.mean) + ("" if figure.deviation is None else f" ± {clock(figure.deviation)}")


def _remarks(comparison: Comparison) -> list[str]:
    return [f"warning: {line}" for line in comparison.warnings] + [f"note: {line}" for line in comparison.notes]
