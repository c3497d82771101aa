"""Attacks against networks for which the worst case is known by hand or in closed form."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from evocert.attacks import apgd, pgd, worst_margin
from evocert.data import Part
from evocert.errors import InputError
from evocert.modules import Normalize

EPS = 0.1


def linear_network(classes: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Normalize([0.4, 0.5], [0.3, 0.2]), nn.Flatten(), nn.Linear(32, classes)).to(dtype)


def exact_margin(network: nn.Sequential, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """``[B]``, the lowest margin in the clipped box of a network of :func:`linear_network`, corner by corner."""
    classes = network[2].out_features
    weight = network[2].weight.detach().double().reshape(classes, *images.shape[1:]) / network[0].std.double()
    bias = network[2].bias.detach().double() - (weight * network[0].mean.double()).flatten(1).sum(1)
    margins = torch.full((len(images), classes), math.inf, dtype=torch.float64)
    for row, (image, label) in enumerate(zip(images.double(), labels.tolist(), strict=True)):
        lower, upper = (image - eps).clamp(min=0), (image + eps).clamp(max=1)
        for other in set(range(classes)) - {label}:
            difference = weight[label] - weight[other]
            corner = torch.where(difference > 0, lower, upper)
            margins[row, other] = (difference * corner).sum() + bias[label] - bias[other]
    return margins.amin(1)


def assert_in_box(points: Tensor, images: Tensor, eps: float) -> None:
    points, images = points.double(), images.double()
    assert bool((points >= (images - eps).clamp(min=0)).all())
    assert bool((points <= (images + eps).clamp(max=1)).all())


def threshold_network(weight: float, bias: float) -> nn.Sequential:
    """Logits ``(weight * x + bias, 0)`` of one pixel."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[weight], [0.0]]))
        network[1].bias.copy_(torch.tensor([bias, 0.0]))
    return network


