"""Tiles: padding does not leak, nothing depends on the split, and nothing of the process is changed."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evocert.bounds import BOUNDS, Tile, box_around, choose_tile, layers, logit_margins, over_tiles, read_network
from evocert.bounds.tiles import LANES, worker_count
from evocert.losses import cross_entropy_of_margins
from evocert.networks import cnn3, flat_parameters

DTYPES = [torch.float32, torch.float64]
NETWORK = read_network(nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), (1, 1, 1))  # D = 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(members=st.integers(1, 7), images=st.integers(1, 7), tile=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@pytest.mark.parametrize("grad", [True, False])
def test_each_pair_is_where_it_belongs(grad, members, images, tile):
    """A member and an image named by numbers: the padding shows as a name in a wrong place."""
    parameters = torch.arange(members).float().unsqueeze(1).expand(-1, 4) * 100
    names = torch.arange(images).float().reshape(-1, 1, 1, 1)
    shapes = []

    def on_tile(rows, part):
        shapes.append((len(rows), len(part)))
        return rows.parameters[:, :1] + part.flatten(1).T + torch.zeros(len(rows), 1)

    with torch.set_grad_enabled(grad):
        found = over_tiles(on_tile, NETWORK, parameters, (names,), Tile(*tile))
    assert torch.equal(found, parameters[:, :1] + names.flatten())
    assert set(shapes) == {tile}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(tile=st.tuples(st.integers(1, 6), st.integers(1, 12)), name=st.sampled_from(list(BOUNDS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_knows_no_padding(dtype, name, tile):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    network = read_network(module, (1, 2, 2))
    parameters = torch.randn(5, network.num_parameters, dtype=torch.float64).to(dtype).requires_grad_()
    box, labels = box_around(torch.rand(7, 1, 2, 2).to(dtype), 0.1), torch.arange(7) % 3

    def gradient(shape):
        margins = BOUNDS[name](network, parameters, box, labels, tile=shape)
        return torch.autograd.grad(cross_entropy_of_margins(margins).sum(), parameters)[0]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(gradient(Tile(*tile)), gradient(None), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tile", [None, Tile(2, 3)])
@pytest.mark.parametrize(("members", "images"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_gives_nothing(members, images, tile, bound):
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 5))
    network = read_network(module, (1, 3, 3))
    box, labels = box_around(torch.rand(images, 1, 3, 3).double(), 0.1), torch.zeros(images, dtype=torch.int64)
    parameters = flat_parameters(module).double().expand(members, -1)
    found = BOUNDS[bound](network, parameters, box, labels, tile=tile)
    assert found.shape == (members, images, 4)
    assert found.dtype == torch.float64


ACTIVATIONS = [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.3)]


@st.composite
def cases(draw):
    channels, size = draw(st.integers(1, 3)), draw(st.integers(6, 9))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    chain = []
    if draw(st.booleans()):
        groups = draw(st.sampled_from([1, channels]))
        first = groups * draw(st.integers(1, 5))
        chain = [nn.Conv2d(channels, first, draw(st.integers(1, 3)), groups=groups), draw(st.sampled_from(ACTIVATIONS))]
        chain += [nn.Conv2d(first, draw(st.integers(1, 7)), 2, stride=draw(st.integers(1, 2)))]
    chain.append(nn.Flatten())
    features = nn.Sequential(*chain)(torch.zeros(1, channels, size, size)).shape[1]
    hidden = draw(st.integers(3, 40))
    chain += [
        nn.Linear(features, hidden),
        draw(st.sampled_from(ACTIVATIONS)),
        nn.Linear(hidden, draw(st.integers(2, 11))),
    ]
    tile = Tile(draw(st.sampled_from([2, 4, 6])), LANES * draw(st.integers(1, 2)))
    return nn.Sequential(*chain), (channels, size, size), tile, draw(st.integers(5, 9)), draw(st.integers(1, 40))


def check_bits(dtype, dense_size, name, case):
    """Margins, loss and natural margins: other members, their number, the place in the tile, torch's threads."""
    module, shape, tile, members, images = case
    network = read_network(module, shape)
    if BOUNDS[name].cost(network, torch.device("cpu")).alone:
        tile = tile._replace(members=1)  # as ``choose_tile`` has it
    parameters = (flat_parameters(module) + 0.1 * torch.randn(members, network.num_parameters)).to(dtype)
    pixels, labels = torch.rand(images, *shape).to(dtype), torch.randint(network.num_classes, (images,))

    def on_tile(rows, pixels, labels):
        margins = BOUNDS[name].margins(rows, box_around(pixels, 0.07), labels)
        natural = logit_margins(rows.logits(pixels), labels)
        return torch.cat((margins, cross_entropy_of_margins(margins).unsqueeze(2), natural), 2)

    def run(rows):
        with torch.no_grad():
            return over_tiles(on_tile, network, parameters[rows], (pixels, labels), tile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "DENSE_SIZE", dense_size)
        everybody = list(range(members))
        whole = run(everybody)
        for rows in ([members - 1], [3, 0, 2], everybody[::-1], everybody[1:]):
            assert torch.equal(run(rows), whole[rows])
        threads = torch.get_num_threads()
        try:
            for torch_threads in (1, 2):
                torch.set_num_threads(torch_threads)
                assert torch.equal(run(everybody), whole)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense_size", [0, 10**6])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=cases())
