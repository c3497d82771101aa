"""An exponential moving average of the centre: what noisy steps have in common."""

from typing import Any

from torch import Tensor


class CentreAverage:
    """Weighs the centre after g generations by ``decay^(G - g)``; the weights are made to sum to 1, so that no start counts.

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
