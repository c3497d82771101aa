"""What a run is made of, built from its experiment alone: device, data, network, problem, searcher."""

import dataclasses
import inspect
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evocert import bounds, evaluation, networks, searchers
from evocert.data import Dataset, channel_statistics, load
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.initialisation import INITIALISATIONS
from evocert.memory import parse_bytes
from evocert.problem import CertifiedTraining
from evocert.runs import Run, warn

_STEP_OF_SEEDS = 0x9E3779B97F4A7C15  # between those of a run's stages: no run's own seed is likely to meet it
CALIBRATION_IMAGES = 512  # whose statistics batch normalisations are given


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with settings of its own.

    Attributes:
        number: counted from 0.
        experiment: its settings.
        problem: where the generations count on from those of the stages before.
        first: how many generations come before it.
    """

    number: int
    experiment: Experiment
    problem: CertifiedTraining
    first: int

    @property
    def end(self) -> int:
        """How many generations are done with its last."""
        return self.first + self.experiment.generations

    def fraction(self, generation: int) -> float:
        """How much of it is done, for its schedules."""
        return (generation - self.first) / self.experiment.generations


class Parts:
    """All that a run is made of.

    Attributes:
        stages: one, if the experiment names none; the last has the run's own settings.
        stage, searcher: what trains now.
    """

    def __init__(
        self, experiment: Experiment, device: torch.device, data: Dataset, module: nn.Module, stages: list[Stage]
    ) -> None:
        self.experiment, self.device, self.data, self.module, self.stages = experiment, device, data, module, stages
        self.stage = stages[0]
        self.searcher = self._searcher()

    @property
    def problem(self) -> CertifiedTraining:
        """What is searched now."""
        return self.stage.problem

    @property
    def in_last_stage(self) -> bool:
        """Whether what trains now is the run itself, not what comes before it."""
        return self.stage is self.stages[-1]

    def _searcher(self) -> Any:
        return searchers.method(self.stage.experiment.method).configured(self.problem, self.stage.experiment)

    def enter(self, stage: Stage) -> None:
        """Go on with another stage, from the centre as it is. Loggers and hooks follow to its searcher, which counts on."""
        if stage is self.stage:
            return
        before = self.searcher
        networks.with_parameters(self.module, before.status["center"].as_subclass(Tensor).detach().cpu())
        if self.problem.actors is not None:
            self.problem.kill_actors()
        counted = self.problem.nonfinite_evals
        self.stage = stage
        # Its noise must not be that of the stage before, of which the centre is made; and a checkpoint that was refused may
        # have left its traces.
        self.problem.manual_seed((self.experiment.seed + stage.number * _STEP_OF_SEEDS) % 2**63)
        self.problem.generation, self.problem.stalled_generations = stage.first, 0
        self.problem.nonfinite_evals = counted
        self.searcher = self._searcher()
        self.searcher._steps_count = stage.first
        for name in ("before_step_hook", "after_step_hook", "log_hook", "end_of_run_hook"):
            getattr(self.searcher, name).extend(getattr(before, name))

    def stage_of(self, generation: int) -> Stage:
        """In which generation number ``generation``, counted from 1, takes place."""
        return next(stage for stage in self.stages if generation <= stage.end)


def build(
    experiment: Experiment,
    tiles: Sequence[bounds.Tile] | None = None,
    statistics: dict[str, list[float]] | None = None,
    *,
    warm_start: bool = True,
) -> Parts:
    """The parts of a run.

    Args:
        experiment: what it describes.
        tiles: of an earlier process of the same run, one for each stage; chosen if None.
        statistics: likewise, of batch normalisations; of ``init_from``, or of a batch of training images, if None.
        warm_start: whether to read the start from ``init_from``; a checkpoint that is loaded afterwards replaces it.

    Raises:
        InputError, UnsupportedLayer: whatever in the experiment cannot be had here.
    """
    device = _device(experiment)
    data = load_data(experiment)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # torch.manual_seed would move CUDA's generators too
        module = build_module(experiment, data)
        INITIALISATIONS[experiment.initialisation](module)
        start = None
        if experiment.init_from is not None and warm_start:
            start = _warm_start(Path(experiment.init_from), module)
            statistics = statistics or start.statistics
        if statistics:
            networks.set_statistics(module, statistics)
        else:
            networks.calibrate(module, data.train.batch(slice(0, CALIBRATION_IMAGES))[0])
    stages: list[Stage] = []
    for settings in experiment.course:
        first = stages[-1].end if stages else 0
        tile = tiles[len(stages)] if tiles is not None else None
        stages.append(Stage(len(stages), settings, _problem(settings, first, module, data, tile, device), first))
    problem = stages[-1].problem
    if problem.network.num_classes < data.num_classes:
        raise InputError(
            f"the network has {problem.network.num_classes} outputs and data={experiment.data!r} {data.num_classes} classes: "
            f"allowed are {data.num_classes} outputs or more"
        )
    evaluation.evaluation_tile(
        problem.network, ["ibp", experiment.bound], torch.float64, parse_bytes(experiment.memory_budget), device
    )  # now, not after hours of training
    if start is not None:
        networks.with_parameters(module, start.centre)
    if experiment.num_actors > 1:
        _start_ray(experiment.num_actors)
    bounds.give_threads_to_tiles()
    return Parts(experiment, device, data, module, stages)


def _problem(
    settings: Experiment, first: int, module: nn.Module, data: Dataset, tile: bounds.Tile | None, device: torch.device
) -> CertifiedTraining:
    """Of one stage, before which there are ``first`` generations."""
    fraction = 1 / settings.generations
    problem = CertifiedTraining(
        module,
        data.train,
        eps=lambda generation: settings.radius * settings.eps_schedule((generation - first) * fraction),
        bound=settings.bound,
        batch_size=settings.batch_size,
        seed=settings.seed,
        natural_every=settings.natural_every,
        memory_budget=settings.memory_budget,
        tile=tile,
        device=device,
        num_actors=settings.num_actors,
    )
    problem.generation = first
    return problem


def load_data(experiment: Experiment) -> Dataset:
    """The data set that an experiment describes."""
    return load(
        experiment.data,
        data_dir=experiment.data_dir,
        data_path=experiment.data_path,
        download=experiment.download,
        validation_fraction=experiment.validation_fraction,
        seed=experiment.seed,
    )


def chosen_centre(state: dict[str, Any], select: Any) -> Tensor:
    """Of a checkpoint's state, the centre ``[D]`` that the setting ``select`` takes, on the CPU."""
    last = state.get("average", state["searcher"]["mu"])
    centre: Tensor = last if select == "last" or state["best"] is None else state["best"]["centre"]
    return centre.cpu()


