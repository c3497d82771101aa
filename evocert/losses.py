"""Losses of margins: what a fitness is made of."""

import torch
from torch import Tensor


def cross_entropy_of_margins(margins: Tensor) -> Tensor:
    """Cross-entropy of the logits that the margins describe: ``log(1 + sum_j exp(-margin_j))``.

    With lower bounds of the margins it is an upper bound of the worst-case cross-entropy over the box (Wong and Kolter
    2018, arXiv:1711.00851, theorem 2).

    Shapes: ``[..., M]`` -> ``[...]``.
    """
    exponent = torch.logsumexp(-margins, -1)
    return torch.logaddexp(exponent, torch.zeros_like(exponent))
