"""The built-in networks: plain ``nn.Sequential``, normalisation first. A new one is one function and one line in ``NETWORKS``.

Sizes are those of the certified-training literature, as read from public code (CTBench ``networks.py``, CTRAIN
``models_mao.py``): with one input channel of 28x28 and width 16, cnn3 has 24,330 parameters and cnn5 820,954.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evocert.errors import InputError
from evocert.modules import Normalize

Shape = tuple[int, int, int]
Builder = Callable[..., nn.Sequential]


def cnn3(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 16
) -> nn.Sequential:
    """Two strided convolutions (5x5 to ``width`` channels, 4x4 to twice as many) and a linear layer.

    Args:
        input_shape: ``(C, H, W)`` in [0, 1] pixels.
        num_classes: K.
        mean, std: of each channel, for the normalisation.
        width: channels of the first convolution.
    """
    return _with_head(
        input_shape,
        [
            Normalize(mean, std),
            nn.Conv2d(input_shape[0], width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
        ],
        [num_classes],
    )


def cnn5(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 16
) -> nn.Sequential:
    """Three convolutions (3x3 and twice 4x4 with stride 2) and two linear layers, the first to 512. Arguments as cnn3."""
    return _with_head(
        input_shape,
        [
            Normalize(mean, std),
            nn.Conv2d(input_shape[0], width, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
        ],
        [512, num_classes],
    )


def fully_connected(
    input_shape: Shape,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    width: int = 16,
    depth: int = 3,
) -> nn.Sequential:
    """``depth`` linear layers, ``width`` neurons in each hidden one. Other arguments as cnn3."""
    return _with_head(input_shape, [Normalize(mean, std)], [width] * (depth - 1) + [num_classes])


def _with_head(input_shape: Shape, features: list[nn.Module], sizes: list[int]) -> nn.Sequential:
    """Features, then Flatten, then linear layers of these sizes with ReLUs between."""
    layers = [*features, nn.Flatten()]
    try:
        width = nn.Sequential(*layers)(torch.zeros(1, *input_shape)).shape[1]
    except RuntimeError:
        raise InputError(f"images of shape {list(input_shape)} are too small for this network's convolutions") from None
    for i, size in enumerate(sizes):
        layers += [nn.Linear(width, size)] if i == 0 else [nn.ReLU(), nn.Linear(width, size)]
        width = size
    return nn.Sequential(*layers)


NETWORKS: dict[str, Builder] = {"cnn3": cnn3, "cnn5": cnn5, "fully_connected": fully_connected}


def flat_parameters(module: nn.Module) -> Tensor:
    """All parameters as one vector ``[D]``, in the order of ``module.named_parameters()``, detached."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def with_parameters(module: nn.Module, parameters: Tensor) -> nn.Module:
    """Writes the vector ``[D]`` into the module's parameters, and returns the module."""
    torch.nn.utils.vector_to_parameters(parameters.to(next(module.parameters()).dtype), module.parameters())
    return module
