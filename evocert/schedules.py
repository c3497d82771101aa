"""Schedules: how a setting changes over a run. Times are fractions of the run, so that any number of generations is valid.

A schedule gives a factor; the setting's own value is what it multiplies. Generation g of G (from 0) is at g / G. A new
shape is one function and one line in ``SHAPES``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from evocert.errors import InputError
from evocert.settings import check_choice, check_range, check_types


@dataclass(frozen=True)
class Schedule:
    """A factor that goes from ``first`` to ``last`` between two times, monotone, and stays at its ends before and after.

    Attributes:
        shape: "constant" (``last``, always), "linear", "smooth", "step" or "cosine".
        start, end: fractions of the run, 0 <= start <= end <= 1. If they are equal, the factor jumps there.
        first, last: the factors at the two times.
        steps: of "step": in how many jumps of equal ratio, at equal distances, it goes from first to last.

    Raises:
        InputError: an unknown shape, a wrong type, or numbers out of range.
    """

    shape: str = "constant"
    start: float = 0.0
    end: float = 1.0
    first: float = 1.0
    last: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("shape", self.shape, SHAPES)
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(f"start={self.start}, end={self.end}: allowed is 0 <= start <= end <= 1")
        for name in ("first", "last"):
            value = getattr(self, name)
            check_range(0 <= value < math.inf, name, value, "a finite number, 0 or more")
            check_range(self.shape != "step" or value > 0, name, value, "over 0: a step multiplies")
        check_range(1 <= self.steps < 2**31, "steps", self.steps, "1 or more")
        if self.shape == "constant":
            for f in fields(self):  # a schedule without a shape would be silently none
                if f.name not in ("shape", "last"):
                    value = getattr(self, f.name)
                    check_range(
                        value == f.default, f.name, value, f"{f.default} with shape='constant': name another shape"
                    )

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the greatest factor of the run."""
        first = self.last if self.shape == "constant" else self.first
        return min(first, self.last), max(first, self.last)

    def __call__(self, fraction: float) -> float:
        """The factor at a fraction of the run, 0 to 1."""
        if self.shape == "constant" or fraction >= self.end:
            return self.last
        if fraction <= self.start:
            return self.first
        factor = SHAPES[self.shape]((fraction - self.start) / (self.end - self.start), self)
        low, high = self.reach
        return min(max(factor, low), high)  # rounding must not leave the range


def _constant(progress: float, schedule: Schedule) -> float:
    return schedule.last


def _linear(progress: float, schedule: Schedule) -> float:
    return schedule.first + (schedule.last - schedule.first) * progress


def _smooth(progress: float, schedule: Schedule) -> float:
    """Slow at first, straight after, value and slope continuous, as the eps ramps of certified training are.

    A multiple of ``t^4`` until a quarter of the way, then its tangent there, scaled to reach 1 at the end. So the slope is 0
    at the start, which a linear ramp's is not. (The shape of auto_LiRPA's "SmoothedScheduler", from its documentation; Xu et
    al. 2020, arXiv:2002.12920.)
    """
    bend = 0.25
    slope = 4 * bend**3  # of t^4 at the bend
    scale = 1 / (bend**4 + slope * (1 - bend))
    shaped = scale * (progress**4 if progress < bend else bend**4 + slope * (progress - bend))
    return schedule.first + (schedule.last - schedule.first) * shaped


def _step(progress: float, schedule: Schedule) -> float:
    """``first`` until one n-th of the way, then a jump at each n-th, the last one, to ``last``, at the end."""
    done = math.floor(progress * schedule.steps + 1e-9)  # at 0.6 of 0.4 to 0.8, rounding must not delay the jump
    return schedule.first * (schedule.last / schedule.first) ** (done / schedule.steps)


def _cosine(progress: float, schedule: Schedule) -> float:
    """Half a cosine: slow at both ends, fastest in the middle."""
    return schedule.last + (schedule.first - schedule.last) * (1 + math.cos(math.pi * progress)) / 2


SHAPES: dict[str, Callable[[float, Schedule], float]] = {
    "constant": _constant,
    "linear": _linear,
    "smooth": _smooth,
    "step": _step,
    "cosine": _cosine,
}

CONSTANT = Schedule()
