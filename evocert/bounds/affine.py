"""Affine layers bound to the parameters of P members: matrices, and what works on each channel or entry alone.

Each has three maps: ``affine``, ``W x + b``; ``magnitude``, ``|W| x``, which carries radii; and ``back``, which rewrites
rows on its output as rows on its input: coefficients ``A`` become ``A W`` (of deviations: b has no part in it, see ``rows``).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds.rows import Rows, Shape, as_cell, from_cell
from evocert.bounds.windows import Window


class Node:
    """A layer bound to the parameters of P members."""

    input_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        """Values ``[1 or P, B, *input_shape]`` -> ``[1 or P, B, *output_shape]``."""
        raise NotImplementedError


class Affine(Node):
    """A node that is affine."""

    def affine(self, x: Tensor) -> Tensor:
        """``W x + b``: ``[1 or P, B, *input_shape]`` -> ``[1 or P, B, *output_shape]``."""
        raise NotImplementedError

    def magnitude(self, x: Tensor) -> Tensor:
        """``|W| x``, of the same shapes."""
        raise NotImplementedError

    def back(self, rows: Rows) -> Rows:
        """Rows on the output -> rows on the input."""
        raise NotImplementedError

    def below(self, window: Window) -> Window | None:
        """The window in the input of neurons that see ``window`` of the output; None where ``back`` takes the whole map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x)


class BoundDense(Affine):
    """One matrix a member."""

    def __init__(self, weight: Tensor, bias: Tensor | None, input_shape: Shape, output_shape: Shape) -> None:
        self.weight, self.bias = weight, bias  # [P, out, in], [P, out]
        self.input_shape, self.output_shape = input_shape, output_shape
        self.absolute = weight.abs()

    def affine(self, x: Tensor) -> Tensor:
        return self._product(self.weight, self.bias, x)

    def magnitude(self, x: Tensor) -> Tensor:
        return self._product(self.absolute, None, x)

    def _product(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return dense_product(weight, bias, x).unflatten(2, self.output_shape)

    def back(self, rows: Rows) -> Rows:
        rows = rows.whole()
        if rows.coefficients is None:  # the values themselves: their coefficients are the matrix
            terms = self.weight.unflatten(2, self.input_shape).unsqueeze(1).unsqueeze(1)
        else:
            flat = from_cell(rows.coefficients, self.output_shape).flatten(4).flatten(1, 3)
            terms = torch.matmul(flat, self.weight).reshape(-1, *rows.coefficients.shape[1:4], *self.input_shape)
        return replace(rows, coefficients=as_cell(terms, self.input_shape), shape=self.input_shape)

    def below(self, window: Window) -> Window | None:
        return None


def dense_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Weight ``[P, O, I]``, bias ``[P, O]`` or none, x ``[1 or P, B, ...]`` of I entries -> ``[P, B, O]``.

    Images are the innermost in memory, in the product as in what it is made of, and each member has a product of its own
    also where all take the same x. A matrix kernel rounds by where a row lies in the whole matrix and to the cache lines; so
    a member's bits do not depend on its place among the others. It is as fast as one product for all, or faster.
    """
    x = x.flatten(2).transpose(1, 2).contiguous().expand(len(weight), -1, -1)  # [P, I, B]
    product = torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, x)
    return product.transpose(1, 2)


class BoundScale(Affine):
    """``x * scale + shift``, for each channel of a map or each entry of a vector."""

    def __init__(self, scale: Tensor, shift: Tensor, shape: Shape) -> None:
        self.scale, self.shift = scale, shift  # [1 or P, C]
        self.input_shape = shape
        self.tail = (1,) * (len(shape) - 1)

    def affine(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._each(self.shift), x, self._each(self.scale))

    def magnitude(self, x: Tensor) -> Tensor:
        return x * self._each(self.scale.abs())

    def _each(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), 1, -1, *self.tail)

    def back(self, rows: Rows) -> Rows:
        scale = self.scale.reshape(len(self.scale), 1, 1, 1, *self.tail, -1)  # a map's channels are last in a cell
        return replace(rows, coefficients=rows.terms * scale)

    def below(self, window: Window) -> Window | None:
        return window


class BoundNormalize(BoundScale):
    """``(x - mean) / std``, by channel, rounded as the module itself rounds."""

    def __init__(self, mean: Tensor, std: Tensor, shape: Shape) -> None:
        super().__init__((1 / std).unsqueeze(0), (-mean / std).unsqueeze(0), shape)  # mean and std [C]
        self.mean, self.std = mean.unsqueeze(0), std.unsqueeze(0)

    def affine(self, x: Tensor) -> Tensor:
        return (x - self._each(self.mean)) / self._each(self.std)

    def magnitude(self, x: Tensor) -> Tensor:
        return x / self._each(self.std)


class BoundFlatten(Affine):
    """``[C, H, W]`` -> ``[C * H * W]``."""

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape

    def affine(self, x: Tensor) -> Tensor:
        return x.flatten(2)

    magnitude = affine

    def back(self, rows: Rows) -> Rows:
        if rows.coefficients is None:
            return replace(rows, shape=self.input_shape)
        terms = as_cell(rows.coefficients.unflatten(4, self.input_shape), self.input_shape).contiguous()
        return replace(rows, coefficients=terms, shape=self.input_shape)

    def below(self, window: Window) -> Window | None:
        return None


class BoundPad(Affine):
    """A border of one value: padding is (left, right, top, bottom), as torch's."""

    def __init__(self, padding: tuple[int, int, int, int], value: float, input_shape: Shape) -> None:
        self.padding, self.value, self.input_shape = padding, value, input_shape

    def affine(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, value=self.value)

    def magnitude(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding)

    def back(self, rows: Rows) -> Rows:
        rows = rows.cleaned().written()
        left, right, top, bottom = self.padding
        if rows.window is None:
            terms = F.pad(rows.terms, (0, 0, -left, -right, -top, -bottom))
            return replace(rows, coefficients=terms, shape=self.input_shape)
        window = self.below(rows.window)
        clean = not window.overhangs((self.input_shape[1], self.input_shape[2]))
        return replace(rows, shape=self.input_shape, window=window, clean=clean)

    def below(self, window: Window) -> Window:
        return window.below((1, 1), (1, 1), (1, 1), (self.padding[2], self.padding[0]))


# Layers that mix no inputs: interval propagation loses nothing in them.
Entrywise = BoundScale | BoundFlatten | BoundPad
