"""The lines of every activation lie on their sides of it, over any interval and under every slope rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocert.bounds.relaxation import ACTIVATIONS, SLOPES

ARGUMENTS = {
    "relu": [()],
    "leaky_relu": [(0.0,), (0.01,), (0.7,), (1.0,)],
    "hardtanh": [(-1.0, 1.0), (0.0, 6.0), (0.2, 0.3), (-3.0, -0.5)],
    "sigmoid": [()],
    "tanh": [()],
}
CASES = [(name, arguments) for name in ACTIVATIONS for arguments in ARGUMENTS[name]]
ENDS = st.one_of(st.floats(-8, 8), st.floats(-1000, 1000), st.sampled_from([0.0, -0.0, 0.2, 1.0, -1.0, 6.0, 1e-30]))
WIDTHS = st.one_of(st.floats(0, 16), st.floats(0, 1e-4), st.sampled_from([0.0, 1e-12, 1e3]))


def fine_grid(lower, upper):
    """Points of each interval ``[N]``, ends and zero among them: ``[1003, N]``, float64."""
    shares = torch.linspace(0, 1, 1001, dtype=torch.float64).unsqueeze(1)
    points = lower.double() + shares * (upper.double() - lower.double())
    corners = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    return torch.cat([points, torch.minimum(torch.maximum(corners, lower.double()), upper.double())])


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(intervals=st.lists(st.tuples(ENDS, WIDTHS), min_size=20, max_size=40))
def test_lines_enclose_the_activation(dtype, name, arguments, slope, intervals):
    low, width = torch.tensor(intervals, dtype=torch.float64).T
    lower, upper = low.to(dtype), (low + width).to(dtype)
    lines = ACTIVATIONS[name].relax(lower, upper, slope, *arguments)
    assert all(line.dtype == dtype and line.isfinite().all() for line in lines)
    x = fine_grid(lower, upper)
    value = ACTIVATIONS[name].function(x, *arguments)
    rounding = 4 * torch.finfo(dtype).eps * (1 + torch.maximum(lower.abs(), upper.abs())).double()
    below, above, below_offset, above_offset = (line.double() for line in lines)
    assert (below * x + below_offset <= value + rounding).all()
    assert (above * x + above_offset >= value - rounding).all()


@pytest.mark.parametrize(("name", "arguments"), [case for case in CASES if ACTIVATIONS[case[0]].decided])
@pytest.mark.parametrize("slope", SLOPES)
def test_lines_are_the_activation_where_it_is_decided(name, arguments, slope):
    activation = ACTIVATIONS[name]
    ends = torch.linspace(-7, 7, 57, dtype=torch.float64)
    lower, upper = torch.combinations(ends, with_replacement=True).T
    decided = activation.decided(lower, upper, *arguments)
    lines = activation.relax(lower, upper, slope, *arguments)
    assert decided.any()
    for share in (0.0, 0.3, 1.0):
        x = lower + share * (upper - lower)
        for line, offset in ((lines.lower_slope, lines.lower_intercept), (lines.upper_slope, lines.upper_intercept)):
            torch.testing.assert_close((line * x + offset)[decided], activation.function(x, *arguments)[decided])


def test_the_slope_rules_of_a_relu_by_hand():
    """Over [-1, 3] the chord has slope 3/4; over [-3, 1], 1/4."""
    lower, upper = torch.tensor([-1.0, -3.0]), torch.tensor([3.0, 1.0])
    below = {"adaptive": [1.0, 0.0], "zero": [0.0, 0.0], "one": [1.0, 1.0], "same": [0.75, 0.25]}
    for slope in SLOPES:
        lines = ACTIVATIONS["relu"].relax(lower, upper, slope)
        assert lines.lower_slope.tolist() == below[slope]
        assert lines.lower_intercept.tolist() == [0.0, 0.0]
        assert lines.upper_slope.tolist() == [0.75, 0.25]
        assert lines.upper_intercept.tolist() == [0.75, 0.75]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_parallel_lines_have_one_slope_and_gradients_everywhere(name, arguments):
    """Also over intervals without width, at every corner."""
    ends = torch.linspace(-7, 7, 57, dtype=torch.float64)
    lower, upper = (end.clone().requires_grad_() for end in torch.combinations(ends, with_replacement=True).T)
    lines = ACTIVATIONS[name].relax(lower, upper, "same", *arguments)
    assert torch.equal(lines.lower_slope, lines.upper_slope)
    assert (lines.lower_slope >= 0).all()
    gradients = torch.autograd.grad(sum(line.sum() for line in lines), (lower, upper))
    assert all(gradient.isfinite().all() for gradient in gradients)
    x = lower + 0.0  # a point: both lines are the value there
    at_a_point = (upper == lower).nonzero()
    for slope, offset in (lines[::2], lines[1::2]):
        value = (slope * x + offset)[at_a_point]
        torch.testing.assert_close(value, ACTIVATIONS[name].function(x, *arguments)[at_a_point])


def test_parallel_lines_by_hand():
    """relu6 over [2, 12]: the chord has slope 4/10, and the corner (6, 6) is the farthest above it.

    tanh over [-1, 2]: the smaller derivative is that at 2. Of a mirrored interval the lines are the mirrored ones.
    """
    for sign, arguments in ((1, (0.0, 6.0)), (-1, (-6.0, 0.0))):
        low, high = sorted((sign * 2.0, sign * 12.0))
        lines = ACTIVATIONS["hardtanh"].relax(torch.tensor(low), torch.tensor(high), "same", *arguments)
        least, greatest = sorted((sign * (2 - 0.8), sign * (6 - 2.4)))
        torch.testing.assert_close(torch.stack(lines), torch.tensor([0.4, 0.4, least, greatest]))
    lines = ACTIVATIONS["tanh"].relax(torch.tensor(-1.0), torch.tensor(2.0), "same")
    slope = 1 / math.cosh(2) ** 2
    expected = [slope, slope, math.tanh(-1) + slope, math.tanh(2) - 2 * slope]
    torch.testing.assert_close(torch.stack(lines), torch.tensor(expected))


def test_the_lines_of_a_clamp_by_hand():
    """relu6 over [2, 8] reaches beyond its corner (6, 6) by less than below it: the line through (2, 2) and the corner.

    Over [2, 12] it reaches beyond by more: the constant encloses less.
    """
    lower, upper = torch.tensor([2.0, 2.0]), torch.tensor([8.0, 12.0])
    above = {"adaptive": ([1.0, 0.0], [0.0, 6.0]), "zero": ([0.0, 0.0], [6.0, 6.0]), "one": ([1.0, 1.0], [0.0, 0.0])}
    for slope, (slopes, offsets) in above.items():
        lines = ACTIVATIONS["hardtanh"].relax(lower, upper, slope, 0.0, 6.0)
        torch.testing.assert_close(lines.upper_slope, torch.tensor(slopes))
        torch.testing.assert_close(lines.upper_intercept, torch.tensor(offsets))
        torch.testing.assert_close(lines.lower_slope, torch.tensor([4 / 6, 4 / 10]))  # chords to (8, 6) and (12, 6)
        torch.testing.assert_close(lines.lower_intercept, torch.tensor([2 - 2 * 4 / 6, 2 - 2 * 4 / 10]))
