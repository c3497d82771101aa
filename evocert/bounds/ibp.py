"""Interval bound propagation: an interval for every neuron, carried as centre and radius.

Gowal et al. 2018, arXiv:1810.12715, equations 4 to 6; Mirman et al. 2018 (ICML), the Box domain. With z = W x + b, centre c
and radius r: c' = W c + b, r' = |W| r; a monotone activation maps the ends. The margins are folded into the last layer.
Costs two forward passes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from evocert.bounds.affine import Affine, Node, dense_product
from evocert.bounds.chain import BoundResidual
from evocert.bounds.margins import logit_margins, margins_between, rival_entries
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import Relaxed, centred, passed

Interval = tuple[Tensor, Tensor]
# (activation, what leads to it, centre and radius before it) -> centre and radius after it
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
    logits = centre if last is None else last.affine(centre)
    return logit_margins(logits, labels) - margin_radius(members, radius, labels)


def margin_radius(members: Members, radius: Tensor, labels: Tensor) -> Tensor:
    """How far margins are from those at the centre: ``|W_y - W_j| r``, or ``r_y + r_j`` where there is no last linear layer.

    Args:
        members: P bound networks.
        radius: before the last layer if it is linear, else of the logits, ``[1 or P, B, ...]``.
        labels: ``[B]``.

    Returns:
        ``[P, B, M]``.
    """
    if members.last_linear is None:
        radius = radius.expand(len(members), -1, -1)
        return margins_between(radius, -radius, labels)
    spread = dense_product(members.pair_differences, None, radius)  # [P, B, pairs]
    return rival_entries(spread, labels, members.network.num_classes)


def propagate(
    nodes: Sequence[Node], centre: Tensor, radius: Tensor, visit: Visit | None = None, path: Sequence[Node] = ()
) -> tuple[Tensor, Tensor]:
    """Intervals through a chain of nodes.

    Args:
        nodes: as they follow each other.
        centre, radius: of the interval before them, ``[1 or P, B, ...]``.
        visit: passes the activations, in the order in which they run.
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
            if visit is None:
                centre, radius = centred(*node.ends(centre - radius, centre + radius))
            else:
                centre, radius = visit(node, path, centre, radius)
        elif isinstance(node, Affine):
            centre, radius = node.affine(centre), node.magnitude(radius)
        path.append(node)
    return centre, radius


def intervals(members: Members, box: Box) -> list[Interval]:
    """Lower and upper bounds before each activation, in the order in which they run, each ``[1 or P, B, ...]``."""
    found: list[Interval] = []

    def visit(node: Relaxed, path: Sequence[Node], centre: Tensor, radius: Tensor) -> Interval:
        found.append((centre - radius, centre + radius))
        return passed(node, *found[-1])

    propagate(members.hidden, *members.entered(box), visit)
    return found
