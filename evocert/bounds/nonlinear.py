"""What is not affine, bound to P members, and the activations among it.

Back-substitution passes an activation by its relaxation: a row takes the lower line where its coefficient is positive and the
upper line where it is negative. With m the mean and h half the difference of the two slopes (and likewise of the
intercepts), that is  A diag(m) - |A| diag(h)  (Zhang et al. 2018, arXiv:1811.00866, theorem 3.2, rearranged).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from evocert.bounds import compiled
from evocert.bounds.affine import Node
from evocert.bounds.compiled import Parts
from evocert.bounds.relaxation import ACTIVATIONS, Lines
from evocert.bounds.rows import Chosen, Form, Rows, Shape, as_cell, inner
from evocert.bounds.windows import Window

# What deviations are from, before and after a node, each ``[1 or P, B, *shape]``: see ``rows``.
Reference = tuple[Tensor, Tensor]


class Relaxation(Protocol):
    """A relaxed nonlinearity, over the intervals of some members and images."""

    interval: tuple[Tensor, Tensor]  # lower and upper ends before it, each ``[1 or P, B, *shape]``

    def back(self, rows: Rows) -> Rows:
        """Rows on its output -> rows on its input."""
        ...

    def below(self, window: Window) -> Window | None:
        """As of ``Affine``."""
        ...


class Relaxed(Node):
    """A node that is passed by a relaxation, which its interval gives."""

    def ends(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Interval in, interval out, each ``[1 or P, B, ...]``. Free to overwrite both."""
        raise NotImplementedError

    def relax(self, lower: Tensor, upper: Tensor, reference: Reference, slope: str) -> Relaxation:
        """The relaxation over an interval; slope is of ``SLOPES``."""
        raise NotImplementedError

    def relaxed(
        self, lower: Tensor, upper: Tensor, before: Tensor, slope: str
    ) -> tuple[tuple[Tensor, Tensor], Relaxation]:
        """Centre and radius after it of an interval before it, and its relaxation over that.

        ``before``: the reference values before it; those after it are the centre.
        """
        after = passed(self, lower, upper)
        return after, self.relax(lower, upper, (before, after[0]), slope)

    def decided(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Where no tighter interval would change the relaxation: bools of their shape, or None for nowhere."""
        raise NotImplementedError


Relaxations = dict[Relaxed, Relaxation]


def passed(node: Relaxed, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The centre and radius after an activation, of an interval that is kept."""
    return centred(node.forward(lower), node.forward(upper))


def centred(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of an interval."""
    centre = torch.lerp(lower, upper, 0.5)
    return centre, upper - centre


class BoundActivation(Relaxed):
    """An elementwise activation."""

    def __init__(self, name: str, arguments: tuple[float, ...], shape: Shape) -> None:
        self.activation, self.arguments, self.input_shape = ACTIVATIONS[name], arguments, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.function(x, *self.arguments)

    def ends(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.activation.overwrite(lower, *self.arguments),
            self.activation.overwrite(upper, *self.arguments),
        )

    def relax(self, lower: Tensor, upper: Tensor, reference: Reference, slope: str) -> "RelaxedActivation":
        lines = self.activation.relax(lower, upper, slope, *self.arguments)
        return RelaxedActivation(lines, reference, (lower, upper))

    def relaxed(
        self, lower: Tensor, upper: Tensor, before: Tensor, slope: str
    ) -> tuple[tuple[Tensor, Tensor], Relaxation]:
        least = self.least_slope if self.activation.piecewise else None
        if least is None or not compiled.usable(lower, upper, before):
            return super().relaxed(lower, upper, before, slope)
        after, parts = compiled.piecewise(lower, upper, before, slope, least)
        lines = partial(self.activation.relax, lower, upper, slope, *self.arguments)
        return after, RelaxedActivation(lines, (before, after[0]), (lower, upper), parts)

    @property
    def least_slope(self) -> float | None:
        """The least slope, of those up to 1, that a lower line through the origin may have; None where none is free."""
        least = self.activation.least_slope
        return None if least is None else least(*self.arguments)

    def decided(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        decided = self.activation.decided
        return None if decided is None else decided(lower, upper, *self.arguments)


class RelaxedActivation:
    """Two lines for each neuron, kept as mean and half difference of their slopes and of their offsets.

    A line's offset is what it gives at the reference value before the activation, beyond that after it: for deviations, its
    intercept.

    Args:
        lines: the relaxation.
        reference: the reference values before and after.
        interval: lower and upper ends, over which the lines hold.
        parts: those four, if they are known.
    """

    def __init__(
        self,
        lines: Lines | Callable[[], Lines],
        reference: Reference,
        interval: tuple[Tensor, Tensor],
        parts: Parts | None = None,
    ) -> None:
        self._lines, self.reference, self.interval = lines, reference, interval
        self.mean, self.half, self.offset, self.spread = parts or _parts(self.lines, reference)

    @cached_property
    def lines(self) -> Lines:
        return self._lines if isinstance(self._lines, Lines) else self._lines()

    def back(self, rows: Rows) -> Rows:
        if rows.form is Form.EXACT and rows.both and rows.chosen is None:
            return Shared(self, rows).all()
        rows = rows.lowered()
        terms = rows.terms
        parts = self.seen(rows)
        if compiled.usable(terms, rows.constant, *parts) and terms.shape[1:3] == parts[0].shape[1:3]:
            new, constant = compiled.passed(terms, rows.constant, parts)
            return replace(rows, coefficients=new, constant=constant, clean=True)
        mean, half, offset, spread = parts
        magnitude = terms.abs()
        constant = rows.constant + inner(terms, offset) - inner(magnitude, spread)
        new = (torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_)(terms * mean, magnitude, half, value=-1)
        return replace(rows, coefficients=new, constant=constant, clean=True)

    def seen(self, rows: Rows) -> Parts:
        """Mean, half, offset and spread as rows on its output see them, each ``[1 or P, I, L, 1 or Q, *cell]``."""
        return (
            self._on(rows, self.mean),
            self._on(rows, self.half),
            self._on(rows, self.offset),
            self._on(rows, self.spread),
        )

    def _on(self, rows: Rows, each: Tensor) -> Tensor:
        """As the rows see it: ``[1 or P, I, L, 1 or Q, *cell]``."""
        if each.ndim == 3 + len(rows.shape):  # for each row its own: [P, B, Q, *shape]
            own = each if rows.images is None or each.shape[1] == 1 else each[:, rows.images]
            return as_cell(own.unsqueeze(2), rows.shape)
        return rows.on(each)

    def below(self, window: Window) -> Window | None:
        return window


def _parts(lines: Lines, reference: Reference) -> Parts:
    """Mean and half difference of slopes, and of offsets."""
    before, after = reference
    mean = (lines.upper_slope + lines.lower_slope) * 0.5
    half = (lines.upper_slope - lines.lower_slope) * 0.5
    middle = (lines.upper_intercept + lines.lower_intercept) * 0.5
    apart = (lines.upper_intercept - lines.lower_intercept) * 0.5
    return mean, half, torch.addcmul(middle, mean, before) - after, torch.addcmul(apart, half, before)


class Shared:
    """EXACT rows, passed by the first relaxation on their way: all of them at once, or some that are picked.

    What all images share (the terms and their magnitudes), what all rows of a position share (the slopes), and the constants
    of all rows, which are one product, are worked out once, however many parts the rows are picked in.
    """

    def __init__(self, relaxed: RelaxedActivation, rows: Rows) -> None:
        self.rows = rows
        terms, magnitude = rows.terms, rows.terms.abs()
        self.both = torch.stack((terms, magnitude), 4)  # [P, 1 or I, 1 or L, Q, 2, *cell]
        self.slopes = rows.on_any(relaxed.mean, relaxed.half)  # [1 or P, I, L, 2, *cell]
        self.constants = torch.broadcast_tensors(  # what leads to the rows may have weights where the terms have none
            rows.constant + inner(terms, rows.on_any(relaxed.offset)),
            inner(magnitude, rows.on_any(relaxed.spread)),
        )  # each [P, I, L, Q]

    def all(self) -> Rows:
        """All rows, as a PAIR."""
        new = (self.both.transpose(3, 4) * self.slopes.unsqueeze(4)).flatten(3, 4)  # [P, I, L, 2 * Q, *cell]
        return replace(self.rows, coefficients=new, constant=torch.cat(self.constants, 3), form=Form.PAIR, clean=True)

    def pick(self, chosen: Chosen) -> Rows:
        """Single ones, as a PAIR."""
        new = chosen.of_neurons(self.both.squeeze(1)) * chosen.of_positions(self.slopes)  # [P, R, 2, *cell]
        constant = torch.cat([chosen.of_rows(each) for each in self.constants], 3)
        return replace(
            self.rows, coefficients=new.unsqueeze(2), constant=constant, form=Form.PAIR, clean=True, chosen=chosen
        )
