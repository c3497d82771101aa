"""The exported file: what is in it, and that ONNX Runtime computes from it what torch computes from the module."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from evocert.errors import InputError
from evocert.export import onnx as onnx_export
from evocert.export.onnx import ExportError, export_onnx, fold_normalisation
from evocert.modules import Normalize

MEAN, STD = [0.2, 0.9, 0.5], [0.5, 0.2, 0.3]  # far from 0 and from each other, so that a mix-up shows


def normalize(channels: int) -> Normalize:
    return Normalize(MEAN[:channels], STD[:channels])


class OwnNetwork(nn.Module):
    """Children in another order than they run, a functional ReLU, a skip, a Flatten by view."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 36, 5, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.preparation = nn.ModuleDict({"pixels": normalize(3)})

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(self.preparation["pixels"](x)))
        x = torch.relu(x + self.second(x))
        return self.head(x.view(x.shape[0], -1))


class Backwards(nn.Sequential):
    """A Sequential with a forward of its own: the last child runs first."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self.children())):
            x = layer(x)
        return x


def small_batch_norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    return layer


# name: (network, channels of the 6x6 images, op types in the file)
CASES: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "linear": (
        lambda: nn.Sequential(normalize(3), nn.Flatten(), nn.Linear(108, 7), nn.ReLU(), nn.Linear(7, 5)),
        3,
        ["Flatten", "Gemm", "Relu", "Gemm"],
    ),
    "linear, one channel": (
        lambda: nn.Sequential(normalize(1), nn.Identity(), nn.Flatten(), nn.Linear(36, 5)),
        1,
        ["Flatten", "Gemm"],
    ),
    "linear, one mean for three channels": (
        lambda: nn.Sequential(normalize(1), nn.Flatten(), nn.Linear(108, 5)),
        3,
        ["Flatten", "Gemm"],
    ),
    "no bias anywhere": (
        # The two zero biases of the same length are one initializer and an Identity in what torch writes.
        lambda: nn.Sequential(
            normalize(3),
            nn.Conv2d(3, 5, 3, bias=False),
            nn.ReLU(),
            nn.Conv2d(5, 5, 3, bias=False),
            nn.Flatten(),
            nn.Linear(20, 5, bias=False),
            nn.ReLU(),
            nn.Linear(5, 5, bias=False),
        ),
        3,
        ["Conv", "Relu", "Conv", "Flatten", "Gemm", "Relu", "Gemm"],
    ),
    "linear without bias": (
        lambda: nn.Sequential(normalize(3), nn.Flatten(), nn.Linear(108, 5, bias=False)),
        3,
        ["Flatten", "Gemm"],
    ),
    "unpadded convolution": (
        lambda: nn.Sequential(normalize(3), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)),
        3,
        ["Conv", "Relu", "Flatten", "Gemm"],
    ),
    "convolution padded 'valid'": (
        lambda: nn.Sequential(normalize(3), nn.Conv2d(3, 4, 3, dilation=2, padding="valid"), nn.Flatten()),
        3,
        ["Conv", "Flatten"],
    ),
    "grouped convolution": (
        lambda: nn.Sequential(normalize(3), nn.Conv2d(3, 6, 3, groups=3), nn.Flatten()),
        3,
        ["Conv", "Flatten"],
    ),
    "unpadded convolution, one mean for three channels": (
        lambda: nn.Sequential(normalize(1), nn.Conv2d(3, 4, 3), nn.Flatten()),
        3,
        ["Conv", "Flatten"],
    ),
    "padded convolution": (
        lambda: nn.Sequential(normalize(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)),
        3,
        ["Conv", "Conv", "Relu", "Flatten", "Gemm"],
    ),
    "padded convolution, one channel": (
        lambda: nn.Sequential(normalize(1), nn.Conv2d(1, 4, 4, stride=2, padding=(0, 1)), nn.Flatten()),
        1,
        ["Conv", "Conv", "Flatten"],
    ),
    "padded convolution, one mean for three channels": (
        lambda: nn.Sequential(normalize(1), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()),
        3,
        ["Conv", "Conv", "Flatten"],
    ),
    "convolution padded 'same', even kernel": (
        lambda: nn.Sequential(normalize(3), nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), nn.Flatten()),
        3,
        ["Conv", "Conv", "Flatten"],
    ),
    "batch norm": (
        lambda: nn.Sequential(
            normalize(3), nn.Conv2d(3, 4, 3, bias=False), small_batch_norm(), nn.ReLU(), nn.Dropout(), nn.Flatten()
        ),
        3,
        ["Conv", "Relu", "Flatten"],
    ),
    "relu behind the normalisation": (
        lambda: nn.Sequential(normalize(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)),
        3,
        ["Conv", "Relu", "Flatten", "Gemm"],
    ),
    "pooling behind the normalisation": (
        lambda: nn.Sequential(normalize(3), nn.AvgPool2d(2, padding=1), nn.Conv2d(3, 4, 2), nn.Flatten()),
        3,
        ["Conv", "AveragePool", "Conv", "Flatten"],
    ),
    "normalisation in the middle": (
        lambda: nn.Sequential(
            normalize(3), nn.Conv2d(3, 2, 3), nn.ReLU(), normalize(2), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten()
        ),
        3,
        ["Conv", "Relu", "Conv", "Conv", "Flatten"],
    ),
    "normalisation alone": (lambda: nn.Sequential(normalize(3), nn.Flatten()), 3, ["Conv", "Flatten"]),
    "no normalisation": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), 1, ["Flatten", "Gemm"]),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(normalize(3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
        ),
        3,
        ["Conv", "Relu", "Flatten", "Gemm"],
    ),
    "own module": (OwnNetwork, 3, ["Conv", "Conv", "Relu", "Conv", "Add", "Relu", "Flatten", "Gemm"]),
    "sequential with a forward of its own": (
        lambda: Backwards(nn.Linear(64, 5), nn.Flatten(), nn.ReLU(), nn.Conv2d(3, 4, 3), normalize(3)),
        3,
        ["Conv", "Conv", "Relu", "Flatten", "Gemm"],
    ),
    "layer used twice": (
        lambda: (lambda layer: nn.Sequential(normalize(3), layer, nn.ReLU(), layer, nn.Flatten()))(nn.Conv2d(3, 3, 3)),
        3,
        ["Conv", "Relu", "Conv", "Flatten"],
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    torch.manual_seed(0)
    make, channels, types = CASES[name]
    return make(), torch.rand(6, channels, 6, 6), types


def run(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(["output"], {"input": image[None].numpy()})[0]) for image in images])


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", CASES)
def test_file_is_canonical_and_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    module, images, types = build(name)
    difference = export_onnx(module, tmp_path / "network.onnx", images)
    model = onnx.load(tmp_path / "network.onnx")
    assert [node.op_type for node in model.graph.node] == types
    assert model.ir_version == 7
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 13)]
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["output"]
    for value, shape in ((model.graph.input[0], [1, *images.shape[1:]]), (model.graph.output[0], None)):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        assert sizes == (shape or [1, module.eval()(images).shape[1]])
    weights = initializers(tmp_path / "network.onnx")
    for node in model.graph.node:
        assert not any(attribute.name == "auto_pad" for attribute in node.attribute)
        if node.op_type in ("Conv", "Gemm"):
            assert len(node.input) == 3
            assert weights[node.input[2]].shape == (len(weights[node.input[1]]),)

    others = torch.rand(20, *images.shape[1:])  # not those that the export has checked
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "network.onnx", others), module.eval()(others), atol=2e-5, rtol=1e-5)
    assert 0 <= difference < 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if not isinstance(CASES[name][0](), OwnNetwork)])
def test_folding_is_exact_in_float64_and_leaves_no_normalisation(name: str) -> None:
    module, images, _ = build(name)
    module = module.double().eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    folded = fold_normalisation(onnx_export._with_all_means(module, images))
    assert not any(isinstance(layer, Normalize) for layer in folded.modules())
    torch.testing.assert_close(folded(images.double()), module(images.double()), atol=1e-12, rtol=1e-12)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=0, rtol=0)


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_folding_keeps_mode_and_dtype(training: bool, dtype: torch.dtype) -> None:
    for first in (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1)):
        folded = fold_normalisation(nn.Sequential(normalize(3), first).to(dtype).train(training))
        assert all(layer.training == training for layer in folded.modules())
        assert {parameter.dtype for parameter in folded.parameters()} == {dtype}


def test_folding_by_hand() -> None:
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, 3.0]]))
        linear.bias.copy_(torch.tensor([1.0]))
    folded = fold_normalisation(nn.Sequential(Normalize([0.5, 0.25], [0.5, 0.125]), nn.Flatten(), linear))
    # 2 (x - .5) / .5 + 3 (y - .25) / .125 + 1 = 4 x + 24 y - 2 - 6 + 1
    assert folded[1].weight.tolist() == [[4.0, 24.0]]
    assert folded[1].bias.tolist() == [-7.0]
    assert linear.bias.tolist() == [1.0]


class SquaringConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


@pytest.mark.parametrize(
    "layers",
    [
        # Their inputs are a multiple of the channels, but each channel comes with another mean.
        [nn.Linear(6, 5)],
        [nn.Flatten(2), nn.Linear(36, 5)],
        # Looks like a convolution, and is not linear.
        [SquaringConvolution(3, 4, 3)],
    ],
)
def test_layers_that_only_look_as_if_they_could_be_folded(layers: list[nn.Module]) -> None:
    module = nn.Sequential(normalize(3), *layers).double()
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fold_normalisation(module)(images), module(images), atol=1e-12, rtol=1e-12)


def test_normalisation_before_padding_is_a_diagonal_convolution(tmp_path: Path) -> None:
    module, images, _ = build("padded convolution")
    export_onnx(module, tmp_path / "network.onnx", images)
    weights = initializers(tmp_path / "network.onnx")
    first = onnx.load(tmp_path / "network.onnx").graph.node[0]
    weight, bias = weights[first.input[1]], weights[first.input[2]]
    assert weight.shape == (3, 3, 1, 1)
    np.testing.assert_allclose(weight[:, :, 0, 0], np.diag([2, 5, 1 / 0.3]), rtol=1e-6)
    np.testing.assert_allclose(bias, [-0.4, -4.5, -0.5 / 0.3], rtol=1e-6)


@pytest.mark.parametrize("padding", [1, "same"])
def test_border_of_a_padded_convolution(padding: int | str, tmp_path: Path) -> None:
    # No layer behind the convolution, so that the output is the map and each border pixel can be compared.
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=padding)
    module = nn.Sequential(normalize(3), convolution, nn.Flatten())
    images = torch.rand(5, 3, 6, 6)
    export_onnx(module, tmp_path / "network.onnx", images)
    with torch.no_grad():
        wanted = module(images)
        torch.testing.assert_close(run(tmp_path / "network.onnx", images), wanted, atol=1e-5, rtol=1e-5)
        # What folding into a padded convolution would give: right inside, wrong along the border.
        mean, std = module[0].mean.reshape(3, 1, 1), module[0].std.reshape(3, 1, 1)
        weight = convolution.weight / std
        bias = convolution.bias - (weight * mean).sum((1, 2, 3))
        naive = nn.functional.conv2d(images, weight, bias, padding=1)
    error = (naive - wanted.reshape(5, 4, 6, 6)).abs()
    assert float(error[:, :, 1:-1, 1:-1].max()) < 1e-5
    assert float(error[:, :, 0].min()) > 0.05


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(normalize(3), nn.Conv2d(3, 4, 3, padding="same", padding_mode=mode), nn.Flatten())
    images = torch.rand(4, 3, 6, 6)
    export_onnx(module, tmp_path / "network.onnx", images)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "network.onnx", images), module(images), atol=1e-5, rtol=1e-5)


def test_returned_difference_is_the_largest_over_the_images(tmp_path: Path) -> None:
    module, images, _ = build("no bias anywhere")
    module = nn.Sequential(*module, nn.Linear(5, 5))
    with torch.no_grad():
        module[-1].weight.mul_(100)
    differences = [export_onnx(module, tmp_path / "network.onnx", image[None]) for image in images]
    assert len(set(differences)) > 1
    assert export_onnx(module, tmp_path / "network.onnx", images) == max(differences)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", ["batch norm", "padded convolution"])
def test_module_and_global_generator_stay_as_they_were(mode: bool, name: str, tmp_path: Path) -> None:
    module, images, _ = build(name)
    module = module.double().train(mode)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.get_rng_state()
    export_onnx(module, tmp_path / "network.onnx", images)
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert all(layer.training == mode for layer in module.modules())
    assert isinstance(module[0], Normalize)
    assert (module[1].bias is None) == (name == "batch norm")
    for key, value in module.state_dict().items():
        assert value.dtype == before[key].dtype
        torch.testing.assert_close(value, before[key], atol=0, rtol=0)


def test_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        module, images, _ = build("own module")
        export_onnx(module, tmp_path / name, images)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_no_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some versions of the exporter write stack traces: here every place that can hold one does.
    exporter = torch.onnx.export

    def with_traces(module: nn.Module, args: tuple, file: Path, **options: object) -> None:
        exporter(module, args, file, **options)
        model = onnx.load(file)
        graph = model.graph
        for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
            part.doc_string = f"{__file__}(12): forward"
            if not isinstance(part, onnx.ValueInfoProto):
                part.metadata_props.add(key="source", value=__file__)
        onnx.save(model, file)

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(torch.onnx, "export", with_traces)
        module, images, types = build("own module")
        export_onnx(module, tmp_path / "network.onnx", images)
        written = (tmp_path / "network.onnx").read_bytes()
        assert len(onnx.load(tmp_path / "network.onnx").graph.node) == len(types)
        for path in (Path(__file__).parent, Path(torch.__file__).parent, tmp_path, Path.home(), Path.cwd()):
            assert str(path).encode() not in written
        assert b".py" not in written


def test_exporter_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    exporter = torch.onnx.export

    def chatting(*arguments: object, **options: object) -> None:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        exporter(*arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", chatting)
    # The exporter warns about its age, and here of a constant that it cannot fold.
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(module, tmp_path / "network.onnx", torch.rand(2, 1, 6, 6))
    assert not caught
    assert capfd.readouterr() == ("", "")


class Branching(nn.Module):
    """Takes another way for bright images, which no trace of a dark one can know."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + 0.3 if float(x.mean()) > 0.5 else x.flatten(1)


