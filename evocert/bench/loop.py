"""What a user would otherwise do: one network after another, coefficients on whole maps, torch's own layers.

Written to be read. Back-substitution carries the coefficients ``[B, N, C, H, W]`` of N neurons through every layer: a
convolution by ``conv_transpose2d``, a linear layer by its matrix (Zhang et al. 2018, arXiv:1811.00866, theorem 3.2; the
slopes are those of Singh et al. 2019, POPL).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evocert.bounds import box_around
from evocert.modules import Normalize

CHUNK = 2**22  # coefficients of the neurons that are worked on at once


@dataclass(frozen=True)
class Plain:
    """Of what the interval is back-substituted, and how lower slopes are chosen; see ``evocert.bounds.deeppoly``."""

    neurons: bool = True
    margins: bool = True
    slope: str = "adaptive"
    sparse: bool = False
    intersect: bool = False


PLAIN = {  # the bounds that the loop knows
    "ibp": Plain(neurons=False, margins=False),
    "crown-ibp": Plain(neurons=False),
    "deeppoly": Plain(),
    "deeppoly-sparse": Plain(sparse=True),
    "deeppoly-intersect": Plain(intersect=True),
    "crown-zero": Plain(slope="zero"),
    "crown-one": Plain(slope="one"),
    "crown-same-slope": Plain(slope="same"),
    "deepz": Plain(slope="same"),
}


def knows(module: nn.Sequential, bound: str) -> bool:
    """Whether the loop has this bound for all layers of a module."""
    normalize, *layers = module
    chain = all(isinstance(layer, nn.Conv2d | nn.Linear | nn.ReLU | nn.Flatten) for layer in layers)
    return bound in PLAIN and isinstance(normalize, Normalize) and chain and isinstance(layers[-1], nn.Linear)


@torch.no_grad()
def margins(module: nn.Sequential, images: Tensor, labels: Tensor, eps: float, plain: Plain) -> Tensor:
    """Lower bounds of the margins of one network ``[B, M]``, rivals in rising order."""
    normalize, *layers = module
    box = box_around(images, eps)
    ends = normalize(box.lower), normalize(box.upper)
    last = layers.pop()
    assert isinstance(last, nn.Linear)
    past = _Past(*_middle(*ends))
    centre, radius = past.centre, past.radius
    for layer in layers:
        lines = None
        if isinstance(layer, nn.ReLU):
            lower, upper = centre - radius, centre + radius
            if plain.neurons and past.relaxed:  # those of the first layer are exact
                lower, upper = _substituted(past, lower, upper, plain)
            lines = _lines(lower, upper, plain.slope)
            centre, radius = _middle(lower.relu(), upper.relu())
            past.append(layer, lower.shape[1:], lines)
        else:
            past.append(layer, centre.shape[1:])
            centre, radius = layer(centre), _magnitude(layer, radius)
    units = torch.eye(last.out_features, device=images.device)
    rows = torch.stack([units[y] - units[torch.arange(len(units)) != y] for y in labels.tolist()])  # [B, M, K]
    weight, bias = rows @ last.weight, rows @ last.bias
    by_intervals = _over(weight, centre, radius) + bias
    if not plain.margins:
        return by_intervals
    found = past.least(weight) + bias
    return torch.maximum(found, by_intervals) if plain.intersect else found


class _Lines(NamedTuple):
    """Of a ReLU, each ``[B, 1, *shape]``: ``below * x <= relu(x) <= above * x + intercept``."""

    below: Tensor
    above: Tensor
    intercept: Tensor


def _lines(lower: Tensor, upper: Tensor, slope: str) -> _Lines:
    crossing = (lower < 0) & (upper > 0)
    active = (lower >= 0).float()
    above = torch.where(crossing, upper / (upper - lower), active)
    free = {"adaptive": (upper > -lower).float(), "zero": torch.zeros_like(above), "one": torch.ones_like(above)}
    below = torch.where(crossing, free.get(slope, above), active)
    return _Lines(*(each.unsqueeze(1) for each in (below, above, torch.where(crossing, -above * lower, 0.0))))


class _Past:
    """The layers up to somewhere, and what is known of them."""

    def __init__(self, centre: Tensor, radius: Tensor) -> None:
        self.centre, self.radius = centre, radius  # of the box
        self.layers: list[tuple[nn.Module, torch.Size, _Lines | None]] = []  # with what shape goes in
        self.relaxed = False

    def append(self, layer: nn.Module, shape: torch.Size, lines: _Lines | None = None) -> None:
        self.layers.append((layer, shape, lines))
        self.relaxed |= lines is not None

    def least(self, rows: Tensor) -> Tensor:
        """Linear functions of the last values, ``[1 or B, N, *shape]`` -> their lower bounds over the box ``[B, N]``."""
        constant = rows.new_zeros(1)
        for layer, shape, lines in reversed(self.layers):
            if lines is not None:
                positive, negative = rows.clamp(min=0), rows.clamp(max=0)
                constant = constant + (negative * lines.intercept).flatten(2).sum(2)
                rows = positive * lines.below + negative * lines.above
            elif isinstance(layer, nn.Linear):
                constant = constant + rows @ layer.bias
                rows = rows @ layer.weight
            elif isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                constant = constant + rows.sum((3, 4)) @ layer.bias
                rows = _transposed(layer, rows, shape)
            else:
                rows = rows.unflatten(2, shape)
        return constant + _over(rows, self.centre, self.radius)


def _substituted(past: _Past, lower: Tensor, upper: Tensor, plain: Plain) -> tuple[Tensor, Tensor]:
    """Intervals of all neurons by back-substitution, ``[B, *shape]``, put together with those of one layer as asked for."""
    shape = lower.shape[1:]
    units = torch.eye(prod(shape), device=lower.device)
    widest = max(prod(each) for _, each, _ in past.layers)
    ends = []
    for part in units.split(max(1, CHUNK // (2 * len(lower) * widest))):
        rows = part.reshape(1, -1, *shape)
        ends.append(past.least(torch.cat((rows, -rows), 1)).unflatten(1, (2, -1)))
    found = torch.cat(ends, 2)  # [B, 2, N]
    below, above = found[:, 0].reshape(lower.shape), -found[:, 1].reshape(lower.shape)
    if plain.intersect:
        below, above = torch.maximum(below, lower), torch.minimum(above, upper)
    keep = (lower >= 0) | (upper <= 0) if plain.sparse else torch.zeros_like(lower, dtype=torch.bool)
    return torch.where(keep, lower, below), torch.where(keep, upper, above)


def _transposed(layer: nn.Conv2d, rows: Tensor, shape: Sequence[int]) -> Tensor:
    padding = (int(layer.padding[0]), int(layer.padding[1]))
    rest = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)  # what no kernel reaches
        for size, out, s, p, d, k in zip(
            shape[1:], rows.shape[3:], layer.stride, padding, layer.dilation, layer.kernel_size, strict=True
        )
    ]
    flat = F.conv_transpose2d(
        rows.flatten(0, 1), layer.weight, None, layer.stride, padding, rest, layer.groups, layer.dilation
    )
    return flat.unflatten(0, rows.shape[:2])


def _magnitude(layer: nn.Module, radius: Tensor) -> Tensor:
    """``|W| r``."""
    if isinstance(layer, nn.Linear):
        return F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return layer(radius)


def _middle(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return (lower + upper) / 2, (upper - lower) / 2


def _over(rows: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The least values of ``rows [B, N, *shape]`` over boxes ``[B, *shape]``: ``[B, N]``."""
    rows, centre, radius = rows.flatten(2), centre.flatten(1).unsqueeze(2), radius.flatten(1).unsqueeze(2)
    return (rows @ centre - rows.abs() @ radius).squeeze(2)
