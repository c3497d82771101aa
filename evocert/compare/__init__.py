"""``evocert compare``: one table of finished runs, from their records alone; nothing here needs torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from evocert.compare.read import RunRecord, read_run
from evocert.compare.rows import Comparison, compare_runs
from evocert.errors import InputError

SWEEP = "sweep.json"  # marks a folder whose subfolders are runs


def compare(folders: Sequence[Path]) -> Comparison:
    """The table of some runs; a sweep's folder stands for its runs.

    Raises:
        InputError: a folder is no run, a file is damaged, or none of the runs is finished.
    """
    runs: list[RunRecord] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for path in (path for folder in folders for path in _runs(folder, notes)):
        if path.resolve() in seen:
            notes.append(f"{path} is named twice, and is in the table once")
            continue
        seen.add(path.resolve())
        run = read_run(path)
        if run is None:
            notes.append(f"left out, not finished: {path} (evocert resume continues it)")
        else:
            runs.append(run)
    if not runs:
        named = ", ".join(map(str, folders[:3])) + (", …" if len(folders) > 3 else "")
        raise InputError(f"no run in {named} is finished: allowed are finished runs, evocert resume RUN finishes one")
    return compare_runs(runs, notes)


def _runs(folder: Path, notes: list[str]) -> Iterator[Path]:
    """The folder itself or, of a sweep, those of its runs that have begun; the others are noted."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such run folder")
    if not (folder / SWEEP).is_file():
        yield folder
        return
    try:
        names = list(json.loads((folder / SWEEP).read_bytes())["cells"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SWEEP} is damaged: allowed is what evocert sweep wrote there") from error
    for path in (folder / str(name) for name in names):
        if (path / "config.json").is_file():
            yield path
        else:
            notes.append(f"left out, not begun: {path}")
