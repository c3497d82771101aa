"""What is not affine, bound to P members: activations, maximum pooling, and residual blocks, which contain them.

Back-substitution passes an activation by its relaxation: a row takes the lower line where its coefficient is positive and the
upper line where it is negative. With m the mean and h half the difference of the two slopes (and likewise of the
intercepts), that is  A diag(m) - |A| diag(h)  (Zhang et al. 2018, arXiv:1811.00866, theorem 3.2, rearranged).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds import compiled
from evocert.bounds.affine import Affine, Node
from evocert.bounds.compiled import Parts
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.relaxation import ACTIVATIONS, Lines
from evocert.bounds.rows import Chosen, Form, Rows, Shape, as_cell, inner
from evocert.bounds.windows import Pair, Window

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
    ) -> tuple[tuple[Tensor, Tensor], "RelaxedActivation"]:
        if self.activation.piecewise is None or not compiled.usable(lower, upper, before):
            after = passed(self, lower, upper)
            return after, self.relax(lower, upper, (before, after[0]), slope)
        least = self.activation.piecewise(*self.arguments)
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
        if compiled.usable(terms) and terms.shape[1:3] == parts[0].shape[1:3]:
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


class BoundMaxPool(Relaxed):
    """Maximum pooling. See ``RelaxedMaxPool`` for how loose its relaxation is."""

    def __init__(self, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, input_shape: Shape) -> None:
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x.flatten(0, 1), self.kernel, self.stride, self.padding, self.dilation)
        return pooled.unflatten(0, x.shape[:2])

    def ends(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(lower), self.forward(upper)

    def relax(self, lower: Tensor, upper: Tensor, reference: Reference, slope: str) -> "RelaxedMaxPool":
        return RelaxedMaxPool(self, lower, upper, reference)

    def decided(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        return None

    def taps(self) -> Iterator[Pair]:
        return ((a, b) for a in range(self.kernel[0]) for b in range(self.kernel[1]))

    def pieces(self, x: Tensor, beyond: float) -> Tensor:
        """``[1 or P, B, C, H, W]`` -> for each tap what it sees: ``[taps, 1 or P, B, C, H', W']``."""
        top, left = self.padding
        rows, columns = (
            (h + 2 * p - d * (k - 1) - 1) // s + 1
            for h, p, d, k, s in zip(
                self.input_shape[1:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        x = F.pad(x, (left, left, top, top), value=beyond)
        return torch.stack(
            [
                x[..., a * self.dilation[0] :, b * self.dilation[1] :][..., :: self.stride[0], :: self.stride[1]][
                    ..., :rows, :columns
                ]
                for a, b in self.taps()
            ]
        )


class RelaxedMaxPool:
    """``x_i <= max(x)``, and above the constant u, or ``max(x) <= x_i + (r - l_i)+``, whichever encloses less.

    i is the input with the greatest midpoint, l_i its lower bound, r the greatest upper bound of the others, u that of all.
    Sound, and exact where one input wins everywhere (r <= l_i); elsewhere a constant forgets how the maximum depends on the
    inputs, and the lower line forgets all inputs but one. DeepPoly (Singh et al. 2019, section 4.4) takes the input with the
    greatest lower bound, and its line above only where r <= l_i: behind a ReLU many of these ends are zero but for rounding,
    which would then decide.
    """

    def __init__(self, pool: BoundMaxPool, lower: Tensor, upper: Tensor, reference: Reference) -> None:
        self.pool, self.interval = pool, (lower, upper)
        lows, highs = pool.pieces(lower, -torch.inf), pool.pieces(upper, -torch.inf)
        best = (lows + highs).argmax(0, keepdim=True)  # [1, 1 or P, B, C, H', W']
        chosen = torch.zeros_like(lows).scatter_(0, best, 1.0)
        rivals, greatest = highs.masked_fill(chosen > 0, -torch.inf).amax(0), highs.amax(0)
        low, high = lows.gather(0, best)[0], highs.gather(0, best)[0]
        over = (rivals - low).clamp(min=0)
        follows = (low + high) / 2 + over < greatest
        self.below_taps = chosen  # the lower line's slope at each tap
        self.above_taps = chosen * follows
        # What the lines give at the reference values before the pooling, beyond those after it.
        values, after = pool.pieces(reference[0].expand_as(lower), 0.0), reference[1]
        self.below_offset = values.gather(0, best)[0] - after
        self.above_offset = torch.where(follows, self.below_offset + over, greatest - after)

    def back(self, rows: Rows) -> Rows:
        rows = rows.lowered()
        terms = rows.terms
        positive, negative = terms.clamp(min=0), terms.clamp(max=0)
        constant = (
            rows.constant + inner(positive, rows.on(self.below_offset)) + inner(negative, rows.on(self.above_offset))
        )
        spread = [
            positive * rows.on(below) + negative * rows.on(above)
            for below, above in zip(self.below_taps, self.above_taps, strict=True)
        ]
        return spread_taps(replace(rows, constant=constant, clean=True), spread, self.pool)

    def below(self, window: Window) -> Window | None:
        return below_pool(self.pool, window)


class Pool(Protocol):
    """The geometry of a pooling layer."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_shape: Shape

    def taps(self) -> Iterator[Pair]: ...