def test_bits_of_a_member_depend_on_nothing_else(dense_size, dtype, case):
    check_bits(dtype, dense_size, "ibp", case)


BACKWARD = st.sampled_from([name for name in BOUNDS if name != "ibp"])


@settings(max_examples=16, deadline=None, derandomize=True)
@given(case=cases(), name=BACKWARD, dtype=st.sampled_from(DTYPES), dense_size=st.sampled_from([0, 10**6]))
def test_bits_of_a_member_depend_on_nothing_else_in_back_substitution(dense_size, dtype, name, case):
    check_bits(dtype, dense_size, name, case)


@pytest.mark.slow
@pytest.mark.deep
@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases(), name=BACKWARD, dtype=st.sampled_from(DTYPES), dense_size=st.sampled_from([0, 10**6]))
def test_bits_of_a_member_depend_on_nothing_else_in_back_substitution_of_300_networks(dense_size, dtype, name, case):
    check_bits(dtype, dense_size, name, case)


class TestChoice:
    """Tiles for CNN3 w=16 on 28x28."""

    network = read_network(cnn3((1, 28, 28), 10, mean=[0.1], std=[0.3], width=16), (1, 28, 28))
    cpu = torch.device("cpu")

    def cost(self, bound):
        return BOUNDS[bound].cost(self.network, self.cpu)

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stays_within_the_budget(self, bound, dtype):
        cost = self.cost(bound)
        for budget in (2**27, 2**28, 2**31):
            try:
                tile = choose_tile(cost, 512, budget, self.cpu, dtype)
            except ValueError:
                assert dtype.itemsize * (cost.chunk + cost.member + (1 if cost.alone else LANES) * cost.pair) > budget
                continue
            used = dtype.itemsize * (cost.chunk + tile.members * (cost.member + tile.images * cost.pair))
            assert used * tile.at_once <= budget
            assert 1 <= tile.at_once <= worker_count()
            assert tile.members == 1 if cost.alone else tile.images % LANES == 0

    @pytest.mark.parametrize("bound", BOUNDS)
    def test_says_what_budget_would_do(self, bound):
        images = "1 image" if self.cost(bound).alone else "16 images"
        told = rf"too small for one member and {images} .* at least (\d+)MiB"
        with pytest.raises(ValueError, match=told) as refused:
            choose_tile(self.cost(bound), 512, 2**20, self.cpu)
        enough = int(str(refused.value).split("at least ")[1].split("MiB")[0]) * 2**20
        choose_tile(self.cost(bound), 512, enough, self.cpu)

    @pytest.mark.parametrize(("images", "expected"), [(4, 4), (32, 32), (33, 17), (100, 25)])
    def test_a_member_alone_takes_its_images_in_equal_parts(self, images, expected):
        tile = choose_tile(self.cost("crown-ibp"), images, 2**31, self.cpu)
        assert (tile.members, tile.images) == (1, expected)

    @pytest.mark.parametrize("bound", BOUNDS)
    def test_a_gpu_has_room_in_the_default_budget(self, bound):
        gpu = torch.device("cuda")
        choose_tile(BOUNDS[bound].cost(self.network, gpu), 512, 2**31, gpu, torch.float64)

    def test_does_not_waste_on_small_minibatches(self):
        tile = choose_tile(self.cost("ibp"), 20, 2**31, torch.device("cuda"))
        assert tile.images == 32
        assert choose_tile(self.cost("ibp"), 512, 2**31, torch.device("cuda")).members > 1


def test_tiles_leave_threads_and_grad_mode_as_they_were(network, part):
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


def test_a_worker_that_fails_is_heard_and_leaves_nothing_behind():
    def on_tile(rows, part):
        raise ZeroDivisionError("inside a tile")

    before = torch.get_num_threads()
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="inside a tile"):
        over_tiles(on_tile, NETWORK, torch.zeros(5, 4), (torch.zeros(3, 1, 1, 1),), Tile(2, 2))
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_threads_of_a_backward_pass_are_those_of_the_main_thread():
    """Workers set their own number of threads: torch keeps a number for the whole process, too."""
    before, seen = torch.get_num_threads(), []
    with torch.no_grad():
        over_tiles(
            lambda rows, part: rows.logits(part), NETWORK, torch.zeros(5, 4), (torch.zeros(3, 1, 1, 1),), Tile(2, 2)
        )
    x = torch.zeros(3, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch.get_num_threads()))
    x.sum().backward()
    assert seen == [before]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own():
    def work():
        with torch.no_grad():
            return over_tiles(
                lambda rows, part: rows.logits(part), NETWORK, torch.ones(5, 4), (torch.ones(3, 1, 1, 1),), Tile(2, 2)
            )

    expected = work()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(work(), expected) else 1)
    done = []
    waiter = threading.Thread(target=lambda: done.append(os.waitpid(child, 0)[1]), daemon=True)
    waiter.start()
    waiter.join(20)
    if not done:
        os.kill(child, 9)
    assert done == [0]
