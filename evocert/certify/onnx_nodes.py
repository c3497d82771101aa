"""ONNX op types that can be read: one table. A new one is a function here, from a node to its value, and one line in ``OPS``.

A function reads all it needs of the node: an attribute that it does not ask for is refused. What it raises as InputError says
what is wrong with the node; whoever calls it adds file and node.
"""

import math
from collections.abc import Callable

import numpy as np
import onnx
import torch
from torch import nn

from evocert.certify import onnx_windows
from evocert.certify.onnx_arithmetic import Arithmetic, Kind, scaled_linear
from evocert.certify.onnx_values import Index, Node, Value, added, elementwise, then

# Some exporters write an open end of a clamp as the largest float32 number.
LARGEST = float(np.finfo(np.float32).max)


def _gemm(node: Node) -> Value:
    value, weight = node.value(), node.weight(1, 2)
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    index = value.index.T if node.attribute("transA", 0) else value.index
    node.need(
        index.ndim == 2 and len(index) == 1,
        f"an input of shape {list(value.index.shape)}; supported is one row: flatten it",
    )
    weight = weight if node.attribute("transB", 0) else weight.T
    bias = None
    if node.constant(2) is not None:
        given = node.weight(2)
        node.need(_fits(given, (1, len(weight))), f"C of shape {list(given.shape)} beside {len(weight)} outputs")
        bias = given.expand(1, len(weight))[0]
    return _linear(node, value, index, weight, bias, alpha, beta)


def _mat_mul(node: Node) -> Value:
    value, weight = node.value(), node.weight(1, 2)
    index = value.index
    node.need(
        math.prod(index.shape[:-1]) == 1, f"an input of shape {list(index.shape)}; supported is one row: flatten it"
    )
    return _linear(node, value, index, weight.T, None, 1.0, 1.0)


def _linear(
    node: Node,
    value: Value,
    index: Index,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
) -> Value:
    """``alpha * weight x + beta * bias`` for the elements x at ``index``: weight ``[out, in]``, bias ``[out]``."""
    node.need(
        weight.shape[1] == index.size,
        f"weights for {weight.shape[1]} inputs, given {index.size}: allowed is the same number",
    )
    # Columns in the order in which the layers give the elements.
    columns = torch.empty_like(weight)
    columns[:, torch.from_numpy(index.ravel())] = weight
    result = then(value.flat(), *scaled_linear(columns, bias, alpha, beta))
    return Value(result.index.reshape(*index.shape[:-1], -1), result.shape, result.before, result.pieces)


