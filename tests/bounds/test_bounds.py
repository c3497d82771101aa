"""Every bound: sound by sampling and by descent, exact where it must be, lifted to populations, tiles, chunks and windows."""

import math
from contextlib import contextmanager

import pytest
import reference
import torch
from drawing import EXAMPLES, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evocert.bounds import BOUNDS, Box, Tile, backward, box_around, layers, logit_margins, read_network
from evocert.bounds.windows import Window
from evocert.networks import flat_parameters, with_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed

DTYPES = [torch.float32, torch.float64]
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}
# Where bounds are worked out in another order: the same but for rounding, if no tie is near.
SAME = {torch.float32: 1e-5, torch.float64: 1e-11}
# An ascent on slopes goes by the sign of a gradient: at a kink rounding decides it, and another way leads a little elsewhere.
SAME_ASCENT = 2e-3


@contextmanager
def convolutions(matrices):
    """Convolutions are matrices where they are small, or never."""
    with pytest.MonkeyPatch.context() as patch:
        if not matrices:
            patch.setattr(layers, "DENSE_SIZE", 0)
        yield


def found_by_attack(case, box, steps=5):
    """The least margins ``[P, B, M]`` at the boxes' centres, corners, random points, and on descents of each margin."""
    width = box.upper - box.lower
    generator = torch.Generator().manual_seed(0)
    random = [torch.rand(width.shape, generator=generator, dtype=torch.float64).to(width.dtype) for _ in range(4)]
    points = [box.lower + width / 2, *(box.lower + width * r for r in random[:2])]
    points += [torch.where(r < 0.5, box.lower, box.upper) for r in random[2:]]
    with torch.no_grad():
        found = torch.stack([logit_margins(case.network.logits(case.parameters, p), case.labels) for p in points]).amin(
            0
        )
    rivals = found.shape[2]
    lower, upper, labels = (t.repeat_interleave(rivals, 0) for t in (*box, case.labels))  # a descent for each
    for member, best in zip(case.parameters.detach(), found, strict=True):
        point = (lower + upper) / 2
        for step in range(steps):
            point.requires_grad_()
            every = logit_margins(case.network.logits(member.unsqueeze(0), point), labels)[0]
            own = every.reshape(-1, rivals, rivals).diagonal(dim1=1, dim2=2)
            (slope,) = torch.autograd.grad(own.sum(), point)
            best.copy_(torch.minimum(best, every.detach().reshape(-1, rivals, rivals).amin(1)))
            stride = (upper - lower) * 2.0 ** (1 - step)  # first to the corner that the slope points to
            point = torch.minimum(torch.maximum(point.detach() - stride * slope.sign(), lower), upper)
    return found


def check_soundness(case, dtype, matrices):
    case = case.to(dtype)
    box = case.box
    found = found_by_attack(case, box)
    for name, bound in BOUNDS.items():
        with torch.no_grad(), convolutions(matrices):
            lower = bound(case.network, case.parameters, box, case.labels)
        assert lower.shape == found.shape
        assert lower.dtype == dtype
        rounding = ROUNDING[dtype] * (1 + lower.abs().amax().item())
        assert (found >= lower - rounding).all(), f"{name} is above a margin by {(lower - found).max().item():.3g}"


