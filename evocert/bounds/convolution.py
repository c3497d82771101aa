"""Convolutions that are too large to be one matrix a member."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds.affine import Affine
from evocert.bounds.rows import Rows
from evocert.bounds.windows import Window

if TYPE_CHECKING:
    from evocert.bounds.layers import Conv2d

# torch's transposed convolution on a CPU wastes most of its lanes on fewer channels than this; a product and a fold is then
# faster: 8 us against 37 us a row for one channel, but 26 us against 14 us for 16 (first and second layer of CNN3 w=16 on
# MNIST, one core, torch 2.15).
FOLDED_CHANNELS = 8


class BoundConvolution(Affine):
    """Grouped convolution with the members as groups.

    Measured on 2 CPU cores (torch 2.15; CNN3 w=16, second layer on MNIST): 150-180 GFLOP/s where unfolding the activations
    into one batched product reached 60-95, and a loop over members 30-130.
    """

    def __init__(self, layer: "Conv2d", weight: Tensor, bias: Tensor | None) -> None:
        self.layer = layer
        self.input_shape = layer.input_shape
        self.kernels = weight  # [P, O, I / groups, k, k]
        self.weight = weight.flatten(0, 1)  # [P * O, I / groups, k, k]
        self.absolute = self.weight.abs()
        self.bias = None if bias is None else bias.flatten()  # [P * O]
        self.members = len(weight)
        self._strips: dict[int, Tensor] = {}

    def affine(self, x: Tensor) -> Tensor:
        return self._convolve(self.weight, self.bias, x)

    def magnitude(self, x: Tensor) -> Tensor:
        return self._convolve(self.absolute, None, x)

    def _convolve(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        layer = self.layer
        # All members can share one input where groups do not read different channels of it. In float64 torch makes that one
        # matrix product, in which a member's bits would depend on its place.
        if len(x) < self.members and (layer.groups > 1 or x.dtype != torch.float32):
            x = x.expand(self.members, *x.shape[1:])
        groups = layer.groups * len(x)
        x = x.transpose(0, 1).flatten(1, 2)  # [B, P * C, H, W]: a view where a convolution came before
        top, bottom, left, right = layer.padding
        if layer.symmetric:
            y = F.conv2d(x, weight, bias, layer.stride, (top, left), layer.dilation, groups)
        else:
            y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, layer.stride, 0, layer.dilation, groups)
        return y.unflatten(1, (self.members, -1)).transpose(0, 1)

    def back(self, rows: Rows) -> Rows:
        rows = rows.cleaned()
        size = self.input_shape[1], self.input_shape[2]
        if rows.window is not None and rows.coefficients is not None and self._window(rows.window).covers(size):
            rows = rows.whole()
        if rows.window is None:
            return replace(rows, coefficients=self._transposed(rows.terms), shape=self.input_shape)
        window = self._window(rows.window)
        own = rows.coefficients is None  # the values themselves: their coefficients are the kernels
        terms = self._kernel_cells() if own else self._composed(rows.terms, rows.window, window)
        clean = not window.overhangs(size)
        rows = replace(rows, coefficients=terms, shape=self.input_shape, window=window, clean=clean)
        return rows.whole() if window.covers(size) else rows

    def below(self, window: Window) -> Window | None:
        found = self._window(window)
        return None if found.covers((self.input_shape[1], self.input_shape[2])) else found

    def _window(self, window: Window) -> Window:
        layer = self.layer
        kernel = layer.weight.shape[2], layer.weight.shape[3]
        return window.below(kernel, layer.stride, layer.dilation, (layer.padding[0], layer.padding[2]))

    def _all_channels(self) -> Tensor:
        """The kernels over all input channels, zero for those of other groups: ``[P, O, I, k, k]``."""
        groups = self.layer.groups
        if groups == 1:
            return self.kernels
        own = self.kernels.unflatten(1, (groups, -1))  # [P, groups, O / groups, I / groups, k, k]
        blocks = own.new_zeros(*own.shape[:3], groups, *own.shape[3:])
        each = torch.arange(groups, device=own.device)
        blocks[:, each, :, each] = own.transpose(0, 1)
        return blocks.flatten(3, 4).flatten(1, 2)

    def _kernel_cells(self) -> Tensor:
        """The neurons' own kernels as cells: ``[P, 1, 1, O, kernel rows, kernel columns, I]``, dilated."""
        cells = self._all_channels().movedim(2, -1)  # [P, O, k, k, I]
        rows, columns = self.layer.dilation
        if (rows, columns) != (1, 1):
            *outer, height, width, channels = cells.shape
            spread = cells.new_zeros(*outer, (height - 1) * rows + 1, (width - 1) * columns + 1, channels)
            spread[..., ::rows, ::columns, :] = cells
            cells = spread
        return cells.unsqueeze(1).unsqueeze(1).contiguous()

    def _composed(self, terms: Tensor, window: Window, below: Window) -> Tensor:
        """Cells on windows of the output -> cells on windows of the input, one row of the kernel at a time.

        Each row of a cell goes through the same matrix, ``[columns * C, k * columns' * C']``, into k rows of the new cell. A
        single matrix for the whole cell would be a wider product, but for each of its rows most of it would be zeros: on the
        second layer of CNN3 the products would be 2.2 times as many, and took 1.4 times as long (one core, torch 2.15).
        """
        strip = self._strip(window.kernel[1], below.kernel[1])  # [P, columns * C, k * columns' * C']
        height, line = below.kernel[0], below.kernel[1] * self.input_shape[0]
        flat = terms.flatten(1, 3).flatten(3)  # [P, X, kernel rows, columns * C]
        members, count = max(len(flat), len(strip)), flat.shape[1]
        flat = flat.expand(members, -1, -1, -1)
        taps, dilation = self.layer.weight.shape[2], self.layer.dilation[0]
        if torch.is_grad_enabled() and dilation == 1:  # a write into part of a tensor costs a copy of it in the graph
            products = torch.matmul(flat.flatten(1, 2), strip).unflatten(
                1, (count, -1)
            )  # [P, X, kernel rows, k * line]
            starts = [row * self.layer.stride[0] * line for row in range(window.kernel[0])]
            pads = [(start, height * line - start - taps * line) for start in starts]
            new = torch.stack([F.pad(p, pad) for p, pad in zip(products.unbind(2), pads, strict=True)]).sum(0)
            return new.reshape(members, *terms.shape[1:4], height, below.kernel[1], self.input_shape[0])
        new = flat.new_zeros(members, count, height * line)
        for row in range(window.kernel[0]):
            first = row * self.layer.stride[0]
            if dilation == 1:
                new[:, :, first * line : (first + taps) * line].baddbmm_(flat[:, :, row], strip)
            else:
                product = torch.bmm(flat[:, :, row], strip).unflatten(2, (taps, line))
                new.unflatten(2, (height, line))[:, :, first : first + (taps - 1) * dilation + 1 : dilation] += product
        return new.reshape(members, *terms.shape[1:4], height, below.kernel[1], self.input_shape[0])

    def _strip(self, columns: int, columns_below: int) -> Tensor:
        """The matrix of ``_composed`` for cells that are ``columns`` wide. Made once a member."""
        if columns not in self._strips:
            kernels = self._all_channels().permute(0, 1, 3, 4, 2)  # [P, C, k, k, C']
            members, channels, taps, width, channels_below = kernels.shape
            matrix = kernels.new_zeros(members, columns, channels, taps, columns_below, channels_below)
            stride, dilation = self.layer.stride[1], self.layer.dilation[1]
            for column in range(columns):
                first = column * stride
                matrix[:, column, ..., first : first + (width - 1) * dilation + 1 : dilation, :] = kernels
            self._strips[columns] = matrix.flatten(3).flatten(1, 2)
        return self._strips[columns]

    def _transposed(self, terms: Tensor) -> Tensor:
        """Coefficients on the whole output ``[1 or P, I, L, Q, C, H, W]`` -> on the whole input."""
        layer = self.layer
        flat = terms.flatten(1, 3)  # [1 or P, R, C, H, W]
        flat = flat.expand(self.members, *flat.shape[1:])
        top, bottom, left, right = layer.padding
        size = self.input_shape[1] + top + bottom, self.input_shape[2] + left + right  # with the padding
        kernel = layer.weight.shape[2], layer.weight.shape[3]
        if flat.device.type == "cpu" and self.input_shape[0] < FOLDED_CHANNELS and layer.groups == 1:
            matrix = self.kernels.flatten(2).transpose(1, 2)  # [P, C' * k * k, C]
            columns = torch.matmul(matrix.unsqueeze(1), flat.flatten(3)).flatten(0, 1)  # [P * R, C' * k * k, H * W]
            if layer.symmetric:
                new = F.fold(columns, self.input_shape[1:], kernel, layer.dilation, (top, left), layer.stride)
                return new.reshape(self.members, *terms.shape[1:4], *self.input_shape)
            new = F.fold(columns, size, kernel, layer.dilation, 0, layer.stride).unflatten(0, (self.members, -1))
        else:
            flat = flat.transpose(0, 1).flatten(1, 2)  # [R, P * C, H, W]
            groups = self.members * layer.groups
            # Rows and columns at the end that no kernel reaches have no coefficients.
            rest = [
                n - ((o - 1) * s + d * (k - 1) + 1)
                for n, o, s, d, k in zip(
                    size, layer.output_shape[1:], layer.stride, layer.dilation, kernel, strict=True
                )
            ]
            padding = (top, left) if layer.symmetric else (0, 0)
            new = F.conv_transpose2d(
                flat, self.weight, None, layer.stride, padding, (rest[0], rest[1]), groups, layer.dilation
            )
            new = new.unflatten(1, (self.members, -1)).transpose(0, 1)  # [P, R, C', H', W']
            if layer.symmetric:
                return new.reshape(self.members, *terms.shape[1:4], *self.input_shape)
        new = new[..., top : top + self.input_shape[1], left : left + self.input_shape[2]]
        return new.reshape(self.members, *terms.shape[1:4], *self.input_shape)
