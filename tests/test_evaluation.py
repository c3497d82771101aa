"""Natural, attacked and certified accuracy, against what each must be by hand, and the check of one against the other."""

import pytest
import torch
from torch import nn

from evocert import evaluation
from evocert.attacks import Attack
from evocert.bounds import read_network
from evocert.data import Part
from evocert.evaluation import ContradictionError, evaluate, validate
from evocert.networks import flat_parameters


@pytest.fixture
def line():
    """Two pixels, logits (a, b): the margin of class 0 is a - b, and interval bounds are exact."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.eye(2))
        module[1].bias.zero_()
    # margins 0.5 (robust at 0.1), 0.15 (not: 0.2 is lost), -0.1 (wrong), 0 (a tie, wrong)
    images = torch.tensor([[0.7, 0.2], [0.45, 0.3], [0.4, 0.5], [0.5, 0.5]]).reshape(4, 1, 1, 2)
    return module, Part(images, torch.zeros(4, dtype=torch.int64), torch.arange(4), 1.0)


def test_accuracies_are_fractions_of_all_images(line):
    module, part = line
    network, parameters = read_network(module, (1, 1, 2)), flat_parameters(module)
    found = evaluate(module, network, parameters, part, 0.1)
    assert (found.natural, found.attacked, found.certified) == (0.5, 0.25, {"ibp": 0.25})
    assert validate(network, parameters, part, 0.1, "ibp", 2**30) == (0.5, 0.25)
    at_zero = evaluate(module, network, parameters, part, 0.0)
    assert (at_zero.natural, at_zero.attacked, at_zero.certified["ibp"]) == (0.5, 0.5, 0.5)


def test_boxes_are_clipped_to_pixels(line):
    module, part = line
    bright = Part(torch.tensor([0.95, 0.0]).reshape(1, 1, 1, 2), part.labels[:1], part.indices[:1], 1.0)
    network, parameters = read_network(module, (1, 1, 2)), flat_parameters(module)
    # a in [0.48, 1], b in [0, 0.47]: the margin is at least 0.01. At 0.48 it is a in [0.47, 1], b in [0, 0.48].
    assert evaluate(module, network, parameters, bright, 0.47).certified["ibp"] == 1.0
    assert evaluate(module, network, parameters, bright, 0.48).certified["ibp"] == 0.0


def test_certified_figures_are_computed_in_float64(line):
    """A margin that float32 rounds to something positive and that is exactly 0."""
    module, part = line
    with torch.no_grad():
        module[1].bias.copy_(torch.tensor([1e8, 1e8]))
    network, parameters = read_network(module, (1, 1, 2)), flat_parameters(module)
    assert validate(network, parameters, part, 0.0, "ibp", 2**30)[0] != 0.5  # 0.5 is lost beside 1e8 in float32
    assert evaluate(module, network, parameters, part, 0.1).certified["ibp"] == 0.25


def test_a_contradiction_stops_and_asks_for_a_report(line, monkeypatch):
    module, part = line
    everything = lambda module, images, labels, eps, **more: Attack(images, torch.ones(len(images), dtype=torch.bool))  # noqa: E731
    monkeypatch.setattr(evaluation, "pgd", everything)
    with pytest.raises(ContradictionError, match=r"example 0 .* certified by ibp and yet attacked .* please report"):
        evaluate(module, read_network(module, (1, 1, 2)), flat_parameters(module), part, 0.1)


def test_batches_do_not_matter(network, part, monkeypatch):
    read, parameters = read_network(network, part.image_shape), flat_parameters(network)
    whole = evaluate(network, read, parameters, part, 0.01)
    monkeypatch.setattr(evaluation, "BATCH", 7)
    assert evaluate(network, read, parameters, part, 0.01) == whole
