"""What Numba compiles, against the operations of torch that it stands for."""

import subprocess
import sys

import numba
import pytest
import torch
from drawing import EXAMPLES, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from evocert.bounds import BOUNDS, Box, box_around, chain, compiled, crown_ibp, ibp, read_network
from evocert.bounds.compiled import loops
from evocert.bounds.convolution import BoundConvolution
from evocert.bounds.nonlinear import BoundActivation, RelaxedActivation
from evocert.bounds.relaxation import SLOPES
from evocert.networks import cnn3, flat_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


@pytest.fixture
def plain(monkeypatch):
    """Call it, and from then on nothing that is compiled is used."""
    return lambda: monkeypatch.setattr(compiled, "usable", lambda *tensors: False)


def with_torch_alone(function):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "usable", lambda *tensors: False)
        return function()


def wherever_it_can(function):
    """With the sparse way through convolutions wherever there is one, whether or not it pays."""

    def possible(node, share):
        return node.layer.groups == 1 and node.layer.dilation == (1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundConvolution, "sparse_pays", possible)
        return function()


@pytest.mark.parametrize(
    "bound", ["crown-ibp", "deeppoly", "deeppoly-sparse", "crown-zero", "crown-one", "deepz", "hbox"]
)
@settings(max_examples=40, **EXAMPLES)
@given(cases(members=3))
def test_bounds_are_those_of_torch_alone(bound, case):
    def margins():
        with torch.no_grad():
            return BOUNDS[bound](case.network, case.parameters, case.box, case.labels)

    found = wherever_it_can(margins)
    torch.testing.assert_close(found, with_torch_alone(margins), rtol=1e-10, atol=1e-10)


@st.composite
def convolutions(draw):
    """(channels, size, outputs, convolution): with any stride and padding, also wider than the kernel."""
    kernel, stride = (draw(st.tuples(*[st.integers(1, n)] * 2)) for n in (5, 4))
    padding = draw(st.tuples(*[st.integers(0, 6)] * 2))
    size = tuple(draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True))
    channels, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    return channels, size, nn.Conv2d(channels, outputs, kernel, stride, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, **EXAMPLES)
@given(
    convolutions(), st.integers(1, 7), st.integers(1, 2), st.floats(0, 1), st.sampled_from("ab-"), st.integers(0, 2**16)
)
def test_through_a_convolution(dtype, convolution, rows, members, share, relaxed, seed):
    """One pass, against a relaxation, a transposed convolution and a relaxation, one after the other."""
    channels, size, module = convolution
    torch.manual_seed(seed)
    outputs = module.out_channels
    height, width = module(torch.zeros(1, channels, *size)).shape[2:]
    above = relaxed in "a-" and parts(members, 2, outputs, height, width, share, dtype)
    below = relaxed in "b-" and parts(1, 2, channels, *size, 0.7, dtype)
    terms = torch.randn(1, 2, 1, rows, height, width, outputs, dtype=dtype)
    terms *= torch.rand(1, 2, 1, 1, height, width, outputs) < max(share, 0.2)
    constant = torch.randn(members, 2, 1, rows, dtype=dtype)
    kernels = torch.randn(members, outputs, channels, *module.kernel_size, dtype=dtype)
    found = compiled.through_convolution(
        terms,
        constant,
        kernels.permute(0, 1, 3, 4, 2).contiguous(),
        module.stride,
        module.padding,
        size,
        above or None,
        below or None,
    )
    expected = terms.expand(members, -1, -1, -1, -1, -1, -1), constant
    if above:
        expected = by_torch(*expected, above)
    expected = transposed(expected[0], kernels, module, size), expected[1]
    if below:
        expected = by_torch(*expected, below)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 100)


@pytest.mark.parametrize("part", [0, 1, 2, 3, "terms"])
def test_nan_passes_a_convolution(part):
    """Also where nothing else of the neuron is other than zero."""
    shape = (1, 1, 1, 1, 3, 3, 4)
    terms = torch.zeros(1, 1, 1, 2, 3, 3, 4)
    relaxation = None if part == "terms" else tuple(torch.zeros(shape) for _ in range(4))
    (terms if part == "terms" else relaxation[part])[0, 0, 0, 0, 1, 1, 2] = torch.nan
    kernels, constant = torch.ones(1, 4, 3, 3, 2), torch.zeros(1, 1, 1, 2)
    new, constant = compiled.through_convolution(terms, constant, kernels, (1, 1), (1, 1), (3, 3), relaxation, None)
    assert (new if part in (0, 1, "terms") else constant).isnan().any()


def parts(members, images, channels, height, width, share, dtype):
    """A relaxation of which a share is not zero: mostly all four parts of a neuron, but now and then one alone."""
    shape = members, images, 1, 1, height, width, channels
    some = torch.rand(shape) < share
    return tuple(torch.randn(shape, dtype=dtype) * (some ^ (torch.rand(shape) < 0.1)) for _ in range(4))


