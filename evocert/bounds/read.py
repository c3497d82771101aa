"""``nn.Module`` -> ``Network``, or a refusal that names the layer and its place.

The module is traced (torch.fx), so what counts is the order in which layers run and what they are given, not how the
module's attributes are ordered. Then the network read must give the module's own outputs, or it is refused: what the
bounds are about is what the user runs.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.fx
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
    Residual,
    Shape,
    Slot,
)  # fmt: skip
from evocert.bounds.network import Network


class UnsupportedLayer(ValueError):  # noqa: N818 (the name says what it is, as in the field)
    """A layer, or a use of one, that has no bound: the message names it, its place in the module, and what is supported."""


def read_network(module: nn.Module, input_shape: Shape) -> Network:
    """The supported layers of a module, in the order in which they run.

    Args:
        module: any module that is a chain of supported layers; it is read as in ``eval()`` and not changed.
        input_shape: ``(C, H, W)`` of one image.

    Raises:
        UnsupportedLayer: a layer, call or connection that has no bound, or a network whose outputs, once read, differ
            from the module's own (in float64, random weights and inputs).
    """
    try:
        module = _own_copy(module)
    except Exception as error:  # the old weight_norm, lazy layers, the meta device
        raise UnsupportedLayer(
            f"{_first_uncopied(module)} cannot be copied ({_one_line(error)}): its parameters must be its "
            "layers' own, and initialised"
        ) from error
    offsets, total = {}, 0
    for parameter in module.parameters():
        offsets[id(parameter)] = total
        total += parameter.numel()
    reader = _Reader(module, offsets, tuple(input_shape))
    reader.read_all()
    if len(reader.shape) != 1 or reader.shape[0] < 2:
        raise UnsupportedLayer(
            f"{type(module).__name__} gives outputs of shape {list(reader.shape)} for one image: allowed are logits [K] "
            "of K >= 2 classes"
        )
    if total == 0:
        raise UnsupportedLayer(f"{type(module).__name__} has no layer with weights: there is nothing to train")
    network = Network(tuple(reader.layers), total, tuple(input_shape), reader.shape[0])
    _check_outputs(module, network)
    return network


def _own_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.float64).eval().requires_grad_(False)


def _first_uncopied(module: nn.Module) -> str:
    """The innermost layer that cannot be copied, and its place."""
    culprit = type(module).__name__
    for place, child in module.named_modules():
        try:
            _own_copy(child)
        except Exception:  # whatever it was for the whole
            culprit = f"{type(child).__name__} at {place!r}" if place else culprit
    return culprit


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Call:
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


def _conv2d(call: _Call) -> Layer:
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


def _linear(call: _Call) -> Layer:
    call.need(len(call.shape) == 1, "allowed is a vector: put a Flatten before it")
    return Linear(*call.common, call.slot("weight"), call.optional_slot("bias"))


def _normalize(call: _Call) -> Layer:
    mean, std = (getattr(call.module, name).flatten().tolist() for name in ("mean", "std"))
    call.need(all(s > 0 for s in std), f"std={std}, allowed is positive")
    call.need(len(call.shape) == 3 and len(mean) in (1, call.shape[0]), f"allowed is [C, H, W] with C = {len(mean)}")
    return Normalize(*call.common, tuple(mean), tuple(std))


def _flatten(call: _Call) -> Layer | None:
    call.need((call.module.start_dim, call.module.end_dim) == (1, -1), "allowed are start_dim=1, end_dim=-1")
    return Flatten(*call.common) if len(call.shape) > 1 else None


def _activation(name: str, *attributes: str) -> Callable[[_Call], Layer]:
    def read(call: _Call) -> Layer:
        arguments = tuple(float(getattr(call.module, a)) for a in attributes)
        call.need(name != "leaky_relu" or 0 <= arguments[0] <= 1, f"negative_slope={arguments[:1]}, allowed is 0 to 1")
        return Activation(*call.common, name, arguments)

    return read


def _batch_norm(call: _Call) -> Layer:
    norm: Any = call.module
    call.need(norm.running_mean is not None, "track_running_stats=False, allowed are statistics that are kept")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    mean, std = norm.running_mean.tolist(), (norm.running_var + norm.eps).sqrt().tolist()
    return BatchNorm2d(*call.common, tuple(mean), tuple(std), call.optional_slot("weight"), call.optional_slot("bias"))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _avg_pool(call: _Call) -> Layer:
    pool: Any = call.module
    call.need(not pool.ceil_mode, "ceil_mode=True, allowed is False")
    call.need(pool.divisor_override is None, f"divisor_override={pool.divisor_override}, allowed is None")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    kernel, stride, padding = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))
    return AvgPool2d(*call.common, kernel, stride, padding, pool.count_include_pad)


def _max_pool(call: _Call) -> Layer:
    pool: Any = call.module
    call.need(not pool.ceil_mode, "ceil_mode=True, allowed is False")
    call.need(not pool.return_indices, "return_indices=True, allowed is False")
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    kernel, stride, padding, dilation = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return MaxPool2d(*call.common, kernel, stride, padding, dilation)


def _pad(call: _Call) -> Layer:
    pad: Any = call.module
    call.need(len(call.shape) == 3, "allowed is [C, H, W]")
    return Pad(*call.common, tuple(pad.padding), float(getattr(pad, "value", 0.0)))


def _residual(call: _Call) -> Layer:
    parts = []
    for name in ("body", "shortcut"):
        reader = _Reader(nn.Sequential(getattr(call.module, name)), call.offsets, call.shape, f"{call.place}.{name}")
        reader.read_all()
        call.need(
            reader.shape == call.output_shape, f"its {name} gives {list(reader.shape)}, allowed is the same from both"
        )
        parts.append(tuple(reader.layers))
    return Residual(*call.common, *parts)


def _nothing(call: _Call) -> None:
    return None


MODULES: dict[type[nn.Module], Callable[[_Call], Layer | None]] = {
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
    modules.Residual: _residual,
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


_RENAMED = {"min": "min_val", "max": "max_val"}  # of a clamp, as a Hardtanh


class _Reader:
    """Follows the one tensor that runs through the graph."""

    def __init__(self, module: nn.Module, offsets: dict[int, int], shape: Shape, inside: str = "") -> None:
        self.module, self.offsets, self.shape = module, offsets, shape
        self.inside = inside  # of a block: its place, and the module is a Sequential around it
        self.layers: list[Layer] = []
        self.current: torch.fx.Node | None = None
        self.tensors: set[torch.fx.Node] = set()  # the current one and those before it, which have the same batch size
        self.shapes: set[torch.fx.Node] = set()  # nodes that stand for x.shape
        self.sizes: set[torch.fx.Node] = set()  # nodes that stand for x.size(0), the batch size

    def read_all(self) -> None:
        """The whole module."""
        try:
            graph = _Tracer().trace(self.module)
        except Exception as error:  # whatever the user's forward does under tracing
            raise UnsupportedLayer(
                f"{type(self.module).__name__}{self.inside and f' at {self.inside!r}'} cannot be traced ({_one_line(error)}): "
                "its forward must call layers in a fixed order"
            ) from error
        for node in graph.nodes:
            self.read(node)

    def read(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            if self.current is not None:
                self._refuse(f"a second input {node.name!r}", "allowed is one input, the images")
            self.current = node
            self.tensors.add(node)
        elif node.op == "output":
            if node.args[0] is not self.current:
                self._refuse("an output that is not the last layer's", "allowed is one tensor, the logits")
        elif node.op == "call_module":
            target = str(node.target)
            place = self.inside + target.removeprefix("0") if self.inside else target
            self._chain(node, place)
            self._layer(self.module.get_submodule(target), place)
        elif node.op == "get_attr":
            self._refuse(f"direct use of {node.target!r}", f"supported are the layers {_supported()}")
        else:
            self._call(node)

    def _call(self, node: torch.fx.Node) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if self._asks_batch_size(node, name):
            return
        self._chain(node, f"{name} ({node.name})")
        if name in ("view", "reshape"):
            given = (*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input"))
            sizes = given[0] if given and isinstance(given[0], tuple | list) else given
            first, rest = (sizes[0], list(sizes[1:])) if sizes else (None, [])
            features = [math.prod(self.shape)]
            if not ((first in self.sizes and rest in ([-1], features)) or (first == -1 and rest == features)):
                self._refuse(f"{name}{tuple(sizes)} at {node.name!r}", "allowed is (x.size(0), -1), that is, a flatten")
            self._layer(nn.Flatten(), node.name)
        elif name == "dropout" and node.kwargs.get("training", (*node.args, True, True, True)[2]) is False:
            return
        elif (kind := FUNCTIONS.get(node.target)) is not None:
            kwargs = {_RENAMED.get(k, k): v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
            if name == "clamp" and len(node.args) + len(kwargs) < 3:
                self._refuse(f"clamp with one end at {node.name!r}", "allowed is clamp(low, high)")
            if kind is nn.Flatten and len(node.args) == 1:
                kwargs = {"start_dim": 0, **kwargs}  # the module's own default is 1
            try:
                stand_in = kind(*node.args[1:], **kwargs)
            except Exception as error:  # whatever the module objects to
                self._refuse(f"{name} at {node.name!r}", _one_line(error))
            self._layer(stand_in, node.name)
        else:
            self._refuse(f"the call {name} at {node.name!r}", f"supported are the layers {_supported()}")

    def _asks_batch_size(self, node: torch.fx.Node, name: str) -> bool:
        """Whether a call is no layer but a step to the batch size, which ``view`` may be given."""
        source, rest = node.args[0] if node.args else None, node.args[1:]
        if source in self.tensors and ((name == "getattr" and rest == ("shape",)) or (name == "size" and not rest)):
            self.shapes.add(node)
        elif (source in self.tensors and name == "size" and rest == (0,)) or (
            source in self.shapes and name == "getitem" and rest == (0,)
        ):
            self.sizes.add(node)
        else:
            return False
        return True

    def _chain(self, node: torch.fx.Node, what: str) -> None:
        inputs = node.all_input_nodes
        tensors = [n for n in inputs if n not in self.sizes]
        if tensors != [self.current]:
            self._refuse(f"a connection that leaves the chain, at {what}", "each layer must take the one before it")
        self.current = node
        self.tensors.add(node)

    def _layer(self, module: nn.Module, place: str) -> None:
        if type(module) not in MODULES:
            self._refuse(f"{type(module).__name__} at {place!r}", f"supported are {_supported()}")
        try:
            output = module.double()(torch.zeros(1, *self.shape, dtype=torch.float64))
        except Exception as error:  # whatever the layer objects to
            raise UnsupportedLayer(
                f"{type(self.module).__name__}: {type(module).__name__} at {place!r} cannot take an input of shape "
                f"{list(self.shape)}: {_one_line(error)}"
            ) from error
        output_shape = tuple(output.shape[1:])
        layer = MODULES[type(module)](_Call(module, place, self.shape, output_shape, self.offsets))
        if layer is not None:
            self.layers.append(layer)
        self.shape = output_shape

    def _refuse(self, what: str, allowed: str) -> NoReturn:
        raise UnsupportedLayer(f"unsupported in {type(self.module).__name__}: {what}; {allowed}")


def _supported() -> str:
    return ", ".join(kind.__name__ for kind in MODULES)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check_outputs(module: nn.Module, network: Network) -> None:
    """Random weights, so that a zero bias hides nothing; in float64, so that rounding hides nothing either."""
    generator = torch.Generator().manual_seed(0)
    parameters = 0.3 * torch.randn(network.num_parameters, generator=generator, dtype=torch.float64)
    images = torch.rand(3, *network.input_shape, generator=generator, dtype=torch.float64)
    offset = 0
    for parameter in module.parameters():
        parameter.copy_(parameters[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    try:
        expected = module(images)
        found = network.logits(parameters.unsqueeze(0), images)[0]
        difference = f"difference {(found - expected).abs().max().item():.3g}"
        same = torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    except Exception as error:  # whatever a hook made of the outputs
        same, difference = False, _one_line(error)
    if not same:
        raise UnsupportedLayer(
            f"{type(module).__name__} was read as {' -> '.join(layer.kind for layer in network.layers)}, which gives other "
            f"outputs ({difference}): something in its forward is not seen by tracing"
        )
