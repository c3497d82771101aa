"""Draws other images by a seed, and writes their properties: python generate_properties.py SEED

A copy of this file lies in every folder that ``evocert export`` writes, and needs that folder, numpy and onnxruntime. It
replaces vnnlib/, instances.csv and the selection in the folder's JSON file, and draws from the whole test part in images.npz
until there are as many properties as before. Images that the network misclassifies are left out and listed.

``evocert export`` writes its own properties by the functions below, so that an image has one text, whoever draws it.
"""

import argparse
import csv
import gzip
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Sidecar = Mapping[str, Any]  # what the folder's JSON file holds


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Draw images by a seed, and write their VNN-LIB properties.")
    parser.add_argument("seed", type=_seed, help="0 or more; the same seed draws the same images")
    regenerate(Path(__file__).resolve().parent, parser.parse_args().seed)


def regenerate(folder: Path, seed: int) -> None:
    """Replaces the properties in ``folder`` by those of images that ``seed`` draws, as many as there are."""
    paths = sorted(folder.glob("*.json"))
    if len(paths) != 1:
        raise SystemExit(f"{folder} has {len(paths)} JSON files: allowed is one, that of the export")
    path = paths[0]
    sidecar = json.loads(path.read_text())
    with np.load(folder / "images.npz", allow_pickle=False) as arrays:
        pixels, labels = as_pixels(arrays["images"], arrays["scale"]), arrays["labels"]
        published = arrays["published_indices"]
    session = session_of(_read(folder / sidecar["onnx"]))
    # Raw bits: numpy keeps a bit generator's stream for good, but not what is made of it by methods such as permutation.
    keys = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(labels))
    wanted = len(sidecar["selection"]["indices"])
    rows: list[int] = []
    found: list[np.ndarray] = []
    correct = 0
    for index in np.argsort(keys, kind="stable").tolist():
        rows.append(index)
        found.append(run(session, network_inputs(pixels[index : index + 1], sidecar)))
        correct += int(classified_correctly(found[-1], labels[index : index + 1])[0])
        if correct == wanted:
            break
    sidecar["selection"] = selection(seed, np.array(rows), np.concatenate(found), labels, published)
    indices = sidecar["selection"]["indices"]
    fresh = folder / ".properties.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    write_properties(fresh, sidecar, pixels, labels, indices)
    shutil.rmtree(folder / "vnnlib", ignore_errors=True)
    for part in ("vnnlib", "instances.csv"):
        (fresh / part).replace(folder / part)
    fresh.rmdir()
    path.write_text(json.dumps(sidecar, indent=1) + "\n")


def as_pixels(images: np.ndarray, scale: Any) -> np.ndarray:
    """``[N, C, H, W]`` as stored -> float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(scale)


def network_inputs(pixels: np.ndarray, sidecar: Sidecar) -> np.ndarray:
    """``[N, C, H, W]`` float32 in [0, 1] pixels -> the same in the units that the ONNX file takes, float32."""
    units = _units(sidecar)
    if units is None:
        return pixels
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in units)
    return (pixels - mean) / std


def session_of(content: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread of the CPU: the same bits whatever else the machine does."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: np.ndarray) -> np.ndarray:
    """``[N, C, H, W]`` float32 -> logits ``[N, K]``, one image at a time, as the file's shape has it."""
    return np.concatenate([session.run(["output"], {"input": image[None]})[0] for image in inputs])


