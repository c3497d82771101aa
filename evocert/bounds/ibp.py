"""Interval bound propagation: an interval for every neuron, carried as centre and radius.

Gowal et al. 2018, arXiv:1810.12715, equations 4 to 6; Mirman et al. 2018 (ICML), the Box domain. With z = W x + b, centre c
and radius r: c' = W c + b, r' = |W| r; a monotone activation maps the ends. The margins are folded into the last layer.
Costs two forward passes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evocert.bounds.affine import Affine, Node, dense_product
from evocert.bounds.margins import logit_margins, margins_between, rival_entries
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import BoundResidual, Relaxed

Interval = tuple[Tensor, Tensor]
# (activation, what leads to it, lower and upper before it) -> the interval to go on with
Visit = Callable[[Relaxed, Sequence[Node], Tensor, Tensor], Interval]


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
    nodes = members.inner if last is None else members.inner[:-1]
    centre, radius = propagate(nodes, *members.entered(box))
    if last is None:  # nothing to fold the difference into: the label's lower end against the rivals' upper ends
        return margins_between((centre - radius).expand(len(members), -1, -1), centre + radius, labels)
    spread = dense_product(members.pair_differences, None, radius)  # [P, B, pairs]
    return logit_margins(last.affine(centre), labels) - rival_entries(spread, labels, members.network.num_classes)


def propagate(
    nodes: Sequence[Node], centre: Tensor, radius: Tensor, visit: Visit | None = None, path: Sequence[Node] = ()
) -> tuple[Tensor, Tensor]:
    """Intervals through a chain of nodes.

    Args:
        nodes: as they follow each other.
        centre, radius: of the interval before them, ``[1 or P, B, ...]``.
        visit: sees the interval before each activation, in the order in which they run, and may give another.
        path: what leads to the first node.

    Returns:
        Centre and radius ``[1 or P, B, ...]`` after them.
    """
    path = list(path)
    for node in nodes:
        if isinstance(node, BoundResidual):
            one, other = (propagate(part, centre, radius, visit, path) for part in (node.body, node.shortcut))
            centre, radius = one[0] + other[0], one[1] + other[1]
        elif isinstance(node, Relaxed):
            lower, upper = centre - radius, centre + radius
            if visit is None:
                lower, upper = node.ends(lower, upper)
            else:
                lower, upper = (node.forward(end) for end in visit(node, path, lower, upper))
            centre = torch.lerp(lower, upper, 0.5)
            radius = upper - centre
        elif isinstance(node, Affine):
            centre, radius = node.affine(centre), node.magnitude(radius)
        path.append(node)
    return centre, radius
