"""Networks so small that what is true of them is found by trying every pattern of signs, one linear program each."""

from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import scipy.optimize
import torch
from torch import nn

from evocert.bounds import Box, Members, box_around, read_network
from evocert.modules import Normalize, Residual
from evocert.networks import flat_parameters

KINDS = ("dense", "leaky", "convolutional", "residual")


@dataclass
class Small:
    """One network, float64, and an image ``[1, C, H, W]`` that it gives the label with some margin."""

    module: nn.Module
    members: Members
    image: torch.Tensor
    label: int

    def box(self, eps: float) -> Box:
        return box_around(self.image, eps)

    def breaks(self, point):
        """Whether a point ``[C, H, W]`` is given another class, or a tie."""
        logits = self.module(point.unsqueeze(0))[0]
        return bool((logits[self.label] <= logits[torch.arange(len(logits)) != self.label]).any())


def drawn(kind, seed):
    """A network, and of the images with a margin that is worth attacking that with the least or the middle one."""
    random = Random(f"{kind} {seed}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        while True:
            torch.manual_seed(random.getrandbits(32))
            shape, layers = _LAYERS[kind](random)
            module = nn.Sequential(*layers).double().eval()
            for parameter in module.parameters():
                parameter *= 3 if parameter.ndim > 1 else 1
            images = torch.rand(32, *shape, dtype=torch.float64)
            images = (1.4 * images - 0.2).clamp(0, 1)  # some pixels at the ends, where the box is cut
            two = module(images).topk(2).values
            margins = two[:, 0] - two[:, 1]
            worth = (margins > 0.05).nonzero().flatten()
            if len(worth):
                break
        ordered = worth[margins[worth].argsort()]
        image = images[ordered[seed % 2 * len(ordered) // 2], None]
        network = read_network(module, shape)
        members = network.bind(flat_parameters(module).unsqueeze(0))
        return Small(module, members, image, int(module(image)[0].argmax()))


def _dense(random, activation=nn.ReLU):
    widths = [4, random.randint(2, 4), random.randint(2, 4), 3]
    layers = [
        nn.Flatten(),
        nn.Linear(widths[0], widths[1]),
        activation(),
        nn.Linear(widths[1], widths[2]),
        activation(),
    ]
    return (1, 2, 2), [Normalize([0.4], [0.5]), *layers, nn.Linear(widths[2], 3)]


def _leaky(random):
    return _dense(random, lambda: nn.LeakyReLU(random.choice([0.1, 0.5])))


def _convolutional(random):
    first = nn.Conv2d(1, 2, 2, padding=random.choice([0, (1, 0)]), stride=(1, 2))
    layers = [first, nn.ReLU(), nn.Flatten()]
    size = nn.Sequential(*layers)(torch.zeros(1, 1, 3, 3)).shape[1]
    return (1, 3, 3), [*layers, nn.Linear(size, 2), nn.ReLU(), nn.Linear(2, random.choice([2, 3]))]


def _residual(random):
    body = nn.Sequential(nn.Conv2d(1, 1, (1, 3), padding="same"), nn.ReLU(), nn.Conv2d(1, 1, 1))
    shortcut = random.choice([None, nn.ReLU(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.LeakyReLU(0.2))])
    after = random.choice([[], [nn.ReLU()]])
    return (1, 1, 3), [
        nn.Conv2d(1, 1, 1), Residual(body, shortcut), *after, nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)
    ]  # fmt: skip


_LAYERS = {"dense": _dense, "leaky": _leaky, "convolutional": _convolutional, "residual": _residual}


def run(module, x, signs=None):
    """``x [N, …]`` -> outputs, and what each activation is given ``[N, U]`` in the order in which they run.

    Args:
        signs: for each activation, the signs ``[U]`` that are assumed whatever it is given: then the network is affine.
    """
    given = []

    def activation(layer, x):
        slope = getattr(layer, "negative_slope", 0.0)
        given.append(x.flatten(1))
        positive = x > 0 if signs is None else signs[len(given) - 1].reshape(x.shape[1:]) > 0
        return x * torch.where(positive, 1.0, slope)

    def forward(layer, x):
        if isinstance(layer, nn.Sequential):
            for each in layer:
                x = forward(each, x)
            return x
        if isinstance(layer, Residual):
            return forward(layer.body, x) + (x if layer.shortcut is None else forward(layer.shortcut, x))
        return activation(layer, x) if isinstance(layer, nn.ReLU | nn.LeakyReLU) else layer(x)

    with torch.no_grad():
        return forward(module, x), given


def worst(small, eps, ceiling=np.inf):
    """The least margin in the box, exactly: the least over all patterns of signs, each a linear program in the inputs.

    With a ceiling, only whether the margin falls below it: then any margin below is given, otherwise the ceiling.
    """
    lower, upper = (end.flatten().numpy() for end in small.box(eps))
    shape, count = small.image.shape[1:], small.image.numel()
    base = torch.cat([torch.zeros(1, count), torch.eye(count)]).reshape(-1, *shape).double()
    sizes = [each.shape[1] for each in run(small.module, base)[1]]
    ends = np.cumsum(sizes)
    least = min(ceiling, _sampled(small, eps))  # no pattern above it need be looked at

    @cache
    def affine(signs):
        """Of outputs and of what the activations are given, the constants and the inputs' factors; of whole layers' signs."""
        padded = torch.tensor([*signs, *[1] * (ends[-1] - len(signs))]).split(sizes)
        outputs, given = run(small.module, base, padded)
        return [(each[0].numpy(), (each[1:] - each[0]).T.numpy()) for each in (outputs, torch.cat(given, 1))]

    def minimum(constant, factors):
        return constant + np.minimum(factors * lower, factors * upper).sum(-1)

    def descend(signs):
        """Neuron by neuron: where interval arithmetic leaves one sign, the other is not tried."""
        nonlocal least
        if least < ceiling < np.inf:
            return
        place = len(signs)
        known = place if place == ends[-1] else max([0, *ends[ends <= place]])
        (constants, matrix), (before, factors) = affine(tuple(signs[:known]))
        if place < ends[-1]:
            for sign in (1, -1):
                # Somewhere in the box the neuron must have the sign.
                if minimum(-sign * before[place], -sign * factors[place]) <= 0:
                    descend([*signs, sign])
            return
        sign = np.array(signs)
        for rival in range(len(constants)):
            constant, row = constants[small.label] - constants[rival], matrix[small.label] - matrix[rival]
            if rival == small.label or minimum(constant, row) >= least:
                continue
            found = scipy.optimize.linprog(
                row, A_ub=-sign[:, None] * factors, b_ub=sign * before, bounds=list(zip(lower, upper, strict=True))
            )
            if found.status == 0:
                least = min(least, found.fun + constant)

    descend([])
    return float(least)


def _sampled(small, eps):
    """The least margin at some corners of the box."""
    box, generator = small.box(eps), torch.Generator().manual_seed(0)
    corners = torch.rand(200, *small.image.shape[1:], generator=generator, dtype=torch.float64).round()
    outputs = run(small.module, box.lower + corners * (box.upper - box.lower))[0]
    rivals = outputs[:, torch.arange(outputs.shape[1]) != small.label]
    return float((outputs[:, small.label] - rivals.amax(1)).amin())


def critical(small):
    """The radius from which on the network breaks, or None where it does not break in the whole space of images."""
    low, high = 0.0, 1.0
    if worst(small, high, ceiling=0.0) == 0:
        return None
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if worst(small, middle, ceiling=0.0) < 0 else (middle, high)
    return high