def _fits(constant: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a constant is broadcast to this shape, and this shape not to a larger one."""
    try:
        return tuple(torch.broadcast_shapes(constant.shape, shape)) == shape
    except RuntimeError:
        return False


def _add(node: Node) -> Value:
    one, other = node.inputs[:2]
    if isinstance(one, Value) and isinstance(other, Value):
        for place in range(2):
            node.value(place)
        return added(one, other)
    value, constant = _with_constant(node)
    return _arithmetic(node, value, ("add", constant))


def _subtract(node: Node) -> Value:
    from_constant = not isinstance(node.inputs[0], Value)
    value, constant = _with_constant(node)
    if from_constant:
        return _arithmetic(node, value, ("multiply", -torch.ones_like(constant)), ("add", constant))
    return _arithmetic(node, value, ("add", -constant))


def _multiply(node: Node) -> Value:
    value, constant = _with_constant(node)
    return _arithmetic(node, value, ("multiply", constant))


def _divide(node: Node) -> Value:
    node.need(
        isinstance(node.inputs[0], Value), "it divides by what is computed from the images; supported is a constant"
    )
    value, constant = _with_constant(node)
    return _arithmetic(node, value, ("divide", constant))


def _with_constant(node: Node) -> tuple[Value, torch.Tensor]:
    """The value and the constant of an elementwise node with both, the constant in the order and shape of the layers' numbers.

    A constant for each channel is ``[C]``; for a constant for each pixel the map is flattened, and it is ``[F]``.
    """
    if not isinstance(node.inputs[0], Value):
        node.inputs.reverse()
    value, given = node.value(), node.weight(1)
    shape = value.index.shape
    node.need(
        _fits(given, shape),
        f"a constant of shape {list(given.shape)} beside {list(shape)}; supported is one that fits in",
    )
    constant = torch.empty(value.index.size)
    constant[torch.from_numpy(value.index.ravel())] = given.expand(shape).flatten()
    if len(value.shape) == 1:
        return value, constant
    channels = constant.reshape(value.shape[0], -1)
    if bool((channels == channels[:, :1]).all()):
        return value, channels[:, 0]
    return value.flat(), constant


def _arithmetic(node: Node, value: Value, *steps: tuple[Kind, torch.Tensor]) -> Value:
    pieces = [Arithmetic(kind, constant, images=len(value.shape) == 3) for kind, constant in steps]
    for piece in pieces:
        node.need(piece.obstacle is None, str(piece.obstacle))
    return elementwise(value, *pieces)


def _activation(layer: Callable[[], nn.Module]) -> Callable[[Node], Value]:
    return lambda node: elementwise(node.value(), layer())


def _leaky_relu(node: Node) -> Value:
    slope = node.attribute("alpha", 0.01)
    node.need(0 <= slope <= 1, f"alpha={slope:.6g}; supported is 0 to 1")
    return elementwise(node.value(), nn.LeakyReLU(slope))


def _clip(node: Node) -> Value:
    ends = []
    for place, name, none in ((1, "min", -LARGEST), (2, "max", LARGEST)):
        end = node.attribute(name)
        end = node.number(place) if end is None else end
        ends.append(None if end is None or end / none >= 1 else end)
    value, (low, high) = node.value(), ends
    if low is None and high is None:
        return value
    if low == 0 and high is None:
        return elementwise(value, nn.ReLU())
    if low is None or high is None or not low < high:
        node.refuse(f"min={low}, max={high}; supported are min < max, or min=0 alone")
    return elementwise(value, nn.Hardtanh(low, high))


def _batch_norm(node: Node) -> Value:
    value = node.image()
    scale, shift, mean, variance = (node.weight(i, 1) for i in range(1, 5))
    eps = node.attribute("epsilon", 1e-5)
    node.attribute("momentum")  # of training
    node.need(not node.attribute("training_mode", 0), "training_mode=1; supported is 0")
    node.need(node.attribute("spatial", 1) == 1, "spatial=0; supported is 1")
    node.need(bool((variance.double() + eps > 0).all()), "variances below 0")
    sizes = [len(t) for t in (scale, shift, mean, variance)]
    node.need(
        sizes == [value.shape[0]] * 4,
        f"parameters of {sizes} channels for {value.shape[0]}: allowed is the same number",
    )
    layer = nn.BatchNorm2d(len(scale), eps=eps)
    layer.load_state_dict({"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}, strict=False)
    return then(value, layer)


def _softmax(node: Node) -> Value:
    """Left out: it has no bound, and is allowed as the last node, where the largest output is the largest logit's."""
    value = node.value()
    axis = node.attribute("axis", -1)
    node.need(
        value.index.ndim == 2 and axis in (1, -1),
        f"axis={axis} of {list(value.index.shape)}; supported are the classes of [N, K]",
    )
    return Value(value.index, value.shape, value, last=node.op)


def _same(node: Node) -> Value:
    return node.moved()


def _dropout(node: Node) -> Value:
    node.attribute("ratio"), node.attribute("seed")
    training = node.constant(2)
    node.need(training is None or not training.any(), "training_mode=1; supported is 0")
    return node.moved()


def _cast(node: Node) -> Value:
    to = node.attribute("to")
    node.attribute("saturate")
    name = onnx.TensorProto.DataType.Name(to)
    node.need(to == onnx.TensorProto.FLOAT, f"to={name}; supported is FLOAT, since all is computed in float32")
    return node.moved()


def _flatten(node: Node) -> Value:
    shape = node.moved().index.shape
    axis = node.attribute("axis", 1)
    return node.moved(lambda index: index.reshape(math.prod(shape[: axis + len(shape) if axis < 0 else axis]), -1))


def _reshape(node: Node) -> Value:
    shape = node.integers("shape", 1)
    node.need(shape is not None, "the new shape is missing")
    keeps = not node.attribute("allowzero", 0)
    before = node.moved().index.shape
    new = [before[i] if n == 0 and keeps else n for i, n in enumerate(shape or [])]
    return node.moved(lambda index: index.reshape(new))


def _transpose(node: Node) -> Value:
    order = node.attribute("perm")
    return node.moved(lambda index: index.transpose(order))


def _squeeze(node: Node) -> Value:
    axes = node.integers("axes", 1)
    return node.moved(lambda index: index.squeeze(None if axes is None else tuple(axes)))


def _unsqueeze(node: Node) -> Value:
    axes = node.integers("axes", 1)
    return node.moved(lambda index: np.expand_dims(index, tuple(axes or ())))


OPS: dict[str, Callable[[Node], Value]] = {
    "Add": _add,
    "AveragePool": onnx_windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Conv": onnx_windows.conv,
    "Div": _divide,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": onnx_windows.global_average_pool,
    "GlobalMaxPool": onnx_windows.global_max_pool,
    "Identity": _same,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _softmax,
    "MatMul": _mat_mul,
    "MaxPool": onnx_windows.max_pool,
    "Mul": _multiply,
    "Pad": onnx_windows.pad,
    "ReduceMean": onnx_windows.reduce_mean,
    "Relu": _activation(nn.ReLU),
    "Reshape": _reshape,
    "Sigmoid": _activation(nn.Sigmoid),
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Sub": _subtract,
    "Tanh": _activation(nn.Tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