def test_what_has_outgrown_float32_is_written_all_the_same(tmp_path: Path) -> None:
    """A training that diverged still ends in a run folder that is whole."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    for parameter in module.parameters():
        nn.init.constant_(parameter, 1e30)
    assert export_onnx(module, tmp_path / "network.onnx", torch.rand(2, 1, 2, 2)) == 0
    assert (tmp_path / "network.onnx").exists()


def test_means_are_written_out_for_the_channels_that_they_are_given(tmp_path: Path) -> None:
    """One mean for all channels, behind a convolution that changes how many there are."""
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        Normalize([0.1], [0.2]),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(120, 2))
    assert export_onnx(module, tmp_path / "network.onnx", torch.rand(2, 1, 6, 5)) < 1e-4


def test_a_path_may_have_any_bytes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), folder / "network.onnx", torch.rand(2, 1, 2, 2))
    assert os.listdir(folder) == ["network.onnx"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("module", [Branching()])
def test_wrong_file_never_appears(module: nn.Module, there: bool, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    good, images, _ = build("linear")
    if there:
        export_onnx(good, path, images)
        written = path.read_bytes()
    images = torch.stack([torch.full((3, 6, 6), 0.2), torch.full((3, 6, 6), 0.8)])
    with pytest.raises(ExportError, match=r"differ by 0\.3"):
        export_onnx(module, path, images)
    assert os.listdir(tmp_path) == (["network.onnx"] if there else [])
    if there:
        assert path.read_bytes() == written


def test_tolerance_follows_the_logits(tmp_path: Path) -> None:
    class Off(nn.Module):
        """Off by ``error`` in ONNX, where the mean of the traced image is a constant."""

        def __init__(self, scale: float, error: float) -> None:
            super().__init__()
            self.scale, self.error = scale, error

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.flatten(1) + (self.error if float(x[0, 0, 0, 0]) > 0.5 else 0.0)

    images = torch.ones(2, 1, 2, 2)
    images[0] = 0
    for scale, error, allowed in [(1, 5e-5, True), (1, 2e-4, False), (100, 5e-3, True), (100, 2e-2, False)]:
        with contextlib.nullcontext() if allowed else pytest.raises(RuntimeError, match="differ by"):
            assert export_onnx(Off(scale, error), tmp_path / "off.onnx", images) == pytest.approx(error, rel=0.01)


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, images, _ = build("linear")
    export_onnx(module, tmp_path / "network.onnx", images)
    written = (tmp_path / "network.onnx").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with torch.no_grad():
        module[2].bias.add_(1)
    with pytest.raises(OSError, match="no space"):
        export_onnx(module, tmp_path / "network.onnx", images)
    assert os.listdir(tmp_path) == ["network.onnx"]
    assert (tmp_path / "network.onnx").read_bytes() == written


def test_file_is_whole_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, images, _ = build("linear")
    path, calls = tmp_path / "network.onnx", []
    fsync, replace = os.fsync, os.replace

    def replacing(source: Path, target: Path) -> None:
        torch.testing.assert_close(run(source, images), module(images).detach(), atol=1e-5, rtol=1e-5)
        assert Path(target) == path
        assert tmp_path in Path(source).parents  # the same file system, where a rename is atomic
        assert not path.exists()
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", replacing)
    export_onnx(module, path, images)
    assert calls == ["fsync", "replace"]


def test_export_replaces_an_older_file(tmp_path: Path) -> None:
    module, images, _ = build("linear")
    (tmp_path / "network.onnx").write_bytes(b"old")
    export_onnx(module, tmp_path / "network.onnx", images)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "network.onnx", images), module(images), atol=1e-5, rtol=1e-5)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "network.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten()], "BatchNorm"),
        ([nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)], "BatchNorm"),
        ([nn.Flatten(), nn.Linear(36, 5), nn.Softmax(1)], "Softmax"),
    ],
)
def test_layers_that_some_verifier_skips_are_refused(layers: list[nn.Module], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        export_onnx(nn.Sequential(*layers), tmp_path / "network.onnx", torch.rand(2, 1, 6, 6))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.rand(1, 6, 6), r"\(1, 6, 6\)"),
        (torch.rand(0, 1, 6, 6), r"\(0, 1, 6, 6\)"),
        (torch.rand(2, 1, 6, 6, dtype=torch.float64), "float64"),
        (torch.full((2, 1, 6, 6), 255.0), "outside"),
        (torch.full((2, 1, 6, 6), float("nan")), "outside"),
    ],
)
def test_bad_images_are_named(images: Tensor, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), tmp_path / "network.onnx", images)
