"""Back-substitution: linear bounds of what a layer computes, carried back to the input and bounded over the box there.

CROWN (Zhang et al. 2018, arXiv:1811.00866) and DeepPoly (Singh et al. 2019, POPL) are this procedure; they differ in where the
intervals of the activations come from, which the relaxations need (see ``crown_ibp`` and ``deeppoly``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evocert.bounds import compiled
from evocert.bounds.affine import Affine, BoundDense, BoundFlatten, Node
from evocert.bounds.chain import BoundResidual, back, forward
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.margins import class_pairs, difference_rows, logit_margins
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import Relaxations, Relaxed, RelaxedActivation, Shared
from evocert.bounds.rows import Chosen, Form, Rows, inner
from evocert.bounds.windows import Window

# Numbers that the coefficients of the rows worked on at once take. On a CPU they stay in a core's cache; a GPU wants few
# launches.
CPU_CHUNK = 2**20
GPU_CHUNK = 2**24
# How many times as much a chunk was seen to take in all: the rows, what a layer makes of them, magnitudes, what each row sees;
# and what the C library does not hand back in between (CNN3, CNN4, CNN5 with w=16; 1 to 32 images; torch 2.14, glibc 2.35).
CPU_COPIES = 12
GPU_COPIES = 6

Interval = tuple[Tensor, Tensor]


def _chunk_size(members: Members) -> int:
    """Numbers that the coefficients of the rows worked on at once take."""
    return (GPU_CHUNK if members.parameters.device.type == "cuda" else CPU_CHUNK) // members.chunk_parts


def chunk_memory(device: torch.device) -> int:
    """Numbers that work on one chunk takes in all."""
    return GPU_CHUNK * GPU_COPIES if device.type == "cuda" else CPU_CHUNK * CPU_COPIES


@dataclass(frozen=True)
class Relaxing:
    """What back-substitution of the margins needs.

    Attributes:
        relaxations: of every activation, in the order in which they run.
        last: the reference values after the last activation, ``[1 or P, B, ...]``.
    """

    relaxations: Relaxations
    last: Tensor

    @property
    def intervals(self) -> list[Interval]:
        """Lower and upper bounds before each activation, in the order in which they run, each ``[1 or P, B, ...]``."""
        return [each.interval for each in self.relaxations.values()]


def margins(members: Members, box: Box, labels: Tensor, relaxing: Relaxing) -> Tensor:
    """Lower bounds of the margins ``[P, B, M]`` by back-substitution."""
    classes = members.network.num_classes
    radius = members.entered(box)[1]
    widest = max(int(torch.Size(node.input_shape).numel()) for node in members.nodes)
    size = _chunk_size(members) // (len(members) * (classes - 1) * widest)
    parts = _cut(len(labels), size)
    tail = members.inner[len(members.hidden) :]  # affine: the same for all images of a class
    at_reference = logit_margins(forward(tail, relaxing.last), labels).unsqueeze(2)  # [P, B, 1, M]
    of_logits = of_class = None
    if compiled.usable(at_reference, members.parameters):
        of_logits = back(Rows(None, at_reference, (classes,), both=False), tail, {}).written()
    elif classes <= parts[0].stop:
        every = torch.arange(classes, device=labels.device)
        of_class = back(_differences(every, classes, at_reference.new_zeros(1, classes, 1, classes - 1)), tail, {})
    ends = Ends((len(members), len(labels), 1, classes - 1), radius, 1)
    for images in parts:
        some, constant = labels[images], at_reference[:, images]
        if of_logits is not None:
            rivals = class_pairs(classes, labels.device).rivals.index_select(0, some)
            terms = compiled.differences(of_logits.terms, some, rivals)
            rows = replace(of_logits, coefficients=terms, constant=constant)
        elif of_class is not None:
            rows = replace(of_class, coefficients=of_class.terms.index_select(1, some), constant=constant)
        else:
            rows = back(_differences(some, classes, constant), tail, {})
        rows = back(replace(rows, images=images), members.hidden, relaxing.relaxations)
        ends.put((images, slice(0, 1), slice(0, classes - 1)), concretised(rows, radius))
    (found,) = ends.whole()
    return found.flatten(2)


def margin_rows(members: Members, last: Tensor, label: int, rival: int) -> Rows:
    """One margin, ``logit[label] - logit[rival]``, as a row on what the last activation gives: ``[1 or P, 1, 1, 1, *cell]``.

    Args:
        members: P bound networks.
        last: the reference values there, as of ``Relaxing``.
        label, rival: two classes.
    """
    tail = members.inner[len(members.hidden) :]
    reference = forward(tail, last)  # [1 or P, 1, K]
    terms = reference.new_zeros(1, 1, 1, 1, reference.shape[2])
    terms[..., label], terms[..., rival] = 1.0, -1.0
    constant = (reference[..., label] - reference[..., rival]).unsqueeze(2).unsqueeze(2)
    return back(Rows(terms, constant, (reference.shape[2],), both=False), tail, {})


def _differences(labels: Tensor, classes: int, constant: Tensor) -> Rows:
    """The margins of some labels as rows on the logits."""
    terms = difference_rows(labels, classes, constant.dtype)  # [B, M, K]
    return Rows(terms.unsqueeze(0).unsqueeze(2), constant, (classes,), both=False)


def concretised(rows: Rows, radius: Tensor) -> tuple[Tensor, ...]:
    """Rows on the input -> their least values over a box ``[P, I, L, Q]``, and if wanted their greatest.

    Args:
        rows: functions of the input's deviations from the box's centre.
        radius: of the box, ``[1, B, C, H, W]``.
    """
    radius = rows.on(radius)  # zero beyond the map, whatever coefficients stand there
    terms = rows.terms
    in_one_pass = compiled.usable(terms, radius) and terms.shape[1:3] == radius.shape[1:3]
    if rows.form is Form.PAIR:
        s, d, s0, d0 = rows.split()
        if in_one_pass:
            less, more = compiled.pair_products(terms, radius)
        else:
            less, more = inner((s - d).abs(), radius), inner((s + d).abs(), radius)
        return s0 - d0 - less, s0 + d0 + more
    spread = compiled.magnitude_product(terms, radius) if in_one_pass else inner(terms.abs(), radius)
    if not rows.both:
        return (rows.constant - spread,)
    if rows.form is Form.EXACT:
        return rows.constant - spread, rows.constant + spread
    lower, negated = (rows.constant - spread).chunk(2, 3)
    return lower, -negated


# The images (or the rows that were chosen), positions and neurons of a chunk.
Places = tuple[slice, slice, slice]


class Ends:
    """Bounds of rows, as chunks of rows give them.

    Without a graph they are written where they stay: small blocks that outlive the large ones of a chunk, one of them for each
    chunk, would cut up the memory that those give back, and it was seen to grow to eight times what lives.

    Args:
        shape: [P, I, L, Q] of each end.
        like: of their dtype and device.
        count: how many there are: the lower one, or both.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, count: int = 2) -> None:
        self.shape, self.count, self.recorded = shape, count, torch.is_grad_enabled()
        self.ends = [] if self.recorded else [like.new_empty(shape) for _ in range(count)]
        self.pieces: list[tuple[Places, tuple[Tensor, ...]]] = []

    def put(self, places: Places, found: tuple[Tensor, ...]) -> None:
        if self.recorded:
            self.pieces.append((places, found))
        for end, piece in zip(self.ends, found, strict=False):
            end[:, places[0], places[1], places[2]] = piece

    def whole(self) -> list[Tensor]:
        if not self.recorded:
            return self.ends
        # One node of the graph, where writing into parts of a tensor would make one for each, as large as the whole.
        return [self._joined([(places, found[end]) for places, found in self.pieces], 0) for end in range(self.count)]

    def _joined(self, pieces: list[tuple[Places, Tensor]], axis: int) -> Tensor:
        if axis == 3:
            ((_, piece),) = pieces
            return piece.expand(self.shape[0], -1, -1, -1)
        starts = sorted({places[axis].start for places, _ in pieces})
        parts = [self._joined([p for p in pieces if p[0][axis].start == start], axis + 1) for start in starts]
        return torch.cat(parts, axis + 1)


