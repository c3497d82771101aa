"""Projected gradient descent on margins: looks for a counterexample inside the box, and replays what it finds.

Images and eps are in [0, 1] pixel units, and every point lies in the box ``[max(x - eps, 0), min(x + eps, 1)]``.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evocert.errors import InputError


class Attack(NamedTuple):
    """What an attack found.

    Attributes:
        points: ``[B, C, H, W]`` in [0, 1] pixels, dtype of the images: for each image the point of its box with the
            lowest margin that was found (the image itself where nothing lower was found).
        broken: ``[B]`` bool, True where a float64 copy of the network gives a margin <= 0 at that very point.
    """

    points: Tensor
    broken: Tensor


def worst_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin over the closest other class, ``min_{j != y} (logit_y - logit_j)``: positive if y is predicted.

    Args:
        logits: ``[B, K]``, no unit.
        labels: ``[B]`` int64 in [0, K).

    Returns:
        ``[B]``, differentiable in the logits; infinite if K is 1. A tie with another class is 0.

    Source: the loss f_6 of Carlini and Wagner 2017 (arXiv:1608.04644), without its clipping at zero.
    """
    index = labels.unsqueeze(1)  # [B, 1]
    others = logits.scatter(1, index, -math.inf)  # [B, K]
    return logits.gather(1, index).squeeze(1) - others.amax(1)


