"""The floor of a bound: the multiply-adds that its structured algorithm cannot do without, over the machine's matrix rate.

Counted are products with weights, for one network and one image. Entrywise work (slopes, constants, the last step over the
box) and what all images of a member share are not, so that the floor is below any implementation of the algorithm:

- a forward pass is each layer's products, padding included; IBP's radius takes another, and K - 1 differences in the end;
- a row of a back-substitution sees a window of each map below, at most all of it. To pass a convolution it multiplies each
  coefficient by the kernel behind it: ``positions in the window * output channels * weights of an output``. Up to the first
  activation on its way a row is the same for all images;
- DeepPoly has two such rows, lower and upper, for every neuron behind the first layer; the margins have K - 1.

For CNN3 w=16 on 28x28: 1,568 neurons of the second layer see 4x4x16 entries, each of them 5x5 pixels, lower and upper:
20.1 million, and 24.5 million with the first layer and the margins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from evocert.bench.measure import rounds
from evocert.bounds import Box, Layer, Network, alpha_crown, deeppoly, ibp
from evocert.bounds.affine import Node
from evocert.bounds.layers import (
    Activation,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    Normalize,
    Pad,
    Residual,
)  # fmt: skip
from evocert.bounds.nonlinear import Relaxed, passed

Path = tuple[Layer, ...]
CPU_SIZE = 2048
GPU_SIZE = 8192


def operations(network: Network, bound: str, undecided: Sequence[float] | None = None) -> float:
    """Multiply-adds of a bound for one network and one image.

    Args:
        network: any that can be read.
        bound: a name in ``BOUNDS``.
        undecided: for "deeppoly-sparse", the share of each activation's neurons that are back-substituted, in order.
    """
    layers = network.all_layers
    places = [i for i, layer in enumerate(layers) if isinstance(layer, Activation | MaxPool2d)]
    first, last = (layers[: places[0]], layers[: places[-1]]) if places else ((), ())
    to_first, to_last, forward = (sum(map(_products, part)) for part in (first, last, layers))
    differences = (network.num_classes - 1) * prod(layers[-1].input_shape)
    logits = forward - to_last
    if bound == "ibp":
        return 2 * to_last + logits + differences
    margins = (network.num_classes - 1) * _back(network.layers)
    if bound == "crown-ibp":
        return 2 * to_last + margins
    rows = [0 if _exact(path) else 2 * prod(layer.input_shape) * _back(path) for path, layer in relaxed(network.layers)]
    if bound == "deeppoly-sparse":
        assert undecided is not None
        return 2 * to_last + sum(share * row for share, row in zip(undecided, rows, strict=True)) + margins
    if bound == "deeppoly-intersect":  # IBP beside it
        return 2 * to_last + logits + differences + sum(rows) + margins
    # alpha-crown: the margins with DeepPoly's slopes, and for each step with a graph, its gradient, and with the new slopes
    times = 1 + 3 * alpha_crown.STEPS if bound == "alpha-crown" else 1
    return 2 * to_first + sum(rows) + times * margins


def _products(layer: Layer) -> int:
    if isinstance(layer, Conv2d):
        return layer.multiplications
    return prod(layer.input_shape) * prod(layer.output_shape) if isinstance(layer, Linear) else 0


def relaxed(layers: Sequence[Layer], before: Path = ()) -> Iterator[tuple[Path, Layer]]:
    """Every layer that is relaxed, in the order in which they run, behind what leads to it."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from relaxed(layer.body, before)
            yield from relaxed(layer.shortcut, before)
        elif isinstance(layer, Activation | MaxPool2d):
            yield before, layer
        before = (*before, layer)


def _exact(path: Path) -> bool:
    """Whether interval propagation gives the neurons behind a path their exact intervals, and no row is needed."""
    mixing = [layer for layer in path if not isinstance(layer, Normalize | BatchNorm2d | Flatten | Pad)]
    return not mixing or (len(mixing) == 1 and isinstance(mixing[0], Conv2d | Linear))


@dataclass(frozen=True)
class _Cell:
    """What a row has coefficients on: so many positions of a map, all channels of each."""

    rows: int = 1
    columns: int = 1
    own: bool = True  # the row is still one neuron's value
    shared: bool = True  # by all images

    def below(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], layer: Layer) -> "_Cell":
        rows, columns = (
            min(size, (seen - 1) * s + d * (k - 1) + 1)
            for size, seen, k, s, d in zip(
                layer.input_shape[1:], (self.rows, self.columns), kernel, stride, dilation, strict=True
            )
        )
        return replace(self, rows=rows, columns=columns)


def _back(path: Sequence[Layer]) -> int:
    """Multiply-adds of one row from the end of a path to the input."""
    return _walk(path, _Cell())[0]


def _walk(path: Sequence[Layer], cell: _Cell) -> tuple[int, _Cell]:
    total = 0
    for layer in reversed(path):
        if isinstance(layer, Residual):
            (one, a), (other, b) = _walk(layer.body, cell), _walk(layer.shortcut, cell)
            total += one + other
            cell = _Cell(max(a.rows, b.rows), max(a.columns, b.columns), a.own and b.own, a.shared and b.shared)
        elif isinstance(layer, Conv2d):
            if not (cell.own or cell.shared):
                total += cell.rows * cell.columns * layer.output_shape[0] * prod(layer.weight.shape[1:])
            cell = replace(cell.below(layer.weight.shape[2:], layer.stride, layer.dilation, layer), own=False)
        elif isinstance(layer, Linear):
            total += 0 if cell.own or cell.shared else _products(layer)
            cell = replace(cell, own=False)
        elif isinstance(layer, Flatten):
            _, rows, columns = layer.input_shape
            cell = cell if cell.own else replace(cell, rows=rows, columns=columns)
        elif isinstance(layer, AvgPool2d | MaxPool2d):
            dilation = layer.dilation if isinstance(layer, MaxPool2d) else (1, 1)
            cell = cell.below(layer.kernel, layer.stride, dilation, layer)
        if isinstance(layer, Activation | MaxPool2d):
            cell = replace(cell, shared=False)
    return total, cell


@torch.no_grad()
def undecided(network: Network, parameters: Tensor, box: Box) -> list[float]:
    """For each activation, the share of neurons that "deeppoly-sparse" back-substitutes: its one-layer interval leaves open.

    Args:
        network: the network.
        parameters: ``[P, D]``; worked on one after another.
        box: B boxes.
    """
    shares: list[list[float]] = []
    for each in parameters:
        members = network.bind(each.unsqueeze(0))
        found = deeppoly.relaxing(members, box, sparse=True).relaxations
        shares.append([])

        def visit(node: Relaxed, path: Sequence[Node], centre: Tensor, radius: Tensor) -> ibp.Interval:
            decided = node.decided(centre - radius, centre + radius)
            shares[-1].append(1.0 if decided is None else 1 - decided.double().mean().item())
            return passed(node, *found[node].interval)  # noqa: B023 (used at once)

        ibp.propagate(members.hidden, *members.entered(box), visit)
    return torch.tensor(shares, dtype=torch.float64).mean(0).tolist()


def matrix_rate(device: torch.device) -> float:
    """Multiply-adds a second of one large float32 product, on all of torch's threads: the best of many, as it is a ceiling."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    one, other, out = (torch.ones(size, size, device=device) for _ in range(3))
    torch.mm(one, other, out=out)
    (seconds,) = rounds([lambda: torch.mm(one, other, out=out)], device, 15)
    return size**3 / min(seconds)
