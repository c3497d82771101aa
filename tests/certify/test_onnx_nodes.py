"""Hand-built graphs, node by node: the module that is read computes what ONNX Runtime computes from the file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from evocert.bounds import read_network
from evocert.certify.foreign import read_onnx
from evocert.errors import InputError
from evocert.modules import Normalize, Residual
from evocert.networks import flat_parameters

SHAPE = (2, 6, 5)
GENERATOR = np.random.default_rng(0)


def drawn(*shape, low=-1.0, high=1.0):
    return GENERATOR.uniform(low, high, shape).astype(np.float32)


def ints(*numbers):
    return np.array(numbers, dtype=np.int64)


def model_of(nodes, *, shape=("N", *SHAPE), output=("N", "K"), opset=13, kind=TensorProto.FLOAT, outputs=("y",)):
    """Nodes ``(op, inputs, output, attributes)``: an array among the inputs becomes an initializer; the input is "x"."""
    protos, constants = [], []
    for op, inputs, given, *attributes in nodes:
        names = []
        for value in inputs:
            if isinstance(value, np.ndarray):
                constants.append(numpy_helper.from_array(value, f"constant{len(constants)}"))
                value = constants[-1].name
            names.append(value)
        name = f"the_{op}" if all(p.op_type != op for p in protos) else f"the_{op}_of_{given}"
        protos.append(helper.make_node(op, names, [given], name=name, **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        protos,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def read(model, folder):
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return read_onnx(path)


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"x": image[None].numpy()})[0]) for image in images])


def check(model, folder):
    """Reads a model, and returns it if it is right, also far outside [0, 1], and the bounds take it."""
    found = read(model, folder)
    images = 6 * torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1)) - 3
    expected = run(model, images)
    torch.testing.assert_close(found.module(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not found.module.training
    assert {p.dtype for p in found.module.parameters()} == {torch.float32}
    network = read_network(found.module, found.input_shape)
    by_bounds = network.logits(flat_parameters(found.module).unsqueeze(0), images)[0]
    torch.testing.assert_close(by_bounds, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (found.input_shape, found.num_classes) == (SHAPE, expected.shape[1])
    return found


def kinds(found):
    return [type(layer).__name__ for layer in found.module]


def head(before, features=60):
    return [("Flatten", [before], "flat"), ("Gemm", ["flat", drawn(features, 3), drawn(3)], "y")]


def after_image(*nodes, features=60):
    """Nodes from "x" to "h", then Flatten and Gemm."""
    return [*nodes, *head("h", features)]


def after_features(*nodes):
    """Flatten and Gemm from "x" to "f", of 4 features, then nodes to "y"."""
    return [("Flatten", ["x"], "flat"), ("Gemm", ["flat", drawn(60, 4), drawn(4)], "f"), *nodes]


CONV = drawn(3, 2, 3, 2)


def conv(features, *, weight=CONV, bias=True, **attributes):
    inputs = ["x", weight, drawn(len(weight))] if bias else ["x", weight]
    return after_image(("Conv", inputs, "h", attributes), features=features)


def pool(op, features, **attributes):
    return after_image((op, ["x"], "h", attributes), features=features)


GRAPHS = {
    "conv": conv(48),
    "conv without bias": conv(48, bias=False),
    "conv, kernel_shape, strides and dilations": conv(3, kernel_shape=[3, 2], strides=[2, 3], dilations=[2, 2]),
    "conv, same pads": conv(96, pads=[2, 0, 2, 0]),
    "conv, pads that differ": conv(147, pads=[1, 0, 2, 3]),
    "conv, SAME_UPPER": conv(27, auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv, SAME_LOWER": conv(90, auto_pad="SAME_LOWER"),
    "conv, VALID": conv(48, auto_pad="VALID"),
    "conv in groups": conv(192, weight=drawn(8, 1, 1, 3), group=2, pads=[0, 0, 1, 0])[:1] + head("h", 168),
    "conv and a bias added": after_image(
        ("Conv", ["x", CONV], "c"), ("Add", ["c", drawn(3, 1, 1)], "h"), features=48
    ),
    "gemm, transB": [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(3, 60), drawn(1, 3)], "y", {"transB": 1})],
    "gemm without C": [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3)], "y")],
    "gemm, C a scalar": [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3), drawn()], "y")],
    "gemm, transA": [
        ("Reshape", ["x", ints(60, 1)], "f"),
        ("Gemm", ["f", drawn(60, 3), drawn(3)], "y", {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ],
    "gemm, alpha and beta": [
        ("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3), drawn(3)], "y", {"alpha": 0.3, "beta": -0.7})
    ],
    "gemm, alpha without C": [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3)], "y", {"alpha": 0.3})],
    "matmul and add": [("Flatten", ["x"], "f"), ("MatMul", ["f", drawn(60, 3)], "m"), ("Add", [drawn(3), "m"], "y")],
    "matmul of rank 3": [
        ("Reshape", ["x", ints(1, 1, 60)], "f"),
        ("MatMul", ["f", drawn(60, 3)], "m"),
        ("Squeeze", ["m", ints(1)], "y"),
    ],
    "clip by attributes": (after_image(("Clip", ["x"], "h", {"min": -0.5, "max": 0.8})), 10),
    "clip by inputs": after_image(("Clip", ["x", np.array(-0.5, "f"), np.array(0.8, "f")], "h")),
    "clip from 0": after_image(("Clip", ["x", np.array(0, "f")], "h")),
    "clip from 0 to the largest number": (after_image(("Clip", ["x"], "h", {"min": 0.0})), 9),
    "clip of nothing": after_image(("Clip", ["x"], "h")),
    "leaky relu": after_image(("LeakyRelu", ["x"], "a", {"alpha": 0.3}), ("LeakyRelu", ["a"], "h")),
    "sigmoid, tanh, relu": after_image(("Tanh", ["x"], "a"), ("Sigmoid", ["a"], "b"), ("Relu", ["b"], "h")),
    "batch norm": after_image(
        (
            "BatchNormalization",
            ["x", drawn(2), drawn(2), drawn(2), drawn(2, low=0.5)],
            "h",
            {"epsilon": 0.02, "momentum": 0.3},
        )
    ),
    "average pool": pool("AveragePool", 12, kernel_shape=[2, 2], strides=[2, 2]),
    "average pool, pads counted": pool("AveragePool", 36, kernel_shape=[3, 2], pads=[1, 1, 1, 1], strides=[1, 2],
                                       count_include_pad=1),
    "average pool, pads not counted": pool("AveragePool", 36, kernel_shape=[3, 2], pads=[1, 1, 1, 1], strides=[1, 2]),
    "average pool, pads that differ": pool("AveragePool", 48, kernel_shape=[3, 3], pads=[2, 0, 2, 1],
                                           strides=[1, 1], count_include_pad=1)[:1] + head("h", 64),
    "average pool, a ceiling without effect": pool("AveragePool", 12, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
    "average pool, SAME_UPPER without effect": pool("AveragePool", 60, kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
    "max pool": pool("MaxPool", 36, kernel_shape=[3, 2], pads=[1, 1, 1, 1], strides=[1, 2]),
    "max pool, dilations": pool("MaxPool", 16, kernel_shape=[3, 2], dilations=[2, 1]),
    "max pool, pads without effect": pool("MaxPool", 12, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 0]),
    "global average": after_image(("GlobalAveragePool", ["x"], "h"), features=2),
    "global maximum": after_image(("GlobalMaxPool", ["x"], "h"), features=2),
    "mean of height and width": [
        ("ReduceMean", ["x"], "h", {"axes": [-1, 2], "keepdims": 0}), ("Gemm", ["h", drawn(2, 3)], "y")
    ],
    "pad by inputs": after_image(("Pad", ["x", ints(0, 0, 1, 2, 0, 0, 0, -1), np.array(0.4, "f")], "h"), features=84),
    "pad by attributes": (
        after_image(("Pad", ["x"], "h", {"pads": [0, 0, 1, 2, 0, 0, 0, 0], "value": -0.3}), features=98), 9
    ),
    "pad of some axes": (
        after_image(("Pad", ["x", ints(1, 2), "", ints(3)], "h", {"mode": "constant"}), features=96), 18
    ),
    "mean and deviation of channels": after_image(
        ("Sub", ["x", drawn(1, 2, 1, 1)], "a"), ("Div", ["a", drawn(2, 1, 1, low=0.3)], "h")
    ),
    "mean and deviation of all, written out": after_image(
        ("Sub", ["x", np.full((1, *SHAPE), 0.3, "f")], "a"), ("Div", ["a", np.full((1, *SHAPE), 0.7, "f")], "h")
    ),
    "a mean for each pixel": after_image(("Sub", ["x", drawn(*SHAPE)], "h")),
    "a factor for each pixel behind the flatten": [
        ("Flatten", ["x"], "f"),
        ("Mul", ["f", drawn(60)], "m"),
        ("Add", ["m", drawn(1, 60)], "a"),
        ("Gemm", ["a", drawn(60, 3)], "y"),
    ],
    "deviation of channels behind the flatten": [
        ("Flatten", ["x"], "f"),
        ("Div", ["f", np.repeat(np.float32([0.3, 0.7]), 30)], "a"),
        ("Gemm", ["a", drawn(60, 3)], "y"),
    ],
    "factor and summand": after_image(("Mul", [drawn(2, 1, 1), "x"], "a"), ("Add", ["a", drawn(1)], "h")),
    "a negative deviation": after_image(("Div", ["x", np.float32([0.3, -0.7]).reshape(2, 1, 1)], "h")),
    "a constant less the image": after_image(("Sub", [drawn(2, 1, 1), "x"], "h")),
    "arithmetic that changes nothing": after_image(
        ("Sub", ["x", np.zeros((1, *SHAPE), "f")], "a"), ("Mul", ["a", np.ones(1, "f")], "b"),
        ("Div", ["b", np.ones(1, "f")], "h"),
    ),
    "features halved": after_features(("Div", ["f", np.array(2, "f")], "y")),
    "features doubled and moved": after_features(("Mul", ["f", np.array(2, "f")], "m"), ("Add", ["m", drawn(4)], "y")),
    "features from a constant": after_features(("Sub", [drawn(4), "f"], "y")),
    "reshape to [0, -1]": [("Reshape", ["x", ints(0, -1)], "f"), ("Gemm", ["f", drawn(60, 3)], "y")],
    "reshape to a computed shape": [
        ("Relu", ["x"], "h"),
        ("Shape", ["h"], "s"),
        ("Gather", ["s", ints(0).reshape(())], "n", {"axis": 0}),
        ("Unsqueeze", ["n", ints(0)], "n1"),
        ("Concat", ["n1", ints(-1)], "to", {"axis": 0}),
        ("Reshape", ["h", "to"], "f"),
        ("Gemm", ["f", drawn(60, 3)], "y"),
    ],
    "weights that are computed": [
        ("Constant", [], "w", {"value": numpy_helper.from_array(drawn(3, 60))}),
        ("Transpose", ["w"], "t", {"perm": [1, 0]}),
        ("Mul", ["t", np.array(0.3, "f")], "scaled"),
        ("Flatten", ["x"], "f"),
        ("MatMul", ["f", "scaled"], "y"),
    ],
    "half precision cast to single": [
        ("Cast", [drawn(60, 3).astype(np.float16)], "w", {"to": TensorProto.FLOAT}),
        ("Flatten", ["x"], "f"),
        ("Cast", ["f"], "g", {"to": TensorProto.FLOAT}),
        ("MatMul", ["g", "w"], "y"),
    ],
    "channels last before the flatten": after_image(
        ("Transpose", ["x"], "t", {"perm": [0, 2, 3, 1]}), ("Add", ["t", drawn(2)], "h")
    ),
    "turned round and back": [
        *conv(48)[:1],
        ("Transpose", ["h"], "t", {"perm": [0, 3, 1, 2]}),
        ("Relu", ["t"], "r"),
        ("Transpose", ["r"], "back", {"perm": [0, 2, 3, 1]}),
        ("MaxPool", ["back"], "p", {"kernel_shape": [2, 2]}),
        *head("p", 27),
    ],
    "dimensions of 1 come and go": [
        ("Squeeze", ["x", ints(0)], "s"),
        ("Relu", ["s"], "r"),
        ("Unsqueeze", ["r", ints(0, -1)], "u"),
        ("Squeeze", ["u"], "v"),
        ("Unsqueeze", ["v", ints(0)], "w"),
        ("MaxPool", ["w"], "h", {"kernel_shape": [2, 2]}),
        *head("h", 40),
    ],
    "dropout and identity": after_image(
        ("Dropout", ["x", np.array(0.4, "f")], "d"), ("Identity", ["d"], "h")
    ),
    "dropout by attribute": (after_image(("Dropout", ["x"], "h", {"ratio": 0.4})), 11),
    "a node that nobody needs": [*head("x"), ("Erf", ["x"], "unused")],
    "residual, identity first": after_image(
        ("Conv", ["x", drawn(2, 2, 3, 3)], "c", {"pads": [1] * 4}), ("Add", ["x", "c"], "h")
    ),
    "residual, two branches": after_image(
        ("Relu", ["x"], "r"),
        ("Conv", ["r", drawn(2, 2, 1, 1)], "c"),
        ("Conv", ["r", drawn(2, 2, 3, 3)], "d", {"pads": [1] * 4}),
        ("Sigmoid", ["d"], "s"),
        ("Add", ["s", "c"], "h"),
    ),
    "residual, nested and one after the other": after_image(
        ("Conv", ["x", drawn(2, 2, 1, 1)], "a"),
        ("Relu", ["a"], "b"),
        ("Conv", ["b", drawn(2, 2, 1, 1)], "c"),
        ("Add", ["b", "c"], "d"),
        ("Tanh", ["d"], "e"),
        ("Add", ["e", "x"], "f"),
        ("Relu", ["f"], "g"),
        ("Add", ["f", "g"], "h"),
    ),
    "residual of vectors": after_features(
        ("Gemm", ["f", drawn(4, 4)], "g"), ("Relu", ["g"], "r"), ("Add", ["f", "r"], "y")
    ),
    "residual, one flattened": [
        ("Flatten", ["x"], "f"),
        ("Gemm", ["f", drawn(60, 60)], "g"),
        ("Flatten", ["x"], "f2"),
        ("Add", ["f2", "g"], "s"),
        ("Gemm", ["s", drawn(60, 3)], "y"),
    ],
    "residual, arithmetic in a branch": after_image(("Mul", ["x", drawn(2, 1, 1)], "m"), ("Add", ["m", "x"], "h")),
    "x + x": after_image(("Add", ["x", "x"], "h")),
}  # fmt: skip


@pytest.mark.parametrize("nodes", GRAPHS.values(), ids=GRAPHS.keys())
def test_computes_what_onnx_runtime_computes(nodes, tmp_path):
    nodes, opset = nodes if isinstance(nodes, tuple) else (nodes, 13)
    check(model_of(nodes, opset=opset), tmp_path)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_the_last_softmax_is_left_out(op, tmp_path):
    nodes = [*head("x")[:1], ("Gemm", ["flat", drawn(60, 3), drawn(3)], "z")]
    images = torch.rand(5, *SHAPE)
    found = read(model_of([*nodes, (op, ["z"], "y", {"axis": 1})]), tmp_path)
    assert found.left_out == op
    bare = model_of([*nodes, ("Identity", ["z"], "y")])
    torch.testing.assert_close(found.module(images), run(bare, images))
    assert check(bare, tmp_path).left_out is None


def test_a_mean_and_a_deviation_are_one_normalisation(tmp_path):
    mean, std = np.float32([0.1, 0.7]), np.float32([0.3, 0.6])
    nodes = after_image(("Sub", ["x", mean.reshape(1, 2, 1, 1)], "a"), ("Div", ["a", std.reshape(1, 2, 1, 1)], "h"))
    found = check(model_of(nodes), tmp_path)
    assert kinds(found) == ["Normalize", "Flatten", "Linear"]
    (norm, *_) = found.module
    assert isinstance(norm, Normalize)
    assert (norm.mean.flatten().tolist(), norm.std.flatten().tolist()) == (mean.tolist(), std.tolist())


def test_layers_are_no_more_than_needed(tmp_path):
    assert kinds(check(model_of(GRAPHS["matmul and add"]), tmp_path)) == ["Flatten", "Linear"]
    assert kinds(check(model_of(GRAPHS["conv and a bias added"]), tmp_path)) == ["Conv2d", "Flatten", "Linear"]
    assert kinds(check(model_of(GRAPHS["arithmetic that changes nothing"]), tmp_path)) == ["Flatten", "Linear"]
    assert kinds(check(model_of(GRAPHS["clip from 0"]), tmp_path)) == ["ReLU", "Flatten", "Linear"]
    block = check(model_of(GRAPHS["residual, identity first"]), tmp_path).module[0]
    assert isinstance(block, Residual)
    assert isinstance(block.shortcut, nn.Identity)


def test_weights_are_taken_as_they_are(tmp_path):
    """Factors that float32 would round when they are multiplied into the weights are layers of their own."""
    weight, bias = drawn(3, 60), drawn(3)
    nodes = [("Flatten", ["x"], "f"), ("Gemm", ["f", weight, bias], "y", {"transB": 1, "alpha": 0.3, "beta": 0.7})]
    found = check(model_of(nodes), tmp_path)
    images = torch.rand(4, *SHAPE, dtype=torch.float64)
    exact = [torch.from_numpy(t).double() for t in (weight, bias, np.float32(0.3)[None], np.float32(0.7)[None])]
    expected = exact[2] * (images.flatten(1) @ exact[0].T) + exact[3] * exact[1]
    torch.testing.assert_close(found.module.double()(images), expected, rtol=1e-13, atol=1e-13)


LONG = [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3)], "y")]

REFUSED = {
    "op": (after_image(("Erf", ["x"], "h")), "Erf node 'the_Erf': this op type is not supported; supported are Add, Av"),
    "attribute": (after_image(("Relu", ["x"], "h", {"slope": 1})), "Relu node 'the_Relu': the attribute slope, which"),
    "weights that are computed": (
        [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 60)], "g"), ("Reshape", ["g", ints(60, 1)], "w"),
         ("Gemm", ["f", "w"], "y")],
        "Gemm node 'the_Gemm_of_y': input 1 is computed from the images; supported is a constant",
    ),
    "weights in double precision": (
        [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3).astype(np.float64)], "y")],
        "Gemm node 'the_Gemm': input 1 is float64; allowed is float32",
    ),
    "weights in half precision": (
        [("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 3).astype(np.float16)], "y")],
        "Gemm node 'the_Gemm': input 1 is float16; allowed is float32",
    ),
    "NaN": ([("Flatten", ["x"], "f"), ("Gemm", ["f", np.full((60, 3), np.nan, "f")], "y")], "infinite numbers or NaN"),
    "cast": (after_image(("Cast", ["x"], "h", {"to": TensorProto.DOUBLE})), "the_Cast': to=DOUBLE; supported is FLOAT"),
    "gemm of a map": ([("Gemm", ["x", drawn(5, 3)], "y")], "an input of shape [1, 2, 6, 5]; supported is one row"),
    "matmul of rows": ([("MatMul", ["x", drawn(5, 3)], "y")], "an input of shape [1, 2, 6, 5]; supported is one row"),
    "weights of another size": ([("Flatten", ["x"], "f"), ("MatMul", ["f", drawn(59, 3)], "y")], "weights for 59 inputs, giv"),
    "conv of one dimension": (
        [("Reshape", ["x", ints(1, 2, 30)], "r"), ("Conv", ["r", drawn(3, 2, 3)], "c"), *head("c", 84)],
        "Conv node 'the_Conv': an input of shape [1, 2, 30]; supported is [N, C, H, W]",
    ),
    "conv of what was flattened": (
        [("Reshape", ["x", ints(1, 3, 4, 5)], "r"), ("Conv", ["r", drawn(3, 3, 3, 3)], "c"), *head("c", 18)],
        "Conv node 'the_Conv': its input [1, 3, 4, 5] was flattened, transposed",
    ),
    "conv of channels last": (
        [("Transpose", ["x"], "t", {"perm": [0, 2, 3, 1]}), ("Conv", ["t", drawn(3, 6, 3, 1)], "c"), *head("c", 18)],
        "Conv node 'the_Conv': its input [1, 6, 5, 2] was flattened, transposed",
    ),
    "conv behind a mean for each pixel": (
        [("Sub", ["x", drawn(*SHAPE)], "s"), ("Conv", ["s", CONV], "c"), *head("c", 48)],
        "Conv node 'the_Conv': its input [1, 2, 6, 5] was flattened, transposed or given a constant for each pixel before",
    ),
    "max pool, pads that differ": (
        pool("MaxPool", 60, kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        "MaxPool node 'the_MaxPool': pads=[0, 0, 1, 1] for a kernel [2, 2]; supported are pads that are equal",
    ),
    "average pool, pads that differ": (
        pool("AveragePool", 60, kernel_shape=[2, 2], pads=[0, 0, 1, 1]), "with count_include_pad=0; supported are pads"
    ),
    "a ceiling": (pool("MaxPool", 18, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), "ceil_mode=1 where it adds windows"),
    "reflection": (
        after_image(("Pad", ["x", ints(0, 0, 1, 1, 0, 0, 1, 1)], "h", {"mode": "reflect"}), features=112),
        "Pad node 'the_Pad': mode=reflect; supported is constant",
    ),
    "padded channels": (
        after_image(("Pad", ["x", ints(0, 1, 0, 0, 0, 0, 0, 0)], "h"), features=90),
        "pads=[0, 1, 0, 0, 0, 0, 0, 0]; supported are those of height and width",
    ),
    "clip with one end": (after_image(("Clip", ["x", np.array(0.2, "f")], "h")), "min=0.20000000298023224, max=None; supp"),
    "leaky relu that falls": (after_image(("LeakyRelu", ["x"], "h", {"alpha": -0.5})), "alpha=-0.5; supported is 0 to 1"),
    "a division of the constant": (after_image(("Div", [drawn(1), "x"], "h")), "it divides by what is computed from the im"),
    "a division by 0": (after_image(("Div", ["x", np.zeros(1, "f")], "h")), "Div node 'the_Div': a division by 0"),
    "a division of features": (after_features(("Div", ["f", np.array(3, "f")], "y")), "whose reciprocals float32 rounds"),
    "a constant that makes it larger": (
        after_features(("Add", ["f", drawn(2, 4)], "y")), "a constant of shape [2, 4] beside [1, 4]; supported is one that fits"
    ),
    "a product of branches": (
        after_image(("Relu", ["x"], "r"), ("Mul", ["r", "x"], "h")), "Mul node 'the_Mul': input 1 is computed from the im"
    ),
    "a sum of two shapes": (
        after_image(("GlobalAveragePool", ["x"], "p"), ("Add", ["p", "x"], "h")),
        "Add node 'the_Add': shapes [1, 2, 1, 1] and [1, 2, 6, 5]; allowed is a sum of equal shapes",
    ),
    "a sum in two orders": (
        [("Reshape", ["x", ints(1, 1, 10, 6)], "a"), ("Reshape", ["x", ints(1, 1, 6, 10)], "r"),
         ("Transpose", ["r"], "b", {"perm": [0, 1, 3, 2]}), ("Add", ["a", "b"], "h"), *head("h")],
        "Add node 'the_Add': a sum of two branches whose elements were moved in different ways",
    ),
    "branches that overlap": (
        after_image(("Relu", ["x"], "a"), ("Tanh", ["a"], "b"), ("Sigmoid", ["a"], "c"), ("Add", ["b", "x"], "d"),
                    ("Add", ["c", "d"], "h")),
        "Add node 'the_Add_of_h': branches that do not form blocks; supported are chains and residual blocks",
    ),
    "softmax inside": (
        [*LONG[:1], ("Softmax", ["f"], "s"), ("Gemm", ["s", drawn(60, 3)], "y")],
        "Gemm node 'the_Gemm': it follows a Softmax, which is allowed as the last node only",
    ),
    "softmax of another axis": ([*LONG[:1], ("Gemm", ["f", drawn(60, 3)], "z"), ("Softmax", ["z"], "y", {"axis": 0})],
                                "axis=0 of [1, 3]; supported are the classes of [N, K]"),
    "dropout in training": (
        after_image(("Dropout", ["x", np.array(0.4, "f"), np.array(True)], "h")), "training_mode=1; supported is 0"
    ),
    "batch norm of features": (
        after_features(("BatchNormalization", ["f", drawn(4), drawn(4), drawn(4), drawn(4, low=0.5)], "y")),
        "an input of shape [1, 4]; supported is [N, C, H, W]",
    ),
    "reshape that does not fit": (
        [("Reshape", ["x", ints(1, 59)], "f"), ("Gemm", ["f", drawn(59, 3)], "y")],
        "Reshape node 'the_Reshape': an input of shape [1, 2, 6, 5]: cannot reshape array",
    ),
    "a shape that depends on the image": (
        [("Relu", ["x"], "r"), ("Reshape", ["x", "r"], "f"), ("Gemm", ["f", drawn(60, 3)], "y")],
        "Reshape node 'the_Reshape': input 1 is computed from the images",
    ),
    "nodes in no order": (LONG[::-1], "Gemm node 'the_Gemm': it takes 'f', which nothing before it gives"),
    "a kernel larger than the map": (conv(0, weight=drawn(3, 2, 7, 7)), "Conv node 'the_Conv' cannot be read: "),
    "a product of constants": (
        [("MatMul", [drawn(60, 5), drawn(5, 3)], "w"), ("Flatten", ["x"], "f"), ("MatMul", ["f", "w"], "y")],
        "MatMul node 'the_MatMul': it has constants alone as inputs",
    ),
    "random numbers": (
        [("RandomNormal", [], "w", {"shape": [60, 3]}), ("Flatten", ["x"], "f"), ("MatMul", ["f", "w"], "y")],
        "RandomNormal node 'the_RandomNormal': this op type is not supported",
    ),
    "several images as one": ([("Reshape", ["x", ints(20, 3)], "y")], "output 'y' has the shape [20, 3] for one image; all"),
    "one class": ([("Flatten", ["x"], "f"), ("Gemm", ["f", drawn(60, 1)], "y")], "output 'y' has the shape [1, 1] for one im"),
    "an output in another order": (
        [("Transpose", ["x"], "t", {"perm": [0, 2, 3, 1]}), ("Flatten", ["t"], "y")], "output 'y' has its elements in anoth"
    ),
    "an output that is no class": ([("Relu", ["x"], "y")], "output 'y' has the shape [1, 2, 6, 5] for one image; allowed are"),
    "a constant output": ([("Identity", [drawn(1, 3)], "y")], "output 'y' does not depend on the images"),
    "no weights": ([("Flatten", ["x"], "y")], "Sequential has no layer with weights"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_name(nodes, message, tmp_path):
    with pytest.raises(InputError) as caught:
        read(model_of(nodes), tmp_path)
    said = str(caught.value)
    assert said.startswith(f"ONNX file {tmp_path / 'model.onnx'}: ")
    assert message in said
    assert "\n" not in said


def test_a_node_without_a_name_is_named_by_its_output(tmp_path):
    model = model_of(after_image(("Erf", ["x"], "h")))
    model.graph.node[0].name = ""
    with pytest.raises(InputError, match="the Erf node that gives 'h': this op type is not supported"):
        read(model, tmp_path)


def test_a_node_of_others_is_refused(tmp_path):
    model = model_of(after_image(("Relu", ["x"], "h")))
    model.graph.node[0].domain = "com.example"
    with pytest.raises(InputError, match=r"com\.example\.Relu node 'the_Relu': this op type is not supported"):
        read(model, tmp_path)


def test_a_second_output_is_refused_where_it_is_used(tmp_path):
    model = model_of(after_image(("MaxPool", ["x"], "h", {"kernel_shape": [1, 1]})))
    model.graph.node[0].output.append("indices")
    check(model, tmp_path)
    model.graph.node.insert(1, onnx.helper.make_node("Cast", ["indices"], ["i"], name="cast", to=TensorProto.FLOAT))
    model.graph.node[2].input[0] = "i"
    with pytest.raises(InputError, match="Cast node 'cast': it takes 'indices', which nothing before it gives"):
        read(model, tmp_path)
