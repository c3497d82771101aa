"""``nn.Module`` -> ``Network``, or a refusal that names the layer and its place.

The module is traced (torch.fx), so what counts is the order in which layers run and what they are given, not how the
module's attributes are ordered. Then the network read must give the module's own outputs, or it is refused: what the
bounds are about is what the user runs.
"""

import copy
import math
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.fx
from torch import nn

from evocert import modules
from evocert.bounds.layers import Layer, Residual, Shape
from evocert.bounds.network import Network
from evocert.bounds.supported import FUNCTIONS, MODULES, RENAMED, Call, UnsupportedLayer


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
        return type(m) in READERS or super().is_leaf_module(m, module_qualified_name)


def _residual(call: Call) -> Layer:
    parts = []
    for name in ("body", "shortcut"):
        reader = _Reader(nn.Sequential(getattr(call.module, name)), call.offsets, call.shape, f"{call.place}.{name}")
        reader.read_all()
        call.need(
            reader.shape == call.output_shape, f"its {name} gives {list(reader.shape)}, allowed is the same from both"
        )
        parts.append(tuple(reader.layers))
    return Residual(*call.common, *parts)


READERS: dict[type[nn.Module], Callable[[Call], Layer | None]] = {**MODULES, modules.Residual: _residual}


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
                f"{self._what} cannot be traced ({_one_line(error)}): its forward must call layers in a fixed order"
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
            self._layer(nn.Flatten(), self._place(node.name))
        elif name == "dropout" and node.kwargs.get("training", (*node.args, True, True, True)[2]) is False:
            return
        elif (kind := FUNCTIONS.get(node.target)) is not None:
            kwargs = {RENAMED.get(k, k): v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
            given = (*node.args, *kwargs.values())
            if name == "clamp" and (len(given) < 3 or None in given):
                self._refuse(f"clamp with one end at {node.name!r}", "allowed is clamp(low, high)")
            if kind is nn.Flatten and len(node.args) == 1:
                kwargs = {"start_dim": 0, **kwargs}  # the module's own default is 1
            try:
                stand_in = kind(*node.args[1:], **kwargs)
            except Exception as error:  # whatever the module objects to
                self._refuse(f"{name} at {node.name!r}", _one_line(error))
            self._layer(stand_in, self._place(node.name))
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
        if type(module) not in READERS:
            self._refuse(f"{type(module).__name__} at {place!r}", f"supported are {_supported()}")
        try:
            output = module.double()(torch.zeros(1, *self.shape, dtype=torch.float64))
        except Exception as error:  # whatever the layer objects to
            raise UnsupportedLayer(
                f"{self._what}: {type(module).__name__} at {place!r} cannot take an input of shape "
                f"{list(self.shape)}: {_one_line(error)}"
            ) from error
        if not isinstance(output, torch.Tensor):
            self._refuse(f"{type(module).__name__} at {place!r} that gives several tensors", "allowed is one")
        output_shape = tuple(output.shape[1:])
        layer = READERS[type(module)](Call(module, place, self.shape, output_shape, self.offsets))
        if layer is not None:
            self.layers.append(layer)
        self.shape = output_shape

    def _place(self, name: str) -> str:
        return f"{self.inside}.{name}" if self.inside else name

    def _refuse(self, what: str, allowed: str) -> NoReturn:
        raise UnsupportedLayer(f"unsupported in {self._what}: {what}; {allowed}")

    @property
    def _what(self) -> str:
        if not self.inside:
            return type(self.module).__name__
        return f"{type(self.module.get_submodule('0')).__name__} at {self.inside!r}"


def _supported() -> str:
    return ", ".join(kind.__name__ for kind in READERS)


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
