"""Schedules: how a setting changes over a run. Times are fractions of the run, so that any number of generations is valid.

A schedule gives a factor; the setting's own value is what it multiplies. A new shape is one function and one line in
``SHAPES``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from evocert.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A factor that goes from ``first`` to ``last`` between two times, and stays at its ends before and after.

    Attributes:
        shape: "constant" (``last``, always), "linear", "smooth", "step" or "cosine".
        start, end: fractions of the run, 0 <= start <= end <= 1.
        first, last: the factors at the two times.
        steps: of a "step" schedule: how many equal ratios lead from first to last.

    Raises:
        InputError: an unknown shape, or numbers out of range.
    """

    shape: str = "constant"
    start: float = 0.0
    end: float = 1.0
    first: float = 1.0
    last: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"shape={self.shape!r} of a schedule: allowed are {', '.join(SHAPES)}")
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(f"a schedule from start={self.start} to end={self.end}: allowed is 0 <= start <= end <= 1")
        if not (0 <= self.first < math.inf and 0 <= self.last < math.inf):
            raise InputError(
                f"a schedule's factors first={self.first}, last={self.last}: allowed are finite numbers >= 0"
            )
        if self.steps < 1:
            raise InputError(f"steps={self.steps} of a schedule: allowed is 1 or more")
        if self.shape == "step" and not (self.first > 0 and self.last > 0):
            raise InputError(
                f"a step schedule multiplies, from first={self.first} to last={self.last}: allowed are > 0"
            )

    def __call__(self, fraction: float) -> float:
        """The factor at a fraction of the run, 0 to 1."""
        if self.shape == "constant":
            return self.last
        if fraction >= self.end:
            return self.last
        if fraction <= self.start:
            return self.first if self.shape != "step" else _step(0.0, self)
        return SHAPES[self.shape]((fraction - self.start) / (self.end - self.start), self)


def _constant(progress: float, schedule: Schedule) -> float:
    return schedule.last


def _linear(progress: float, schedule: Schedule) -> float:
    return schedule.first + (schedule.last - schedule.first) * progress


def _smooth(progress: float, schedule: Schedule) -> float:
    """Cubic at the start, straight after: continuous in value and slope, as the eps ramps of certified training are.

    With the bend at a quarter: ``a t^4`` until then, a line after it, and 1 at the end (the shape of auto_LiRPA's
    "SmoothedScheduler", from its documentation; Xu et al. 2020, arXiv:2002.12920).
    """
    bend = 0.25
    slope = 4 * bend**3  # of t^4 at the bend
    scale = 1 / (bend**4 + slope * (1 - bend))
    shaped = scale * (progress**4 if progress < bend else bend**4 + slope * (progress - bend))
    return schedule.first + (schedule.last - schedule.first) * shaped


def _step(progress: float, schedule: Schedule) -> float:
    """``steps`` drops at equal distances, the first at the start, the last one step before the end."""
    done = min(math.floor(progress * schedule.steps) + 1, schedule.steps)
    return schedule.first * (schedule.last / schedule.first) ** (done / schedule.steps)


def _cosine(progress: float, schedule: Schedule) -> float:
    return schedule.last + (schedule.first - schedule.last) * (1 + math.cos(math.pi * progress)) / 2


SHAPES: dict[str, Callable[[float, Schedule], float]] = {
    "constant": _constant,
    "linear": _linear,
    "smooth": _smooth,
    "step": _step,
    "cosine": _cosine,
}

CONSTANT = Schedule()
