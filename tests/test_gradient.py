"""Methods that follow gradients: their steps against torch's optimizers, what is left out, schedules, and saved state."""

import pickle

import pytest
import torch
from evotorch.logging import PandasLogger
from test_objectives import directly
from toys import Toy, quadratic

from evocert.bounds import Tile
from evocert.minibatches import drawn_noise
from evocert.networks import flat_parameters, with_parameters
from evocert.objectives import Options
from evocert.problem import CertifiedTraining, NonFiniteFitnessError
from evocert.searchers import METHODS, RGS, Grad, method

EPS = 0.03
OWN = {name: {} if name in ("grad", "standard") else {"options": {"mixture": 0.4, "steps": 2}} for name in METHODS}
OWN["rgs"] = {"popsize": 6, "stdev_init": 0.05}
OPTIMIZERS = {
    "adam": {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-8},
    "clipup": {"momentum": 0.7},
    "sgd": {"momentum": 0.5},
    None: {},
}
FOLLOWING = [name for name in METHODS if name != "pgpe"]


def make(network, part, name="grad", *, optimizer="adam", **more):
    problem = CertifiedTraining(network, part, eps=EPS, batch_size=8, seed=2)
    config = OPTIMIZERS[optimizer]
    settings = {"center_learning_rate": 0.02, "optimizer": optimizer, "optimizer_config": config, **OWN[name], **more}
    return method(name)(problem, **settings)


def centre_of(searcher):
    return searcher.status["center"].as_subclass(torch.Tensor).clone()


