"""Objectives: each against a computation of its own, on plain torch modules in float64; limits; where attacks start."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evocert.bounds import BOUNDS, Bound, Box, Tile, box_around, read_network
from evocert.minibatches import drawn_noise, drawn_rows
from evocert.networks import flat_parameters, fully_connected
from evocert.objectives import OBJECTIVES, Options
from evocert.problem import CertifiedTraining

EPS = 0.07
EXPRESSIVE = ["mtl-ibp", "cc-ibp", "exp-ibp"]


def interval_logits(module, low, high, labels):
    """What the worst-case margins make of logits, by intervals from layer to layer: 0 for the label, -margin for others."""
    for layer in module[:-1]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            plus, minus = layer.weight.clamp(min=0), layer.weight.clamp(max=0)

            def run(x, weight, layer=layer):
                dense = isinstance(layer, nn.Linear)
                return F.linear(x, weight) if dense else F.conv2d(x, weight, None, layer.stride, layer.padding)

            offset = layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None]
            low, high = run(low, plus) + run(high, minus) + offset, run(high, plus) + run(low, minus) + offset
        else:
            low, high = layer(low), layer(high)
    weight, bias = module[-1].weight, module[-1].bias
    rows, offsets = weight[labels][:, None] - weight, bias[labels][:, None] - bias  # [B, K, F], [B, K]
    return -((rows.clamp(min=0) * low[:, None]).sum(2) + (rows.clamp(max=0) * high[:, None]).sum(2) + offsets)


def attacked(module, images, labels, noise, options, low, high):
    x = torch.minimum(torch.maximum(images + options.eps * noise, low), high)
    for _ in range(options.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(module(x), labels, reduction="sum"), x)
        x = torch.minimum(torch.maximum(x + options.step * options.eps * gradient.sign(), low), high)
    return x.detach()


def directly(name, module, images, labels, noise, options):
    """The loss of each image ``[B]``."""
    eps, mixture = options.eps, options.mixture
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)

    def loss(logits):
        return F.cross_entropy(logits, labels, reduction="none")

    if name == "standard":
        return loss(module(images))
    bounded = interval_logits(module, low, high, labels)
    if name == "certified":
        return loss(bounded)
    if name == "sabr":
        radius = mixture * eps
        inner = torch.minimum(low + radius, images), torch.maximum(high - radius, images)
        point = attacked(module, images, labels, noise, options, *inner)
        small = torch.maximum(point - radius, low), torch.minimum(point + radius, high)
        return loss(interval_logits(module, *small, labels))
    logits = module(attacked(module, images, labels, noise, options, low, high))
    if name == "pgd":
        return loss(logits)
    if name == "mtl-ibp":
        return (1 - mixture) * loss(logits) + mixture * loss(bounded)
    if name == "cc-ibp":
        return loss((1 - mixture) * (logits - logits.gather(1, labels[:, None])) + mixture * bounded)
    assert name == "exp-ibp"
    return loss(logits) ** (1 - mixture) * loss(bounded) ** mixture


@pytest.fixture(params=["cnn3", "fully_connected"])
def module(request, network):
    """In float64, with weights at which no loss is nearly flat."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dense = fully_connected((1, 8, 8), 3, mean=[0.3], std=[0.3], width=6)
    return (network if request.param == "cnn3" else dense).double()


@pytest.fixture
def batch(part):
    """Images with pixels at and near both ends of [0, 1], labels, noise."""
    images, labels = part.batch(slice(0, 10))
    images = images.double()
    images[0, 0, 0], images[1, 0, :, 1], images[2, 0, 3] = 0.0, 1.0, 0.3 * EPS
    images[3, 0, 4] = 1 - 0.6 * EPS
    return images, labels, drawn_noise(0, 0, images)


def members_of(module, parameters=None):
    return read_network(module, (1, 8, 8)).bind(flat_parameters(module)[None] if parameters is None else parameters)


