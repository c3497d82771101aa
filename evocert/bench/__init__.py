"""``evocert bench``: how fast the bounds are, how far from their floor, and how much faster than other ways to have them."""

import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from evocert.bench import floor, fresh, lirpa, loop, measure
from evocert.bench.settings import Settings
from evocert.bench.work import EPS, Architecture, Work, find_images, named, random_members, trained_members
from evocert.bounds import box_around
from evocert.errors import InputError
from evocert.networks import with_parameters
from evocert.runs import Run, environment
from evocert.settings import plain

LOOP_MEMBERS = 3  # on which the plain loop is timed
LOOP_IMAGES = 4  # likewise, where it back-substitutes neurons: its time for an image was no less on eight
SAMPLE = (4, 32)  # members and images on which undecided neurons are counted
LOOP_SECONDS = 4.0  # after which it begins no further member
AGREES = 1e-4  # relative to the largest bound where that is over 1

__all__ = ["BenchFailed", "BenchStopped", "Settings", "Show", "bench"]


class BenchFailed(RuntimeError):  # noqa: N818 (as UnsupportedLayer)
    """What no setting is wrong for: the message is one line."""


class BenchStopped(Exception):  # noqa: N818 (no error: the user's wish)
    """The user stopped it: the message says what that leaves."""


class Show(Protocol):
    """Where a bench reports to."""

    def say(self, line: str) -> None: ...
    def header(self, report: dict[str, Any]) -> None: ...
    def network(self, found: dict[str, Any]) -> None: ...
    def footer(self, report: dict[str, Any]) -> None: ...


def bench(settings: Settings, show: Show) -> dict[str, Any]:
    """Measures, shows and, if asked for, writes a report; returns it.

    Raises:
        InputError: what is asked for cannot be had here.
        BenchFailed: memory did not suffice, or the report could not be written.
    """
    try:
        report = _report(settings, show)
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        raise BenchFailed("out of memory: fewer --members or --images, or a narrower --network, need less") from error
    if settings.out is not None:
        path = settings.out.resolve()  # of a link, what it points to
        try:
            Run(path.parent).write_json(path.name, report)
        except OSError as error:
            raise BenchFailed(f"--out={settings.out} could not be written: {error.strerror}") from error
    return report


def _report(settings: Settings, show: Show) -> dict[str, Any]:
    device = _device(settings.device)
    works = [_work(settings, network, device, show) for network in dict.fromkeys(settings.networks)]
    for work, _ in works:
        for bound in settings.bounds:
            measure.tile(work, bound, device, settings.memory_budget)  # it is refused here, or not at all
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(device, torch.get_num_threads()),
        "settings": plain(asdict(settings)),
        "load": os.getloadavg()[0],
        "multiply_adds_per_second": floor.matrix_rate(device),
        "auto_lirpa": None if lirpa.is_there() else lirpa.ABSENT,
        "networks": [],
    }
    show.header(report)
    for work, about in works:
        one = _Bench(work, device, settings.memory_budget, settings.repeats, report["multiply_adds_per_second"], show)
        found = {**about, "bounds": [one.row(bound) for bound in dict.fromkeys(settings.bounds)]}
        report["networks"].append(found)
        show.network(found)
    show.footer(report)
    return report


