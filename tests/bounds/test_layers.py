"""Layers bound to a population: both ways to compute a convolution, shared inputs, gradients."""

import pytest
import torch
from torch import nn

from evocert.bounds import BOUNDS, Tile, box_around, layers, read_network
from evocert.bounds.affine import BoundDense, dense_product
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.margins import class_pairs
from evocert.networks import flat_parameters, with_parameters

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

CONVOLUTIONS = {
    "plain": nn.Conv2d(2, 3, 3),
    "no bias": nn.Conv2d(2, 3, 3, bias=False),
    "rectangular": nn.Conv2d(2, 3, (1, 4), stride=(3, 2), padding=(0, 2)),
    "even and same": nn.Conv2d(2, 3, (2, 4), padding="same"),
    "dilated": nn.Conv2d(2, 3, 2, dilation=(3, 2), padding=(2, 1)),
    "groups": nn.Conv2d(2, 6, 3, groups=2, stride=2),
    "one by one": nn.Conv2d(2, 5, 1),
}
SHAPE = (2, 7, 6)


def population(module, shape, members, dtype, seed=0):
    network = read_network(module, shape)
    generator = torch.Generator().manual_seed(seed)
    return network, torch.randn(members, network.num_parameters, generator=generator, dtype=torch.float64).to(dtype)


def lower_as(monkeypatch, lowering):
    """Forces the one or the other way to compute a convolution."""
    monkeypatch.setattr(layers, "DENSE_SIZE", 10**9 if lowering == "dense" else 0)
    monkeypatch.setattr(layers, "DENSE_WASTE", 10**9)


@pytest.mark.parametrize("lowering", ["dense", "grouped"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed
def test_a_convolution_and_its_magnitude(convolution, dtype, shared, lowering, monkeypatch):
    lower_as(monkeypatch, lowering)
    features = convolution(torch.zeros(1, *SHAPE)).numel()
    network, parameters = population(nn.Sequential(convolution, nn.Flatten(), nn.Linear(features, 2)), SHAPE, 3, dtype)
    bound = network.bind(parameters).nodes[0]
    assert isinstance(bound, BoundDense if lowering == "dense" else BoundConvolution)
    x = torch.rand(1 if shared else 3, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    affine, magnitude = bound.affine(x), bound.magnitude(x)
    own = sum(p.numel() for p in convolution.parameters())
    with torch.no_grad():
        for member, row in enumerate(parameters):
            exact = with_parameters(type(convolution)(**description(convolution)).double(), row[:own].double())
            images = x[0 if shared else member].double()
            tolerances = {"rtol": TOLERANCE[dtype], "atol": 20 * TOLERANCE[dtype]}
            torch.testing.assert_close(affine[member].double(), exact(images), **tolerances)
            exact.weight.abs_()
            if exact.bias is not None:
                exact.bias.zero_()
            torch.testing.assert_close(magnitude[member].double(), exact(images), **tolerances)


def description(convolution):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(convolution, name) for name in names} | {"bias": convolution.bias is not None}


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp", "deeppoly-sparse"])  # all of them: test_gradients
@pytest.mark.parametrize("lowering", ["dense", "grouped"])
@pytest.mark.parametrize("tile", [None, Tile(1, 2), Tile(2, 3)])
def test_gradients(bound, lowering, tile, monkeypatch):
    """Away from kinks, through two convolutions of which the first has a shared input, and in padded tiles."""
    lower_as(monkeypatch, lowering)
    torch.set_num_threads(1)  # many tiny operations: threads would wait for each other
    module = nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    network, parameters = population(module, (1, 4, 4), 3, torch.float64, seed=3)
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    box, labels = box_around(images, 0.02), torch.tensor([0, 2, 1])
    assert torch.autograd.gradcheck(
        lambda p: BOUNDS[bound](network, p, box, labels, tile=tile), parameters.requires_grad_(), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients_work_after_inference_mode(bound):
    """Index tables that were first made under inference_mode serve a later backward pass."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(98, 7))
    network, parameters = population(module, (1, 5, 5), 2, torch.float32)
    layers._dense_index.cache_clear()  # as in a process that was handed the network, and has not read it
    class_pairs.cache_clear()
    box, labels = box_around(torch.rand(2, 1, 5, 5), 0.1), torch.tensor([0, 6])
    with torch.inference_mode():
        BOUNDS[bound](network, parameters, box, labels)
    BOUNDS[bound](network, parameters.requires_grad_(), box, labels).sum().backward()
    assert parameters.grad.isfinite().all()
    assert parameters.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_product(dtype, shared, bias):
    generator = torch.Generator().manual_seed(0)
    weight, offset = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((3, 4, 6), (3, 4)))
    x = torch.randn(1 if shared else 3, 5, 2, 3, generator=generator, dtype=dtype)
    found = dense_product(weight, offset if bias else None, x)
    expected = torch.einsum("poi,pbi->pbo", weight, x.flatten(2).expand(3, -1, -1)) + (
        offset.unsqueeze(1) if bias else 0
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_convolution_do_not_depend_on_the_members_place(dtype, monkeypatch):
    """Sizes at which torch's float64 convolution rounds otherwise for the second of two members with a shared input."""
    lower_as(monkeypatch, "grouped")
    module = nn.Sequential(nn.Conv2d(3, 9, 2, stride=2, padding=1), nn.Flatten(), nn.Linear(324, 2))
    network, parameters = population(module, (3, 11, 11), 2, dtype)
    x = torch.rand(1, 16, 3, 11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for name in ("affine", "magnitude"):
        there = getattr(network.bind(parameters).nodes[0], name)(x)
        swapped = getattr(network.bind(parameters.flip(0)).nodes[0], name)(x)
        assert torch.equal(there, swapped.flip(0))


def test_a_layer_that_runs_twice_has_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.last(self.first(self.first(x).relu()).relu())

    torch.manual_seed(0)
    module = Twice().double()
    network = read_network(module, (1, 2, 2))
    images = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    parameters = flat_parameters(module).unsqueeze(0).requires_grad_()
    network.logits(parameters, images).square().sum().backward()
    module(images).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()])
    torch.testing.assert_close(parameters.grad[0], expected)