def below_pool(pool: Pool, window: Window) -> Window:
    return window.below(pool.kernel, pool.stride, pool.dilation, pool.padding)


def spread_taps(rows: Rows, terms: Sequence[Tensor], pool: Pool) -> Rows:
    """Coefficients for each tap of a pooling, on its output -> rows on its input. Taps in rising order, row by row."""
    stride, dilation = pool.stride, pool.dilation
    window = None if rows.window is None else below_pool(pool, rows.window)
    (channels, *size), axes = pool.input_shape, (-3, -2)
    # On the whole map: with the padding, and with what lies before the end but is reached by no tap.
    padded = window.kernel if window else [h + 2 * p for h, p in zip(size, pool.padding, strict=True)]
    shape = (*padded, channels)
    new = terms[0].new_zeros(*terms[0].shape[:-3], *shape)
    for (a, b), each in zip(pool.taps(), terms, strict=True):
        place: list[slice] = [slice(None)] * new.ndim
        for axis, tap, s, d in zip(axes, (a, b), stride, dilation, strict=True):
            place[axis] = slice(tap * d, tap * d + (each.shape[axis] - 1) * s + 1, s)
        new[tuple(place)] += each
    if window is None:
        top, left = pool.padding
        new = new[..., top : top + size[0], left : left + size[1], :]
    clean = window is None or not window.overhangs((size[0], size[1]))
    return replace(rows, coefficients=new, shape=pool.input_shape, window=window, clean=clean)


class BoundAvgPool(Affine):
    """Average pooling; the padding counts as zeros if ``count_padding``, else an average is over what lies on the map."""

    dilation: Pair = (1, 1)

    def __init__(self, kernel: Pair, stride: Pair, padding: Pair, count_padding: bool, input_shape: Shape) -> None:
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.count_padding, self.input_shape = count_padding, input_shape

    def affine(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(
            x.flatten(0, 1), self.kernel, self.stride, self.padding, count_include_pad=self.count_padding
        )
        return pooled.unflatten(0, x.shape[:2])

    magnitude = affine

    def taps(self) -> Iterator[Pair]:
        return ((a, b) for a in range(self.kernel[0]) for b in range(self.kernel[1]))

    def back(self, rows: Rows) -> Rows:
        rows = rows.cleaned()
        area = self.kernel[0] * self.kernel[1]
        if self.count_padding:
            terms = rows.terms / area
        else:  # at the border an average is over fewer inputs
            ones = rows.constant.new_ones(1, *self.input_shape)
            inputs = F.avg_pool2d(ones, self.kernel, self.stride, self.padding) * area
            terms = rows.terms * rows.on_all(1 / inputs)
        return spread_taps(rows, [terms] * area, self)

    def below(self, window: Window) -> Window | None:
        return below_pool(self, window)


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
    if not compiled.usable(rows.coefficients, rows.constant):
        return None
    relaxable = rows.form is Form.LOWER or not rows.both or (rows.form is Form.PAIR and above is not None)
    if relaxable:
        rows = rows.lowered()
    elif above is not None:  # which makes a PAIR of them
        return None
    terms = rows.terms
    parts = parts_below = None
    if above is not None:
        parts = above.seen(rows)
        if not _shared_by_rows(parts, terms):
            return None
    # A neuron that is off has a mean slope of zero, and one that is not has none.
    if not node.sparse_pays(lambda: compiled.share_of_nonzero(terms if parts is None else parts[0])):
        return None
    below = _activation(nodes[end - 2], relaxations) if end > 1 and relaxable else None
    if below is not None:
        seen = below.seen(replace(rows, shape=node.input_shape))
        parts_below = seen if _shared_by_rows(seen, terms) else None
    rows = node.back_sparsely(rows, parts, parts_below)
    return rows, 1 + (parts is not None) + (parts_below is not None)


def _activation(node: Node, relaxations: Relaxations) -> RelaxedActivation | None:
    """The relaxation of an activation, if it does no more than relax: heirs may keep what passes them."""
    relaxation = relaxations[node] if isinstance(node, Relaxed) else None
    return relaxation if type(relaxation) is RelaxedActivation else None


def _shared_by_rows(parts: Parts, terms: Tensor) -> bool:
    """Whether each image and position has parts of its own, which all its rows share."""
    return parts[0].shape[1:4] == (*terms.shape[1:3], 1)


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
