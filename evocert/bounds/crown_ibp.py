"""CROWN-IBP: intervals of all activations by interval propagation, the margins by one back-substitution.

Zhang et al. 2020, arXiv:1906.06316, section 3 (with the margins' bound alone, not its mixture with IBP's).
"""

from collections.abc import Sequence

from torch import Tensor

from evocert.bounds import backward, ibp
from evocert.bounds.affine import Node
from evocert.bounds.backward import Relaxing
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import Relaxations, Relaxed


def margins(members: Members, box: Box, labels: Tensor, *, slope: str = "adaptive") -> Tensor:
    """Lower bounds of the margins over the box ``[P, B, M]``; arguments as of ``ibp.margins``.

    ``slope``: how the free slope of an activation's lower line is chosen, one of ``relaxation.SLOPES``.
    """
    return backward.margins(members, box, labels, relaxing(members, box, slope))


def relaxing(members: Members, box: Box, slope: str = "adaptive") -> Relaxing:
    """Every activation relaxed over its interval by IBP."""
    found: Relaxations = {}

    def visit(node: Relaxed, path: Sequence[Node], centre: Tensor, radius: Tensor) -> ibp.Interval:
        lower, upper = centre - radius, centre + radius
        after, found[node] = node.relaxed(lower, upper, centre, slope)
        return after

    last, _ = ibp.propagate(members.hidden, *members.entered(box), visit)
    return Relaxing(found, last)
