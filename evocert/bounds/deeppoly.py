"""DeepPoly: the interval of every activation by back-substitution to the input, then the margins by one more.

Singh et al. 2019 (POPL), "An abstract domain for certifying neural networks"; the same bounds as CROWN with the adaptive lower
slope (Zhang et al. 2018, arXiv:1811.00866). The first layer's intervals are exact by interval propagation. Its gradient
takes the choice of the lower slope as constant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evocert.bounds import backward, ibp
from evocert.bounds.affine import BoundDense, Entrywise, Node
from evocert.bounds.backward import Relaxing
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import Relaxations, Relaxed


def margins(
    members: Members,
    box: Box,
    labels: Tensor,
    *,
    slope: str = "adaptive",
    sparse: bool = False,
    intersect: bool = False,
) -> Tensor:
    """Lower bounds of the margins over the box ``[P, B, M]``; arguments as of ``ibp.margins``.

    Args:
        slope: how the free slope of an activation's lower line is chosen, one of ``relaxation.SLOPES``.
        sparse: back-substitute only neurons that an interval of one layer leaves undecided; the others keep that interval.
        intersect: take the tighter of the back-substituted end and that of the one-layer interval, neuron by neuron.
    """
    found = relaxing(members, box, slope, sparse=sparse, intersect=intersect)
    bounds = backward.margins(members, box, labels, found)
    return torch.maximum(bounds, ibp.margins(members, box, labels)) if intersect else bounds


def relaxing(
    members: Members,
    box: Box,
    slope: str = "adaptive",
    *,
    sparse: bool = False,
    intersect: bool = False,
) -> Relaxing:
    """Every activation relaxed over its back-substituted interval."""
    found: Relaxations = {}
    substitution = backward.Substitution(members, box, found)

    def visit(node: Relaxed, path: Sequence[Node], centre: Tensor, radius: Tensor) -> ibp.Interval:
        lower, upper = centre - radius, centre + radius
        if not _exact(path):
            decided = node.decided(lower, upper) if sparse else None
            if decided is None:
                below, above = substitution.interval(path, centre)
            else:
                below, above = substitution.refined(path, centre, (lower, upper), ~decided)
            if intersect:
                below, above = torch.maximum(below, lower), torch.minimum(above, upper)
            lower, upper = below, above
        after, found[node] = node.relaxed(lower, upper, centre, slope)
        return after

    last, _ = ibp.propagate(members.hidden, *members.entered(box), visit)
    return Relaxing(found, last)


def _exact(path: Sequence[Node]) -> bool:
    """Whether interval propagation is exact: at most one layer mixes inputs, and all others work on each entry alone."""
    mixing = [node for node in path if not isinstance(node, Entrywise)]
    return not mixing or (len(mixing) == 1 and isinstance(mixing[0], BoundDense | BoundConvolution))
