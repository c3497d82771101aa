"""Sums, products and quotients with constants, as the layers that the bounds know.

No constant is ever multiplied into another layer's weights where float32 would round the result: what is certified is the
network in the file, not one whose weights are near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from evocert.modules import Normalize

Kind = Literal["add", "multiply", "divide"]

LARGEST_DIAGONAL = 4096  # features: the matrix has their square


@dataclass(frozen=True)
class Arithmetic:
    """``x + constant``, ``x * constant`` or ``x / constant``, elementwise.

    Attributes:
        constant: float32 ``[C]`` behind which stand images ``[C, H, W]``, or ``[F]``, behind which stand vectors.
        images: which of the two.
    """

    kind: Kind
    constant: Tensor
    images: bool

    @property
    def obstacle(self) -> str | None:
        """Why there is no layer for it, if so."""
        if not bool(self.constant.isfinite().all()):
            return "a constant with infinite numbers or NaN"
        if not self.images and len(self.constant) > LARGEST_DIAGONAL:
            return (
                f"a constant of {len(self.constant)} numbers for as many features; allowed are up to {LARGEST_DIAGONAL}"
            )
        if self.kind == "divide":
            if bool((self.constant == 0).any()):
                return "a division by 0"
            if not self.images and not _is_float32(1 / self.constant.double()):
                return "a division of features by numbers whose reciprocals float32 rounds; allowed is one of channels"
        return None

    @property
    def nothing(self) -> bool:
        """Whether it changes no input."""
        return bool((self.constant == (0 if self.kind == "add" else 1)).all())


Piece = nn.Module | Arithmetic


def settled(pieces: Sequence[Piece]) -> list[nn.Module]:
    """The layers that compute what the pieces compute one after the other.

    A constant that is added behind a convolution or a linear layer without bias becomes its bias; a mean taken off before a
    division is a :class:`~evocert.modules.Normalize`; all else becomes a layer of its own, none where it changes nothing.
    """
    waiting = [piece for piece in pieces if not (isinstance(piece, Arithmetic) and piece.nothing)]
    layers: list[nn.Module] = []
    while waiting:
        first = waiting.pop(0)
        both = _merged(first, waiting[0]) if waiting else None
        if both is not None:
            layers.append(both)
            waiting.pop(0)
        else:
            layers += _alone(first) if isinstance(first, Arithmetic) else [first]
    return layers


def _merged(first: Piece, second: Piece) -> nn.Module | None:
    """One layer for two pieces, where there is one that computes the same."""
    if not isinstance(second, Arithmetic):
        return None
    if isinstance(first, nn.Conv2d | nn.Linear) and first.bias is None and second.kind == "add":
        first.bias = nn.Parameter(second.constant.clone())
        return first
    if not isinstance(first, Arithmetic):
        return None
    if (first.kind, second.kind) == ("add", "divide") and first.images and bool((second.constant > 0).all()):
        return Normalize((-first.constant).tolist(), second.constant.tolist())
    if (first.kind, second.kind) == ("multiply", "add"):
        return _scaling(first.constant, second.constant, first.images)
    return None


def _alone(piece: Arithmetic) -> list[nn.Module]:
    constant = piece.constant
    zero, one = torch.zeros_like(constant), torch.ones_like(constant)
    if piece.kind == "multiply":
        return [_scaling(constant, None, piece.images)]
    if not piece.images:
        scale, shift = (one, constant) if piece.kind == "add" else (1 / constant, None)
        return [_scaling(scale, shift, images=False)]
    if piece.kind == "add":
        return [Normalize((-constant).tolist(), one.tolist())]
    sign = [] if bool((constant > 0).all()) else [_scaling(constant.sign(), None, images=True)]
    return [Normalize(zero.tolist(), constant.abs().tolist()), *sign]


def _scaling(scale: Tensor, shift: Tensor | None, images: bool) -> nn.Module:
    """``x * scale + shift``: a convolution by channel, or a diagonal matrix."""
    if not images:
        return linear(torch.diag(scale), shift)
    # skip_init: the constructor would draw from the global generator.
    layer = nn.utils.skip_init(nn.Conv2d, len(scale), len(scale), 1, groups=len(scale), bias=shift is not None)
    layer.weight = nn.Parameter(scale.reshape(-1, 1, 1, 1).clone())
    if shift is not None:
        layer.bias = nn.Parameter(shift.clone())
    return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Weight ``[out, in]``, bias ``[out]`` -> the layer that has them."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def scaled_linear(weight: Tensor, bias: Tensor | None, alpha: float, beta: float) -> list[nn.Module]:
    """``alpha * weight x + beta * bias``, in one layer where float32 holds the products, otherwise in two.

    Weight ``[out, in]``, bias ``[out]``. Of the two, the first gives ``weight x`` beside ``bias``, the second their sum.
    """
    products = weight.double() * alpha, None if bias is None else bias.double() * beta
    if all(p is None or _is_float32(p) for p in products):
        return [linear(products[0].float(), None if products[1] is None else products[1].float())]
    identity = torch.eye(len(weight))
    if bias is None:
        return [linear(weight, None), linear(alpha * identity, None)]
    both = torch.cat([weight, torch.zeros_like(weight)]), torch.cat([torch.zeros_like(bias), bias])
    return [linear(*both), linear(torch.cat([alpha * identity, beta * identity], 1), None)]


def _is_float32(numbers: Tensor) -> bool:
    """Whether float32 holds these float64 numbers as they are."""
    return bool((numbers.float().double() == numbers).all())
