"""Clocks, and what a call takes of memory."""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evocert.bench.work import Work
from evocert.bounds import BOUNDS, Tile, box_around, choose_tile, over_tiles
from evocert.errors import InputError
from evocert.memory import parse_bytes

Call = Callable[[], Any]


def tile(work: Work, bound: str, device: torch.device, budget: str) -> Tile:
    """What evocert chooses within a memory budget. Raises InputError where not even one member and image fit."""
    try:
        cost = BOUNDS[bound].cost(work.network, device)
        return choose_tile(cost, len(work.labels), parse_bytes(budget), device)
    except ValueError as error:
        raise InputError(f"{work.label} with {bound}: {error}") from error


def margins(work: Work, bound: str, shape: Tile) -> Tensor:
    """The bounds of the whole population ``[P, B, M]``."""
    with torch.no_grad():
        box = box_around(work.images, work.eps)
        return BOUNDS[bound](work.network, work.parameters, box, work.labels, tile=shape)


def logits(work: Work, shape: Tile) -> Tensor:
    """A forward pass of the whole population ``[P, B, K]``."""
    with torch.no_grad():
        return over_tiles(
            lambda members, images: members.logits(images), work.network, work.parameters, (work.images,), shape
        )


# Time


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """How long a call takes, until the device is done."""
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def rounds(calls: Sequence[Call], device: torch.device, repeats: int) -> list[list[float]]:
    """For each call its seconds. They take turns, so that what else the machine does hits all alike."""
    return list(map(list, zip(*([seconds(call, device) for call in calls] for _ in range(repeats)), strict=True)))


def within(limit: float, calls: Sequence[Call], device: torch.device) -> list[float]:
    """Seconds of each of some calls; those that would begin after ``limit`` seconds are left out, but for the first."""
    found: list[float] = []
    for call in calls:
        if not found or sum(found) < limit:
            found.append(seconds(call, device))
    return found


# Memory


def peak(call: Call, device: torch.device) -> int:
    """Bytes that a call takes above the level before it: on CUDA of what torch allocates there, else of the process.

    For a process that has not made such a call yet.
    """
    with contextlib.suppress(OSError, AttributeError):  # what the allocator of glibc only holds in reserve
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    level = _level(device)
    _forget_peak(device)
    call()
    return max(0, _highest(device) - level)


def _level(device: torch.device) -> int:
    if device.type == "cuda":
        synchronise(device)
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def _highest(device: torch.device) -> int:
    if device.type == "cuda":
        synchronise(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Of Linux's own record. ``ru_maxrss`` is for other systems: on Linux a new process begins with its parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
