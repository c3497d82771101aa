"""How sigma is shared out: counted by hand, and what searchers make of it."""

import math

import pytest
import torch
from torch import nn

from evocert.bounds import read_network
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.modules import Residual
from evocert.problem import CertifiedTraining
from evocert.searchers import PGPE, RGS
from evocert.searchers.scale import STDEV_SCALES, by_use


def test_weights_count_by_the_places_of_the_output():
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),  # 8x8 places
        nn.BatchNorm2d(2),
        nn.ReLU(),
        Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False)), nn.Sequential(nn.Conv2d(2, 2, 1))),
        nn.Conv2d(2, 4, (3, 5), stride=(2, 1)),  # 3x4
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).eval()
    scale = by_use(read_network(module, (1, 8, 8)))
    expected = {"0": 64, "1": 64, "3": 64, "4": 12, "7": 1}
    place = 0
    for name, parameter in module.named_parameters():
        found = scale[place : place + parameter.numel()]
        place += parameter.numel()
        assert found.tolist() == pytest.approx([1 / math.sqrt(expected[name[0]])] * parameter.numel()), name
    assert place == len(scale)


@pytest.mark.parametrize("kind", [PGPE, RGS])
class TestSearchers:
    def make(self, kind, network, part, name):
        problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=1)
        return kind(problem, popsize=2000, stdev_init=0.4, center_learning_rate=1e-9, stdev_scale=name)

    @pytest.mark.parametrize("name", STDEV_SCALES)
    def test_sample_by_it(self, kind, network, part, name):
        searcher = self.make(kind, network, part, name)
        scale = STDEV_SCALES[name](searcher.problem.network)
        for sigma in (0.4, 0.05):  # as it begins, and on a schedule
            searcher.set_stdev(sigma)
            if kind is PGPE:
                searcher._sample()
                points = searcher.population.values.as_subclass(torch.Tensor)
            else:
                points = searcher._points()
            found = (points - searcher.status["center"].as_subclass(torch.Tensor)).square().mean(0).sqrt()
            torch.testing.assert_close(found, sigma * scale, rtol=0.15, atol=0)
            searcher.clear_status()
            assert float(searcher.status["stdev"].max()) == pytest.approx(sigma)

    def test_other_names_are_refused(self, kind, network, part):
        with pytest.raises(InputError, match="stdev_scale='by_layer': allowed are uniform, by-use"):
            self.make(kind, network, part, "by_layer")


def test_the_names_are_the_setting_s():
    for name in STDEV_SCALES:
        Experiment(eps=0.1, generations=1, center_learning_rate=0.1, method="grad", stdev_scale=name)
    with pytest.raises(InputError, match="stdev_scale='byuse': allowed are uniform, by-use"):
        Experiment(eps=0.1, generations=1, center_learning_rate=0.1, method="grad", stdev_scale="byuse")


def test_pgpe_estimates_the_gradient_of_the_loss_that_is_smoothed_so(network, part):
    """With a control variate and without, to rounding of many samples: sigma^2 in its step is each parameter's own."""
    found = {}
    for points in (0, 2):
        problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=1)
        searcher = PGPE(
            problem, popsize=20_000, stdev_init=0.02, center_learning_rate=1.0, optimizer=None, stdev_scale="by-use",
            control_points=points,
        )  # fmt: skip
        searcher.step()
        before = searcher.status["center"].as_subclass(torch.Tensor).double()
        searcher.finish()
        found[points] = (searcher._distribution.mu.double() - before) / (0.02 * by_use(problem.network)) ** 2
    assert (found[0] - found[2]).norm() < 0.3 * found[2].norm()