class TestValue:
    @pytest.mark.parametrize("mixture", [0.2, 0.7])
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_and_gradient_are_those_of_a_direct_computation(self, module, batch, name, mixture):
        images, labels, noise = batch
        options = Options("ibp", EPS, mixture=mixture, steps=5, step=0.3)
        parameters = flat_parameters(module)[None].requires_grad_()
        found = OBJECTIVES[name](members_of(module, parameters), images, labels, noise, options)
        assert found.shape == (1, 10)
        (gradient,) = torch.autograd.grad(found.sum(), parameters)
        expected = directly(name, module, images, labels, noise, options)
        wanted = torch.autograd.grad(expected.sum(), list(module.parameters()))
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient[0], torch.cat([g.flatten() for g in wanted]), rtol=0, atol=1e-8)
        assert gradient.abs().max() > 0.1

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_of_a_minibatch_in_tiles(self, network, part, name):
        """Two members, whose tiles are cut and padded in images; the attack starts at the minibatch's own noise."""
        problem = CertifiedTraining(network, part, eps=EPS, batch_size=21, seed=4, tile=Tile(2, 16))
        problem.generation = 3
        centre = flat_parameters(network).double()
        parameters = torch.stack((centre, 0.8 * centre))
        options = {} if name in ("certified", "standard") else {"mixture": 0.6, "steps": 3, "step": 0.5}
        losses, gradients = problem.descend(parameters, name, **options)
        assert problem.generation == 4
        assert problem.status["eps"] == EPS
        assert ("certified" in problem.status) == (name == "certified")
        images, labels = problem.minibatch(3)[1:3]
        images = images.double()
        noise = drawn_noise(4, 3, images)
        module = copy.deepcopy(network).double()
        for row, loss, gradient in zip(parameters, losses, gradients, strict=True):
            nn.utils.vector_to_parameters(row, module.parameters())
            expected = directly(name, module, images, labels, noise, Options("ibp", EPS, **options)).mean()
            wanted = torch.autograd.grad(expected, list(module.parameters()))
            torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-9)
            torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in wanted]), rtol=0, atol=1e-8)

    def test_certified_takes_the_problem_s_bound(self, module, batch):
        images, labels, noise = batch
        members = members_of(module)
        found = {b: OBJECTIVES["certified"](members, images, labels, noise, Options(b, EPS)).mean() for b in BOUNDS}
        assert found["crown-ibp"] < found["ibp"] - 0.01
        assert found["deeppoly"] < found["ibp"] - 0.01

    def test_an_attack_ends_higher_than_it_began(self, module, batch):
        images, labels, noise = batch
        members = members_of(module)
        losses = [
            OBJECTIVES["pgd"](members, images, labels, noise, Options("ibp", EPS, steps=s)).mean() for s in (1, 4, 16)
        ]
        assert OBJECTIVES["standard"](members, images, labels, noise, Options("ibp", EPS)).mean() < losses[0]
        assert losses[0] < losses[1] < losses[2] + 1e-3
        assert losses[2] < OBJECTIVES["certified"](members, images, labels, noise, Options("ibp", EPS)).mean()


