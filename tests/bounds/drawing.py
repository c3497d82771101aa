"""Networks drawn by hypothesis: every supported kind of layer, small, in any order that gives logits."""

from random import Random
from typing import NamedTuple

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import Tensor, nn

from evocert.bounds import Box, Network, box_around, read_network
from evocert.modules import Normalize, Residual
from evocert.networks import flat_parameters

# Of all drawn tests. A network takes longer to draw than hypothesis likes.
EXAMPLES = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
LARGEST = 320  # values of a layer: the reference has a dense matrix for each


# Uniform, as integers of fewer bits are, where drawing every choice by itself would give simple networks most of the time.
SEEDS = st.integers(0, 2**20)


class Drawn(NamedTuple):
    module: nn.Module
    network: Network
    parameters: Tensor  # [P, D]
    images: Tensor  # [B, C, H, W]
    labels: Tensor  # [B]
    eps: float

    def __repr__(self) -> str:
        return f"{self.module} on {list(self.images.shape[1:])}, labels {self.labels.tolist()}, eps {self.eps}"

    @property
    def box(self) -> Box:
        return box_around(self.images, self.eps)

    def to(self, dtype: torch.dtype) -> "Drawn":
        return self._replace(parameters=self.parameters.to(dtype), images=self.images.to(dtype))


