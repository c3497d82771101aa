"""Gradients of every bound: against finite differences, and the same through cut work."""

import pytest
import torch
from drawing import EXAMPLES, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import nearest_tie

from evocert.bounds import BOUNDS, Box, backward, layers

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its speed

# In alpha-crown's gradient its slopes count as constant, but not in finite differences.
EXACT = [name for name in BOUNDS if name != "alpha-crown"]
STEP = 1e-6


def check_gradients(case, matrices, chunk):
    """Along a random direction of parameters and boxes, of a random sum of margins; and the same from chunks."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = case.box
    inner = [(upper - lower) / 10 * torch.rand(lower.shape, generator=generator, dtype=lower.dtype) for _ in range(2)]
    inputs = [case.parameters, lower + inner[0], upper - inner[1]]  # 0 and 1 are kinks of activations
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs]
    shares = torch.rand(len(case.parameters), len(case.images), case.network.num_classes - 1, generator=generator)

    def value(name, parameters, lower, upper):
        return (shares * BOUNDS[name](case.network, parameters, Box(lower, upper), case.labels)).sum()

    def moved(name, length):
        with torch.no_grad():
            return value(name, *(t + length * d for t, d in zip(inputs, directions, strict=True))).item()

    smooth = 0
    with pytest.MonkeyPatch.context() as patch:
        if not matrices:
            patch.setattr(layers, "DENSE_SIZE", 0)
        for name in EXACT:
            leaves = [t.clone().requires_grad_() for t in inputs]
            gradients = torch.autograd.grad(value(name, *leaves), leaves)
            with pytest.MonkeyPatch.context() as cut:
                cut.setattr(backward, "CPU_CHUNK", chunk)
                of_chunks = torch.autograd.grad(value(name, *leaves), leaves)
            largest = max(g.abs().max().item() for g in gradients)
            apart = max((one - other).abs().max().item() for one, other in zip(gradients, of_chunks, strict=True))
            if apart > 1e-9 * (1 + largest):
                tie = nearest_tie(name, case.module, case.parameters, Box(*inputs[1:]), case.labels)
                assert tie < 1e-9, f"{name} differs by {apart:.3g}, tie at {tie:.3g}"
                continue
            before, here, after = (moved(name, length) for length in (-STEP, 0.0, STEP))
            right, left = (after - here) / STEP, (here - before) / STEP
            scale = 1 + sum(g.abs().sum().item() for g in gradients) ** 0.5
            if (kink := abs(right - left)) > 1e-4 * scale:
                continue  # it lies within the step, or a jump does
            slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
            assert abs(slope - (after - before) / (2 * STEP)) < kink + 1e-5 * scale, name
            smooth += 1
    return smooth


@settings(max_examples=6, **EXAMPLES)
@given(case=cases(wide=True), matrices=st.booleans(), chunk=st.sampled_from([1, 300, 3000]))
def test_agree_with_finite_differences_and_do_not_depend_on_chunks(case, matrices, chunk):
    assume(check_gradients(case, matrices, chunk) > len(EXACT) // 2)


@pytest.mark.slow
@pytest.mark.deep
@settings(max_examples=150, **EXAMPLES)
@given(case=cases(wide=True), matrices=st.booleans(), chunk=st.sampled_from([1, 300, 3000]))
def test_agree_with_finite_differences_and_do_not_depend_on_chunks_in_150_networks(case, matrices, chunk):
    assume(check_gradients(case, matrices, chunk) > len(EXACT) // 2)
