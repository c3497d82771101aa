"""``Experiment``: the frozen, typed and validated description of one run, as a problem file defines it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evocert.bounds import BOUNDS
from evocert.data import DATASETS
from evocert.errors import InputError
from evocert.initialisation import INITIALISATIONS
from evocert.memory import parse_bytes
from evocert.networks import NETWORKS
from evocert.schedules import CONSTANT, Schedule
from evocert.searchers import BY_GRADIENT, METHODS, SAMPLING
from evocert.settings import as_float, check_choice, check_range, check_types, nearest, plain

# For each optimizer its options: a flag, or a number with a check and its words.
_DECAY = (lambda value: 0 <= value < 1, "0 or more, less than 1")
_OVER_0 = (lambda value: 0 < value < math.inf, "a finite number over 0")
_FROM_0 = (lambda value: 0 <= value < math.inf, "a finite number, 0 or more")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"beta1": _DECAY, "beta2": _DECAY, "epsilon": _OVER_0, "amsgrad": bool},
    "clipup": {"momentum": (lambda value: 0 <= value <= 1, "0 to 1"), "max_speed": _OVER_0},
    "sgd": {"momentum": _FROM_0, "dampening": _FROM_0, "nesterov": bool},
}
RANKINGS = ("raw", "centered", "linear", "nes", "normalized")
# EvoTorch's, and TensorBoardLogger; see ``evocert.logging``.
LOGGERS = (
    "StdOutLogger", "PandasLogger", "TensorBoardLogger", "MlflowLogger", "NeptuneLogger", "SacredLogger", "WandbLogger",
)  # fmt: skip
SELECTIONS = ("best", "last")
# What a stage may have of its own; all else is the run's: one network, one data set, one radius, one seed, one machine.
STAGED = (
    "bound", "method", "train_eps", "generations", "batch_size", "popsize", "stdev_init", "stdev_learning_rate",
    "center_learning_rate", "optimizer", "optimizer_config", "ranking_method", "symmetric", "control_points", "clip_norm", "l1",
    "weight_decay", "stdev_by_use", "regulariser", "mixture", "train_attack_steps", "train_attack_step", "eps_schedule",
    "learning_rate_schedule", "stdev_schedule", "natural_every",
)  # fmt: skip
PATHS = ("data_dir", "data_path", "init_from")


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
        check_range(1 <= self.steps < 2**31, "steps", self.steps, "1 or more")
        check_range(1 <= self.restarts < 2**31, "restarts", self.restarts, "1 or more")
        check_range(self.step_size is None or 0 < self.step_size <= 1, "step_size", self.step_size, "over 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run. Every attribute that can be written as text is a setting of the command line's ``--set``.

    Attributes:
        data: a name in ``evocert.data.DATASETS`` ("npz" with ``data_path``), or the path of an ``.npz`` file.
        data_dir: folder of the torchvision data sets; None: the environment variable EVOCERT_DATA, else a cache folder.
        data_path: the ``.npz`` file of "npz".
        download: whether torchvision may download what is absent.
        validation_fraction: share of the training images that validation takes.
        network: a name in ``evocert.networks.NETWORKS``, a module, or a function (input_shape, num_classes) -> module. A
            function's random weights follow ``seed``; a module is taken as it is. It is trained in float32.
        width, depth: of the named network, where it has one; None: its own default.
        mean, std: of each channel, for the normalisation; None: those of the training part.
        bound: a name in ``evocert.bounds.BOUNDS``.
        method: how the centre is moved, a name in ``evocert.searchers.METHODS``: on the smoothed certified loss "pgpe" and
            "rgs"; on a loss at the centre "grad" (certified), "standard", "pgd", "sabr", "mtl-ibp", "cc-ibp" and "exp-ibp".
        eps: the radius that is certified, in [0, 1] pixels.
        train_eps: the radius that is trained at; None: eps.
        generations: how many populations are evaluated, and updates made.
        batch_size: images a generation, the same for every member.
        popsize, stdev_init, center_learning_rate, stdev_learning_rate, optimizer, optimizer_config, ranking_method,
            symmetric: as of ``evocert.searchers.PGPE`` and EvoTorch; stdev_init is sigma. Methods without noise have no use for
            popsize and stdev_init.
        stdev_by_use: sigma of a parameter that is used at k places of its layer's output is stdev_init / k^stdev_by_use; 0: one
            sigma for all.
        control_points: of "pgpe": gradients near the centre that take out of the population's fitness what they predict (see
            ``evocert.searchers.control``): 0, or an even number, with ranking_method "raw", symmetric and a fixed sigma.
        clip_norm, l1: of the methods that follow gradients: the gradient's greatest length, and the weight of the parameters'
            absolute values in the loss.
        weight_decay: share of the parameters that an update at a learning rate of 1 takes away beside its step (Loshchilov and
            Hutter 2019, arXiv:1711.05101).
        regulariser: of the methods that follow gradients: weight of ``evocert.regularisers.shi`` in the loss while eps rises;
            it falls to 0 as eps reaches its last value.
        mixture: of "sabr" the share of eps that is the small box's radius; of "mtl-ibp", "cc-ibp" and "exp-ibp" the weight of
            IBP's part.
        train_attack_steps, train_attack_step: of the attack that those and "pgd" train on: how many steps, and their length as
            a share of eps.
        averaging: decay of an exponential moving average of the centre, which is then what is validated and kept; 0: none.
        eps_schedule, learning_rate_schedule, stdev_schedule: factors on train_eps, center_learning_rate and stdev_init.
        initialisation: how random weights are drawn, a name in ``evocert.initialisation.INITIALISATIONS``.
        init_from: a run folder whose network is where the search starts; None: random weights.
        stages: what is trained before, one mapping of settings for each stage, with those of the run for what it does not name;
            allowed are the settings in ``STAGED``. Schedules and generations count within a stage; the last stage is the run
            itself, of whose centres alone the best is kept.
        select: "best" keeps the centre with the highest certified accuracy on the validation part, "last" the last one.
        validations: how often the centre is validated, at equal distances, the last time at the end.
        patience: the run ends when so many validations in a row, with eps at its last value, were no better than the best; 0:
            never before its last generation.
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
    center_learning_rate: float
    popsize: int = 2
    stdev_init: float = 0.0
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
    stdev_by_use: float = 0.0
    optimizer: str | None = "adam"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    ranking_method: str = "raw"
    symmetric: bool = True
    control_points: int = 0
    clip_norm: float | None = None
    l1: float = 0.0
    weight_decay: float = 0.0
    regulariser: float = 0.0
    mixture: float = 0.5
    train_attack_steps: int = 8
    train_attack_step: float = 0.25
    eps_schedule: Schedule = CONSTANT
    learning_rate_schedule: Schedule = CONSTANT
    stdev_schedule: Schedule = CONSTANT
    averaging: float = 0.0
    initialisation: str = "default"
    init_from: str | None = None
    stages: Sequence[Any] = ()
    select: str = "best"
    validations: int = 20
    patience: int = 0
    natural_every: int = 1
    attack: AttackSettings = AttackSettings()
    loggers: Sequence[Any] = ()
    seed: int = 0
    device: str = "auto"
    memory_budget: int | str = "2GiB"
    num_actors: int = 0
    checkpoint_seconds: float = 30.0
    problem: str = ""

    def __new__(cls, *args: Any, **settings: Any) -> "Experiment":
        """Names are checked here, before Python complains of them in a TypeError."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                near = nearest(name, names, 3)
                raise InputError(f"no setting is called {name}: {allowed_names(near, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("bound", self.bound, BOUNDS)
        check_choice("method", self.method, METHODS)
        check_choice("ranking_method", self.ranking_method, RANKINGS)
        check_choice("select", self.select, SELECTIONS)
        check_choice("initialisation", self.initialisation, INITIALISATIONS)
        if not self.data.endswith(".npz"):
            check_choice("data", self.data, DATASETS, ", or the path of an .npz file")
        for name in (*PATHS, "data"):
            path = getattr(self, name)
            check_range(path is None or (path != "" and "\0" not in path), name, path, "a path, or none")
        self._check_network()
        self._check_numbers()
        self._check_optimizer()
        self._check_schedules()
        self._check_loggers()
        self._check_stages()
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", self.device):
            check_choice("device", self.device, ("auto", "cpu", "cuda", "cuda:0", "cuda:1"), " and so on")
        parse_bytes(self.memory_budget)
        good = re.search(r"[/\\\x00-\x1f]", self.problem) is None and self.problem not in (".", "..")
        check_range(good, "problem", self.problem, "a name that a folder can have")

    def _check_network(self) -> None:
        if isinstance(self.network, str):
            check_choice("network", self.network, NETWORKS)
        if isinstance(self.network, nn.Module):
            for name, default in {
                **dict.fromkeys(("width", "depth", "mean", "std")),
                "initialisation": "default",
            }.items():
                words = f"{default or 'none'}: the network is a module already"
                check_range(getattr(self, name) == default, name, getattr(self, name), words)
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise InputError(f"mean={list(self.mean)}, std={list(self.std)}: allowed are lists of one length")
        for name, lowest in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            good = values is None or (len(values) > 0 and all(lowest < value < math.inf for value in values))
            allowed = f"a finite number{' over 0' if name == 'std' else ''} for each channel"
            check_range(good, name, None if values is None else list(values), allowed)

    def _check_numbers(self) -> None:
        check_range(0 <= self.eps <= 1, "eps", self.eps, "0 to 1, in [0, 1] pixels")
        check_range(0 <= self.radius <= 1, "train_eps", self.train_eps, "0 to 1, in [0, 1] pixels, or none")
        part = self.validation_fraction
        check_range(0 < part < 1, "validation_fraction", part, "over 0, under 1")
        for name in ("generations", "batch_size", "validations"):
            check_range(1 <= getattr(self, name) < 2**31, name, getattr(self, name), "1 or more, less than 2**31")
        for name in ("natural_every", "num_actors", "patience"):
            check_range(0 <= getattr(self, name) < 2**31, name, getattr(self, name), "0 or more, less than 2**31")
        for name in ("width", "depth"):
            value = getattr(self, name)
            check_range(value is None or 1 <= value <= 2**16, name, value, "1 to 65536, or none")
        for name in ("center_learning_rate", "train_attack_step"):
            check_range(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a finite number over 0")
        clip = self.clip_norm
        check_range(clip is None or 0 < clip < math.inf, "clip_norm", clip, "a finite number over 0, or none")
        check_range(0 <= self.mixture <= 1, "mixture", self.mixture, "0 to 1")
        check_range(0 <= self.stdev_by_use <= 1, "stdev_by_use", self.stdev_by_use, "0 to 1")
        check_range(0 <= self.averaging < 1, "averaging", self.averaging, "0 or more, less than 1")
        check_range(1 <= self.train_attack_steps < 2**31, "train_attack_steps", self.train_attack_steps, "1 or more")
        for name in ("stdev_init", "stdev_learning_rate", "l1", "weight_decay", "regulariser", "checkpoint_seconds"):
            check_range(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number, 0 or more")
        check_range(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, less than 2**63")
        check_range(2 <= self.popsize < 2**31, "popsize", self.popsize, "2 or more, less than 2**31")
        even = not self.symmetric or self.popsize % 2 == 0
        check_range(even, "popsize", self.popsize, "an even number, with symmetric=true")
        if self.method in SAMPLING:
            good = self.stdev_init > 0
            check_range(good, "stdev_init", self.stdev_init, f"a finite number over 0, with method={self.method}")
        if self.method != "pgpe":
            for name in ("num_actors", "stdev_learning_rate"):
                check_range(getattr(self, name) == 0, name, getattr(self, name), f"0, with method={self.method}")
        elif self.control_points:
            for name, wanted in (("ranking_method", "raw"), ("symmetric", True), ("stdev_learning_rate", 0)):
                value = getattr(self, name)
                check_range(value == wanted, name, value, f"{wanted}, with control_points={self.control_points}")
        if not BOUNDS[self.bound].differentiable:
            others = ", ".join(name for name in METHODS if name not in BY_GRADIENT)
            words = f"{others}, with bound={self.bound}, which has no gradient"
            check_range(self.method not in BY_GRADIENT, "method", self.method, words)
            words = f"0, with bound={self.bound}, which has no gradient"
            check_range(self.control_points == 0, "control_points", self.control_points, words)
        points = self.control_points
        check_range(0 <= points < 2**31 and points % 2 == 0, "control_points", points, "0 or an even number")

    def _check_optimizer(self) -> None:
        if self.optimizer is not None:
            check_choice("optimizer", self.optimizer, OPTIMIZERS, ", none")
        # None is EvoTorch's word for an option's default, and the only way to unset one by --set.
        config = {key: value for key, value in self.optimizer_config.items() if value is not None}
        allowed = OPTIMIZERS[self.optimizer] if self.optimizer else {}
        for key, value in list(config.items()):
            check_choice(f"a name in optimizer_config of optimizer={self.optimizer}", key, allowed)
            if allowed[key] is bool:
                check_range(isinstance(value, bool), f"optimizer_config.{key}", value, "true or false")
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good, words = allowed[key]
                check_range(number and good(value), f"optimizer_config.{key}", value, words)
                config[key] = as_float(f"optimizer_config.{key}", value)
        if ("beta1" in config) != ("beta2" in config):
            given, lacking = sorted(("beta1", "beta2"), key=lambda name: name not in config)
            raise InputError(f"optimizer_config.{given}={config[given]}: allowed is together with {lacking} only")
        if config.get("nesterov") and (not config.get("momentum") or config.get("dampening")):
            raise InputError("optimizer_config.nesterov=True: allowed is with momentum over 0 and no dampening")
        object.__setattr__(self, "optimizer_config", config)

    def _check_schedules(self) -> None:
        low, high = self.stdev_schedule.reach
        if self.stdev_learning_rate > 0 and self.stdev_schedule != CONSTANT:
            raise InputError(
                f"stdev_learning_rate={self.stdev_learning_rate} and a stdev_schedule both set sigma: allowed is one of them"
            )
        check_range(low > 0, "stdev_schedule with the factor", low, "factors over 0: sigma must not vanish")
        for name, value in (("stdev_schedule", self.stdev_init), ("learning_rate_schedule", self.center_learning_rate)):
            high = getattr(self, name).reach[1]
            check_range(high * value < math.inf, f"{name} with the factor", high, "a finite product with its setting")
        high = self.eps_schedule.reach[1]
        words = f"what keeps the radius in [0, 1]: it is {self.radius} times the factor"
        check_range(self.radius * high <= 1, "eps_schedule with the factor", high, words)

    def _check_loggers(self) -> None:
        for logger in self.loggers:
            name = logger[0] if isinstance(logger, tuple | list) and len(logger) == 2 else logger
            if isinstance(name, str) and (name is logger or isinstance(logger[1], dict)):
                check_choice("a name in loggers", name, LOGGERS, ", or a function of the searcher")
            else:
                words = "a name, (name, {arguments}), or a function of the searcher"
                check_range(callable(logger), "one of loggers", logger, words)

    def _check_stages(self) -> None:
        for number, stage in enumerate(self.stages, 1):
            check_range(isinstance(stage, Mapping), f"stages, number {number}", stage, "a mapping of settings")
            for name in stage:
                check_choice(f"a setting of stage {number}", str(name), STAGED)
            try:
                self._with(stage)
            except InputError as error:
                raise InputError(f"stage {number}: {error}") from error

    @property
    def course(self) -> "list[Experiment]":
        """The stages, each as an experiment of its own; the last is this one."""
        return [self._with(stage) for stage in (*self.stages, {})]

    def _with(self, stage: Mapping[str, Any]) -> "Experiment":
        """Another stage's. Only PGPE shares its work out among actors."""
        actors = self.num_actors if stage.get("method", self.method) == "pgpe" else 0
        return dataclasses.replace(self, **{"stages": (), "num_actors": actors if stage else self.num_actors, **stage})

    @property
    def total_generations(self) -> int:
        """Of all stages."""
        return sum(stage.generations for stage in self.course)

    @property
    def radius(self) -> float:
        """The radius that is trained at when the schedule is at 1."""
        return self.eps if self.train_eps is None else self.train_eps

    def settings(self) -> dict[str, Any]:
        """Every setting as JSON takes it, groups nested; functions and modules by their names."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def allowed_names(near: list[str], names: list[str]) -> str:
    return f"nearest are {', '.join(near)}" if near else f"allowed are {', '.join(names)}"
