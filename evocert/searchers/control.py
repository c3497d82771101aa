"""Gradients at a few points near the centre as a control variate of PGPE: the same expectation, less variance."""

import math
from typing import Any

import torch
from torch import Tensor

from evocert.problem import CertifiedTraining
from evocert.searchers.gaussian import drawn

MEMORY = 0.9  # of the regression, from one generation to the next
# A coefficient that was fitted where the gradient said little would let one that says much overthrow the centre.
LARGEST = 2.0


class ControlVariate:
    """What the gradient predicts of each fitness is taken out of the sampled estimate, and put back exactly.

    With ``a`` a vector that the population's noise does not depend on, and ``c`` a number likewise,

        E[delta d] = c sigma^2 a + E[delta (d - c a . delta)],   d = (L(mu + delta) - L(mu - delta)) / 2,

    so the estimate stays that of the smoothed loss's gradient, jumps of L included, whatever ``a`` and ``c`` are; its variance
    is that of what ``a`` does not predict (control variates: Glasserman 2003, Monte Carlo Methods in Financial Engineering,
    section 4.1). Here ``a`` is the mean gradient at points ``mu +- delta'`` with noise of their own, that is an estimate of
    randomised gradient smoothing: at the centre itself, neurons that are proved dead there hide what noise would wake. ``c``
    is the coefficient of the least-squares fit to the generations before, each counting ``MEMORY`` times the next, kept within
    0 and ``LARGEST``; 1 at first. Where the gradient predicts little, as of a loss that is all jumps, it saves nothing.

    Args:
        points: how many gradients, in antithetic pairs: even, 2 or more.
    """

    def __init__(self, points: int) -> None:
        self._pairs = points // 2
        self._gradient: Tensor | None = None  # [D], or none that is finite
        self._products = 0.0, 0.0  # of fitness and prediction, and of prediction and itself
        self._coefficient = 1.0

    def renew(self, problem: CertifiedTraining, mu: Tensor, sigma: Tensor) -> None:
        """Gradients for the population that was just evaluated, on the same minibatch; ``mu`` and ``sigma``: ``[D]``."""
        noise = drawn(self._pairs, sigma, mu, problem.generator)
        points = torch.cat((mu + noise, mu - noise))
        _, gradients = problem.value_and_gradient(points, problem.generation - 1)
        mean = gradients.mean(0)
        self._gradient = mean if bool(mean.isfinite().all()) else None

    def without(self, samples: Tensor, fitness: Tensor) -> Tensor:
        """The fitness ``[P]`` of ``samples [P, D]``, antithetic neighbours, less what the gradient predicts of it."""
        if self._gradient is None:
            return fitness
        dot, square = self._products
        self._coefficient = min(max(dot / square, 0.0), LARGEST) if square > 0 and math.isfinite(dot) else 1.0
        predicted = samples @ self._gradient
        differences = [(each[0::2] - each[1::2]) / 2 for each in (fitness, predicted)]
        products = float(differences[0] @ differences[1]), float(differences[1] @ differences[1])
        if all(math.isfinite(product) for product in products):
            self._products = MEMORY * dot + products[0], MEMORY * square + products[1]
        return fitness - self._coefficient * predicted

    def restored(self, ascent: Tensor, sigma: Tensor) -> Tensor:
        """An ascent direction ``[D]`` that was estimated from fitness ``without``, with the prediction's part put back."""
        return ascent if self._gradient is None else ascent - self._coefficient * sigma**2 * self._gradient

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        gradient = None if self._gradient is None else self._gradient.clone()
        return {"gradient": gradient, "products": list(self._products)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """What ``state_dict`` gave."""
        gradient = state["gradient"]
        self._gradient = None if gradient is None else gradient.to(device)
        self._products = state["products"][0], state["products"][1]
