"""What can be read: one table of modules, and one of functions that stand for a module.

A new kind of layer is a function here that says what it is in ``layers``, and one line in ``MODULES``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from evocert import modules
from evocert.bounds.layers import (
    Activation,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Normalize,
    Pad,
    Shape,
    Slot,
)  # fmt: skip


class UnsupportedLayer(ValueError):  # noqa: N818 (the name says what it is, as in the field)
    """A layer, or a use of one, that has no bound: the message names it, its place in the module, and what is supported."""


@dataclass(frozen=True)
class Call:
    """One layer's call, as the table's functions see it."""

    module: nn.Module
    place: str
    shape: Shape
    output_shape: Shape
    offsets: dict[int, int]

    def slot(self, name: str) -> Slot:
        parameter = getattr(self.module, name)
        if id(parameter) not in self.offsets:
            raise UnsupportedLayer(f"{self.what}: its {name} is not a parameter of its own (weight_norm and the like)")
        return Slot(self.offsets[id(parameter)], tuple(parameter.shape))

    def optional_slot(self, name: str) -> Slot | None:
        return None if getattr(self.module, name) is None else self.slot(name)

    @property
    def what(self) -> str:
        return f"{type(self.module).__name__} at {self.place!r}"

    @property
    def common(self) -> tuple[str, Shape, Shape]:
        return self.place, self.shape, self.output_shape

    def need(self, condition: bool, allowed: str) -> None:
        if not condition:
            raise UnsupportedLayer(f"{self.what} on an input of shape {list(self.shape)}: {allowed}")


def _conv2d(call: Call) -> Layer:
    conv: Any = call.module
    call.need(conv.padding_mode == "zeros", f"padding_mode={conv.padding_mode!r}, allowed is 'zeros'")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    if isinstance(conv.padding, str):
        # torch's own order for 'same': the odd one goes to the bottom and to the right.
        total = [
            d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in total)
    else:
        top, left = bottom, right = conv.padding
    padding = (top, bottom, left, right)
    weight, bias = call.slot("weight"), call.optional_slot("bias")
    return Conv2d(*call.common, weight, bias, tuple(conv.stride), padding, tuple(conv.dilation), conv.groups)


def _linear(call: Call) -> Layer:
    call.need(len(call.shape) == 1, "allowed is a vector: put a Flatten before it")
    return Linear(*call.common, call.slot("weight"), call.optional_slot("bias"))


def _normalize(call: Call) -> Layer:
    mean, std = (getattr(call.module, name).flatten().tolist() for name in ("mean", "std"))
    call.need(all(s > 0 for s in std), f"std={std}, allowed is positive")
    call.need(len(call.shape) == 3 and len(mean) in (1, call.shape[0]), f"allowed is [C, H, W] with C = {len(mean)}")
    return Normalize(*call.common, tuple(mean), tuple(std))


def _flatten(call: Call) -> Layer | None:
    call.need((call.module.start_dim, call.module.end_dim) == (1, -1), "allowed are start_dim=1, end_dim=-1")
    return Flatten(*call.common) if len(call.shape) > 1 else None


def _activation(name: str, *attributes: str) -> Callable[[Call], Layer]:
    def read(call: Call) -> Layer:
        arguments = tuple(float(getattr(call.module, a)) for a in attributes)
        call.need(name != "leaky_relu" or 0 <= arguments[0] <= 1, f"negative_slope={arguments[:1]}, allowed is 0 to 1")
        return Activation(*call.common, name, arguments)

    return read


def _batch_norm(call: Call) -> Layer:
    norm: Any = call.module
    call.need(norm.running_mean is not None, "track_running_stats=False, allowed are statistics that are kept")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    mean, std = norm.running_mean.tolist(), (norm.running_var + norm.eps).sqrt().tolist()
    return BatchNorm2d(*call.common, tuple(mean), tuple(std), call.optional_slot("weight"), call.optional_slot("bias"))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _avg_pool(call: Call) -> Layer:
    pool: Any = call.module
    call.need(not pool.ceil_mode, "ceil_mode=True, allowed is False")
    call.need(pool.divisor_override is None, f"divisor_override={pool.divisor_override}, allowed is None")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    kernel, stride, padding = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))
    return AvgPool2d(*call.common, kernel, stride, padding, pool.count_include_pad)


def _max_pool(call: Call) -> Layer:
    pool: Any = call.module
    call.need(not pool.ceil_mode, "ceil_mode=True, allowed is False")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    kernel, stride, padding, dilation = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return MaxPool2d(*call.common, kernel, stride, padding, dilation)


def _pad(call: Call) -> Layer:
    pad: Any = call.module
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    value = float(getattr(pad, "value", 0.0))
    call.need(math.isfinite(value), f"value={value}, allowed is finite")
    return Pad(*call.common, tuple(pad.padding), value)


def _nothing(call: Call) -> None:
    return None


MODULES: dict[type[nn.Module], Callable[[Call], Layer | None]] = {
    modules.Normalize: _normalize,
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.ReLU: _activation("relu"),
    nn.LeakyReLU: _activation("leaky_relu", "negative_slope"),
    nn.Hardtanh: _activation("hardtanh", "min_val", "max_val"),
    nn.ReLU6: _activation("hardtanh", "min_val", "max_val"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Tanh: _activation("tanh"),
    nn.BatchNorm2d: _batch_norm,
    nn.AvgPool2d: _avg_pool,
    nn.MaxPool2d: _max_pool,
    nn.ConstantPad2d: _pad,
    nn.ZeroPad2d: _pad,
    nn.Flatten: _flatten,
    nn.Identity: _nothing,
    nn.Dropout: _nothing,  # as in eval()
    nn.Dropout2d: _nothing,
}

# Functions and methods stand for the module that does the same; its arguments are given in the same order.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu_: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.hardtanh: nn.Hardtanh,
    F.relu6: nn.ReLU6,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch.flatten: nn.Flatten,
    "flatten": nn.Flatten,
    F.avg_pool2d: nn.AvgPool2d,
    F.max_pool2d: nn.MaxPool2d,
    torch.clamp: nn.Hardtanh,
    "clamp": nn.Hardtanh,
}


RENAMED = {"min": "min_val", "max": "max_val"}  # of a clamp, as a Hardtanh
