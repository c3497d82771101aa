"""The exact method on many examples: in this process, or in several others."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, resource_tracker
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from evocert.attacks import worst_margin
from evocert.bounds import Box, Members, Network, box_around
from evocert.certify import exact
from evocert.certify.subject import Subject
from evocert.certify.verdict import Deadline, Outcome

Job = tuple[Tensor, int]  # image [C, H, W] float32, label


class Solver:
    """``with Solver(…) as solver``: decides examples one by one.

    Args:
        subject: the network.
        eps: radius in [0, 1] pixels.
        timeout: seconds for an example.
        workers: processes; with 1, this one.
    """

    def __init__(self, subject: Subject, eps: float, timeout: float, workers: int) -> None:
        self.subject, self.eps, self.timeout, self.workers = subject, eps, timeout, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._pool is not None:
            if kind is not None:  # nobody waits for what is under way
                for process in list(self._pool._processes.values()):
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def solved(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome, float]]:
        """For each job, in the order in which they are done: its number, its outcome and seconds.

        A point is a float32 ``[C, H, W]`` in the box that breaks the network in float64.
        """
        if self.workers == 1:
            for number, job in enumerate(jobs):
                yield number, *_solve(self.subject.members, *job, self.eps, self.timeout)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=get_context("spawn"),
                initializer=_begin,
                initargs=(self.subject.network, self.subject.parameters, self.eps, self.timeout, self.workers),
            )
        with _without_interrupts():
            futures = {self._pool.submit(_solve_here, *job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            try:
                yield futures[future], *future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process of the exact method was killed, most likely for want of memory; fewer workers need less, and "
                    "what was found is on record"
                ) from error


def _solve(members: Members, image: Tensor, label: int, eps: float, timeout: float) -> tuple[Outcome, float]:
    began = time.perf_counter()
    box = box_around(image.unsqueeze(0).double(), eps)
    labels = torch.tensor([label])
    found: list[Tensor] = []

    def replay(point: Tensor) -> bool:
        """Of the numbers of float32, which are what is replayed."""
        near = _rounded(point, box)
        with torch.no_grad():
            broken = bool(worst_margin(members.logits(near.double().unsqueeze(0))[0], labels) <= 0)
        if broken:
            found.append(near)
        return broken

    outcome = exact.decide(members, box, label, Deadline(timeout), replay)
    if outcome.verdict == "attacked":
        outcome = Outcome("attacked", found[-1])
    return outcome, time.perf_counter() - began


def _rounded(point: Tensor, box: Box) -> Tensor:
    """The next float32 to a point, in the box."""
    near = point.float()
    infinity = torch.full_like(near, torch.inf)
    near = torch.where(near.double() < box.lower[0], near.nextafter(infinity), near)
    return torch.where(near.double() > box.upper[0], near.nextafter(-infinity), near)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is the parent's affair: a process that is made in here never sees it, not even while it imports torch.

    Nor is the parent stopped in here, which would leave a process half made, with a traceback: it is told at the end. The mask
    is not enough for that, as a thread of torch's may take the signal, and Python's handler then runs in the main thread.
    """
    resource_tracker.ensure_running()  # which would undo the mask
    noted: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    deferring = callable(handler) and threading.current_thread() is threading.main_thread()
    if deferring:
        signal.signal(signal.SIGINT, lambda *arguments: noted.append(arguments))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if deferring:
            signal.signal(signal.SIGINT, handler)
    if noted and callable(handler):
        handler(*noted[0])


_members: Members
_settings: tuple[float, float]


def _begin(network: Network, parameters: Tensor, eps: float, timeout: float, workers: int) -> None:
    global _members, _settings
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    _members = network.bind(parameters.double().unsqueeze(0))
    _settings = eps, timeout


def _solve_here(image: Tensor, label: int) -> tuple[Outcome, float]:
    return _solve(_members, image, label, *_settings)
