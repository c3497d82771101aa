"""Problem files: run for their experiment, with the overrides of the command line applied."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evocert.data import TORCHVISION, data_folder
from evocert.errors import InputError
from evocert.experiment import OPTIMIZERS, PATHS, Experiment, allowed_names
from evocert.schedules import CONSTANT, Schedule
from evocert.settings import nearest, parse_setting, type_of
from evocert.user_files import UserFile


@dataclass(frozen=True)
class LoadedProblem:
    """A problem file that was run, with the overrides applied.

    Attributes:
        experiment: what it defines, after the overrides, paths absolute.
        file: the file that was run.
        overrides: as given, but for paths, which no longer depend on the current folder.
    """

    experiment: Experiment
    file: UserFile
    overrides: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.file.source).hexdigest()


def load_problem(
    path: Path, overrides: Sequence[str] = (), *, original: Path | None = None, name: str | None = None
) -> LoadedProblem:
    """Run a problem file and apply ``KEY=VALUE`` overrides.

    Args:
        path: the file; it must define ``experiment = evocert.Experiment(...)``.
        overrides: as given to ``--set``.
        original: of which it is a copy: relative paths and imports are looked up in that one's folder.
        name: the problem's name; by default the file's.

    Raises:
        InputError: the file is missing, is no Python, raises, or defines no experiment; or an override is wrong.
    """
    file = UserFile(path, original)
    experiment = file.run().get("experiment")
    if not isinstance(experiment, Experiment):
        found = "no experiment" if experiment is None else f"an experiment of type {type(experiment).__name__}"
        raise InputError(f"problem file {path} defines {found}: it must define experiment = evocert.Experiment(...)")
    # Paths in the file are relative to the file; paths on the command line to where the user is.
    changes: dict[str, Any] = _absolute({key: getattr(experiment, key) for key in (*PATHS, "data")}, file.base)
    changes["problem"] = experiment.problem or name or path.stem
    if not isinstance(experiment.network, str | nn.Module):
        changes["network"] = file.function(experiment.network)
    changes["loggers"] = [file.function(f) if callable(f) else f for f in experiment.loggers]
    experiment = apply_overrides(dataclasses.replace(experiment, **changes), overrides)
    if experiment.data in TORCHVISION and (folder := os.environ.get("EVOCERT_DATA")) and not experiment.data_dir:
        experiment = dataclasses.replace(experiment, data_dir=str(data_folder(folder)))
    if not experiment.problem:
        experiment = dataclasses.replace(experiment, problem=changes["problem"])
    return LoadedProblem(experiment, file, tuple(_recorded(override, experiment) for override in overrides))


def apply_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """``KEY=VALUE`` settings on an experiment. KEY is a dotted name or, where that is unique, its last part.

    All are applied before the result is validated, so that settings that belong together can be changed together. The last
    of several for one setting counts. Relative paths are relative to the current folder.

    Raises:
        InputError: an unknown or ambiguous name, a wrong type, an impossible value.
    """
    changes: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise InputError(f"--set {override}: allowed is KEY=VALUE")
        group, name, kind = _resolve(experiment, key.strip())
        value = parse_setting(key.strip(), text, kind)
        if group is None:
            changes[name] = value
        else:
            groups.setdefault(group, {})[name] = value
    changes |= _absolute(changes, Path.cwd())
    for group, values in groups.items():
        before = getattr(experiment, group)
        if isinstance(before, Schedule) and values.get("shape") == "constant":
            before = CONSTANT  # what the other shape was is of no more interest
        try:
            is_dict = isinstance(before, Mapping)
            changes[group] = {**before, **values} if is_dict else dataclasses.replace(before, **values)
        except InputError as error:
            raise InputError(f"{group}: {error}") from error
    return dataclasses.replace(experiment, **changes)


def setting_name(experiment: Experiment, key: str, option: str = "--set") -> str:
    """The dotted name of the setting that a key of the command line stands for.

    Args:
        option: of the command line, for messages.

    Raises:
        InputError: an unknown or ambiguous name.
    """
    group, name, _ = _resolve(experiment, key, option)
    return name if group is None else f"{group}.{name}"


def _resolve(experiment: Experiment, key: str, option: str = "--set") -> tuple[str | None, str, Any]:
    """The group (or None), the name and the type of a setting."""
    names: dict[str, tuple[str | None, str, Any]] = {}
    for outer in dataclasses.fields(Experiment):
        value = getattr(experiment, outer.name)
        if outer.name == "optimizer_config":
            options = {name: kind for some in OPTIMIZERS.values() for name, kind in some.items()}
            for name, kind in sorted(options.items(), key=lambda option: option[0]):
                names[f"{outer.name}.{name}"] = (outer.name, name, bool | None if kind is bool else float | None)
        elif dataclasses.is_dataclass(value):
            kinds = {f.name: type_of(type(value), f.name) for f in dataclasses.fields(value)}
            names |= {f"{outer.name}.{name}": (outer.name, name, kind) for name, kind in kinds.items()}
        else:
            names[outer.name] = (None, outer.name, type_of(Experiment, outer.name))
    if key in names:
        return names[key]
    members = [name for name in names if name.startswith(f"{key}.")]
    if members:
        raise InputError(f"{option} {key}: a group of settings, allowed is one of {', '.join(members)}")
    matches = [name for name in names if name.rpartition(".")[2] == key]
    if len(matches) == 1:
        return names[matches[0]]
    if matches:
        raise InputError(f"{option} {key}: stands for several settings, allowed is one of {', '.join(matches)}")
    last_parts = {name.rpartition(".")[2]: name for name in names}
    near = dict.fromkeys(last_parts.get(name, name) for name in nearest(key, [*names, *last_parts], 3))
    raise InputError(f"{option} {key}: no such setting; {allowed_names(list(near), list(names))}")


def _absolute(settings: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Those settings that are paths, no longer relative."""
    paths = {key: settings[key] for key in PATHS if settings.get(key)}
    if str(settings.get("data", "")).endswith(".npz"):
        paths["data"] = settings["data"]
    return {key: str((base / os.path.expanduser(path)).resolve()) for key, path in paths.items()}


def _recorded(override: str, experiment: Experiment) -> str:
    key = override.partition("=")[0].strip()
    is_path = key in PATHS or (key == "data" and experiment.data.endswith(".npz"))
    return f"{key}={getattr(experiment, key)}" if is_path else override
