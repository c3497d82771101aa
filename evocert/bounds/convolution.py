"""Convolutions that are too large to be one matrix a member."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evocert.bounds import compiled
from evocert.bounds.affine import Affine
from evocert.bounds.blocks import choose_blocks
from evocert.bounds.compiled import Parts
from evocert.bounds.rows import Rows
from evocert.bounds.windows import Window

if TYPE_CHECKING:
    from evocert.bounds.layers import Conv2d

# On one core, multiply-adds in a nanosecond: of all neurons, by a convolution in blocks, and of some, by
# ``compiled.through_convolution``; and what a position costs that besides, in nanoseconds, and additions in one. Measured on
# layers of CNN3, CNN5 and CNN7 with 8 to 128 neurons a position (AMD EPYC with AVX-512, torch 2.14, numba 0.68).
DENSE_RATE, SPARSE_RATE = 40, 30
POSITION, ADDING_RATE = 20, 16


class _Composition(torch.autograd.Function):
    """Row r of each cell times one matrix, added into the new cell from ``r * step`` on.

    Written out with its gradient: products that add into part of a tensor are a third of the time of products that are padded
    and summed, but torch's own gradient of a write into part of a tensor copies the whole.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, strip: Tensor, size: int, step: int) -> Tensor:
        """Cells ``[P, X, rows, n]``, strip ``[P, n, m]`` -> ``[P, X, size]``."""
        ctx.save_for_backward(cells, strip)
        ctx.step = step
        new = cells.new_zeros(*cells.shape[:2], size)
        for row in range(cells.shape[2]):
            new[:, :, row * step : row * step + strip.shape[2]].baddbmm_(cells[:, :, row], strip)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cells, strip = ctx.saved_tensors
        of_cells, of_strip = torch.empty_like(cells), torch.zeros_like(strip)
        for row in range(cells.shape[2]):
            part = gradient[:, :, row * ctx.step : row * ctx.step + strip.shape[2]]
            of_cells[:, :, row] = torch.bmm(part, strip.transpose(1, 2))
            of_strip.baddbmm_(cells[:, :, row].transpose(1, 2), part)
        return of_cells, of_strip, None, None


