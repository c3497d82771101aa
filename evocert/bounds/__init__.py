"""Bounds on the margins of a whole population of networks: pure functions on tensors.

A new bound is one file with a function ``margins(members, box, labels) -> [P, B, M]`` and one line in ``BOUNDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from evocert.bounds import ibp
from evocert.bounds.layers import Layer
from evocert.bounds.margins import logit_margins
from evocert.bounds.network import Box, Members, Network, box_around
from evocert.bounds.read import UnsupportedLayer, read_network
from evocert.bounds.tiles import Tile, choose_tile, give_threads_to_tiles, over_tiles, worker_count


@dataclass(frozen=True)
class Bound:
    """One way to bound margins.

    Attributes:
        margins: the bound on one tile, (members, box, labels) -> ``[P, B, M]``.
        floats_per_pair: numbers that live at once for one member and image, from which tiles are chosen.
    """

    margins: Callable[[Members, Box, Tensor], Tensor]
    floats_per_pair: Callable[[Network], int]

    def __call__(
        self, network: Network, parameters: Tensor, box: Box, labels: Tensor, *, tile: Tile | None = None
    ) -> Tensor:
        """Parameters ``[P, D]``, box ``[B, C, H, W]`` twice, labels ``[B]`` -> lower bounds of the margins ``[P, B, M]``.

        Computes in the dtype and on the device of the arguments. Differentiable. ``tile`` bounds the memory.
        """

        def on_tile(members: Members, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
            return self.margins(members, Box(lower, upper), labels)

        return over_tiles(on_tile, network, parameters, (box.lower, box.upper, labels), tile)


BOUNDS: dict[str, Bound] = {
    "ibp": Bound(ibp.margins, lambda network: network.floats_per_pair),
}

__all__ = [
    "BOUNDS",
    "Bound",
    "Box",
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
    "worker_count",
]
