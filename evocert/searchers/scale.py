"""How sigma is shared out among the parameters."""

import math
from collections.abc import Iterator, Sequence

import torch
from evotorch import Problem
from torch import Tensor

from evocert.bounds import Layer, Network
from evocert.bounds.layers import Residual, Slot
from evocert.errors import InputError


def by_use(problem: Problem, exponent: float) -> Tensor:
    """Factors on sigma, ``1 / uses^exponent``: a convolution uses a weight at every place of its output, a linear layer once.

    Noise of a shared weight adds up over its places. At one sigma for all (exponent 0, as in arXiv:2403.07095) it is the
    convolutions' noise that bends the loss, and that hides from PGPE what the far more numerous weights of linear layers do.

    Returns:
        ``[D]``, or ``[1]`` where all are alike; on the problem's device, in its dtype.

    Raises:
        InputError: an exponent outside [0, 1].
    """
    if not 0 <= exponent <= 1:
        raise InputError(f"stdev_by_use={exponent}: allowed is 0 to 1")
    ones = torch.ones(1, dtype=problem.dtype, device=problem.device)
    return uses(problem.network).to(ones) ** -exponent if exponent else ones


def uses(network: Network) -> Tensor:
    """At how many places of its layer's output each parameter is used: ``[D]``."""
    counts = torch.ones(network.num_parameters)
    for layer in _layers(network.layers):
        for slot in vars(layer).values():
            if isinstance(slot, Slot):
                counts[slot.offset : slot.offset + math.prod(slot.shape)] = (
                    math.prod(layer.output_shape) / slot.shape[0]
                )
    return counts


def _layers(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All that may have parameters, also within residual blocks."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from _layers([*layer.body, *layer.shortcut])
        else:
            yield layer
