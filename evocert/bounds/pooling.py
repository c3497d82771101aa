"""Pooling bound to P members: maximum pooling, which is relaxed, and average pooling, which is affine."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds.affine import Affine
from evocert.bounds.nonlinear import Reference, Relaxed
from evocert.bounds.rows import Rows, Shape, inner
from evocert.bounds.windows import Pair, Window


class BoundMaxPool(Relaxed):
    """Maximum pooling. See ``RelaxedMaxPool`` for how loose its relaxation is."""

    def __init__(self, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, input_shape: Shape) -> None:
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x.flatten(0, 1), self.kernel, self.stride, self.padding, self.dilation)
        return pooled.unflatten(0, x.shape[:2])

    def ends(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(lower), self.forward(upper)

    def relax(self, lower: Tensor, upper: Tensor, reference: Reference, slope: str) -> "RelaxedMaxPool":
        return RelaxedMaxPool(self, lower, upper, reference)

    def decided(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        return None

    def taps(self) -> Iterator[Pair]:
        return ((a, b) for a in range(self.kernel[0]) for b in range(self.kernel[1]))

    def pieces(self, x: Tensor, beyond: float) -> Tensor:
        """``[1 or P, B, C, H, W]`` -> for each tap what it sees: ``[taps, 1 or P, B, C, H', W']``."""
        top, left = self.padding
        rows, columns = (
            (h + 2 * p - d * (k - 1) - 1) // s + 1
            for h, p, d, k, s in zip(
                self.input_shape[1:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        x = F.pad(x, (left, left, top, top), value=beyond)
        return torch.stack(
            [
                x[..., a * self.dilation[0] :, b * self.dilation[1] :][..., :: self.stride[0], :: self.stride[1]][
                    ..., :rows, :columns
                ]
                for a, b in self.taps()
            ]
        )


class RelaxedMaxPool:
    """``x_i <= max(x)``, and above the constant u, or ``max(x) <= x_i + (r - l_i)+``, whichever encloses less.

    i is the input with the greatest midpoint, l_i its lower bound, r the greatest upper bound of the others, u that of all.
    Sound, and exact where one input wins everywhere (r <= l_i); elsewhere a constant forgets how the maximum depends on the
    inputs, and the lower line forgets all inputs but one. DeepPoly (Singh et al. 2019, section 4.4) takes the input with the
    greatest lower bound, and its line above only where r <= l_i: behind a ReLU many of these ends are zero but for rounding,
    which would then decide.
    """

    def __init__(self, pool: BoundMaxPool, lower: Tensor, upper: Tensor, reference: Reference) -> None:
        self.pool, self.interval = pool, (lower, upper)
        lows, highs = pool.pieces(lower, -torch.inf), pool.pieces(upper, -torch.inf)
        best = (lows + highs).argmax(0, keepdim=True)  # [1, 1 or P, B, C, H', W']
        chosen = torch.zeros_like(lows).scatter_(0, best, 1.0)
        rivals, greatest = highs.masked_fill(chosen > 0, -torch.inf).amax(0), highs.amax(0)
        low, high = lows.gather(0, best)[0], highs.gather(0, best)[0]
        over = (rivals - low).clamp(min=0)
        follows = (low + high) / 2 + over < greatest
        self.below_taps = chosen  # the lower line's slope at each tap
        self.above_taps = chosen * follows
        # What the lines give at the reference values before the pooling, beyond those after it.
        values, after = pool.pieces(reference[0].expand_as(lower), 0.0), reference[1]
        self.below_offset = values.gather(0, best)[0] - after
        self.above_offset = torch.where(follows, self.below_offset + over, greatest - after)

    def back(self, rows: Rows) -> Rows:
        rows = rows.lowered()
        terms = rows.terms
        positive, negative = terms.clamp(min=0), terms.clamp(max=0)
        constant = (
            rows.constant + inner(positive, rows.on(self.below_offset)) + inner(negative, rows.on(self.above_offset))
        )
        spread = [
            positive * rows.on(below) + negative * rows.on(above)
            for below, above in zip(self.below_taps, self.above_taps, strict=True)
        ]
        return spread_taps(replace(rows, constant=constant, clean=True), spread, self.pool)

    def below(self, window: Window) -> Window | None:
        return below_pool(self.pool, window)


class Pool(Protocol):
    """The geometry of a pooling layer."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_shape: Shape

    def taps(self) -> Iterator[Pair]: ...


def below_pool(pool: Pool, window: Window) -> Window:
    return window.below(pool.kernel, pool.stride, pool.dilation, pool.padding)


def spread_taps(rows: Rows, terms: Sequence[Tensor], pool: Pool) -> Rows:
    """Coefficients for each tap of a pooling, on its output -> rows on its input. Taps in rising order, row by row."""
    stride, dilation = pool.stride, pool.dilation
    window = None if rows.window is None else below_pool(pool, rows.window)
    (channels, *size), axes = pool.input_shape, (-3, -2)
    # On the whole map: with the padding, and with what lies before the end but is reached by no tap.
    padded = window.kernel if window else [h + 2 * p for h, p in zip(size, pool.padding, strict=True)]
    shape = (*padded, channels)
    new = terms[0].new_zeros(*terms[0].shape[:-3], *shape)
    for (a, b), each in zip(pool.taps(), terms, strict=True):
        place: list[slice] = [slice(None)] * new.ndim
        for axis, tap, s, d in zip(axes, (a, b), stride, dilation, strict=True):
            place[axis] = slice(tap * d, tap * d + (each.shape[axis] - 1) * s + 1, s)
        new[tuple(place)] += each
    if window is None:
        top, left = pool.padding
        new = new[..., top : top + size[0], left : left + size[1], :]
    clean = window is None or not window.overhangs((size[0], size[1]))
    return replace(rows, coefficients=new, shape=pool.input_shape, window=window, clean=clean)


class BoundAvgPool(Affine):
    """Average pooling; the padding counts as zeros if ``count_padding``, else an average is over what lies on the map."""

    dilation: Pair = (1, 1)

    def __init__(self, kernel: Pair, stride: Pair, padding: Pair, count_padding: bool, input_shape: Shape) -> None:
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.count_padding, self.input_shape = count_padding, input_shape

    def affine(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(
            x.flatten(0, 1), self.kernel, self.stride, self.padding, count_include_pad=self.count_padding
        )
        return pooled.unflatten(0, x.shape[:2])

    magnitude = affine

    def taps(self) -> Iterator[Pair]:
        return ((a, b) for a in range(self.kernel[0]) for b in range(self.kernel[1]))

    def back(self, rows: Rows) -> Rows:
        rows = rows.cleaned()
        area = self.kernel[0] * self.kernel[1]
        if self.count_padding:
            terms = rows.terms / area
        else:  # at the border an average is over fewer inputs
            ones = rows.constant.new_ones(1, *self.input_shape)
            inputs = F.avg_pool2d(ones, self.kernel, self.stride, self.padding) * area
            terms = rows.terms * rows.on_all(1 / inputs)
        return spread_taps(rows, [terms] * area, self)

    def below(self, window: Window) -> Window | None:
        return below_pool(self, window)
