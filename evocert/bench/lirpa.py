"""auto_LiRPA beside it, where its public source can be imported: looped over members.

Xu et al. 2020, arXiv:2002.12920; https://github.com/Verified-Intelligence/auto_LiRPA. It is given what serves it best:
patches for convolutions, the adaptive slope, one bounded module for all members, whose weights are exchanged in place, and
the normalisation applied to the box instead of the network, where it would cost a back-substitution more.

Its CROWN back-substitutes, by default, the neurons that IBP leaves undecided for some image of those at once, and keeps IBP's
intervals for the others. That is between "deeppoly" and "deeppoly-sparse", and depends on the batch.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evocert.bench.measure import peak, within
from evocert.bench.work import Work
from evocert.bounds import box_around
from evocert.bounds.margins import difference_rows
from evocert.networks import with_parameters

METHODS = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "deeppoly": "CROWN", "deeppoly-sparse": "CROWN"}
CHUNKS = (1, 2, 8)  # images at once, beside all of them
MEMBERS = 3  # on which it is timed
SECONDS = 4.0  # after which no further member is begun
ABSENT = (
    "auto_LiRPA cannot be imported, so it has no columns; to have them put what it imports and its source on\n"
    "  PYTHONPATH (github.com/Verified-Intelligence/auto_LiRPA; the 0.3 on PyPI is too old)"
)


def is_there() -> bool:
    return importlib.util.find_spec("auto_LiRPA") is not None


class _Population:
    """One bounded module for all members of a population.

    Args:
        work: the population.
        method: a name of auto_LiRPA's.
        chunk: images at once.
    """

    def __init__(self, work: Work, method: str, chunk: int) -> None:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        device = work.images.device
        normalize, *layers = work.architecture.module().to(device).eval()
        self.module, self.method = nn.Sequential(*layers), method
        centres, lowers, uppers = (
            normalize(each).split(chunk) for each in (work.images, *box_around(work.images, work.eps))
        )
        options = {"conv_mode": "patches", "activation_bound_option": "adaptive"}
        self.bounded = BoundedModule(self.module, torch.zeros_like(centres[0]), options, device=device)
        self.bounded.eval()  # which returns nothing
        rows = difference_rows(work.labels, work.network.num_classes, work.images.dtype).split(chunk)
        self.parts = [
            (BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)), each)
            for x, lower, upper, each in zip(centres, lowers, uppers, rows, strict=True)
        ]

    @torch.no_grad()
    def margins(self, parameters: Tensor) -> Tensor:
        """Of the member with the weights ``[D]``: ``[B, M]``."""
        with_parameters(self.module, parameters)  # which the bounded module shares
        return torch.cat(
            [
                self.bounded.compute_bounds(x=(x,), C=rows, method=self.method, bound_lower=True, bound_upper=False)[0]
                for x, rows in self.parts
            ]
        )


def measured(work: Work, method: str, chunks: list[int], repeats: int) -> dict[str, Any]:
    """What it takes, in a process that has done nothing yet.

    Args:
        work: the population, or some members of it.
        method: a name of auto_LiRPA's.
        chunks: how many images at once; of the first its memory is measured.
        repeats: how often each member is timed.

    Returns:
        ``version``; ``peak`` in bytes; ``seconds``, of a member, several with each of the chunks; ``margins``, the bounds
        ``[B, M]`` of the first member with the first of them.
    """
    import auto_LiRPA

    device, first = work.images.device, work.parameters[0]
    population = _Population(work, method, chunks[0])
    found = peak(lambda: [population.margins(weights) for weights in work.parameters], device)
    margins, seconds = population.margins(first), {}
    for chunk in chunks:
        if chunk != chunks[0]:
            population = _Population(work, method, chunk)
            population.margins(first)
        calls = [partial(population.margins, weights) for weights in work.parameters] * repeats
        seconds[chunk] = within(SECONDS, calls, device)
    return {"version": auto_LiRPA.__version__, "peak": found, "seconds": seconds, "margins": margins.tolist()}
