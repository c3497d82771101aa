"""One table: what the bounds know of each activation. A new activation is one entry here and one in ``supported.MODULES``.

A relaxation of an activation f over ``lower <= x <= upper`` is two lines with

    lower_slope * x + lower_intercept  <=  f(x)  <=  upper_slope * x + upper_intercept.

That of a ReLU is DeepPoly's (Singh et al. 2019, POPL, figure 4), which is CROWN's with the adaptive lower slope (Zhang et al.
2018, arXiv:1811.00866, section 3.2): above, the chord; below, slope 1 where u > -l and 0 elsewhere, or another ``slope`` rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# How the free slope of a lower line is chosen: 1 iff u > -l (DeepPoly), always 0 or 1, or that of the upper line. Under "same"
# the two lines of every activation are parallel: Fast-Lin (Weng et al. 2018, arXiv:1804.09699) and the zonotopes of DeepZ
# (Singh et al. 2018, NeurIPS).
SLOPES = ("adaptive", "zero", "one", "same")


class Lines(NamedTuple):
    """A relaxation, each ``[1 or P, B, *shape]`` (or ``[1 or P, B, Q, *shape]``, for each row its own)."""

    lower_slope: Tensor
    upper_slope: Tensor
    lower_intercept: Tensor
    upper_intercept: Tensor


@dataclass(frozen=True)
class ElementwiseActivation:
    """An activation that is monotone and never falls, so that an interval's image is the interval of its ends' images.

    Attributes:
        function: the activation itself, ``function(x, *arguments)``, any shape.
        relax: (lower, upper, slope rule, *arguments) -> ``Lines``; lower <= upper, any shape.
        in_place: the function, free to overwrite x; the default is ``function``.
        decided: (lower, upper, *arguments) -> where no tighter bounds of x would change the relaxation; None: nowhere.
        least_slope: (*arguments) -> where the interval crosses zero, any line through the origin with a slope from this to 1
            is a lower one; None: there is no such freedom.
        piecewise: whether it is two lines that meet at zero, of slope 1 on the right and ``least_slope`` on the left.
    """

    function: Callable[..., Tensor]
    relax: Callable[..., Lines]
    in_place: Callable[..., Tensor] | None = None
    decided: Callable[..., Tensor] | None = None
    least_slope: Callable[..., float] | None = None
    piecewise: bool = False

    def overwrite(self, x: Tensor, *arguments: float) -> Tensor:
        return (self.in_place or self.function)(x, *arguments)


def _aligned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same on memory in ``[P, B, ...]`` order, where each member's block is a multiple of ``tiles.LANES`` numbers.

    torch rounds these functions otherwise in the numbers that are left over at the end of a block, so a member's bits would
    depend on its place among the others.
    """
    return lambda x: function(x.contiguous())


def _ratio(numerator: Tensor, denominator: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
    """``numerator / denominator`` where it is asked for; elsewhere nothing is divided, so that no gradient is NaN."""
    return torch.where(where, numerator / torch.where(where, denominator, 1.0), otherwise)


def _relu(lower: Tensor, upper: Tensor, slope: str) -> Lines:
    """Above, the chord where the interval crosses zero. With u+ and l- the ends cut at zero, its slope is u+ / (u+ + l-)."""
    over, under = upper.clamp(min=0), lower.neg().clamp(min=0)
    # The smallest number stands for 0 / 0, at an interval that is zero alone, and is lost in any other sum.
    above = over / (over + under).clamp(min=torch.finfo(lower.dtype).tiny)
    below = above if slope == "same" else _WHERE_ONE[slope](over, under).to(lower.dtype)
    return Lines(below, above, lower.new_zeros(()).expand_as(lower), above * under)


# Where the lower line of a ReLU has slope 1, from u+ and l-.
_WHERE_ONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adaptive": lambda over, under: over > under,
    "zero": lambda over, under: under == 0,
    "one": lambda over, under: over > 0,
}


def _leaky_relu(lower: Tensor, upper: Tensor, slope: str, negative_slope: float) -> Lines:
    """``a x + (1 - a) relu(x)``, and so are its lines."""
    of_relu = _relu(lower, upper, slope)
    below, above = (negative_slope + (1 - negative_slope) * each for each in (of_relu.lower_slope, of_relu.upper_slope))
    return Lines(below, above, of_relu.lower_intercept, (1 - negative_slope) * of_relu.upper_intercept)


