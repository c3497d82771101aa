"""A transposed convolution with a stride as a convolution: each position of it computes a whole block of the map.

The entries of a map that a strided convolution reads fall into s x s phases, each of which takes its own part of the kernel.
A block of b x b entries, b a multiple of s, takes all its phases from the same window of the outputs; so a block is what an
ordinary convolution with b * b times the channels, the stride b / s and a rearranged kernel gives. In one dimension, for
kernel 4, stride 2, padding 1 and blocks of two entries (every letter an entry below, every number an output above):

    outputs          0     1     2     3
    entries       [.  a][b  c][d  e][f  g][h  .]        [b c] = outputs 0 and 1 times a 2 x 2 matrix of taps

torch's own transposed convolution reaches half the speed of its convolution on a CPU, and a quarter where there are few
channels to fill the lanes with: on CNN3 with w=16 (one core, torch 2.14) the second layer took 111 against 92 microseconds an
image, and the first 327 against 44. Where blocks begin, and how large they are, is chosen by counting.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from evocert.bounds.windows import Pair

# Channels are worked on so many at a time; a last part is as dear as a full one.
LANES = 16
# A block of up to so many strides: more read more outputs that only some of their entries need.
STRIDES = 4
# How much faster a convolution is than a transposed one with a stride, for the same number of multiplications.
FASTER = 2


@dataclass(frozen=True)
class Axis:
    """One direction: block j holds entries from ``start + j * block`` on, and reads outputs from ``first + j * step`` on."""

    block: int
    start: int  # <= 0; what lies before 0 is cropped
    first: int  # <= 0: so many zeros stand before the first output
    taps: int
    step: int
    count: int


@dataclass(frozen=True)
class Blocks:
    """How a transposed convolution is cut into blocks.

    Attributes:
        rows, columns: the two directions.
        size: (H, W) of the map that is computed.
        outputs: (H', W') of the map that is read.
        kernel, stride, padding: of the convolution; ``padding`` is (top, left).
    """

    rows: Axis
    columns: Axis
    size: Pair
    outputs: Pair
    kernel: Pair
    stride: Pair
    padding: Pair

    def kernels(self, kernels: Tensor) -> Tensor:
        """Those of the convolution over the outputs: ``[P, C', C, k, k]`` -> ``[P * rows * columns * C, C', taps, taps]``."""
        kernels = F.pad(kernels, (0, 1, 0, 1))  # the zero past its end stands where a kernel does not reach
        for direction, dim in enumerate((3, 5)):
            index = _taps(self, direction, kernels.device)
            kernels = kernels.index_select(dim, index.flatten()).unflatten(dim, tuple(index.shape))
        # [P, C', C, rows, taps, columns, taps] -> [P * rows * columns * C, C', taps, taps]
        new = kernels.permute(0, 3, 5, 2, 1, 4, 6).flatten(0, 3)
        return new.contiguous(memory_format=torch.channels_last)

    def transposed(self, maps: Tensor, kernels: Tensor) -> Tensor:
        """Coefficients on the outputs -> on the map.

        Args:
            maps: ``[R, P * C', H', W']``.
            kernels: as of ``kernels``.

        Returns:
            ``[P, R, H, W, C]``, in memory in that order.
        """
        axes = self.rows, self.columns
        members = maps.shape[1] // kernels.shape[1]
        before = [-axis.first for axis in axes]
        after = [
            (axis.count - 1) * axis.step + axis.taps - n - b
            for axis, n, b in zip(axes, self.outputs, before, strict=True)
        ]
        if any(end > start for start, end in zip(before, after, strict=True)):
            maps = F.pad(maps, (before[1], max(after[1], 0), before[0], max(after[0], 0)))
            before = [0, 0]
        new = F.conv2d(maps, kernels, None, (axes[0].step, axes[1].step), (before[0], before[1]), 1, members)
        new = new[..., : axes[0].count, : axes[1].count].unflatten(1, (members, axes[0].block, axes[1].block, -1))
        # [R, P, block, block, C, rows, columns] -> [P, R, rows, block, columns, block, C]
        new = new.permute(1, 0, 5, 2, 6, 3, 4).flatten(4, 5).flatten(2, 3)
        top, left = -axes[0].start, -axes[1].start
        return new[:, :, top : top + self.size[0], left : left + self.size[1]].contiguous()


@lru_cache(maxsize=256)
def choose_blocks(channels: int, size: Pair, outputs: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Blocks | None:
    """The cheapest blocks, or None where a transposed convolution is cheaper.

    Args:
        channels: C, of the map that is computed.
        size, outputs, kernel, stride, padding: as of ``Blocks``.
    """
    own = outputs[0] * outputs[1] * kernel[0] * kernel[1] * _full(channels)
    if stride != (1, 1):
        own *= FASTER

    def cost(axes: tuple[Axis, Axis]) -> int:
        a, b = axes
        return a.count * a.taps * b.count * b.taps * _full(a.block * b.block * channels)

    rows, columns = (_axes(*each) for each in zip(size, kernel, stride, padding, strict=True))
    best = min(product(rows, columns), key=cost, default=None)
    return None if best is None or cost(best) > own else Blocks(*best, size, outputs, kernel, stride, padding)


def _full(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _axes(size: int, kernel: int, stride: int, padding: int) -> list[Axis]:
    """All ways to cut one direction into blocks, the simplest first."""
    found = []
    for step, start in product(range(1, STRIDES + 1), range(0, -stride, -1)):
        block = step * stride
        # Entry y takes output i through tap y + padding - stride * i: the first block's entries are start .. start + block - 1.
        first = -((kernel - 1 - start - padding) // stride)
        last = (start + block - 1 + padding) // stride
        if first <= 0:  # or else the padding is wider than the kernel
            found.append(Axis(block, start, first, last - first + 1, step, -(-(size - start) // block)))
    return found


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must serve later gradients too
def _taps(blocks: Blocks, direction: int, device: torch.device) -> Tensor:
    """Which tap of the kernel leads from an entry of a block to an output, or one past the end: ``[block, taps]``."""
    axis = (blocks.rows, blocks.columns)[direction]
    kernel, stride, padding = blocks.kernel[direction], blocks.stride[direction], blocks.padding[direction]
    entry = axis.start + torch.arange(axis.block).unsqueeze(1)
    tap = entry + padding - stride * (axis.first + torch.arange(axis.taps))
    return torch.where((tap >= 0) & (tap < kernel), tap, kernel).to(device)