class Substitution:
    """Intervals of any layer's values by back-substitution through what comes before it, in chunks that stay small.

    Args:
        members: P bound networks.
        box: B boxes.
        relaxations: of the activations before that layer.
    """

    def __init__(self, members: Members, box: Box, relaxations: Relaxations) -> None:
        self.members, self.relaxations = members, relaxations
        self.radius = members.entered(box)[1]
        self.chunk = _chunk_size(members)

    def interval(self, path: Sequence[Node], reference: Tensor) -> Interval:
        """Lower and upper bounds of what a chain of nodes from the input on computes.

        Args:
            path: the nodes.
            reference: what they make of the reference values, ``[1 or P, B, *shape]``; the bounds are ``[P, B, *shape]``.
        """
        shape = tuple(reference.shape[2:])
        if path and isinstance(path[-1], BoundFlatten):
            lower, upper = self.interval(path[:-1], reference.unflatten(2, path[-1].input_shape))
            return lower.flatten(2), upper.flatten(2)
        seed, rest = self._seed(path, reference)
        count, columns = self.radius.shape[1], seed.grid[1]
        ends = Ends((len(self.members), count, seed.grid[0] * columns, seed.neurons), self.radius)
        for images, lines, neurons in product(*self._parts(seed, rest)):
            here = slice(lines.start * columns, lines.stop * columns)
            ends.put((images, here, neurons), self._bounds(partial(seed.part, images, lines, neurons), rest))
        lower, upper = (self._arranged(end, seed, shape) for end in ends.whole())
        return lower, upper

    def refined(self, path: Sequence[Node], reference: Tensor, known: Interval, wanted: Tensor) -> Interval:
        """Known bounds ``[P, B, *shape]``, with back-substituted ones where they are ``wanted`` (bools of that shape)."""
        if path and isinstance(path[-1], BoundFlatten):
            inner_shape = path[-1].input_shape
            reference, lower, upper, wanted = (each.unflatten(2, inner_shape) for each in (reference, *known, wanted))
            lower, upper = self.refined(path[:-1], reference, (lower, upper), wanted)
            return lower.flatten(2), upper.flatten(2)
        lower, upper = (each.expand(len(self.members), *each.shape[1:]) for each in known)
        shape = tuple(lower.shape[2:])
        index, real = _chosen(wanted.expand_as(lower).flatten(1))  # [P, R]
        if index.shape[1] == 0:
            return lower, upper
        seed, rest = self._seed(path, reference)
        size = max(1, self.chunk // (2 * len(self.members) * _largest_cell(seed, rest, self.relaxations)))
        source: Rows | Shared = seed
        relaxation = self.relaxations.get(rest[-1]) if rest and isinstance(rest[-1], Relaxed) else None
        if isinstance(relaxation, RelaxedActivation):
            source, rest = Shared(relaxation, seed), rest[:-1]
        ends = Ends((*index.shape, 1, 1), self.radius)
        for part in _cut(index.shape[1], size):
            chosen = _decoded(index[:, part], seed, shape)
            ends.put((part, slice(0, 1), slice(0, 1)), self._bounds(partial(source.pick, chosen), rest))
        # What fills up a member's share writes back what was there.
        lower, upper = (
            old.flatten(1)
            .scatter(1, index, torch.where(real, new.flatten(1), old.flatten(1).gather(1, index)))
            .view_as(old)
            for old, new in zip((lower, upper), ends.whole(), strict=True)
        )
        return lower, upper

    def _seed(self, path: Sequence[Node], reference: Tensor) -> tuple[Rows, list[Node]]:
        """The values after a path as rows on the output of the last activation in it, and the path up to there.

        Until there they are the same for all images, and mostly for all positions: work that is done once a member.
        """
        rest = list(path)
        rows = Rows.values(tuple(reference.shape[2:]), reference, windows=_has_windows(rest))
        while rest and not isinstance(rest[-1], BoundResidual) and not isinstance(rest[-1], Relaxed):
            rows = back(rows, [rest.pop()], self.relaxations)
        return rows, rest

    def _parts(self, seed: Rows, rest: Sequence[Node]) -> tuple[list[slice], list[slice], list[slice]]:
        """Which images, lines of positions and neurons are worked on at once: as many as the chunk allows, in that order."""
        images, (lines, columns), neurons = self.radius.shape[1], seed.grid, seed.neurons
        room = max(1, self.chunk // (2 * len(self.members) * _largest_cell(seed, rest, self.relaxations)))  # rows
        line = columns * neurons
        return (
            _cut(images, room // (lines * line)),
            _cut(lines, room // line),
            _cut(neurons, room // columns),
        )

    def _bounds(self, rows: Callable[[], Rows], rest: Sequence[Node]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # not to keep what all the chunks have multiplied: it is computed again
            return checkpoint(self._through, rows, rest, use_reentrant=False)
        return self._through(rows, rest)

    def _through(self, rows: Callable[[], Rows], rest: Sequence[Node]) -> tuple[Tensor, ...]:
        return concretised(back(rows(), rest, self.relaxations), self.radius)

    def _arranged(self, values: Tensor, seed: Rows, shape: tuple[int, ...]) -> Tensor:
        """``[P, B, L, Q]`` -> ``[P, B, *shape]``."""
        return (
            values.transpose(2, 3).reshape(*values.shape[:2], *shape)
            if values.shape[2] > 1
            else values.reshape(*values.shape[:2], *shape)
        )


def _cut(total: int, size: int) -> list[slice]:
    size = min(max(1, size), total)
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def _has_windows(path: Sequence[Node]) -> bool:
    """Whether neurons at the end of a path see windows of what comes before it: not where that is one matrix."""
    for node in reversed(path):
        if isinstance(node, BoundDense):
            return False
        if isinstance(node, BoundConvolution):
            return True
        if isinstance(node, BoundResidual):
            return _has_windows(node.body or node.shortcut)
    return True


def _largest_cell(rows: Rows, rest: Sequence[Node], relaxations: Relaxations) -> int:
    """How many coefficients a row has where it has most, on its way back through some nodes."""
    sizes = [rows.terms[0, 0, 0, 0].numel()]
    _walk_cells(rows.window, rest, relaxations, sizes)
    return max(sizes)


def _walk_cells(
    window: Window | None, nodes: Sequence[Node], relaxations: Relaxations, sizes: list[int]
) -> Window | None:
    for node in reversed(nodes):
        if isinstance(node, BoundResidual):
            _walk_cells(window, node.shortcut, relaxations, sizes)
            window = _walk_cells(window, node.body, relaxations, sizes)
            continue
        if window is not None and isinstance(node, Relaxed):
            window = relaxations[node].below(window)
        elif window is not None and isinstance(node, Affine):
            window = node.below(window)
        shape = node.input_shape
        sizes.append(int(torch.Size(shape if window is None else (shape[0], *window.kernel)).numel()))
    return window


def _chosen(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Bools ``[P, N]`` -> the places that are true, for each member in as many as the fullest has, and which are not filling.

    Returns:
        Places ``[P, R]`` and bools ``[P, R]``. One host synchronisation.
    """
    member, place = wanted.nonzero(as_tuple=True)
    counts = wanted.sum(1)
    if len(wanted) == 1:
        return place.unsqueeze(0), torch.ones_like(place, dtype=torch.bool).unsqueeze(0)
    most = int(counts.max()) if len(place) else 0
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(place), device=place.device) - first[member]
    # Filled up with a place that is not wanted, or, where all are, never.
    index = wanted.to(torch.uint8).argmin(1, keepdim=True).repeat(1, most)
    real = torch.zeros_like(index, dtype=torch.bool)
    index[member, rank], real[member, rank] = place, True
    return index, real


def _decoded(index: Tensor, seed: Rows, shape: tuple[int, ...]) -> Chosen:
    """Places ``[P, R]`` in ``[B, *shape]`` as rows."""
    size, positions = int(torch.Size(shape).numel()), seed.grid[0] * seed.grid[1]
    entry = index % size
    return Chosen(index // size, entry % positions, entry // positions)