class BoundConvolution(Affine):
    """Grouped convolution with the members as groups.

    Measured on 2 CPU cores (torch 2.15; CNN3 w=16, second layer on MNIST): 150-180 GFLOP/s where unfolding the activations
    into one batched product reached 60-95, and a loop over members 30-130.
    """

    def __init__(self, layer: "Conv2d", weight: Tensor, bias: Tensor | None) -> None:
        self.layer = layer
        self.input_shape = layer.input_shape
        self.kernels = weight  # [P, O, I / groups, k, k]
        self.members = len(weight)
        self.weight = weight.flatten(0, 1)  # [P * O, I / groups, k, k]
        if self.members == 1 and weight.device.type == "cpu" and weight.dtype == torch.float32:
            # Maps then come out with their channels last, as the cells of back-substitution have them.
            self.weight = self.weight.clone(memory_format=torch.channels_last)
        self.absolute = torch.empty_like(self.weight).copy_(self.weight).abs_()
        self.bias = None if bias is None else bias.flatten()  # [P * O]
        self._strips: dict[int, Tensor] = {}
        self._block_kernels: Tensor | None = None
        self._kernels_last: Tensor | None = None  # the channels of the input last

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
        flat, strip = flat.expand(members, -1, -1, -1), strip.expand(members, -1, -1)
        taps, stride, dilation = self.layer.weight.shape[2], self.layer.stride[0], self.layer.dilation[0]
        if dilation == 1:
            new: Tensor = _Composition.apply(flat, strip, height * line, stride * line)
        else:
            new = flat.new_zeros(members, count, height, line)
            for row in range(window.kernel[0]):
                product = torch.bmm(flat[:, :, row], strip).unflatten(2, (taps, line))
                new[:, :, row * stride : row * stride + (taps - 1) * dilation + 1 : dilation] += product
        return new.reshape(members, *terms.shape[1:4], height, below.kernel[1], self.input_shape[0])

    def _strip(self, columns: int, columns_below: int) -> Tensor:
        """The matrix of ``_composed`` for cells that are ``columns`` wide: made once a member, but for gradients each time.

        A chunk's graph is thrown away and made again (see ``backward``), so what is in it must not outlive the chunk.
        """
        recorded = torch.is_grad_enabled() and self.kernels.requires_grad
        if not recorded and columns in self._strips:
            return self._strips[columns]
        kernels = self._all_channels().permute(0, 1, 3, 4, 2)  # [P, C, k, k, C']
        members, channels, taps, width, channels_below = kernels.shape
        matrix = kernels.new_zeros(members, columns, channels, taps, columns_below, channels_below)
        stride, dilation = self.layer.stride[1], self.layer.dilation[1]
        for column in range(columns):
            first = column * stride
            matrix[:, column, ..., first : first + (width - 1) * dilation + 1 : dilation, :] = kernels
        strip = matrix.flatten(3).flatten(1, 2)
        if not recorded:
            self._strips[columns] = strip
        return strip

    def sparse_pays(self, share: Callable[[], float]) -> bool:
        """Whether ``back_sparsely`` can be taken, and is faster than ``back``; by counting, so that it depends on no clock.

        ``share``: tells how many of the output's neurons rows have coefficients of, 0 to 1; asked only where it matters.
        """
        layer = self.layer
        if layer.groups > 1 or layer.dilation != (1, 1):
            return False
        window = layer.weight.shape[2] * layer.weight.shape[3] * self.input_shape[0]
        positions = layer.output_shape[1] * layer.output_shape[2]
        products = positions * layer.output_shape[0] * window  # of one row
        all_of_them, fixed = products / DENSE_RATE, positions * (POSITION + window / ADDING_RATE)
        return fixed < all_of_them and fixed + share() * products / SPARSE_RATE < all_of_them

    def back_sparsely(self, rows: Rows, above: Parts | None, below: Parts | None) -> Rows:
        """Rows on the output -> rows on the input, and through the relaxations behind and before the convolution as well.

        Args:
            rows: on the whole map, with coefficients.
            above, below: as of ``compiled.through_convolution``.
        """
        layer = self.layer
        if self._kernels_last is None:
            self._kernels_last = self.kernels.permute(0, 1, 3, 4, 2).contiguous()
        terms, constant = compiled.through_convolution(
            rows.terms,
            rows.constant,
            self._kernels_last,
            layer.stride,
            (layer.padding[0], layer.padding[2]),
            (self.input_shape[1], self.input_shape[2]),
            above,
            below,
        )
        return replace(rows, coefficients=terms, constant=constant, shape=self.input_shape, clean=True)

    def _transposed(self, terms: Tensor) -> Tensor:
        """Coefficients on the whole output ``[1 or P, I, L, Q, H, W, C]`` -> on the whole input."""
        layer = self.layer
        channels, height, width = self.input_shape
        top, bottom, left, right = layer.padding
        flat = terms.flatten(1, 3)  # [1 or P, R, H, W, C]
        flat = flat.expand(self.members, *flat.shape[1:])
        # [R, P * C, H, W], with channels innermost in memory where there is one member: that is the fastest order.
        flat = flat.permute(1, 0, 4, 2, 3).flatten(1, 2)
        kernel = layer.weight.shape[2], layer.weight.shape[3]
        if terms.device.type == "cpu" and layer.groups == 1 and layer.dilation == (1, 1):
            outputs = layer.output_shape[1], layer.output_shape[2]
            blocks = choose_blocks(channels, (height, width), outputs, kernel, layer.stride, (top, left))
            if blocks is not None:
                recorded = torch.is_grad_enabled() and self.kernels.requires_grad
                kernels = self._block_kernels
                if recorded or kernels is None:
                    kernels = blocks.kernels(self.kernels)
                if not recorded:
                    self._block_kernels = kernels
                new = blocks.transposed(flat, kernels)
                return new.unflatten(1, terms.shape[1:4])
        # Rows and columns at the end that no kernel reaches have no coefficients.
        size = height + top + bottom, width + left + right
        rest = [
            n - ((o - 1) * s + d * (k - 1) + 1)
            for n, o, s, d, k in zip(size, layer.output_shape[1:], layer.stride, layer.dilation, kernel, strict=True)
        ]
        padding = (top, left) if layer.symmetric else (0, 0)
        groups = self.members * layer.groups
        new = F.conv_transpose2d(
            flat, self.weight, None, layer.stride, padding, (rest[0], rest[1]), groups, layer.dilation
        )
        if not layer.symmetric:
            new = new[..., top : top + height, left : left + width]
        new = new.unflatten(1, (self.members, channels)).permute(1, 0, 3, 4, 2)  # [P, R, H', W', C']
        return new.reshape(self.members, *terms.shape[1:4], height, width, channels)
