"""How a network's random weights are drawn, beyond its layers' own way. A new way is one function and one line."""

import math
from collections.abc import Callable

import torch
from torch import nn


def default(module: nn.Module) -> None:
    """As its layers do it themselves."""


def shi(module: nn.Module) -> None:
    """Weights of standard deviation ``sqrt(2 pi) / fan_in``, by which interval bounds keep their width from layer to layer.

    Shi et al. 2021, arXiv:2102.10356. The last layer keeps its own initialisation, as nothing is bounded behind
    it, and biases keep theirs, as they do not widen a bound.
    """
    affine = [child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for child in affine[:-1]:
            child.weight.normal_(0.0, math.sqrt(2 * math.pi) / child.weight[0].numel())


INITIALISATIONS: dict[str, Callable[[nn.Module], None]] = {"default": default, "shi": shi}
