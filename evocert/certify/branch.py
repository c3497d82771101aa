"""Exact verification by branch and bound on the signs of ReLUs, many domains at a time.

A domain is the box with the signs of some open neurons assumed. Its bound is a back-substitution in which each open neuron has
a lower slope alpha of its own (Xu et al. 2021, arXiv:2011.13824) and each assumed sign s, +1 or -1, of a neuron z a multiplier
beta >= 0 (beta-CROWN: Wang et al. 2021, arXiv:2103.06624, theorem 3.1): what is bounded is f(x) - beta s z, no more than f(x)
wherever the sign is the assumed one. Any alpha in [0, 1] and beta >= 0 give a sound bound; a few steps of gradient ascent look
for good ones. A domain whose bound is not positive is split in two at an open neuron, until no domain is left, or a point of
one breaks the network, or the time is over. A domain with few open neurons left is handed to the linear program.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evocert.bounds.backward import Relaxing, concretised, margin_rows
from evocert.bounds.chain import back
from evocert.bounds.ibp import Interval
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import BoundActivation, Reference, Relaxations, RelaxedActivation
from evocert.bounds.relaxation import Lines
from evocert.bounds.rows import Rows, from_cell, inner
from evocert.certify.milp import Milp
from evocert.certify.verdict import ROUNDING, Deadline, Outcome

BATCH = 64  # domains that are bounded at once
ROOT_STEPS, STEPS = 30, 12  # of gradient ascent, on the whole box and on a part of it
ALPHA_RATE, BETA_RATE, DECAY = 0.2, 0.1, 0.95
LEAF = 8  # open neurons from which on the linear program is asked
TRIED = 3  # neurons for which both halves are bounded before one of them is split


@dataclass(frozen=True)
class Domain:
    """Signs assumed of the open neurons: 0 where none is. Each ``[U]``; with the multipliers to start from."""

    bound: float
    signs: Tensor
    alpha: Tensor
    beta: Tensor

    @property
    def open(self) -> int:
        """Neurons of which no sign is assumed."""
        return int((self.signs == 0).sum())

    def __lt__(self, other: "Domain") -> bool:
        return self.bound < other.bound


@dataclass(frozen=True)
class _Layer:
    """What of one activation is the same for all domains; maps are ``[*shape]``."""

    node: BoundActivation
    relaxed: RelaxedActivation
    slope: Tensor  # of the neurons whose sign is known
    places: Tensor  # [U_k] of the open ones
    chord: Tensor  # [U_k] slope and intercept of the upper line
    intercept: Tensor
    least: float  # slope where the neuron is off


class _Assumed(RelaxedActivation):
    """A relaxation with multipliers of assumed signs, which remembers the coefficients that it was given."""

    given: Tensor

    def __init__(self, lines: Lines, reference: Reference, interval: Interval, multipliers: Tensor) -> None:
        super().__init__(lines, reference, interval)
        self.multipliers = multipliers  # -beta s, [1, D, *shape]

    def back(self, rows: Rows) -> Rows:
        self.given = rows.terms.detach()
        rows = super().back(rows)
        weights = rows.on(self.multipliers)
        constant = rows.constant + inner(weights, rows.on(self.reference[0]))
        return replace(rows, coefficients=rows.terms + weights, constant=constant)


class Search:
    """The search for one margin over one box.

    Args:
        members: one network, in float64, that ``Milp.takes``.
        box: one box ``[1, C, H, W]``.
        label, rival: whose difference is to be positive.
        root: the relaxations over the whole box.
        program: gives the linear program of the box, or None where that is too large.
    """

    def __init__(
        self,
        members: Members,
        box: Box,
        label: int,
        rival: int,
        root: Relaxing,
        program: Callable[[], Milp | None],
    ) -> None:
        self.members, self.label, self.rival = members, label, rival
        self.program = program
        self.box, self.radius = box, members.entered(box)[1]  # [1, 1, C, H, W]
        self.layers = [_layer(node, relaxed) for node, relaxed in root.relaxations.items()]  # type: ignore[arg-type]
        self.open = sum(len(layer.places) for layer in self.layers)
        self.rows = margin_rows(members, root.last, label, rival)
        self.waiting: list[Domain] | None = None  # whose bounds are not positive; None before the first call

    def decide(self, deadline: Deadline) -> Outcome:
        """What is true of the margin in the box, or "undecided" if the time is over: then another call goes on.

        A domain leaves ``waiting`` for good only when it is proved, or replaced by its halves.
        """
        self.deadline = deadline
        found: list[Domain] | Tensor = []
        if self.waiting is None:
            self.waiting = []
            nothing = torch.zeros(1, self.open, dtype=self.radius.dtype)
            slopes = [(layer.chord > 0.5).to(nothing.dtype) for layer in self.layers]
            start = torch.cat([nothing[0, :0], *slopes]).unsqueeze(0)
            found = self._bounded(torch.zeros(1, self.open, dtype=torch.int8), start, nothing, ROOT_STEPS)
        while True:
            if isinstance(found, Tensor):
                return Outcome("attacked", found)
            for domain in found:
                if domain.bound <= ROUNDING:
                    heapq.heappush(self.waiting, domain)
            if not self.waiting:
                return Outcome("certified")
            if deadline.over:
                return Outcome("undecided")
            taken = [heapq.heappop(self.waiting) for _ in range(min(len(self.waiting), BATCH // 2))]
            left: list[Domain] = []
            outcome = Outcome("certified")
            for domain in taken:
                if outcome.verdict != "attacked":
                    outcome = self._solved(domain)
                if outcome.verdict != "certified":
                    left.append(domain)
            if outcome.verdict == "attacked" or self.deadline.over or any(domain.open == 0 for domain in left):
                for domain in left:
                    heapq.heappush(self.waiting, domain)
                return outcome if outcome.verdict == "attacked" else Outcome("undecided")
            found = self._split(left) if left else []

    def programmed(self, deadline: Deadline, signs: Tensor | None = None) -> Outcome:
        """By the program alone. What it calls a counterexample within its tolerances is "undecided" unless it is one."""
        program = self.program()
        if program is None:
            return Outcome("undecided")
        outcome = program.solve(self.label, self.rival, deadline, None if signs is None else signs.numpy())
        if outcome.point is not None and not bool(self._margins(outcome.point.unsqueeze(0)) <= 0):
            return Outcome("undecided")
        return outcome

    def _solved(self, domain: Domain) -> Outcome:
        """By the linear program, which is exact where few signs are open; others are left undecided."""
        return self.programmed(self.deadline, domain.signs) if domain.open <= LEAF else Outcome("undecided")

    def _split(self, domains: list[Domain]) -> "list[Domain] | Tensor":
        """Both halves of each domain, or a point that breaks the network."""
        signs, alpha, beta = (torch.stack([getattr(d, name) for d in domains]) for name in ("signs", "alpha", "beta"))
        best = self._neurons(signs, alpha, beta)
        halves = torch.cat([_with(signs, best, sign) for sign in (1, -1)])
        return self._bounded(halves, alpha.repeat(2, 1), beta.repeat(2, 1), STEPS)

    @torch.no_grad()
    def _neurons(self, signs: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """For each domain ``[D, U]`` the neuron to split ``[D]``: of a few that loosen its bound most, the best in a trial."""
        relaxations, _ = self._substituted(signs, alpha, beta)
        scores = torch.cat([self._looseness(layer, relaxations) for layer in self.layers], 1)
        scores = scores.masked_fill(signs != 0, -1.0)
        count = min(TRIED, self.open)
        candidates = scores.topk(count, 1).indices  # [D, T]
        open_one = scores.gather(1, candidates) >= 0
        pairs = [
            torch.stack([self._substituted(_with(signs, column, sign), alpha, beta)[1] for sign in (1, -1)])
            for column in candidates.unbind(1)
        ]  # each [2, D]
        gains = torch.stack([pair.clamp(max=0).sum(0) + 1e-3 * pair.amin(0) for pair in pairs], 1)  # [D, T]
        choice = gains.masked_fill(~open_one, -torch.inf).argmax(1, keepdim=True)
        return candidates.gather(1, choice).squeeze(1)

    def _looseness(self, layer: _Layer, relaxations: Relaxations) -> Tensor:
        """How much the relaxation of each open neuron may cost a domain's bound ``[D, U_k]``.

        Where the coefficient is negative, the upper line's intercept; where it is positive, what the lower line of the slope in
        between leaves: the score of BaBSR (Bunel et al. 2020, JMLR 21, section 5.2.2) but for the bias.
        """
        relaxed = relaxations[layer.node]
        assert isinstance(relaxed, _Assumed)
        given = from_cell(relaxed.given[0, :, 0, 0], layer.node.input_shape).flatten(1)[:, layer.places]
        lower, upper = (end.flatten()[layer.places] for end in layer.relaxed.interval)
        below = torch.minimum(-lower, upper)
        return torch.where(given < 0, -given * layer.intercept, given * below / 4)

    def _bounded(self, signs: Tensor, alpha: Tensor, beta: Tensor, steps: int) -> "list[Domain] | Tensor":
        """The domains with the best bounds of a gradient ascent, or a point ``[C, H, W]`` that breaks the network."""
        alpha, beta = alpha.clone().requires_grad_(), beta.clone().requires_grad_()
        best = torch.full((len(signs),), -torch.inf, dtype=alpha.dtype)
        kept_alpha, kept_beta = alpha.detach().clone(), beta.detach().clone()
        optimiser = torch.optim.Adam([{"params": [alpha], "lr": ALPHA_RATE}, {"params": [beta], "lr": BETA_RATE}])
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                _, lower, at_input = self._all(signs, alpha, beta)
            with torch.no_grad():
                better = lower > best
                best = torch.where(better, lower, best)
                kept_alpha[better], kept_beta[better] = alpha[better], beta[better]
                if step in (0, steps) and (point := self._broken(at_input)) is not None:
                    return point
            if bool((best > ROUNDING).all()) or self.deadline.over or step == steps:
                break
            optimiser.zero_grad()
            (-lower[best <= ROUNDING].sum()).backward()
            optimiser.step()
            with torch.no_grad():
                alpha.clamp_(0, 1)
                beta.clamp_(min=0)
                for group in optimiser.param_groups:
                    group["lr"] *= DECAY
        return [Domain(*each) for each in zip(best.tolist(), signs, kept_alpha, kept_beta, strict=True)]

    def _broken(self, at_input: Tensor) -> Tensor | None:
        """Where the bounds are least in the box: a point that breaks the network, if one of them does."""
        centre, radius = (each[0] for each in self.box.centred)
        points = centre - radius * from_cell(at_input[0, :, 0, 0], tuple(self.radius.shape[2:])).sign()
        points = points.clamp(self.box.lower, self.box.upper)
        margins = self._margins(points)
        least = int(margins.argmin())
        return points[least] if bool(margins[least] <= 0) else None

    def _margins(self, points: Tensor) -> Tensor:
        """Of points ``[N, C, H, W]``."""
        logits = self.members.logits(points)[0]
        return logits[:, self.label] - logits[:, self.rival]

    def _substituted(self, signs: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Relaxations, Tensor]:
        relaxations, lower, _ = self._all(signs, alpha, beta)
        return relaxations, lower

    def _all(self, signs: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Relaxations, Tensor, Tensor]:
        """Relaxations, bounds ``[D]`` and the rows' coefficients at the input of domains ``[D, U]``."""
        relaxations: Relaxations = {}
        first = 0
        for layer in self.layers:
            own = slice(first, first + len(layer.places))
            relaxations[layer.node] = _assumed(layer, signs[:, own], alpha[:, own], beta[:, own])
            first = own.stop
        count = len(signs)
        rows = replace(
            self.rows,
            coefficients=self.rows.terms.expand(-1, count, *[-1] * (self.rows.terms.ndim - 2)),
            constant=self.rows.constant.expand(-1, count, -1, -1),
        )
        rows = back(rows, self.members.hidden, relaxations)
        lower = concretised(rows, self.radius)[0].flatten()
        return relaxations, lower, rows.terms.detach()


