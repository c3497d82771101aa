"""Exact verification as a mixed-integer linear program: one binary for each ReLU whose sign is open.

Tjeng et al. 2019, arXiv:1711.07356, section 4, with the intervals of back-substitution. Neurons whose sign is known are no
variables: what is after them is written out in the inputs and in the open neurons' outputs, so that the program has as many
variables as there are inputs and twice the open neurons, and four rows for each of these. scipy's HiGHS solves it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from evocert.bounds.affine import Affine, Node
from evocert.bounds.chain import BoundResidual
from evocert.bounds.ibp import Interval
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import BoundActivation, Relaxed
from evocert.certify.verdict import Deadline, Outcome

# HiGHS holds constraints, and integers to be integers, to 1e-6 or so: a margin counts as proved from here on, times the
# largest size of its terms.
TOLERANCE = 1e-5
# Numbers that the network's values may take, written out in the variables: a quarter of a GiB.
LARGEST = 2**25


@dataclass
class _Program:
    """The network's values in variables: inputs' deviations from the box's centre, then the open neurons' outputs."""

    members: Members
    intervals: dict[Relaxed, Interval]  # before each activation, [1, 1, *shape]
    rows: Tensor  # [1 + variables, *shape]: the constant part, then a variable's factors
    low: list[float]
    high: list[float]
    open: list[
        tuple[np.ndarray, float, float, int]
    ]  # (expression of z [1 + variables then], l, u, the output's number)

    def run(self, nodes: Sequence[Node], rows: Tensor) -> Tensor:
        for node in nodes:
            if isinstance(node, BoundResidual):
                one = self.run(node.body, rows)
                # Variables of the body are none of the shortcut's, and the other way round.
                other = self.run(node.shortcut, rows)
                rows = _padded(one, len(self.low) + 1) + _padded(other, len(self.low) + 1)
            elif isinstance(node, BoundActivation):
                rows = self.activation(node, rows)
            elif isinstance(node, Affine):
                after = node.forward(rows.unsqueeze(0))[0]
                without = node.forward(torch.zeros_like(rows[:1]).unsqueeze(0))[0]
                rows = torch.cat([after[:1], after[1:] - without])
            if rows.numel() > LARGEST:
                raise MemoryError
        return rows

    def activation(self, node: BoundActivation, rows: Tensor) -> Tensor:
        slope = node.least_slope  # of a ReLU 0, of a leaky one its own
        assert slope is not None
        lower, upper = (end[0, 0] for end in self.intervals[node])
        active, crossing = lower >= 0, (lower < 0) & (upper > 0)
        places = crossing.flatten().nonzero().flatten().tolist()
        before = rows.flatten(1)
        for place in places:
            low, high = float(lower.flatten()[place]), float(upper.flatten()[place])
            self.low.append(0.0)
            self.high.append(high)
            self.open.append((before[:, place].numpy().copy(), low, high, len(self.low)))
        kept = rows * torch.where(active, 1.0, slope)
        new = rows.new_zeros(len(places), rows[0].numel())
        new[torch.arange(len(places)), torch.tensor(places, dtype=torch.long)] = 1.0 - slope
        first = len(self.low) + 1 - len(places)
        return torch.cat([_padded(kept, first), new.unflatten(1, rows.shape[1:])])


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


class Milp:
    """The program of one box; margins are solved one after another.

    Args:
        members: one network, in float64.
        box: one box ``[1, C, H, W]``.
        intervals: before each activation, ``[1, 1, *shape]``; signs that are assumed are in them.

    Raises:
        MemoryError: the network is too large to be written out.
    """

    def __init__(self, members: Members, box: Box, intervals: dict[Relaxed, Interval]) -> None:
        centre, radius = members.entered(box)
        self.box, self.radius = box, radius[0, 0]
        inputs = self.radius.numel()
        start = torch.cat(
            [torch.zeros(1, inputs, dtype=centre.dtype), torch.diag(torch.ones(inputs, dtype=centre.dtype))]
        )
        start[0] = centre.flatten()
        limits = self.radius.flatten().tolist()
        program = _Program(members, intervals, start, [-r for r in limits], limits, [])
        rows = program.run(members.inner, start.unflatten(1, self.radius.shape))
        self.variables = len(program.low)
        self.open = program.open
        self.logits = _padded(rows, self.variables + 1).numpy()  # [1 + variables, K]
        self.low, self.high = np.array(program.low), np.array(program.high)

    @staticmethod
    def takes(members: Members) -> bool:
        """Whether every activation of a network is piecewise linear with one kink at zero."""
        return all(isinstance(node, BoundActivation) and node.least_slope is not None for node in members.relaxed)

    def solve(self, label: int, rival: int, deadline: Deadline, signs: np.ndarray | None = None) -> Outcome:
        """Whether logit[label] > logit[rival] in the whole box.

        Args:
            label, rival: two classes.
            deadline: when to stop.
            signs: of the open neurons, +1 or -1, where the box is cut by assuming them; 0 or None: nothing is assumed.

        Returns:
            "attacked" with a candidate, which the solver's tolerances may have put where the network is not broken.
        """
        margin = self.logits[:, label] - self.logits[:, rival]
        sizes = np.maximum(np.abs(self.low), np.abs(self.high))
        tolerance = TOLERANCE * max(1.0, abs(margin[0]) + float(np.abs(margin[1:]) @ sizes))
        count = len(self.open)
        assumed = np.zeros(count) if signs is None else signs
        if deadline.over:
            return Outcome("undecided")
        with _silence():
            result = scipy.optimize.milp(
                np.concatenate([margin[1:], np.zeros(count)]),
                integrality=np.concatenate([np.zeros(self.variables), np.ones(count)]),
                bounds=scipy.optimize.Bounds(
                    np.concatenate([self.low, assumed > 0]), np.concatenate([self.high, assumed >= 0])
                ),
                constraints=[*self._neurons, self._only_small(margin, tolerance)],
                options={"time_limit": deadline.left},
            )
        if result.status == 2:  # no margin as small as the tolerance
            return Outcome("certified")
        bound = result.mip_dual_bound if count else result.fun
        if bound is not None and np.isfinite(bound) and bound + margin[0] > tolerance:
            return Outcome("certified")
        if result.x is None:
            return Outcome("undecided")
        deviations = torch.from_numpy(result.x[: self.radius.numel()]).reshape(self.radius.shape)
        centre, radius = (each[0, 0] for each in self.box.centred)  # in pixels, before the normalisation
        parts = torch.where(self.radius > 0, deviations / self.radius, 0.0)
        return Outcome("attacked", (centre + parts * radius).clamp(self.box.lower[0], self.box.upper[0]))

    @cached_property
    def _neurons(self) -> list[scipy.optimize.LinearConstraint]:
        """For each open neuron, z in [l, u], with output a >= 0 and binary d: a >= z, a <= u d, a <= z - l (1 - d)."""
        count = len(self.open)
        if not count:
            return []
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        ends: list[tuple[float, float]] = []
        for i, (expression, low, high, number) in enumerate(self.open):
            used = np.nonzero(expression[1:])[0]
            factors = expression[1:][used]
            output, binary = number - 1, self.variables + i
            first = len(ends)
            # a - z >= constant of z
            rows += [first] * (len(used) + 1)
            columns += [*used, output]
            values += [*-factors, 1.0]
            ends.append((expression[0], np.inf))
            # a - u d <= 0
            rows += [first + 1] * 2
            columns += [output, binary]
            values += [1.0, -high]
            ends.append((-np.inf, 0.0))
            # a - z - l d <= constant of z - l
            rows += [first + 2] * (len(used) + 2)
            columns += [*used, output, binary]
            values += [*-factors, 1.0, -low]
            ends.append((-np.inf, expression[0] - low))
        matrix = scipy.sparse.csr_array((values, (rows, columns)), shape=(len(ends), self.variables + count))
        return [scipy.optimize.LinearConstraint(matrix, *map(np.array, zip(*ends, strict=True)))]

    def _only_small(self, margin: np.ndarray, tolerance: float) -> scipy.optimize.LinearConstraint:
        row = np.concatenate([margin[1:], np.zeros(len(self.open))])[None]
        return scipy.optimize.LinearConstraint(row, -np.inf, tolerance - margin[0])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints some lines on stdout whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
