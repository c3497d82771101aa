"""The exact stage against the truth, which other code finds by trying every pattern of signs."""

import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import KINDS, critical, drawn, run, worst
from torch import nn

from evocert.attacks import pgd
from evocert.bounds import box_around, deeppoly, read_network
from evocert.certify import branch, exact, milp
from evocert.certify.branch import Search
from evocert.certify.milp import Milp
from evocert.certify.verdict import Deadline, Outcome
from evocert.networks import flat_parameters

SECONDS = 60.0  # far more than any of these takes

# Around the radius from which on a network breaks; the inner ones are near ties.
FACTORS = (0.3, 0.7, 0.9, 0.99, 1.01, 1.1, 1.3, 2.0)


@cache
def network(kind, seed):
    small = drawn(kind, seed)
    return small, critical(small)


def decided(small, eps, seconds=SECONDS):
    """The outcome, checked: a point lies in the box, and breaks the network."""
    box = small.box(eps)
    outcome = exact.decide(small.members, box, small.label, Deadline(seconds), small.breaks)
    if outcome.verdict == "attacked":
        assert bool(((outcome.point >= box.lower[0]) & (outcome.point <= box.upper[0])).all())
        assert small.breaks(outcome.point)
    else:
        assert outcome.point is None
    return outcome.verdict


def default(monkeypatch):
    pass


def branch_and_bound(monkeypatch):
    """Down to domains in which every sign is assumed."""
    monkeypatch.setattr(exact, "PROGRAM_FIRST", -1)
    monkeypatch.setattr(exact, "SEARCH_FIRST", SECONDS)
    monkeypatch.setattr(branch, "LEAF", 0)


def program(monkeypatch):
    monkeypatch.setattr(exact, "PROGRAM_FIRST", 10**6)
    monkeypatch.setattr(exact, "_searched", lambda search, deadline: Outcome("undecided"))


PORTFOLIOS = [default, branch_and_bound, program]


def compare(kinds, seeds):
    """Verdicts of some networks at every factor, against the truth; how many there were of each sort."""
    count = {"certified": 0, "attacked": 0, "near": 0}
    for kind in kinds:
        for seed in seeds:
            small, limit = network(kind, seed)
            for factor in FACTORS if limit is not None else (1.0,):
                eps = factor * (limit or 1.0)
                truth = "certified" if limit is None or factor < 1 else "attacked"
                assert decided(small, eps) == truth, f"{kind} {seed}, eps {eps}"
                count[truth] += 1
                count["near"] += limit is not None and abs(factor - 1) < 0.05
    return count