class TestSoundness:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=10, **EXAMPLES)
    @given(case=cases(), matrices=st.booleans())
    def test_no_point_of_a_box_has_a_margin_below_its_bound(self, dtype, case, matrices):
        check_soundness(case, dtype, matrices)

    @pytest.mark.slow
    @pytest.mark.deep
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=600, **EXAMPLES)
    @given(case=cases(), matrices=st.booleans())
    def test_no_point_of_a_box_has_a_margin_below_its_bound_in_2400_networks_and_images(self, dtype, case, matrices):
        check_soundness(case, dtype, matrices)

    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=6, **EXAMPLES)
    @given(case=cases())
    def test_a_box_without_width_has_the_margins_of_its_image(self, dtype, case):
        case = case.to(dtype)
        expected = logit_margins(case.network.logits(case.parameters, case.images), case.labels)
        for name, bound in BOUNDS.items():
            found = bound(case.network, case.parameters, box_around(case.images, 0.0), case.labels)
            torch.testing.assert_close(
                found,
                expected,
                rtol=ROUNDING[dtype],
                atol=ROUNDING[dtype],
                msg=lambda text, name=name: f"{name}: {text}",
            )

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("bias", [20.0, -20.0])
    def test_relus_that_are_all_on_or_all_dead_lose_nothing_in_back_substitution(self, bound, bias):
        """Such a network is affine on the box: its least margins are known."""
        torch.manual_seed(0)
        chain = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
        module = nn.Sequential(*chain, nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            for layer in module[:-1]:
                if hasattr(layer, "bias"):
                    layer.bias.fill_(bias)
                    layer.weight.mul_(0.5)
        network = read_network(module, (1, 8, 8))
        images, labels = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
        box = box_around(images, 0.2)
        centre = ((box.lower + box.upper) / 2).requires_grad_()
        margins = logit_margins(module(centre).unsqueeze(0), labels)
        slopes = torch.stack([torch.autograd.grad(m.sum(), centre, retain_graph=True)[0] for m in margins.unbind(2)], 1)
        least = margins - (slopes.abs() * ((box.upper - box.lower) / 2).unsqueeze(1)).sum((2, 3, 4))
        found = BOUNDS[bound](network, flat_parameters(module).unsqueeze(0), box, labels)
        if bound == "ibp":
            assert (found <= least + 1e-10).all()
            assert (bias > 0) == bool((found < least - 0.01).all())
        else:
            torch.testing.assert_close(found, least, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def check_agreement(case, matrices):
    box = case.box
    for name in reference.SETTINGS:
        with convolutions(matrices):
            found = BOUNDS[name](case.network, case.parameters, box, case.labels)
        for member, rows in zip(case.parameters, found, strict=True):
            with_parameters(case.module, member)
            for low, high, label, row in zip(*box, case.labels.tolist(), rows, strict=True):
                expected, closest = reference.margins(name, case.module, low, high, label)
                difference = ((row - expected).abs().max() / (1 + expected.abs().max())).item()
                assert difference <= 1e-10 or closest < 1e-9, (
                    f"{name} differs by {difference:.3g}, tie at {closest:.3g}"
                )


class TestReference:
    @settings(max_examples=20, **EXAMPLES)
    @given(case=cases(), matrices=st.booleans())
    def test_bounds_agree_with_those_of_dense_matrices(self, case, matrices):
        check_agreement(case, matrices)

    @pytest.mark.slow
    @pytest.mark.deep
    @settings(max_examples=1000, **EXAMPLES)
    @given(case=cases(), matrices=st.booleans())
    def test_bounds_agree_with_those_of_dense_matrices_in_4000_networks_and_images(self, case, matrices):
        check_agreement(case, matrices)

    @settings(max_examples=10, **EXAMPLES)
    @given(case=cases(members=1, images=1))
    def test_back_substituting_undecided_rows_alone_is_the_same_where_the_reference_says_so(self, case):
        (low,), (high,) = box = case.box
        label = case.labels.item()
        with_parameters(case.module, case.parameters[0])
        pure, sparse = (
            reference.margins(name, case.module, low, high, label) for name in ("deeppoly", "deeppoly-sparse")
        )
        if min(pure[1], sparse[1]) < 1e-9 or not torch.allclose(pure[0], sparse[0], rtol=1e-11, atol=1e-11):
            return
        found = [BOUNDS[n](case.network, case.parameters, box, case.labels) for n in ("deeppoly", "deeppoly-sparse")]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)

    @settings(max_examples=10, **EXAMPLES)
    @given(case=cases())
    def test_lemmas(self, case):
        box = case.box
        lower = {
            name: bound(case.network, case.parameters, box, case.labels).detach() for name, bound in BOUNDS.items()
        }
        assert (lower["deeppoly-intersect"] >= lower["ibp"] - 1e-10).all()
        assert (lower["hbox"] >= lower["ibp"] - 1e-10).all()
        assert torch.equal(lower["deepz"], lower["crown-same-slope"])
        if "alpha-crown" in lower:
            assert (lower["alpha-crown"] >= lower["deeppoly"] - 1e-10).all()


def assert_same(name, case, box, one, other):
    """Equal but for rounding, unless a tie is so near that rounding decides it."""
    dtype = one.dtype
    same = SAME_ASCENT if name == "alpha-crown" else SAME[dtype]
    apart = (one - other).abs().amax(2) > same * (1 + one.abs().amax(2))
    for member, image in apart.nonzero().tolist():
        assert name in reference.NAMES, f"{name} differs by {(one - other).abs().max().item():.3g}"
        there = slice(image, image + 1)
        closest = reference.nearest_tie(
            name, case.module, case.parameters[member : member + 1], (box[0][there], box[1][there]), case.labels[there]
        )
        assert closest < 10 * SAME[dtype], (
            f"{name} differs by {(one - other).abs().max().item():.3g}, tie at {closest:.3g}"
        )


class TestPopulations:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=6, **EXAMPLES)
    @given(case=cases(members=2, images=3), members=st.integers(1, 3), images=st.integers(1, 4))
    @torch.no_grad()
    def test_of_a_population_is_a_loop_and_tiles_change_nothing(self, dtype, case, members, images):
        case = case.to(dtype)
        box = case.box
        for name, bound in BOUNDS.items():
            whole = bound(case.network, case.parameters, box, case.labels)
            loop = torch.cat([bound(case.network, row.unsqueeze(0), box, case.labels) for row in case.parameters])
            assert_same(name, case, box, whole, loop)
            tiled = bound(case.network, case.parameters, box, case.labels, tile=Tile(members, images))
            assert_same(name, case, box, whole, tiled)

    @settings(max_examples=10, **EXAMPLES)
    @given(case=cases(images=3), dense=st.booleans(), whole=st.booleans())
    @torch.no_grad()
    def test_windows_and_dense_matrices_give_the_same(self, case, dense, whole):
        """Convolutions as matrices or not; coefficients in windows for as long as can be, or never."""
        box = case.box
        expected = {name: bound(case.network, case.parameters, box, case.labels) for name, bound in BOUNDS.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "DENSE_SIZE", 10**9 if dense else 0)
            patch.setattr(layers, "DENSE_WASTE", 10**9)
            patch.setattr(Window, "covers", lambda window, size: whole)
            for name, bound in BOUNDS.items():
                found = bound(case.network, case.parameters, box, case.labels)
                assert_same(name, case, box, expected[name], found)

    @settings(max_examples=8, **EXAMPLES)
    @given(case=cases(), chunk=st.sampled_from([1, 300, 3000]), matrices=st.booleans())
    @torch.no_grad()
    def test_chunks_change_nothing(self, case, chunk, matrices):
        box = case.box
        with convolutions(matrices), pytest.MonkeyPatch.context() as patch:
            expected = {name: bound(case.network, case.parameters, box, case.labels) for name, bound in BOUNDS.items()}
            patch.setattr(backward, "CPU_CHUNK", chunk)
            for name, bound in BOUNDS.items():
                assert_same(name, case, box, expected[name], bound(case.network, case.parameters, box, case.labels))

    @settings(max_examples=10, **EXAMPLES)
    @given(case=cases())
    @torch.no_grad()
    def test_both_ways_to_convolve_agree(self, case):
        expected = torch.stack([with_parameters(case.module, p)(case.images) for p in case.parameters])
        for size in (0, 10**9):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layers, "DENSE_SIZE", size)
                logits = case.network.logits(case.parameters, case.images)
                torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
                shared = case.network.logits(case.parameters[:1].expand(3, -1), case.images)
                torch.testing.assert_close(shared, expected[:1].expand_as(shared), rtol=1e-10, atol=1e-10)


