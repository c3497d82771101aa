"""Windows: the pieces of a map that the neurons of a convolution depend on, one for each of its positions.

A neuron at position (p, q) sees rows ``offset + p * stride`` to ``+ kernel`` of the map below, and likewise columns. One layer
further down its window is larger and strides further: with a convolution of kernel k', stride s' and padding p' in between,

    kernel -> (kernel - 1) * s' + k',   stride -> stride * s',   offset -> offset * s' - p'

Coefficients of such neurons are kept in cells ``[kernel rows, kernel columns, C]``: a row of a cell lies together in memory,
and so does what it is cut from; a convolution is passed row by row (see ``convolution``).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Which piece of a map ``[C, H, W]`` belongs to which position; everything is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    offset: Pair  # where the window of position (0, 0) begins; negative in the padding
    positions: Pair

    @classmethod
    def points(cls, positions: Pair) -> "Window":
        """Each position sees itself."""
        return cls((1, 1), (1, 1), (0, 0), positions)

    @property
    def count(self) -> int:
        """L, the number of positions."""
        return self.positions[0] * self.positions[1]

    def below(self, kernel: Pair, stride: Pair, dilation: Pair, before: Pair) -> "Window":
        """The same neurons' windows in the input of a convolution or pooling; ``before`` is its padding at the top left."""
        grown = tuple(
            (own - 1) * s + d * (k - 1) + 1 for own, k, s, d in zip(self.kernel, kernel, stride, dilation, strict=True)
        )
        strides = self.stride[0] * stride[0], self.stride[1] * stride[1]
        offset = self.offset[0] * stride[0] - before[0], self.offset[1] * stride[1] - before[1]
        return Window((grown[0], grown[1]), strides, offset, self.positions)

    def rows(self, start: int, stop: int) -> "Window":
        """That of the positions in rows start .. stop alone."""
        offset = self.offset[0] + start * self.stride[0], self.offset[1]
        return Window(self.kernel, self.stride, offset, (stop - start, self.positions[1]))

    def overhangs(self, size: Pair) -> bool:
        """Whether some window reaches beyond a map of ``size`` (H, W)."""
        return any(
            o < 0 or o + (n - 1) * s + k > h
            for o, n, s, k, h in zip(self.offset, self.positions, self.stride, self.kernel, size, strict=True)
        )

    def covers(self, size: Pair) -> bool:
        """Whether a window is about as large as a map of ``size``: then coefficients on the whole map are no more work."""
        return 2 * self.kernel[0] * self.kernel[1] > size[0] * size[1]

    def cut(self, maps: Tensor) -> Tensor:
        """``[..., C, H, W]`` -> ``[..., L, kernel rows, kernel columns, C]``, zero beyond the map."""
        needed = [
            (n - 1) * s + k for n, s, k in zip(self.positions, self.stride, self.kernel, strict=True)
        ]  # rows and columns from the offset on
        (top, bottom), (left, right) = (
            (-o, o + n - h) for o, n, h in zip(self.offset, needed, maps.shape[-2:], strict=True)
        )
        maps = framed(maps.movedim(-3, -1), (left, right, top, bottom)).contiguous()
        pieces = maps.unfold(-3, self.kernel[0], self.stride[0]).unfold(-3, self.kernel[1], self.stride[1])
        first = pieces.ndim - 5  # [..., rows, columns, C, kernel rows, kernel columns]
        order = [*range(first), first, first + 1, first + 3, first + 4, first + 2]
        return pieces.permute(order).flatten(first, first + 1)

    def inside(self, size: Pair, like: Tensor) -> Tensor:
        """1 where a cell lies on the map and 0 beyond: ``[L, kernel rows, kernel columns, 1]``."""
        return self.cut(like.new_ones(1, *size))

    def places(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """For each entry of each cell its place in the map as a cell, ``[H * W * C]``, or that size beyond it: ``[L, K]``."""
        return _places(self, shape, device)


def framed(maps: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Maps ``[..., H, W, C]`` with a border of zeros (left, right, top, bottom); a negative one crops.

    torch's own crops first, and refuses to crop more than there is: of a map whose window lies wholly in the padding.
    """
    left, right, top, bottom = border
    maps = F.pad(maps, (0, 0, *(max(n, 0) for n in border)))
    height, width = maps.shape[-3:-1]
    return maps[..., max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0), :]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve later gradients too
def _places(window: Window, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    channels, height, width = shape
    size = channels * height * width
    numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(
        height, width, channels
    )  # exact; 0 is beyond the map
    found = window.cut(numbers.movedim(-1, -3)).flatten(1).long() - 1
    return torch.where(found < 0, size, found).to(device)
