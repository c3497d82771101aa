"""Images for ERAN, which reads properties as an image and an eps, not as VNN-LIB with a disjunction."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

BYTE = 255  # ERAN divides what it reads by it

README = """\
# For ERAN

`images.csv` has one row for each of the first {count} test images, in order, also for those that the network misclassifies
(ERAN leaves them out itself): the class, then the pixels from 0 to 255 in the order height, width, channel.
{whole}

ERAN (https://github.com/eth-sri/eran) looks for images in its own folder `data`, under a name that `--subset` completes. With
`$ERAN` for its folder and `$HERE` for the one above this:

    cp $HERE/eran/images.csv $ERAN/data/{dataset}_test_{name}.csv
    cd $ERAN/tf_verify
    python3 . --netname $HERE/{onnx} --dataset {dataset} --subset {name} --num_tests {count} \\
        --mean {mean} --std {std} --epsilon {eps!r} --domain deeppoly

eps is in pixels from 0 to 1, and ERAN clips the box to them. {units}
`--mean` and `--std` must be given: without them ERAN takes its own for some data sets, without a word.{shape}{packed}

These lines follow from ERAN's public source; they were not run.
"""


def write(folder: Path, sidecar: Mapping[str, Any], pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write images.csv and README.md.

    Args:
        folder: is made.
        sidecar: what the export's JSON file says.
        pixels: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]``.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir()
    rows = [f"{label},{','.join(_values(image))}\n" for image, label in zip(pixels, labels.tolist(), strict=True)]
    (folder / "images.csv").write_text("".join(rows))
    (folder / "README.md").write_text(_readme(sidecar, pixels))


def _values(image: np.ndarray) -> list[str]:
    """``[C, H, W]`` float32 in [0, 1] -> 0 to 255 in H, W, C order; whole numbers without a point."""
    return [
        format(Decimal(repr(value)), "f").removesuffix(".0")
        for value in _bytes(image).transpose(1, 2, 0).ravel().tolist()
    ]


def _bytes(pixels: np.ndarray) -> np.ndarray:
    exact = pixels.astype(np.float64) * BYTE  # 24 bits times 8: no rounding
    # A byte divided by 255 in float32 comes back within rounding; it is that byte that is meant.
    return np.where((exact.round() / BYTE).astype(np.float32) == pixels, exact.round(), exact)


def _readme(sidecar: Mapping[str, Any], pixels: np.ndarray) -> str:
    channels, height, width = pixels.shape[1:]
    normalisation = sidecar["normalisation"]
    outside = normalisation["where"] == "outside"
    values = _bytes(pixels)
    fits = channels == 1 or (channels, height, width) == (3, 32, 32)
    return README.format(
        count=len(pixels),
        whole="They are whole numbers."
        if bool((values == values.round()).all())
        else "They are not whole numbers, because the data set's grey levels are other fractions of 1; decimals are kept.",
        dataset="mnist" if channels == 1 else "cifar10",
        name=sidecar["name"],
        onnx=sidecar["onnx"].removesuffix(".gz"),
        mean=" ".join(map(repr, normalisation["mean"] if outside else [0] * channels)),
        std=" ".join(map(repr, normalisation["std"] if outside else [1] * channels)),
        eps=sidecar["eps"],
        units="The network takes normalised inputs." if outside else "The normalisation is in the network already.",
        shape=""
        if fits
        else f"\n\nERAN reads images of one channel, or of 3x32x32: not these, of {channels}x{height}x{width}.",
        packed=f"\n\n`{sidecar['onnx']}` is packed: unpack it first (`gzip -dk`)."
        if sidecar["onnx"].endswith(".gz")
        else "",
    )
