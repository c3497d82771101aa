"""What a run is made of, built from its experiment alone: device, data, network, problem, searcher."""

import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evocert import bounds, evaluation, networks, searchers
from evocert.data import Dataset, channel_statistics, load
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.memory import parse_bytes
from evocert.problem import CertifiedTraining
from evocert.runs import Run, warn

CALIBRATION_IMAGES = 512  # whose statistics batch normalisations are given


@dataclasses.dataclass
class Parts:
    """All that a run is made of."""

    experiment: Experiment
    device: torch.device
    data: Dataset
    module: nn.Module
    problem: CertifiedTraining
    searcher: Any


def build(
    experiment: Experiment,
    tile: bounds.Tile | None = None,
    statistics: dict[str, list[float]] | None = None,
    *,
    warm_start: bool = True,
) -> Parts:
    """The parts of a run.

    Args:
        experiment: what it describes.
        tile: of an earlier process of the same run; chosen if None.
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
        start = None
        if experiment.init_from is not None and warm_start:
            start = _warm_start(Path(experiment.init_from), sum(p.numel() for p in module.parameters()))
            statistics = statistics or start.statistics
        if statistics:
            networks.set_statistics(module, statistics)
        else:
            networks.calibrate(module, data.train.batch(slice(0, CALIBRATION_IMAGES))[0])
    fraction = 1 / experiment.generations
    problem = CertifiedTraining(
        module,
        data.train,
        eps=lambda generation: experiment.radius * experiment.eps_schedule(generation * fraction),
        bound=experiment.bound,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        natural_every=experiment.natural_every,
        memory_budget=experiment.memory_budget,
        tile=tile,
        device=device,
        num_actors=experiment.num_actors,
    )
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
    searcher = searchers.method(experiment.method).configured(problem, experiment)
    return Parts(experiment, device, data, module, problem, searcher)


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
    centre: Tensor = state["searcher"]["mu"] if select == "last" or state["best"] is None else state["best"]["centre"]
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


def _warm_start(path: Path, parameters: int) -> _Start:
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
    centre = chosen_centre(state, selected)
    if len(centre) != parameters:
        raise InputError(f"init_from={path}: its network has {len(centre)} parameters, this one {parameters}")
    return _Start(centre, config.get("statistics") or {})
