"""Loops over coefficients compiled for one CPU core by Numba: in one pass over memory what torch does in many operations.

Back-substitution of a small network is bound by passes over coefficients that a core's second-level cache no longer holds, more
than by products. What each function here computes its callers can also have of torch's operations, which they use for
gradients and on GPUs; the two agree but for rounding. The loops hold no lock of the interpreter, so the threads of several
tiles do not wait for each other; and they take every member and image alone, in an order that depends on shapes only, so
bits do not depend on what else is in a call.

A function is compiled when it is first called for a dtype, which takes a second or two, and then kept beside this file, or in
the user's cache where that cannot be written.

In the loops arrays of P members are read at ``p % len``: what all members share has one entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from evocert.bounds.relaxation import SLOPES

# Sums in any order, and products and sums rounded together; but nothing that would let NaN or infinity pass for a number.
FASTMATH = {"contract", "reassoc", "nsz"}
DTYPES = (torch.float32, torch.float64)

# Of the relaxation of an activation: mean and half difference of its two lines' slopes, and of their offsets.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compile_it = partial(numba.njit, nogil=True, fastmath=FASTMATH, error_model="numpy")
    try:
        return compile_it(cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        return compile_it()(function)


def usable(*tensors: Tensor) -> bool:
    """Whether these functions may take tensors: on a CPU, where no gradient is recorded."""
    return not torch.is_grad_enabled() and all(t.device.type == "cpu" and t.dtype in DTYPES for t in tensors)


def load(dtype: torch.dtype) -> None:
    """Compiles everything for a dtype, or reads it from where it is kept: not needed, but then done, once a process.

    It takes half a second and some 60 MiB, most of them Numba itself; compiling takes four seconds.
    """
    with torch.no_grad():
        map_, row, one = torch.zeros(1, 1, 1, 2, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 2, dtype=dtype), (1, 1)
        parts = (map_[:, :, :, :1],) * 4
        piecewise(row, row, row, SLOPES[0], 0.0)
        passed(map_, row, parts)
        magnitude_product(map_, parts[0])
        pair_products(map_, parts[0])
        share_of_nonzero(map_)
        through_convolution(map_, row, map_[0, 0, :, :1], one, (0, 0), one, parts, parts)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory if that is in order, else a copy."""
    return tensor.detach().contiguous().numpy()


# Activations


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


@_compiled
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
    seen = (_array(each.flatten(4).flatten(1, 2)) for each in (terms, *parts))
    _passed(*seen, _array(new.flatten(4).flatten(1, 2)), _array(found.flatten(1, 2)))
    return new, found


@_compiled
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


# The box


def magnitude_product(terms: Tensor, radius: Tensor) -> Tensor:
    """``<|A|, r>``: ``[P, I, L, Q, *cell]``, ``[1 or P, I, L, 1, *cell]`` -> ``[P, I, L, Q]``."""
    found = terms.new_zeros(terms.shape[:4])
    arrays = (each.flatten(4).flatten(1, 2) for each in (terms, radius))
    _magnitude_product(*map(_array, arrays), _array(found.flatten(1, 2)))
    return found


@_compiled
def _magnitude_product(terms, radius, found):  # type: ignore[no-untyped-def]
    """Terms ``[P, G, Q, N]``, radius ``[1 or P, G, 1, N]``, found ``[P, G, Q]``, zero."""
    for p in range(terms.shape[0]):
        for g in range(terms.shape[1]):
            row = radius[p % radius.shape[0], g, 0]
            for q in range(terms.shape[2]):
                each = terms[p, g, q]
                total = found[p, g, q]
                for n in range(len(each)):
                    total += abs(each[n]) * row[n]
                found[p, g, q] = total