def test_images_lines_and_neurons_are_all_cut(monkeypatch):
    """In the smallest chunks every image, every line of positions and every neuron is on its own."""
    torch.manual_seed(0)
    chain = [
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 144, 4),
        nn.ReLU(),
    ]
    module = nn.Sequential(*chain, nn.Linear(4, 3)).double()
    network = read_network(module, (1, 16, 16))
    box, labels = box_around(torch.rand(3, 1, 16, 16, dtype=torch.float64), 0.1), torch.tensor([0, 1, 2])
    parameters, cuts = flat_parameters(module).unsqueeze(0), []
    own = backward.Substitution._parts

    def parts(*arguments):
        cuts.append(own(*arguments))
        return cuts[-1]

    monkeypatch.setattr(backward.Substitution, "_parts", parts)
    expected = BOUNDS["deeppoly"](network, parameters, box, labels)
    assert [[len(part) for part in cut] for cut in cuts] == [[1, 1, 1], [1, 1, 1]]
    cuts.clear()
    monkeypatch.setattr(backward, "CPU_CHUNK", 1)
    torch.testing.assert_close(BOUNDS["deeppoly"](network, parameters, box, labels), expected, rtol=1e-12, atol=1e-12)
    assert [[len(part) for part in cut] for cut in cuts] == [[3, 12, 3], [3, 1, 4]]