class TestLimits:
    @pytest.mark.parametrize("name", EXPRESSIVE)
    @pytest.mark.parametrize(("mixture", "limit"), [(0.0, "pgd"), (1.0, "certified")])
    def test_are_the_adversarial_and_ibp_s_loss(self, module, batch, name, mixture, limit):
        members, options = members_of(module), Options("ibp", EPS, mixture=mixture)
        found, expected = (OBJECTIVES[each](members, *batch, options) for each in (name, limit))
        if name == "exp-ibp":  # the exponential of a logarithm
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        else:
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("name", EXPRESSIVE)
    def test_lie_on_both_sides(self, module, batch, name):
        members = members_of(module)
        ends = [OBJECTIVES[each](members, *batch, Options("ibp", EPS)) for each in ("pgd", "certified")]
        between = OBJECTIVES[name](members, *batch, Options("ibp", EPS, mixture=0.5))
        assert (ends[0] < between).all()
        assert (between < ends[1]).all()

    def test_of_sabr_are_ibp_over_the_whole_box_and_an_attack(self, module, batch):
        members = members_of(module)
        whole, certified = (
            OBJECTIVES[each](members, *batch, Options("ibp", EPS, mixture=1.0)) for each in ("sabr", "certified")
        )
        assert torch.equal(whole, certified)
        point, pgd = (OBJECTIVES[each](members, *batch, Options("ibp", EPS, mixture=0.0)) for each in ("sabr", "pgd"))
        torch.testing.assert_close(point, pgd, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(point, certified)

    @pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_without_a_radius_all_are_the_standard_loss(self, module, batch, name, mixture):
        members, options = members_of(module), Options("ibp", 0.0, mixture=mixture)
        found, standard = (OBJECTIVES[each](members, *batch, options) for each in (name, "standard"))
        torch.testing.assert_close(found, standard, rtol=1e-12, atol=1e-12)

    def test_a_perfect_member_has_a_loss_and_a_gradient(self, module, batch):
        """Margins so wide that both losses are 0 in float32: the logarithm in exp-ibp must not make them NaN."""
        images, labels, noise = (t.float() if t.is_floating_point() else t for t in batch)
        only = torch.zeros_like(labels)
        parameters = torch.zeros(1, len(flat_parameters(module)))
        parameters[0, -3] = 1000.0  # the bias of class 0
        for name in OBJECTIVES:
            leaf = parameters.clone().requires_grad_()
            loss = OBJECTIVES[name](members_of(module, leaf), images, only, noise, Options("ibp", EPS))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert loss.abs().max() < 1e-30
            assert gradient.isfinite().all()


class TestSmallBox:
    @pytest.mark.parametrize("eps", [0.0, EPS, 0.6])
    @pytest.mark.parametrize("mixture", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_of_sabr_stays_in_the_large_one(self, module, batch, mixture, eps, monkeypatch):
        boxes = []

        def margins(members, box, labels):
            boxes.append(box)
            return ibp.margins(members, box, labels)

        ibp = BOUNDS["ibp"]
        monkeypatch.setitem(BOUNDS, "ibp", Bound(margins, ibp.cost, ibp.intermediate))
        images, labels, noise = batch
        OBJECTIVES["sabr"](members_of(module), images, labels, noise, Options("ibp", eps, mixture=mixture))
        (small,) = boxes
        whole = box_around(images, eps)
        assert isinstance(small, Box)
        assert (whole.lower <= small.lower).all()
        assert (small.lower <= small.upper).all()
        assert (small.upper <= whole.upper).all()
        assert small.lower.min() >= 0
        assert small.upper.max() <= 1
        width = small.upper - small.lower
        assert width.max() <= 2 * mixture * eps + 1e-12
        inside = (images >= eps) & (images <= 1 - eps)
        torch.testing.assert_close(width[inside], torch.full_like(width[inside], 2 * mixture * eps))
        if eps == EPS:
            assert inside.sum() > 100
            if 0 < mixture < 1:  # the attack has gone somewhere
                assert ((small.lower + small.upper) / 2 - images)[inside].abs().mean() > 0.2 * (1 - mixture) * eps

    def test_is_one_member_s_own(self, module, batch):
        both = flat_parameters(module).expand(2, -1)
        with pytest.raises(ValueError, match="too many values"):
            OBJECTIVES["sabr"](members_of(module, both), *batch, Options("ibp", EPS))


class TestNoise:
    def test_depends_on_seed_and_generation_alone(self):
        like = torch.zeros(3, 1, 8, 8)
        one = drawn_noise(5, 7, like)
        torch.manual_seed(9)
        assert torch.equal(one, drawn_noise(5, 7, like))
        assert one.shape == like.shape
        assert one.dtype == like.dtype
        for other in (drawn_noise(6, 7, like), drawn_noise(5, 8, like)):
            assert (other != one).float().mean() > 0.99
        torch.testing.assert_close(drawn_noise(5, 7, like.double()).float(), one)

    def test_is_uniform(self):
        noise = drawn_noise(0, 0, torch.zeros(1000, 1, 10, 10, dtype=torch.float64)).flatten().sort().values
        assert noise[0] >= -1
        assert noise[-1] <= 1
        quantiles = torch.linspace(-1, 1, len(noise), dtype=torch.float64)
        assert (noise - quantiles).abs().max() < 0.02  # of Kolmogorov and Smirnov: 0.0086 in 1 of 20

    @pytest.mark.parametrize("generation", [0, 1, 10**6])
    def test_is_another_stream_than_that_of_the_rows(self, generation):
        """The same numbers for both would tie an attack's start to the images that it starts at."""
        stream = np.random.Generator(np.random.Philox(key=np.array([3, generation], np.uint64)))
        rows = np.sort(stream.choice(10**6, 1000, replace=False, shuffle=False))
        assert drawn_rows(3, generation, 10**6, 1000).tolist() == rows.tolist()
        stream = np.random.Generator(np.random.Philox(key=np.array([3, generation], np.uint64)))
        noise = drawn_noise(3, generation, torch.zeros(1000, dtype=torch.float64)).numpy()
        assert not np.isin(noise, stream.uniform(-1, 1, 2000)).any()
