"""The table of methods: names, what an experiment's settings come to, and what is refused."""

import dataclasses

import pytest
from toys import Toy, quadratic

from evocert import searchers
from evocert.bounds import BOUNDS
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.objectives import OBJECTIVES
from evocert.problem import CertifiedTraining
from evocert.searchers import BY_GRADIENT, METHODS, PGPE, RGS, SABR, Grad, method

EPS = 0.03
FOLLOWING = [name for name in METHODS if name != "pgpe"]


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    def test_are_importable_documented_and_named(self, name):
        kind = method(name)
        namespace = {}
        exec(f"from evocert.searchers import {kind.__name__} as found", namespace)
        assert namespace["found"] is kind
        assert kind.__dict__["__doc__"].strip()
        assert f'"{name}"' in Experiment.__doc__
        for member in ("configured", "finish", "set_learning_rate", "set_stdev", "state_dict", "load_state_dict"):
            assert callable(getattr(kind, member))

    def test_follow_every_objective(self):
        objectives = {name: method(name).objective for name in FOLLOWING}
        assert set(objectives.values()) == set(OBJECTIVES)
        assert objectives.pop("grad") == objectives.pop("rgs") == "certified"
        assert all(name == objective for name, objective in objectives.items())

    def test_other_names_are_none(self):
        with pytest.raises(AttributeError, match="has no attribute 'Sabr'"):
            searchers.Sabr  # noqa: B018

    @pytest.mark.parametrize("name", FOLLOWING)
    def test_take_an_experiment_s_settings(self, network, part, name):
        experiment = Experiment(
            eps=EPS, generations=1, center_learning_rate=0.3, method=name, popsize=10, stdev_init=0.7, symmetric=False,
            clip_norm=2.5, l1=0.1, weight_decay=0.02, mixture=0.3, train_attack_steps=3, train_attack_step=0.7, optimizer="sgd",
            optimizer_config={"momentum": 0.25},
        )  # fmt: skip
        asked = []
        problem = CertifiedTraining(network, part, eps=EPS, batch_size=8)
        searcher = method(name).configured(problem, experiment)
        follow = problem.descend
        problem.descend = lambda *found, **options: asked.append((*found, options)) or follow(*found, **options)
        searcher.step()
        ((points, objective, options),) = asked
        attacking = name not in ("grad", "rgs", "standard")
        assert objective == searcher.objective
        assert options == ({"mixture": 0.3, "steps": 3, "step": 0.7} if attacking else {})
        assert len(points) == (10 if name == "rgs" else 1)
        assert float(searcher.status["stdev"][0]) == pytest.approx(0.7 if name == "rgs" else 0.0)
        group = searcher.optimizer.param_groups[0]
        assert (group["lr"], group["momentum"]) == (0.3, 0.25)
        assert (searcher._clip_norm, searcher._l1, searcher._weight_decay) == (2.5, 0.1, 0.02)


class TestBoundsWithoutGradients:
    @pytest.fixture(autouse=True)
    def stepped(self, monkeypatch):
        monkeypatch.setitem(BOUNDS, "stepped", dataclasses.replace(BOUNDS["ibp"], differentiable=False))

    @pytest.mark.parametrize("name", BY_GRADIENT)
    def test_are_refused_by_methods_that_follow_them(self, name):
        message = f"method='{name}': allowed is pgpe, sabr, .*standard, with bound=stepped, which has no gradient"
        with pytest.raises(InputError, match=message):
            Experiment(eps=EPS, generations=1, center_learning_rate=0.1, stdev_init=0.1, method=name, bound="stepped")

    def test_have_no_control_variate(self):
        settings = {"eps": EPS, "generations": 1, "center_learning_rate": 0.1, "stdev_init": 0.1, "bound": "stepped"}
        Experiment(**settings)
        with pytest.raises(
            InputError, match="control_points=2: allowed is 0, with bound=stepped, which has no gradient"
        ):
            Experiment(**settings, control_points=2)

    def test_are_refused_in_stages_too(self):
        stage = {"method": "grad", "bound": "stepped"}
        with pytest.raises(InputError, match="stage 1: method='grad': allowed is pgpe"):
            Experiment(eps=EPS, generations=1, center_learning_rate=0.1, stdev_init=0.1, stages=[stage])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Grad, {"clip_norm": 0.0}, r"clip_norm=0\.0: allowed is a finite number over 0, or none"),
        (SABR, {"clip_norm": float("nan")}, "clip_norm=nan"),
        (Grad, {"weight_decay": -1.0}, r"weight_decay=-1\.0: allowed is a finite number, 0 or more"),
        (SABR, {"regulariser": float("inf")}, "regulariser=inf"),
        (PGPE, {"weight_decay": float("nan"), "popsize": 2, "stdev_init": 0.1}, "weight_decay=nan"),
        (PGPE, {"weight_decay": 0.1, "popsize": 2, "stdev_init": 0.1, "distributed": True}, r"weight_decay=0\.1"),
        (Grad, {"l1": -0.1}, r"l1=-0\.1: allowed is a finite number, 0 or more"),
        (RGS, {"popsize": 5, "stdev_init": 0.1}, "popsize=5: allowed is .* an even number"),
        (RGS, {"popsize": 0, "stdev_init": 0.1, "symmetric": False}, "popsize=0"),
        (RGS, {"popsize": 4, "stdev_init": 0.0}, r"stdev_init=0\.0: allowed is a finite number over 0"),
        (RGS, {"popsize": 4, "stdev_init": float("inf")}, "stdev_init=inf"),
    ],
)
def test_refuses(kind, settings, message):
    with pytest.raises(InputError, match=message):
        kind(Toy(quadratic, 2), center_learning_rate=0.1, **settings)
