"""Rows that pass a convolution, without the neurons that have no coefficients."""

import numpy as np
import torch
from torch import Tensor

from evocert.bounds.compiled.loops import Parts, array, compiled


def share_of_nonzero(terms: Tensor) -> float:
    """Of the first row of each image and position, ``[P, I, L, Q, *cell]``."""
    flat = terms.flatten(4).flatten(1, 2)
    return int(_nonzero(flat.detach().numpy())) * flat.shape[2] / max(1, flat.numel())


@compiled
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
        array(terms.flatten(1, 2)),
        array(found.flatten(1, 2)),
        array(kernels.flatten(3)),
        *(array(each.flatten(1, 3)) for each in above or nothing),
        *(array(each.flatten(4).flatten(1, 3)) for each in below or nothing),
        stride,
        before,
        kernels.shape[4],
        array(new.flatten(5).flatten(1, 2)),
    )
    return new, found if relaxed else constant


@compiled
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


@compiled
def _places(weights, which):  # type: ignore[no-untyped-def]
    """Where weights ``[C]`` are not zero: how many places, and their numbers in ``which``."""
    count = 0
    for c in range(len(weights)):
        which[count] = c
        count += weights[c] != 0
    return count


@compiled
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
