"""A network as the bounds see it: a chain of supported layers over one flat vector of D parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from evocert.bounds.affine import Affine, BoundDense, BoundNormalize, Node
from evocert.bounds.chain import forward, relaxed_nodes
from evocert.bounds.layers import Layer, Linear, Residual, Shape
from evocert.bounds.margins import pair_differences
from evocert.bounds.nonlinear import Relaxed


class Box(NamedTuple):
    """The inputs that a bound is about: ``lower <= x <= upper``, each ``[B, C, H, W]`` in [0, 1] pixels."""

    lower: Tensor
    upper: Tensor

    @property
    def centred(self) -> tuple[Tensor, Tensor]:
        """Centre and radius, each ``[1, B, C, H, W]``."""
        lower, upper = self.lower.unsqueeze(0), self.upper.unsqueeze(0)
        return (lower + upper) / 2, (upper - lower) / 2


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

    def bind(self, parameters: Tensor, chunk_parts: int = 1) -> "Members":
        """The networks of some members: ``parameters [P, D]``; ``chunk_parts`` as of ``Tile``."""
        return Members(self, parameters, chunk_parts)

    def logits(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Parameters ``[P, D]``, images ``[B, C, H, W]`` -> logits ``[P, B, K]``."""
        return self.bind(parameters).logits(images)

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """Every layer, those of residual blocks before the blocks themselves."""
        return tuple(_unfolded(self.layers))


def _unfolded(layers: tuple[Layer, ...]) -> Iterator[Layer]:
    for layer in layers:
        if isinstance(layer, Residual):
            yield from _unfolded(layer.body)
            yield from _unfolded(layer.shortcut)
        yield layer


class Members:
    """P networks of one architecture, bound to their parameters: the work that all images of a member share is done.

    Attributes:
        nodes: the bound layers, in the order in which they run.
    """

    def __init__(self, network: Network, parameters: Tensor, chunk_parts: int = 1) -> None:
        self.network, self.parameters, self.chunk_parts = network, parameters, chunk_parts
        self._pair_differences: Tensor | None = None
        self.nodes: list[Node] = [layer.bind(parameters) for layer in network.layers]

    def __len__(self) -> int:
        return len(self.parameters)

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[P, B, K]``."""
        x = forward(self.nodes, images.unsqueeze(0))
        return x.expand(len(self), *x.shape[1:])

    # A normalisation at the front is applied to the box itself, in which it loses nothing: no bound need go through it.

    @property
    def inner(self) -> list[Node]:
        """The nodes behind the normalisation."""
        return self.nodes[self._leading :]

    @property
    def hidden(self) -> list[Node]:
        """The inner nodes up to the last that is not affine."""
        nodes = self.inner
        last = max((i for i, node in enumerate(nodes) if not isinstance(node, Affine)), default=-1)
        return nodes[: last + 1]

    @property
    def relaxed(self) -> list[Relaxed]:
        """The nodes that are not affine, in the order in which they run; in a residual block the body's first."""
        return list(relaxed_nodes(self.nodes))

    def entered(self, box: Box) -> tuple[Tensor, Tensor]:
        """A box's centre and radius behind the normalisation, each ``[1, B, C, H, W]``."""
        centre, radius = box.centred
        for node in self.nodes[: self._leading]:
            assert isinstance(node, BoundNormalize)
            centre, radius = node.affine(centre), node.magnitude(radius)
        return centre, radius

    @cached_property
    def _leading(self) -> int:
        return next((i for i, node in enumerate(self.nodes) if not isinstance(node, BoundNormalize)), len(self.nodes))

    @cached_property
    def last_linear(self) -> BoundDense | None:
        """The last layer if the margins can be folded into it, otherwise nothing."""
        last = self.nodes[-1]
        return last if isinstance(self.network.layers[-1], Linear) and isinstance(last, BoundDense) else None

    @property
    def pair_differences(self) -> Tensor:
        """``|W_i - W_j|`` of the last layer, for each pair of classes: ``[P, pairs, F]``. Kept where it has no gradient."""
        assert self.last_linear is not None
        weight = self.last_linear.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return pair_differences(weight)
        if self._pair_differences is None:
            self._pair_differences = pair_differences(weight)
        return self._pair_differences
