"""Hybrid zonotopes: a box around a zonotope of the input's generators, and back to a box where an activation is undecided.

Mirman et al. 2018 (ICML), "Differentiable abstract interpretation for provably robust neural networks" (DiffAI), section 4: the
hybrid zonotope domain with the zBox transformer. An element is ``centre + G e + diag(beta) b`` with all e and b in [-1, 1].

    affine layer            centre W c + b,  generators W G,  beta |W| beta
    activation, a line      slope a: centre f(c),  generators diag(a) G,  beta a beta
    activation, otherwise   centre (f(u) + f(l)) / 2,  generators 0,  beta (f(u) - f(l)) / 2

The generators are those of the input's box and are kept or dropped row by row, never joined by new ones: so the part
``centre + G e`` is what back-substitution gives for lines that coincide, with slope a or 0, and no generator is written out.
beta is carried forward as the radius of an interval is. Costs what ``deeppoly`` costs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evocert.bounds import backward, ibp
from evocert.bounds.affine import Node
from evocert.bounds.backward import Relaxing
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import BoundActivation, Relaxations, Relaxed, RelaxedActivation, passed
from evocert.bounds.pooling import BoundMaxPool, below_pool
from evocert.bounds.relaxation import Lines
from evocert.bounds.rows import Rows, as_cell
from evocert.bounds.windows import Window


def margins(members: Members, box: Box, labels: Tensor) -> Tensor:
    """Lower bounds of the margins over the box ``[P, B, M]``; arguments as of ``ibp.margins``."""
    found, beta = relaxing(members, box)
    tail = members.inner[len(members.hidden) :]
    _, beta = ibp.propagate(tail if members.last_linear is None else tail[:-1], found.last, beta)
    return backward.margins(members, box, labels, found) - ibp.margin_radius(members, beta, labels)


def relaxing(members: Members, box: Box) -> tuple[Relaxing, Tensor]:
    """Every activation kept or dropped, and beta after the last of them, ``[1 or P, B, ...]``."""
    found: Relaxations = {}
    substitution = backward.Substitution(members, box, found)

    def visit(node: Relaxed, path: Sequence[Node], centre: Tensor, beta: Tensor) -> ibp.Interval:
        lower, upper = substitution.interval(path, centre)
        lower, upper = lower - beta, upper + beta
        middle, half = passed(node, lower, upper)
        line = node.decided(lower, upper)
        if line is None:
            found[node] = Dropped(node, (lower, upper))
            return middle, half
        assert isinstance(node, BoundActivation)
        # Over a line the two slopes are one. The rule "adaptive" makes a constant of it, whatever the interval.
        slope = node.activation.relax(lower, upper, "adaptive", *node.arguments).lower_slope.where(line, 0.0)
        after = torch.where(line, node.forward(centre), middle)
        intercept = after - slope * centre
        lines = Lines(slope, slope, intercept, intercept)
        found[node] = RelaxedActivation(lines, (centre, after), (lower, upper))
        return after, torch.where(line, slope * beta, half)

    centre, radius = members.entered(box)
    last, beta = ibp.propagate(members.hidden, centre, torch.zeros_like(radius), visit)
    return Relaxing(found, last), beta


class Dropped:
    """A nonlinearity behind which no generator is left: rows on its output do not depend on its input.

    Args:
        node: an activation or a pooling.
        interval: lower and upper ends before it.
    """

    def __init__(self, node: Relaxed, interval: tuple[Tensor, Tensor]) -> None:
        self.node, self.interval = node, interval

    def back(self, rows: Rows) -> Rows:
        """Rows whose coefficients are zero. Constants stay: the reference value after it is the middle of its image."""
        terms, shape = rows.terms, self.node.input_shape
        window = None if rows.window is None else self.below(rows.window)
        cell = as_cell(terms.new_empty(shape), shape).shape if window is None else (*window.kernel, shape[0])
        zeros = terms.new_zeros(*terms.shape[:4], *cell)
        return replace(rows, coefficients=zeros, shape=shape, window=window, clean=True)

    def below(self, window: Window) -> Window:
        """As of ``Affine``."""
        return below_pool(self.node, window) if isinstance(self.node, BoundMaxPool) else window
