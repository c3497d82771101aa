"""The two zonotope domains written for clarity: forward, every generator written out, one network and one image, float64.

DeepZ (Singh et al. 2018, NeurIPS) and the hybrid zonotope with zBox (Mirman et al. 2018, ICML). Nothing here is taken from
``evocert.bounds``, and nothing is substituted back.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evocert.modules import Normalize, Residual

AFFINE = (Normalize, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AvgPool2d, nn.ConstantPad2d, nn.Flatten)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass
class Zonotope:
    """All values ``centre + sum_g e_g generators[g] + beta * b`` with every e_g and every entry of b in [-1, 1]."""

    centre: Tensor  # [*shape]
    generators: Tensor  # [G, *shape]
    beta: Tensor  # [*shape]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        radius = self.generators.abs().sum(0) + self.beta
        return self.centre - radius, self.centre + radius

    def mapped(self, layer: nn.Module) -> "Zonotope":
        """Through an affine layer, which is asked what it does to each generator."""
        shape = self.centre.shape
        units = torch.eye(self.centre.numel(), dtype=torch.float64).reshape(-1, *shape)
        offset = layer(torch.zeros(1, *shape, dtype=torch.float64))
        magnitude = (layer(units) - offset).abs()
        return Zonotope(
            layer(self.centre.unsqueeze(0))[0],
            layer(self.generators) - offset,
            torch.tensordot(self.beta.flatten(), magnitude, dims=1),
        )


class Domain:
    """Follows a module from a box ``[C, H, W]`` on. How an activation is passed is what the domains differ in.

    Attributes:
        intervals: before each activation, in the order in which they run.
        closest: the distance from the next tie, where rounding decides what an activation becomes.
    """

    def __init__(self, module: nn.Module, lower: Tensor, upper: Tensor) -> None:
        self.intervals: list[tuple[Tensor, Tensor]] = []
        self.closest = math.inf
        self.last: tuple[nn.Linear, Zonotope] | None = None  # the last layer and what it is given, if it is linear
        lower, upper = lower.double(), upper.double()
        radius = ((upper - lower) / 2).flatten().diag().reshape(-1, *lower.shape)
        entered = Zonotope((lower + upper) / 2, radius, torch.zeros_like(lower))
        with torch.no_grad():
            self.logits = self.follow(module.double().eval(), entered)

    def follow(self, module: nn.Module, values: Zonotope) -> Zonotope:
        if isinstance(module, nn.Sequential):
            for child in module:
                values = self.follow(child, values)
            return values
        if isinstance(module, NOTHING):
            return values
        if isinstance(module, Residual):
            added = self.added(values, self.follow(module.body, values), self.follow(module.shortcut, values))
            self.last = None
            return added
        if isinstance(module, AFFINE):
            self.last = (module, values) if isinstance(module, nn.Linear) else None
            return values.mapped(module)
        self.last = None
        self.intervals.append(values.ends)
        return self.passed(module, values, *values.ends)

    def added(self, before: Zonotope, one: Zonotope, other: Zonotope) -> Zonotope:
        """Both branches have the generators that they started with, in the same places, and then some of their own."""
        shared = len(before.generators)
        both = one.generators[:shared] + other.generators[:shared]
        generators = torch.cat((both, one.generators[shared:], other.generators[shared:]))
        return Zonotope(one.centre + other.centre, generators, one.beta + other.beta)

    def passed(self, layer: nn.Module, values: Zonotope, lower: Tensor, upper: Tensor) -> Zonotope:
        raise NotImplementedError

    def margins(self, label: int) -> Tensor:
        """Lower bounds of logit[label] - logit[j], j rising: one more linear layer, or one in the place of the last."""
        classes = len(self.logits.centre)
        units = torch.eye(classes, dtype=torch.float64)
        rows = units[label] - units[[j for j in range(classes) if j != label]]
        if self.last is None:
            return self.logits.mapped(lambda x: x @ rows.T).ends[0]
        layer, before = self.last
        weight = rows @ layer.weight.detach()
        bias = 0.0 if layer.bias is None else rows @ layer.bias.detach()
        return before.mapped(lambda x: x @ weight.T + bias).ends[0]


class DeepZ(Domain):
    """Each activation becomes ``slope * x + middle + radius * e``, with an e of its own; beta stays zero."""

    def passed(self, layer: nn.Module, values: Zonotope, lower: Tensor, upper: Tensor) -> Zonotope:
        slope, below, above = parallel_lines(layer, lower, upper)
        own = ((above - below) / 2).flatten().diag().reshape(-1, *lower.shape)
        return Zonotope(
            slope * values.centre + (above + below) / 2, torch.cat((slope * values.generators, own)), values.beta
        )


def parallel_lines(layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slope of two lines that enclose an activation, and the intercepts of both."""
    width = (upper - lower).clamp(min=1e-300)
    if isinstance(layer, nn.Sigmoid | nn.Tanh):  # theorem 3.2
        steepness = (lambda x: layer(x) * layer(-x)) if isinstance(layer, nn.Sigmoid) else (lambda x: x.cosh() ** -2)
        slope = torch.minimum(steepness(lower), steepness(upper))
        return slope, layer(lower) - slope * lower, layer(upper) - slope * upper
    # Piecewise linear: the chord's slope; what is farthest from it is an end or a corner.
    corners = (layer.min_val, layer.max_val) if isinstance(layer, nn.Hardtanh) else (0.0,)
    slope = (layer(upper) - layer(lower)) / width
    points = [lower, upper, *(torch.full_like(lower, corner).clamp(lower, upper) for corner in corners)]
    apart = torch.stack([layer(x) - slope * x for x in points])
    return slope, apart.amin(0), apart.amax(0)


class Hybrid(Domain):
    """An activation that is a line on its interval is that line; of any other the interval's image is all that is kept."""

    def passed(self, layer: nn.Module, values: Zonotope, lower: Tensor, upper: Tensor) -> Zonotope:
        low, high = (layer(end.unsqueeze(0))[0] for end in (lower, upper))
        boxed = Zonotope((high + low) / 2, torch.zeros(len(values.generators), *low.shape).double(), (high - low) / 2)
        if isinstance(layer, nn.Sigmoid | nn.Tanh | nn.MaxPool2d):
            return boxed
        line, slope = self.line(layer, lower, upper)
        return Zonotope(
            torch.where(line, layer(values.centre), boxed.centre),
            torch.where(line, slope * values.generators, boxed.generators),
            torch.where(line, slope * values.beta, boxed.beta),
        )

    def line(self, layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Where no corner lies within the interval, and the slope there."""
        if isinstance(layer, nn.Hardtanh):
            corners, slopes = (layer.min_val, layer.max_val), (0.0, 1.0, 0.0)
        else:
            assert isinstance(layer, nn.ReLU | nn.LeakyReLU)
            corners, slopes = (0.0,), (getattr(layer, "negative_slope", 0.0), 1.0)
        line, slope = torch.zeros_like(lower, dtype=torch.bool), torch.zeros_like(lower)
        for left, right, own in zip((-math.inf, *corners), (*corners, math.inf), slopes, strict=True):
            here = (lower >= left) & (upper <= right)
            line, slope = line | here, torch.where(here, own, slope)
        for corner in corners:
            distance = torch.minimum((lower - corner).abs(), (upper - corner).abs())
            wide = distance[upper - lower > 1e-9]  # a generator that short may come or go
            self.closest = min(self.closest, wide.min().item() if len(wide) else math.inf)
        return line, slope
