"""The built-in networks: plain ``nn.Sequential``, normalisation first. A new one is one function and one line in ``NETWORKS``.

Sizes are those of the certified-training literature, as read from public code (CTBench ``networks.py``, CTRAIN
``models_mao.py``): with one input channel of 28x28 and width 16, cnn3 has 24,330 parameters and cnn5 820,954.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evocert.errors import InputError
from evocert.modules import Normalize, Residual

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
    return _with_head(input_shape, [Normalize(mean, std), *_two_convolutions(input_shape[0], width)], [num_classes])


def cnn3_tiny(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 2
) -> nn.Sequential:
    """cnn3 with ``width`` channels in both convolutions: 1,108 parameters on MNIST. Arguments as cnn3."""
    return _with_head(input_shape, [Normalize(mean, std), *_two_convolutions(input_shape[0], width, 1)], [num_classes])


def cnn4(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 16
) -> nn.Sequential:
    """cnn3 with a linear layer to 512 before the last. Arguments as cnn3."""
    return _with_head(
        input_shape, [Normalize(mean, std), *_two_convolutions(input_shape[0], width)], [512, num_classes]
    )


def _two_convolutions(channels: int, width: int, growth: int = 2) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, growth * width, 4, stride=2, padding=1),
        nn.ReLU(),
    ]


def cnn5(
    input_shape: Shape,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    width: int = 16,
    hidden: int = 512,
) -> nn.Sequential:
    """Three convolutions (3x3 and twice 4x4 with stride 2) and two linear layers, the first to ``hidden``. Else as cnn3."""
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
        [hidden, num_classes],
    )


def cnn7(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 64
) -> nn.Sequential:
    """Five 3x3 convolutions, two of ``width`` channels and three of twice as many, and two linear layers. Arguments as cnn3."""
    return _cnn7(input_shape, num_classes, mean, std, width, batch_norm=False)


def cnn7_bn(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 64
) -> nn.Sequential:
    """cnn7 with a batch normalisation before each ReLU of a convolution, as the field mostly uses it."""
    return _cnn7(input_shape, num_classes, mean, std, width, batch_norm=True)


def _cnn7(
    input_shape: Shape, num_classes: int, mean: Sequence[float], std: Sequence[float], width: int, batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = [Normalize(mean, std)]
    channels = input_shape[0]
    for new, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers.append(nn.Conv2d(channels, new, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(new), nn.ReLU()] if batch_norm else [nn.ReLU()]
        channels = new
    return _with_head(input_shape, layers, [512, num_classes])


def resnet(
    input_shape: Shape, num_classes: int, *, mean: Sequence[float], std: Sequence[float], width: int = 16
) -> nn.Sequential:
    """A small residual network: a 3x3 convolution, two blocks that halve the map, and two linear layers. Arguments as cnn3."""
    return _with_head(
        input_shape,
        [
            Normalize(mean, std),
            nn.Conv2d(input_shape[0], width, 3, padding=1),
            nn.ReLU(),
            _block(width, width),
            nn.ReLU(),
            _block(width, 2 * width),
            nn.ReLU(),
        ],
        [100, num_classes],
    )


def _block(channels: int, new: int) -> Residual:
    """Two 3x3 convolutions, the first with stride 2, beside a 1x1 one."""
    body = nn.Sequential(nn.Conv2d(channels, new, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(new, new, 3, padding=1))
    return Residual(body, nn.Conv2d(channels, new, 1, stride=2))


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


NETWORKS: dict[str, Builder] = {
    "cnn3": cnn3,
    "cnn3_tiny": cnn3_tiny,
    "cnn4": cnn4,
    "cnn5": cnn5,
    "cnn7": cnn7,
    "cnn7_bn": cnn7_bn,
    "resnet": resnet,
    "fully_connected": fully_connected,
}


def calibrate(module: nn.Module, images: Tensor) -> None:
    """Set the statistics of all batch normalisations to those of a batch ``[B, C, H, W]``; nothing else changes.

    Evolution has no running averages: statistics are set once, from a fixed batch, and belong to the network from then on.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d) and child.track_running_stats]
    if not norms:
        return
    training, momenta = module.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: that of the one batch
    with torch.no_grad():
        module.eval()
        for norm in norms:
            norm.train()
        module(images.to(next(module.parameters()).dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.train(training)


def statistics(module: nn.Module) -> dict[str, list[float]]:
    """What ``calibrate`` has set, by the buffers' names, as plain values."""
    norms = {id(b) for child in module.modules() if isinstance(child, nn.BatchNorm2d) for b in child.buffers()}
    return {n: b.tolist() for n, b in module.named_buffers() if id(b) in norms and b.is_floating_point()}


def set_statistics(module: nn.Module, found: dict[str, list[float]]) -> None:
    """What another module's ``statistics`` gave.

    Raises:
        InputError: they are those of another network.
    """
    own = statistics(module)
    if {name: len(values) for name, values in own.items()} != {name: len(values) for name, values in found.items()}:
        raise InputError("batch normalisation statistics of another network: allowed are those of the same layers")
    buffers = dict(module.named_buffers())
    for name, values in found.items():
        buffers[name].copy_(torch.tensor(values))


def layers(module: nn.Module) -> list[str]:
    """What a network is made of, without its numbers: each layer's name and torch's own words for it."""
    leaves = ((name, child) for name, child in module.named_modules() if not list(child.children()))
    return [f"{name}: {child!r}" for name, child in leaves if not isinstance(child, Normalize)]


def flat_parameters(module: nn.Module) -> Tensor:
    """All parameters as one vector ``[D]``, in the order of ``module.named_parameters()``, detached."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def with_parameters(module: nn.Module, parameters: Tensor) -> nn.Module:
    """Writes the vector ``[D]`` into the module's parameters, and returns the module."""
    torch.nn.utils.vector_to_parameters(parameters.to(next(module.parameters()).dtype), module.parameters())
    return module
