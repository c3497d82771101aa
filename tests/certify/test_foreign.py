"""Files as torch's two exporters and our own write them, read back; and files that are refused."""

import contextlib
import hashlib
import io
import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from evocert.bounds import read_network
from evocert.certify import onnx_nodes
from evocert.certify.foreign import read_onnx
from evocert.certify.onnx_values import elementwise
from evocert.errors import InputError
from evocert.export.onnx import export_onnx
from evocert.modules import Normalize, Residual
from evocert.networks import NETWORKS, calibrate

SHAPE = (3, 8, 8)
MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.4, 0.3]


class Module(nn.Module):
    """Layers for the forwards below."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.same = nn.Conv2d(4, 4, 2, padding="same")
        self.grouped = nn.Conv2d(4, 4, 3, padding=(2, 1), stride=(1, 2), dilation=2, groups=2)
        self.norm = batch_norm(4)
        self.few, self.many = nn.Linear(4, 5), nn.Linear(4 * 64, 5, bias=False)
        self.last = nn.Linear(5, 5)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1))
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


def batch_norm(channels):
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            tensor.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return layer


def built_in(name):
    torch.manual_seed(0)
    module = NETWORKS[name](SHAPE, 5, mean=MEAN, std=STD, width=3)
    calibrate(module, torch.rand(8, *SHAPE))
    return module


def pooled(m, x):
    x = F.max_pool2d(m.conv(x), 3, 1, 1)
    return m.many(F.avg_pool2d(x, 3, 1, 1).flatten(1))


def blocks(m, x):
    x = torch.relu(m.conv(x))
    x = torch.relu(x + m.norm(m.same(torch.relu(x + torch.tanh(m.same(x))))))
    return m.many(torch.flatten(m.same(x) + m.norm(x), 1))


OWN = {
    "view by size": lambda m, x: m.many((h := m.conv(x).relu()).view(h.size(0), -1)),
    "view by shape": lambda m, x: m.last(m.many(m.conv(x).relu().reshape(x.shape[0], 4 * 8 * 8)).relu()),
    "buffers": lambda m, x: m.many(m.conv((x - m.mean) / m.std).flatten(1)),
    "numbers": lambda m, x: m.many(m.conv(1 - 2 * x).flatten(1)) / 4 + 0.5,
    "batch norm behind an activation": lambda m, x: m.many(m.norm(m.conv(x).relu()).flatten(1)),
    "same padding and groups": lambda m, x: m.few(m.grouped(m.same(m.conv(x)).relu()).mean((2, 3))),
    "pooling": pooled,
    "adaptive pooling": lambda m, x: m.few(F.adaptive_avg_pool2d(m.conv(x).relu(), 1).flatten(1)),
    "padding": lambda m, x: m.many(m.conv(F.pad(x, (1, -1, 2, -2), value=0.3)).relu().flatten(1)),
    "activations": lambda m, x: m.last(
        F.hardtanh(m.many(F.relu6(F.leaky_relu(m.conv(x), 0.2)).sigmoid().flatten(1)), -0.3, 0.2)
        .clamp(-0.2, 0.2)
        .tanh()
    ),
    "dropout": lambda m, x: m.many(F.dropout(m.conv(x).flatten(1), 0.5, m.training)),
    "blocks": blocks,
}

CASES = {name: lambda name=name: built_in(name) for name in NETWORKS} | {
    name: lambda forward=forward: Module(forward) for name, forward in OWN.items()
}


def export(module, path, *, dynamo=False, opset=None, dynamic=False):
    """By torch itself, quietly."""
    options = {}
    if dynamic:
        options = (
            {"dynamic_shapes": ({0: torch.export.Dim("N")},)}
            if dynamo
            else {"dynamic_axes": {"input": {0: "N"}, "output": {0: "N"}}}
        )
    silent = (
        warnings.catch_warnings(),
        *(f(io.StringIO()) for f in (contextlib.redirect_stdout, contextlib.redirect_stderr)),
    )
    with contextlib.ExitStack() as stack:
        for each in silent:
            stack.enter_context(each)
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.rand(2 if dynamic else 1, *SHAPE),),
            path,
            dynamo=dynamo,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            **options,
        )


def check(module, path):
    """What is read from the file computes what the module computes, and the bounds take it."""
    found = read_onnx(path)
    images = 4 * torch.rand(6, *SHAPE) - 2
    with torch.no_grad():
        expected = module.eval()(images)
        torch.testing.assert_close(found.module(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (found.input_shape, found.num_classes, found.left_out) == (SHAPE, 5, None)
    assert read_network(found.module, found.input_shape).num_classes == 5
    return found


@pytest.mark.parametrize(("opset", "dynamic"), [(9, False), (11, True), (13, True), (17, False)])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_reads_what_torch_script_writes(build, opset, dynamic, tmp_path):
    module = build()
    export(module, tmp_path / "model.onnx", opset=opset, dynamic=dynamic)
    check(module, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_reads_what_dynamo_writes(build, dynamic, tmp_path):
    module = build()
    export(module, tmp_path / "model.onnx", dynamo=True, dynamic=dynamic)
    assert (tmp_path / "model.onnx.data").exists()  # weights beside the file
    check(module, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", NETWORKS)
def test_reads_what_evocert_exports(name, tmp_path):
    module = built_in(name)
    export_onnx(module, tmp_path / "model.onnx", torch.rand(4, *SHAPE))
    found = check(module, tmp_path / "model.onnx")
    assert found.sha256 == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()


def test_gives_the_layers_of_the_network_that_was_exported(tmp_path):
    module = built_in("resnet")
    export(module, tmp_path / "model.onnx", opset=13)
    found = check(module, tmp_path / "model.onnx").module
    assert [type(layer) for layer in found] == [type(layer) for layer in module]
    assert isinstance(found[0], Normalize)
    assert isinstance(found[3], Residual)
    assert [type(layer) for layer in found[3].body] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [type(layer) for layer in found[3].shortcut] == [nn.Conv2d]
    for mine, theirs in zip(found.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def model(tmp_path):
    """A small good model, that the tests below spoil."""
    export(
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)), tmp_path / "good.onnx", opset=13
    )
    return onnx.load(tmp_path / "good.onnx")


def refused(model, folder):
    """The message with which a model is refused, without the file's name."""
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return message_for(path)


