"""alpha-CROWN: DeepPoly's intervals, then the margins with the lower slopes that serve each margin best.

Xu et al. 2021, arXiv:2011.13824, section 3.1. A ReLU that crosses zero may take any slope from 0 to 1 for its lower line, and
the best one differs from margin to margin, from image to image and from member to member. Each has its own here, found by
gradient ascent on the bound, starting from DeepPoly's choice. The intervals of the activations stay DeepPoly's. The best
slopes seen are kept, the starting ones among them, so that the bound is never worse than DeepPoly's. In its gradient slopes
count as constant.
"""

from dataclasses import replace

import torch
from torch import Tensor

from evocert.bounds import backward, deeppoly
from evocert.bounds.backward import Relaxing
from evocert.bounds.network import Box, Members
from evocert.bounds.nonlinear import BoundActivation, Relaxations, RelaxedActivation
from evocert.bounds.relaxation import Lines

STEPS = 20
FIRST_STEP = 0.3  # of a slope, in [0, 1]; each step is shorter than the one before it
DECAY = 0.85


def margins(members: Members, box: Box, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """Lower bounds of the margins over the box ``[P, B, M]``; arguments as of ``ibp.margins``.

    ``steps``: how often the slopes are improved; 0 gives DeepPoly's bounds.
    """
    # Copies, since what was made in inference mode has no gradient, and nothing that is made in it.
    with torch.inference_mode(False), torch.no_grad():
        plain = Members(members.network, members.parameters.detach().clone(), members.chunk_parts)
        boxed = Box(box.lower.detach().clone(), box.upper.detach().clone())
        highest, slopes = _ascended(plain, boxed, labels.clone(), steps)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (members.parameters, *box))):
        return highest
    return backward.margins(members, box, labels, _with_slopes(deeppoly.relaxing(members, box), slopes))


def _ascended(members: Members, box: Box, labels: Tensor, steps: int) -> tuple[Tensor, list[Tensor | None]]:
    """The best bounds ``[P, B, M]`` of a gradient ascent on the slopes, and the slopes that gave them."""
    found = deeppoly.relaxing(members, box)
    highest = backward.margins(members, box, labels, found)
    slopes = _free_slopes(found.relaxations, highest.shape[2])
    best = list(slopes)
    if all(each is None for each in slopes):
        return highest, best
    for step in range(steps):
        with torch.enable_grad():
            leaves = [None if each is None else each.detach().requires_grad_() for each in slopes]
            bounds = backward.margins(members, box, labels, _with_slopes(found, leaves))
            gradients = iter(torch.autograd.grad(bounds.sum(), [leaf for leaf in leaves if leaf is not None]))
        # By the gradient's sign: how much a slope matters differs by orders of magnitude between neurons. Projected, not
        # clamped within the graph: there a slope that starts at 0 or 1, as DeepPoly's do, would never move.
        length = FIRST_STEP * DECAY**step
        slopes = [None if each is None else (each + length * next(gradients).sign()).clamp(0, 1) for each in slopes]
        bounds = backward.margins(members, box, labels, _with_slopes(found, slopes))
        better = bounds > highest  # [P, B, M]
        highest = torch.where(better, bounds, highest)
        for i, (old, new) in enumerate(zip(best, slopes, strict=True)):
            if old is not None and new is not None:
                best[i] = torch.where(better.reshape(*better.shape, *(1,) * (new.ndim - 3)), new, old)
    return highest, best


def _free_slopes(relaxations: Relaxations, margins: int) -> list[Tensor | None]:
    """For each activation, in order, the starting slopes as parts of the way from the least to 1: ``[P, B, M, *shape]``.

    None for one whose lower line is not free.
    """
    found: list[Tensor | None] = []
    for node, relaxed in relaxations.items():
        least = node.least_slope if isinstance(node, BoundActivation) else None
        if least is None or least >= 1:
            found.append(None)
            continue
        assert isinstance(relaxed, RelaxedActivation)
        part = ((relaxed.lines.lower_slope - least) / (1 - least)).unsqueeze(2)
        found.append(part.expand(-1, -1, margins, *part.shape[3:]).contiguous())
    return found


def _with_slopes(relaxing: Relaxing, slopes: list[Tensor | None]) -> Relaxing:
    """The same relaxations with lower slopes of each margin's own where the interval crosses zero."""
    new = dict(relaxing.relaxations)
    for (node, relaxed), part in zip(relaxing.relaxations.items(), slopes, strict=True):
        if part is None:
            continue
        assert isinstance(node, BoundActivation)
        assert isinstance(relaxed, RelaxedActivation)
        least, decided, lines = node.least_slope, node.decided(*relaxed.interval), relaxed.lines
        assert least is not None
        assert decided is not None
        lower = torch.where(decided.unsqueeze(2), lines.lower_slope.unsqueeze(2), least + (1 - least) * part)
        above, *intercepts = (e.unsqueeze(2) for e in (lines.upper_slope, lines.lower_intercept, lines.upper_intercept))
        before, after = (each.unsqueeze(2) for each in relaxed.reference)
        new[node] = RelaxedActivation(Lines(lower, above, *intercepts), (before, after), relaxed.interval)
    return replace(relaxing, relaxations=new)
