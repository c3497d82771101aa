"""Network modules of ours that torch does not have. Lowest layer: torch only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """``(x - mean) / std`` for each channel, as a network's first layer, so that images and eps stay in [0, 1] pixels.

    Args:
        mean: one float for each channel, in [0, 1] pixel units.
        std: one positive float for each channel, in [0, 1] pixel units.

    Raises:
        ValueError: lengths differ, or a std is not positive.

    Shapes: input and output ``[..., C, H, W]``. Mean and std are buffers: they are not trained and do not count in D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"Normalize takes one mean and one positive std a channel, got mean={mean} and std={std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Residual(nn.Module):
    """``body(x) + shortcut(x)``, a residual block.

    Args:
        body: layers that give outputs of the same shape as the shortcut's.
        shortcut: None for the identity.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)