@pytest.mark.parametrize("portfolio", PORTFOLIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_some_verdicts_are_true(monkeypatch, portfolio, kind):
    portfolio(monkeypatch)
    count = compare([kind], (1, 8))
    assert min(count.values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("portfolio", PORTFOLIOS)
def test_verdicts_are_true(monkeypatch, portfolio):
    portfolio(monkeypatch)
    count = compare(KINDS, range(13))
    assert count["certified"] + count["attacked"] >= 300
    assert count["certified"] >= 120
    assert count["attacked"] >= 120
    assert count["near"] >= 60


def points_of(small, box, count=400):
    """Points of the box, corners among them."""
    points = torch.rand(count, *small.image.shape[1:], dtype=torch.float64)
    points[: count // 2] = points[: count // 2].round()
    return box.lower + points * (box.upper - box.lower)


def searching(small, eps, rival):
    box = small.box(eps)
    root = deeppoly.relaxing(small.members, box, intersect=True)
    intervals = {node: relaxed.interval for node, relaxed in root.relaxations.items()}
    return Search(small.members, box, small.label, rival, root, lambda: Milp(small.members, box, intervals))


def signs_of(search, small, points):
    """Of the open neurons ``[N, U]``, and the margins ``[N]``, by other code."""
    outputs, before = run(small.module, points)
    signs = [each[:, layer.places].sign() for each, layer in zip(before, search.layers, strict=True)]
    return torch.cat(signs, 1).to(torch.int8), outputs[:, small.label] - outputs[:, search.rival]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**20))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_multipliers_give_a_sound_bound(kind, seed):
    with torch.random.fork_rng(devices=[]):
        small = drawn(kind, seed)
        torch.manual_seed(seed)
        rival = (small.label + 1) % small.members.network.num_classes
        search = searching(small, 10 ** float(torch.empty(()).uniform_(-1.5, 0)), rival)
        points = points_of(small, search.box)
        signs, margins = signs_of(search, small, points)
        # Domains around some of the points, so that none is empty.
        domains = signs[:20] * (torch.rand(20, search.open) < torch.rand(20, 1)).to(torch.int8)
        alpha = torch.rand(20, search.open, dtype=torch.float64)
        beta = torch.rand(20, search.open, dtype=torch.float64) * (10 ** torch.empty(20, 1).uniform_(-2, 1)).double()
        bounds = search._all(domains, alpha.round() if seed % 4 == 0 else alpha, beta)[1]
    inside = ((domains.unsqueeze(1) == 0) | (domains.unsqueeze(1) == signs)).all(2)  # [20, N]
    assert bool(inside.any(1).all())
    least = torch.where(inside, margins, torch.inf).amin(1)
    assert bool((bounds <= least + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_and_the_search_number_neurons_alike(kind):
    """A domain's signs are handed from one to the other."""
    for seed in range(6):
        small = drawn(kind, seed)
        search = searching(small, 0.3, (small.label + 1) % small.members.network.num_classes)
        layers = [(low, high) for layer in search.layers for low, high in _ends(layer)]
        assert layers == [(low, high) for _, low, high, _ in search.program().open]


def _ends(layer):
    lower, upper = (end.flatten()[layer.places].tolist() for end in layer.relaxed.interval)
    return zip(lower, upper, strict=True)


def wide(seed=0):
    """A network with so many open neurons that nothing decides it soon."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5)
        ).double()
        image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    network = read_network(module, (1, 8, 8))
    return module, network.bind(flat_parameters(module).unsqueeze(0)), image, int(module(image).argmax())


@pytest.mark.parametrize("first", [24, 10**6])
def test_deadlines_are_kept(monkeypatch, first):
    """By both, whichever is asked first."""
    module, members, image, label = wide()
    monkeypatch.setattr(exact, "PROGRAM_FIRST", first)
    # As large a radius as no attack breaks.
    eps = next(e for e in (0.2, 0.15, 0.1, 0.07, 0.05, 0.03) if not pgd(module, image, torch.tensor([label]), e).broken)
    began = time.monotonic()
    outcome = exact.decide(members, box_around(image, eps), label, Deadline(0.5), lambda point: False)
    assert time.monotonic() - began < 3
    assert outcome == Outcome("undecided")


def test_what_is_no_relu_is_not_taken():
    for activation, taken in (
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.1), True),
        (nn.Sigmoid(), False),
        (nn.Hardtanh(), False),
    ):
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), activation, nn.Linear(3, 2))
        members = read_network(module, (1, 2, 2)).bind(flat_parameters(module.double()).unsqueeze(0))
        assert Milp.takes(members) is taken
        assert exact.takes(members) is taken


def test_a_network_too_large_for_the_program_is_left_to_branch_and_bound(monkeypatch):
    monkeypatch.setattr(milp, "LARGEST", 1)
    monkeypatch.setattr(Milp, "solve", None)  # would be an error
    count = {"certified": 0, "attacked": 0, "undecided": 0}
    for kind in KINDS:
        for seed in (1, 8):
            small, limit = network(kind, seed)
            for factor in (0.7, 1.3):
                verdict = decided(small, factor * limit, 5.0)
                assert verdict in ("undecided", "certified" if factor < 1 else "attacked")
                count[verdict] += 1
    assert count["certified"] >= 6
    assert count["attacked"] >= 6
    assert count["undecided"] <= 2


@pytest.mark.parametrize("lost", ["program", "time"])
def test_what_a_program_leaves_undecided_is_not_forgotten(monkeypatch, lost):
    """A broken network whose counterexamples nobody sees must end undecided however often the search is asked again."""
    monkeypatch.setattr(exact, "PROGRAM_FIRST", -1)
    monkeypatch.setattr(exact, "SEARCH_FIRST", 0.3)
    monkeypatch.setattr(Search, "_broken", lambda search, at_input: None)
    if lost == "program":
        monkeypatch.setattr(milp, "LARGEST", 1)
    else:
        monkeypatch.setattr(Milp, "solve", lambda *arguments: Outcome("undecided"))
    for kind in KINDS:
        small, limit = network(kind, 8)
        assert decided(small, 1.1 * limit, 0.6) == "undecided"


def test_a_candidate_of_the_program_that_breaks_nothing_is_not_the_end(monkeypatch):
    """HiGHS has tolerances: what is within them is left to the search."""
    small, limit = network("dense", 1)
    image = small.image[0]
    monkeypatch.setattr(exact, "PROGRAM_FIRST", 10**6)
    solve, asked = Milp.solve, []

    def mistaken(program, label, rival, deadline, signs=None):
        asked.append(signs)
        return Outcome("attacked", image) if signs is None else solve(program, label, rival, deadline, signs)

    monkeypatch.setattr(Milp, "solve", mistaken)
    assert decided(small, 0.9 * limit) == "certified"
    assert None in asked


def test_a_point_that_does_not_replay_leaves_the_margin_undecided():
    small, limit = network("dense", 1)
    found = []
    outcome = exact.decide(
        small.members, small.box(1.2 * limit), small.label, Deadline(SECONDS), lambda point: bool(found.append(point))
    )
    assert found
    assert outcome == Outcome("undecided")


def test_the_enumeration_agrees_with_an_attack_and_with_points():
    """What everything here is compared with."""
    for kind in KINDS:
        for seed in range(4):
            small = drawn(kind, seed)
            for eps in (0.02, 0.2):
                least = worst(small, eps)
                points = points_of(small, small.box(eps))
                outputs = small.module(points).detach()
                others = outputs[:, torch.arange(outputs.shape[1]) != small.label].amax(1)
                found = (outputs[:, small.label] - others).amin()
                assert least <= found + 1e-6  # a linear program has tolerances
                attack = pgd(small.module, small.image, torch.tensor([small.label]), eps, dtype=torch.float64)
                assert least <= 0 or not bool(attack.broken)
                assert small.members.logits(points)[0].allclose(outputs)
