"""What the gradient methods descend on: a loss for each member and image of a tile. A new one is a function and a line here.

All but "certified" attack each member on its way, and so take one member at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evocert.bounds import BOUNDS, Box, Members, box_around, logit_margins
from evocert.bounds.chain import forward
from evocert.losses import cross_entropy_of_margins


@dataclass(frozen=True)
class Options:
    """What an objective may depend on beside the images.

    Attributes:
        bound: a name in ``BOUNDS``.
        eps: radius in [0, 1] pixels.
        mixture: in [0, 1], the weight of the certified loss in "mtl-ibp", "cc-ibp" and "exp-ibp", and the share of eps that is
            the radius of the small box of "sabr".
        steps: of the attack.
        step: its length as a share of eps.
        regulariser: weight of ``regularisers.shi`` over the whole box, which is added to any objective.
    """

    bound: str
    eps: float
    mixture: float = 0.5
    steps: int = 8
    step: float = 0.25
    regulariser: float = 0.0


# (members, images [B, C, H, W], labels [B], noise [B, C, H, W] in [-1, 1], options) -> certified or worst margins' loss [P, B]
Objective = Callable[[Members, Tensor, Tensor, Tensor, Options], Tensor]


def certified(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """Cross-entropy of the bound on the margins over the whole box: the fitness of evolution."""
    margins = BOUNDS[options.bound].margins(members, box_around(images, options.eps), labels)
    return cross_entropy_of_margins(margins)


def standard(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """Cross-entropy on the images themselves."""
    return cross_entropy_of_margins(logit_margins(members.logits(images), labels))


def pgd(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """Cross-entropy at points that an attack finds in the box (Madry et al. 2018, arXiv:1706.06083)."""
    box = box_around(images, options.eps)
    return cross_entropy_of_margins(_at(members, _attacked(members, images, labels, noise, box, options), labels))


def sabr(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """IBP over a small box around an adversarial point (Mueller et al. 2023, arXiv:2210.04871, section 3).

    The point is looked for, in each pixel, only so far from the image that the small box, of radius ``mixture * eps``, stays
    within the large one.
    """
    radius = options.mixture * options.eps
    whole = box_around(images, options.eps)
    inner = Box(
        torch.minimum(whole.lower + radius, images.clamp(whole.lower, whole.upper)),
        torch.maximum(whole.upper - radius, images.clamp(whole.lower, whole.upper)),
    )
    (point,) = _attacked(members, images, labels, noise, inner, options)  # of one member
    small = Box((point - radius).clamp(whole.lower, whole.upper), (point + radius).clamp(whole.lower, whole.upper))
    return cross_entropy_of_margins(BOUNDS["ibp"].margins(members, small, labels))


def mtl_ibp(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """The sum of adversarial and IBP loss, weighted (De Palma et al. 2024, arXiv:2305.13991, section 4.2)."""
    attacked, bounded = _both(members, images, labels, noise, options)
    losses = cross_entropy_of_margins(attacked), cross_entropy_of_margins(bounded)
    return (1 - options.mixture) * losses[0] + options.mixture * losses[1]


def cc_ibp(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """The loss of the weighted sum of adversarial margins and IBP's (De Palma et al. 2024, arXiv:2305.13991, section 4.1)."""
    attacked, bounded = _both(members, images, labels, noise, options)
    return cross_entropy_of_margins((1 - options.mixture) * attacked + options.mixture * bounded)


def exp_ibp(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> Tensor:
    """The weighted geometric mean of adversarial and IBP loss (De Palma et al. 2024, arXiv:2305.13991, section 4.3)."""
    attacked, bounded = _both(members, images, labels, noise, options)
    tiny = torch.finfo(attacked.dtype).tiny
    logs = (cross_entropy_of_margins(each).clamp(min=tiny).log() for each in (attacked, bounded))
    adversarial, certain = logs
    return ((1 - options.mixture) * adversarial + options.mixture * certain).exp()


OBJECTIVES: dict[str, Objective] = {
    "certified": certified,
    "standard": standard,
    "pgd": pgd,
    "sabr": sabr,
    "mtl-ibp": mtl_ibp,
    "cc-ibp": cc_ibp,
    "exp-ibp": exp_ibp,
}

# Those that look for adversarial points, in steps of ``Options``.
ATTACKING = tuple(name for name in OBJECTIVES if name not in ("certified", "standard"))


def _both(members: Members, images: Tensor, labels: Tensor, noise: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Margins at an adversarial point, and IBP's over the box, each ``[P, B, M]``."""
    box = box_around(images, options.eps)
    attacked = _at(members, _attacked(members, images, labels, noise, box, options), labels)
    return attacked, BOUNDS["ibp"].margins(members, box, labels)


def _at(members: Members, points: Tensor, labels: Tensor) -> Tensor:
    """Margins ``[P, B, M]`` at points ``[P, B, C, H, W]``."""
    return logit_margins(forward(members.nodes, points), labels)


def _attacked(members: Members, images: Tensor, labels: Tensor, noise: Tensor, box: Box, options: Options) -> Tensor:
    """Where signed gradient steps from a random start end: ``[P, B, C, H, W]``, no part of the graph."""
    start = (images + options.eps * noise).clamp(box.lower, box.upper)
    points = start.expand(len(members), *start.shape).detach()
    length = options.step * options.eps
    still = Members(members.network, members.parameters.detach())
    for _ in range(options.steps):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy_of_margins(_at(still, points, labels)).sum()
            (gradient,) = torch.autograd.grad(loss, points)
        points = (points.detach() + length * gradient.sign()).clamp(box.lower, box.upper)
    return points.detach()