def by_torch(terms, constant, parts):
    mean, half, offset, spread = parts
    constant = constant + ((terms * offset).flatten(4) - (terms.abs() * spread).flatten(4)).sum(4)
    return terms * mean - terms.abs() * half, constant


def transposed(terms, kernels, module, size):
    members = []
    for own, weight in zip(terms, kernels, strict=True):
        maps = own.flatten(0, 2).movedim(-1, 1)
        whole = nn.functional.conv_transpose2d(maps, weight, None, module.stride)
        whole = nn.functional.pad(whole, (0, 20, 0, 20))  # entries that no kernel reaches
        top, left = module.padding
        cut = whole[:, :, top : top + size[0], left : left + size[1]]
        members.append(cut.movedim(1, -1).unflatten(0, own.shape[:3]))
    return torch.stack(members)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(
    ("name", "arguments"), [("relu", ()), ("leaky_relu", (0.01,)), ("leaky_relu", (0.2,)), ("leaky_relu", (1.0,))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_piecewise_linear_activations(name, arguments, slope, dtype, plain):
    torch.manual_seed(0)
    ends = torch.randn(2, 3, 4, 5, 6, 7, dtype=dtype)
    ends[:, 0, 0, 0, 0] = torch.tensor([0.0, -0.0, -1.0, 1.0, 0.0, 2.0, 1e-30])
    ends[:, 0, 0, 0, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0, 2.0, -1e-30])
    lower, upper = ends.amin(0).movedim(2, -1), ends.amax(0).movedim(2, -1)  # some order of memory
    node = BoundActivation(name, arguments, tuple(lower.shape[2:]))
    before = torch.lerp(lower, upper, 0.3)
    with torch.no_grad():
        after, relaxed = node.relaxed(lower, upper, before, slope)
        plain()
        expected, reference = node.relaxed(lower, upper, before, slope)
    found = [*after, *(getattr(relaxed, part) for part in ("mean", "half", "offset", "spread"))]
    wanted = [*expected, *(getattr(reference, part) for part in ("mean", "half", "offset", "spread"))]
    for own, other in zip(found, wanted, strict=True):
        assert own.stride() == lower.stride()
        torch.testing.assert_close(own, other, rtol=1e-5, atol=TOLERANCE[dtype], equal_nan=True)
    for own, other in zip(relaxed.lines, reference.lines, strict=True):
        assert torch.equal(own.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("bound", ["crown-ibp", "deeppoly", "deeppoly-sparse"])
@pytest.mark.parametrize("place", [0, 30, -1])
def test_nan_in_the_weights_is_nan_in_the_bounds(bound, place):
    module = cnn3((1, 12, 12), 4, mean=[0.5], std=[0.5], width=16)
    parameters = flat_parameters(module).repeat(2, 1)
    parameters[0, place] = torch.nan
    box, labels = box_around(torch.rand(3, 1, 12, 12), 0.1), torch.tensor([0, 1, 3])
    with torch.no_grad():
        margins = BOUNDS[bound](read_network(module, (1, 12, 12)), parameters, box, labels)
    assert margins[0].isnan().any(1).all()
    assert not margins[1].isnan().any()


class TestDerivatives:
    """Where one is asked for, torch's operations are taken: for weights, the box, or slopes, one of them alone."""

    @pytest.fixture
    def arguments(self):
        torch.manual_seed(0)
        module = cnn3((1, 12, 12), 4, mean=[0.5], std=[0.5], width=16).double()
        parameters = flat_parameters(module).detach().unsqueeze(0)
        images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
        return read_network(module, (1, 12, 12)), parameters, images - 0.05, images + 0.05, torch.tensor([0, 1])

    @pytest.mark.parametrize("bound", ["crown-ibp", "deeppoly", "deeppoly-sparse"])
    @pytest.mark.parametrize("wanted", ["weights", "lower", "upper"])
    def test_are_those_of_torch_alone(self, arguments, bound, wanted):
        network, *tensors, labels = arguments

        def gradient():
            parameters, lower, upper = (each.clone() for each in tensors)
            leaf = {"weights": parameters, "lower": lower, "upper": upper}[wanted].requires_grad_()
            BOUNDS[bound](network, parameters, Box(lower, upper), labels).sum().backward()
            return leaf.grad

        found = gradient()
        assert found.abs().max() > 0
        assert torch.equal(found, with_torch_alone(gradient))

    def test_in_forward_mode_are_those_of_torch_alone(self, arguments):
        network, parameters, lower, upper, labels = arguments

        def tangent():
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(parameters, torch.ones_like(parameters))
                margins = BOUNDS["crown-ibp"](network, dual, Box(lower, upper), labels)
                return forward_ad.unpack_dual(margins).tangent

        found = tangent()
        assert found.abs().max() > 0
        torch.testing.assert_close(found, with_torch_alone(tangent))

    def test_members_that_bounded_without_gradients_have_them_still(self, arguments):
        """And a box that has changed in place is another box."""
        network, parameters, lower, upper, labels = arguments
        parameters = parameters.clone().requires_grad_()
        for bound in (ibp, crown_ibp):
            members = network.bind(parameters)
            with torch.no_grad():
                first = bound.margins(members, Box(lower, upper), labels)
                lower -= 0.1
                assert (bound.margins(members, Box(lower, upper), labels) < first).all()
            expected = bound.margins(network.bind(parameters), Box(lower, upper), labels)
            found = bound.margins(members, Box(lower, upper), labels)
            assert torch.equal(*(torch.autograd.grad(each.sum(), parameters)[0] for each in (found, expected))), bound


class TestChoice:
    @pytest.fixture
    def node(self):
        module = nn.Sequential(nn.Conv2d(16, 32, 4, 2, 1), nn.Flatten(), nn.Linear(32 * 49, 10))
        network = read_network(module, (16, 14, 14))
        return network.bind(flat_parameters(module).unsqueeze(0)).nodes[0]

    def test_few_neurons_are_taken_one_by_one_and_many_all_at_once(self, node):
        assert node.sparse_pays(lambda: 0.3)
        assert not node.sparse_pays(lambda: 1.0)

    def test_a_narrow_window_is_never_worth_it_and_nothing_is_counted(self):
        def counted():
            raise AssertionError

        module = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.Flatten(), nn.Linear(16 * 196, 10))
        node = read_network(module, (1, 28, 28)).bind(flat_parameters(module).unsqueeze(0)).nodes[0]
        assert not node.sparse_pays(counted)

    def test_a_network_with_dead_neurons_takes_it(self, monkeypatch):
        """Both relaxations and the convolution between them, in one call for each tile."""
        calls = []
        whole = compiled.through_convolution
        monkeypatch.setattr(compiled, "through_convolution", lambda *a: calls.append(a) or whole(*a))
        module = cnn3((1, 28, 28), 10, mean=[0.1], std=[0.3], width=16)
        with torch.no_grad():
            module[3].bias -= 1.0
        arguments = read_network(module, (1, 28, 28)), flat_parameters(module).detach().unsqueeze(0)
        box, labels = box_around(torch.rand(4, 1, 28, 28), 0.01), torch.arange(4)
        with torch.no_grad():
            found = BOUNDS["crown-ibp"](*arguments, box, labels)
        ((*_, above, below),) = calls
        assert above is not None
        assert below is not None
        expected = with_torch_alone(lambda: BOUNDS["crown-ibp"](*arguments, box, labels))
        assert len(calls) == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_a_relaxation_that_keeps_what_passes_it_is_not_passed_by(self, node):
        class Keeping(RelaxedActivation):
            pass

        activation = BoundActivation("relu", (), (2,))
        ends = torch.tensor([[[-1.0, 1.0]]])
        with torch.no_grad():
            _, relaxed = activation.relaxed(ends, ends + 1, ends, "adaptive")
        assert chain._activation(activation, {activation: relaxed}) is relaxed
        keeping = Keeping(relaxed.lines, relaxed.reference, relaxed.interval)
        assert chain._activation(activation, {activation: keeping}) is None


def test_without_a_place_to_keep_what_is_compiled_it_is_compiled_all_the_same(monkeypatch):
    whole = numba.njit

    def nowhere(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available for file")
        return whole(*args, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert loops.compiled(lambda x: x + 1)(2) == 3


def test_after_loading_nothing_is_compiled():
    program = """
import torch
from evocert.bounds import BOUNDS, box_around, compiled, read_network
from evocert.bounds.compiled import activations, box, convolutions
from evocert.networks import cnn3, flat_parameters

def kinds():
    modules = (activations, box, convolutions)
    return {k: len(f.signatures) for m in modules for k, f in vars(m).items() if hasattr(f, "signatures")}

compiled.load(torch.float32)
before = kinds()
assert torch.is_grad_enabled()
module = cnn3((1, 12, 12), 4, mean=[0.5], std=[0.5], width=16)
with torch.no_grad():
    module[3].bias -= 1
arguments = read_network(module, (1, 12, 12)), flat_parameters(module).detach().repeat(2, 1)
for name in ("crown-ibp", "deeppoly", "deeppoly-sparse"):
    BOUNDS[name](*arguments, box_around(torch.rand(3, 1, 12, 12), 0.01), torch.tensor([0, 1, 3]))
assert kinds() == before, (kinds(), before)
assert sum(before.values()) >= 7, before  # what is read from where it is kept does not count what it calls
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
