"""Bounds on the margins of a whole population of networks: pure functions on tensors.

A new bound is one file with a function ``margins(members, box, labels) -> [P, B, M]`` and one line in ``BOUNDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evocert.bounds import alpha_crown, backward, cost, crown_ibp, deeppoly, hbox, ibp
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
        intermediate: the intervals on which the margins rest, (members, box) -> lower and upper bounds of what each activation
            is given, in the order in which they run.
        differentiable: whether the margins have gradients, which methods other than evolution ask for.
    """

    margins: Callable[[Members, Box, Tensor], Tensor]
    cost: Callable[[Network, torch.device], Cost]
    intermediate: Callable[[Members, Box], list[ibp.Interval]]
    differentiable: bool = True

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

    def intervals(self, network: Network, parameters: Tensor, box: Box) -> list[ibp.Interval]:
        """Parameters ``[P, D]``, box ``[B, C, H, W]`` twice -> for each activation lower and upper bounds of its input.

        Each ``[P, B, ...]``, or ``[1, B, ...]`` where the members share it; in the order in which the activations run, in a
        residual block the body's first. Differentiable; everything at once, so cut large populations.

        Raises:
            ValueError: as a call.
        """
        _check(network, parameters, box, box.lower.new_zeros(len(box.lower), dtype=torch.long))
        return self.intermediate(network.bind(parameters), box)


def _deeppoly(**settings: Any) -> Bound:
    def intermediate(members: Members, box: Box) -> list[ibp.Interval]:
        return deeppoly.relaxing(members, box, **settings).intervals

    return Bound(partial(deeppoly.margins, **settings), _substitution, intermediate)


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
    "ibp": Bound(ibp.margins, _intervals, ibp.intervals),
    "crown-ibp": Bound(crown_ibp.margins, _margins, lambda members, box: crown_ibp.relaxing(members, box).intervals),
    "deeppoly": _deeppoly(),
    "deeppoly-sparse": _deeppoly(sparse=True),
    "deeppoly-intersect": _deeppoly(intersect=True),
    "crown-zero": _deeppoly(slope="zero"),
    "crown-one": _deeppoly(slope="one"),
    "crown-same-slope": _deeppoly(slope="same"),
    # The zonotopes of Singh et al. 2018, and the same bound as the one above: there a relaxed neuron is slope x + middle +
    # radius e with an e of its own; what e weighs in a later neuron is the coefficient that the later neuron's row has here.
    "deepz": _deeppoly(slope="same"),
    "hbox": Bound(hbox.margins, _substitution, lambda members, box: hbox.relaxing(members, box)[0].intervals),
    "alpha-crown": Bound(
        alpha_crown.margins, _optimised, lambda members, box: deeppoly.relaxing(members, box).intervals
    ),
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
