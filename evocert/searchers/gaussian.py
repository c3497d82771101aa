"""EvoTorch's search distributions at a fixed sigma, sampled and differentiated without needless work.

EvoTorch 0.6.1 samples into every second row of the population, which torch fills slowly, and computes the gradient with
respect to sigma even when sigma's learning rate is 0. The samples here are drawn into contiguous memory, and the gradient
with respect to the centre is one product of the weights with the population: the same estimator, to rounding.
"""

from typing import Any

import torch
from evotorch.distributions import SeparableGaussian, SymmetricSeparableGaussian
from torch import Tensor


def _generator_of(source: Any) -> torch.Generator | None:
    """EvoTorch hands over a generator, a problem that has one, or nothing."""
    return getattr(source, "generator", source)


def drawn(count: int, sigma: Tensor, centre: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise ``[count, D]`` of standard deviation ``sigma`` (``[D]`` or ``[1]``), as the centre ``[D]`` in dtype and device."""
    noise = torch.empty(count, len(centre), dtype=centre.dtype, device=centre.device)
    return noise.normal_(generator=generator).mul_(sigma)


class FixedGaussian(SeparableGaussian):
    """Independent samples ``mu + sigma * noise``."""

    def _fill(self, out: Tensor, *, generator: Any = None) -> None:
        out.normal_(generator=_generator_of(generator)).mul_(self.sigma).add_(self.mu)

    def _compute_gradients(self, samples: Tensor, weights: Tensor, ranking_used: str | None) -> dict[str, Tensor]:
        """``(1 / P) sum_i w_i (x_i - mu)`` with the weights centred, as EvoTorch's; sigma stays."""
        weights = weights - weights.mean() if ranking_used not in ("centered", "normalized") else weights
        gradient = (weights @ samples - weights.sum() * self.mu) / len(weights)
        return {"mu": gradient, "sigma": torch.zeros_like(self.sigma)}


class FixedSymmetricGaussian(SymmetricSeparableGaussian):
    """Antithetic pairs ``mu + sigma * noise``, ``mu - sigma * noise`` in neighbouring rows."""

    def _fill(self, out: Tensor, *, generator: Any = None) -> None:
        noise = drawn(len(out) // 2, self.sigma, self.mu, _generator_of(generator))
        torch.add(self.mu, noise, out=out[0::2])
        torch.sub(self.mu, noise, out=out[1::2])

    def _compute_gradients(self, samples: Tensor, weights: Tensor, ranking_used: str | None) -> dict[str, Tensor]:
        """``(1 / n) sum_i (w+_i - w-_i) / 2 * delta_i`` over n = P / 2 pairs, as EvoTorch's; sigma stays.

        Half the difference of a pair's two rows is its delta, so the sum is one product with weights of alternating sign:
        the centre cancels within each pair, and no copy of the population is made.
        """
        half = (weights[0::2] - weights[1::2]) / 4
        gradient = torch.stack((half, -half), 1).flatten() @ samples / len(half)
        return {"mu": gradient, "sigma": torch.zeros_like(self.sigma)}
