"""Initialisation and regulariser of Shi et al.: what they promise of interval widths, and direct computations."""

import copy
import math

import pytest
import torch
from torch import nn

from evocert.bounds import Box, box_around, ibp, read_network
from evocert.bounds.network import Members
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.initialisation import INITIALISATIONS, shi
from evocert.modules import Normalize
from evocert.networks import flat_parameters
from evocert.problem import CertifiedTraining
from evocert.regularisers import TOLERANCE
from evocert.regularisers import shi as penalty
from evocert.searchers import Grad


def deep(width=400, depth=4):
    layers = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def members_of(module, shape, dtype=torch.float64):
    network = read_network(module, shape)
    return Members(network, flat_parameters(module).to(dtype)[None])


class TestInitialisation:
    def test_keeps_interval_widths_from_layer_to_layer(self):
        torch.manual_seed(0)
        box = box_around(torch.rand(3, 1, 20, 20, dtype=torch.float64) * 0.8 + 0.1, 0.01)
        grown = {}
        for name, initialise in INITIALISATIONS.items():
            module = deep()
            initialise(module)
            found = ibp.intervals(members_of(module, (1, 20, 20)), box)
            widths = [float((upper - lower).mean()) for lower, upper in found]
            grown[name] = (widths[-1] / widths[0]) ** (1 / (len(widths) - 1))
        # |W| r passes sqrt(2 / pi) sd fan_in = 2 of a width, of which half the neurons let all of it through.
        assert grown["shi"] == pytest.approx(1.0, abs=0.15)
        assert grown["default"] > 3

    def test_draws_hidden_weights_alone(self):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 50, (3, 5)), nn.ReLU(), nn.Flatten(), nn.Linear(50 * 4, 10))
        before = {name: value.clone() for name, value in module.named_parameters()}
        shi(module)
        after = dict(module.named_parameters())
        assert after["0.weight"].std().item() == pytest.approx(math.sqrt(2 * math.pi) / 45, rel=0.05)
        assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.weight"]

    def test_is_not_for_a_network_that_is_given(self):
        with pytest.raises(
            InputError, match="initialisation='shi': allowed is default: the network is a module already"
        ):
            Experiment(
                eps=0.1, generations=1, center_learning_rate=0.1, network=deep(), method="grad", initialisation="shi"
            )


def direct(module, images, eps):
    """The penalty by the words of its definition, image by image, in a chain of linear layers and ReLUs."""
    values = []
    module = copy.deepcopy(module).requires_grad_(False)
    for image in images:
        centre = ((image - eps).clamp(0, 1) + (image + eps).clamp(0, 1)).flatten() / 2
        radius = ((image + eps).clamp(0, 1) - (image - eps).clamp(0, 1)).flatten() / 2
        total, count, first = 0.0, 0, None
        for layer in module:
            if isinstance(layer, Normalize):
                centre, radius = (centre - layer.mean.item()) / layer.std.item(), radius / layer.std.item()
            elif isinstance(layer, nn.Linear):
                centre, radius = layer.weight @ centre + layer.bias, layer.weight.abs() @ radius
            elif isinstance(layer, nn.ReLU):
                count += 1
                total += max(TOLERANCE - float(first / radius.mean()), 0)
                active, inactive = centre - radius > 0, centre + radius < 0
                for weights in (centre.abs(), (centre - centre.mean()) ** 2):
                    one, other = float(weights[active].sum()), float(weights[inactive].sum())
                    if one > 0 and other > 0:
                        total += max(TOLERANCE - min(one / other, other / one), 0)
                lower, upper = (centre - radius).relu(), (centre + radius).relu()
                centre, radius = (lower + upper) / 2, (upper - lower) / 2
            if first is None and not isinstance(layer, Normalize):
                first = radius.mean()
        values.append(total / TOLERANCE / count)
    return torch.tensor(values, dtype=torch.float64)


class TestRegulariser:
    @pytest.fixture
    def module(self):
        torch.manual_seed(3)
        module = nn.Sequential(
            Normalize([0.2], [0.4]),
            nn.Flatten(),
            nn.Linear(16, 30),
            nn.ReLU(),
            nn.Linear(30, 20),
            nn.ReLU(),
            nn.Linear(20, 3),
        )
        with torch.no_grad():
            module[2].bias -= 0.3  # unbalanced
            module[4].weight *= 4  # wide
        return module.double()

    @pytest.mark.parametrize("eps", [0.0, 0.01, 0.1])
    def test_equals_a_direct_computation(self, module, eps):
        images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = penalty(members_of(module, (1, 4, 4)), box_around(images, eps))
        assert found.shape == (1, 5)
        expected = direct(module, images, eps) if eps else None
        if expected is not None:
            torch.testing.assert_close(found[0], expected)
        assert found.isfinite().all()
        assert (found > 0).all()

    def test_of_a_population_is_each_member_s(self, module):
        network = read_network(module, (1, 4, 4))
        parameters = flat_parameters(module) + 0.1 * torch.randn(3, network.num_parameters).double()
        box = Box(torch.zeros(2, 1, 4, 4).double(), torch.full((2, 1, 4, 4), 0.3).double())
        together = penalty(Members(network, parameters), box)
        alone = torch.cat([penalty(Members(network, one[None]), box) for one in parameters])
        torch.testing.assert_close(together, alone)

    @pytest.mark.parametrize("objective", ["certified", "standard", "mtl-ibp"])
    def test_is_added_to_any_objective(self, network, part, objective):
        """Value and gradient, in tiles of whatever size; the certified share stays."""
        start = flat_parameters(network)[None]
        found = {}
        for weight in (0.0, 2.0):
            problem = CertifiedTraining(network, part, eps=0.05, batch_size=10, natural_every=0, tile=(1, 3))
            more = {"regulariser": weight} if weight else {}
            found[weight] = (*problem.descend(start, objective, **more), problem.status.get("certified"))
        leaf = start.clone().requires_grad_()
        minibatch = problem.minibatch(0)
        value = 2 * penalty(Members(problem.network, leaf), box_around(minibatch.images, 0.05)).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value > 0.01
        torch.testing.assert_close(found[2.0][0] - found[0.0][0], value.detach()[None], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2.0][1] - found[0.0][1], gradient, rtol=1e-3, atol=1e-4)
        assert found[2.0][2] == found[0.0][2]

    def test_fades_as_eps_rises(self, network, part):
        """By 1 - eps / the last eps; then it is gone."""
        asked = []
        problem = CertifiedTraining(
            network, part, eps=lambda generation: [0.0, 0.01, 0.04, 0.05][generation], batch_size=8
        )
        searcher = Grad(problem, center_learning_rate=0.01, regulariser=0.5, final_eps=0.04)
        follow = problem.descend
        problem.descend = lambda *found, **options: asked.append(options["regulariser"]) or follow(*found, **options)
        searcher.run(4)
        assert asked == pytest.approx([0.5, 0.375, 0.0, 0.0])
