"""What is measured: networks, the weights of their members, and images."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evocert.bounds import Network, read_network
from evocert.data import DataError, Dataset, channel_statistics, load
from evocert.errors import InputError
from evocert.networks import NETWORKS, flat_parameters
from evocert.schedules import Schedule
from evocert.settings import check_choice, check_range

DATA = ("digits", "mnist", "random")
WEIGHTS = ("random", "ibp")
MNIST, CIFAR = (1, 28, 28), (3, 32, 32)  # shapes
NETWORKS_ON_MNIST = (
    "cnn3",
    "cnn4",
    "fully_connected",
)  # where no data are named; the others' images are CIFAR-10's size
EPS = {MNIST: 0.1, CIFAR: 2 / 255, (1, 8, 8): 0.05}
RANDOM_IMAGES = 10_000
CLASSES = 10

# Gradient IBP for --weights ibp: as the field trains, but short (a minute or two on two cores).
STEPS = 1500
BATCH = 128
LEARNING_RATE = 2e-3
RADIUS = Schedule("smooth", 0.0, 0.6, first=0.0)  # of eps, over the training
RATE = Schedule("cosine", 0.6, 1.0, last=0.02)
SIGMA = 1e-3  # of the members around the trained weights


@dataclass(frozen=True)
class Architecture:
    """A built-in network in plain values."""

    name: str
    width: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def module(self, seed: int = 0) -> nn.Sequential:
        """With fresh weights, which the seed decides."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would move CUDA's generators too
            return NETWORKS[self.name](self.input_shape, CLASSES, mean=self.mean, std=self.std, width=self.width)


@dataclass(frozen=True)
class Work:
    """A population and what it is bounded on."""

    architecture: Architecture
    parameters: Tensor  # [P, D]
    images: Tensor  # [B, C, H, W]
    labels: Tensor  # [B]
    eps: float

    @cached_property
    def network(self) -> Network:
        return read_network(self.architecture.module(), self.architecture.input_shape)

    @property
    def label(self) -> str:
        return f"{self.architecture.name} w={self.architecture.width}"

    def part(self, members: int, images: int) -> "Work":
        """The first members and images alone."""
        return replace(
            self, parameters=self.parameters[:members], images=self.images[:images], labels=self.labels[:images]
        )

    def to(self, device: torch.device) -> "Work":
        tensors = {name: getattr(self, name).to(device) for name in ("parameters", "images", "labels")}
        return replace(self, **tensors)

    # For another process

    def record(self) -> dict[str, Any]:
        """Plain values and tensors."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "architecture": dataclasses.asdict(self.architecture)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Work":
        return cls(**{**record, "architecture": Architecture(**record["architecture"])})


def named(text: str) -> tuple[str, int]:
    """``NAME`` or ``NAME:WIDTH`` -> name and width. Raises InputError."""
    name, colon, width = text.partition(":")
    check_choice("--network", name, NETWORKS)
    if not colon:
        return name, inspect.signature(NETWORKS[name]).parameters["width"].default
    wide = int(width) if re.fullmatch("[0-9]{1,4}", width) else 0
    check_range(1 <= wide <= 1024, "--network", text, "NAME or NAME:WIDTH with a width from 1 to 1024, such as cnn3:4")
    return name, wide


@dataclass(frozen=True)
class Images:
    """Some images, and what else of their data set is needed."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: str
    dataset: Dataset | None = None


def find_images(network: str, data: str | None, data_dir: Path | None, count: int) -> Images:
    """Images for a network: of the data named, else MNIST's if they are at hand, else random ones.

    Raises:
        InputError: the data cannot be had, or are fewer.
    """
    shape = MNIST if network in NETWORKS_ON_MNIST else CIFAR
    why = ""
    if data is None and data_dir is not None:
        data = "mnist"
    if data is None and shape == MNIST:
        try:
            return _of_dataset(load("mnist", download=False), count)
        except DataError as error:
            why = f" ({error})"
    if data not in (None, "random"):
        return _of_dataset(load(data or "", data_dir=data_dir), count)
    check_range(count <= RANDOM_IMAGES, "--images", count, f"1 to {RANDOM_IMAGES}")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, shape[0], 8, 8, generator=generator)  # smooth, as pictures are
    images = F.interpolate(coarse, size=shape[1:], mode="bilinear")
    labels = torch.randint(CLASSES, (count,), generator=generator)
    mean, std = images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()
    return Images(images, labels, tuple(mean), tuple(std), f"random images{why}")


