"""Margins and pairs of classes, by hand."""

import pytest
import torch
from torch import nn

from evocert.bounds import BOUNDS, Box, logit_margins, read_network
from evocert.bounds.margins import margins_between, pair_differences, rival_entries
from evocert.networks import flat_parameters, with_parameters

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_of_logits(dtype):
    logits = torch.tensor([[[1.0, 4, 9], [2, 7, 5]], [[0, -3, 1], [8, 6, 1]]], dtype=dtype)  # [2, 2, 3]
    expected = torch.tensor([[[3.0, -5], [-2 + 5, -2]], [[-3, -4], [-7, -5]]], dtype=dtype)
    expected[0, 1] = torch.tensor([5.0 - 2, 5 - 7])
    expected[1, 1] = torch.tensor([1.0 - 8, 1 - 6])
    assert torch.equal(logit_margins(logits, torch.tensor([1, 2])), expected)


def test_margins_between_take_the_label_from_the_one_and_the_rivals_from_the_other():
    own, others = torch.tensor([[[10.0, 20, 30]]]), torch.tensor([[[1.0, 2, 3]]])
    assert margins_between(own, others, torch.tensor([1])).tolist() == [[[19.0, 17.0]]]
    assert margins_between(own.expand(2, -1, -1), others, torch.tensor([2])).tolist() == [[[29.0, 28.0]]] * 2


def test_pairs_are_found_again_by_label_and_rival():
    """The difference of rows i and j is where {i, j} is looked up, in either order."""
    weight = torch.tensor([[[1.0], [2], [4], [8]]])
    differences = pair_differences(weight)  # [1, 6, 1]
    assert sorted(differences.flatten().tolist()) == [1, 2, 3, 4, 6, 7]
    found = rival_entries(differences.transpose(1, 2).expand(1, 4, 6), torch.arange(4), 4)
    assert found.tolist() == [[[1, 3, 7], [1, 2, 6], [3, 2, 4], [7, 6, 4]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_difference_of_two_classes_is_bounded_as_one(bound, dtype):
    """Both logits follow x alike, so that their difference is constant: subtracting their bounds would give 1 - 2 * 0.5."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with_parameters(module, torch.tensor([2.0, 2.0, 1.0, 0.0]))  # 2 x + 1 and 2 x
    network = read_network(module, (1, 1, 1))
    box = Box(torch.full((1, 1, 1, 1), 0.25, dtype=dtype), torch.full((1, 1, 1, 1), 0.5, dtype=dtype))
    parameters = flat_parameters(module).unsqueeze(0).to(dtype)
    assert BOUNDS[bound](network, parameters, box, torch.tensor([0])).tolist() == [[[1.0]]]
    assert BOUNDS[bound](network, parameters, box, torch.tensor([1])).tolist() == [[[-1.0]]]
