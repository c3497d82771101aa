"""How sigma is shared out: counted by hand, and what searchers make of it."""

import pytest
import torch
from torch import nn

from evocert.bounds import read_network
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.modules import Residual
from evocert.problem import CertifiedTraining
from evocert.searchers import PGPE, RGS
from evocert.searchers.scale import uses


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
    counts = uses(read_network(module, (1, 8, 8)))
    expected = {"0": 64, "1": 64, "3": 64, "4": 12, "7": 1}
    place = 0
    for name, parameter in module.named_parameters():
        found = counts[place : place + parameter.numel()]
        place += parameter.numel()
        assert found.tolist() == [expected[name[0]]] * parameter.numel(), name
    assert place == len(counts)


@pytest.mark.parametrize("kind", [PGPE, RGS])
class TestSearchers:
    def make(self, kind, network, part, exponent):
        problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=1)
        return kind(problem, popsize=2000, stdev_init=0.4, center_learning_rate=1e-9, stdev_by_use=exponent)

    @pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5])
    def test_sample_by_it(self, kind, network, part, exponent):
        searcher = self.make(kind, network, part, exponent)
        scale = uses(searcher.problem.network) ** -exponent
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

    @pytest.mark.parametrize("exponent", [-0.1, 1.5, float("nan")])
    def test_other_exponents_are_refused(self, kind, network, part, exponent):
        with pytest.raises(InputError, match=f"stdev_by_use={exponent}: allowed is 0 to 1"):
            self.make(kind, network, part, exponent)


def test_the_setting_is_refused_likewise():
    with pytest.raises(InputError, match=r"stdev_by_use=2\.0: allowed is 0 to 1"):
        Experiment(eps=0.1, generations=1, center_learning_rate=0.1, method="grad", stdev_by_use=2)


def test_pgpe_estimates_the_gradient_of_the_loss_that_is_smoothed_so(network, part):
    """With a control variate and without: times sigma^2, with one sigma for all, as RGS finds it."""
    found = {}
    for points in (0, 2):
        problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=1)
        searcher = PGPE(
            problem, popsize=20_000, stdev_init=0.02, center_learning_rate=1.0, optimizer=None, stdev_by_use=0.5,
            control_points=points,
        )  # fmt: skip
        searcher.step()
        before = searcher.status["center"].as_subclass(torch.Tensor).double()
        searcher.finish()
        found[points] = (searcher._distribution.mu.double() - before) / 0.02**2
        searcher = RGS(
            problem, popsize=2000, stdev_init=0.02, center_learning_rate=1.0, optimizer=None, stdev_by_use=0.5
        )
        problem.generation = 0
        gradients = problem.value_and_gradient(searcher._points(), 0)[1].double()
        found["rgs"] = -gradients.mean(0)
    assert (found[0] - found[2]).norm() < 0.3 * found[2].norm()
    assert (found["rgs"] - found[2]).norm() < 0.1 * found[2].norm()  # and so in every layer by one factor
