"""Networks from ONNX files that others have written.

What the bounds are about must be what the file says: whatever is not known to be read rightly is refused, weights are taken
as they are, and in the end ONNX Runtime must agree.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import external_data_helper
from torch import Tensor, nn

from evocert.bounds import UnsupportedLayer, read_network
from evocert.certify.onnx_graph import Graph, Shape, one_line
from evocert.errors import InputError

TOLERANCE = 1e-4  # of the largest logit, and of 1, as for what is exported
RANDOM_IMAGES = 8


@dataclass(frozen=True)
class Foreign:
    """A network that was read.

    Attributes:
        module: images ``[B, C, H, W]`` in the file's own input units -> logits ``[B, K]``; float32, in ``eval()``, on the CPU.
            ``bounds.read_network(module, input_shape)`` accepts it.
        input_shape: ``(C, H, W)``.
        num_classes: K >= 2.
        sha256: of the file's bytes, followed by those of its external data files in the order of their names.
        left_out: "Softmax" or "LogSoftmax" where that was the last node: ``module`` gives what it takes, of which the largest
            is that of the same class. None where the module gives what the file gives.
    """

    module: nn.Module
    input_shape: Shape
    num_classes: int
    sha256: str
    left_out: str | None = None


def read_onnx(path: Path) -> Foreign:
    """The network in an ONNX file: a chain of supported nodes and residual blocks, on images [N, C, H, W] in [0, 1].

    Weights are float32 and taken as they are: a model in another precision is refused, since rounded it would be another
    one. A Softmax or LogSoftmax at the very end is left out, and named in ``left_out``. A dynamic batch size, and the way in
    which an exporter writes a flatten, do not matter.

    Raises:
        InputError: the file cannot be read, is no ONNX model, has a node, shape or connection that is not supported, or is
            computed otherwise by ONNX Runtime (8 random images, and all pixels 0 and 1; the largest difference allowed in an
            output is ``1e-4 * max(1, max |output|)``).
    """
    path = Path(path)
    model, sha256 = _loaded(path)
    graph = Graph(model, path)
    module = nn.Sequential(*graph.layers).eval()
    try:
        read_network(module, graph.input_shape)
    except UnsupportedLayer as error:
        raise InputError(f"ONNX file {path}: {one_line(error)}") from error
    _compare(module, graph, model)
    return Foreign(module, graph.input_shape, graph.num_classes, sha256, graph.left_out)


def _loaded(path: Path) -> tuple[onnx.ModelProto, str]:
    """The model with all its weights, and the hash of all its files."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"ONNX file {path} cannot be read: {error.strerror or error}") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kinds of error, some of which are no public names
        raise InputError(f"ONNX file {path} is no ONNX model: {one_line(error)}") from error
    digest = hashlib.sha256(content)
    try:
        names = {
            external_data_helper.ExternalDataInfo(tensor).location
            for tensor in _tensors(model)
            if external_data_helper.uses_external_data(tensor)
        }
        # First the tensors: this refuses places outside the file's folder.
        external_data_helper.load_external_data_for_model(model, str(path.parent))
        for name in sorted(names):
            digest.update((path.parent / name).read_bytes())
    except Exception as error:  # a file that is missing or too short, or a place that is not allowed
        raise InputError(f"ONNX file {path}: its external data cannot be read: {one_line(error)}") from error
    return model, digest.hexdigest()


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    attributes = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return [*model.graph.initializer, *attributes]


def _compare(module: nn.Module, graph: Graph, model: onnx.ModelProto) -> None:
    """Raises InputError where ONNX Runtime gives other outputs than the module."""
    random = torch.rand(RANDOM_IMAGES, *graph.input_shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([random, torch.zeros(1, *graph.input_shape), torch.ones(1, *graph.input_shape)])
    with torch.no_grad():
        found = torch.cat([module(image[None]) for image in images])
    if graph.left_out is not None:
        found = found.softmax(1) if graph.left_out == "Softmax" else found.log_softmax(1)
    expected = _by_onnx_runtime(graph, model, images)
    where = f"ONNX file {graph.path} was read otherwise than ONNX Runtime runs it"
    if expected.shape != found.shape:
        raise InputError(f"{where}: outputs {list(found.shape)} instead of {list(expected.shape)}")
    difference, allowed = float((found - expected).abs().max()), TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # also refuses NaN
        raise InputError(f"{where}: outputs differ by {difference:.3g}, allowed is {allowed:.3g}")


def _by_onnx_runtime(graph: Graph, model: onnx.ModelProto, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what stops it is in the error
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = [session.run([graph.output_name], {graph.input_name: image[None].numpy()})[0] for image in images]
        return torch.cat([torch.from_numpy(output) for output in outputs])
    except Exception as error:  # whatever ONNX Runtime objects to, and models over 2 GiB
        raise InputError(f"ONNX file {graph.path} cannot be run by ONNX Runtime: {one_line(error)}") from error