def _layer(node: BoundActivation, relaxed: RelaxedActivation) -> _Layer:
    lower, upper = (end[0, 0].flatten() for end in relaxed.interval)
    least = node.least_slope
    assert least is not None
    places = ((lower < 0) & (upper > 0)).nonzero().flatten()
    low, high = lower[places], upper[places]
    chord = high / (high - low)
    slope = torch.where(lower >= 0, 1.0, least).to(lower.dtype)
    return _Layer(node, relaxed, slope, places, chord, -(1 - least) * chord * low, least)


def _assumed(layer: _Layer, signs: Tensor, alpha: Tensor, beta: Tensor) -> _Assumed:
    """The relaxation of one activation in domains ``[D, U_k]``."""
    least = layer.least
    known = torch.where(signs > 0, 1.0, least).to(alpha.dtype)
    unknown = signs == 0
    above = torch.where(unknown, least + (1 - least) * layer.chord, known)
    below = torch.where(unknown, least + (1 - least) * alpha, known)
    intercept = torch.where(unknown, layer.intercept, torch.zeros_like(layer.intercept))
    shape = layer.node.input_shape

    def spread(values: Tensor, base: Tensor) -> Tensor:
        """``[D, U_k]`` and ``[N]`` -> ``[1, D, *shape]``."""
        whole = base.expand(len(signs), -1).index_copy(1, layer.places, values)
        return whole.unflatten(1, shape).unsqueeze(0)

    zeros = torch.zeros_like(layer.slope)
    lines = Lines(
        spread(below, layer.slope), spread(above, layer.slope), zeros.reshape(1, 1, *shape), spread(intercept, zeros)
    )
    multipliers = spread(-beta * signs, zeros)
    return _Assumed(lines, layer.relaxed.reference, layer.relaxed.interval, multipliers)


def _with(signs: Tensor, neurons: Tensor, sign: int) -> Tensor:
    """The same domains with one more sign assumed in each."""
    return signs.scatter(1, neurons.unsqueeze(1), sign)
