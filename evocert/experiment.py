"""``Experiment``: the frozen, typed and validated description of one run, as a problem file defines it."""

import dataclasses
import difflib
import hashlib
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from evocert.bounds import BOUNDS
from evocert.errors import InputError
from evocert.memory import parse_bytes
from evocert.networks import NETWORKS
from evocert.schedules import CONSTANT, Schedule
from evocert.searchers import METHODS
from evocert.settings import check_choice, check_range, check_types, parse_setting, plain, type_of

OPTIMIZERS = {
    "adam": ("beta1", "beta2", "epsilon", "amsgrad"),
    "clipup": ("momentum", "max_speed"),
    "sgd": ("momentum", "dampening", "nesterov"),
}
RANKINGS = ("raw", "centered", "linear", "nes", "normalized")
SELECTIONS = ("best", "last")


@dataclass(frozen=True)
class AttackSettings:
    """PGD on the margin (see ``evocert.attacks``), by which the accuracy under attack is measured.

    Attributes:
        steps: gradient steps of one restart.
        restarts: starts for each image.
        step_size: in [0, 1] pixels; None for 2.5 * eps / steps.
    """

    steps: int = 40
    restarts: int = 3
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self.steps >= 1, "attack.steps", self.steps, "1 or more")
        check_range(self.restarts >= 1, "attack.restarts", self.restarts, "1 or more")
        check_range(
            self.step_size is None or 0 < self.step_size <= 1, "attack.step_size", self.step_size, "over 0, up to 1"
        )


