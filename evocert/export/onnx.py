"""Networks in the one ONNX form that every verifier we tried reads: static NCHW float32, Conv, Relu, Flatten, Gemm."""

import contextlib
import copy
import io
import os
import tempfile
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, helper, shape_inference
from torch import Tensor, nn

from evocert.errors import InputError
from evocert.modules import Normalize

OPSET = 13
IR_VERSION = 7  # the last one that readers of opset 13 know without doubt
# ERAN skips these without a word.
REFUSED = {
    "BatchNormalization": "only a BatchNorm2d right after a Conv2d can be folded, and is allowed",
    "Softmax": "logits are the output that is allowed",
    "LogSoftmax": "logits are the output that is allowed",
}


class ExportError(RuntimeError):
    """The network cannot be written, or the file does not compute what the network does."""


def fold_normalisation(module: nn.Sequential) -> nn.Sequential:
    """A copy of ``module`` that computes the same without any :class:`~evocert.modules.Normalize`.

    Nested plain Sequentials are written out flat. A Normalize at the front goes into the weights of the first Linear
    behind a Flatten of the whole image, or of an unpadded first Conv2d. Anywhere else it becomes a 1x1 Conv2d with
    diagonal weights 1/std and bias -mean/std: before a padded convolution, whose zero border stands for the mean and
    not for the pixel 0, and before every layer that does not commute with it (ReLU, pooling, a module of your own).
    Weights are computed in float64 and rounded once to the dtype of the layer.

    ``module``, ``[B, C, H, W] -> ...``, is copied and keeps its own weights.
    """
    layers = _in_order(copy.deepcopy(module))
    if layers and isinstance(layers[0], Normalize):
        place = next((i for i, layer in enumerate(layers[1:], 1) if not _commutes(layer)), None)
        folded = None if place is None else _folded(layers[0], layers[1:place], layers[place])
        if place is not None and folded is not None:
            layers = [*layers[1:place], folded, *layers[place + 1 :]]
    result = nn.Sequential(*layers).train(module.training)
    for parent in list(result.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Normalize):
                setattr(parent, name, _as_convolution(child))
    return result


def export_onnx(module: nn.Module, path: Path, images: Tensor) -> float:
    """Write ``module`` to ``path`` in the canonical form, and check the file against torch on real images.

    The canonical form: static input ``input [1, C, H, W]``, output ``output``, opset 13, IR 7, normalisation by
    :func:`fold_normalisation`, a bias on every Conv and Gemm, explicit padding, no BatchNormalization or Softmax, no
    doc strings or metadata. The file appears at ``path`` whole and checked, or not at all: what was there stays.

    Args:
        module: ``[B, C, H, W] -> [B, K]``. What is exported is a float32 copy in eval mode on the CPU.
        path: of the file, in a folder that exists.
        images: ``[N, C, H, W]`` float32 in [0, 1] pixels, N >= 1, on which ONNX Runtime must agree with torch.

    Returns:
        The largest absolute difference between torch and ONNX Runtime over the logits of these images.

    Raises:
        InputError: the images are not as described, the network has a Softmax, or a BatchNorm that cannot be folded
            into a convolution before it.
        ExportError: torch cannot write the network; the shapes differ, or a logit by more than
            ``1e-4 * max(1, max |logit|)``.
        OSError: the file cannot be written.
    """
    return _export(module, Path(path), _checked(images))


def export_onnx_of_normalised(module: nn.Module, path: Path, images: Tensor) -> float:
    """As :func:`export_onnx`, without the first layer, a Normalize: the file takes ``(x - mean) / std`` of pixels x.

    Raises:
        InputError: the network's first layer is something else. Otherwise as :func:`export_onnx`.
    """
    layers = _in_order(copy.deepcopy(module).float().cpu())
    normalize = leading_normalisation(module)
    if normalize is None:
        found = type(layers[0]).__name__ if layers else "nothing"
        raise InputError(
            f"normalisation=outside: the network's first layer is {found}, allowed is a Normalize; folded takes any network"
        )
    with torch.no_grad():
        inputs = layers[0](_checked(images))
    return _export(nn.Sequential(*layers[1:]), Path(path), inputs)


