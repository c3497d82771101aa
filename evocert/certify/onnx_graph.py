"""An ONNX graph -> layers in the order in which they run, or a refusal that names the node."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from evocert.certify.onnx_constants import FOLDED, folded
from evocert.certify.onnx_nodes import OPS
from evocert.certify.onnx_values import Constant, Node, Value, layers_between
from evocert.errors import InputError

OLDEST_OPSET = 7  # before it, arithmetic was broadcast in another way
Shape = tuple[int, int, int]


class Graph:
    """A model's graph, with the batch size 1 wherever that matters: a certificate is of one image at a time.

    Attributes:
        input_name, input_shape: of the images, ``(C, H, W)``.
        output_name, num_classes: of the logits ``[N, K]``.
        layers: what computes them from images ``[B, C, H, W]``.
        left_out: the op type of the closing Softmax that was left out, or None.

    Raises:
        InputError: what is not supported, in a line that names file and node.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.path, self.graph = path, model.graph
        if not self.graph.node:
            self._refuse("its graph is empty, or it is no ONNX model")
        self.opset = self._opset(model)
        self.values: dict[str, Value | Constant | None] = {"": None}
        if self.graph.sparse_initializer:
            self._refuse("sparse initializers are not supported")
        for tensor in self.graph.initializer:
            try:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
            except Exception as error:  # too few numbers for its shape, a type that numpy has not
                self._refuse(f"initializer {tensor.name!r} cannot be read: {one_line(error)}")
        self.input_name, self.input_shape = self._input()
        size = math.prod(self.input_shape)
        images = Value(np.arange(size).reshape(1, *self.input_shape), self.input_shape)
        self.values[self.input_name] = images
        self.output_name = self._output()
        for node in self._needed():
            self._read(node)
        logits = self._logits()
        self.num_classes, self.left_out = logits.index.size, logits.last
        try:
            self.layers: list[nn.Module] = layers_between(images, logits)
        except InputError as error:
            self._refuse(str(error))

    def _refuse(self, what: str) -> NoReturn:
        # Names in the file may hold anything, also what moves a terminal's cursor.
        raise InputError(f"ONNX file {self.path}: {''.join(c if c.isprintable() else '?' for c in what)}")

    def _opset(self, model: onnx.ModelProto) -> int:
        for known in model.opset_import:
            if known.domain in ("", "ai.onnx"):
                if known.version < OLDEST_OPSET:
                    self._refuse(f"opset {known.version}; supported is {OLDEST_OPSET} or later")
                return known.version
        self._refuse("it names no opset of ONNX's own")

    def _input(self) -> tuple[str, Shape]:
        inputs = [value for value in self.graph.input if value.name not in self.values]
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs) or "none"
            self._refuse(f"{len(inputs)} inputs ({names}); allowed is one, the images [N, C, H, W]")
        (value,) = inputs
        kind = value.type.tensor_type
        if value.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape"):
            self._refuse(f"input {value.name!r} has no shape; allowed is [N, C, H, W]")
        sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
        written = (
            "[" + ", ".join(d.dim_param or str(s or "?") for d, s in zip(kind.shape.dim, sizes, strict=True)) + "]"
        )
        name = f"input {value.name!r} {written}"
        if kind.elem_type != onnx.TensorProto.FLOAT:
            found = onnx.TensorProto.DataType.Name(kind.elem_type)
            self._refuse(
                f"{name} is of type {found}; allowed is FLOAT, since a model rounded to float32 is another one"
            )
        if len(sizes) != 4:
            self._refuse(f"{name} is no image; allowed is [N, C, H, W]")
        batch, channels, height, width = sizes
        if channels is None or height is None or width is None:
            self._refuse(f"{name} has a dynamic size; allowed are fixed C, H and W")
        if batch not in (None, 1):
            self._refuse(f"{name} takes {batch} images at a time; allowed is N = 1 or dynamic")
        return value.name, (channels, height, width)

    def _output(self) -> str:
        names = [value.name for value in self.graph.output]
        if len(names) != 1:
            self._refuse(f"{len(names)} outputs ({', '.join(map(repr, names))}); allowed is one, the logits [N, K]")
        return names[0]

    def _needed(self) -> list[onnx.NodeProto]:
        """The nodes on which the output depends, in their order."""
        names, nodes = {self.output_name}, []
        for node in reversed(self.graph.node):
            if not names.isdisjoint(n for n in node.output if n):
                names.update(node.input)
                nodes.append(node)
        return nodes[::-1]

    def _read(self, proto: onnx.NodeProto) -> None:
        kind = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        what = (
            f"{kind} node {proto.name!r}"
            if proto.name
            else f"the {kind} node that gives {', '.join(map(str, proto.output))!r}"
        )
        try:
            for name in proto.input:
                if name not in self.values:
                    raise InputError(f"it takes {name!r}, which nothing before it gives")
            outputs = self._outputs(proto, kind)
        except InputError as error:
            self._refuse(f"{what}: {error}")
        except Exception as error:  # whatever torch, numpy and ONNX object to
            self._refuse(f"{what} cannot be read: {one_line(error)}")
        self.values.update(zip(proto.output, outputs, strict=False))

    def _outputs(self, proto: onnx.NodeProto, kind: str) -> Iterable[Value | Constant]:
        inputs = [self.values[name] for name in proto.input]
        first = inputs[0] if inputs else None
        if kind in ("Shape", "Size") and isinstance(first, Value):
            # Of the value only its shape counts: a constant of that shape serves as well.
            inputs = [first.index]
        constants = [value for value in inputs if not isinstance(value, Value)]
        if kind in FOLDED and len(constants) == len(inputs):
            return folded(proto, constants, self.opset)
        if kind not in OPS:
            raise InputError(f"this op type is not supported; supported are {', '.join(OPS)}")
        if len(constants) == len(inputs):
            raise InputError(
                "it has constants alone as inputs; supported are constants in shapes and in elementwise arithmetic"
            )
        node = Node(proto, inputs)
        value = OPS[kind](node)
        node.all_read()
        return [value]

    def _logits(self) -> Value:
        logits = self.values.get(self.output_name)
        allowed = "allowed are logits [N, K] of K >= 2 classes, computed from the images"
        if not isinstance(logits, Value):
            self._refuse(f"output {self.output_name!r} does not depend on the images; {allowed}")
        shape = logits.index.shape
        if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
            self._refuse(f"output {self.output_name!r} has the shape {list(shape)} for one image; {allowed}")
        if not logits.in_order:
            self._refuse(
                f"output {self.output_name!r} has its elements in another order than the last layer; {allowed}"
            )
        return logits.flat()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
