"""ONNX nodes that work on windows of a map: convolutions, pooling, padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from evocert.certify.onnx_values import Node, Value, then

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Window:
    """A kernel's places on a map: each of (height, width)."""

    size: Pair
    kernel: Pair
    stride: Pair
    dilation: Pair
    begin: Pair  # padding at the top and at the left
    end: Pair  # at the bottom and at the right

    def __str__(self) -> str:
        return f"pads={[*self.begin, *self.end]} for a kernel {list(self.kernel)}"

    def count(self, end: Pair) -> Pair:
        """How many windows there are with this padding at the bottom and at the right."""
        down, right = self.room(end)
        return down // self.stride[0] + 1, right // self.stride[1] + 1

    def room(self, end: Pair) -> Pair:
        """How far the first window can move down and to the right with this padding there."""
        down, right = (
            self.size[i] + self.begin[i] + end[i] - self.dilation[i] * (self.kernel[i] - 1) - 1 for i in range(2)
        )
        return down, right

    @property
    def pools_alike(self) -> bool:
        """Whether torch's own padding of pooling, equal on both sides and of half a kernel at most, gives the same windows."""
        fits = all(0 <= b <= k // 2 for b, k in zip(self.begin, self.kernel, strict=True))
        return fits and self.count(self.begin) == self.count(self.end)

    @property
    def border(self) -> nn.ConstantPad2d:
        """The padding as a layer of zeros."""
        return nn.ConstantPad2d((self.begin[1], self.end[1], self.begin[0], self.end[0]), 0.0)


def _window(node: Node, value: Value, kernel: Sequence[int]) -> _Window:
    """The attributes that convolutions and pooling have in common."""
    _, height, width = value.shape
    node.need(len(kernel) == 2, f"a kernel of {len(kernel)} dimensions; supported are 2")
    strides = node.attribute("strides") or [1, 1]
    dilations = node.attribute("dilations") or [1, 1]
    pads = node.attribute("pads") or [0, 0, 0, 0]
    mode = node.attribute("auto_pad", "NOTSET")
    node.need(
        len(strides) == len(dilations) == 2 and len(pads) == 4,
        "strides, dilations or pads that are not those of 2 dimensions",
    )
    node.need(
        min(*strides, *dilations) >= 1 and min(pads) >= 0, f"strides={strides}, dilations={dilations}, pads={pads}"
    )
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        # As many windows as strides fit into the map; the odd pixel of padding goes to the side that the name says.
        totals = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip((height, width), strides, kernel, dilations, strict=True)
        ]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = less + more if mode == "SAME_UPPER" else more + less
    elif mode == "VALID":
        pads = [0, 0, 0, 0]
    else:
        node.need(mode == "NOTSET", f"auto_pad={mode}")
    (a, b), (s, t), (d, e), (top, left, bottom, right) = kernel, strides, dilations, pads
    return _Window((height, width), (a, b), (s, t), (d, e), (top, left), (bottom, right))


def conv(node: Node) -> Value:
    value = node.image()
    weight = node.weight(1, 4)
    bias = node.weight(2, 1) if node.constant(2) is not None else None
    groups = node.attribute("group", 1)
    kernel = node.attribute("kernel_shape") or weight.shape[2:]
    node.need(tuple(kernel) == tuple(weight.shape[2:]), f"kernel_shape={kernel} beside weights of {list(weight.shape)}")
    window = _window(node, value, kernel)
    alike = window.begin == window.end
    # skip_init: the constructor would draw from the global generator.
    layer = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1] * groups,
        weight.shape[0],
        window.kernel,
        stride=window.stride,
        padding=window.begin if alike else 0,
        dilation=window.dilation,
        groups=groups,
        bias=bias is not None,
    )
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        node.need(len(bias) == len(weight), f"a bias of {len(bias)} numbers for {len(weight)} channels")
        layer.bias = nn.Parameter(bias)
    return then(value, layer) if alike else then(value, window.border, layer)


def max_pool(node: Node) -> Value:
    value = node.image()
    window = _pooling(node, value)
    node.attribute("storage_order")  # of the second output, which is refused where it is used
    node.need(
        window.pools_alike,
        f"{window}; supported are pads that are equal on both sides, of half a kernel at most",
    )
    return then(value, nn.MaxPool2d(window.kernel, window.stride, window.begin, window.dilation))


def average_pool(node: Node) -> Value:
    value = node.image()
    counted = bool(node.attribute("count_include_pad", 0))
    window = _pooling(node, value)
    node.need(window.dilation == (1, 1), f"dilations={list(window.dilation)}; supported is 1")
    if window.pools_alike:
        return then(value, nn.AvgPool2d(window.kernel, window.stride, window.begin, count_include_pad=counted))
    node.need(
        counted,
        f"{window} with count_include_pad=0; supported are pads that are equal on both sides, of half a kernel at most",
    )
    return then(value, window.border, nn.AvgPool2d(window.kernel, window.stride))


def _pooling(node: Node, value: Value) -> _Window:
    ceiling = node.attribute("ceil_mode", 0)
    kernel = node.attribute("kernel_shape")
    node.need(kernel is not None, "kernel_shape is missing")
    window = _window(node, value, kernel)
    node.need(
        not ceiling or not any(r % s for r, s in zip(window.room(window.end), window.stride, strict=True)),
        "ceil_mode=1 where it adds windows; supported is 0",
    )
    return window


def global_average_pool(node: Node) -> Value:
    value = node.image()
    return then(value, nn.AvgPool2d(_size(value)))


def global_max_pool(node: Node) -> Value:
    value = node.image()
    return then(value, nn.MaxPool2d(_size(value)))


def _size(value: Value) -> Pair:
    _, height, width = value.shape
    return height, width


def reduce_mean(node: Node) -> Value:
    """As ``mean((2, 3))`` is written: a global average."""
    value = node.image()
    axes = node.integers("axes", 1)
    node.need(
        axes is not None and sorted(a % 4 for a in axes) == [2, 3],
        f"axes={axes}; supported are height and width, [2, 3]",
    )
    keep = node.attribute("keepdims", 1)
    node.need(not node.attribute("noop_with_empty_axes", 0), "noop_with_empty_axes=1")
    pooled = then(value, nn.AvgPool2d(_size(value)))
    return pooled if keep else Value(pooled.index[:, :, 0, 0], pooled.shape, pooled)


def pad(node: Node) -> Value:
    value = node.image()
    mode = node.attribute("mode", "constant")
    node.need(mode == "constant", f"mode={mode}; supported is constant")
    pads = node.integers("pads", 1) or []
    filling = node.attribute("value", 0.0)
    if (given := node.number(2)) is not None:
        filling = given
    axes = node.integers("axes", 3)
    axes = list(range(4)) if axes is None else [a % 4 for a in axes]
    node.need(len(pads) == 2 * len(axes), f"{len(pads)} pads for {len(axes)} dimensions")
    begin, end = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        begin[axis], end[axis] = pads[i], pads[len(axes) + i]
    node.need(begin[:2] == end[:2] == [0, 0], f"pads={pads}; supported are those of height and width")
    node.need(bool(torch.tensor(filling).isfinite()), f"a border of {filling}; allowed is a finite number")
    sides = (begin[3], end[3], begin[2], end[2])
    return then(value, nn.ConstantPad2d(sides, filling)) if any(sides) else value
