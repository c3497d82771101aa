"""Nodes that do not depend on the images, computed while the graph is read: shapes, mostly, as exporters write a flatten."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from evocert.certify.onnx_values import Constant

# Only what has one result whoever computes it: whole numbers, moves, and what IEEE 754 rounds in one way. With sums of
# products, such as a MatMul of weights, the weights would be those of this evaluator and not those of the user's.
# fmt: off
FOLDED = frozenset([
    "Abs", "Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten",
    "Floor", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "Not", "Reciprocal", "Reshape",
    "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
])
# fmt: on


def folded(node: onnx.NodeProto, inputs: Sequence[Constant | None], opset: int) -> list[Constant]:
    """The outputs of a node of ``FOLDED`` whose inputs are all constants.

    Raises whatever the evaluator objects to.
    """
    given = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
    graph = helper.make_graph(
        [node],
        "constants",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in given.items()],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):  # what is no number is refused where it is used
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, given)]
