"""How sigma is shared out among the parameters. A new way is one function and one line in ``STDEV_SCALES``."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from evotorch import Problem
from torch import Tensor

from evocert.bounds import Layer, Network
from evocert.bounds.layers import Residual, Slot
from evocert.settings import check_choice


def uniform(network: Network) -> Tensor:
    """The same for all, as in arXiv:2403.07095."""
    return torch.ones(network.num_parameters)


def by_use(network: Network) -> Tensor:
    """``1 / sqrt(uses)``: a convolution's weights are used at every place of its output, a linear layer's once.

    Noise of a shared weight adds up over its places. At one sigma for all it is the convolutions' noise that bends the loss,
    and that hides what the far more numerous weights of linear layers do.
    """
    scale = torch.ones(network.num_parameters)
    for layer in _layers(network.layers):
        for slot in vars(layer).values():
            if isinstance(slot, Slot):
                uses = math.prod(layer.output_shape) / slot.shape[0]
                scale[slot.offset : slot.offset + math.prod(slot.shape)] = uses**-0.5
    return scale


STDEV_SCALES: dict[str, Callable[[Network], Tensor]] = {"uniform": uniform, "by-use": by_use}


def scale_of(problem: Problem, name: str) -> Tensor:
    """A way's factors on sigma: ``[D]``, or ``[1]`` where all are alike; on the problem's device, in its dtype.

    Raises:
        InputError: no such way.
    """
    check_choice("stdev_scale", name, STDEV_SCALES)
    ones = torch.ones(1, dtype=problem.dtype, device=problem.device)
    return ones if name == "uniform" else STDEV_SCALES[name](problem.network).to(ones)


def _layers(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All that may have parameters, also within residual blocks."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from _layers([*layer.body, *layer.shortcut])
        else:
            yield layer
