"""Transposed convolutions in blocks of outputs, against torch's own."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evocert.bounds.blocks import choose_blocks


@st.composite
def convolutions(draw):
    """(channels, size, outputs, kernel, stride, padding) of a convolution that has outputs."""
    kernel, stride = (draw(st.tuples(*[st.integers(1, n)] * 2)) for n in (5, 4))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    size = tuple(draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True))
    outputs = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True))
    return draw(st.sampled_from([1, 3, 16, 20])), size, outputs, kernel, stride, padding


@settings(max_examples=300, deadline=None)
@given(convolutions(), st.sampled_from([1, 2]), st.integers(0, 2**16))
def test_blocks_give_what_a_transposed_convolution_gives(convolution, members, seed):
    channels, size, outputs, kernel, stride, padding = convolution
    blocks = choose_blocks(*convolution)
    if blocks is None:  # a transposed convolution is cheaper
        return
    torch.manual_seed(seed)
    kernels = torch.randn(members, 4, channels, *kernel, dtype=torch.float64)
    maps = torch.randn(3, members * 4, *outputs, dtype=torch.float64)
    found = blocks.transposed(maps, blocks.kernels(kernels))
    for own, given_maps, weight in zip(found, maps.split(4, 1), kernels, strict=True):
        whole = F.conv_transpose2d(given_maps, weight, None, stride)
        whole = F.pad(whole, (0, 9, 0, 9))  # entries that no kernel reaches
        expected = whole[..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
        torch.testing.assert_close(own, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


def test_blocks_of_the_built_in_layers():
    """Where blocks must be found: a stride of 2 costs no more outputs than it needs, few channels fill the lanes."""
    second = choose_blocks(16, (14, 14), (7, 7), (4, 4), (2, 2), (1, 1))
    assert (second.rows.block, second.rows.start, second.rows.taps, second.rows.count) == (2, -1, 2, 8)
    first = choose_blocks(1, (28, 28), (14, 14), (5, 5), (2, 2), (2, 2))
    assert (first.columns.block, first.columns.taps, first.columns.step) == (4, 4, 2)
