"""Bounds on the margins of a whole population of networks: pure functions on tensors.

A new bound is one file with a function ``margins(members, box, labels) -> [P, B, M]`` and one line in ``BOUNDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evocert.bounds import alpha_crown, backward, cost, crown_ibp, deeppoly, ibp
from evocert.bounds.cost import Cost
from evocert.bounds.layers import Layer
from evocert.bounds.margins import logit_margins
from evocert.bounds.network import Box, Members, Network, box_around
from evocert.bounds.read import UnsupportedLayer, read_network
from evocert.bounds.tiles import (
    Tile,
    choose_tile,
    give_threads_to_tiles,
    over_tiles,
    value_and_gradient,
    worker_count,
)


@dataclass(frozen=True)
class Bound:
    """One way to bound margins.

    Attributes:
        margins: the bound on one tile, (members, box, labels) -> ``[P, B, M]``.
        cost: what it takes of memory for a network, and on which device, from which tiles are chosen.
    """

    margins: Callable[[Members, Box, Tensor], Tensor]
    cost: Callable[[Network, torch.device], Cost]

    def __call__(
        self, network: Network, parameters: Tensor, box: Box, labels: Tensor, *, tile: Tile | None = None
    ) -> Tensor:
        """Parameters ``[P, D]``, box ``[B, C, H, W]`` twice, labels ``[B]`` -> lower bounds of the margins ``[P, B, M]``.

        Computes in the dtype and on the device of the arguments. Differentiable. ``tile`` bounds the memory.

        Raises:
            ValueError: shapes that do not fit the network or each other, an empty box (lower > upper), NaN, or labels that are
                no classes.
        """
        _check(network, parameters, box, labels)

        def on_tile(members: Members, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
            return self.margins(members, Box(lower, upper), labels)

        return over_tiles(on_tile, network, parameters, (box.lower, box.upper, labels), tile)


def _intervals(network: Network, device: torch.device) -> Cost:
    return cost.of_intervals(network)


def _margins(network: Network, device: torch.device) -> Cost:
    return cost.of_margins(network)


def _substitution(network: Network, device: torch.device) -> Cost:
    return cost.of_substitution(network, backward.chunk_memory(device))


def _optimised(network: Network, device: torch.device) -> Cost:
    return cost.of_optimisation(network, backward.chunk_memory(device))


def _check(network: Network, parameters: Tensor, box: Box, labels: Tensor) -> None:
    if parameters.ndim != 2 or parameters.shape[1] != network.num_parameters:
        raise ValueError(f"parameters of shape {list(parameters.shape)}: allowed is [P, {network.num_parameters}]")
    for name, end in (("lower", box.lower), ("upper", box.upper)):
        if tuple(end.shape[1:]) != network.input_shape:
            raise ValueError(
                f"box.{name} of shape {list(end.shape)}: allowed is [B, {', '.join(map(str, network.input_shape))}]"
            )
    if labels.ndim != 1 or not len(box.lower) == len(box.upper) == len(labels):
        lengths = f"{len(box.lower)}, {len(box.upper)} and {list(labels.shape)}"
        raise ValueError(f"box.lower, box.upper and labels of {lengths}: allowed is one label for each box")
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= network.num_classes)).any()):
        raise ValueError(
            f"labels {labels.tolist()[:10]}: allowed are whole numbers from 0 to {network.num_classes - 1}"
        )
    if not bool((box.lower <= box.upper).all()):  # NaN is not
        raise ValueError("box.lower > box.upper, or NaN, in some pixel: allowed is lower <= upper")


BOUNDS: dict[str, Bound] = {
    "ibp": Bound(ibp.margins, _intervals),
    "crown-ibp": Bound(crown_ibp.margins, _margins),
    "deeppoly": Bound(deeppoly.margins, _substitution),
    "deeppoly-sparse": Bound(partial(deeppoly.margins, sparse=True), _substitution),
    "deeppoly-intersect": Bound(partial(deeppoly.margins, intersect=True), _substitution),
    "crown-zero": Bound(partial(deeppoly.margins, slope="zero"), _substitution),
    "crown-one": Bound(partial(deeppoly.margins, slope="one"), _substitution),
    "crown-same-slope": Bound(partial(deeppoly.margins, slope="same"), _substitution),
    "alpha-crown": Bound(alpha_crown.margins, _optimised),
}

__all__ = [
    "BOUNDS",
    "Bound",
    "Box",
    "Cost",
    "Layer",
    "Members",
    "Network",
    "Tile",
    "UnsupportedLayer",
    "box_around",
    "choose_tile",
    "give_threads_to_tiles",
    "logit_margins",
    "over_tiles",
    "read_network",
    "value_and_gradient",
    "worker_count",
]