class TestSteps:
    @pytest.mark.parametrize(
        ("optimizer", "config", "theirs"),
        [
            ("adam", {"epsilon": 1e-3}, lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3)),
            ("adam", OPTIMIZERS["adam"], lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99))),
            ("sgd", {}, lambda p: torch.optim.SGD(p, lr=0.01)),
            ("sgd", {"momentum": 0.9, "nesterov": True},
                lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
            (None, {}, lambda p: torch.optim.SGD(p, lr=0.01)),
        ],
        ids=["adam", "adam-config", "sgd", "nesterov", "plain"],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["grad", "sabr"])
    def test_are_torch_s_own(self, network, part, name, optimizer, config, theirs):
        """On a loss that is computed here, module by module, on the same minibatches; in float64, for signs of gradients."""
        searcher = make(network, part, name, optimizer=optimizer, optimizer_config=config, center_learning_rate=0.01)
        problem, module = searcher.problem, with_parameters(network, centre_of(searcher)).double()
        theirs = theirs(module.parameters())
        follow = problem.descend
        problem.descend = lambda points, *found, **options: tuple(
            t.float() for t in follow(points.double(), *found, **options)
        )
        for generation in range(6):
            images, labels = problem.minibatch(generation)[1:3]
            images = images.double()
            options = Options("ibp", EPS, **OWN[name].get("options", {}))
            noise = drawn_noise(2, generation, images)
            kind = "certified" if name == "grad" else name
            loss = directly(kind, module, images, labels, noise, options).mean()
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            before = centre_of(searcher)
            searcher.step()
            assert searcher.status["mean_eval"] == pytest.approx(loss.item(), rel=1e-5)
            moved = centre_of(searcher)
            assert not torch.equal(moved, before)
            torch.testing.assert_close(moved.double(), flat_parameters(module), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_of_rgs_are_against_the_mean_gradient_of_its_points(self, network, part, symmetric):
        searcher = make(network, part, "rgs", optimizer=None, symmetric=symmetric)
        problem = searcher.problem
        for generation in range(2):
            start, state = centre_of(searcher), problem.generator.get_state()
            points = searcher._points()
            problem.generator.set_state(state)
            assert points.shape == (6, problem.solution_length)
            assert len(points.unique(dim=0)) == 6
            losses, gradients = [], []
            for point in points:
                leaf = point.clone().requires_grad_()
                losses.append(problem.losses(leaf[None], generation)[0])
                gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
            searcher.step()
            expected = start - 0.02 * torch.stack(gradients).mean(0)
            torch.testing.assert_close(centre_of(searcher), expected, rtol=0, atol=1e-6)
            assert searcher.status["mean_eval"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)

    def test_a_tile_changes_nothing_but_rounding(self, network, part):
        centres = []
        for tile in (Tile(6, 16), Tile(1, 3), Tile(4, 8)):
            problem = CertifiedTraining(network, part, eps=EPS, batch_size=8, tile=tile)
            searcher = RGS(problem, popsize=6, stdev_init=0.05, center_learning_rate=0.1, optimizer=None)
            searcher.run(3)
            centres.append(centre_of(searcher))
        for other in centres[1:]:
            torch.testing.assert_close(other, centres[0], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", FOLLOWING)
    def test_lower_the_method_s_own_loss(self, network, part, name):
        problem = CertifiedTraining(network, part, eps=0.005, batch_size=40)
        searcher = method(name)(problem, center_learning_rate=0.01, **OWN[name])
        searcher.step()
        before = searcher.status["mean_eval"]
        searcher.run(40)
        assert searcher.status["mean_eval"] < 0.5 * before


class TestPoints:
    def test_of_rgs_mirror_each_other_in_pairs(self):
        searcher = RGS(Toy(quadratic, 3, start=2.0), popsize=20_000, stdev_init=0.3, center_learning_rate=1.0)
        points = searcher._points()
        torch.testing.assert_close(points[0::2] + points[1::2], torch.full((10_000, 3), 4.0).double())
        torch.testing.assert_close((points[0::2] - 2).std(0), torch.full((3,), 0.3).double(), rtol=0.03, atol=0)
        assert not torch.equal(searcher._points(), points)

    def test_of_rgs_without_symmetry_are_independent(self):
        searcher = RGS(Toy(quadratic, 3), popsize=20_001, stdev_init=0.3, center_learning_rate=1.0, symmetric=False)
        noise = searcher._points() - centre_of(searcher)
        assert noise.shape == (20_001, 3)
        torch.testing.assert_close(noise.std(0), torch.full((3,), 0.3).double(), rtol=0.03, atol=0)
        assert (noise[:-1] * noise[1:]).mean().abs() < 0.3**2 * 0.03

    def test_follow_sigma(self):
        searcher = RGS(Toy(quadratic, 50), popsize=200, stdev_init=1.0, center_learning_rate=1e-6)
        for sigma in (0.5, 0.01, 2.0):
            searcher.set_stdev(sigma)
            assert (searcher._points() - centre_of(searcher)).std().item() == pytest.approx(sigma, rel=0.05)
            searcher.step()
            assert searcher.status["stdev"].tolist() == [sigma]

    def test_of_others_are_the_centre(self, network, part):
        searcher = make(network, part, "sabr")
        searcher.set_stdev(1.0)
        assert torch.equal(searcher._points(), centre_of(searcher)[None])
        assert torch.equal(centre_of(searcher), flat_parameters(network))
        searcher.step()
        assert searcher.status["stdev"].tolist() == [0.0]


class TestGradient:
    """On a quadratic, whose gradient at the start is -1 in each of 4 coordinates: of length 2."""

    def moved(self, loss=quadratic, start=0.0, **more):
        searcher = Grad(Toy(loss, 4, start=start), center_learning_rate=1.0, optimizer=None, **more)
        before = centre_of(searcher)
        searcher.step()
        return centre_of(searcher) - before

    @pytest.mark.parametrize(("clip", "length"), [(None, 2.0), (0.5, 0.5), (1.9, 1.9), (2.1, 2.0), (1e9, 2.0)])
    def test_is_shortened_where_it_is_longer(self, clip, length):
        torch.testing.assert_close(self.moved(clip_norm=clip), torch.full((4,), length / 2).double())

    def test_of_the_absolute_values_is_added(self):
        moved = self.moved(lambda x: 0 * x.sum(1), start=[2.0, -3.0, 0.0, 0.5], l1=0.25)
        assert moved.tolist() == [-0.25, 0.25, 0.0, -0.25]
        torch.testing.assert_close(self.moved(start=3.0, l1=0.25), torch.full((4,), -2.25).double())

    def test_is_shortened_with_the_absolute_values_in_it(self):
        moved = self.moved(start=3.0, l1=0.25, clip_norm=1.0)
        torch.testing.assert_close(moved, torch.full((4,), -0.5).double())

    @pytest.mark.parametrize(("optimizer", "rate"), [(None, 0.5), ("sgd", 0.5), ("adam", 0.01)])
    def test_leaves_the_decay_of_the_weights_alone(self, optimizer, rate):
        """Decoupled: whatever the optimizer makes of the gradient, the share that goes is rate times weight_decay."""
        ends = []
        for decay in (0.0, 0.4):
            problem = Toy(lambda x: 1e-3 * x.sum(1), 4, start=[2.0, -3.0, 0.0, 0.5])
            searcher = Grad(problem, center_learning_rate=9.0, optimizer=optimizer, weight_decay=decay)
            searcher.set_learning_rate(rate)
            start = centre_of(searcher)
            searcher.step()
            ends.append(centre_of(searcher))
        torch.testing.assert_close(ends[1], ends[0] - rate * 0.4 * start)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_of_nothing_moves_nothing(self, optimizer, clip):
        """Not even by momentum; EvoTorch's ClipUp divides by the gradient's length."""
        flat = [False]
        config = OPTIMIZERS[optimizer]
        problem = Toy(lambda x: quadratic(x) * (not flat[0]), 4)
        searcher = Grad(problem, center_learning_rate=0.1, optimizer=optimizer, optimizer_config=config, clip_norm=clip)
        searcher.run(3)
        flat[0] = True
        centre = centre_of(searcher)
        searcher.run(2)
        assert torch.equal(centre_of(searcher), centre)
        flat[0] = False
        searcher.step()
        assert not torch.equal(centre_of(searcher), centre)
        assert centre_of(searcher).isfinite().all()

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_finds_the_minimum(self, optimizer):
        rate = {"adam": 0.1, "clipup": 0.1}.get(optimizer, 0.3)
        searcher = Grad(Toy(quadratic, 5), center_learning_rate=rate, optimizer=optimizer)
        for step in range(100):
            searcher.set_learning_rate(rate * (1 - step / 100))
            searcher.step()
        assert (centre_of(searcher) - 1).abs().max() < 0.02

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_is_followed_at_the_rate_that_is_set(self, optimizer):
        searcher = Grad(Toy(quadratic, 4, start=0.0), center_learning_rate=0.5, optimizer=optimizer)
        searcher.set_learning_rate(0.001)
        searcher.step()
        expected = {"clipup": 0.0005}.get(optimizer, 0.001)  # ClipUp's rate is the step's length, of 4 coordinates
        torch.testing.assert_close(centre_of(searcher), torch.full((4,), expected).double())
        if optimizer == "clipup":
            assert searcher.optimizer.param_groups[0]["max_speed"] == pytest.approx(0.002)


class TestNotFinite:
    def spoil(self, problem, threshold, how):
        """Members whose first parameter is over the threshold lose a finite loss, or only a finite gradient."""
        losses = problem._losses

        def spoilt(members, images, labels, minibatch):
            columns = losses(members, images, labels, minibatch)
            first = members.parameters[:, :1]
            if how == "gradient":
                nothing = torch.where(first > threshold, (first - first.detach()).abs(), torch.ones_like(first))
                still = torch.where(first > threshold, nothing.sqrt(), torch.zeros_like(first))  # 0, of no slope
                return columns + still[..., None]
            return torch.where(first[..., None] > threshold, torch.full_like(columns, float(how)), columns)

        problem._losses = spoilt

    @pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
    def test_members_are_left_out(self, network, part, how):
        searcher = make(network, part, "rgs", optimizer=None)
        problem, start = searcher.problem, centre_of(searcher)
        state = problem.generator.get_state()
        points = searcher._points()
        problem.generator.set_state(state)
        good = points[:, 0] <= start[0] + 1e-3
        assert good.sum() == 3
        losses, gradients = problem.value_and_gradient(points[good])
        self.spoil(problem, start[0] + 1e-3, how)
        searcher.step()
        torch.testing.assert_close(centre_of(searcher), start - 0.02 * gradients.mean(0), rtol=0, atol=1e-7)
        assert searcher.status["mean_eval"] == pytest.approx(losses.mean().item())
        assert searcher.status["nonfinite_evals"] == 3
        assert problem.stalled_generations == 0

    @pytest.mark.parametrize("name", ["grad", "rgs"])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("how", ["nan", "gradient"])
    def test_three_generations_of_nothing_else_stop(self, network, part, name, optimizer, how):
        searcher = make(network, part, name, optimizer=optimizer)
        searcher.run(2)
        centre = centre_of(searcher)
        good = searcher.problem._losses
        self.spoil(searcher.problem, -torch.inf, how)
        searcher.run(2)
        assert torch.equal(centre_of(searcher), centre)  # nor by momentum
        assert searcher.problem.stalled_generations == 2
        searcher.problem._losses, spoilt = good, searcher.problem._losses
        searcher.step()
        assert searcher.problem.stalled_generations == 0
        moved = centre_of(searcher)
        assert moved.isfinite().all()
        assert not torch.equal(moved, centre)
        searcher.problem._losses = spoilt
        searcher.run(2)
        with pytest.raises(NonFiniteFitnessError, match="3 generations in a row"):
            searcher.step()
        assert torch.equal(searcher._center, moved)


class TestState:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("name", METHODS)
    def test_goes_on_bit_for_bit(self, network, part, name, optimizer, tmp_path):
        own = {"popsize": 4, "stdev_init": 0.05, "options": None} if name == "pgpe" else {}
        whole, first, second = (make_any(network, part, name, optimizer, own) for _ in range(3))
        whole.set_learning_rate(0.01)
        first.set_learning_rate(0.01)
        whole.run(6)
        first.run(3)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for key in ("iter", "mean_eval", "eps"):
            assert second.status[key] == first.status[key]
        assert torch.equal(second.status["center"], first.status["center"])
        second.run(3)
        for searcher in (whole, second):
            searcher.finish()
        assert torch.equal(centre_of(second), centre_of(whole))
        assert second.status["mean_eval"] == whole.status["mean_eval"]
        assert second.step_count == whole.step_count == 6
        assert second.problem.generation == whole.problem.generation == 6
        one, other = second.state_dict(), whole.state_dict()
        assert torch.equal(one["generator"], other["generator"])
        torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)

    def test_counts_what_was_not_finite(self, network, part):
        one, other = make(network, part), make(network, part)
        losses = one.problem._losses
        one.problem._losses = lambda *found: losses(*found) * torch.nan
        one.run(2)
        other.load_state_dict(one.state_dict())
        assert other.problem.nonfinite_evals == other.problem.stalled_generations == 2
        assert other.status["nonfinite_evals"] == 2
        other.problem._losses = one.problem._losses
        with pytest.raises(NonFiniteFitnessError):
            other.step()

    @pytest.mark.parametrize("name", ["grad", "rgs", "sabr"])
    def test_of_a_fresh_searcher_will_do(self, network, part, name):
        one, other = make(network, part, name), make(network, part, name)
        other.run(2)
        other.load_state_dict(one.state_dict())
        assert other.step_count == other.problem.generation == 0
        one.run(2)
        other.run(2)
        assert torch.equal(centre_of(one), centre_of(other))

    @pytest.mark.parametrize("name", FOLLOWING)
    def test_can_be_pickled_with_its_searcher(self, network, part, name):
        searcher = make(network, part, name)
        searcher.run(2)
        copy = pickle.loads(pickle.dumps(searcher))
        searcher.step()
        copy.step()
        assert torch.equal(centre_of(copy), centre_of(searcher))
        assert copy.status["mean_eval"] == searcher.status["mean_eval"]


def make_any(network, part, name, optimizer, own):
    if name != "pgpe":
        return make(network, part, name, optimizer=optimizer)
    problem = CertifiedTraining(network, part, eps=EPS, batch_size=8, seed=2)
    return method(name)(
        problem,
        popsize=4,
        stdev_init=0.05,
        center_learning_rate=0.02,
        optimizer=optimizer,
        optimizer_config=OPTIMIZERS[optimizer],
    )


class TestStatus:
    @pytest.mark.parametrize("name", FOLLOWING)
    def test_is_logged(self, network, part, name):
        searcher = make(network, part, name)
        logger = PandasLogger(searcher)
        searcher.run(3)
        certified = {"certified", "natural_loss"} if searcher.objective == "certified" else set()
        assert {"center", "stdev", "mean_eval", "iter", "eps", "nonfinite_evals", *certified} == set(searcher.status)
        frame = logger.to_dataframe(index=None)
        assert {"mean_eval", "iter", "eps", "nonfinite_evals", *certified} == set(frame.columns)
        assert frame["iter"].tolist() == [1, 2, 3]
        assert frame["eps"].tolist() == [EPS] * 3
        assert frame.notna().all(axis=None)
        assert frame["mean_eval"].iloc[-1] == searcher.status["mean_eval"]
        assert searcher.timing.keys() == {"sample", "bounds", "update"}
        assert searcher.timing["bounds"] > 0

    def test_has_the_centre_after_the_step(self):
        searcher = Grad(Toy(quadratic, 4, start=0.0), center_learning_rate=1.0, optimizer=None)
        searcher.step()
        kept = searcher.status["center"]
        assert kept.tolist() == [1.0] * 4
        searcher.problem.loss = lambda x: -x.sum(1)
        searcher.step()
        searcher.finish()
        assert kept.tolist() == [1.0] * 4  # what was handed out stays
        assert centre_of(searcher).tolist() == [2.0] * 4
        assert searcher.status["mean_eval"] == -4.0  # before the step
