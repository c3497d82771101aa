"""What the nodes of an ONNX graph take and give while the graph is read.

A value knows where each of its elements lies among the numbers that the layers read so far give. So a node that only moves
elements about (Reshape, Transpose, ...) is no layer, and whoever needs them in order can tell whether they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from evocert.certify.onnx_arithmetic import Piece, settled
from evocert.errors import InputError
from evocert.modules import Residual

Constant = NDArray[Any]
Index = NDArray[np.int64]


class Value:
    """What a node gives for one image.

    Attributes:
        index: of the shape that ONNX gives the value with N = 1: the position of each element among the ``shape`` numbers.
        shape: of what the layers give for one image, ``(C, H, W)`` or ``(F,)``.
        before: the value from which ``pieces`` compute this one; None for the graph's input.
        last: the op type of a Softmax or LogSoftmax that was left out and has to be the last layer.
    """

    def __init__(
        self,
        index: Index,
        shape: tuple[int, ...],
        before: "Value | None" = None,
        pieces: Sequence[Piece] = (),
        last: str | None = None,
    ) -> None:
        self.index, self.shape, self.before, self.pieces, self.last = index, shape, before, list(pieces), last
        self.depth: int = 0 if before is None else before.depth + 1
        self.in_block = False  # whether a residual block has this value inside

    @property
    def in_order(self) -> bool:
        return bool((self.index.ravel() == np.arange(self.index.size)).all())

    @property
    def is_image(self) -> bool:
        """Whether the elements are where ONNX has them in ``[1, C, H, W]``."""
        return self.index.shape == (1, *self.shape) and self.index.ndim == 4 and self.in_order

    def flat(self) -> "Value":
        """The same with layers that give a vector."""
        if len(self.shape) == 1:
            return self
        return Value(self.index, (math.prod(self.shape),), self, [nn.Flatten()], self.last)


class Node:
    """One node with what it takes: values, constants, or None for what is left out."""

    def __init__(self, proto: onnx.NodeProto, inputs: Sequence[Value | Constant | None]) -> None:
        self.op = proto.op_type
        self.inputs = list(inputs)
        self._attributes: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}

    def refuse(self, what: str) -> NoReturn:
        raise InputError(what)

    def need(self, condition: bool, what: str) -> None:
        if not condition:
            self.refuse(what)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, which counts as read: what is not read is refused in the end."""
        value = self._attributes.pop(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def all_read(self) -> None:
        """Raises InputError for an attribute that nobody asked for."""
        self.need(
            not self._attributes, f"the attribute {', '.join(map(str, self._attributes))}, which is not supported"
        )

    def value(self, place: int = 0) -> Value:
        """An input that comes from the images."""
        value = self._input(place)
        if not isinstance(value, Value):
            self.refuse(f"input {place} is a constant or missing; supported is one that is computed from the images")
        self.need(value.last is None, f"it follows a {value.last}, which is allowed as the last node only")
        return value

    def image(self) -> Value:
        """The first input, with its elements in their order as an image: ``value.shape`` is (C, H, W)."""
        value = self.value()
        self.need(value.index.ndim == 4, f"an input of shape {list(value.index.shape)}; supported is [N, C, H, W]")
        self.need(
            value.is_image,
            f"its input {list(value.index.shape)} was flattened, transposed or given a constant for each pixel before; allowed "
            "is a map as a layer gives it",
        )
        return value

    def moved(self, move: Callable[[Index], Index] = lambda index: index) -> Value:
        """The first input with the same elements at other places: ``move`` takes each element's index there."""
        value = self._input(0)
        if not isinstance(value, Value):
            self.refuse("input 0 is a constant or missing; supported is one that is computed from the images")
        try:
            index = move(value.index)
        except ValueError as error:  # numpy's own word on shapes that do not fit
            self.refuse(f"an input of shape {list(value.index.shape)}: {error}")
        return Value(index, value.shape, value, last=value.last)

    def constant(self, place: int) -> Constant | None:
        """A further input, which must not come from the images; None where it is left out."""
        value = self._input(place)
        if isinstance(value, Value):
            self.refuse(f"input {place} is computed from the images; supported is a constant")
        return value

    def weight(self, place: int, *ranks: int) -> torch.Tensor:
        """A constant of finite float32 numbers."""
        constant = self.constant(place)
        if constant is None:
            self.refuse(f"input {place} is missing")
        self.need(
            constant.dtype == np.float32,
            f"input {place} is {constant.dtype}; allowed is float32, since rounded weights are another network's",
        )
        self.need(bool(np.isfinite(constant).all()), f"input {place} has infinite numbers or NaN")
        allowed = " or ".join(map(str, ranks))
        self.need(not ranks or constant.ndim in ranks, f"input {place} of rank {constant.ndim}; supported is {allowed}")
        return torch.from_numpy(np.array(constant, order="C"))

    def number(self, place: int) -> float | None:
        """A constant of one number; None where it is left out."""
        if self._input(place) is None:
            return None
        constant = self.constant(place)
        assert constant is not None
        self.need(constant.size == 1, f"input {place} of shape {list(constant.shape)}; allowed is one number")
        return float(constant.item())

    def integers(self, name: str, place: int) -> list[int] | None:
        """Numbers that are an attribute in older opsets and an input in newer ones; None where they are left out."""
        numbers = self.attribute(name)
        if numbers is None and self._input(place) is not None:
            numbers = self.constant(place)
        return None if numbers is None else [int(n) for n in np.asarray(numbers).ravel()]

    def _input(self, place: int) -> Value | Constant | None:
        return self.inputs[place] if place < len(self.inputs) else None


def then(value: Value, *layers: nn.Module) -> Value:
    """The value that some layers compute from another one, in their own shape.

    Raises:
        InputError: a layer cannot take what it is given, or gives nothing.
    """
    images = torch.zeros(1, *value.shape)
    with torch.no_grad():
        for layer in layers:
            images = layer.eval()(images)
    if images.numel() == 0:
        raise InputError(f"it gives an empty tensor {list(images.shape)}")
    return Value(np.arange(images.numel()).reshape(images.shape), tuple(images.shape[1:]), value, layers)


def elementwise(value: Value, *pieces: Piece) -> Value:
    """The value that layers compute from another one which leave each element where it is."""
    return Value(value.index, value.shape, value, pieces)


def added(one: Value, other: Value) -> Value:
    """The sum of two values, as a residual block that starts where their ways from the input part.

    Raises:
        InputError: another shape or order of elements, or blocks that overlap.
    """
    if one.index.shape != other.index.shape:
        raise InputError(
            f"shapes {list(one.index.shape)} and {list(other.index.shape)}; allowed is a sum of equal shapes"
        )
    if one.shape != other.shape:
        one, other = one.flat(), other.flat()
    if one.shape != other.shape or not np.array_equal(one.index, other.index):
        raise InputError("a sum of two branches whose elements were moved in different ways; allowed is the same order")
    start, end = one, other
    while start is not end:
        if start.depth < end.depth:
            start, end = end, start
        assert start.before is not None  # all come from the one input
        start = start.before
    # An identity is the shortcut, whichever of the two is written first.
    body, shortcut = (one, other) if one is not start else (other, one)
    block = Residual(
        nn.Sequential(*layers_between(start, body)),
        nn.Sequential(*layers_between(start, shortcut)) if shortcut is not start else None,
    )
    return Value(one.index, one.shape, start, [block.eval()])


def layers_between(start: Value, end: Value) -> list[nn.Module]:
    """The layers that compute ``end`` from ``start``, which comes before it. Values on the way are inside a block from then on.

    Raises:
        InputError: one of them is already inside another block.
    """
    pieces: list[Piece] = []
    while end is not start:
        if end.in_block:
            raise InputError(
                "branches that do not form blocks; supported are chains and residual blocks, of which two may follow each "
                "other or lie one inside the other, but not overlap"
            )
        end.in_block = True
        pieces = [*end.pieces, *pieces]
        assert end.before is not None
        end = end.before
    return settled(pieces)
