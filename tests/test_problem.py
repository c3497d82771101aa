"""CertifiedTraining: the fitness, its minibatches, replacement of what is not finite, actors, and other searchers."""

import dataclasses
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from evotorch import SolutionBatch
from evotorch.algorithms import CEM, SNES
from evotorch.algorithms import PGPE as EvoTorchPGPE  # noqa: N811
from evotorch.logging import PandasLogger
from torch import nn

from evocert.bounds import Tile, UnsupportedLayer
from evocert.errors import InputError
from evocert.networks import flat_parameters
from evocert.problem import CertifiedTraining, NonFiniteFitnessError
from evocert.searchers import PGPE


def make(network, part, **more):
    return CertifiedTraining(network, part, **{"eps": 0.05, "batch_size": 16, "seed": 3, **more})


def population(problem, members=6, sigma=0.05):
    generator = torch.Generator().manual_seed(1)
    centre = flat_parameters(problem._module)
    return centre + sigma * torch.randn(members, len(centre), generator=generator)


def evaluated(problem, parameters):
    batch = SolutionBatch(problem, len(parameters), empty=True)
    batch.set_values(parameters)
    problem.evaluate(batch)
    return batch.evals.as_subclass(torch.Tensor)


class TestFitness:
    def test_is_the_cross_entropy_of_interval_bounds(self, network, part):
        """Against intervals computed here, layer by layer, one member at a time, in float64."""
        problem = make(network, part)
        parameters = population(problem)
        images, labels = (t for t in problem.minibatch(0)[1:3])
        expected = []
        for member in parameters.double():
            torch.nn.utils.vector_to_parameters(member, network.double().parameters())
            low, high = (images.double() - 0.05).clamp(0, 1), (images.double() + 0.05).clamp(0, 1)
            for layer in network:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    weight = layer.weight
                    if layer is network[-1]:
                        break
                    run = lambda w, b, x: F.conv2d(x, w, b, layer.stride, layer.padding)  # noqa: E731, B023
                    low, high = (
                        run(weight.clamp(min=0), layer.bias, low) + run(weight.clamp(max=0), None, high),
                        run(weight.clamp(min=0), layer.bias, high) + run(weight.clamp(max=0), None, low),
                    )
                else:
                    low, high = layer(low), layer(high)
            losses = []
            for low_i, high_i, label in zip(low, high, labels, strict=True):
                worst = []
                for other in range(3):
                    row = network[-1].weight[label] - network[-1].weight[other]
                    offset = network[-1].bias[label] - network[-1].bias[other]
                    worst.append(row.clamp(min=0) @ low_i + row.clamp(max=0) @ high_i + offset)
                losses.append(F.cross_entropy(-torch.stack(worst), label))
            expected.append(torch.stack(losses).mean())
        found = evaluated(problem, parameters)[:, 0]
        torch.testing.assert_close(found.double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)

    def test_extra_data_are_natural_loss_and_certified_fraction(self, network, part):
        problem = make(network, part, eps=0.01)
        parameters = population(problem)
        images, labels = problem.minibatch(0)[1:3]
        evals = evaluated(problem, parameters)
        for member, row in zip(parameters, evals, strict=True):
            torch.nn.utils.vector_to_parameters(member, network.parameters())
            torch.testing.assert_close(row[1], F.cross_entropy(network(images), labels).detach(), rtol=1e-5, atol=1e-6)
        assert ((evals[:, 2] * 16) % 1 == 0).all()
        at_zero = evaluated(make(network, part, eps=0.0), parameters)
        torch.testing.assert_close(at_zero[:, 0], at_zero[:, 1], rtol=1e-5, atol=1e-6)
        assert (at_zero[:, 2] >= evals[:, 2]).all()
        assert at_zero[:, 2].max() > 0

    def test_natural_loss_is_left_out_in_the_other_generations(self, network, part):
        problem = make(network, part, natural_every=2)
        parameters = population(problem)
        first, second = evaluated(problem, parameters), evaluated(problem, parameters)
        assert first.isfinite().all()
        assert second[:, 1].isnan().all()
        assert "natural_loss" not in problem.status
        assert second[:, [0, 2]].isfinite().all()

    def test_losses_is_the_fitness_and_differentiable(self, network, part):
        problem = make(network, part)
        parameters = population(problem)
        evals = evaluated(problem, parameters)
        with torch.no_grad():
            assert torch.equal(problem.losses(parameters, 0), evals[:, 0])
        parameters = parameters[:1].double().requires_grad_()
        torch.autograd.gradcheck(lambda p: problem.losses(p, 0), parameters, eps=1e-7, atol=1e-5)

    def test_a_tile_changes_nothing_but_rounding(self, network, part):
        parameters = population(make(network, part), 7)
        whole = make(network, part, tile=(7, 16)).losses(parameters, 0)
        for tile in [(1, 1), (2, 5), (4, 16), (8, 3)]:
            torch.testing.assert_close(
                make(network, part, tile=tile).losses(parameters, 0), whole, rtol=1e-5, atol=1e-5
            )