def leading_normalisation(module: nn.Module) -> Normalize | None:
    """The first layer of the network, if it is a Normalize."""
    layers = _in_order(module)
    return layers[0] if layers and type(layers[0]) is Normalize else None  # a subclass may compute something else


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or len(images) == 0 or images.dtype != torch.float32:
        raise InputError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: float32 [N, C, H, W] with N >= 1 is allowed"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("images have pixels outside [0, 1], or NaN: only [0, 1] is allowed")
    return images.detach().cpu().contiguous()


def _export(module: nn.Module, path: Path, inputs: Tensor) -> float:
    original = copy.deepcopy(module).eval().float().cpu()
    rewritten = fold_normalisation(nn.Sequential(_with_all_means(original, inputs[:1])))
    _add_biases(rewritten)

    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        content = _written(rewritten, inputs[:1])
        difference = _difference(original, content, inputs)
        file = Path(folder, path.name)
        with open(file, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(file, path)
    return difference


def _with_all_means(module: nn.Module, image: Tensor) -> nn.Module:
    """A copy in which every Normalize has a mean for each channel that it is given, also where it had one for all."""
    module = copy.deepcopy(module)

    def write_out(normalize: nn.Module, given: tuple[Tensor, ...]) -> None:
        for name in ("mean", "std"):
            setattr(normalize, name, getattr(normalize, name).expand(given[0].shape[1], 1, 1).clone())

    handles = [m.register_forward_pre_hook(write_out) for m in module.modules() if isinstance(m, Normalize)]
    if not handles:
        return module
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of whatever layer, which says it again elsewhere
        module(image)
    for handle in handles:
        handle.remove()
    return module


def _in_order(module: nn.Module) -> list[nn.Module]:
    # A subclass may run its children in any way it likes; only torch's own forward is known.
    if type(module).forward is not nn.Sequential.forward:
        return [module]
    return [layer for child in module._modules.values() if child is not None for layer in _in_order(child)]


def _commutes(layer: nn.Module) -> bool:
    if type(layer) is nn.Flatten:
        return layer.start_dim == 1 and layer.end_dim in (-1, 3)
    return type(layer) is nn.Identity


def _folded(normalize: Normalize, between: list[nn.Module], layer: nn.Module) -> nn.Module | None:
    """A copy of ``layer`` with ``normalize`` in its weights; None if that cannot be done exactly."""
    mean, std = normalize.mean.double().flatten(), normalize.std.double().flatten()
    flat = any(type(other) is nn.Flatten for other in between)
    # Exact types: a subclass or a parametrised layer may compute something else.
    if type(layer) is nn.Linear and flat and layer.in_features % len(mean) == 0:
        pixels = layer.in_features // len(mean)
        mean, std = mean.repeat_interleave(pixels), std.repeat_interleave(pixels)  # [in], in the order of Flatten
    elif type(layer) is nn.Conv2d and not flat and layer.padding in ("valid", (0, 0)):
        # [out, in / groups, 1, 1]: the channels that each output sees
        mean, std = (
            v.expand(layer.in_channels)
            .reshape(layer.groups, -1)
            .repeat_interleave(layer.out_channels // layer.groups, 0)[..., None, None]
            for v in (mean, std)
        )
    else:
        return None
    weight = layer.weight.detach().double() / std
    bias = -(weight * mean).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    result = copy.deepcopy(layer)
    result.weight = nn.Parameter(weight.to(layer.weight.dtype))
    result.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return result


def _as_convolution(normalize: Normalize) -> nn.Conv2d:
    mean, std = normalize.mean.double().flatten(), normalize.std.double().flatten()
    dtype = normalize.mean.dtype
    # skip_init: the constructor would draw from the global generator.
    result = nn.utils.skip_init(nn.Conv2d, len(mean), len(mean), 1, device=mean.device, dtype=dtype)
    result.weight = nn.Parameter(torch.diag(1 / std)[..., None, None].to(dtype))
    result.bias = nn.Parameter((-mean / std).to(dtype))
    return result.train(normalize.training)


def _add_biases(module: nn.Module) -> None:
    # Without a bias torch writes MatMul instead of Gemm, and ERAN takes neither that nor a Gemm without one.
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))