def _hardtanh(lower: Tensor, upper: Tensor, slope: str, low: float, high: float) -> Lines:
    """Convex up to ``high``, concave from ``low`` on: a chord on one side, a line of slope 0 or 1 on the other.

    Where the interval reaches beyond both ends, each side takes the line through the far end and the near corner, or, if that
    encloses less, the constant; ``slope`` "zero" and "one" choose between the two. "same": see ``_parallel_hardtanh``.
    """
    if slope == "same":
        return _parallel_hardtanh(lower, upper, low, high)
    at_lower, at_upper = lower.clamp(low, high), upper.clamp(low, high)
    flat = (upper <= low) | (lower >= high)
    linear = (lower >= low) & (upper <= high)
    wide = ~flat & ~linear
    # Above: from (l, f(l)) to the corner (high, high) where u goes beyond it, else the chord; below likewise from (u, f(u)).
    top, bottom = torch.minimum(upper, torch.full_like(upper, high)), torch.maximum(lower, torch.full_like(lower, low))
    stable = linear.to(lower.dtype)
    above = _ratio(top.clamp(max=high) - at_lower, top - lower, wide & (top > lower), stable)
    below = _ratio(at_upper - bottom, upper - bottom, wide & (upper > bottom), stable)
    # The constant is an alternative where the function is flat at that end.
    if slope == "zero":
        constant_above, constant_below = wide & (upper >= high), wide & (lower <= low)
    elif slope == "one":
        constant_above = constant_below = torch.zeros_like(wide)
    else:
        constant_above = wide & (upper >= high) & (upper - high > high - lower)
        constant_below = wide & (lower <= low) & (low - lower > upper - low)
    above, below = torch.where(constant_above, 0.0, above), torch.where(constant_below, 0.0, below)
    through_above = torch.where(constant_above | flat, at_upper, at_lower - above * lower)
    through_below = torch.where(constant_below | flat, at_lower, at_upper - below * upper)
    zero = torch.zeros_like(lower)
    return Lines(below, above, torch.where(linear, zero, through_below), torch.where(linear, zero, through_above))


def _parallel_hardtanh(lower: Tensor, upper: Tensor, low: float, high: float) -> Lines:
    """Both lines with the chord's slope, through those of the ends and corners that are farthest below and above the chord."""
    at_lower, at_upper = lower.clamp(low, high), upper.clamp(low, high)
    linear = (lower >= low) & (upper <= high)
    wide = ~linear & (upper > low) & (lower < high)  # elsewhere it is a line: the chord of two equal ends is none
    chord = _ratio(at_upper - at_lower, upper - lower, wide, linear.to(lower.dtype))
    # The difference from a line is least and greatest at ends or at corners between them; corners beyond are moved to the ends.
    corners = [torch.minimum(torch.maximum(torch.full_like(lower, at), lower), upper) for at in (low, high)]
    apart = torch.stack([x.clamp(low, high) - chord * x for x in (lower, *corners, upper)])
    return Lines(chord, chord, apart.amin(0), apart.amax(0))


def _s_shaped(function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Callable[..., Lines]:
    """Sigmoid and tanh as in DeepPoly (Singh et al. 2019, section 4.3): steepest safe lines through the interval's ends.

    Below, through (l, f(l)) with the chord's slope where the function is concave on the interval, else with the smaller of
    the derivatives at its ends; above, through (u, f(u)) likewise. The ``slope`` rule has no say but for "same": then both have
    the smaller derivative (DeepZ: Singh et al. 2018, theorem 3.2).
    """

    def relax(lower: Tensor, upper: Tensor, slope: str) -> Lines:
        at_lower, at_upper = function(lower.contiguous()), function(upper.contiguous())
        flattest = torch.minimum(derivative(at_lower), derivative(at_upper))
        if slope == "same":
            return Lines(flattest, flattest, at_lower - flattest * lower, at_upper - flattest * upper)
        chord = _ratio(at_upper - at_lower, upper - lower, upper > lower, flattest)
        # Rounding of a tiny interval must not make the chord steeper or flatter than the function anywhere is.
        chord = torch.maximum(chord, flattest)
        below, above = torch.where(lower > 0, chord, flattest), torch.where(upper <= 0, chord, flattest)
        return Lines(below, above, at_lower - below * lower, at_upper - above * upper)

    return relax


def _relu_decided(lower: Tensor, upper: Tensor, *arguments: float) -> Tensor:
    return (lower >= 0) | (upper <= 0)


def _hardtanh_decided(lower: Tensor, upper: Tensor, low: float, high: float) -> Tensor:
    return (upper <= low) | (lower >= high) | ((lower >= low) & (upper <= high))


ACTIVATIONS: dict[str, ElementwiseActivation] = {
    "relu": ElementwiseActivation(F.relu, _relu, F.relu_, _relu_decided, lambda: 0.0, piecewise=True),
    # argument: negative slope in [0, 1], checked when it is read
    "leaky_relu": ElementwiseActivation(
        F.leaky_relu, _leaky_relu, None, _relu_decided, lambda slope: slope, piecewise=True
    ),
    # arguments: lower and upper end
    "hardtanh": ElementwiseActivation(F.hardtanh, _hardtanh, decided=_hardtanh_decided),
    "sigmoid": ElementwiseActivation(_aligned(torch.sigmoid), _s_shaped(torch.sigmoid, lambda y: y * (1 - y))),
    "tanh": ElementwiseActivation(_aligned(torch.tanh), _s_shaped(torch.tanh, lambda y: 1 - y * y)),
}
