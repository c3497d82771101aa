"""Every bound: by hand, sound by sampling and by descent, equal to an independent one, lifted to populations and tiles."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ibp_margins
from torch import nn

from evocert.bounds import BOUNDS, Box, Tile, box_around, choose_tile, layers, logit_margins, over_tiles, read_network
from evocert.bounds.tiles import LANES, worker_count
from evocert.modules import Normalize
from evocert.networks import cnn3, flat_parameters, with_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@st.composite
def networks(draw):
    """A chain of every supported kind of layer, with its input shape and a seed for weights and images."""
    integers = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    channels, height, width = integers(1, 3), integers(3, 8), integers(3, 8)
    shape, classes, seed = (channels, height, width), integers(2, 6), integers(0, 10**6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chain: list[nn.Module] = [Normalize(torch.rand(channels).tolist(), (0.2 + torch.rand(channels)).tolist())]
        for _ in range(integers(0, 2)):
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            outputs = groups * integers(1, 3)
            kernel = (integers(1, min(4, height)), integers(1, min(4, width)))
            if draw(st.booleans()):
                convolution = nn.Conv2d(
                    channels, outputs, kernel, padding="same", groups=groups, bias=draw(st.booleans())
                )
            else:
                stride, padding = (integers(1, 2), integers(1, 3)), (integers(0, 2), integers(0, 1))
                dilation = draw(st.sampled_from([(1, 1), (2, 1)])) if 2 * kernel[0] - 1 <= height else (1, 1)
                convolution = nn.Conv2d(
                    channels, outputs, kernel, stride, padding, dilation, groups=groups, bias=draw(st.booleans())
                )
            chain += [convolution, draw(activations())]
            channels, height, width = nn.Sequential(*chain)(torch.zeros(1, *shape)).shape[1:]
        chain.append(nn.Flatten())
        size = channels * height * width
        for _ in range(integers(0, 2)):
            chain += [nn.Linear(size, (hidden := integers(1, 8)), bias=draw(st.booleans())), draw(activations())]
            size = hidden
        chain.append(nn.Linear(size, classes))
        if draw(st.booleans()):
            chain.append(draw(activations()))  # nothing to fold the margins into
    return nn.Sequential(*chain), shape, classes, seed


def activations():
    return st.sampled_from(
        [
            nn.ReLU(),
            nn.LeakyReLU(0.2),
            nn.Hardtanh(-0.5, 0.7),
            nn.ReLU6(),
            nn.Sigmoid(),
            nn.Tanh(),
            nn.Dropout(),
            nn.Identity(),
        ]
    )


def drawn(case, members=3, images=4, dtype=torch.float64):
    """Module, read network, parameters [P, D], images, labels."""
    module, shape, classes, seed = case
    generator = torch.Generator().manual_seed(seed)
    network = read_network(module, shape)
    spread = torch.randn(members, network.num_parameters, generator=generator, dtype=torch.float64)
    parameters = (flat_parameters(module).double() + 0.1 * spread).to(dtype)
    pixels = torch.rand(images, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return module.eval(), network, parameters, pixels, torch.randint(0, classes, (images,), generator=generator)


@pytest.mark.parametrize("bound", BOUNDS)
class TestEveryBound:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(case=networks(), eps=st.floats(0, 0.6))
    def test_is_sound(self, bound, dtype, case, eps):
        """At random points, corners, and points that descend the margin: never below the bound, but for rounding."""
        _, network, parameters, images, labels = drawn(case, dtype=dtype)
        box = box_around(images, eps)
        lower = BOUNDS[bound](network, parameters, box, labels)
        assert lower.shape == (3, 4, network.num_classes - 1)
        generator = torch.Generator().manual_seed(case[3])
        scale = 1 + lower.abs().max().item()
        corner = torch.where(torch.rand(images.shape, generator=generator) < 0.5, box.lower, box.upper)
        points = [corner, box.lower + (box.upper - box.lower) * torch.rand(images.shape, generator=generator).to(dtype)]
        point = images.clone()
        for _ in range(5):
            point.requires_grad_()
            logit_margins(network.logits(parameters, point), labels).sum().backward()
            with torch.no_grad():
                point = torch.where(point.grad > 0, box.lower, box.upper)  # the corner that the slope points to
            points.append(point)
        for point in points:
            margins = logit_margins(network.logits(parameters, point), labels)
            assert (margins >= lower - TOLERANCE[dtype] * scale).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(case=networks())
    def test_at_eps_zero_gives_the_margins(self, bound, dtype, case):
        _, network, parameters, images, labels = drawn(case, dtype=dtype)
        found = BOUNDS[bound](network, parameters, box_around(images, 0.0), labels)
        expected = logit_margins(network.logits(parameters, images), labels)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(case=networks(), members=st.integers(1, 5), images=st.integers(1, 7))
    def test_of_a_population_is_a_loop_and_tiles_change_nothing(self, bound, case, members, images):
        _, network, parameters, pixels, labels = drawn(case, 5, 7)
        box = box_around(pixels, 0.1)
        whole = BOUNDS[bound](network, parameters, box, labels)
        loop = torch.cat([BOUNDS[bound](network, parameters[i : i + 1], box, labels) for i in range(5)])
        torch.testing.assert_close(whole, loop, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            tiled = BOUNDS[bound](network, parameters, box, labels, tile=Tile(members, images))
        torch.testing.assert_close(whole, tiled, rtol=1e-11, atol=1e-11)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(case=networks())
    def test_is_differentiable(self, bound, case):
        _, network, parameters, images, labels = drawn(case, 1, 2)
        box = box_around(images, 0.05)
        for tile in (None, Tile(1, 1)):
            torch.autograd.gradcheck(
                lambda p: BOUNDS[bound](network, p, box, labels, tile=tile),  # noqa: B023
                parameters.clone().requires_grad_(),
                eps=1e-7,
                atol=1e-4,
            )

    @pytest.mark.parametrize("lowering", ["dense", "grouped"])
    def test_bits_do_not_depend_on_place_population_or_threads(self, bound, lowering, monkeypatch):
        monkeypatch.setattr(layers, "DENSE_SIZE", 0 if lowering == "grouped" else 10**6)
        torch.manual_seed(0)
        chain = [
            nn.Conv2d(1, 3, 3),
            nn.Sigmoid(),
            nn.Conv2d(3, 5, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(125, 7),
            nn.ReLU(),
        ]
        module = nn.Sequential(*chain, nn.Linear(7, 4))
        network = read_network(module, (1, 8, 8))
        parameters = flat_parameters(module) + 0.1 * torch.randn(13, network.num_parameters)
        images, labels = torch.rand(19, 1, 8, 8), torch.randint(0, 4, (19,))
        box = box_around(images, 0.05)

        def run(rows):
            with torch.no_grad():
                return BOUNDS[bound](network, parameters[rows], box, labels, tile=Tile(4, LANES))

        torch.set_num_threads(2)
        whole = run(list(range(13)))
        for rows in ([5], [12, 0, 5], list(range(12, -1, -1)), [3, 4, 5, 6, 7, 8], [1, 5]):
            assert torch.equal(run(rows), whole[rows])
        torch.set_num_threads(1)
        assert torch.equal(run(list(range(13))), whole)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=networks(), eps=st.floats(0, 0.5))
def test_ibp_agrees_with_an_independent_implementation(case, eps):
    module, network, parameters, images, labels = drawn(case, members=2, images=3)
    box = box_around(images, eps)
    found = BOUNDS["ibp"](network, parameters, box, labels)
    for member, rows in zip(parameters, found, strict=True):
        with_parameters(module.double(), member)
        for low, high, label, row in zip(*box, labels.tolist(), rows, strict=True):
            torch.testing.assert_close(row, ibp_margins(module, low, high, label), rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=networks())
def test_both_ways_to_convolve_agree(case):
    module, network, parameters, images, _ = drawn(case)
    expected = torch.stack([with_parameters(module.double(), p)(images).detach() for p in parameters])
    size = layers.DENSE_SIZE
    try:
        for layers.DENSE_SIZE in (0, 10**9):
            torch.testing.assert_close(network.logits(parameters, images), expected, rtol=1e-10, atol=1e-10)
            shared = network.logits(parameters[:1].expand(3, -1), images)
            torch.testing.assert_close(shared, expected[:1].expand_as(expected), rtol=1e-10, atol=1e-10)
    finally:
        layers.DENSE_SIZE = size


@pytest.mark.parametrize("dtype", DTYPES)
class TestByHand:
    def network(self, dtype):
        """Two pixels; hidden h1 = x1 - x2, h2 = 2 x2 - 3 (dead), h3 = x1 + x2 + 1 (always on); logits (h1 + h3, 2 h1, h2)."""
        module = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
        with torch.no_grad():
            module[1].weight.copy_(torch.tensor([[1.0, -1], [0, 2], [1, 1]]))
            module[1].bias.copy_(torch.tensor([0.0, -3, 1]))
            module[3].weight.copy_(torch.tensor([[1.0, 0, 1], [2, 0, 0], [0, 1, 0]]))
            module[3].bias.zero_()
        return read_network(module, (1, 1, 2)), flat_parameters(module).unsqueeze(0).to(dtype)

    def test_a_box(self, dtype):
        network, parameters = self.network(dtype)
        box = box_around(torch.tensor([0.5, 0.25], dtype=dtype).reshape(1, 1, 1, 2), 0.125)
        # x1 in [.375, .625], x2 in [.125, .375]: h1 in [0, .5], h2 in [-2.75, -2.25] -> 0, h3 in [1.5, 2]
        # logit0 - logit1 = h3 - h1 >= 1.5 - .5; logit0 - logit2 = h1 + h3 - h2 >= 1.5
        found = BOUNDS["ibp"](network, parameters, box, torch.tensor([0]))
        torch.testing.assert_close(found, torch.tensor([[[1.0, 1.5]]], dtype=dtype))
        # logit1 - logit0 = h1 - h3 >= 0 - 2; logit1 - logit2 = 2 h1 - h2 >= 0
        found = BOUNDS["ibp"](network, parameters, box, torch.tensor([1]))
        torch.testing.assert_close(found, torch.tensor([[[-2.0, 0.0]]], dtype=dtype))

    def test_a_box_cut_by_the_pixels_range(self, dtype):
        network, parameters = self.network(dtype)
        box = box_around(torch.tensor([0.875, 0.125], dtype=dtype).reshape(1, 1, 1, 2), 0.25)
        torch.testing.assert_close(box.lower.flatten(), torch.tensor([0.625, 0.0], dtype=dtype))
        torch.testing.assert_close(box.upper.flatten(), torch.tensor([1.0, 0.375], dtype=dtype))
        # h1 in [.25, 1], h3 in [1.625, 2.375]
        found = BOUNDS["ibp"](network, parameters, box, torch.tensor([0]))
        torch.testing.assert_close(found, torch.tensor([[[0.625, 1.875]]], dtype=dtype))


class TestTiles:
    def setup_method(self):
        torch.manual_seed(0)
        self.network = read_network(cnn3((1, 28, 28), 10, mean=[0.1], std=[0.3], width=16), (1, 28, 28))
        self.cost = BOUNDS["ibp"].cost(self.network, torch.device("cpu"))

    def test_stay_within_the_budget(self):
        for budget in (2**26, 2**28, 2**31):
            tile = choose_tile(self.cost, 512, budget, torch.device("cpu"))
            used = 4 * tile.members * (self.cost.member + tile.images * self.cost.pair)
            assert used * worker_count() <= budget
            assert tile.images % LANES == 0

    def test_say_what_budget_would_do(self):
        with pytest.raises(ValueError, match=r"too small for one member and 16 images .* at least (\d+)MiB") as refused:
            choose_tile(self.cost, 512, 2**20, torch.device("cpu"))
        enough = int(str(refused.value).split("at least ")[1].split("MiB")[0]) * 2**20
        choose_tile(self.cost, 512, enough, torch.device("cpu"))

    def test_do_not_waste_on_small_minibatches(self):
        tile = choose_tile(self.cost, 20, 2**31, torch.device("cuda"))
        assert tile.images == 32
        assert choose_tile(self.cost, 512, 2**31, torch.device("cuda")).members > 1

    def test_leave_threads_and_grad_mode_as_they_were(self, network, part):
        read = read_network(network, part.image_shape)
        seen = []

        def on_tile(members, images):
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
            return members.logits(images)

        torch.set_num_threads(2)
        parameters = flat_parameters(network).expand(5, -1)
        with torch.no_grad():
            over_tiles(on_tile, read, parameters, (part.batch(slice(0, 9))[0],), Tile(2, 4))
        assert set(seen) == {(1, False)}
        assert len(seen) == 9
        assert torch.get_num_threads() == 2
        assert torch.is_grad_enabled()


def test_box_around_is_the_whole_box():
    images = torch.tensor([0.0, 0.05, 0.5, 1.0]).reshape(1, 1, 2, 2)
    lower, upper = box_around(images, 0.1)
    assert isinstance(box_around(images, 0.1), Box)
    torch.testing.assert_close(lower.flatten(), torch.tensor([0.0, 0.0, 0.4, 0.9]))
    torch.testing.assert_close(upper.flatten(), torch.tensor([0.1, 0.15, 0.6, 1.0]))
    assert math.isclose(float((upper - lower).max()), 0.2, rel_tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [48, 256])
def test_memory_stays_within_the_budget(budget):
    """Peak memory that a fresh process takes above its level before the call, for CNN3 w=16 on 28x28, P = 32, B = 64."""
    code = f"""
import resource, torch
from evocert.bounds import BOUNDS, box_around, choose_tile, read_network
from evocert.networks import cnn3, flat_parameters
module = cnn3((1, 28, 28), 10, mean=[0.1], std=[0.3], width=16)
network, bound = read_network(module, (1, 28, 28)), BOUNDS["ibp"]
parameters, images = flat_parameters(module).repeat(32, 1), torch.rand(64, 1, 28, 28)
tile = choose_tile(bound.cost(network, torch.device('cpu')), 64, {budget} * 2**20, torch.device("cpu"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    network.logits(parameters[:1], images[:1])  # libraries load what they need
    before = peak()
    bound(network, parameters, box_around(images, 0.1), torch.zeros(64, dtype=torch.int64), tile=tile)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < budget
