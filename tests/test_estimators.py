"""What the sampling searchers follow and find: their steps against the analytic gradient of smoothed losses, their minima."""

import itertools
import math

import pytest
import torch
from toys import (
    Toy,
    cliff,
    needle,
    smoothed_cliff_gradient,
    smoothed_cliff_jump,
    smoothed_cliff_slope,
    smoothed_needle_gradient,
)

from evocert.searchers import PGPE, RGS, Grad

SIGMAS = [0.2, 0.5, 1.0]
CENTRES = [-0.4, 0.1, 0.9]
SLACK = 1e-5  # where there is no noise: rounding, tails that no sample is of, and what the rate moves the centre
MATRIX = torch.tensor([[3.0, 1.0, -0.5], [1.0, 2.0, 0.7], [-0.5, 0.7, 1.0]], dtype=torch.float64)


def on_parameter(loss):
    """Of one parameter, as the searchers have it: ``[P, 1] -> [P]``."""
    return lambda x: loss(x[:, 0])


def bowl(x):
    """Of curvature in every direction, none of them an axis."""
    return (x @ MATRIX * x).sum(1) / 2 - x[:, 1]


def estimates(kind, loss, centre, sigma, *, popsize=4000, steps=30, **more):
    """What the steps of a searcher would be at a rate of 1: ``[steps, D]``. Its own rate hardly moves it."""
    rate = 1e-8
    problem = Toy(loss, len(centre), start=centre, seed=5)
    searcher = kind(problem, popsize=popsize, stdev_init=sigma, center_learning_rate=rate, optimizer=None, **more)
    centres = []
    for _ in range(steps + 1):  # PGPE's first step moves nothing yet
        searcher.step()
        centres.append(searcher.status["center"].as_subclass(torch.Tensor))
    found = -torch.stack(centres).diff(dim=0) / rate
    return found / sigma**2 if kind is PGPE else found


def mean_and_error(found):
    return found.mean(0), found.std(0) / math.sqrt(len(found))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sigma", SIGMAS)
class TestEstimate:
    @pytest.mark.parametrize("kind", [PGPE, RGS])
    def test_on_a_quadratic(self, kind, sigma, symmetric):
        """Whose smoothed gradient is its own."""
        centre = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
        mean, error = mean_and_error(estimates(kind, bowl, centre, sigma, symmetric=symmetric))
        expected = MATRIX @ centre - torch.tensor([0.0, 1.0, 0.0])
        assert ((mean - expected).abs() < 5 * error + SLACK).all()
        assert (error < 0.1).all()  # of a gradient of about 2
        if kind is RGS and symmetric:  # the two of a pair are wrong by the same, to either side
            assert (error < SLACK).all()

    @pytest.mark.parametrize("kind", [PGPE, RGS])
    @pytest.mark.parametrize("centre", CENTRES)
    def test_on_a_continuous_loss(self, kind, centre, sigma, symmetric):
        """Kinks are no obstacle to either, and RGS is the more precise."""
        mean, error = mean_and_error(estimates(kind, on_parameter(needle), [centre], sigma, symmetric=symmetric))
        assert (mean - smoothed_needle_gradient(centre, sigma)).abs() < 5 * error
        assert error < (0.5 if kind is PGPE else 0.05)

    @pytest.mark.parametrize("centre", CENTRES)
    def test_of_pgpe_sees_a_jump(self, centre, sigma, symmetric):
        mean, error = mean_and_error(estimates(PGPE, on_parameter(cliff), [centre], sigma, symmetric=symmetric))
        assert (mean - smoothed_cliff_gradient(centre, sigma)).abs() < 5 * error
        assert error < 0.05

    @pytest.mark.parametrize("centre", CENTRES)
    def test_of_rgs_misses_exactly_the_jump(self, centre, sigma, symmetric):
        """Its bias is the jump's height times the density of the noise there: the gradient knows the slopes alone."""
        mean, error = mean_and_error(estimates(RGS, on_parameter(cliff), [centre], sigma, symmetric=symmetric))
        assert (mean - smoothed_cliff_slope(centre, sigma)).abs() < 5 * error + SLACK
        bias, expected = mean - smoothed_cliff_gradient(centre, sigma), -smoothed_cliff_jump(centre, sigma)
        assert (bias - expected).abs() < 5 * error + SLACK
        if abs(centre) < 2 * sigma:
            assert bias > 20 * error


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("points", [2, 10])
class TestControlVariate:
    """PGPE with gradients as control variate: the same expectation, and less variance by what the gradient predicts."""

    def test_on_a_quadratic(self, sigma, points):
        """Whose gradient predicts all differences, and an antithetic pair's mean is exact."""
        centre = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
        found = estimates(PGPE, bowl, centre, sigma, popsize=10, control_points=points)
        expected = MATRIX @ centre - torch.tensor([0.0, 1.0, 0.0])
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=SLACK)

    @pytest.mark.parametrize("centre", CENTRES)
    def test_on_a_continuous_loss(self, centre, sigma, points):
        found = estimates(PGPE, on_parameter(needle), [centre], sigma, control_points=points)
        mean, error = mean_and_error(found)
        assert (mean - smoothed_needle_gradient(centre, sigma)).abs() < 5 * error + SLACK

    @pytest.mark.parametrize("centre", CENTRES)
    def test_sees_a_jump_that_its_gradients_miss(self, centre, sigma, points):
        found = estimates(PGPE, on_parameter(cliff), [centre], sigma, control_points=points)
        mean, error = mean_and_error(found)
        unseen = 2e-4  # where no sample is beyond the jump, at 4.5 sigma
        assert (mean - smoothed_cliff_gradient(centre, sigma)).abs() < 5 * error + unseen
        assert error < 0.05