@pytest.mark.parametrize("bound", ["crown-ibp", "deeppoly", "deeppoly-intersect", "crown-zero"])
def test_maximum_pooling_behind_a_relu_does_not_leave_its_choice_to_rounding(bound):
    """Many lower ends are zero there but for rounding, and so are many upper ends: equal to those of dead neighbours."""
    torch.manual_seed(0)
    chain = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(*chain, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 25, 5))
    network = read_network(module, (1, 20, 20))
    parameters = flat_parameters(module) + 0.05 * torch.randn(4, network.num_parameters)
    box, labels = box_around(torch.rand(8, 1, 20, 20), 0.05), torch.arange(8) % 5
    with torch.no_grad():
        whole = BOUNDS[bound](network, parameters, box, labels)
        loop = torch.cat([BOUNDS[bound](network, row.unsqueeze(0), box, labels) for row in parameters])
        exact = BOUNDS[bound](network, parameters.double(), Box(box.lower.double(), box.upper.double()), labels)
    torch.testing.assert_close(whole, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, exact.float(), rtol=1e-5, atol=1e-5)


class TestBadInput:
    network = read_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2))

    def given(self, **changes):
        good = {
            "parameters": torch.zeros(2, 15),
            "lower": torch.zeros(3, 1, 2, 2),
            "upper": torch.ones(3, 1, 2, 2),
            "labels": torch.tensor([0, 1, 2]),
        } | changes
        return self.network, good["parameters"], Box(good["lower"], good["upper"]), good["labels"]

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lower": torch.full((3, 1, 2, 2), 1.5)}, "lower > .*upper"),
            ({"upper": torch.full((3, 1, 2, 2), torch.nan)}, "NaN"),
            ({"lower": torch.full((3, 1, 2, 2), torch.nan)}, "NaN"),
            ({"parameters": torch.zeros(2, 14)}, r"parameters of shape \[2, 14\]: allowed is \[P, 15\]"),
            ({"parameters": torch.zeros(15)}, r"parameters of shape \[15\]"),
            ({"lower": torch.zeros(3, 1, 2, 3)}, r"box.lower of shape \[3, 1, 2, 3\]: allowed is \[B, 1, 2, 2\]"),
            ({"upper": torch.ones(3, 4)}, r"box.upper of shape \[3, 4\]"),
            ({"upper": torch.ones(1, 1, 2, 2)}, "one label for each box"),
            ({"labels": torch.tensor([0, 1])}, "one label for each box"),
            ({"labels": torch.tensor([0, 1, 3])}, "labels .*0 to 2"),
            ({"labels": torch.tensor([0, 1, -1])}, "labels .*0 to 2"),
            ({"labels": torch.tensor([0.0, 1, 2])}, "labels .*whole numbers"),
        ],
    )
    def test_is_refused_in_one_line_that_names_it(self, bound, changes, message):
        with pytest.raises(ValueError, match=message) as refused:
            BOUNDS[bound](*self.given(**changes))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("bound", BOUNDS)
    def test_good_input_is_not(self, bound):
        assert BOUNDS[bound](*self.given()).shape == (2, 3, 2)


def test_box_around_is_the_whole_box():
    images = torch.tensor([0.0, 0.05, 0.5, 1.0]).reshape(1, 1, 2, 2)
    lower, upper = box_around(images, 0.1)
    assert isinstance(box_around(images, 0.1), Box)
    torch.testing.assert_close(lower.flatten(), torch.tensor([0.0, 0.0, 0.4, 0.9]))
    torch.testing.assert_close(upper.flatten(), torch.tensor([0.1, 0.15, 0.6, 1.0]))
    assert math.isclose(float((upper - lower).max()), 0.2, rel_tol=1e-6)
