"""A finished run, read back: the network that it chose, and the data that it was judged on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evocert import config, networks
from evocert.bounds import Network, read_network
from evocert.data import Dataset
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.parts import build_module, chosen_centre, load_data
from evocert.runs import Run, warn


@dataclass(frozen=True, eq=False)
class Finished:
    """What a run ended with.

    Attributes:
        path: its folder.
        experiment: as it was run.
        data: all three parts.
        module: the network, float32, in eval mode, on the CPU; pixels in, logits out.
        network: what ``read_network`` gave for it.
        parameters: ``[D]`` float32, those of the module.
        results: results.json.
    """

    path: Path
    experiment: Experiment
    data: Dataset
    module: nn.Module
    network: Network
    parameters: Tensor
    results: dict[str, Any]

    @property
    def eps(self) -> float:
        """The radius that the run was to certify, in [0, 1] pixels."""
        return self.experiment.eps


def load_finished(path: Path) -> Finished:
    """Read a run folder, and change nothing in it.

    Raises:
        InputError: it is no run folder, the run is not finished, its files are damaged, or its data are not to be had.
    """
    run = Run(path)
    for name in ("config.json", "problem.py"):
        if not (path / name).is_file():
            raise InputError(f"{path} is no run folder: it has no {name}")
    if not run.finished:
        raise InputError(f"run {path} is not finished: evocert resume {path}")
    if not (path / "network.onnx").is_file():
        raise InputError(f"run {path} has no network.onnx, which a finished run has: allowed is a complete run folder")
    results = run.read_results()
    found = config.reload(run)
    config.check_imported(run, found.loaded)
    experiment = found.loaded.experiment
    data = load_data(experiment)
    run.check_split(data.split_record())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # what the network draws is replaced
        module = build_module(experiment, data).cpu().eval()
    if found.statistics:
        networks.set_statistics(module, found.statistics)
    expected = sum(p.numel() for p in module.parameters())

    def accept(state: dict[str, Any]) -> None:
        if not state["trained"]:  # the one before the last: the results are of another network
            raise ValueError("it is not the run's last")
        if (count := len(chosen_centre(state, experiment.select))) != expected:
            raise ValueError(f"it has {count} parameters, the network {expected}")

    state = run.load_checkpoint(warn, accept)
    if state is None:
        raise InputError(f"run {path} has no checkpoint: its network cannot be read back")
    parameters = chosen_centre(state, experiment.select).float()
    module = networks.with_parameters(module, parameters).eval()
    return Finished(path, experiment, data, module, read_network(module, data.image_shape), parameters, results)
