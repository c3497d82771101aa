"""The layers a network is read into, and what each does to a whole population.

Activations have the logical shape ``[P, B, ...]``. P is 1 until the first layer with weights: what all members share is
computed once. Memory order is whatever the layer before left, so a transposition is a view and costs nothing.

A layer with weights is first *bound* to the parameters of some members, which does the work that all images of a member
share; the result has two maps: ``affine``, ``W x + b``, and ``magnitude``, ``|W| x``, which carries radii.
A new kind of layer is one class here and one entry in ``read.MODULES``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]

# A convolution on a small map is cheaper as one dense matrix a member than as a grouped convolution: measured on 2 CPU
# cores (torch 2.15, maps of 8x8 and 4x4), 0.14 ms against 0.75 ms at nearly the same number of multiplications. The
# dense matrix wastes at most this factor of multiplications, and stays below this size, before it is not worth it.
DENSE_WASTE = 8.0
DENSE_SIZE = 16_384


@dataclass(frozen=True)
class Slot:
    """Where a parameter tensor lies in the flat vector of D parameters."""

    offset: int
    shape: Shape

    def of(self, parameters: Tensor) -> Tensor:
        """Parameters ``[P, D]`` -> this tensor for each member, ``[P, *shape]`` (a view where possible)."""
        return parameters[:, self.offset : self.offset + math.prod(self.shape)].reshape(len(parameters), *self.shape)


class BoundLayer(Protocol):
    """A layer with weights, bound to the parameters of P members."""

    def affine(self, x: Tensor) -> Tensor:
        """``W x + b``: ``[1 or P, B, *input_shape]`` -> ``[P, B, *output_shape]``."""
        ...

    def magnitude(self, x: Tensor) -> Tensor:
        """``|W| x``: ``[1 or P, B, *input_shape]`` -> ``[P, B, *output_shape]``."""
        ...


@dataclass(frozen=True)
class Layer:
    """What every layer has: its place in the user's module, and its shapes without P and B."""

    place: str
    input_shape: Shape
    output_shape: Shape

    @property
    def kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Normalize(Layer):
    """``(x - mean) / std`` by channel. Not trained: mean and std belong to the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def bind(self, parameters: Tensor) -> "BoundScale":
        mean, std = (parameters.new_tensor(v).reshape(-1, *[1] * (len(self.input_shape) - 1)) for v in self.moments)
        return BoundScale(mean, std)

    @property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std


@dataclass(frozen=True)
class BoundScale:
    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def affine(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def magnitude(self, x: Tensor) -> Tensor:
        return x / self.std


@dataclass(frozen=True)
class Flatten(Layer):
    """``[C, H, W]`` -> ``[C * H * W]``, in C order."""


@dataclass(frozen=True)
class Activation(Layer):
    """An elementwise activation: ``name`` is its entry in ``relaxation.ACTIVATIONS``, ``arguments`` what that takes."""

    name: str
    arguments: tuple[float, ...] = ()


@dataclass(frozen=True)
class Linear(Layer):
    """``nn.Linear`` on a vector."""

    weight: Slot  # [out, in]
    bias: Slot | None  # [out]

    def bind(self, parameters: Tensor) -> "BoundDense":
        bias = None if self.bias is None else self.bias.of(parameters)
        return BoundDense(self.weight.of(parameters), bias, self.output_shape)


@dataclass(frozen=True)
class Conv2d(Layer):
    """``nn.Conv2d`` with zero padding; ``padding`` is (top, bottom, left, right)."""

    weight: Slot  # [out, in / groups, kernel, kernel]
    bias: Slot | None  # [out]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def multiplications(self) -> int:
        return math.prod(self.output_shape) * math.prod(self.weight.shape[1:])

    @property
    def dense(self) -> bool:
        """Whether this convolution is computed as one dense matrix a member."""
        size = math.prod(self.input_shape) * math.prod(self.output_shape)
        return size <= DENSE_SIZE and size <= DENSE_WASTE * self.multiplications

    def bind(self, parameters: Tensor) -> "BoundDense | BoundConvolution":
        weight = self.weight.of(parameters)
        bias = None if self.bias is None else self.bias.of(parameters)
        if not self.dense:
            return BoundConvolution(self, weight, bias)
        members = len(parameters)
        # The entry past the weights is the zero that stands wherever a kernel does not reach.
        table = torch.cat([weight.flatten(1), weight.new_zeros(members, 1)], 1)
        matrix = table.index_select(1, _dense_index(self, table.device))
        matrix = matrix.reshape(members, math.prod(self.output_shape), math.prod(self.input_shape))
        if bias is not None:
            bias = bias.repeat_interleave(math.prod(self.output_shape[1:]), 1)
        return BoundDense(matrix, bias, self.output_shape)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve later gradients too
def _dense_index(layer: Conv2d, device: torch.device) -> Tensor:
    """For each (output, input) pair the position of its weight in the flat kernel, or one past its end: [out * in]."""
    (channels_in, height, width), (channels_out, rows, columns) = layer.input_shape, layer.output_shape
    _, per_group, kernel_h, kernel_w = layer.weight.shape
    o, i, p, q, a, b = torch.meshgrid(
        *(torch.arange(n) for n in (channels_out, per_group, rows, columns, kernel_h, kernel_w)), indexing="ij"
    )
    y = p * layer.stride[0] - layer.padding[0] + a * layer.dilation[0]
    x = q * layer.stride[1] - layer.padding[2] + b * layer.dilation[1]
    channel = o // (channels_out // layer.groups) * per_group + i
    weight = ((o * per_group + i) * kernel_h + a) * kernel_w + b
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, column = (o * rows + p) * columns + q, (channel * height + y) * width + x
    index = torch.full((channels_out * rows * columns, channels_in * height * width), math.prod(layer.weight.shape))
    index[row[inside], column[inside]] = weight[inside]
    return index.flatten().to(device)


class BoundDense:
    """One matrix a member."""

    def __init__(self, weight: Tensor, bias: Tensor | None, output_shape: Shape) -> None:
        self.weight, self.bias, self.output_shape = weight, bias, output_shape  # [P, out, in], [P, out]
        self.absolute = weight.abs()

    def affine(self, x: Tensor) -> Tensor:
        return self._product(self.weight, self.bias, x)

    def magnitude(self, x: Tensor) -> Tensor:
        return self._product(self.absolute, None, x)

    def _product(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return dense_product(weight, bias, x).unflatten(2, self.output_shape)


def dense_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Weight ``[P, O, I]``, bias ``[P, O]`` or none, x ``[1 or P, B, ...]`` of I entries -> ``[P, B, O]``.

    Images are the innermost in memory, in the product as in what it is made of, and each member has a product of its own
    also where all take the same x. A matrix kernel rounds by where a row lies in the whole matrix and to the cache lines; so
    a member's bits do not depend on its place among the others. It is as fast as one product for all, or faster.
    """
    x = x.flatten(2).transpose(1, 2).contiguous().expand(len(weight), -1, -1)  # [P, I, B]
    product = torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, x)
    return product.transpose(1, 2)


class BoundConvolution:
    """Grouped convolution with the members as groups.

    Measured on 2 CPU cores (torch 2.15; CNN3 w=16, second layer on MNIST): 150-180 GFLOP/s where unfolding the activations
    into one batched product reached 60-95, and a loop over members 30-130.
    """

    def __init__(self, layer: Conv2d, weight: Tensor, bias: Tensor | None) -> None:
        self.layer = layer
        self.weight = weight.flatten(0, 1)  # [P * O, I / groups, k, k]
        self.absolute = self.weight.abs()
        self.bias = None if bias is None else bias.flatten()  # [P * O]
        self.members = len(weight)

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
        if (top, left) == (bottom, right):
            y = F.conv2d(x, weight, bias, layer.stride, (top, left), layer.dilation, groups)
        else:
            y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, layer.stride, 0, layer.dilation, groups)
        return y.unflatten(1, (self.members, -1)).transpose(0, 1)
