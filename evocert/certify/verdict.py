"""What is found of an example, and until when it is looked for."""

import time
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from evocert.evaluation import ROUNDING

Verdict = Literal["misclassified", "certified", "attacked", "undecided"]

__all__ = ["ROUNDING", "Deadline", "Outcome", "Verdict"]


@dataclass(frozen=True)
class Outcome:
    """What a method says of an example.

    Attributes:
        verdict: of a method that proves or refutes; "undecided" where it does neither.
        point: with "attacked", the input ``[C, H, W]`` that is to be replayed.
    """

    verdict: Verdict
    point: Tensor | None = None


class Deadline:
    """So many seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def within(self, seconds: float) -> "Deadline":
        """The same, or so many seconds from now on if that is earlier."""
        return Deadline(min(seconds, self.left))

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0.0
