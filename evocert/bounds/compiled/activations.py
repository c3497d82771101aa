"""Relaxed activations: the relaxation over intervals, and rows that pass it."""

import numpy as np
import torch
from torch import Tensor

from evocert.bounds.compiled.loops import Parts, array, compiled
from evocert.bounds.relaxation import SLOPES


def piecewise(
    lower: Tensor, upper: Tensor, before: Tensor, slope: str, least: float
) -> tuple[tuple[Tensor, Tensor], Parts]:
    """A ReLU, or a leaky one, over intervals: the image, and the relaxation as ``RelaxedActivation`` keeps it.

    Args:
        lower, upper: ends before it, of one shape.
        before: the reference values before it, that broadcast to them; those after it are the image's centre.
        slope: of ``SLOPES``.
        least: the activation's slope left of zero.

    Returns:
        Centre and radius after it, and the relaxation's parts, all of the ends' shape and memory order.
    """
    if not _dense(lower):
        lower = lower.contiguous()
    new = [torch.empty_like(lower) for _ in range(6)]
    given = (lower, *(_ordered(each.expand_as(lower), lower) for each in (upper, before)))
    arrays = [each.detach().as_strided((each.numel(),), (1,)).numpy() for each in (*given, *new)]
    dtype = arrays[0].dtype.type
    _piecewise(*arrays, SLOPES.index(slope), dtype(least), dtype(0.5), dtype(1), np.finfo(dtype).tiny)
    return (new[0], new[1]), (new[2], new[3], new[4], new[5])


def _dense(tensor: Tensor) -> bool:
    """Whether it fills one piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _ordered(tensor: Tensor, like: Tensor) -> Tensor:
    """The same in another's memory order."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


@compiled
def _piecewise(  # type: ignore[no-untyped-def]
    lower, upper, before, centre, radius, mean, half, offset, spread, rule, least, middle, one, tiny
):
    """All ``[N]`` but ``rule``, the number of the slope rule, and numbers of the same dtype: ``middle`` is 1/2.

    See ``relaxation._relu`` and ``_leaky_relu``.
    """
    zero = one - one
    rest = one - least
    for n in range(len(lower)):
        low, high, at = lower[n], upper[n], before[n]
        # NaN is not <= 0, and so stays.
        over, under = zero if high <= zero else high, zero if -low <= zero else -low
        width = over + under
        chord = over / (tiny if width <= tiny else width)
        if rule == 0:
            below = one if over > under else zero
        elif rule == 1:
            below = one if under == zero else zero
        elif rule == 2:
            below = one if over > zero else zero
        else:
            below = chord
        above, below, intercept = least + rest * chord, least + rest * below, middle * rest * chord * under
        first = (least * low if least > zero else zero) if low <= zero else low  # -inf times 0 is none of a ReLU's
        last = (least * high if least > zero else zero) if high <= zero else high
        after = first + middle * (last - first)
        centre[n], radius[n] = after, last - after
        mean[n], half[n] = middle * (above + below), middle * (above - below)
        offset[n] = intercept + mean[n] * at - after
        spread[n] = intercept + half[n] * at


def passed(terms: Tensor, constant: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """Rows passed by a relaxation: coefficients ``A m - |A| h``, constants ``c + <A, o> - <|A|, s>``.

    Args:
        terms: A, ``[1 or P, I, L, Q, *cell]``.
        constant: c, ``[1 or P, 1 or I, 1 or L, Q]``.
        parts: m, h, o and s as the rows see them, each ``[1 or P, I, L, 1 or Q, *cell]``.
    """
    members = max(len(terms), len(constant), len(parts[0]))
    new = terms.new_empty(members, *terms.shape[1:])
    found = constant.expand(new.shape[:4]).clone(memory_format=torch.contiguous_format)
    seen = (array(each.flatten(4).flatten(1, 2)) for each in (terms, *parts))
    _passed(*seen, array(new.flatten(4).flatten(1, 2)), array(found.flatten(1, 2)))
    return new, found


@compiled
def _passed(terms, mean, half, offset, spread, new, constant):  # type: ignore[no-untyped-def]
    """Terms ``[1 or P, G, Q, N]``, the four ``[1 or P, G, 1 or Q, N]``, new ``[P, G, Q, N]``, constants ``[P, G, Q]``."""
    for p in range(new.shape[0]):
        member = p % mean.shape[0]
        for g in range(new.shape[1]):
            for q in range(new.shape[2]):
                own = q % mean.shape[2]
                a, b = terms[p % terms.shape[0], g, q], new[p, g, q]
                m, h = mean[member, g, own], half[member, g, own]
                o, s = offset[member, g, own], spread[member, g, own]
                total = constant[p, g, q]
                for n in range(len(a)):
                    value, magnitude = a[n], abs(a[n])
                    total += value * o[n] - magnitude * s[n]
                    b[n] = value * m[n] - magnitude * h[n]
                constant[p, g, q] = total
