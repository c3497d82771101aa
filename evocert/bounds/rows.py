"""Rows: linear functions of one layer's values, which back-substitution rewrites as functions of the layer below.

A row belongs to a member, an image, a position and a neuron there. Its coefficients stand in a cell: a window of the map,
where the neurons are those of a convolution, or the whole of the layer's values. The cells of a map have its channels last,
``[rows, columns, C]``.

    coefficients [P, I, L, Q, *cell]    constant [P, I, L, Q]

I is B, or 1 while the rows are the same for all images; L is the number of positions, or 1 while they are the same for all.
So what the images and positions of a member share is computed once a member. Rows that were chosen one by one stand along
I, with L = Q = 1.

A row is a function of *deviations*: its value is ``constant + <coefficients, z - z0>``, where z0 are reference values: at the
input the centre of the box, after an affine layer what it makes of those before it, after an activation the midpoint of its
interval. So biases and borders are in z0, affine layers change the coefficients alone, and the input's deviations are at most
its radius; constants change only where an activation is relaxed. Interval propagation has the reference values anyway.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from evocert.bounds.windows import Pair, Window

Shape = tuple[int, ...]


class Form(Enum):
    """What the coefficients stand for."""

    EXACT = "the function itself: nothing was relaxed yet"
    # The first relaxation turns W z into W diag(m) z - |W| diag(h) z at least and W diag(m) z + |W| diag(h) z at most, with m
    # the mean and h half the difference of the two slopes. What follows is linear, so the two terms travel instead of the
    # two bounds, until the next relaxation.
    PAIR = "twice the rows: first the terms s, then the terms d, of the bounds s - d and s + d"
    LOWER = "lower bounds; for both bounds twice the rows: then those of the negated functions"


@dataclass(frozen=True)
class Chosen:
    """Rows chosen one by one, the same number R for each member: each ``[P, R]``."""

    image: Tensor
    position: Tensor
    neuron: Tensor

    def of_neurons(self, values: Tensor) -> Tensor:
        """``[1 or P, 1 or L, Q, ...]`` -> those of the chosen rows ``[P, R, ...]``."""
        index = self.neuron if values.shape[1] == 1 else self.neuron + self.position * values.shape[2]
        return _pick(values.flatten(1, 2), index)

    def of_rows(self, values: Tensor) -> Tensor:
        """``[1 or P, B, L, Q]`` -> those of the chosen rows ``[P, R, 1, 1]``."""
        place = (self.image * values.shape[2] + self.position) * values.shape[3] + self.neuron
        return _pick(values.flatten(1), place).unsqueeze(2).unsqueeze(2)

    def of_positions(self, values: Tensor) -> Tensor:
        """``[1 or P, B, 1 or L, ...]`` -> those of the chosen rows ``[P, R, ...]``."""
        index = self.image if values.shape[2] == 1 else self.image * values.shape[2] + self.position
        return _pick(values.flatten(1, 2), index)


@dataclass(frozen=True)
class Rows:
    """See above. ``coefficients`` None stands for the values themselves, one row for each (``shape`` says of what)."""

    coefficients: Tensor | None
    constant: Tensor
    shape: Shape  # of the layer whose values the rows are functions of
    grid: Pair = (1, 1)  # the positions of the rows' neurons, L in all
    window: Window | None = None  # None: cells are the whole of ``shape``
    form: Form = Form.EXACT
    both: bool = True  # whether upper bounds are wanted too
    clean: bool = True  # whether entries beyond the map are zero
    images: slice | None = None  # which of the tile's images stand along I; None: all
    chosen: Chosen | None = None

    @classmethod
    def values(cls, shape: Shape, reference: Tensor, *, windows: bool) -> "Rows":
        """The values of a layer themselves, in windows of one point where the layer is a map and that is wanted.

        Args:
            shape: of the layer.
            reference: its reference values, ``[1 or P, B, *shape]``.
            windows: whether windows are wanted.
        """
        if windows and len(shape) == 3:
            grid = (shape[1], shape[2])
            return cls(None, reference.flatten(3).transpose(2, 3), shape, grid, Window.points(grid))
        return cls(None, reference.flatten(2).unsqueeze(2), shape)

    @property
    def neurons(self) -> int:
        """Q."""
        return self.constant.shape[3]

    @property
    def terms(self) -> Tensor:
        """The coefficients, written out."""
        if self.coefficients is not None:
            return self.coefficients
        units = self.shape[0] if self.window else _size(self.shape)
        unit = torch.eye(units, dtype=self.constant.dtype, device=self.constant.device)
        return as_cell(unit.reshape(1, 1, 1, units, *((units, 1, 1) if self.window else self.shape)), self.shape)

    def written(self) -> "Rows":
        """The same rows with coefficients."""
        return self if self.coefficients is not None else replace(self, coefficients=self.terms)

    # Some of the rows

    def part(self, images: slice, lines: slice, neurons: slice) -> "Rows":
        """Those of some images, of some lines of the grid, and of some neurons at each position. All slices have both ends."""
        columns = self.grid[1]
        here = slice(lines.start * columns, lines.stop * columns)
        rows = self if neurons == slice(0, self.neurons) else self.written()
        terms, constant = rows.coefficients, self.constant[:, :, here, neurons]
        if terms is not None:
            terms = terms if terms.shape[1] == 1 else terms[:, images]
            terms = (terms if terms.shape[2] == 1 else terms[:, :, here])[:, :, :, neurons]
        return replace(
            rows,
            coefficients=terms,
            constant=constant if constant.shape[1] == 1 else constant[:, images],
            grid=(lines.stop - lines.start, columns),
            window=None if self.window is None else self.window.rows(lines.start, lines.stop),
            images=images,
        )

    def pick(self, chosen: Chosen) -> "Rows":
        """Single ones. The coefficients must not depend on images yet."""
        terms = chosen.of_neurons(self.terms.squeeze(1)).unsqueeze(2).unsqueeze(2)  # [P, R, 1, 1, *cell]
        return replace(self, coefficients=terms, constant=chosen.of_rows(self.constant), chosen=chosen)

    # What they see

    def on(self, *maps: Tensor) -> Tensor:
        """What each row sees of its image.

        Args:
            maps: n of them, each ``[1 or P, B, *shape]``.

        Returns:
            ``[1 or P, I, L, n, *cell]``, where I is that of the rows in full, and so is L in windows, also where the
            coefficients do not tell images or positions apart yet.
        """
        seen = self.on_any(*maps)
        return seen if self.chosen is None else self.chosen.of_positions(seen).unsqueeze(2)

    def on_any(self, *maps: Tensor) -> Tensor:
        """As ``on``, for all rows where some were chosen."""
        if self.images is not None:
            maps = tuple(each if each.shape[1] == 1 else each[:, self.images] for each in maps)
        if self.window is None:
            cells = [as_cell(each, self.shape).unsqueeze(2) for each in maps]  # [1 or P, I, L = 1, *cell]
            return torch.stack(cells, 3) if len(cells) > 1 else cells[0].unsqueeze(3).contiguous()
        pieces = [self.window.cut(each) for each in maps]
        return torch.stack(pieces, 3) if len(pieces) > 1 else pieces[0].unsqueeze(3)

    def on_all(self, one: Tensor) -> Tensor:
        """As ``on`` for one map that all images share: ``[1 or P, *shape]`` -> ``[1 or P, 1 or R, 1 or L, 1, *cell]``."""
        if self.chosen is None or self.window is None:
            return replace(self, images=None).on_any(one.unsqueeze(1))
        return _pick(self.window.cut(one), self.chosen.position).unsqueeze(2).unsqueeze(2)

    def cleaned(self) -> "Rows":
        """The same rows with zeros beyond the map: the padding of the layers between does not deviate."""
        if self.clean or self.window is None:
            return self
        inside = self.on_all(self.constant.new_ones(1, 1, *self.shape[1:]))
        return replace(self, coefficients=self.terms * inside, clean=True)

    def whole(self) -> "Rows":
        """The same rows with coefficients on the whole map instead of on windows."""
        if self.window is None:
            return self
        channels, height, width = self.shape
        places = self.window.places((channels, height, width), self.constant.device)  # [L, K]
        terms = self.terms.flatten(4)  # [P, I, L, Q, K]
        if self.chosen is not None:
            index = places[self.chosen.position].unsqueeze(2).unsqueeze(2).expand_as(terms)
        else:
            terms = terms.expand(-1, -1, self.window.count, -1, -1)
            index = places.unsqueeze(1).expand_as(terms)
        # The entry past the map takes what lies beyond it.
        full = terms.new_zeros(*terms.shape[:4], _size(self.shape) + 1).scatter(4, index, terms)[..., :-1]
        return replace(self, coefficients=full.unflatten(4, (height, width, channels)), window=None, clean=True)

    # Their forms

    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a PAIR: the terms s and d, and their constants."""
        (s, d), (s0, d0) = self.terms.chunk(2, 3), self.constant.chunk(2, 3)
        return s, d, s0, d0

    def lowered(self) -> "Rows":
        """The same in the form LOWER."""
        if self.form is Form.LOWER:
            return self
        if self.form is Form.PAIR:
            s, d, s0, d0 = self.split()
            terms, constant = torch.cat((s - d, -(s + d)), 3), torch.cat((s0 - d0, -(s0 + d0)), 3)
        elif self.both:
            terms, constant = torch.cat((self.terms, -self.terms), 3), torch.cat((self.constant, -self.constant), 3)
        else:
            terms, constant = self.terms, self.constant
        return replace(self, coefficients=terms, constant=constant, form=Form.LOWER)

    def paired(self) -> "Rows":
        """EXACT rows in the form PAIR."""
        if self.form is not Form.EXACT:
            return self
        terms = torch.cat((self.terms, torch.zeros_like(self.terms)), 3)
        constant = torch.cat((self.constant, torch.zeros_like(self.constant)), 3)
        return replace(self, coefficients=terms, constant=constant, form=Form.PAIR)