def _written(module: nn.Module, image: Tensor) -> bytes:
    try:
        model = _canonical(onnx.load_model_from_string(_trace(module, image)))
        onnx.checker.check_model(model, full_check=True)
    except InputError:
        raise
    except Exception as error:  # whatever torch's exporter and onnx's checker object to
        raise ExportError(f"the network cannot be written as ONNX: {' '.join(str(error).split())[:300]}") from error
    return model.SerializeToString()


def _trace(module: nn.Module, image: Tensor) -> bytes:
    # The exporter is deprecated, and says so at each call; the dynamo one writes what verifiers cannot read.
    with (
        tempfile.TemporaryDirectory() as folder,  # whose name any library can take
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        file = Path(folder, "network.onnx")
        torch.onnx.export(
            module,
            (image,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
        )
        return file.read_bytes()


def _canonical(model: ModelProto) -> ModelProto:
    """The traced model without what verifiers stumble over. Raises InputError for a node in ``REFUSED``."""
    graph = model.graph
    _drop_identities(graph)
    _flatten_reshapes(model)
    _write_out_padding(graph)
    for node in graph.node:
        if node.op_type in REFUSED:
            raise InputError(f"{node.op_type} at {node.name} has no place in the ONNX file: {REFUSED[node.op_type]}")
    model.ir_version = IR_VERSION
    # Stack traces of the exporter hold paths of this machine.
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("doc_string")
        if "metadata_props" in part.DESCRIPTOR.fields_by_name:
            part.ClearField("metadata_props")
    return model


def _drop_identities(graph: GraphProto) -> None:
    # The exporter writes equal weights, such as two zero biases, once, and names the copies by Identity nodes.
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.output[0] not in outputs]:
        source[node.output[0]] = source.get(node.input[0], node.input[0])
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [source.get(name, name) for name in node.input]


def _flatten_reshapes(model: ModelProto) -> None:
    # x.view(len(x), -1) becomes a Reshape to a constant shape, with the batch in it.
    graph = model.graph
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    for node in graph.node:
        before, after = shapes.get(node.input[0] if node.input else "", []), shapes.get(node.output[0], [])
        if node.op_type == "Reshape" and len(after) == 2 and before[:1] == after[:1] == [1]:
            node.CopyFrom(helper.make_node("Flatten", [node.input[0]], list(node.output), name=node.name, axis=1))
    used = {name for node in graph.node for name in node.input}
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        graph.node.remove(node)


def _write_out_padding(graph: GraphProto) -> None:
    # auto_pad is unknown to some readers; torch's 'same' has stride 1, so the pads follow from the kernel alone.
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        mode = attributes.pop("auto_pad", b"NOTSET")
        if node.op_type != "Conv" or mode == b"NOTSET":
            continue
        kernel = zip(attributes["kernel_shape"], attributes["dilations"], strict=True)
        total = [(k - 1) * d if mode == b"SAME_UPPER" else 0 for k, d in kernel]
        attributes["pads"] = [t // 2 for t in total] + [t - t // 2 for t in total]
        node.CopyFrom(helper.make_node("Conv", list(node.input), list(node.output), name=node.name, **attributes))


def _difference(original: nn.Module, content: bytes, images: Tensor) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = torch.cat([original(image[None]) for image in images])
    got = torch.cat([torch.from_numpy(session.run(["output"], {"input": image[None].numpy()})[0]) for image in images])
    if got.shape != wanted.shape:
        raise ExportError(f"ONNX Runtime gives {tuple(got.shape)} and torch {tuple(wanted.shape)}: no file is written")
    # Logits that have outgrown float32 are the same where both are no finite numbers.
    finite = wanted.isfinite() | got.isfinite()
    difference = float((got - wanted)[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = 1e-4 * max(1.0, float(wanted[finite].abs().max()) if bool(finite.any()) else 1.0)
    if not difference <= allowed:  # also refuses NaN
        raise ExportError(
            f"ONNX Runtime and torch differ by {difference:.3g} in a logit, {allowed:.3g} is allowed: no file is written"
        )
    return difference