def pair_products(terms: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """``<|s - d|, r>`` and ``<|s + d|, r>`` of rows of the form PAIR: ``[P, I, L, 2 * Q, *cell]`` -> each ``[P, I, L, Q]``."""
    shape = (*terms.shape[:3], terms.shape[3] // 2)
    less, more = terms.new_zeros(shape), terms.new_zeros(shape)
    arrays = (each.flatten(4).flatten(1, 2) for each in (terms, radius))
    _pair_products(*map(_array, arrays), _array(less.flatten(1, 2)), _array(more.flatten(1, 2)))
    return less, more


@_compiled
def _pair_products(terms, radius, less, more):  # type: ignore[no-untyped-def]
    """Terms ``[P, G, 2 * Q, N]``, radius ``[1 or P, G, 1, N]``, less and more ``[P, G, Q]``, zero."""
    rows = less.shape[2]
    for p in range(terms.shape[0]):
        for g in range(terms.shape[1]):
            row = radius[p % radius.shape[0], g, 0]
            for q in range(rows):
                s, d = terms[p, g, q], terms[p, g, rows + q]
                a, b = less[p, g, q], more[p, g, q]
                for n in range(len(s)):
                    a += abs(s[n] - d[n]) * row[n]
                    b += abs(s[n] + d[n]) * row[n]
                less[p, g, q], more[p, g, q] = a, b


# Convolutions


def share_of_nonzero(terms: Tensor) -> float:
    """Of the first row of each image and position, ``[P, I, L, Q, *cell]``."""
    flat = terms.flatten(4).flatten(1, 2)
    return int(_nonzero(flat.detach().numpy())) * flat.shape[2] / max(1, flat.numel())


@_compiled
def _nonzero(terms):  # type: ignore[no-untyped-def]
    """Terms ``[P, G, Q, N]``."""
    count = 0
    for p in range(terms.shape[0]):
        for g in range(terms.shape[1]):
            row = terms[p, g, 0]
            for n in range(len(row)):
                count += row[n] != 0  # NaN is not zero
    return count


# Rows and neurons that one loop takes together: each number of a kernel that is loaded serves so many rows, and each number of
# the result is loaded and stored once for so many neurons. ``_add_products`` is written out for these.
ROWS, NEURONS = 3, 4


def through_convolution(
    terms: Tensor,
    constant: Tensor,
    kernels: Tensor,
    stride: tuple[int, int],
    before: tuple[int, int],
    size: tuple[int, int],
    above: Parts | None,
    below: Parts | None,
) -> tuple[Tensor, Tensor]:
    """Rows passed by a relaxation, a convolution and a relaxation, image by image: in between they stay in the cache.

    Neurons of the convolution that have no coefficients cost nothing. The relaxation above leaves none of those that are off
    all over the box: about three in four of a network that was trained for its bounds.

    Args:
        terms: coefficients on what the first relaxation gives, ``[1 or P, I, L, Q, H, W, C]``.
        constant: ``[1 or P, 1 or I, 1 or L, Q]``; without a relaxation it is given back as it is, and any I and L will do.
        kernels: of the convolution, ``[P, C, k, k, C']``.
        stride, before: of the convolution; ``before`` is its padding at the top and at the left.
        size: (H', W') of its input.
        above: the first relaxation, each part ``[1 or P, I, L, 1, H, W, C]``; None: there is none.
        below: the other, each part ``[1 or P, I, L, 1, H', W', C']``; None: there is none.

    Returns:
        Coefficients ``[P, I, L, Q, H', W', C']`` and constants.
    """
    shape = (len(kernels), *terms.shape[1:4])
    new = terms.new_empty(*shape, *size, kernels.shape[4])
    relaxed = above is not None or below is not None
    found = (constant.expand(shape) if relaxed else terms.new_empty(shape)).clone(memory_format=torch.contiguous_format)
    nothing = (terms.new_empty(1, 0, 1, 1, 1, 1, 1),) * 4
    _through_convolution(
        _array(terms.flatten(1, 2)),
        _array(found.flatten(1, 2)),
        _array(kernels.flatten(3)),
        *(_array(each.flatten(1, 3)) for each in above or nothing),
        *(_array(each.flatten(4).flatten(1, 3)) for each in below or nothing),
        stride,
        before,
        kernels.shape[4],
        _array(new.flatten(5).flatten(1, 2)),
    )
    return new, found if relaxed else constant


@_compiled
def _through_convolution(  # type: ignore[no-untyped-def]
    terms, constant, kernels, mean, half, offset, spread, mean_below, half_below, offset_below, spread_below,
    stride, before, channels, new,
):  # fmt: skip
    """Terms ``[1 or P, G, Q, H, W, C]``, constants ``[P, G, Q]``, kernels ``[P, C, k, k * C']``, new ``[P, G, Q, H', W' C']``.

    The relaxations' parts are ``[1 or P, G, H, W, C]`` above and ``[1 or P, G, N]`` below, or have no G. A position's neurons
    are taken together: what they give to the window of the map that they see is summed up apart, in loops over the whole
    window, and then added into the map.
    """
    members, groups, rows = new.shape[:3]
    height, line = new.shape[3:]
    neurons, taps, strip = kernels.shape[1:]
    relaxed_above, relaxed_below = mean.shape[1] > 0, mean_below.shape[1] > 0
    weights, which = np.empty(neurons, terms.dtype), np.empty(neurons, np.int64)
    # Rows and neurons that are missing in the last of those taken together count as zeros.
    values = np.zeros((-(-rows // ROWS) * ROWS, -(-neurons // NEURONS) * NEURONS), terms.dtype)
    sums = np.empty((ROWS, taps * strip), terms.dtype)
    for p in range(members):
        matrix = kernels[p].reshape(neurons, taps * strip)
        own, own_above, own_below = p % terms.shape[0], p % mean.shape[0], p % mean_below.shape[0]
        for g in range(groups):
            new[p, g] = 0
            for y in range(terms.shape[3]):
                top = y * stride[0] - before[0]
                first_tap, last_tap = max(0, -top), min(taps, height - top)
                for x in range(terms.shape[4]):
                    at = terms[own, g, :, y, x]  # [Q, C]
                    if relaxed_above:
                        m, h = mean[own_above, g, y, x], half[own_above, g, y, x]
                        o, s = offset[own_above, g, y, x], spread[own_above, g, y, x]
                        for c in range(neurons):
                            weights[c] = abs(m[c]) + abs(h[c]) + abs(o[c]) + abs(s[c])  # NaN stays, and is not zero
                        count = _places(weights, which)
                        for r in range(rows):
                            row, value = at[r], values[r]
                            total = constant[p, g, r]
                            for k in range(count):
                                c = which[k]
                                a, magnitude = row[c], abs(row[c])
                                total += a * o[c] - magnitude * s[c]
                                value[k] = a * m[c] - magnitude * h[c]
                            constant[p, g, r] = total
                    else:
                        weights[:] = 0
                        for r in range(rows):
                            row = at[r]
                            for c in range(neurons):
                                weights[c] += abs(row[c])
                        count = _places(weights, which)
                        for r in range(rows):
                            for k in range(count):
                                values[r, k] = at[r, which[k]]
                    if count == 0:
                        continue
                    values[:, count : -(-count // NEURONS) * NEURONS] = 0
                    left = (x * stride[1] - before[1]) * channels
                    start, end = max(0, -left), min(strip, line - left)
                    if end <= start:  # a window in the padding alone
                        continue
                    for row in range(0, rows, ROWS):
                        for first in range(0, count, NEURONS):
                            _add_products(matrix, which, first, count - 1, values, row, sums)
                        for r in range(min(ROWS, rows - row)):
                            for tap in range(first_tap, last_tap):
                                to = new[p, g, row + r, top + tap, left + start : left + end]
                                part = sums[r, tap * strip + start : tap * strip + end]
                                for n in range(len(to)):
                                    to[n] += part[n]
            if relaxed_below:
                m, h = mean_below[own_below, g], half_below[own_below, g]
                o, s = offset_below[own_below, g], spread_below[own_below, g]
                for r in range(rows):
                    row = new[p, g, r].reshape(height * line)
                    total = constant[p, g, r]
                    for n in range(len(row)):
                        a, magnitude = row[n], abs(row[n])
                        total += a * o[n] - magnitude * s[n]
                        row[n] = a * m[n] - magnitude * h[n]
                    constant[p, g, r] = total


@_compiled
def _places(weights, which):  # type: ignore[no-untyped-def]
    """Where weights ``[C]`` are not zero: how many places, and their numbers in ``which``."""
    count = 0
    for c in range(len(weights)):
        which[count] = c
        count += weights[c] != 0
    return count


@_compiled
def _add_products(matrix, which, first, last, values, row, sums):  # type: ignore[no-untyped-def]
    """Rows from ``row`` on times the neurons from ``first`` to at most ``last``, as many as are taken together.

    Adds ``values [rows, neurons]`` times the neurons' rows of ``matrix [C, n]`` to ``sums [ROWS, n]``, which the first neurons
    overwrite.
    """
    c0, c1 = which[first], which[min(first + 1, last)]
    c2, c3 = which[min(first + 2, last)], which[min(first + 3, last)]
    x00, x01, x02, x03 = values[row, first], values[row, first + 1], values[row, first + 2], values[row, first + 3]
    row += 1
    x10, x11, x12, x13 = values[row, first], values[row, first + 1], values[row, first + 2], values[row, first + 3]
    row += 1
    x20, x21, x22, x23 = values[row, first], values[row, first + 1], values[row, first + 2], values[row, first + 3]
    if first == 0:
        for n in range(sums.shape[1]):
            w0, w1, w2, w3 = matrix[c0, n], matrix[c1, n], matrix[c2, n], matrix[c3, n]
            sums[0, n] = x00 * w0 + x01 * w1 + x02 * w2 + x03 * w3
            sums[1, n] = x10 * w0 + x11 * w1 + x12 * w2 + x13 * w3
            sums[2, n] = x20 * w0 + x21 * w1 + x22 * w2 + x23 * w3
    else:
        for n in range(sums.shape[1]):
            w0, w1, w2, w3 = matrix[c0, n], matrix[c1, n], matrix[c2, n], matrix[c3, n]
            sums[0, n] += x00 * w0 + x01 * w1 + x02 * w2 + x03 * w3
            sums[1, n] += x10 * w0 + x11 * w1 + x12 * w2 + x13 * w3
            sums[2, n] += x20 * w0 + x21 * w1 + x22 * w2 + x23 * w3
