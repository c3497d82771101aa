"""What a bound takes of memory, by counting: from this tiles are chosen."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from evocert.bounds.layers import Activation, Conv2d, Layer, Linear, MaxPool2d
from evocert.bounds.network import Network


@dataclass(frozen=True)
class Cost:
    """Numbers that live at once, in the precision of the bound.

    Attributes:
        pair: for each member and image of a tile.
        member: for each member of a tile, whatever the images: its weights, bound.
        chunk: for each tile, whatever its size.
        alone: whether on a CPU a tile is best of one member: its images are enough rows for a product. Such a tile may have any
            number of images.
    """

    pair: int
    member: int
    chunk: int = 0
    alone: bool = False

    @classmethod
    def most(cls, costs: Iterable["Cost"]) -> "Cost":
        """What suffices for each of some bounds, one after the other."""
        costs = list(costs)
        pair, member, chunk = (max(getattr(cost, name) for cost in costs) for name in ("pair", "member", "chunk"))
        return cls(pair, member, chunk, any(cost.alone for cost in costs))


def of_intervals(network: Network) -> Cost:
    """Interval propagation: what lives while an interval passes the widest layer.

    Centre and radius, in and out; lower and upper before the activation; and for a convolution the copies in blocked memory
    order that the kernels make of input and output.
    """
    widest = max(4 * (prod(layer.input_shape) + prod(layer.output_shape)) for layer in network.all_layers)
    # The last layer: centre and radius in, the spread of each pair of classes, margins and what they are made of.
    last, pairs = network.layers[-1], network.num_classes * (network.num_classes - 1) // 2
    at_the_end = 2 * prod(last.input_shape) + pairs + 6 * network.num_classes
    # Weights and their absolute values, dense matrices, class pairs.
    member = 2 * network.num_parameters + sum(map(_matrix, network.all_layers))
    member += 3 * pairs * prod(last.input_shape) if isinstance(last, Linear) else 0
    return Cost(max(widest, at_the_end), member)


def of_margins(network: Network) -> Cost:
    """Back-substitution of the margins: the relaxations, and the rows before and behind a layer with what they are made of."""
    intervals = of_intervals(network)
    relaxed = sum(prod(layer.input_shape) for layer in network.all_layers if isinstance(layer, Activation | MaxPool2d))
    margins = network.num_classes - 1
    rows = max(margins * (3 * prod(layer.output_shape) + 4 * prod(layer.input_shape)) for layer in network.all_layers)
    return Cost(intervals.pair + 9 * relaxed + rows, intervals.member, alone=True)


def of_substitution(network: Network, chunk: int) -> Cost:
    """Back-substitution of every layer in chunks, and what chunks share: the cut slopes, and strips of the kernels.

    ``chunk``: numbers that work on one chunk takes.
    """
    margins = of_margins(network)
    pair = member = 0
    for layer in network.all_layers:
        if isinstance(layer, Conv2d) and not layer.dense:
            cell = prod(layer.weight.shape[2:]) * layer.input_shape[0]
            pair = max(pair, 5 * prod(layer.output_shape[1:]) * cell + 8 * prod(layer.output_shape))
            member += 4 * layer.output_shape[0] * cell
    return Cost(margins.pair + pair, margins.member + member, chunk, alone=True)


def of_optimisation(network: Network, chunk: int) -> Cost:
    """Back-substitution of every layer, then slopes of each margin's own, and the graph through the margins' rows."""
    substitution = of_substitution(network, chunk)
    margins = network.num_classes - 1
    relaxed = sum(prod(layer.input_shape) for layer in network.all_layers if isinstance(layer, Activation))
    rows = sum(3 * margins * prod(layer.output_shape) for layer in network.all_layers)
    return Cost(
        substitution.pair + rows + 14 * margins * relaxed, 2 * substitution.member, substitution.chunk, alone=True
    )


def _matrix(layer: Layer) -> int:
    return 2 * prod(layer.input_shape) * prod(layer.output_shape) if isinstance(layer, Conv2d) and layer.dense else 0
