"""What a bench is asked for, checked before anything is measured."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from evocert.bench.work import DATA, WEIGHTS, named
from evocert.bounds import BOUNDS
from evocert.errors import InputError
from evocert.memory import parse_bytes
from evocert.settings import check_choice, check_range


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        networks: each NAME or NAME:WIDTH, of ``networks.NETWORKS``.
        bounds: names in ``BOUNDS``.
        members, images: P and B.
        weights: "random", fresh ones for each member, or "ibp", close around trained ones.
        eps: radius in [0, 1] pixels, such as "0.1" or "2/255"; None: what is usual for the images.
        data: "digits", "mnist" or "random"; None: MNIST for small networks if it is at hand, else random images.
        data_dir: where MNIST is.
        repeats: how often each call is timed.
        device: "auto", "cpu" or "cuda:N".
        out: a file for the report as JSON.
        memory_budget: from which the tiles are chosen, as the setting of that name.

    Raises:
        InputError: a value that is not allowed.
    """

    networks: tuple[str, ...]
    bounds: tuple[str, ...]
    members: int
    images: int
    weights: str
    eps: str | None
    data: str | None
    data_dir: Path | None
    repeats: int
    device: str
    out: Path | None
    memory_budget: str = "2GiB"

    def __post_init__(self) -> None:
        for network in self.networks:
            named(network)
        for bound in self.bounds:
            check_choice("--bound", bound, BOUNDS)
        check_range(1 <= self.members <= 4096, "--members", self.members, "1 to 4096")
        check_range(self.images >= 1, "--images", self.images, "1 or more")
        check_range(1 <= self.repeats <= 1000, "--repeats", self.repeats, "1 to 1000")
        check_choice("--weights", self.weights, WEIGHTS)
        if self.data is not None:
            check_choice("--data", self.data, DATA)
        radius = self.radius
        check_range(
            radius is None or 0 <= radius <= 1, "--eps", self.eps, "0 to 1, in [0, 1] pixels, such as 0.1 or 2/255"
        )
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", self.device):
            check_choice("--device", self.device, ("auto", "cpu", "cuda:0", "cuda:1"), " and so on")
        parse_bytes(self.memory_budget)
        if self.out is not None:
            _check_file(self.out)

    @property
    def radius(self) -> float | None:
        """eps as a number; NaN where it is none."""
        if self.eps is None:
            return None
        numerator, slash, denominator = self.eps.partition("/")
        try:
            return float(numerator) / float(denominator) if slash else float(numerator)
        except (ValueError, ZeroDivisionError):
            return float("nan")


def _check_file(path: Path) -> None:
    """Whether a report can be written there: better known before it is measured. Raises InputError."""
    allowed = "allowed is a file in a folder that exists and can be written to"
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"--out={path} is no file: {allowed}")
        if not path.parent.is_dir():
            raise InputError(f"--out={path}: there is no folder {path.parent}; {allowed}")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"--out={path} may not be written to: {allowed}")
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--out={path} cannot be written to ({getattr(error, 'strerror', error)}): {allowed}"
        ) from error
