"""A network as the bounds see it: a chain of supported layers over one flat vector of D parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from evocert.bounds.layers import Activation, BoundDense, BoundLayer, Flatten, Layer, Linear, Shape
from evocert.bounds.margins import pair_differences
from evocert.bounds.relaxation import ACTIVATIONS


class Box(NamedTuple):
    """The inputs that a bound is about: ``lower <= x <= upper``, each ``[B, C, H, W]`` in [0, 1] pixels."""

    lower: Tensor
    upper: Tensor


def box_around(images: Tensor, eps: float) -> Box:
    """All images within eps of ``images [B, C, H, W]`` in every pixel, clipped to [0, 1]."""
    return Box((images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0))


@dataclass(frozen=True)
class Network:
    """What ``read_network`` gives: picklable, holds no tensors, and so travels to actors for nothing.

    Attributes:
        layers: in the order in which they run.
        num_parameters: D, the length of the flat parameter vector (order of ``module.named_parameters()``).
        input_shape: ``(C, H, W)``.
        num_classes: K >= 2.
    """

    layers: tuple[Layer, ...]
    num_parameters: int
    input_shape: Shape
    num_classes: int

    def bind(self, parameters: Tensor) -> "Members":
        """The networks of some members: ``parameters [P, D]``."""
        return Members(self, parameters)

    def logits(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Parameters ``[P, D]``, images ``[B, C, H, W]`` -> logits ``[P, B, K]``."""
        return self.bind(parameters).logits(images)

    @property
    def floats_per_pair(self) -> int:
        """Numbers that live at once for one member and image while an interval passes the widest layer.

        Centre and radius, in and out; lower and upper before the activation; and for a convolution the copies in
        blocked memory order that the kernels make of input and output.
        """
        widest = max(4 * (_size(layer.input_shape) + _size(layer.output_shape)) for layer in self.layers)
        # The last layer: centre and radius in, the spread of each pair of classes, margins and what they are made of.
        return max(widest, 2 * _size(self.layers[-1].input_shape) + self._pairs + 6 * self.num_classes)

    @property
    def _pairs(self) -> int:
        return self.num_classes * (self.num_classes - 1) // 2

    @property
    def floats_per_member(self) -> int:
        """Numbers that one bound member takes: weights and their absolute values, dense matrices, class pairs."""
        numbers = 2 * self.num_parameters
        for layer in self.layers:
            if getattr(layer, "dense", False):
                numbers += 2 * _size(layer.input_shape) * _size(layer.output_shape)
        last = self.layers[-1]
        return numbers + (3 * self._pairs * _size(last.input_shape) if isinstance(last, Linear) else 0)


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


class Members:
    """P networks of one architecture, bound to their parameters: the work that all images of a member share is done."""

    def __init__(self, network: Network, parameters: Tensor) -> None:
        self.network = network
        self.parameters = parameters
        # Not a generator: binding gathers dense matrices, once, however many image tiles follow.
        self.bound: list[BoundLayer | None] = [
            layer.bind(parameters) if hasattr(layer, "bind") else None for layer in network.layers
        ]

    def __len__(self) -> int:
        return len(self.parameters)

    def __iter__(self) -> Iterator[tuple[Layer, BoundLayer | None]]:
        return zip(self.network.layers, self.bound, strict=True)

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[P, B, K]``."""
        x = images.unsqueeze(0)
        for layer, bound in self:
            if bound is not None:
                x = bound.affine(x)
            elif isinstance(layer, Activation):
                x = ACTIVATIONS[layer.name].function(x, *layer.arguments)
            elif isinstance(layer, Flatten):
                x = x.flatten(2)
        return x.expand(len(self), *x.shape[1:])

    @cached_property
    def last_linear(self) -> BoundDense | None:
        """The last layer if the margins can be folded into it, otherwise nothing."""
        last = self.bound[-1]
        return last if isinstance(self.network.layers[-1], Linear) and isinstance(last, BoundDense) else None

    @cached_property
    def pair_differences(self) -> Tensor:
        """``|W_i - W_j|`` of the last layer, for each pair of classes: ``[P, pairs, F]``."""
        assert self.last_linear is not None
        return pair_differences(self.last_linear.weight)
