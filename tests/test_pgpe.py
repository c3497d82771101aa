"""PGPE: the estimator against closed forms, EvoTorch's own and a sphere; updates, schedules, and saved state."""

import math

import pytest
import torch
from evotorch.algorithms import PGPE as EvoTorchPGPE  # noqa: N811
from evotorch.distributions import SeparableGaussian, SymmetricSeparableGaussian
from toys import Toy, cliff, needle, smoothed_cliff_gradient, smoothed_needle_gradient

from evocert.problem import CertifiedTraining
from evocert.searchers import PGPE
from evocert.searchers.gaussian import FixedGaussian, FixedSymmetricGaussian


class TestEstimator:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
    @pytest.mark.parametrize("mu", [-0.4, 0.1, 0.9])
    @pytest.mark.parametrize(
        ("loss", "gradient"),
        [
            (cliff, smoothed_cliff_gradient),
            (needle, smoothed_needle_gradient),
            (lambda w: 3 * w**2 - w, lambda mu, sigma: 6 * mu - 1),
        ],
        ids=["cliff", "needle", "quadratic"],
    )
    def test_is_sigma_squared_times_the_smoothed_gradient(self, loss, gradient, mu, sigma, symmetric):
        """Within five standard errors of the analytic gradient of the smoothed loss."""
        kind = FixedSymmetricGaussian if symmetric else FixedGaussian
        divide = "num_directions" if symmetric else "num_solutions"
        distribution = kind(
            {
                "mu": torch.tensor([mu], dtype=torch.float64),
                "sigma": torch.tensor([sigma], dtype=torch.float64),
                "divide_mu_grad_by": divide,
                "divide_sigma_grad_by": divide,
            }
        )
        generator = torch.Generator().manual_seed(7)
        estimates = []
        for _ in range(40):
            samples = distribution.sample(4000, generator=generator)
            found = distribution.compute_gradients(
                samples, loss(samples[:, 0]), objective_sense="min", ranking_method="raw"
            )
            estimates.append(-found["mu"][0])  # EvoTorch's gradients ascend the utility
        estimates = torch.stack(estimates)
        error = estimates.std() / math.sqrt(len(estimates))
        assert abs(estimates.mean() - sigma**2 * gradient(mu, sigma)) < 5 * error
        assert error < 0.05 * sigma**2 * 6  # tight enough to tell

    @pytest.mark.parametrize("ranking", ["raw", "centered", "linear", "nes", "normalized"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("ours", "theirs", "divide"),
        [
            (FixedSymmetricGaussian, SymmetricSeparableGaussian, "num_directions"),
            (FixedGaussian, SeparableGaussian, "num_solutions"),
        ],
    )
    def test_equals_evotorch_s(self, ours, theirs, divide, dtype, ranking):
        generator = torch.Generator().manual_seed(1)
        parameters = {
            "mu": torch.randn(50, generator=generator, dtype=dtype),
            "sigma": torch.full((50,), 0.03, dtype=dtype),
            "divide_mu_grad_by": divide,
            "divide_sigma_grad_by": divide,
        }
        samples = ours(parameters).sample(12, generator=generator)
        fitness = (samples**2).sum(1) + 100
        found, expected = (
            kind(parameters).compute_gradients(samples, fitness, objective_sense="min", ranking_method=ranking)
            for kind in (ours, theirs)
        )
        scale = expected["mu"].abs().max().item()
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(found["mu"], expected["mu"], rtol=tolerance, atol=tolerance * scale)
        assert not found["sigma"].any()

    def test_pairs_mirror_each_other_in_neighbouring_rows(self):
        distribution = FixedSymmetricGaussian({"mu": torch.tensor([1.0, -2.0]), "sigma": torch.tensor([0.1, 3.0])})
        samples = distribution.sample(100_000, generator=torch.Generator().manual_seed(0)).double()
        torch.testing.assert_close(samples[0::2] + samples[1::2], torch.tensor([2.0, -4.0]).double().expand(50_000, 2))
        torch.testing.assert_close(samples.std(0), torch.tensor([0.1, 3.0]).double(), rtol=0.02, atol=0)


def sphere(x):
    return ((x - 0.7) ** 2).sum(1)


class TestSearcher:
    @pytest.mark.parametrize("optimizer", ["adam", "clipup", "sgd", None])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_finds_the_minimum_of_a_sphere(self, optimizer, symmetric):
        rate = {"adam": 0.05, "clipup": 0.05, "sgd": 40.0, None: 40.0}[
            optimizer
        ]  # of sigma squared: 0.4 in textbook's terms
        searcher = PGPE(
            Toy(sphere, 5),
            popsize=40,
            center_learning_rate=rate,
            stdev_init=0.1,
            optimizer=optimizer,
            symmetric=symmetric,
        )
        searcher.run(300)
        searcher.finish()
        assert ((searcher.status["center"] - 0.7).abs() < 0.15).all()

    def test_n_generations_are_n_updates(self):
        """Without an optimizer the centre is the start plus all gradients, of which EvoTorch leaves the last unused."""
        updates = []
        searcher = PGPE(Toy(sphere, 3), popsize=10, center_learning_rate=1.0, stdev_init=0.1, optimizer=None)
        follow = searcher._update_distribution
        searcher._update_distribution = lambda gradients: (updates.append(gradients["mu"].clone()), follow(gradients))
        start = searcher.status["center"].clone()
        searcher.run(4)
        assert len(updates) == 3
        searcher.finish()
        searcher.finish()  # nothing is pending any more
        assert len(updates) == 4
        torch.testing.assert_close(searcher.status["center"], start + torch.stack(updates).sum(0))

    def test_a_changing_sigma_is_evotorch_s_own(self):
        ours, theirs = (
            kind(
                Toy(sphere, 4),
                popsize=20,
                center_learning_rate=0.1,
                stdev_learning_rate=0.1,
                stdev_init=0.3,
                optimizer=None,
                ranking_method="centered",
            )
            for kind in (PGPE, EvoTorchPGPE)
        )
        for searcher in (ours, theirs):
            searcher.run(5)
        assert torch.equal(ours.status["stdev"], theirs.status["stdev"])
        assert torch.equal(ours.status["center"], theirs.status["center"])
        assert not torch.allclose(ours.status["stdev"], torch.tensor(0.3).double())

    def test_adam_s_epsilon_leaves_small_gradients_alone(self):
        """Raw gradients shrink with sigma squared: with Adam's own epsilon a small sigma would hardly move."""
        searcher = PGPE(Toy(lambda x: ((x - 3) ** 2).sum(1), 5), popsize=20, center_learning_rate=0.01, stdev_init=1e-5)
        start = searcher.status["center"].clone()
        searcher.run(2)
        # Adam's first step is its learning rate in every coordinate; with an epsilon of 1e-8 it would be 0.0004 here.
        first_step = (searcher.status["center"] - start).as_subclass(torch.Tensor)
        torch.testing.assert_close(first_step.abs(), torch.full((5,), 0.01).double(), rtol=0.05, atol=0)

    def test_learning_rate_and_sigma_can_be_scheduled(self):
        for optimizer in ("adam", "clipup", "sgd", None):
            searcher = PGPE(Toy(sphere, 5), popsize=20, center_learning_rate=0.5, stdev_init=0.1, optimizer=optimizer)
            searcher.run(3)
            searcher.set_learning_rate(0.0)
            searcher.set_stdev(1e-3)
            centre = searcher.status["center"].clone()
            searcher.run(2)
            spread = (searcher.population.values - searcher.status["center"]).abs().max()
            assert 0 < spread < 5e-3
            if optimizer != "clipup":  # whose velocity goes on
                assert torch.equal(searcher.status["center"], centre)
            else:
                assert searcher.optimizer.param_groups[0]["max_speed"] == 0

    @pytest.mark.parametrize("optimizer", ["adam", "clipup", "sgd", None])
    @pytest.mark.parametrize("steps", [0, 1, 4])
    @pytest.mark.parametrize("control_points", [0, 4])
    def test_saved_state_goes_on_bit_for_bit(self, network, part, optimizer, steps, control_points, tmp_path):
        def make():
            problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=2)
            config = {"momentum": 0.5} if optimizer == "sgd" else None
            return PGPE(
                problem,
                popsize=6,
                center_learning_rate=0.1,
                stdev_init=0.1,
                optimizer=optimizer,
                optimizer_config=config,
                control_points=control_points,
            )

        one = make()
        for _ in range(steps):
            one.step()
        torch.save(one.state_dict(), tmp_path / "state.pt")
        other = make()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(3):
            one.step()
            other.step()
            assert torch.equal(one.status["center"], other.status["center"])
            assert torch.equal(one.population.evals, other.population.evals)
            assert one.step_count == other.step_count
        one.finish()
        other.finish()
        assert torch.equal(one.status["center"], other.status["center"])

    @pytest.mark.parametrize("optimizer", ["adam", "clipup", "sgd", None])
    @pytest.mark.parametrize("ranking", ["raw", "centered", "normalized"])
    def test_stays_where_all_are_alike(self, optimizer, ranking):
        """Equal fitness says nothing: no NaN, no random walk, no momentum."""
        flat = [False]
        problem = Toy(lambda x: torch.zeros(len(x)) if flat[0] else sphere(x), 4)
        searcher = PGPE(
            problem, popsize=10, center_learning_rate=0.1, stdev_init=0.1, optimizer=optimizer, ranking_method=ranking
        )
        searcher.run(3)
        flat[0] = True
        searcher.step()
        centre = searcher.status["center"].clone()
        searcher.run(3)
        assert torch.equal(searcher.status["center"], centre)
        flat[0] = False
        searcher.run(2)
        assert not torch.equal(searcher.status["center"], centre)

    def test_a_finished_search_is_restored_with_its_status(self, network, part):
        def make():
            return PGPE(
                CertifiedTraining(network, part, eps=0.02, batch_size=8),
                popsize=6,
                center_learning_rate=0.1,
                stdev_init=0.1,
            )

        one, other = make(), make()
        one.run(3)
        one.finish()
        other.load_state_dict(one.state_dict())
        for key in ("mean_eval", "median_eval", "iter"):
            assert one.status[key] == other.status[key]
        assert torch.equal(one.status["center"], other.status["center"])
        assert torch.equal(one.population.values, other.population.values)

    @pytest.mark.parametrize(("optimizer", "rate"), [(None, 0.5), ("sgd", 0.5), ("adam", 0.01), ("clipup", 0.01)])
    def test_decay_of_the_weights_is_none_of_the_optimizer_s_business(self, optimizer, rate):
        """Rate times weight_decay is the share that goes with each update, the first of which is the second step's."""
        ends = []
        for decay in (0.0, 0.4):
            problem = Toy(lambda x: x.sum(1), 4, start=[2.0, -3.0, 0.0, 0.5], seed=1)
            searcher = PGPE(
                problem, popsize=10, stdev_init=0.1, center_learning_rate=9.0, optimizer=optimizer, weight_decay=decay
            )
            searcher.set_learning_rate(rate)
            searcher.step()
            start = searcher.status["center"].as_subclass(torch.Tensor).clone()
            searcher.step()
            ends.append(searcher.status["center"].as_subclass(torch.Tensor).clone())
        torch.testing.assert_close(ends[1], ends[0] - rate * 0.4 * start)

    def test_gradients_of_another_minibatch_would_not_control(self, network, part):
        """The control variate is of the population's own images: it predicts most of what these make of the noise."""
        problem = CertifiedTraining(network, part, eps=0.02, batch_size=8, seed=2)
        searcher = PGPE(problem, popsize=40, center_learning_rate=0.01, stdev_init=0.003, control_points=8)
        searcher.run(3)
        samples = searcher.population.values.as_subclass(torch.Tensor)
        fitness = searcher.population.evals[:, 0].as_subclass(torch.Tensor)
        left = searcher._control.without(samples, fitness)
        before, after = (((each[0::2] - each[1::2]) / 2).square().mean() for each in (fitness, left))
        assert after < 0.1 * before

    def test_without_finite_gradients_it_is_plain(self):
        """A loss without gradients there is no obstacle."""

        class Broken(Toy):
            def value_and_gradient(self, parameters, generation):
                return torch.zeros(len(parameters)), torch.full_like(parameters, torch.nan)

        controlled, plain = (kind(sphere, 5, seed=3) for kind in (Broken, Toy))
        centres = []
        for problem, points in ((controlled, 2), (plain, 0)):
            searcher = PGPE(problem, popsize=10, center_learning_rate=0.1, stdev_init=0.1, control_points=points)
            searcher.run(2)  # of the third population, the noise differs: the control variate draws its own
            centres.append(searcher.status["center"])
        assert torch.equal(*centres)

    @pytest.mark.parametrize(
        "more",
        [
            {"control_points": 3},
            {"control_points": -2},
            {"control_points": 2, "symmetric": False},
            {"control_points": 2, "ranking_method": "centered"},
            {"control_points": 2, "stdev_learning_rate": 0.1},
            {"control_points": 2, "distributed": True},
        ],
    )
    def test_refuses_control_variates_that_would_bias(self, more):
        with pytest.raises(ValueError, match=f"control_points={more['control_points']}"):
            PGPE(Toy(sphere, 2), popsize=4, center_learning_rate=0.1, stdev_init=0.1, **more)

    def test_refuses_an_odd_symmetric_population(self):
        with pytest.raises(ValueError, match="even"):
            PGPE(Toy(sphere, 2), popsize=5, center_learning_rate=0.1, stdev_init=0.1)