class TwoSlopes(nn.Module):
    """One pixel: the margin falls gently from .5 to .6 and stays positive, and is negative only below .42.

    The gradient at .5 leads away from the only counterexamples.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        margin = 1 - torch.relu(x - 0.48) - 60 * torch.relu(0.45 - x)
        return torch.cat([margin, torch.zeros_like(margin)], 1)


def test_worst_margin_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [2.0, 2.0, -1.0]])
    torch.testing.assert_close(worst_margin(logits, torch.tensor([0, 1, 0])), torch.tensor([0.5, -2.0, 0.0]))


def test_worst_margin_differentiates_towards_the_closest_class() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5]], requires_grad=True)
    worst_margin(logits, torch.tensor([0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 0.0, -1.0]]))


def random_images(dtype: torch.dtype) -> Tensor:
    return torch.rand(60, 2, 4, 4, dtype=dtype).mul(1.5).sub(0.25).clamp(0, 1)  # a sixth of the pixels at each end


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_linear_classes_are_broken_exactly_where_the_closed_form_says_so(eps: float, dtype: torch.dtype) -> None:
    breakable = robust = 0
    for seed in range(8):
        network = linear_network(2, seed, dtype)
        images = random_images(dtype)
        labels = network(images).argmax(1)
        exact = exact_margin(network, images, labels, eps)
        attack = pgd(network, images, labels, eps, restarts=1, dtype=dtype)
        assert_in_box(attack.points, images, eps)
        assert attack.points.dtype == dtype
        assert bool(attack.broken[exact < -1e-6].all())
        assert not bool(attack.broken[exact > 0].any())
        breakable, robust = breakable + int((exact < -1e-6).sum()), robust + int((exact > 0).sum())
    assert breakable > 10
    assert robust > 10


@pytest.mark.parametrize(("classes", "eps"), [(3, 0.03), (3, 0.06), (10, 0.01), (10, 0.03)])
def test_many_linear_classes_are_never_broken_where_the_closed_form_forbids_it(classes: int, eps: float) -> None:
    # The least of several linear margins is concave: a descent may end in another corner than the worst.
    found = breakable = robust = 0
    for seed in range(6):
        network = linear_network(classes, seed)
        images = random_images(torch.float32)
        labels = network(images).argmax(1)
        exact = exact_margin(network, images, labels, eps)
        attack = pgd(network, images, labels, eps, restarts=5)
        assert not bool(attack.broken[exact > 0].any())
        found += int(attack.broken[exact < -1e-6].sum())
        breakable, robust = breakable + int((exact < -1e-6).sum()), robust + int((exact > 0).sum())
    assert found >= 0.97 * breakable
    assert breakable > 50
    assert robust > 50


def test_broken_points_are_counterexamples_and_the_others_are_not() -> None:
    network = linear_network(4, 0)
    images = torch.rand(60, 2, 4, 4)
    labels = network(images).argmax(1)
    attack = pgd(network, images, labels, EPS)
    assert 0 < int(attack.broken.sum()) < 60
    margins = worst_margin(network.double()(attack.points.double()), labels)
    torch.testing.assert_close(attack.broken, margins <= 0)


def test_clipping_at_black_and_white_decides() -> None:
    # Margin x - .05 at the pixel .1 with eps .2: broken at 0, and -.15 without the clip.
    # Margin .05 + x at the pixel .1: only the point -.1, which is no image, would break it.
    image, label = torch.full((1, 1, 1, 1), 0.1), torch.tensor([0])
    attack = pgd(threshold_network(1.0, -0.05), image, label, 0.2)
    assert bool(attack.broken)
    assert attack.points.item() == 0
    assert not bool(pgd(threshold_network(1.0, 0.05), image, label, 0.2).broken)
    # The same at the white end: margin 1.05 - x stays positive up to 1.
    assert not bool(pgd(threshold_network(-1.0, 1.05), 1 - image, label, 0.2).broken)
    attack = pgd(threshold_network(-1.0, 0.95), 1 - image, label, 0.2)
    assert bool(attack.broken)
    assert attack.points.item() == 1


@pytest.mark.parametrize("eps", [0.1, 1 / 255, 2 / 255, 8 / 255, 0.3])
def test_float32_points_lie_in_the_float64_box(eps: float) -> None:
    # Rounding x + eps to float32 leaves the box for about half of these pixels.
    images = torch.linspace(0, 1, 257).reshape(1, 1, 1, 257)
    rounded = (images + eps).double()
    assert bool((rounded > images.double() + eps).any())
    network = nn.Sequential(nn.Flatten(), nn.Linear(257, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([-torch.ones(257), torch.zeros(257)]))
        for _ in range(2):
            attack = pgd(network, images, torch.tensor([0]), eps)
            assert_in_box(attack.points, images, eps)
            network[1].weight.neg_()


def test_tie_counts_as_broken() -> None:
    image, label = torch.full((1, 1, 1, 1), 0.75), torch.tensor([0])
    assert bool(pgd(threshold_network(1.0, -0.5), image, label, 0.25).broken)
    assert not bool(pgd(threshold_network(1.0, -0.4999), image, label, 0.25).broken)


def test_float64_replay_overrules_float32() -> None:
    # 1e8 * x - (1e8 * x - 1) is 1, and 0 in float32: a counterexample only of the rounding.
    class Cancelling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1) + 1e8
            return torch.cat([x, x - 1], 1)

    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    assert worst_margin(Cancelling()(image), label).item() == 0
    assert not bool(pgd(Cancelling(), image, label, EPS).broken)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_natural_misclassification_counts(eps: float) -> None:
    network = linear_network(3, 1)
    images = torch.rand(30, 2, 4, 4)
    predictions = network(images).argmax(1)
    labels = torch.where(torch.arange(30) % 2 == 0, predictions, (predictions + 1) % 3)
    attack = pgd(network, images, labels, eps)
    torch.testing.assert_close(attack.broken, labels != predictions)
    if eps == 0:
        torch.testing.assert_close(attack.points, images, rtol=0, atol=0)


def test_restarts_find_what_the_gradient_at_the_image_misses() -> None:
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    assert not bool(pgd(TwoSlopes(), image, label, EPS, restarts=1).broken)
    assert bool(pgd(TwoSlopes(), image, label, EPS, restarts=10).broken)


def test_best_point_of_a_descent_is_kept_not_the_last() -> None:
    class Valley(nn.Module):
        """Margin |x - .42| - .02."""

        def forward(self, x: Tensor) -> Tensor:
            margin = (x.flatten(1) - 0.42).abs() - 0.02
            return torch.cat([margin, torch.zeros_like(margin)], 1)

    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    attack = pgd(Valley(), image, label, EPS, steps=3, restarts=1, step_size=0.045)  # .5, .455, .41, .455
    assert attack.points.item() == pytest.approx(0.41, abs=1e-6)
    assert bool(attack.broken)


def test_more_restarts_never_raise_a_margin() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 4))
    images = torch.rand(50, 1, 4, 4)
    labels = network(images).argmax(1)
    margins = []
    for restarts in (1, 2, 6):
        attack = pgd(network, images, labels, 0.03, steps=4, restarts=restarts)
        margins.append(worst_margin(network(attack.points), labels))
        assert_in_box(attack.points, images, 0.03)
    assert bool((margins[1] <= margins[0] + 1e-6).all())
    assert bool((margins[2] <= margins[1] + 1e-6).all())
    assert bool((margins[2] < margins[0] - 1e-6).any())


def test_broken_examples_are_left_out_of_later_restarts() -> None:
    sizes: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            x = x.flatten(1)
            return torch.cat([x - 0.5, torch.zeros_like(x)], 1)

    images = torch.tensor([0.2, 0.55, 0.9]).reshape(3, 1, 1, 1)  # misclassified, broken by the first restart, robust
    attack = pgd(Counting(), images, torch.zeros(3, dtype=torch.int64), EPS, steps=5, restarts=4)
    assert attack.broken.tolist() == [True, True, False]
    assert sizes == [3, *[2] * 7, *[1] * 21]  # all once; then 5 steps, the end point and the replay for each restart


def test_step_size_is_in_pixels() -> None:
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    attack = pgd(threshold_network(1.0, 1.0), image, label, 0.3, steps=4, restarts=1, step_size=0.03)
    assert attack.points.item() == pytest.approx(0.5 - 4 * 0.03, abs=1e-6)


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 4))
    images = torch.rand(20, 1, 4, 4)
    labels = network.eval()(images).argmax(1)
    state = torch.get_rng_state()
    first = pgd(network, images, labels, 0.02, steps=2, restarts=4, step_size=0.001, seed=3)
    torch.testing.assert_close(torch.get_rng_state(), state)
    torch.rand(7)
    again = pgd(network.train(), images, labels, 0.02, steps=2, restarts=4, step_size=0.001, seed=3)
    other = pgd(network, images, labels, 0.02, steps=2, restarts=4, step_size=0.001, seed=4)
    torch.testing.assert_close(first.points, again.points, rtol=0, atol=0)
    torch.testing.assert_close(first.broken, again.broken)
    assert not torch.equal(first.points, other.points)


def test_module_and_arguments_stay_as_they_were() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(6, 1, 4, 4)
    before, labels = images.clone(), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        attack = pgd(network, images, labels, EPS, steps=3, dtype=torch.float64)
    assert all(layer.training for layer in network.modules())
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    assert not attack.points.requires_grad
    assert attack.points.data_ptr() != images.data_ptr()


def test_nan_logits_are_no_counterexample() -> None:
    class NotANumber(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] * math.nan

    assert not bool(pgd(NotANumber(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), EPS).broken.any())


def test_no_images() -> None:
    attack = pgd(linear_network(3, 0), torch.rand(0, 2, 4, 4), torch.zeros(0, dtype=torch.int64), EPS)
    assert attack.points.shape == (0, 2, 4, 4)
    assert attack.broken.shape == (0,)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": math.inf}, "eps is inf"),
        ({"steps": 0}, "steps is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"images": torch.full((2, 2, 4, 4), 1.01)}, "outside"),
        ({"images": torch.full((2, 2, 4, 4), math.nan)}, "outside"),
        ({"images": torch.zeros(2, 32)}, r"\(2, 32\)"),
        ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, "uint8"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"\(3,\)"),
        ({"labels": torch.zeros(2)}, "float32"),
        ({"labels": torch.tensor([0, 3])}, "0 to 3"),
        ({"labels": torch.tensor([-1, 0])}, "-1 to 0"),
    ],
)
def test_bad_input_is_named(changed: dict, named: str) -> None:
    arguments = {"images": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(2, dtype=torch.int64), "eps": EPS}
    with pytest.raises(InputError, match=named):
        pgd(linear_network(3, 0), **(arguments | changed))


def hidden_network(classes: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, classes))


def hidden_images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)


class TestApgd:
    @pytest.mark.parametrize("eps", [0.03, 0.1])
    def test_two_linear_classes_are_broken_exactly_where_the_closed_form_says_so(self, eps: float) -> None:
        breakable = robust = 0
        for seed in range(8):
            network = linear_network(2, seed)
            images = random_images(torch.float32)
            labels = network(images).argmax(1)
            exact = exact_margin(network, images, labels, eps)
            attack = apgd(network, images, labels, eps, numbers=range(60), restarts=1)
            assert_in_box(attack.points, images, eps)
            assert bool(attack.broken[exact < -1e-6].all())
            assert not bool(attack.broken[exact > 0].any())
            breakable, robust = breakable + int((exact < -1e-6).sum()), robust + int((exact > 0).sum())
        assert breakable > 10
        assert robust > 10

    def test_every_class_is_aimed_at(self) -> None:
        """The least of several linear margins is concave, but over one other class a descent cannot miss."""
        breakable = 0
        for seed in range(4):
            network = linear_network(5, seed)
            images = random_images(torch.float32)
            labels = network(images).argmax(1)
            exact = exact_margin(network, images, labels, 0.03)
            attack = apgd(network, images, labels, 0.03, numbers=range(60), restarts=5)
            torch.testing.assert_close(attack.broken[exact.abs() > 1e-6], (exact < 0)[exact.abs() > 1e-6])
            breakable += int((exact < -1e-6).sum())
        assert breakable > 50

    def test_finds_at_least_what_pgd_finds_on_a_trained_network(self, part: Part, network: nn.Module) -> None:
        images, labels = part.batch(slice(0, 40))
        optimiser = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
        some = 0
        for eps in (0.05, 0.1, 0.15, 0.2):
            weak = pgd(network, images, labels, eps)
            strong = apgd(network, images, labels, eps, numbers=range(40))
            assert int(strong.broken.sum()) >= int(weak.broken.sum())
            some += 0 < int(weak.broken.sum()) < 40
        assert some >= 2

    def test_points_lie_in_the_box_and_are_replayed(self) -> None:
        network, images = hidden_network(), hidden_images(100)
        labels = network(images).argmax(1)
        for eps in (1 / 255, 0.02, 0.1, 0.3):
            attack = apgd(network, images, labels, eps, numbers=range(100), steps=20)
            assert attack.points.dtype == torch.float32
            assert_in_box(attack.points, images, eps)
            margins = worst_margin(network.double()(attack.points.double()), labels)
            torch.testing.assert_close(attack.broken, margins <= 0)
            network.float()
        assert bool(attack.broken.any())

    def test_what_is_returned_is_the_lowest_that_was_found(self) -> None:
        network, images = hidden_network().double(), hidden_images(50).double()
        labels = network(images).argmax(1)
        margins = []
        for restarts in (1, 2, 5):
            attack = apgd(network, images, labels, 0.02, numbers=range(50), steps=8, restarts=restarts)
            margins.append(worst_margin(network(attack.points), labels))
        assert bool((margins[0] <= worst_margin(network(images), labels)).all())
        assert bool((margins[1] <= margins[0]).all())
        assert bool((margins[2] <= margins[1]).all())
        assert bool((margins[2] < margins[0] - 1e-9).any())

    def test_numbers_and_the_seed_decide_the_starts(self) -> None:
        """The same call gives the same bits; another number or seed moves an image's own result, and no other's."""
        network, images = hidden_network().double(), hidden_images(20).double()
        labels = network(images).argmax(1)

        def found(numbers: Sequence[int], seed: int = 0) -> Tensor:
            return apgd(network, images, labels, 0.02, numbers=numbers, steps=2, restarts=6, seed=seed).points

        first = found(range(20))
        assert torch.equal(first, found(list(range(20))))
        assert not torch.equal(first, found(range(20), seed=7))
        moved = (first != found([number + 100 * (number % 2) for number in range(20)])).flatten(1).any(1)
        assert not bool(moved[::2].any())
        assert bool(moved[1::2].any())

    def test_an_image_keeps_its_starts_whatever_its_place(self) -> None:
        network, images = hidden_network().double(), hidden_images(20).double()
        labels, order = network(images).argmax(1), torch.randperm(20, generator=torch.Generator().manual_seed(0))
        first = apgd(network, images, labels, 0.02, numbers=range(20), steps=3, restarts=4)
        other = apgd(network, images[order], labels[order], 0.02, numbers=order.tolist(), steps=3, restarts=4)
        torch.testing.assert_close(other.points, first.points[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(other.broken, first.broken[order])

    def test_the_global_generator_is_neither_read_nor_moved(self) -> None:
        network, images = hidden_network(), hidden_images(10)
        labels = network(images).argmax(1)
        state = torch.get_rng_state()
        first = apgd(network, images, labels, 0.02, numbers=range(10), steps=2)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        assert torch.equal(first.points, apgd(network, images, labels, 0.02, numbers=range(10), steps=2).points)

    def test_module_and_arguments_stay_as_they_were(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).train()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        images = hidden_images(6)
        before = images.clone()
        with torch.no_grad():
            attack = apgd(network, images, torch.zeros(6, dtype=torch.int64), EPS, numbers=range(6), steps=3)
        assert all(layer.training for layer in network.modules())
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert torch.equal(images, before)
        assert attack.points.data_ptr() != images.data_ptr()

    @pytest.mark.parametrize("eps", [0.0, 1e-6])
    def test_natural_misclassification_counts(self, eps: float) -> None:
        network, images = linear_network(3, 1), torch.rand(30, 2, 4, 4)
        predictions = network(images).argmax(1)
        labels = torch.where(torch.arange(30) % 2 == 0, predictions, (predictions + 1) % 3)
        attack = apgd(network, images, labels, eps, numbers=range(30), steps=5)
        torch.testing.assert_close(attack.broken, labels != predictions)
        if eps == 0:
            assert torch.equal(attack.points, images)

    def test_a_tie_counts_as_broken(self) -> None:
        image, label = torch.full((1, 1, 1, 1), 0.75), torch.tensor([0])
        assert bool(apgd(threshold_network(1.0, -0.5), image, label, 0.25, numbers=[0]).broken)
        assert not bool(apgd(threshold_network(1.0, -0.4999), image, label, 0.25, numbers=[0]).broken)

    def test_steps_get_shorter(self) -> None:
        """At the full length of 2 eps no step ends in the valley: the first ones jump over it."""

        class Valley(nn.Module):
            """Margin |x - .437| - .0005: broken on a thousandth of a pixel."""

            def forward(self, x: Tensor) -> Tensor:
                margin = (x.flatten(1) - 0.437).abs() - 0.0005
                return torch.cat([margin, torch.zeros_like(margin)], 1)

        image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
        assert bool(apgd(Valley(), image, label, EPS, numbers=[0], restarts=1).broken)
        assert not bool(apgd(Valley(), image, label, EPS, numbers=[0], restarts=1, steps=5).broken)

    def test_restarts_find_what_the_gradient_at_the_image_misses(self) -> None:
        image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
        assert bool(apgd(TwoSlopes(), image, label, EPS, numbers=[0], restarts=10).broken)

    def test_nan_logits_are_no_counterexample(self) -> None:
        class NotANumber(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(1)[:, :2] * math.nan

        attack = apgd(NotANumber(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), EPS, numbers=[0, 1], steps=5)
        assert not bool(attack.broken.any())
        assert bool(attack.points.isfinite().all())

    def test_no_images(self) -> None:
        attack = apgd(linear_network(3, 0), torch.rand(0, 2, 4, 4), torch.zeros(0, dtype=torch.int64), EPS, numbers=[])
        assert attack.points.shape == (0, 2, 4, 4)
        assert attack.broken.shape == (0,)

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"eps": -0.1}, "eps is -0.1"),
            ({"eps": math.nan}, "eps is nan"),
            ({"steps": 0}, "steps is 0"),
            ({"restarts": 0}, "restarts is 0"),
            ({"images": torch.full((2, 2, 4, 4), 1.01)}, "outside"),
            ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, "uint8"),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, r"\(3,\)"),
            ({"labels": torch.tensor([0, 3])}, "0 to 3"),
            ({"numbers": [0]}, "numbers are 1"),
            ({"numbers": [0, 1, 2]}, "numbers are 3"),
        ],
    )
    def test_bad_input_is_named(self, changed: dict, named: str) -> None:
        arguments = {"images": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(2, dtype=torch.int64), "eps": EPS}
        with pytest.raises(InputError, match=named):
            apgd(linear_network(3, 0), **({"numbers": [0, 1], **arguments} | changed))
