"""A finished run as a folder in the form of the verification competition (VNN-COMP): network, properties, instances."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import evocert
from evocert.errors import InputError
from evocert.export import eran
from evocert.export import generate_properties as script
from evocert.export.onnx import ExportError, export_onnx, export_onnx_of_normalised, leading_normalisation
from evocert.export.vnnlib import read_property
from evocert.files import folder_at_once
from evocert.finished import Finished, load_finished

EXAMPLES = 100  # by default, if the test part has as many
TIMEOUT = 100.0  # seconds, by default
ALL_TIMEOUTS = 6 * 3600  # seconds, what the competition allows for all instances of a benchmark

Writer = Callable[[nn.Module, Path, Tensor], float]
PIXELS = "[0, 1] pixels"
# Where the normalisation is, what writes the network accordingly, and in which units its inputs are.
WRITERS: dict[str, tuple[Writer, str]] = {
    "folded": (export_onnx, PIXELS),
    "outside": (export_onnx_of_normalised, f"(x - mean) / std, where x is in {PIXELS}"),
}


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        run: folder of a finished run.
        out: the folder to write; None: ``export-<vnnlib>-<normalisation>`` in the run folder.
        examples: the first so many of the test part; None: 100, or all if there are fewer.
        timeout: seconds for each property.
        vnnlib: version of the format, a key of ``generate_properties.FORMATS``.
        normalisation: a key of ``WRITERS``.
        suffix: ".gz", or nothing, behind the names of ONNX and VNN-LIB files.
    """

    run: Path
    out: Path | None = None
    examples: int | None = None
    timeout: float = TIMEOUT
    vnnlib: str = "1.0"
    normalisation: str = "folded"
    suffix: str = ""


@dataclass(frozen=True)
class Exported:
    """The folder that was written, and its JSON file's content."""

    path: Path
    sidecar: dict[str, Any]


def export(request: Request) -> Exported:
    """Write the folder, whole and checked, or not at all.

    Properties are written for those of the images that ONNX Runtime classifies correctly; the others are listed in the JSON
    file. Each is read back by ``evocert.export.vnnlib`` before the folder appears.

    Raises:
        InputError: no finished run, an impossible value, no image that is classified correctly, timeouts of more than six
            hours in all, or a folder that is not empty.
        ExportError: the ONNX file does not compute what the network does, or a property is not read back as it should be.
        OSError: the folder cannot be written.
    """
    for name, value, allowed in (
        ("vnnlib", request.vnnlib, script.FORMATS),
        ("normalisation", request.normalisation, WRITERS),
    ):
        if value not in allowed:
            raise InputError(f"{name}={value}: allowed are {' and '.join(allowed)}")
    if not 0 < request.timeout < math.inf:
        raise InputError(f"timeout={request.timeout:g}: allowed is a number of seconds over 0")
    finished = load_finished(request.run)
    count, size = request.examples, len(finished.data.test)
    if count is not None and not 1 <= count <= size:
        raise InputError(f"examples={count}: allowed are 1 to {size}, the images of the test part")
    path = request.out or request.run / f"export-{request.vnnlib}-{request.normalisation}"
    with folder_at_once(path) as folder:
        sidecar = _write(folder, finished, request, min(EXAMPLES, size) if count is None else count)
    return Exported(path, sidecar)


def summary(done: Exported) -> str:
    """A few lines for a terminal."""
    sidecar, chosen = done.sidecar, done.sidecar["selection"]
    properties, wrong = len(chosen["indices"]), len(chosen["misclassified"])
    return (
        f"{properties} properties of the first {properties + wrong} test images of {sidecar['data']}"
        f" ({wrong} misclassified and left out), eps = {sidecar['eps']:g}\n"
        f"VNN-LIB {sidecar['vnnlib']}, {sidecar['timeout']:g} s each; normalisation {sidecar['normalisation']['where']}; "
        f"ONNX Runtime differs from torch by {sidecar['onnx_difference']:.1e} at most\n"
        f"{done.path}"
    )


