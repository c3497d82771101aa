"""The cells of a sweep: the product of the grid's values and the seeds, each checked before anything starts."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from evocert.errors import InputError
from evocert.problem_files import load_problem, setting_name

IDENTITY = ("problem_sha256", "imported", "cells")  # what makes it this sweep and no other, of what sweep.json holds
LONGEST_NAME = 120  # bytes of a folder's name; file systems take 255


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder: the varying settings with their values.
        overrides: ``KEY=VALUE``, paths absolute.
        generations: how many it will have.
    """

    name: str
    overrides: tuple[str, ...]
    generations: int


@dataclass(frozen=True)
class Plan:
    """A whole sweep.

    Attributes:
        path: the problem file.
        problem: its name.
        sha256: of the problem file.
        imported: the modules of its folder that it imports, with their hashes.
        grid: the values of each setting that varies, as they were given.
        overrides: of all cells, as they were given.
    """

    path: Path
    problem: str
    sha256: str
    imported: dict[str, str]
    grid: dict[str, list[str]]
    overrides: tuple[str, ...]
    cells: tuple[Cell, ...]

    def record(self) -> dict[str, Any]:
        """What sweep.json holds."""
        return {
            "problem": self.problem,
            "problem_sha256": self.sha256,
            "imported": self.imported,
            "grid": self.grid,
            "overrides": list(self.overrides),
            "cells": {cell.name: list(cell.overrides) for cell in self.cells},
        }

    @property
    def folder(self) -> Path:
        """By default: the same command finds it again, another one has another."""
        record = self.record()
        identity = json.dumps([record[key] for key in IDENTITY], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        return Path("runs") / "sweeps" / f"{self.problem}-{digest[:8]}"


def plan(path: Path, grid: Sequence[str], seeds: str | None, overrides: Sequence[str]) -> Plan:
    """The cells of a command line, seeds outermost: every combination has its first seed before one has its second.

    Args:
        path: the problem file.
        grid: ``KEY=A,B``, or ``KEY=A|B`` for values that contain commas.
        seeds: whole numbers with commas between; None: the problem's own.
        overrides: ``KEY=VALUE`` for all cells.

    Raises:
        InputError: a setting that does not exist or is named twice, a value that is empty, repeated or impossible, in
            whichever cell.
    """
    base = load_problem(path)
    varying: dict[str, list[str]] = {}
    for text in grid:
        key, values = _axis("--grid", text)
        name = setting_name(base.experiment, key, "--grid")
        if name in varying:
            raise InputError(f"--grid {text}: {name} is in the grid already, allowed is each setting once")
        varying[name] = values
    if seeds is not None:
        if "seed" in varying:
            raise InputError(f"--seeds {seeds}: the grid has seeds already, allowed is one of the two")
        varying = {"seed": _seeds(seeds), **varying}
    elif "seed" in varying:
        varying = {"seed": varying.pop("seed"), **varying}
    if not varying:
        raise InputError("a sweep needs something that varies: allowed are --grid KEY=A,B and --seeds 0,1,2")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key and "=" in override and (name := setting_name(base.experiment, key, "--set")) in varying:
            raise InputError(f"--set {override}: {name} varies in this sweep, allowed is one of the two")

    cells: dict[str, Cell] = {}
    settings: dict[str, str] = {}
    for chosen in product(*varying.values()):
        own = [f"{name}={value}" for name, value in zip(varying, chosen, strict=True)]
        try:
            loaded = load_problem(path, [*overrides, *own])
        except InputError as error:
            raise InputError(f"cell {', '.join(own)}: {error}") from error
        found = json.dumps(loaded.experiment.settings(), sort_keys=True)
        if found in settings:
            raise InputError(f"cell {', '.join(own)} is the same as cell {settings[found]}: allowed is each value once")
        settings[found] = ", ".join(own)
        name = _folder_name(varying, chosen, {taken.lower() for taken in cells})
        cells[name] = Cell(name, loaded.overrides, loaded.experiment.total_generations)
    return Plan(
        path, loaded.experiment.problem, loaded.sha256, loaded.file.imported(), varying, tuple(overrides), tuple(cells.values())
    )  # fmt: skip


def _axis(option: str, text: str) -> tuple[str, list[str]]:
    """``KEY=A,B`` or ``KEY=A|B`` as the key and its values."""
    key, separator, rest = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"{option} {text}: allowed is KEY=A,B, or KEY=A|B for values that contain commas")
    values = [value.strip() for value in rest.split("|" if "|" in rest else ",")]
    if "" in values:
        raise InputError(f"{option} {text}: a value is empty, allowed is KEY=A,B")
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
        raise InputError(f"{option} {text}: {repeated[0]} is repeated, allowed is each value once")
    return key.strip(), values


def _seeds(text: str) -> list[str]:
    numbers = []
    for part in text.split(","):
        if not re.fullmatch(r"[0-9]{1,19}", part.strip()):
            raise InputError(
                f"--seeds {text}: allowed are whole numbers, 0 or more, with commas between, such as 0,1,2"
            )
        numbers.append(int(part))
    for number in numbers:
        if numbers.count(number) > 1:
            raise InputError(f"--seeds {text}: {number} is repeated, allowed is each seed once")
    return [str(number) for number in numbers]


def _folder_name(varying: dict[str, list[str]], values: Sequence[str], taken: set[str]) -> str:
    """``method-pgpe_bound-ibp_seed-0``: what every file system and shell takes. ``taken``: in lower case."""
    last = [name.rpartition(".")[2] for name in varying]
    keys = [short if last.count(short) == 1 else name for short, name in zip(last, varying, strict=True)]
    parts = [f"{key}-{value}" for key, value in zip(keys, values, strict=True) if key != "seed"]
    parts += [f"seed-{value}" for key, value in zip(keys, values, strict=True) if key == "seed"]
    name = "_".join(re.sub(r"[^A-Za-z0-9.+_-]+", "-", part) for part in parts)
    if len(name) > LONGEST_NAME or name.lower() in taken:  # Mac OS takes a and A for one
        digest = hashlib.sha256("\0".join(values).encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_NAME]}-{digest}"
    return name
