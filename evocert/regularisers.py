"""What is added to a loss to keep training by bounds healthy."""

import torch
from torch import Tensor

from evocert.bounds import Box, Members, ibp

TOLERANCE = 0.5  # tau of Shi et al.
LEAST = 1e-12  # what is divided by


def shi(members: Members, box: Box) -> Tensor:
    """The penalty of Shi et al. 2021 (arXiv:2102.10356) on the interval bounds before each activation.

    A layer's intervals should not be more than 1 / tau times as wide as the input's, and the neurons that are proved active
    should weigh about as much as those that are proved inactive, in their means and in their squared deviations:

        (1 / (tau m)) sum_i  [tau - d_0 / d_i]+  +  [tau - balance(mean_i)]+  +  [tau - balance(variance_i)]+

    over m activations, with d the mean width, tau = 0.5, and balance(r) = min(r, 1 / r). The means are over the neurons of
    each image, not of the whole minibatch as in the paper's code, so that tiles of any size give the same sum; a balance of
    which one side has no neuron counts nothing.

    Args:
        members: P bound networks.
        box: B boxes, each end ``[B, C, H, W]`` in [0, 1] pixels.

    Returns:
        ``[P, B]``, 0 or more.
    """
    width = members.entered(box)[1].flatten(2).mean(2)  # [1, B]
    total = width.new_zeros(len(members), len(box.lower))
    found = ibp.intervals(members, box)
    for lower, upper in found:
        lower, upper = lower.flatten(2), upper.flatten(2)
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        total = total + _below(width / radius.mean(2).clamp(min=LEAST))
        active, inactive = lower > 0, upper < 0
        squares = (centre - centre.mean(2, keepdim=True)).square()
        for values in (centre.abs(), squares):
            one, other = ((values * chosen).sum(2) for chosen in (active, inactive))
            both = (one > LEAST) & (other > LEAST)
            one, other = (torch.where(both, side, torch.ones_like(side)) for side in (one, other))
            total = total + _below(torch.minimum(one / other, other / one))
    return total / (TOLERANCE * max(len(found), 1))


def _below(ratio: Tensor) -> Tensor:
    return (TOLERANCE - ratio).clamp(min=0)