def build_module(experiment: Experiment, data: Dataset) -> nn.Module:
    """The experiment's network, with its own initialisation, in float32: the precision that is trained and handed over."""
    if isinstance(experiment.network, nn.Module):
        return experiment.network.float()
    if isinstance(experiment.network, str):
        build: Any = networks.NETWORKS[experiment.network]
    else:
        build = experiment.network
    try:
        taken = inspect.signature(build).parameters
    except ValueError as error:  # of a built-in type
        raise InputError(f"network={build!r}: allowed is a function (input_shape, num_classes) -> module") from error
    options: dict[str, Any] = {}
    if "mean" in taken or "std" in taken:
        measured = channel_statistics(data.train) if experiment.mean is None or experiment.std is None else (None, None)
        options["mean"], options["std"] = experiment.mean or measured[0], experiment.std or measured[1]
        channels = data.image_shape[0]
        for name in ("mean", "std"):
            if len(options[name]) != channels:
                raise InputError(
                    f"{name}={options[name]}: the images have {channels} channels, one number for each is allowed"
                )
    for name in ("width", "depth"):
        if (value := getattr(experiment, name)) is not None:
            if name not in taken:
                raise InputError(f"{name}={value}: the network {experiment.settings()['network']} has no {name}")
            options[name] = value
    module = build(data.image_shape, data.num_classes, **options)
    if not isinstance(module, nn.Module):
        raise InputError(f"network gives a {type(module).__name__}: allowed is a torch.nn.Module")
    return module.float()


def _device(experiment: Experiment) -> torch.device:
    """The device of a run, made deterministic."""
    name = experiment.device
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() and experiment.num_actors < 2 else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"device={experiment.device}: no such CUDA device here, allowed are cpu and {_cuda_devices()}"
            )
        if experiment.num_actors > 1:
            raise InputError(
                f"num_actors={experiment.num_actors} with device={experiment.device}: allowed is device=cpu"
            )
        # Bit for bit the same on every run: before the first CUDA call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling costs a launch for every new tensor, and nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def _cuda_devices() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(f"cuda:{i}" for i in range(count)) or "no CUDA device (torch finds none)"


def _start_ray(actors: int) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


class _Start(NamedTuple):
    """What another run hands over, or would if it ended now."""

    centre: Tensor  # [D]
    statistics: dict[str, list[float]]


def _warm_start(path: Path, module: nn.Module) -> _Start:
    if not path.is_dir():
        raise InputError(f"init_from={path}: no such run folder")
    run = Run(path)
    try:
        config = run.read_config()
        selected = config.get("select")
        state = run.load_checkpoint(warn, accept=lambda state: chosen_centre(state, selected))
    except InputError as error:
        raise InputError(f"init_from={path}: {error}") from error
    if state is None or state["best"] is None:
        raise InputError(f"init_from={path}: that run has no validated checkpoint yet")
    here = networks.layers(module)
    recorded = config.get("layers")
    for there, own in itertools.zip_longest(recorded if isinstance(recorded, list) else here, here, fillvalue="none"):
        if there != own:
            raise InputError(
                f"init_from={path}: the first layer that differs is there {there}, here {own}: allowed is the same network"
            )
    centre, parameters = chosen_centre(state, selected), sum(p.numel() for p in module.parameters())
    if len(centre) != parameters:  # of a run that did not record its layers yet
        raise InputError(f"init_from={path}: its network has {len(centre)} parameters, this one {parameters}")
    return _Start(centre, config.get("statistics") or {})