def classified_correctly(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits ``[N, K]``, labels ``[N]`` -> bools ``[N]``. A tie is no correct answer, nor is NaN."""
    own = np.take_along_axis(logits, labels[:, None], 1)
    return (own > logits).sum(1) == logits.shape[1] - 1


def selection(
    seed: int | None, rows: np.ndarray, logits: np.ndarray, labels: np.ndarray, published: np.ndarray
) -> dict[str, Any]:
    """What the folder's JSON file says of the images that were looked at.

    Args:
        seed: that drew them; None: the first ones of the test part.
        rows: ``[n]``, their places in the test part.
        logits: ``[n, K]``, of ONNX Runtime.
        labels, published: ``[N]``, of the whole test part: the classes, and the places in the published data set.
    """
    correct = classified_correctly(logits, labels[rows])
    indices = rows[correct]
    return {
        "seed": seed,
        "indices": indices.tolist(),
        "published_indices": published[indices].tolist(),
        "labels": labels[indices].tolist(),
        "misclassified": rows[~correct].tolist(),
        "accuracy": len(indices) / len(rows),
        "logits": logits[correct].tolist(),
    }


def write_properties(
    folder: Path, sidecar: Sidecar, pixels: np.ndarray, labels: np.ndarray, indices: Sequence[int]
) -> list[Path]:
    """Writes vnnlib/ and instances.csv for some rows of ``pixels [N, C, H, W]`` and ``labels [N]``; the properties' paths."""
    (folder / "vnnlib").mkdir()
    paths, rows = [], io.StringIO()
    for index in indices:
        name = f"vnnlib/{sidecar['name']}_{index}.vnnlib{'.gz' if sidecar['onnx'].endswith('.gz') else ''}"
        text = property_text(pixels[index], int(labels[index]), index, sidecar).encode("ascii")
        paths.append(folder / name)
        paths[-1].write_bytes(packed(text) if name.endswith(".gz") else text)
        csv.writer(rows, lineterminator="\n").writerow([sidecar["onnx"], name, f"{sidecar['timeout']:.15g}"])
    (folder / "instances.csv").write_text(rows.getvalue())
    return paths


def packed(content: bytes) -> bytes:
    """By gzip, without the time of day: the same content gives the same file."""
    return gzip.compress(content, mtime=0)


def property_text(image: np.ndarray, label: int, index: int, sidecar: Sidecar) -> str:
    """A VNN-LIB file that states a counterexample: an input within eps for which another class is at least as large.

    Args:
        image: ``[C, H, W]`` float32 in [0, 1] pixels.
        label: its class.
        index: its row in the test part.
        sidecar: ``eps`` in [0, 1] pixels; ``input_shape`` [1, C, H, W]; ``num_classes``; ``vnnlib``, the version of the
            format; ``normalisation``, whose place, mean and std decide the units of the bounds.
    """
    shape, classes = sidecar["input_shape"], sidecar["num_classes"]
    first, declarations, x, y = FORMATS[sidecar["vnnlib"]](shape, classes)
    bounds = zip(x, _box(image, sidecar), strict=True)
    others = [f"  (and (<= {y[label]} {y[k]}))" for k in range(classes) if k != label]
    lines = [
        *first,
        f"; {sidecar['name']}: image {index} of the test part of {sidecar['data']}, class {label}.",
        f"; Inputs: {shape} in C-order (NCHW), in {sidecar['input_units']}. The box holds every image whose pixels are within",
        f"; eps = {sidecar['eps']!r} of this one's (pixels in [0, 1]) and in [0, 1]; it is rounded outward.",
        f"; What is stated is a counterexample: unsat means that class {label} is larger than every other in the whole box.",
        "",
        *declarations,
        "",
        *(
            f"(assert ({relation} {name} {end}))"
            for name, ends in bounds
            for relation, end in zip((">=", "<="), ends, strict=True)
        ),
        "",
        "(assert (or",
        *others,
        "))",
    ]
    return "\n".join(lines) + "\n"


Words = tuple[list[str], list[str], list[str], list[str]]  # first lines, declarations, names of inputs and of outputs


def _in_1_0(shape: Sequence[int], classes: int) -> Words:
    x, y = ([f"{name}_{i}" for i in range(count)] for name, count in (("X", math.prod(shape)), ("Y", classes)))
    return [], [f"(declare-const {name} Real)" for name in (*x, *y)], x, y


def _in_2_0(shape: Sequence[int], classes: int) -> Words:
    declarations = [
        "(declare-network N",
        f"  (declare-input X float32 [{','.join(map(str, shape))}])",
        f"  (declare-output Y float32 [1,{classes}])",
        ")",
    ]
    x = [f"X[{','.join(map(str, at))}]" for at in np.ndindex(*shape)]
    return ["(vnnlib-version <2.0>)"], declarations, x, [f"Y[0,{k}]" for k in range(classes)]


FORMATS: dict[str, Callable[[Sequence[int], int], Words]] = {"1.0": _in_1_0, "2.0": _in_2_0}


def _box(image: np.ndarray, sidecar: Sidecar) -> Iterator[tuple[str, str]]:
    """For each input, in C-order, its bounds."""
    units = _units(sidecar)
    for channel, pixels in enumerate(image):
        mean, std = (0.0, 1.0) if units is None else (units[0][channel], units[1][channel])
        for pixel in pixels.ravel().tolist():
            yield _interval(pixel, sidecar["eps"], mean, std)


@lru_cache(maxsize=2**16)  # images of bytes have 256 values
def _interval(pixel: float, eps: float, mean: float, std: float) -> tuple[str, str]:
    lower, upper = exact_interval(pixel, eps, mean, std)
    return outward(lower, -math.inf), outward(upper, math.inf)


def exact_interval(pixel: float, eps: float, mean: float = 0.0, std: float = 1.0) -> tuple[Fraction, Fraction]:
    """[max(pixel - eps, 0), min(pixel + eps, 1)] in units of (x - mean) / std, without rounding."""
    centre, radius = Fraction(pixel), Fraction(eps)
    ends = max(centre - radius, Fraction(0)), min(centre + radius, Fraction(1))
    lower, upper = ((end - Fraction(mean)) / Fraction(std) for end in ends)
    return lower, upper


def outward(exact: Fraction, towards: float) -> str:
    """The nearest decimal that lies, both as written and as read into float64, at ``exact`` or ``towards`` -inf or inf."""
    number = float(exact)
    sign = math.copysign(1, towards)
    while True:
        text = format(Decimal(repr(number)), "f")  # digits alone: not every reader knows 1e-05
        if all((end - exact) * int(sign) >= 0 for end in (Fraction(text), Fraction(number))):
            return text
        number = math.nextafter(number, towards)


def _units(sidecar: Sidecar) -> tuple[list[float], list[float]] | None:
    """Mean and std of each channel where the ONNX file takes normalised inputs, else None."""
    normalisation = sidecar["normalisation"]
    return (normalisation["mean"], normalisation["std"]) if normalisation["where"] == "outside" else None


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a whole number, 0 or more")
    return int(text)


if __name__ == "__main__":
    main()
