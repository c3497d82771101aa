"""Interval bound propagation: an interval for every neuron, carried as centre and radius.

Gowal et al. 2018, arXiv:1810.12715, equations 4 to 6; Mirman et al. 2018 (ICML), the Box domain. With z = W x + b, centre c
and radius r: c' = W c + b, r' = |W| r; a monotone activation maps the ends. The margins are folded into the last layer.
Costs two forward passes.
"""

import torch
from torch import Tensor

from evocert.bounds.layers import Activation, Flatten, dense_product
from evocert.bounds.margins import logit_margins, margins_between, rival_entries
from evocert.bounds.network import Box, Members
from evocert.bounds.relaxation import ACTIVATIONS


def margins(members: Members, box: Box, labels: Tensor) -> Tensor:
    """Lower bounds of the margins over the box.

    Args:
        members: P bound networks.
        box: B boxes, each end ``[B, C, H, W]`` in [0, 1] pixels.
        labels: ``[B]``, the class y of each box.

    Returns:
        ``[P, B, M]``: lower bounds of logit[y] - logit[j] for the rivals j in rising order.
    """
    last = members.last_linear
    centre, radius = _interval(members, box, stop_before_last=last is not None)
    if last is None:  # nothing to fold the difference into: the label's lower end against the rivals' upper ends
        return margins_between((centre - radius).expand(len(members), -1, -1), centre + radius, labels)
    spread = dense_product(members.pair_differences, None, radius)  # [P, B, pairs]
    return logit_margins(last.affine(centre), labels) - rival_entries(spread, labels, members.network.num_classes)


def _interval(members: Members, box: Box, stop_before_last: bool) -> tuple[Tensor, Tensor]:
    """Centre and radius ``[1 or P, B, ...]`` of the logits, or of what the last layer takes."""
    lower, upper = box.lower.unsqueeze(0), box.upper.unsqueeze(0)
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    layers = list(members)
    for layer, bound in layers[:-1] if stop_before_last else layers:
        if bound is not None:
            centre, radius = bound.affine(centre), bound.magnitude(radius)
        elif isinstance(layer, Activation):
            activation = ACTIVATIONS[layer.name]
            lower = activation.overwrite(centre - radius, *layer.arguments)
            upper = activation.overwrite(centre + radius, *layer.arguments)
            centre = torch.lerp(lower, upper, 0.5)
            radius = upper - centre
        elif isinstance(layer, Flatten):
            centre, radius = centre.flatten(2), radius.flatten(2)
    return centre, radius