def test_a_control_variate_saves_most_samples_where_the_loss_is_nearly_linear():
    """At few samples for many parameters: the error of plain PGPE is about sqrt(D / n) of the gradient."""
    weights = torch.linspace(-1, 1, 200, dtype=torch.float64)

    def loss(x):
        return (1 + (x @ weights - 2).exp()).log()

    found = {points: estimates(PGPE, loss, [0.1] * 200, 0.01, popsize=10, control_points=points) for points in (0, 2)}
    plain, controlled = (each.var(0).sum() for each in found.values())
    assert controlled < 1e-3 * plain
    mean, _ = mean_and_error(found[2])
    exact = weights * torch.sigmoid(0.1 * weights.sum() - 2)
    assert (mean - exact).norm() < 0.05 * exact.norm()


def test_a_control_variate_stays_in_bounds_where_gradients_say_little():
    """Steps with hardly a slope between them, then an ordinary one: what was fitted to the steps must not be believed."""

    def stairs(y):
        return torch.where(y > 0, (50 * y).floor() / 50 + 1e-6 * y, y)

    searcher = PGPE(
        Toy(on_parameter(stairs), 1, start=[0.05], seed=2),
        popsize=20, stdev_init=0.01, center_learning_rate=30.0, optimizer=None, control_points=2,
    )  # fmt: skip
    centres = []
    for _ in range(40):
        searcher.step()
        centres.append(float(searcher.status["center"]))
    assert centres[-1] < -0.02  # it came down all stairs
    assert max(abs(a - b) for a, b in itertools.pairwise(centres)) < 0.03


# The minima of the smoothed losses, from their closed forms.
CLIFF_MINIMA = {0.2: 0.253, 0.5: 0.259, 1.0: -0.303}
NEEDLE_MINIMA = {0.2: 0.998, 0.5: 0.790, 1.0: -0.237}


def ends(kind, loss, start, *, steps=200, rate=0.1, **more):
    """Where a searcher stands after steps that grow ever smaller."""
    searcher = kind(Toy(on_parameter(loss), 1, start=start, seed=3), center_learning_rate=rate, **more)
    for step in range(steps):
        searcher.set_learning_rate(rate * (1 - step / steps))
        searcher.step()
    searcher.finish()
    return float(searcher.status["center"])


@pytest.mark.parametrize("sigma", SIGMAS)
class TestConvergence:
    @pytest.mark.parametrize("start", [-1.5, 3.0])
    def test_of_pgpe_on_the_jump(self, sigma, start):
        """From either side: the smoothed loss has a slope where the loss itself is flat."""
        found = ends(PGPE, cliff, start * sigma, popsize=3000, stdev_init=sigma)
        assert abs(found - CLIFF_MINIMA[sigma]) < 0.05

    def test_of_pgpe_with_a_control_variate_on_the_jump(self, sigma):
        found = ends(PGPE, cliff, 3.0 * sigma, popsize=3000, stdev_init=sigma, control_points=10)
        assert abs(found - CLIFF_MINIMA[sigma]) < 0.05

    def test_of_rgs_on_the_jump_falls_off_it(self, sigma):
        """Past the smoothed loss's minimum, as it does not see that the loss grows there, to where nothing has a slope."""
        found = ends(RGS, cliff, 1.5, popsize=1000, stdev_init=sigma)
        assert found < CLIFF_MINIMA[sigma] - 1.5 * sigma

    @pytest.mark.parametrize("kind", [PGPE, RGS])
    def test_on_the_needle(self, sigma, kind):
        """A narrow minimum is found at a small sigma only; at a large one, the broad valley beside it."""
        found = ends(kind, needle, 1.5, popsize=3000, stdev_init=sigma)
        assert abs(found - NEEDLE_MINIMA[sigma]) < 0.05


@pytest.mark.parametrize("kind", [PGPE, RGS])
def test_leaves_a_plateau_where_gradient_descent_stays(kind):
    assert ends(Grad, needle, -0.1, steps=20) == pytest.approx(-0.1)
    assert ends(kind, needle, -0.1, popsize=2000, stdev_init=0.5) > 0.5