class TestMinibatch:
    def test_depends_on_seed_and_generation_alone(self, network, part):
        one, other = make(network, part), make(network, part)
        torch.manual_seed(5)
        evaluated(one, population(one))  # advances one, and whatever global state there is
        assert torch.equal(one.minibatch(4).images, other.minibatch(4).images)
        assert not torch.equal(one.minibatch(4).images, one.minibatch(5).images)
        assert not torch.equal(one.minibatch(4).images, make(network, part, seed=4).minibatch(4).images)

    def test_has_no_image_twice(self, network, part):
        images = make(network, part, batch_size=40).minibatch(0).images
        assert len(images.flatten(1).unique(dim=0)) == 40

    def test_generation_advances_with_every_evaluated_population(self, network, part):
        problem = make(network, part, eps=lambda generation: 0.01 * generation)
        for generation in range(3):
            assert problem.generation == generation
            evaluated(problem, population(problem))
            assert problem.status["eps"] == pytest.approx(0.01 * generation)
        problem.generation = 1
        assert torch.equal(problem._current_minibatch().images, problem.minibatch(1).images)


class TestNotFinite:
    def test_takes_the_worst_finite_fitness_of_the_population(self, network, part):
        problem = make(network, part)
        parameters = population(problem)
        expected = evaluated(problem, parameters)[:, 0]
        problem.generation = 0
        parameters[1], parameters[4, 3] = torch.nan, torch.inf
        found = evaluated(problem, parameters)[:, 0]
        kept = [0, 2, 3, 5]
        assert torch.equal(found[kept], expected[kept])
        assert found[1] == found[4] == expected[kept].max()
        assert problem.nonfinite_evals == problem.status["nonfinite_evals"] == 2

    def test_three_generations_without_any_finite_fitness_stop(self, network, part):
        problem = make(network, part)
        searcher = PGPE(problem, popsize=4, center_learning_rate=0.1, stdev_init=0.1)
        searcher.step()
        centre = searcher.status["center"].clone()
        problem._columns = lambda parameters, minibatch: torch.full((len(parameters), 16, 3), torch.nan)
        searcher.step()  # applies the gradient of the good population before it
        moved = searcher.status["center"].clone()
        assert not torch.equal(moved, centre)
        searcher.step()
        assert torch.equal(searcher.status["center"], moved)
        with pytest.raises(NonFiniteFitnessError, match="3 generations in a row"):
            searcher.step()
        assert torch.equal(searcher._get_mu(), moved)


class TestStart:
    def test_is_the_module_s_own_parameters(self, network, part):
        problem = make(network, part)
        values = problem.generate_values(3)
        assert torch.equal(values[0], flat_parameters(network))
        assert not torch.equal(values[1], values[0])
        assert not torch.equal(values[1], values[2])
        again = make(network, part).generate_values(3)
        assert torch.equal(values, again)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"bound": "box"}, "bound='box': allowed are ibp"),
            ({"batch_size": 41}, "batch_size=41: allowed is 1 to 40"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"eps": -0.1}, "eps=-0.1"),
            ({"eps": 1.5}, "eps=1.5"),
            ({"memory_budget": "1KiB"}, "memory_budget=1024 bytes is too small .* at least 1MiB"),
            ({"memory_budget": "much"}, "memory_budget='much'"),
        ],
    )
    def test_refuses(self, network, part, more, message):
        with pytest.raises(InputError, match=message):
            make(network, part, **more)

    def test_refuses_an_unsupported_layer_by_name_and_place(self, part):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))
        with pytest.raises(UnsupportedLayer, match="GELU at '2'"):
            make(module, part)


@pytest.mark.parametrize(
    "make_searcher",
    [
        lambda p: EvoTorchPGPE(
            p, popsize=8, center_learning_rate=0.05, stdev_learning_rate=0.1, stdev_init=0.1, optimizer="adam"
        ),
        lambda p: SNES(p, popsize=8, stdev_init=0.1),
        lambda p: CEM(p, popsize=8, parenthood_ratio=0.5, stdev_init=0.1),
        lambda p: PGPE(p, popsize=8, center_learning_rate=0.05, stdev_init=0.1),
    ],
    ids=["evotorch-pgpe", "snes", "cem", "pgpe"],
)
def test_any_searcher_learns_and_any_logger_listens(network, part, make_searcher):
    problem = make(network, part, batch_size=40)
    searcher = make_searcher(problem)
    logger = PandasLogger(searcher)
    searcher.run(40)
    frame = logger.to_dataframe(index=None)
    assert frame["mean_eval"].iloc[-5:].mean() < 0.9 * frame["mean_eval"].iloc[:5].mean()
    assert {"eps", "certified", "natural_loss", "nonfinite_evals"} <= set(frame.columns)


