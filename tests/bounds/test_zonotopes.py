"""deepz and hbox against zonotopes with every generator written out, which are carried forward and not substituted back."""

import pytest
import torch
from drawing import EXAMPLES, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from zonotope_reference import DeepZ, Hybrid

from evocert.bounds import BOUNDS, Box, box_around, layers, read_network
from evocert.modules import Normalize, Residual
from evocert.networks import flat_parameters, with_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed

DOMAINS = {"deepz": DeepZ, "hbox": Hybrid}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@torch.no_grad()
def check_agreement(name, module, network, parameters, box, labels):
    """Margins and intervals of every member and image; returns how many were compared."""
    margins = BOUNDS[name](network, parameters, box, labels)
    intervals = BOUNDS[name].intervals(network, parameters, box)
    compared = 0
    for p, member in enumerate(parameters):
        with_parameters(module, member)
        for b, label in enumerate(labels.tolist()):
            expected = DOMAINS[name](module, box.lower[b], box.upper[b])
            if expected.closest < 1e-9:
                continue  # rounding decides whether an activation is a line
            torch.testing.assert_close(margins[p, b], expected.margins(label), **CLOSE)
            for found, ends in zip(intervals, expected.intervals, strict=True):
                for one, other in zip(found, ends, strict=True):
                    torch.testing.assert_close(one.expand(len(parameters), *one.shape[1:])[p, b], other, **CLOSE)
            compared += 1
    return compared


def check_drawn(name, case, matrices):
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in case.module.modules())
    assume(name == "hbox" or not pools)  # the lines of a maximum are not parallel: it has no zonotope
    with pytest.MonkeyPatch.context() as patch:
        if not matrices:
            patch.setattr(layers, "DENSE_SIZE", 0)
        assume(check_agreement(name, case.module, case.network, case.parameters, case.box, case.labels))


@pytest.mark.parametrize("name", DOMAINS)
@settings(max_examples=30, **EXAMPLES)
@given(case=cases(), matrices=st.booleans())
def test_agree_with_generators_carried_forward(name, case, matrices):
    check_drawn(name, case, matrices)


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize("name", DOMAINS)
@settings(max_examples=1000, **EXAMPLES)
@given(case=cases(), matrices=st.booleans())
def test_agree_with_generators_carried_forward_in_4000_networks_and_images(name, case, matrices):
    check_drawn(name, case, matrices)


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.Hardtanh()])
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_agree_in_a_residual_network(eps, activation, name):
    """Deep, so that what is dropped and kept, and which generators branches share, all matter."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), activation, nn.Conv2d(4, 4, 3, padding=1))
    module = nn.Sequential(
        Normalize([0.4], [0.3]),
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), activation),
        *(Residual(body), activation, nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 8), activation, nn.Linear(8, 5)),
    ).double()
    network = read_network(module, (1, 8, 8))
    parameters = flat_parameters(module) + 0.1 * torch.randn(2, network.num_parameters, dtype=torch.float64)
    box, labels = box_around(torch.rand(2, 1, 8, 8, dtype=torch.float64), eps), torch.tensor([0, 3])
    assert check_agreement(name, module, network, parameters, box, labels) == 4


def test_a_kept_generator_cancels_and_a_dropped_one_does_not():
    """relu(x) - x is zero while x is positive; where it crosses zero, relu(x) in [0, u] forgets x."""
    module = nn.Sequential(nn.Flatten(), Residual(nn.ReLU(), nn.Linear(1, 1)), nn.Linear(1, 2)).double()
    network = read_network(module, (1, 1, 1))
    parameters = torch.tensor([[-1.0, 0, 1, 0, 0, 0]], dtype=torch.float64)  # relu(x) - x, and logits (that, 0)
    centres = torch.tensor([0.5, 0.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    box = Box(centres - 0.25, centres + 0.25)
    found = BOUNDS["hbox"](network, parameters, box, torch.tensor([0, 0]))
    # [.25, .75]: x - x. [-.25, .25]: between 0 - .25 and .25 + .25.
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, -0.25], dtype=torch.float64))
    found = BOUNDS["hbox"](network, parameters, box, torch.tensor([1, 1]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, -0.5], dtype=torch.float64))