def pgd(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 40,
    restarts: int = 3,
    step_size: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Attack:
    """Attack every image inside its box by sign-gradient descent on :func:`worst_margin`.

    The first restart starts at the image itself, the others at points drawn uniformly from the box. Images broken by
    one restart are left out of the next ones. An image that is misclassified already counts as broken. A point counts
    only as it is returned: checked in float64 to lie in the box, and replayed on a float64 copy of the module, where a
    tie counts as broken. NaN logits are never a counterexample.

    Args:
        module: the network, normalisation included, ``[B, C, H, W] -> [B, K]``, on the images' device. It is copied,
            and the copy runs in eval mode: the module keeps its mode, dtype and gradients.
        images: ``[B, C, H, W]`` float32 or float64 in [0, 1] pixels.
        labels: ``[B]`` int64.
        eps: radius in [0, 1] pixel units, finite and >= 0.
        steps: gradient steps of one restart, >= 1.
        restarts: starting points for each image, >= 1.
        step_size: length of a step in pixel units, > 0; ``2.5 * eps / steps`` if None.
        seed: of a generator of its own; the global random state is neither read nor moved.
        dtype: in which gradients are computed.

    Raises:
        InputError: an argument is not as described above.

    Source: Madry et al. 2018 (arXiv:1706.06083).
    """
    _check(images, labels, eps, steps, restarts, step_size)
    length = 2.5 * eps / steps if step_size is None else step_size
    generator = torch.Generator(images.device).manual_seed(seed)
    searched = copy.deepcopy(module).eval().to(dtype).requires_grad_(False)
    replayed = copy.deepcopy(module).eval().to(torch.float64).requires_grad_(False)

    images = images.detach()
    box = _Box.around(images, eps)
    lower, upper = box.low, box.high

    with torch.no_grad():
        logits = replayed(images.double())
    _check_labels(labels, logits)
    points, lowest = images.clone(), _finite_or_inf(worst_margin(logits, labels))
    if eps == 0:
        return Attack(points, lowest <= 0)

    for restart in range(restarts):
        rows = (lowest > 0).nonzero().squeeze(1)  # [A]: images that are not broken yet
        if rows.numel() == 0:
            break
        low, high = lower[rows].to(dtype), upper[rows].to(dtype)  # [A, C, H, W]
        start = images[rows].to(dtype)
        if restart > 0:
            start = low + (high - low) * torch.rand(low.shape, generator=generator, device=low.device, dtype=dtype)
        found = _descend(searched, start, labels[rows], low, high, steps, length)
        # After the cast, so that what is checked and replayed is exactly what is returned.
        found = found.to(images.dtype).clamp(lower[rows], upper[rows])
        inside, margins = box.replayed(replayed, found, labels, rows)  # [A]
        better = inside & (margins < lowest[rows])
        points[rows[better]] = found[better]
        lowest[rows[better]] = margins[better]
    return Attack(points, lowest <= 0)


def apgd(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    numbers: Sequence[int],
    steps: int = 100,
    restarts: int = 5,
    seed: int = 0,
) -> Attack:
    """Attack every image by descents with momentum whose steps adapt, aimed at one class after another.

    The first descent is on :func:`worst_margin` from the image itself; the others start at points drawn uniformly from the box
    and are on the margin over one other class, beginning with the class that is closest on the image. What is found of an image
    depends on the image, its number, the seed and the images beside it alone. Points count as in :func:`pgd`.

    Args:
        module, images, labels, eps: as of :func:`pgd`.
        numbers: one for each image, from which its starting points are drawn.
        steps: of one descent, >= 1.
        restarts: descents for each image, >= 1.
        seed: beside the numbers.

    Raises:
        InputError: an argument is not as described above.

    Source: APGD and its targeted form, Croce and Hein 2020 (arXiv:2003.01690), algorithm 1 and section 4.
    """
    _check(images, labels, eps, steps, restarts, None)
    if len(numbers) != len(images):
        raise InputError(f"numbers are {len(numbers)}: one for each of the {len(images)} images is allowed")
    searched = copy.deepcopy(module).eval().requires_grad_(False).to(images.dtype)
    replayed = copy.deepcopy(module).eval().to(torch.float64).requires_grad_(False)
    images = images.detach()
    box = _Box.around(images, eps)
    with torch.no_grad():
        logits = replayed(images.double())
    _check_labels(labels, logits)
    points, lowest = images.clone(), _finite_or_inf(worst_margin(logits, labels))
    nearest = logits.scatter(1, labels.unsqueeze(1), -math.inf).argsort(1, descending=True)  # [B, K]: the label is last
    for restart in range(restarts if eps > 0 else 0):
        rows = (lowest > 0).nonzero().squeeze(1)
        if rows.numel() == 0:
            break
        low, high = box.low[rows], box.high[rows]
        if restart == 0:
            start, margin = images[rows], partial(worst_margin, labels=labels[rows])
        else:
            target = nearest[rows, (restart - 1) % max(1, logits.shape[1] - 1)]
            start = low + (high - low) * _drawn([numbers[row] for row in rows.tolist()], low, seed + restart)
            margin = partial(_margin_over, labels=labels[rows], targets=target)
        found = _adaptive_descent(searched, start, margin, low, high, steps, 2 * eps)
        better, margins = box.replayed(replayed, found, labels, rows)
        better &= margins < lowest[rows]
        points[rows[better]], lowest[rows[better]] = found[better], margins[better]
    return Attack(points, lowest <= 0)


def _margin_over(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``logit_y - logit_t``: logits ``[B, K]``, two ``[B]`` -> ``[B]``."""
    return (logits.gather(1, labels.unsqueeze(1)) - logits.gather(1, targets.unsqueeze(1))).squeeze(1)


def _drawn(numbers: list[int], like: Tensor, seed: int) -> Tensor:
    """For each number an image of its own, uniform in [0, 1]."""
    parts = []
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, number)) & (2**63 - 1))
        parts.append(torch.rand(like.shape[1:], generator=generator, dtype=like.dtype))
    return torch.stack(parts).to(like.device)


# Of all steps, where a descent looks back for the first time; by how much less each further stretch is; the shortest one.
FIRST_STRETCH, SHORTER, SHORTEST = 0.22, 0.03, 0.06
MOMENTUM = 0.75  # weight of the new step
SUCCESSES = 0.75  # share of a stretch's steps that must have gone down for the length to stay


def _adaptive_descent(
    module: nn.Module,
    start: Tensor,
    margin: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    steps: int,
    length: float,
) -> Tensor:
    """The point of the lowest margin on one descent from ``start [A, C, H, W]`` whose steps halve where they do not pay."""
    looks = set()
    part, stretch = FIRST_STRETCH, FIRST_STRETCH
    while part < 1:
        looks.add(math.ceil(part * steps))
        stretch = max(stretch - SHORTER, SHORTEST)
        part += stretch
    count = len(start)
    lengths = torch.full((count, 1, 1, 1), length, dtype=start.dtype, device=start.device)
    point = before = start.clamp(lower, upper)
    best, lowest = point, torch.full((count,), math.inf, dtype=start.dtype, device=start.device)
    last_margin, went_down = lowest.clone(), torch.zeros_like(lowest)
    at_look, halved, since = lowest.clone(), torch.ones_like(lowest, dtype=torch.bool), 0
    for step in range(steps + 1):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            margins = margin(module(point))
            (gradient,) = torch.autograd.grad(margins.sum(), point)
        point, margins = point.detach(), _finite_or_inf(margins.detach())
        went_down += margins < last_margin
        last_margin = margins
        better = margins < lowest
        lowest = torch.where(better, margins, lowest)
        best = torch.where(better[:, None, None, None], point, best)
        since += 1
        if step in looks:
            stalled = (went_down < SUCCESSES * since) | (~halved & (lowest >= at_look))
            lengths = torch.where(stalled[:, None, None, None], lengths / 2, lengths)
            point = torch.where(stalled[:, None, None, None], best, point)
            before = torch.where(stalled[:, None, None, None], best, before)
            at_look, halved, since = lowest.clone(), stalled, 0
            went_down.zero_()
        target = (point - lengths * gradient.sign()).clamp(lower, upper)
        weight = MOMENTUM if step else 1.0
        moved = (point + weight * (target - point) + (1 - weight) * (point - before)).clamp(lower, upper)
        before, point = point, moved
    return best


@dataclass(frozen=True)
class _Box:
    """The points that count: in the float64 box, and numbers of the images' dtype."""

    lower: Tensor  # float64
    upper: Tensor
    low: Tensor  # of the images' dtype, rounded inwards
    high: Tensor

    @classmethod
    def around(cls, images: Tensor, eps: float) -> "_Box":
        lower, upper = (images.double() - eps).clamp(min=0), (images.double() + eps).clamp(max=1)
        return cls(lower, upper, *_rounded_inwards(lower, upper, images.dtype))

    @torch.no_grad()
    def replayed(self, replayed: nn.Module, points: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which points of some images lie in their boxes, and what margins a float64 network has there."""
        margins = _finite_or_inf(worst_margin(replayed(points.double()), labels[rows]))
        inside = (points.double() >= self.lower[rows]) & (points.double() <= self.upper[rows])
        return inside.flatten(1).all(1), margins


def _descend(
    module: nn.Module, start: Tensor, labels: Tensor, lower: Tensor, upper: Tensor, steps: int, length: float
) -> Tensor:
    """The point of lowest margin on one descent from ``start [A, C, H, W]``, the start and the end included."""
    point = start.clamp(lower, upper)
    best, lowest = point, torch.full_like(labels, math.inf, dtype=point.dtype)
    for step in range(steps + 1):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            margins = worst_margin(module(point), labels)  # [A]
            total = margins.sum()
        better = margins.detach() < lowest
        best = torch.where(better[:, None, None, None], point.detach(), best)
        lowest = torch.where(better, margins.detach(), lowest)
        if step < steps:
            (gradient,) = torch.autograd.grad(total, point)
            point = (point.detach() - length * gradient.sign()).clamp(lower, upper)
    return best


def _rounded_inwards(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest box of numbers of ``dtype`` inside the float64 box; an image of that dtype is always in it."""
    low, high = lower.to(dtype), upper.to(dtype)
    low = torch.where(low.double() < lower, low.nextafter(torch.full_like(low, math.inf)), low)
    high = torch.where(high.double() > upper, high.nextafter(torch.full_like(high, -math.inf)), high)
    return low, high


def _finite_or_inf(margins: Tensor) -> Tensor:
    # A NaN would lose every comparison, also against a real counterexample found later.
    return margins.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _check(images: Tensor, labels: Tensor, eps: float, steps: int, restarts: int, step_size: float | None) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"eps is {eps}: a finite number >= 0 in [0, 1] pixel units is allowed")
    if steps < 1:
        raise InputError(f"steps is {steps}: 1 or more are allowed")
    if restarts < 1:
        raise InputError(f"restarts is {restarts}: 1 or more are allowed")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size is {step_size}: a finite number > 0 in [0, 1] pixel units is allowed")
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: float32 or float64 [B, C, H, W] is allowed"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("images have pixels outside [0, 1], or NaN: only [0, 1] is allowed")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: int64 [{images.shape[0]}] is allowed"
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    classes = logits.shape[1]
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise InputError(f"labels go from {int(labels.min())} to {int(labels.max())}: 0 to {classes - 1} are allowed")
