"""How good one network is: natural accuracy, accuracy under attack, and certified accuracy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evocert.attacks import pgd
from evocert.bounds import BOUNDS, Cost, Members, Network, Tile, box_around, choose_tile, logit_margins, over_tiles
from evocert.data import Part
from evocert.errors import InputError

BATCH = 500  # images at a time; the bounds cut them further, into tiles
# What a lower bound of a margin must exceed to count as a proof: far above what float64 loses in sums of this size, and far
# below what any figure shows.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Accuracy:
    """Fractions of all images of a part, in [0, 1].

    Attributes:
        natural: classified correctly.
        attacked: classified correctly, and no counterexample was found by the attack.
        certified: for each bound: classified correctly, and proved for the whole box.
    """

    natural: float
    attacked: float
    certified: dict[str, float]


class ContradictionError(RuntimeError):
    """An example is certified and attacked at once: one of the two is wrong."""


def validate(
    network: Network, parameters: Tensor, part: Part, eps: float, bound: str, budget: int
) -> tuple[float, float]:
    """Natural and certified accuracy of one network in the parameters' own precision: to watch a training by.

    Args:
        parameters: ``[D]``.
        part: the images.
        eps: radius in [0, 1] pixels.
        bound: a name in ``BOUNDS``.
        budget: bytes for temporaries.
    """
    correct, certified = _decide(network, parameters, part, eps, [bound], budget)
    return correct.double().mean().item(), certified[bound].double().mean().item()


def evaluate(
    module: nn.Module,
    network: Network,
    parameters: Tensor,
    part: Part,
    eps: float,
    *,
    bounds: Iterable[str] = ("ibp",),
    steps: int = 40,
    restarts: int = 3,
    step_size: float | None = None,
    budget: int = 2 * 2**30,
) -> Accuracy:
    """All figures of one network over a whole part, the certified ones in float64 from the float32 parameters.

    Args:
        module: the network with these parameters, for the attack.
        network: what ``read_network`` gave for it.
        parameters: ``[D]`` float32.
        part: the images.
        eps: radius in [0, 1] pixels, boxes clipped to [0, 1].
        bounds: names in ``BOUNDS``.
        steps, restarts, step_size: of the attack; see ``attacks.pgd``.
        budget: bytes for the temporaries of the bounds.

    Raises:
        ContradictionError: an example is both certified and attacked.
    """
    correct, certified = _decide(network, parameters.double(), part, eps, list(bounds), budget)
    resistant = correct.clone()
    for start in range(0, len(part), BATCH):
        rows = start + torch.nonzero(correct[start : start + BATCH]).flatten().cpu()
        if len(rows):
            images, labels = (t.to(parameters.device) for t in part.batch(rows))
            attack = pgd(module, images, labels, eps, steps=steps, restarts=restarts, step_size=step_size, seed=start)
            resistant[rows] &= ~attack.broken
    for name, proved in certified.items():
        both = torch.nonzero(proved & ~resistant).flatten()
        if len(both):
            raise ContradictionError(
                f"example {int(both[0])} of the part is certified by {name} and yet attacked at eps={eps:.6g}: a bound or the "
                f"attack is wrong ({len(both)} such examples); please report this with the run folder"
            )
    means = {name: proved.double().mean().item() for name, proved in certified.items()}
    return Accuracy(correct.double().mean().item(), resistant.double().mean().item(), means)


def evaluation_tile(
    network: Network, bounds: Sequence[str], dtype: torch.dtype, budget: int, device: torch.device
) -> Tile:
    """The tile in which one network is evaluated by some bounds.

    Raises:
        InputError: the budget is too small for it.
    """
    cost = Cost.most(BOUNDS[name].cost(network, device) for name in ("ibp", *bounds))
    try:
        return choose_tile(cost, BATCH, budget, device, dtype)._replace(members=1)
    except ValueError as error:
        raise InputError(f"in the evaluation: {error}") from error


def _decide(
    network: Network, parameters: Tensor, part: Part, eps: float, bounds: Sequence[str], budget: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """For each image whether it is classified correctly, and by each bound whether it is proved: bools ``[N]``."""

    def on_tile(members: Members, images: Tensor, labels: Tensor) -> Tensor:
        natural = logit_margins(members.logits(images), labels)
        box = box_around(images, eps)
        margins = [natural, *(BOUNDS[name].margins(members, box, labels) for name in bounds)]
        return torch.stack(
            [(m > least).all(2) for m, least in zip(margins, (0.0, *[ROUNDING] * len(bounds)), strict=True)], 2
        )

    tile = evaluation_tile(network, bounds, parameters.dtype, budget, parameters.device)
    verdicts = []
    with torch.no_grad():
        for start in range(0, len(part), BATCH):
            images, labels = part.batch(slice(start, start + BATCH))
            inputs = images.to(parameters.device, parameters.dtype), labels.to(parameters.device)
            verdicts.append(over_tiles(on_tile, network, parameters.unsqueeze(0), inputs, tile)[0])
    correct, *proved = torch.cat(verdicts).unbind(1)  # each [N]
    return correct, {name: correct & p for name, p in zip(bounds, proved, strict=True)}