@st.composite
def cases(draw, members=2, images=2, wide=False, blocks=4, largest=8):
    """Networks of one architecture, with images, labels and a radius (which is zero for some), float64.

    Args:
        members, images: how many.
        wide: only radii above zero.
        blocks: at most so many before the first Flatten, each of some layers.
        largest: side of an image.
    """
    seed, blocks, linear = draw(SEEDS), draw(st.lists(SEEDS, max_size=blocks)), draw(st.lists(SEEDS, max_size=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawer = _Drawer(seed)
        shape = (drawer.integer(1, 3), drawer.integer(3, largest), drawer.integer(3, largest))
        module = drawer.network(shape, blocks, linear).double().eval()
        network = read_network(module, shape)
        with torch.no_grad():
            for layer in module.modules():  # some neurons that are dead, and some that are always on
                bias = getattr(layer, "bias", None)
                if isinstance(layer, nn.Conv2d | nn.Linear) and bias is not None:
                    bias += torch.tensor([-4.0, *[0.0] * 10, 4.0])[torch.randint(12, bias.shape)]
        own = flat_parameters(module)
        parameters = own + 0.1 * own.abs().clamp(min=0.1) * torch.randn(members, len(own), dtype=own.dtype)
        pixels = torch.rand(images, *shape, dtype=torch.float64)
        labels = torch.randint(network.num_classes, (images,))
    eps = 10 ** drawer.random.uniform(-3, -0.2)
    return Drawn(module, network, parameters, pixels, labels, eps if wide or drawer.integer(0, 9) else 0.0)


class _Drawer:
    def __init__(self, seed):
        self.random = Random(seed)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def either(self, *options):
        return self.random.choice(options)

    def flag(self):
        return self.random.random() < 0.5

    def network(self, shape, blocks, linear):
        """Each block has a seed of its own, so that hypothesis can leave out what a failure does not need."""
        chain, size = nn.Sequential(), shape
        flags = [self.flag() for _ in range(3)]
        classes = self.integer(2, 5)

        def add(*layers):
            nonlocal size
            chain.extend(layers)
            size = shape_after(nn.Sequential(*layers), size)

        if flags[0]:
            add(Normalize(torch.rand(shape[0]).tolist(), (0.3 + torch.rand(shape[0])).tolist()))
        for seed in blocks:
            self.random.seed(seed)
            add(*self.block(size, depth=0))
        add(nn.Flatten())
        if flags[1]:
            add(self.activation())  # that of a convolution, behind the Flatten
        for seed in linear:
            self.random.seed(seed)
            if self.integer(0, 3) == 0:
                add(Residual(nn.Sequential(nn.Linear(size[0], 4), self.activation(), nn.Linear(4, size[0]))))
            add(nn.Linear(size[0], self.integer(1, 8), bias=self.flag()), self.activation())
        add(nn.Linear(size[0], classes))
        if flags[2] and self.flag():
            add(self.activation())  # nothing to fold the margins into
        return chain

    def activation(self):
        kinds = [nn.ReLU] * 6 + [nn.Identity, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Dropout]
        return self.either(*kinds)()

    def block(self, shape, depth):
        """Layers that take a map and give one."""
        kinds = ["convolution"] * 3 + ["pool", "pool", "pad", "norm", "activation_block"] + ["residual"] * (2 - depth)
        return getattr(self, self.either(*kinds))(shape, depth)

    def convolution(self, shape, depth=0):
        channels, height, width = shape
        groups = self.either(*[g for g in (1, 1, 2, 3) if channels % g == 0])
        kernel = (self.integer(1, min(4, height)), self.integer(1, min(4, width)))
        options = {"groups": groups, "bias": self.flag()}
        if self.flag() and self.flag():
            options["padding"] = "same"
        else:
            options |= {
                "stride": (self.integer(1, 2), self.integer(1, 3)),
                "padding": (self.integer(0, 2), self.integer(0, 1)),
            }
            if 2 * kernel[0] - 1 <= height and self.flag():
                options["dilation"] = (2, 1)
        rows, columns = shape_after(nn.Conv2d(channels, groups, kernel, **options), shape)[1:]
        outputs = groups * self.integer(1, max(1, min(4, LARGEST // (groups * rows * columns))))
        layers = [nn.Conv2d(channels, outputs, kernel, **options)]
        if self.integer(0, 3) == 0:
            layers.append(batch_norm(outputs, affine=self.flag()))
        return [*layers, self.activation()]

    def pool(self, shape, depth=0):
        kernel = (self.integer(1, min(3, shape[1])), self.integer(1, min(3, shape[2])))
        stride, padding = (self.integer(1, 2), self.integer(1, 2)), tuple(self.integer(0, k // 2) for k in kernel)
        if self.flag():
            return [nn.AvgPool2d(kernel, stride, padding, count_include_pad=self.flag())]
        dilation = (2, 1) if 2 * kernel[0] - 1 <= shape[1] and self.flag() else 1
        return [nn.MaxPool2d(kernel, stride, padding, dilation)]

    def pad(self, shape, depth=0):
        border = tuple(self.integer(-1 if shape[1 + axis] > 3 else 0, 1) for axis in (1, 1, 0, 0))
        return [nn.ZeroPad2d(border) if self.flag() else nn.ConstantPad2d(border, self.either(0.3, -1.0))]

    def norm(self, shape, depth=0):
        return [batch_norm(shape[0], affine=self.flag())]

    def activation_block(self, shape, depth=0):
        return [self.activation()]

    def residual(self, shape, depth):
        channels = shape[0]
        kind = self.either("plain", "downsampling", "any")
        if kind == "any":  # a body of any layers that keeps the shape
            body = nn.Sequential(*self.block(shape, depth + 1))
            body.extend(self.block(shape_after(body, shape), depth + 1) if self.flag() else [])
            if shape_after(body, shape) == shape:
                return [Residual(body, self.either(None, nn.Sigmoid(), nn.ReLU()))]
        stride = 2 if kind == "downsampling" else 1
        outputs = channels if stride == 1 else self.integer(1, 3)
        body = [nn.Conv2d(channels, outputs, 3, stride, padding=1), self.activation()]
        if depth < 1 and self.flag():
            body.append(Residual(nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1), self.activation())))
        if self.flag():
            body += [nn.Conv2d(outputs, outputs, 3, padding="same"), batch_norm(outputs)]
        shortcut = None
        if stride == 2:
            shortcut = nn.Sequential(nn.Conv2d(channels, outputs, 1, stride, bias=False), self.activation())
        elif self.flag():
            shortcut = self.activation()
        return [Residual(nn.Sequential(*body), shortcut), *([self.activation()] if self.flag() else [])]


def shape_after(module, shape):
    with torch.no_grad():
        return tuple(module.to(torch.float32).eval()(torch.zeros(1, *shape)).shape[1:])


def batch_norm(channels, affine=True):
    layer = nn.BatchNorm2d(channels, affine=affine)
    with torch.no_grad():
        layer.running_mean.copy_(0.3 * torch.randn(channels))
        layer.running_var.copy_(0.5 + torch.rand(channels))
        if affine:
            layer.weight.copy_(torch.randn(channels))
            layer.bias.copy_(torch.randn(channels))
    return layer