def test_can_be_pickled_with_its_searcher(network, part):
    searcher = PGPE(make(network, part), popsize=4, center_learning_rate=0.05, stdev_init=0.1)
    searcher.run(2)
    copy = pickle.loads(pickle.dumps(searcher))
    searcher.step()
    copy.step()
    assert torch.equal(copy.status["center"], searcher.status["center"])


@pytest.fixture(scope="module")
def _ray():
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
@pytest.mark.filterwarnings("ignore")  # Ray's own
class TestActors:
    def test_give_the_same_trajectory_bit_for_bit(self, network, part):
        def run(num_actors):
            problem = make(network, part, num_actors=num_actors, tile=(4, 16))
            searcher = PGPE(problem, popsize=10, center_learning_rate=0.05, stdev_init=0.1)
            trajectory = []
            for _ in range(6):
                searcher.step()
                trajectory.append((searcher.status["center"].clone(), searcher.population.evals.clone()))
            if num_actors:
                problem.kill_actors()
            return trajectory

        for alone, together in zip(run(0), run(2), strict=True):
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b)

    def test_distributed_mode_counts_generations_and_replaces_in_each_actor(self, network, part):
        problem = make(network, part, num_actors=2)
        searcher = EvoTorchPGPE(
            problem,
            popsize=8,
            center_learning_rate=0.05,
            stdev_learning_rate=0.0,
            stdev_init=1e13,  # products overflow: some or all losses are not finite
            optimizer="adam",
            ranking_method="centered",
            distributed=True,
        )
        searcher.run(2)
        assert problem.generation == 2
        assert searcher.status["center"].isfinite().all()
        problem.kill_actors()


class TestRefuses:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eps": 1.5}, "eps=1.5"),
            ({"eps": True}, "eps=True"),
            ({"eps": "0.1"}, "eps='0.1'"),
            ({"batch_size": 2.7}, "batch_size=2.7"),
            ({"batch_size": 41}, "batch_size=41: allowed is 1 to 40"),
            ({"seed": -1}, "seed=-1"),
            ({"tile": (0, 16)}, r"tile=\(0, 16, "),
            ({"bound": "box"}, "bound='box'"),
        ],
    )
    def test_impossible_settings(self, network, part, settings, message):
        settings = {"eps": 0.1, "batch_size": 8, **settings}
        if "tile" in settings:
            settings["tile"] = Tile(*settings["tile"])
        with pytest.raises(InputError, match=message):
            CertifiedTraining(network, part, **settings)

    @pytest.mark.parametrize("eps", [-0.5, 7.0, float("nan")])
    def test_a_radius_that_is_none_when_it_comes_to_it(self, network, part, eps):
        problem = CertifiedTraining(network, part, eps=lambda generation: eps, batch_size=8)
        with pytest.raises(InputError, match="eps="):
            problem.losses(torch.zeros(1, problem.solution_length))

    def test_parameters_of_another_network(self, network, part):
        problem = CertifiedTraining(network, part, eps=0.1, batch_size=8)
        for call in (problem.losses, problem.value_and_gradient):
            with pytest.raises(
                InputError, match=rf"parameters of shape .*: allowed is \[P, {problem.solution_length}\]"
            ):
                call(torch.zeros(2, problem.solution_length + 1))

    def test_weights_that_are_no_numbers(self, network, part):
        with torch.no_grad():
            next(network.parameters())[0] = float("nan")
        with pytest.raises(InputError, match="its parameters are NaN or infinite"):
            CertifiedTraining(network, part, eps=0.1, batch_size=8)

    def test_labels_that_are_no_outputs(self, network, part):
        wrong = dataclasses.replace(part, labels=part.labels + 1)
        problem = CertifiedTraining(network, wrong, eps=0.1, batch_size=40)
        with pytest.raises(InputError, match="label 3 of a training image: allowed is 0 to 2"):
            problem.losses(torch.zeros(1, problem.solution_length))


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp", "deeppoly", "deeppoly-sparse", "alpha-crown"])
def test_value_and_gradient_are_those_of_losses(network, part, bound):
    """In tiles of which the last ones are padded, with a graph for each."""
    problem = CertifiedTraining(network, part, eps=0.02, bound=bound, batch_size=40, tile=Tile(2, 16))
    generator = torch.Generator().manual_seed(0)
    parameters = 0.3 * torch.randn(3, problem.solution_length, generator=generator)
    losses, gradients = problem.value_and_gradient(parameters)
    leaf = parameters.clone().requires_grad_()
    expected = problem.losses(leaf)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-4, atol=1e-5)
    assert not losses.requires_grad