@dataclass(frozen=True)
class Experiment:
    """One training run. Every attribute is a setting of the command line's ``--set``.

    Attributes:
        data: a name in ``evocert.data.DATASETS``, or "npz" with ``data_path``.
        data_dir: folder of the torchvision data sets; None: the environment variable EVOCERT_DATA, else a cache folder.
        data_path: the ``.npz`` file of "npz".
        download: whether torchvision may download what is absent.
        validation_fraction: share of the training images that validation takes.
        network: a name in ``evocert.networks.NETWORKS``, a module, or a function (input_shape, num_classes) -> module.
        width, depth: of the named network, where it has one; None: its own default.
        mean, std: of each channel, for the normalisation; None: those of the training part.
        bound: a name in ``evocert.bounds.BOUNDS``.
        method: how the centre is moved, a name in ``evocert.searchers.METHODS``.
        eps: the radius that is certified, in [0, 1] pixels.
        train_eps: the radius that is trained at; None: eps.
        generations: how many populations are evaluated, and updates made.
        batch_size: images a generation, the same for every member.
        popsize, stdev_init, center_learning_rate, stdev_learning_rate, optimizer, optimizer_config, ranking_method,
            symmetric: as of ``evocert.searchers.PGPE`` and EvoTorch; stdev_init is sigma.
        eps_schedule, learning_rate_schedule, stdev_schedule: factors on train_eps, center_learning_rate and stdev_init.
        init_from: a run folder whose network is where the search starts; None: random weights.
        select: "best" keeps the centre with the highest certified accuracy on the validation part, "last" the last one.
        validations: how often the centre is validated, at equal distances, the last time at the end.
        natural_every: the population's natural loss is computed every so-manyth generation; 0: never.
        attack: how the accuracy under attack is measured.
        loggers: EvoTorch's loggers or ours: names, (name, arguments) pairs, or functions of the searcher.
        seed: of initialisation, validation part, minibatches and noise.
        device: "auto", "cpu" or "cuda:N".
        memory_budget: for the temporaries of an evaluation, such as "2GiB".
        num_actors: Ray actors that share the evaluation; 0: none.
        checkpoint_seconds: time between checkpoints.
        problem: the problem's name; by default that of its file.

    Raises:
        InputError: naming the setting, its value and what is allowed.
    """

    eps: float
    generations: int
    popsize: int
    stdev_init: float
    center_learning_rate: float
    data: str = "digits"
    data_dir: str | None = None
    data_path: str | None = None
    download: bool = True
    validation_fraction: float = 0.1
    network: str | nn.Module | Callable[..., nn.Module] = "cnn3"
    width: int | None = None
    depth: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    bound: str = "ibp"
    method: str = "pgpe"
    train_eps: float | None = None
    batch_size: int = 128
    stdev_learning_rate: float = 0.0
    optimizer: str | None = "adam"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    ranking_method: str = "raw"
    symmetric: bool = True
    eps_schedule: Schedule = CONSTANT
    learning_rate_schedule: Schedule = CONSTANT
    stdev_schedule: Schedule = CONSTANT
    init_from: str | None = None
    select: str = "best"
    validations: int = 20
    natural_every: int = 1
    attack: AttackSettings = AttackSettings()
    loggers: Sequence[Any] = ()
    seed: int = 0
    device: str = "auto"
    memory_budget: int | str = "2GiB"
    num_actors: int = 0
    checkpoint_seconds: float = 30.0
    problem: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("bound", self.bound, BOUNDS)
        check_choice("method", self.method, METHODS)
        check_choice("ranking_method", self.ranking_method, RANKINGS)
        check_choice("select", self.select, SELECTIONS)
        if isinstance(self.network, str):
            check_choice("network", self.network, NETWORKS)
        if self.optimizer is not None:
            check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for key in self.optimizer_config:
            check_choice(
                f"a name in optimizer_config of {self.optimizer}", key, OPTIMIZERS.get(self.optimizer or "", ())
            )
        check_range(0 <= self.eps <= 1, "eps", self.eps, "0 to 1, in [0, 1] pixels")
        check_range(self.train_eps is None or 0 <= self.train_eps <= 1, "train_eps", self.train_eps, "0 to 1")
        check_range(
            0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "over 0, under 1"
        )
        for name in ("generations", "batch_size", "validations", "popsize"):
            check_range(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("natural_every", "num_actors", "seed"):
            check_range(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("width", "depth"):
            check_range(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("stdev_init", "center_learning_rate"):
            check_range(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a finite number over 0")
        for name in ("stdev_learning_rate", "checkpoint_seconds"):
            check_range(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number, 0 or more")
        check_range(self.seed < 2**63, "seed", self.seed, "less than 2**63")
        check_range(self.popsize >= 2, "popsize", self.popsize, "2 or more")
        check_range(
            not self.symmetric or self.popsize % 2 == 0, "popsize", self.popsize, "an even number, with symmetric=true"
        )
        changes_stdev = self.stdev_schedule != CONSTANT
        if self.stdev_learning_rate > 0 and changes_stdev:
            raise InputError(
                f"stdev_learning_rate={self.stdev_learning_rate} and a stdev_schedule both set sigma: allowed is one of them"
            )
        if not (self.device in ("auto", "cpu", "cuda") or (self.device[:5] == "cuda:" and self.device[5:].isdecimal())):
            raise InputError(f"device={self.device!r}: allowed are auto, cpu, cuda:0, cuda:1 and so on")
        parse_bytes(self.memory_budget)
        object.__setattr__(self, "optimizer_config", dict(self.optimizer_config))

    @property
    def radius(self) -> float:
        """The radius that is trained at when the schedule is at 1."""
        return self.eps if self.train_eps is None else self.train_eps

    def settings(self) -> dict[str, Any]:
        """Every setting as JSON takes it, groups nested; functions and modules by their names."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class LoadedProblem:
    """A problem file that was run, with the overrides applied."""

    experiment: Experiment
    source: bytes
    overrides: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()


def load_problem(
    path: Path, overrides: Sequence[str] = (), *, base: Path | None = None, name: str | None = None
) -> LoadedProblem:
    """Run a problem file and apply ``KEY=VALUE`` overrides.

    Args:
        path: the file; it must define ``experiment = evocert.Experiment(...)``.
        overrides: as given to ``--set``.
        base: the folder that its relative paths and imports are looked up in; by default its own.
        name: the problem's name; by default the file's.

    Raises:
        InputError: the file is missing, is no Python, raises, or defines no experiment; or an override is wrong.
    """
    if not path.is_file():
        raise InputError(f"problem file {path}: no such file")
    if path.suffix != ".py":
        raise InputError(
            f"problem file {path}: allowed is a Python file (.py) that defines experiment = evocert.Experiment(...)"
        )
    source = path.read_bytes()
    base = (base or path.parent).resolve()
    module = types.ModuleType(f"evocert_problem_{path.stem}")
    module.__file__ = str(path)
    sys.path.insert(0, str(base))
    # Classes that the file defines must be found by name (pickling, dataclasses).
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"problem file {path}, line {error.lineno}: no valid Python ({error.msg})") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file does, SystemExit included
        line = _line_in(error, path)
        raise InputError(
            f"problem file {path}{line} raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        sys.path.remove(str(base))
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        found = "no experiment" if experiment is None else f"an experiment of type {type(experiment).__name__}"
        raise InputError(f"problem file {path} defines {found}: it must define experiment = evocert.Experiment(...)")
    # Paths in the file are relative to the file; paths on the command line to where the user is.
    for key in ("data_dir", "data_path", "init_from"):
        if (value := getattr(experiment, key)) is not None:
            experiment = dataclasses.replace(experiment, **{key: str(base / value)})
    if not experiment.problem:
        experiment = dataclasses.replace(experiment, problem=name or path.stem)
    return LoadedProblem(apply_overrides(experiment, overrides), source, tuple(overrides))


def apply_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """``KEY=VALUE`` settings on an experiment. KEY is a dotted name or, where that is unique, its last part.

    All are applied before the result is validated, so that settings that belong together can be changed together.

    Raises:
        InputError: an unknown or ambiguous name, a wrong type, an impossible value.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"--set {override}: allowed is KEY=VALUE")
        group, name = _resolve(experiment, key.strip())
        if group is None:
            changes[name] = parse_setting(name, text, type_of(Experiment, name))
        elif group == "optimizer_config":
            config = changes.get(group, dict(experiment.optimizer_config))
            changes[group] = {
                **config,
                name: parse_setting(key, text, bool if name in ("amsgrad", "nesterov") else float),
            }
        else:
            value = parse_setting(key, text, type_of(type(getattr(experiment, group)), name))
            changes.setdefault(group, {})[name] = value
    for group in ("attack", "eps_schedule", "learning_rate_schedule", "stdev_schedule"):
        if group in changes:
            changes[group] = dataclasses.replace(getattr(experiment, group), **changes[group])
    for key in ("data_dir", "data_path", "init_from"):
        if changes.get(key) is not None:
            changes[key] = str(Path(changes[key]).expanduser().resolve())
    return dataclasses.replace(experiment, **changes)


def _resolve(experiment: Experiment, key: str) -> tuple[str | None, str]:
    names: dict[str, tuple[str | None, str]] = {}
    for outer in dataclasses.fields(Experiment):
        value = getattr(experiment, outer.name)
        if dataclasses.is_dataclass(value):
            names |= {f"{outer.name}.{inner.name}": (outer.name, inner.name) for inner in dataclasses.fields(value)}
        elif outer.name == "optimizer_config":
            options = {option for some in OPTIMIZERS.values() for option in some}
            names |= {f"{outer.name}.{option}": (outer.name, option) for option in sorted(options)}
        else:
            names[outer.name] = (None, outer.name)
    if key in names:
        return names[key]
    matches = [name for name in names if name.rpartition(".")[2] == key]
    if len(matches) == 1:
        return names[matches[0]]
    if matches:
        raise InputError(f"--set {key}: stands for several settings, allowed is one of {', '.join(matches)}")
    last_parts = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(key, [*names, *last_parts], n=3, cutoff=0.5)
    nearest = list(dict.fromkeys(last_parts.get(name, name) for name in near)) or list(names)
    raise InputError(f"--set {key}: no such setting; {'nearest are' if near else 'allowed are'} {', '.join(nearest)}")


def _line_in(error: BaseException, path: Path) -> str:
    """Where in the user's own file an error comes from."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f", line {trace.tb_lineno},"
        trace = trace.tb_next
    return line
