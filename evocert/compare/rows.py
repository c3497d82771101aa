"""Runs as the rows of a table: those that differ by their seed alone are one row, and nothing else is averaged."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evocert.compare.read import Certification, RunRecord

SHOWN = 4  # settings in which rows differ, in tables and legends; the files .csv and .json have all
# Settings that have a place of their own in every table.
OWN = ("problem", "method", "bound", "eps", "generations")


@dataclass(frozen=True)
class Figure:
    """A mean over ``count`` runs, and their sample standard deviation (None for one)."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed alone.

    Attributes:
        runs: one for each seed, by rising seed.
        differs: the settings that are not the same in all rows of its problem, but for those in ``OWN``.
        certifications: of ``evocert certify``, of those runs that have one; empty where they cannot be averaged.
    """

    runs: tuple[RunRecord, ...]
    differs: dict[str, Any] = field(default_factory=dict)
    certifications: tuple[Certification, ...] = ()

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def settings(self) -> str:
        """The settings in which it differs, in words; only the first of them where they are many."""
        parts = [f"{key}={value}" for key, value in self.differs.items()]
        return ", ".join(parts[:SHOWN]) + (f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def generations(self) -> str:
        """How many were trained: one number, or from the fewest to the most where runs stopped early."""
        counts = sorted({run.generations for run in self.runs})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"

    def evaluated(self, kind: str) -> Figure | None:
        """Of ``evaluations``; None where not all runs have it on record."""
        values = [run.evaluations[kind] for run in self.runs if kind in run.evaluations]
        return Figure.of(values) if len(values) == len(self.runs) else None

    def figure(self, of: Callable[[RunRecord], float]) -> Figure:
        return Figure.of([of(run) for run in self.runs])

    def certified(self, bound: str) -> Figure | None:
        """By a bound, of results.json; None where it is not in there."""
        values = [run.certified[bound] for run in self.runs if bound in run.certified]
        return Figure.of(values) if values else None

    def certify(self, of: Callable[[Certification], float | None]) -> Figure | None:
        """A figure of ``evocert certify``."""
        values = [value for one in self.certifications if (value := of(one)) is not None]
        return Figure.of(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """One table.

    Attributes:
        warnings: lines without which it would be misread.
        notes: lines about what is not in it.
    """

    rows: list[Row]
    warnings: list[str]
    notes: list[str]

    @property
    def bounds(self) -> list[str]:
        """The bounds that certified figures are by, in the order in which they are found."""
        return list(dict.fromkeys(name for row in self.rows for run in row.runs for name in run.certified))

    @property
    def stages(self) -> list[str]:
        """Those of ``evocert certify``, without the total."""
        found = (name for row in self.rows for one in row.certifications for name in one.certified)
        return [name for name in dict.fromkeys(found) if name != "total"]

    @property
    def total_is_common(self) -> bool:
        """Whether all runs are certified by ``evocert certify``, on one basis."""
        bases = {one.basis for row in self.rows for one in row.certifications}
        return len(bases) == 1 and all(len(row.certifications) == len(row.runs) for row in self.rows)

    def varies(self, of: Callable[[RunRecord], Any]) -> bool:
        """Whether something is not the same in all runs."""
        return len({of(run) for row in self.rows for run in row.runs}) > 1

    def names(self, row: Row) -> dict[str, str]:
        """Method, bound and all else in which a row differs from the others, in words."""
        first = row.first
        names = {"problem": first.problem} if self.varies(lambda run: run.problem) else {}
        names |= {"method": first.method, "bound": first.bound}
        names |= {"eps": f"eps {first.eps:.4g}"} if self.varies(lambda run: run.eps) else {}
        names |= {"generations": f"{row.generations} generations"} if self.varies(lambda run: run.generations) else {}
        return names | ({"settings": row.settings} if row.differs else {})


def compare_runs(runs: Iterable[RunRecord], notes: Iterable[str] = ()) -> Comparison:
    """The rows of a table, in the order of their first runs, and what must be said beside them."""
    runs = list(runs)
    warnings: list[str] = []
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for run in runs:
        repeats = [key for key, group in groups.items() if key[0] == run.identity and run.seed in map(_seed, group)]
        if repeats:  # it tells nothing of how far seeds are apart, so it is a row of its own
            first = next(one for one in groups[repeats[0]] if one.seed == run.seed)
            warnings.append(f"{run.path} repeats seed {run.seed} of {first.path}: it is a row of its own")
        groups.setdefault((run.identity, len(repeats)), []).append(run)
    differing = _differing(runs)
    rows = []
    for group in groups.values():
        group.sort(key=_seed)
        certifications, lines = _common(group)
        warnings += lines
        differs = {key: group[0].settings.get(key, "not on record") for key in differing[group[0].problem]}
        rows.append(Row(tuple(group), differs, certifications))
    for words, of in (
        ("data differ", lambda run: f"{run.data}, {run.examples} images"),
        ("eps differs", lambda run: f"{run.eps:g}"),
        ("the versions of evocert differ", lambda run: run.version),
    ):
        values = list(dict.fromkeys(map(of, runs)))
        if len(values) > 1:
            warnings.append(f"{words}, so rows are not to be compared without further thought: {'; '.join(values)}")
    bases = list(dict.fromkeys(one.basis for row in rows for one in row.certifications))
    if len(bases) > 1:
        warnings.append(f"the figures of evocert certify have not all one basis: {'; '.join(bases)}")
    for run in runs:
        if run.certification is not None and run.certification.contradictions:
            warnings.append(f"{run.path}: evocert certify has found contradictions, its figures are not to be trusted")
    return Comparison(rows, warnings, [*notes, *(note for run in runs for note in run.notes)])


def _seed(run: RunRecord) -> int:
    return run.seed


def _differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """For each problem, the settings that not all of its runs share, but for those that every table has a place for."""
    found = {}
    for problem in {run.problem for run in runs}:
        alike = [run for run in runs if run.problem == problem]
        own = [run.settings for run in alike]
        # What was trained has a place in every table; what was wanted is shown where it is all that differs.
        seen = OWN if len({run.generations for run in alike}) > 1 else OWN[:-1]
        names = dict.fromkeys(name for settings in own for name in settings if name not in seen)
        found[problem] = [name for name in names if len({repr(settings.get(name, "")) for settings in own}) > 1]
    return found


def _common(group: Sequence[RunRecord]) -> tuple[tuple[Certification, ...], list[str]]:
    """The certifications of a row's runs if they have one basis, or else a line that says why they are left out."""
    found = [run.certification for run in group if run.certification is not None]
    bases = list(dict.fromkeys(one.basis for one in found))
    if len(bases) > 1:
        line = f"{group[0].path} and its other seeds are certified on different bases, which are not averaged: "
        return (), [line + "; ".join(bases)]
    return tuple(found), []
