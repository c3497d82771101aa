"""config.json: what a run records of its experiment, and the experiment that a resumed run reads back from its folder."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import evocert
from evocert.bounds import Tile
from evocert.data import data_folder
from evocert.errors import InputError
from evocert.experiment import PATHS
from evocert.networks import layers, statistics
from evocert.parts import Parts
from evocert.problem_files import LoadedProblem, load_problem
from evocert.runs import Run, warn
from evocert.settings import plain

_KINDS = {
    "problem": str,
    "tile": dict,
    "statistics": dict,
    "device_type": str,
    "overrides": list,
    "problem_file": str,
    "problem_path": str,
    "problem_sha256": str,
    "imported": dict,
}


def record(loaded: LoadedProblem, problem: Path, parts: Parts, run: Run) -> dict[str, Any]:
    """Every setting, and what else the next process needs to go on with the same bits."""
    return {
        **loaded.experiment.settings(),
        "tile": parts.stages[-1].problem.tile._asdict(),
        "stage_tiles": [stage.problem.tile._asdict() for stage in parts.stages[:-1]],
        "statistics": statistics(parts.module),
        "layers": layers(parts.module),
        "device_type": parts.device.type,
        "overrides": list(loaded.overrides),
        # Both ways to the original: one survives a move of the run alone, the other a move of both together.
        "problem_file": os.path.relpath(problem, run.path),
        "problem_path": str(problem.resolve()),
        "problem_sha256": loaded.sha256,
        "imported": loaded.file.imported(),
        "evocert": evocert.__version__,
    }


class Reloaded(NamedTuple):
    """What a run goes on with: the experiment of its own copy of the problem file, and what depended on the machine."""

    loaded: LoadedProblem
    tiles: list[Tile]  # one for each stage
    statistics: dict[str, list[float]]
    device_type: str


def reload(run: Run) -> Reloaded:
    """What a run's folder says.

    Raises:
        InputError: config.json is damaged, or problem.py was changed since the run began.
    """
    path, config = run.path / "config.json", run.read_config()
    for key, kind in _KINDS.items():
        if not isinstance(config.get(key), kind):
            raise InputError(
                f"{path}: {key}={config.get(key)!r}, allowed is what the run wrote there, a {kind.__name__}"
            )
    for key in PATHS:
        if not isinstance(config.get(key), str | None):
            raise InputError(f"{path}: {key}={config[key]!r}, allowed is a path, or null")
    overrides, tiles = config["overrides"], [*config.get("stage_tiles", []), config["tile"]]
    for tile in tiles:
        good = isinstance(tile, dict) and {"members", "images"} <= tile.keys() <= set(Tile._fields)
        if not good or not all(type(n) is int and n > 0 for n in tile.values()):
            raise InputError(f"{path}: tile={tile}, allowed are {', '.join(Tile._fields)}, each 1 or more")
    if not all(isinstance(override, str) for override in overrides):
        raise InputError(f"{path}: overrides={overrides}, allowed are texts KEY=VALUE")

    original = _original(run, config)
    # Paths among the overrides were relative to where the user was; the recorded ones are not relative any more.
    overrides = [override for override in overrides if override.partition("=")[0].strip() not in PATHS]
    loaded = load_problem(run.path / "problem.py", overrides, original=original, name=config["problem"])
    if loaded.sha256 != config["problem_sha256"]:
        raise InputError(
            f"{run.path / 'problem.py'} was changed since the run began: it differs from the hash in config.json"
        )
    paths = {key for key in (*PATHS, "data") if key != "data" or str(config.get("data")).endswith(".npz")}
    # A setting that the run's version of evocert did not have yet was at what is its default now.
    defaults = {f.name: f.default for f in dataclasses.fields(loaded.experiment)}
    for key, value in loaded.experiment.settings().items():
        began = config.get(key, plain(defaults[key]))
        if key not in paths and began != value:
            raise InputError(f"{path}: {key}={began!r}, but problem.py gives {value!r}")
    places: dict[str, Any] = {key: _place(config[key], getattr(loaded.experiment, key)) for key in paths}
    if (elsewhere := os.environ.get("EVOCERT_DATA")) and not (places["data_dir"] and Path(places["data_dir"]).is_dir()):
        places["data_dir"] = str(data_folder(elsewhere))
    loaded = dataclasses.replace(loaded, experiment=dataclasses.replace(loaded.experiment, **places))
    if len(tiles) != len(loaded.experiment.stages) + 1:
        raise InputError(
            f"{path}: stage_tiles of {len(tiles) - 1} stages, allowed is one for each of problem.py's stages"
        )
    if not original.is_file():
        warn(f"the original problem file {original} is gone; the run's own copy is used")
    elif original.read_bytes() != loaded.file.source:
        warn(f"the original problem file {original} was changed since; the run's own copy is used")
    return Reloaded(loaded, [Tile(**tile) for tile in tiles], config["statistics"], config["device_type"])


def check_imported(run: Run, loaded: LoadedProblem) -> None:
    """What the problem file imports from its folder must be what it was: a run is not continued with other code.

    Raises:
        InputError: naming the module.
    """
    began, now = run.read_config()["imported"], loaded.file.imported()
    for name in sorted(began.keys() & now.keys()):
        if began[name] != now[name]:
            raise InputError(
                f"run {run.path}: the module {name} beside {loaded.file.original} was changed since the run began: allowed "
                "is the one that it began with"
            )


def _place(recorded: str | None, now: str | None) -> str | None:
    """Where something is: where it was, or, if only there, where the problem file finds it now that both were moved."""
    moved = recorded is not None and not Path(recorded).exists() and now is not None and Path(now).exists()
    return now if moved else recorded


def _original(run: Run, config: dict[str, Any]) -> Path:
    """The problem file that was run, or where it was: of its two recorded places the one that still holds the same bytes."""
    places = [Path(os.path.normpath(run.path.resolve() / config["problem_file"])), Path(config["problem_path"])]
    for place in places:
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == config["problem_sha256"]:
            return place
    return next((place for place in places if place.is_file()), places[0])
