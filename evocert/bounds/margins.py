"""Margins ``logit[y] - logit[j]``: the K - 1 differences that decide a classification, folded into the last layer.

Bounding the difference as one linear function, instead of subtracting bounds of two logits, is tighter and no less sound
(Gowal et al. 2018, arXiv:1810.12715, section 3: "elision of the last layer").
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class ClassPairs(NamedTuple):
    """Index tables for K classes, M = K - 1 rivals, K * M / 2 unordered pairs."""

    first: Tensor  # [pairs] the smaller class of each pair
    second: Tensor  # [pairs] the larger one
    rivals: Tensor  # [K, M] the classes other than y, rising
    pair_of: Tensor  # [K, M] the pair {y, rival}


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve later gradients too
def class_pairs(num_classes: int, device: torch.device) -> ClassPairs:
    first, second = torch.triu_indices(num_classes, num_classes, 1)
    number = torch.full((num_classes, num_classes), -1)
    number[first, second] = number[second, first] = torch.arange(len(first))
    rivals = torch.tensor([[j for j in range(num_classes) if j != y] for y in range(num_classes)])
    return ClassPairs(*(t.to(device) for t in (first, second, rivals, number.gather(1, rivals))))


def logit_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits ``[P, B, K]``, labels ``[B]`` -> margins ``[P, B, M]``, rivals in rising order."""
    return margins_between(logits, logits, labels)


def margins_between(own: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """``own[y] - others[j]`` for the rivals j: two ``[P, B, K]``, labels ``[B]`` -> ``[P, B, M]``."""
    rivals = class_pairs(own.shape[2], own.device).rivals.index_select(0, labels)
    return _columns(own, labels.unsqueeze(1)) - _columns(others, rivals)


def difference_rows(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The margins as linear functions of the logits: labels ``[B]`` -> ``[B, M, K]``, 1 at the label and -1 at the rival."""
    units = torch.eye(num_classes, dtype=dtype, device=labels.device)
    rivals = class_pairs(num_classes, labels.device).rivals.index_select(0, labels)  # [B, M]
    return units[labels].unsqueeze(1) - units[rivals]


def pair_differences(weight: Tensor) -> Tensor:
    """``|W_i - W_j|`` of every pair of classes: ``[P, K, F]`` -> ``[P, pairs, F]``."""
    pairs = class_pairs(weight.shape[1], weight.device)
    return (weight.index_select(1, pairs.first) - weight.index_select(1, pairs.second)).abs_()


def rival_entries(of_pairs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Values for each pair ``[P, B, pairs]`` -> those of {y, rival} ``[P, B, M]``."""
    pairs = class_pairs(num_classes, of_pairs.device).pair_of.index_select(0, labels)
    return _columns(of_pairs, pairs)


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """From values ``[P, B, N]`` for each image its own columns, ``index [B, M]`` -> ``[P, B, M]``, images innermost."""
    return values.transpose(1, 2).gather(1, index.t().expand(len(values), *index.t().shape)).transpose(1, 2)