def message_for(path):
    with pytest.raises(InputError) as caught:
        read_onnx(path)
    said = str(caught.value)
    assert said.startswith(f"ONNX file {path}")
    assert "\n" not in said
    return said.removeprefix(f"ONNX file {path}").removeprefix(":").strip()


def test_what_is_no_file_or_no_model_is_refused(tmp_path):
    assert message_for(tmp_path / "none.onnx") == "cannot be read: No such file or directory"
    assert message_for(tmp_path) == "cannot be read: Is a directory"
    assert refused(b"\x08no model", tmp_path).startswith("is no ONNX model: ")
    assert refused(b"", tmp_path) == "its graph is empty, or it is no ONNX model"
    assert refused(onnx.ModelProto(graph=onnx.GraphProto(name="graph")), tmp_path).startswith("its graph is empty")


def test_a_half_of_a_file_is_refused(model, tmp_path):
    content = model.SerializeToString()
    for length in range(1, len(content), 97):
        refused(content[:length], tmp_path)


def test_external_data_are_read_and_count_in_the_hash(model, tmp_path):
    for folder in (tmp_path / "whole", tmp_path / "parted"):
        folder.mkdir()
    onnx.save(model, tmp_path / "whole" / "model.onnx")
    whole = read_onnx(tmp_path / "whole" / "model.onnx")
    path, data = tmp_path / "parted" / "model.onnx", tmp_path / "parted" / "weights.bin"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    parted = read_onnx(path)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), parted.module.parameters(), strict=True))
    assert parted.sha256 == hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest() != whole.sha256

    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert message_for(path).startswith("its external data cannot be read: ")
    data.unlink()
    assert message_for(path).startswith("its external data cannot be read: ")
    (tmp_path / "weights.bin").write_bytes(content)
    spoilt = onnx.load(path, load_external_data=False)
    for tensor in spoilt.graph.initializer:
        tensor.external_data[0].value = "../weights.bin"
    path.write_bytes(spoilt.SerializeToString())
    assert message_for(path).startswith("its external data cannot be read: ")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, "H", "W"), "input 'input' [1, 3, H, W] has a dynamic size; allowed are fixed C, H and W"),
        (("N", None, 8, 8), "input 'input' [N, ?, 8, 8] has a dynamic size; allowed are fixed C, H and W"),
        ((1, 3 * 8 * 8), "input 'input' [1, 192] is no image; allowed is [N, C, H, W]"),
        ((3, 8, 8), "input 'input' [3, 8, 8] is no image; allowed is [N, C, H, W]"),
        ((7, 3, 8, 8), "input 'input' [7, 3, 8, 8] takes 7 images at a time; allowed is N = 1 or dynamic"),
    ],
)
def test_an_input_of_another_shape_is_refused(sizes, message, model, tmp_path):
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.FLOAT, sizes))
    assert refused(model, tmp_path) == message