def _device(name: str) -> torch.device:
    """The device, set up as a run sets it up (deterministic, float32 products in full precision)."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise InputError(f"--device={name}: no such CUDA device here, allowed are {there}")
    fresh.prepare(device)
    return device


def _work(settings: Settings, network: str, device: torch.device, show: Show) -> tuple[Work, dict[str, Any]]:
    """The population of a network, and what the report says about it."""
    name, width = named(network)
    images = find_images(name, settings.data, settings.data_dir, settings.images)
    _, channels, height, rows = images.images.shape
    shape = (channels, height, rows)
    eps = settings.radius if settings.radius is not None else EPS[shape]
    architecture = Architecture(name, width, shape, images.mean, images.std)
    if settings.weights == "random":
        weights, about = random_members(architecture, settings.members), "random, fresh for each member"
    else:
        weights, about = trained_members(architecture, images, eps, settings.members, show.say)
    work = Work(architecture, weights, images.images, images.labels, eps).to(device)
    record = {
        "network": name,
        "width": width,
        "input_shape": list(shape),
        "parameters": work.network.num_parameters,
        "members": settings.members,
        "images": settings.images,
        "eps": eps,
        "data": images.about,
        "weights": about,
    }
    return work, record


@dataclass
class _Bench:
    """The measurements of one network."""

    work: Work
    device: torch.device
    budget: str
    repeats: int
    rate: float
    show: Show
    lirpas: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was measured, by method

    def row(self, bound: str) -> dict[str, Any]:
        """All figures of one bound. Milliseconds are for a network and image, memory is bytes, or why it was not measured."""
        work, device = self.work, self.device
        pairs = len(work.parameters) * len(work.labels)
        tile, pass_tile = (measure.tile(work, name, device, self.budget) for name in (bound, "ibp"))
        self._say(bound, "")
        forward, bounds = partial(measure.logits, work, pass_tile), partial(measure.margins, work, bound, tile)
        forward()
        margins = bounds()
        passes, times = measure.rounds([forward, bounds], device, self.repeats)
        own = 1e3 * median(times) / pairs
        self._say(bound, "its memory")
        try:
            peak: int | str = fresh.peak_memory(work, bound, tile, device)
        except fresh.ProcessFailed as error:
            peak = str(error)
        open_shares = None
        if bound == "deeppoly-sparse":
            sample = work.part(*SAMPLE)
            open_shares = floor.undecided(sample.network, sample.parameters, box_around(sample.images, work.eps))
        operations = floor.operations(work.network, bound, open_shares)
        at_rate = 1e3 * operations / self.rate
        return {
            "bound": bound,
            "tile": list(tile),
            "seconds": times,
            "milliseconds": own,
            "per_second": 1e3 / own,
            "forward_seconds": passes,
            "forward_passes": median(times) / median(passes),
            "peak": peak,
            "operations": operations,
            "undecided": open_shares,
            "floor_milliseconds": at_rate,
            "floor_share": at_rate / own,
            "loop": self._loop(bound, own, margins),
            "auto_lirpa": self._auto_lirpa(bound, own, margins),
        }

    def _say(self, bound: str, what: str) -> None:
        self.show.say(f"measuring {self.work.label} with {bound}{what and ': '}{what}")

    def _loop(self, bound: str, own: float, margins: Tensor) -> dict[str, Any] | None:
        """The plain loop on some members and images; None where it does not know the bound or a layer."""
        module = self.work.architecture.module().to(self.device)
        if not loop.knows(module, bound):
            return None
        self._say(bound, "a plain loop over members")
        rule = loop.PLAIN[bound]
        some = self.work.part(LOOP_MEMBERS, LOOP_IMAGES if rule.neurons else len(self.work.labels))

        def member(weights: Tensor) -> Tensor:
            with_parameters(module, weights)
            return loop.margins(module, some.images, some.labels, some.eps, rule)

        theirs, ours = member(some.parameters[0]), margins[0, : len(some.labels)]
        calls = [partial(member, weights) for weights in some.parameters] * self.repeats
        times = measure.within(LOOP_SECONDS, calls, self.device)
        time = 1e3 * median(times) / len(some.labels)
        difference = float((theirs - ours).abs().max())
        return {
            "members": len(some.parameters),
            "images": len(some.labels),
            "seconds": times,
            "milliseconds": time,
            "ratio": time / own,
            "largest_difference": difference,
            "agrees": difference <= AGREES * max(1.0, float(ours.abs().max())),
        }

    def _auto_lirpa(self, bound: str, own: float, margins: Tensor) -> dict[str, Any] | None:
        """auto_LiRPA on some members and all images: all at once, and in the best of some chunks."""
        method = lirpa.METHODS.get(bound)
        if method is None or not lirpa.is_there():
            return None
        if method not in self.lirpas:
            self._say(bound, f"auto_LiRPA's {method}")
            try:
                self.lirpas[method] = self._lirpa(method)
            except fresh.ProcessFailed as error:
                self.lirpas[method] = {"failed": str(error)}
        found = self.lirpas[method]
        if "failed" in found:
            return {"method": method, **found}
        ours = margins[0].cpu()
        parts = {
            name: {**found[name], "ratio": found[name]["milliseconds"] / own} for name in ("all_images", "best_chunk")
        }
        difference = float((torch.tensor(found["margins"]) - ours).abs().max())
        return {
            "method": method,
            "version": found["version"],
            "members": found["members"],
            **parts,
            "seconds_by_chunk": found["seconds_by_chunk"],
            "largest_difference": difference,
        }

    def _lirpa(self, method: str) -> dict[str, Any]:
        """The process for all images at once times the chunks too; the best of them has its memory measured in another."""
        images = len(self.work.labels)
        some = self.work.part(lirpa.MEMBERS, images)
        chunks = [images, *(chunk for chunk in lirpa.CHUNKS if chunk < images)]
        found = fresh.auto_lirpa(some, method, chunks, self.repeats, self.device)
        times = {int(chunk): 1e3 * median(seconds) / images for chunk, seconds in found["seconds"].items()}
        best = min(chunks[1:] or chunks, key=lambda chunk: times[chunk])
        again = fresh.auto_lirpa(some, method, [best], 1, self.device) if best != images else found
        return {
            "version": found["version"],
            "members": len(some.parameters),
            "margins": found["margins"],
            "seconds_by_chunk": found["seconds"],
            "all_images": {"images": images, "milliseconds": times[images], "peak": found["peak"]},
            "best_chunk": {"images": best, "milliseconds": times[best], "peak": again["peak"]},
        }