def _of_dataset(dataset: Dataset, count: int) -> Images:
    found = len(dataset.test)
    check_range(count <= found, "--images", count, f"1 to {found}, the test images of {dataset.name}")
    images, labels = dataset.test.batch(slice(0, count))
    mean, std = channel_statistics(dataset.train)
    return Images(images, labels, tuple(mean), tuple(std), f"test images of {dataset.name}", dataset)


def random_members(architecture: Architecture, count: int) -> Tensor:
    """Fresh initial weights for each member: ``[P, D]``."""
    return torch.stack([flat_parameters(architecture.module(seed)) for seed in range(count)])


def trained_members(
    architecture: Architecture, images: Images, eps: float, count: int, say: Callable[[str], None]
) -> tuple[Tensor, str]:
    """A population as PGPE samples it, around weights that were trained by gradient IBP.

    Args:
        architecture: the network.
        images: of a data set.
        eps: radius at the end of the training.
        count: P.
        say: is told what takes long.

    Returns:
        ``[P, D]``, and what they are, in words.

    Raises:
        InputError: the images are random, so there is nothing to train on.
    """
    if images.dataset is None:
        raise InputError(
            f"--weights=ibp with {images.about}: it trains on a data set's images; allowed are --data mnist (in --data-dir or "
            "the folder that EVOCERT_DATA names), --data digits, or --weights random"
        )
    settings = {
        "architecture": dataclasses.asdict(architecture), "data": images.dataset.train.sha256, "eps": eps,
        "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "schedules": [str(RADIUS), str(RATE)],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    kept = Path.home() / ".cache" / "evocert" / "bench" / f"{architecture.name}-{key}.pt"
    found = _kept(kept)
    if found is None:
        found = _trained(architecture, images.dataset, eps, say)
        _keep(kept, found)
    centre = found["centre"]
    noise = torch.randn(count, len(centre), generator=torch.Generator().manual_seed(1))
    natural, certified = (f"{100 * found[key]:.1f} %" for key in ("natural", "certified"))
    about = f"sigma {SIGMA:g} around weights trained by IBP (validation: natural {natural}, certified {certified})"
    return centre + SIGMA * noise, about


def _trained(architecture: Architecture, dataset: Dataset, eps: float, say: Callable[[str], None]) -> dict[str, Any]:
    from evocert.evaluation import validate
    from evocert.problem import CertifiedTraining

    module = architecture.module()
    batch = min(BATCH, len(dataset.train))

    def radius(step: int) -> float:
        return eps * RADIUS(step / STEPS)

    problem = CertifiedTraining(module, dataset.train, eps=radius, batch_size=batch, natural_every=0)
    centre = nn.Parameter(flat_parameters(module).unsqueeze(0))
    optimizer = torch.optim.Adam([centre], lr=LEARNING_RATE)
    for step in range(STEPS):
        if step % 100 == 0:
            say(f"training {architecture.name} w={architecture.width} by gradient IBP: step {step} of {STEPS}")
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * RATE(step / STEPS)
        _, centre.grad = problem.value_and_gradient(centre.detach(), step)
        optimizer.step()
    found = centre.detach()[0].clone()
    natural, certified = validate(problem.network, found, dataset.validation, eps, "ibp", 2**31)
    return {"centre": found, "natural": natural, "certified": certified}


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = torch.load(path, weights_only=True)
        return found if {"centre", "natural", "certified"} <= set(found) else None
    except Exception:  # absent, or damaged in whatever way: it is trained again
        return None


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all; a cache folder that cannot be written to costs the next bench its time and nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            torch.save(found, Path(folder, path.name))
            os.replace(Path(folder, path.name), path)
