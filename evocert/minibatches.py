"""What a generation is trained on: a function of a seed and the generation alone."""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Images(Protocol):
    """Labelled images, of which any rows can be had: a ``data.Part``, or anything alike."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, C, H, W]`` in [0, 1], labels int64 ``[B]``."""
        ...


class Minibatch(NamedTuple):
    """The images of a generation: what actors are sent.

    ``natural``: whether the natural loss is wanted, too.
    """

    generation: int
    images: Tensor  # [B, C, H, W], in [0, 1] pixels
    labels: Tensor  # [B]
    eps: float
    natural: bool


def drawn_rows(seed: int, generation: int, total: int, size: int) -> Tensor:
    """``size`` of the numbers below ``total``, each once, rising."""
    rows = _generator(seed, generation).choice(total, size, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(rows))


def drawn_noise(seed: int, generation: int, like: Tensor) -> Tensor:
    """Where attacks start: of the shape of ``like``, uniform in [-1, 1]."""
    # Another stream than that of the rows: no run has so many generations.
    return torch.from_numpy(_generator(seed, 2**63 + generation).uniform(-1, 1, tuple(like.shape))).to(like)


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