def as_cell(values: Tensor, shape: Shape) -> Tensor:
    """``[..., *shape]`` -> as a cell: a map's channels go last. A view."""
    return values.movedim(-3, -1) if len(shape) == 3 else values


def from_cell(values: Tensor, shape: Shape) -> Tensor:
    """The inverse of ``as_cell``."""
    return values.movedim(-1, -3) if len(shape) == 3 else values


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """From values ``[1 or P, N, ...]`` those of ``index [P, R]``: ``[P, R, ...]``."""
    if len(index) == 1 and len(values) == 1:
        return values[0].index_select(0, index[0]).unsqueeze(0)
    if len(values) < len(index):
        values = values.expand(len(index), *values.shape[1:])
    first = torch.arange(len(index), device=index.device).unsqueeze(1) * values.shape[1]
    return values.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def inner(terms: Tensor, seen: Tensor) -> Tensor:
    """``<terms, seen>`` over the cells: ``[P, I, L, Q, *cell]``, the same with any 1s -> ``[P, I, L, Q]``."""
    terms, seen = terms.flatten(4), seen.flatten(4)
    if terms.shape[3] == 1 or seen.shape[3] > 1:
        return (terms * seen).sum(4)
    if terms.shape[1] == terms.shape[2] == 1:  # the same for all images and positions: nothing is expanded
        product = torch.matmul(seen.flatten(1, 3), terms.reshape(len(terms), *terms.shape[3:]).transpose(1, 2))
        return product.unflatten(1, seen.shape[1:3])
    return torch.matmul(seen, terms.transpose(3, 4)).squeeze(3)
