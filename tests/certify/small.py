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
    """The first network from this seed on whose image has a margin that is worth attacking."""
    random = Random(f"{kind} {seed}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        while True:
            torch.manual_seed(random.getrandbits(32))
            shape, layers = _LAYERS[kind](random)
            module = nn.Sequential(*layers).double().eval()
            for parameter in module.parameters():
                parameter *= 2
            image = torch.rand(1, *shape, dtype=torch.float64)
            image = (1.4 * image - 0.2).clamp(0, 1)  # some pixels at the ends, where the box is cut
            logits = module(image)[0].sort(descending=True).values
            if logits[0] - logits[1] > 0.05:
                break
        network = read_network(module, shape)
        members = network.bind(flat_parameters(module).unsqueeze(0))
        return Small(module, members, image, int(module(image)[0].argmax()))


def _dense(random, activation=nn.ReLU):
    widths = [4, random.randint(2, 5), random.randint(2, 4), 3]
    layers = [nn.Flatten(), nn.Linear(widths[0], widths[1]), activation(), nn.Linear(widths[1], widths[2]), activation()]
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


def worst(small, eps):
    """The least margin in the box, exactly: the least over all patterns of signs, each a linear program in the inputs."""
    lower, upper = (end.flatten().numpy() for end in small.box(eps))
    shape, count = small.image.shape[1:], small.image.numel()
    base = torch.cat([torch.zeros(1, count), torch.eye(count)]).reshape(-1, *shape).double()
    sizes = [each.shape[1] for each in run(small.module, base)[1]]
    ends = np.cumsum(sizes)
    least = np.inf

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


def critical(small):
    """The radius from which on the network breaks, or None where it does not break in the whole space of images."""
    if worst(small, 1.0) > 0:
        return None
    return scipy.optimize.brentq(lambda eps: worst(small, eps), 0.0, 1.0, xtol=1e-7)
