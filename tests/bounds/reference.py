"""Interval bounds written for clarity: dense matrices, lower and upper ends, one network and one image at a time, float64.

The matrix of a linear layer is found by asking the module itself what it does to each unit vector.
"""

import torch
from torch import Tensor, nn

from evocert.modules import Normalize


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Matrix, offset and output shape of a module that is affine in one image."""
    size = torch.Size(shape).numel()
    offset = layer(torch.zeros(1, *shape, dtype=torch.float64))
    units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    columns = layer(units) - offset
    return columns.reshape(size, -1).T, offset.flatten(), tuple(offset.shape[1:])


def interval(matrix: Tensor, offset: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
    return positive @ lower + negative @ upper + offset, positive @ upper + negative @ lower + offset


@torch.no_grad()
def ibp_margins(module: nn.Sequential, lower: Tensor, upper: Tensor, label: int) -> Tensor:
    """Lower bounds of logit[label] - logit[j] over one box ``[C, H, W]``: ``[K - 1]``, j rising."""
    module = module.double().eval()
    shape = tuple(lower.shape)
    lower, upper = lower.double().flatten(), upper.double().flatten()
    layers = [m for m in module.modules() if not list(m.children()) and not isinstance(m, nn.Dropout | nn.Identity)]
    for place, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d | nn.Linear | Normalize | nn.Flatten):
            matrix, offset, shape = dense(layer, shape)
            if place == len(layers) - 1:
                rows = [j for j in range(len(offset)) if j != label]
                return interval(matrix[label] - matrix[rows], offset[label] - offset[rows], lower, upper)[0]
            lower, upper = interval(matrix, offset, lower, upper)
        else:
            lower, upper = layer(lower), layer(upper)
    return torch.stack([lower[label] - upper[j] for j in range(len(lower)) if j != label])
