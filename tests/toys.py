"""Losses of the parameters alone, whose smoothed gradients are known, as problems that searchers can be put to."""

import math

import torch
from evotorch import Problem
from torch.distributions import Normal

NORMAL = Normal(0.0, 1.0)


class Toy(Problem):
    """A loss ``[P, D] -> [P]``, with what the searchers ask of ``CertifiedTraining``. ``start``: where they begin."""

    def __init__(self, loss, length, *, seed=0, dtype=torch.float64, start=None):
        self.loss, self.start = loss, start
        self.generation = self.nonfinite_evals = self.stalled_generations = 0
        super().__init__("min", solution_length=length, initial_bounds=(-1, 1), seed=seed, dtype=dtype)

    def _fill(self, values):
        super()._fill(values)
        if self.start is not None:
            values[:] = torch.as_tensor(self.start, dtype=values.dtype)

    def _evaluate_batch(self, batch):
        batch.set_evals(self.loss(batch.values.as_subclass(torch.Tensor)))

    def evaluate(self, x):
        super().evaluate(x)
        self.generation += 1

    def value_and_gradient(self, parameters, generation):
        assert generation == self.generation - 1, "the one that was just evaluated"
        leaf = parameters.detach().requires_grad_()
        losses = self.loss(leaf)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    def descend(self, parameters, objective, **options):
        assert objective == "certified"
        assert not options
        self.generation += 1
        return self.value_and_gradient(parameters, self.generation - 1)


def quadratic(x):
    """Its gradient is the point itself, less 1."""
    return ((x - 1) ** 2).sum(1) / 2


# The two losses of the figure of arXiv:2403.07095, each of one parameter.


def cliff(w):
    """1 left of 0, w right of it."""
    return torch.where(w < 0, torch.ones_like(w), w)


def smoothed_cliff_gradient(mu, sigma):
    """Of Phi(-m/s) + m Phi(m/s) + s phi(m/s)."""
    return smoothed_cliff_slope(mu, sigma) + smoothed_cliff_jump(mu, sigma)


def smoothed_cliff_slope(mu, sigma):
    """What the mean of the gradients is: the slope's part of it."""
    return float(NORMAL.cdf(torch.tensor(mu / sigma, dtype=torch.float64)))


def smoothed_cliff_jump(mu, sigma):
    """The jump's part: its height, -1, times the density of the noise there."""
    return -math.exp(-((mu / sigma) ** 2) / 2) / math.sqrt(2 * math.pi) / sigma


NEEDLE_SLOPES = (-2.0, 0.0, 2.0, -10.0, 10.0)
NEEDLE_KINKS = (-1.5, 0.0, 0.5, 1.0)


def needle(w):
    """Piecewise linear through (-2, 5), (-1.5, 4), (0, 4), (0.5, 5), (1, 0), (1.8, 8)."""
    value = 5 + NEEDLE_SLOPES[0] * (w + 2)
    for kink, before, after in zip(NEEDLE_KINKS, NEEDLE_SLOPES, NEEDLE_SLOPES[1:], strict=False):
        value = value + (after - before) * (w - kink).clamp(min=0)
    return value


def smoothed_needle_gradient(mu, sigma):
    slope = NEEDLE_SLOPES[0]
    for kink, before, after in zip(NEEDLE_KINKS, NEEDLE_SLOPES, NEEDLE_SLOPES[1:], strict=False):
        slope += (after - before) * float(NORMAL.cdf(torch.tensor((mu - kink) / sigma, dtype=torch.float64)))
    return slope
