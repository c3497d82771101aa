"""Chains of bound nodes, and residual blocks, which hold two: forward, and rows back through them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds import compiled
from evocert.bounds.affine import Affine, Node
from evocert.bounds.compiled import Parts
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.nonlinear import Relaxations, Relaxed, RelaxedActivation
from evocert.bounds.rows import Form, Rows, Shape
from evocert.bounds.windows import Window


class BoundResidual(Node):
    """``body(x) + shortcut(x)``."""

    def __init__(self, body: Sequence[Node], shortcut: Sequence[Node], input_shape: Shape) -> None:
        self.body, self.shortcut, self.input_shape = list(body), list(shortcut), input_shape

    def forward(self, x: Tensor) -> Tensor:
        return forward(self.body, x) + forward(self.shortcut, x)

    def back(self, rows: Rows, relaxations: Relaxations) -> Rows:
        """Rows on the output -> rows on the input."""
        one = back(rows, self.body, relaxations)
        other = back(replace(rows, constant=torch.zeros_like(rows.constant)), self.shortcut, relaxations)
        return _sum(one, other)


def forward(nodes: Sequence[Node], x: Tensor) -> Tensor:
    """What a chain of nodes makes of values ``[1 or P, B, ...]``."""
    for node in nodes:
        x = node.forward(x)
    return x


def relaxed_nodes(nodes: Sequence[Node]) -> Iterator[Relaxed]:
    """The nodes in a chain that are not affine, also those in residual blocks."""
    for node in nodes:
        if isinstance(node, BoundResidual):
            yield from relaxed_nodes([*node.body, *node.shortcut])
        elif isinstance(node, Relaxed):
            yield node


def back(rows: Rows, nodes: Sequence[Node], relaxations: Relaxations) -> Rows:
    """Rows on the output of a chain of nodes -> rows on its input."""
    rest = list(nodes)
    while rest:
        if (together := _together(rows, rest, relaxations)) is not None:
            rows, count = together
            del rest[-count:]
            continue
        node = rest.pop()
        if isinstance(node, BoundResidual):
            rows = node.back(rows, relaxations)
        elif isinstance(node, Relaxed):
            rows = relaxations[node].back(rows)
        elif isinstance(node, Affine):
            rows = node.back(rows)
    return rows


def _together(rows: Rows, nodes: Sequence[Node], relaxations: Relaxations) -> tuple[Rows, int] | None:
    """Rows on the output of a chain -> those on the input of its last few nodes, and how many these are.

    They are a convolution and the activations behind and before it, as far as there are any. None where they are not, or where
    nothing is gained by taking them together.
    """
    above = _activation(nodes[-1], relaxations)
    end = len(nodes) - (above is not None)
    node = nodes[end - 1] if end else None
    if not isinstance(node, BoundConvolution) or rows.window is not None or rows.coefficients is None:
        return None
    if not compiled.usable(rows.coefficients, rows.constant, node.kernels):
        return None
    relaxable = rows.form is Form.LOWER or not rows.both or (rows.form is Form.PAIR and above is not None)
    parts = parts_below = None
    if above is not None:
        parts = above.seen(rows)
        if not relaxable or not _can_take(parts, rows.terms):  # of EXACT rows it makes a PAIR
            return None
    # Those that are off have a mean slope of zero. Others may have one too, which the loops take all the same: this only
    # estimates what is faster.
    terms = rows.terms
    if not node.sparse_pays(lambda: compiled.share_of_nonzero(terms if parts is None else parts[0])):
        return None
    if relaxable:
        rows = rows.lowered()
    below = _activation(nodes[end - 2], relaxations) if end > 1 and relaxable else None
    if below is not None:
        seen = below.seen(replace(rows, shape=node.input_shape))
        parts_below = seen if _can_take(seen, terms) else None
    rows = node.back_sparsely(rows, parts, parts_below)
    return rows, 1 + (parts is not None) + (parts_below is not None)


def _activation(node: Node, relaxations: Relaxations) -> RelaxedActivation | None:
    """The relaxation of an activation, if it does no more than relax: heirs may keep what passes them."""
    relaxation = relaxations[node] if isinstance(node, Relaxed) else None
    return relaxation if type(relaxation) is RelaxedActivation else None


def _can_take(parts: Parts, terms: Tensor) -> bool:
    """Whether ``compiled`` can take a relaxation: each image and position has one of its own, which all its rows share."""
    return compiled.usable(*parts) and parts[0].shape[1:4] == (*terms.shape[1:3], 1)


def _sum(one: Rows, other: Rows) -> Rows:
    """Rows on the same values, added."""
    if Form.LOWER in (one.form, other.form):
        one, other = one.lowered(), other.lowered()
    elif Form.PAIR in (one.form, other.form):
        one, other = one.paired(), other.paired()
    if one.window != other.window:
        one, other = _aligned(one, other)
    terms = one.terms + other.terms
    return replace(one, coefficients=terms, constant=one.constant + other.constant, clean=one.clean and other.clean)


def _aligned(one: Rows, other: Rows) -> tuple[Rows, Rows]:
    """Both on windows that hold the two, or both on the whole map."""
    if one.window is None or other.window is None or one.window.stride != other.window.stride:
        return one.whole(), other.whole()
    first, second = one.window, other.window
    offset = tuple(min(a, b) for a, b in zip(first.offset, second.offset, strict=True))
    end = tuple(max(a.offset[i] + a.kernel[i] for a in (first, second)) for i in range(2))
    window = Window((end[0] - offset[0], end[1] - offset[1]), first.stride, (offset[0], offset[1]), first.positions)
    return _within(one, window), _within(other, window)


def _within(rows: Rows, window: Window) -> Rows:
    own = rows.window
    assert own is not None
    top, left = own.offset[0] - window.offset[0], own.offset[1] - window.offset[1]
    bottom, right = window.kernel[0] - top - own.kernel[0], window.kernel[1] - left - own.kernel[1]
    terms = F.pad(rows.terms, (0, 0, left, right, top, bottom))
    return replace(rows, coefficients=terms, window=window)
