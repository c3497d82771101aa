"""Which centre a run hands over: the average of many, the best by validation, and when no better one is to be expected."""

from typing import Any

from torch import Tensor


class CentreAverage:
    """An exponential moving average of the centre: what noisy steps have in common.

    Weighs the centre that generation g of G reports by ``decay^(G - g)``; the weights are made to sum to 1.

    Polyak and Juditsky 1992; the correction of the start as in Adam, arXiv:1412.6980, section 3.

    Args:
        decay: 0 or more, less than 1; with 0 it is the last centre.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, centre: Tensor) -> None:
        """Another generation's centre ``[D]``."""
        kept = 0.0 if self._sum is None else self._decay * self._sum
        self._sum = kept + (1 - self._decay) * centre
        self._weight = self._decay * self._weight + 1 - self._decay

    @property
    def value(self) -> Tensor:
        """``[D]``."""
        assert self._sum is not None, "an average of one centre or more"
        return self._sum / self._weight

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {"sum": None if self._sum is None else self._sum.cpu(), "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """What ``state_dict`` gave, on the device of ``like``."""
        self._sum = None if state["sum"] is None else state["sum"].to(like)
        self._weight = state["weight"]


class Selection:
    """The best centre by its certified accuracy on the validation part.

    Args:
        patience: how many validations in a row may be no better than the best; 0: any number.

    Attributes:
        best: the validation of the best centre; of equal ones the later, which has come further.
        worse: how many validations there were since one was better than all before.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.best: dict[str, Any] | None = None
        self.worse = 0

    def consider(self, validated: dict[str, Any], *, settled: bool) -> None:
        """Another validation, with "certified" in it. ``settled``: eps has come to its end; before, none counts as worse."""
        certified = validated["certified"]
        better = self.best is None or certified > self.best["certified"]
        if self.best is None or certified >= self.best["certified"]:
            self.best = validated
        self.worse = 0 if better or not settled else self.worse + 1

    @property
    def exhausted(self) -> bool:
        """Whether patience has come to an end."""
        return 0 < self._patience <= self.worse