def test_an_input_without_a_shape_is_refused(model, tmp_path):
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert refused(model, tmp_path) == "input 'input' has no shape; allowed is [N, C, H, W]"
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8]))
    assert refused(model, tmp_path) == "input 'input' has no shape; allowed is [N, C, H, W]"


@pytest.mark.parametrize("kind", ["DOUBLE", "FLOAT16", "UINT8"])
def test_another_precision_is_refused(kind, model, tmp_path):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    assert refused(model, tmp_path) == (
        f"input 'input' [1, 3, 8, 8] is of type {kind}; allowed is FLOAT, since a model rounded to float32 is another one"
    )


def test_a_model_in_double_precision_is_refused(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.rand(1, *SHAPE).double(),), tmp_path / "model.onnx", dynamo=False, opset_version=13
        )
    assert "is of type DOUBLE; allowed is FLOAT" in message_for(tmp_path / "model.onnx")


def test_several_inputs_or_outputs_are_refused(model, tmp_path):
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, [1])
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    spoilt.graph.input.append(other)
    assert refused(spoilt, tmp_path) == "2 inputs ('input', 'other'); allowed is one, the images [N, C, H, W]"
    spoilt.CopyFrom(model)
    spoilt.graph.ClearField("input")
    assert refused(spoilt, tmp_path) == "0 inputs (none); allowed is one, the images [N, C, H, W]"
    spoilt.CopyFrom(model)
    spoilt.graph.output.append(other)
    assert refused(spoilt, tmp_path) == "2 outputs ('output', 'other'); allowed is one, the logits [N, K]"


def test_weights_may_be_among_the_inputs(model, tmp_path):
    for tensor in model.graph.initializer:
        model.graph.input.insert(0, helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert read_onnx(tmp_path / "model.onnx").input_shape == SHAPE


def test_opsets_that_are_too_old_or_unknown_are_refused(model, tmp_path):
    model.opset_import[0].version = 6
    assert refused(model, tmp_path) == "opset 6; supported is 7 or later"
    model.opset_import[0].version = 999
    assert refused(model, tmp_path).startswith("cannot be run by ONNX Runtime: ")
    model.opset_import[0].domain = "com.example"
    assert refused(model, tmp_path) == "it names no opset of ONNX's own"


def test_spoilt_weights_are_refused(model, tmp_path):
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    spoilt.graph.initializer[0].raw_data = b"1234"
    name = spoilt.graph.initializer[0].name
    assert refused(spoilt, tmp_path).startswith(f"initializer {name!r} cannot be read: ")
    model.graph.sparse_initializer.add()
    assert refused(model, tmp_path) == "sparse initializers are not supported"


def test_what_onnx_runtime_computes_otherwise_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_nodes.OPS, "Relu", lambda node: elementwise(node.value(), nn.Tanh()))
    assert refused(model, tmp_path).startswith("was read otherwise than ONNX Runtime runs it: outputs differ by 0.")


def test_logits_that_are_no_numbers_are_refused(model, tmp_path):
    for tensor in model.graph.initializer:
        numbers = onnx.numpy_helper.to_array(tensor)
        tensor.raw_data = np.full_like(numbers, 3e38).tobytes()
    assert refused(model, tmp_path).startswith("was read otherwise than ONNX Runtime runs it: outputs differ by nan")
