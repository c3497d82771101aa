"""The layers that a network is read into: what they are, and how they are bound to the parameters of some members.

Activations have the logical shape ``[P, B, ...]``. P is 1 until the first layer with weights: what all members share is
computed once. Memory order is whatever the layer before left, so a transposition is a view and costs nothing.

*Binding* a layer to the parameters of some members does the work that all images of a member share, and gives a node that
carries values and intervals forward and linear functions back: ``affine`` and ``convolution`` hold those of affine layers,
``nonlinear``, ``pooling`` and ``chain`` the others. A new kind of layer is one class here, its node there, and one entry in
``supported.MODULES``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from evocert.bounds.affine import BoundDense, BoundFlatten, BoundNormalize, BoundPad, BoundScale, Node
from evocert.bounds.chain import BoundResidual
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.nonlinear import BoundActivation
from evocert.bounds.pooling import BoundAvgPool, BoundMaxPool
from evocert.bounds.windows import Pair

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


@dataclass(frozen=True)
class Layer:
    """What every layer has: its place in the user's module, and its shapes without P and B."""

    place: str
    input_shape: Shape
    output_shape: Shape

    @property
    def kind(self) -> str:
        return type(self).__name__

    def bind(self, parameters: Tensor) -> Node:
        """The layer with the parameters ``[P, D]`` of some members, ready for use: all work is done that images share."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalize(Layer):
    """``(x - mean) / std`` by channel. Not trained: mean and std belong to the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def bind(self, parameters: Tensor) -> BoundNormalize:
        mean, std = (parameters.new_tensor(v).expand(self.input_shape[0]) for v in (self.mean, self.std))
        return BoundNormalize(mean, std, self.input_shape)


@dataclass(frozen=True)
class BatchNorm2d(Layer):
    """``(x - mean) / std * weight + bias`` by channel, with statistics that are frozen and belong to the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # with the module's eps under the root
    weight: Slot | None  # [C]
    bias: Slot | None  # [C]

    def bind(self, parameters: Tensor) -> BoundScale:
        mean, std = (parameters.new_tensor(v).unsqueeze(0) for v in (self.mean, self.std))
        scale = 1 / std if self.weight is None else self.weight.of(parameters) / std
        shift = -mean * scale if self.bias is None else self.bias.of(parameters) - mean * scale
        return BoundScale(scale, shift, self.input_shape)


@dataclass(frozen=True)
class Flatten(Layer):
    """``[C, H, W]`` -> ``[C * H * W]``, in C order."""

    def bind(self, parameters: Tensor) -> BoundFlatten:
        return BoundFlatten(self.input_shape)


@dataclass(frozen=True)
class Pad(Layer):
    """A border of one value; ``padding`` is (left, right, top, bottom), as torch's, and may crop."""

    padding: tuple[int, int, int, int]
    value: float

    def bind(self, parameters: Tensor) -> BoundPad:
        return BoundPad(self.padding, self.value, self.input_shape)


@dataclass(frozen=True)
class AvgPool2d(Layer):
    """``nn.AvgPool2d`` without ceil_mode and divisor_override."""

    kernel: Pair
    stride: Pair
    padding: Pair
    count_padding: bool

    def bind(self, parameters: Tensor) -> BoundAvgPool:
        return BoundAvgPool(self.kernel, self.stride, self.padding, self.count_padding, self.input_shape)


@dataclass(frozen=True)
class MaxPool2d(Layer):
    """``nn.MaxPool2d`` without ceil_mode."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def bind(self, parameters: Tensor) -> BoundMaxPool:
        return BoundMaxPool(self.kernel, self.stride, self.padding, self.dilation, self.input_shape)


@dataclass(frozen=True)
class Activation(Layer):
    """An elementwise activation: ``name`` is its entry in ``relaxation.ACTIVATIONS``, ``arguments`` what that takes."""

    name: str
    arguments: tuple[float, ...] = ()

    def bind(self, parameters: Tensor) -> BoundActivation:
        return BoundActivation(self.name, self.arguments, self.input_shape)


@dataclass(frozen=True)
class Residual(Layer):
    """``body(x) + shortcut(x)``, each a chain of layers; an empty one is the identity."""

    body: tuple["Layer", ...]
    shortcut: tuple["Layer", ...]

    def bind(self, parameters: Tensor) -> BoundResidual:
        body, shortcut = ([layer.bind(parameters) for layer in part] for part in (self.body, self.shortcut))
        return BoundResidual(body, shortcut, self.input_shape)


@dataclass(frozen=True)
class Linear(Layer):
    """``nn.Linear`` on a vector."""

    weight: Slot  # [out, in]
    bias: Slot | None  # [out]

    def bind(self, parameters: Tensor) -> "BoundDense":
        bias = None if self.bias is None else self.bias.of(parameters)
        return BoundDense(self.weight.of(parameters), bias, self.input_shape, self.output_shape)


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
    def symmetric(self) -> bool:
        """Whether the padding is the same on both sides, as torch's own convolutions have it."""
        top, bottom, left, right = self.padding
        return (top, left) == (bottom, right)

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
        return BoundDense(matrix, bias, self.input_shape, self.output_shape)


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