def _write(folder: Path, finished: Finished, request: Request, count: int) -> dict[str, Any]:
    test = finished.data.test
    labels, published = test.labels.numpy(), test.indices.numpy()
    pixels = script.as_pixels(test.images[:count].numpy(), test.scale)
    sidecar = _described(finished, request)
    write, _ = WRITERS[request.normalisation]
    (folder / "onnx").mkdir()
    file = folder / sidecar["onnx"].removesuffix(request.suffix)
    sidecar["onnx_difference"] = write(finished.module, file, torch.from_numpy(pixels))
    content = file.read_bytes()
    sidecar["sha256"] = hashlib.sha256(content).hexdigest()
    if request.suffix:
        (folder / sidecar["onnx"]).write_bytes(script.packed(content))
        file.unlink()

    logits = script.run(script.session_of(content), script.network_inputs(pixels, sidecar))
    sidecar["selection"] = script.selection(None, np.arange(count), logits, labels, published)
    indices = sidecar["selection"]["indices"]
    _check_count(len(indices), count, request.timeout)
    for index, file in zip(indices, script.write_properties(folder, sidecar, pixels, labels, indices), strict=True):
        _check_property(file, pixels[index], int(labels[index]), sidecar)

    np.savez_compressed(
        folder / "images.npz",
        images=test.images.numpy(),
        labels=labels,
        published_indices=published,
        scale=np.float64(test.scale),
    )
    shutil.copyfile(script.__file__, folder / "generate_properties.py")
    eran.write(folder / "eran", sidecar, pixels, labels[:count])
    (folder / f"{sidecar['name']}.json").write_text(json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def _described(finished: Finished, request: Request) -> dict[str, Any]:
    """What is known before anything is written."""
    test = finished.data.test
    name = re.sub(r"[^A-Za-z0-9._-]", "_", finished.experiment.problem)  # as in file names, and between commas
    normalize = leading_normalisation(finished.module)
    mean, std = (
        None if normalize is None else getattr(normalize, key).flatten().expand(test.image_shape[0]).tolist()
        for key in ("mean", "std")
    )
    return {
        "name": name,
        "evocert": evocert.__version__,
        "onnx": f"onnx/{name}.onnx{request.suffix}",
        "sha256": "",  # of the ONNX file before it is packed
        "data": finished.data.name,
        "part": "test",
        "layout": "NCHW",
        "input_shape": [1, *test.image_shape],
        "input_units": WRITERS[request.normalisation][1],
        "normalisation": {
            "where": request.normalisation if normalize is not None else "none",
            "mean": mean,
            "std": std,
        },
        "num_classes": finished.network.num_classes,
        "eps": finished.eps,
        "eps_units": f"{PIXELS}; the box is clipped to [0, 1]",
        "vnnlib": request.vnnlib,
        "timeout": request.timeout,
        "onnx_difference": 0.0,  # the largest between torch and ONNX Runtime, over the logits of all images looked at
    }


def _check_count(properties: int, count: int, timeout: float) -> None:
    if not properties:
        raise InputError(
            f"examples={count}: the network classifies none of the first {count} test images correctly, so that there is no "
            "property to write; allowed are examples with one that it does"
        )
    if properties * timeout > ALL_TIMEOUTS:
        least = math.floor(ALL_TIMEOUTS / properties)
        fewer = math.floor(ALL_TIMEOUTS / timeout)
        ways = [f"timeout={least}"] * (least >= 1) + [f"examples={fewer}"] * (fewer >= 1)
        raise InputError(
            f"timeout={timeout:g}: for {properties} properties that is {properties * timeout / 3600:.3g} hours, allowed are 6 "
            f"in all; {' or '.join(ways)} would do"
        )


def _check_property(path: Path, image: np.ndarray, label: int, sidecar: dict[str, Any]) -> None:
    """Whether another reader finds in the file what it is to say. That the box is rounded outward is for the tests."""
    found = read_property(path)
    ends = (np.clip(image.astype(np.float64) + shift, 0, 1) for shift in (-sidecar["eps"], sidecar["eps"]))
    if sidecar["normalisation"]["where"] == "outside":
        mean, std = (np.array(sidecar["normalisation"][key])[:, None, None] for key in ("mean", "std"))
        ends = ((end - mean) / std for end in ends)
    same = all(
        np.allclose(got, end.ravel(), rtol=1e-14, atol=1e-15)
        for got, end in zip((found.lower, found.upper), ends, strict=True)
    )
    others = tuple(k for k in range(sidecar["num_classes"]) if k != label)
    if not same or (found.label, found.targets, found.classes) != (label, others, len(others) + 1):
        raise ExportError(f"{path.name} is not read back as it should be: nothing is written")
