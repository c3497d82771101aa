"""One table: what the bounds know of each activation. A new activation is one entry here and one in ``read.MODULES``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ElementwiseActivation:
    """An activation that is monotone and never falls, so that an interval's image is the interval of its ends' images.

    Attributes:
        function: the activation itself, ``function(x, *arguments)``, any shape.
        in_place: the same, free to overwrite x; the default is ``function``.
    """

    function: Callable[..., Tensor]
    in_place: Callable[..., Tensor] | None = None

    def overwrite(self, x: Tensor, *arguments: float) -> Tensor:
        return (self.in_place or self.function)(x, *arguments)


def _aligned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same on memory in ``[P, B, ...]`` order, where each member's block is a multiple of ``tiles.LANES`` numbers.

    torch rounds these functions otherwise in the numbers that are left over at the end of a block, so a member's bits would
    depend on its place among the others.
    """
    return lambda x: function(x.contiguous())


ACTIVATIONS: dict[str, ElementwiseActivation] = {
    "relu": ElementwiseActivation(F.relu, F.relu_),
    "leaky_relu": ElementwiseActivation(F.leaky_relu),  # argument: negative slope >= 0, checked when it is read
    "hardtanh": ElementwiseActivation(F.hardtanh),  # arguments: lower and upper end
    "sigmoid": ElementwiseActivation(_aligned(torch.sigmoid)),
    "tanh": ElementwiseActivation(_aligned(torch.tanh)),
}
