"""Images with labels, split into train, validation and test. A new data set is one function and one line in DATASETS.

Files on disk are never trusted: every one is checked against the MD5 checksum of the published data before it is used.
"""

import contextlib
import difflib
import gzip
import hashlib
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evocert.errors import InputError

DIGITS_TEST_FRACTION = 0.2
DIGITS_TEST_SEED = 0  # fixed for good: published figures on digits are figures on this part
_HOW = "with data_dir or the environment variable EVOCERT_DATA"
# MD5 of the unpacked files; torchvision knows those of the .gz only, and checks nothing once files are unpacked.
_IDX_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


class DataError(InputError):
    """A data set that cannot be loaded as asked: one line with the file or setting, what was found, what is allowed."""


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a data set, as stored.

    Attributes:
        images: ``[N, C, H, W]``, uint8 or float32.
        labels: ``[N]``, int64.
        indices: ``[N]``, int64, the position of each image in the published set that ``Dataset.sources`` names.
        scale: what images are divided by to lie in [0, 1]: 255 for uint8, 16 for digits, 1 for floats.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def sha256(self) -> str:
        """Of the images and labels as stored."""
        content = hashlib.sha256()
        for tensor in (self.images, self.labels):
            content.update(tensor.contiguous().numpy().data)
        return content.hexdigest()

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]``, float32 in [0, 1], always a copy, and labels ``[B]``, int64, of these rows."""
        return self.images[rows].to(torch.float32) / self.scale, self.labels[rows]

    def _take(self, rows: Tensor) -> "Part":
        return Part(self.images[rows], self.labels[rows], self.indices[rows], self.scale)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint parts. ``sources`` says for each what its indices count: "train", "test" or "all"."""

    name: str
    train: Part
    validation: Part
    test: Part
    num_classes: int
    sources: dict[str, str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.train.image_shape

    def split_record(self) -> dict[str, Any]:
        """What split.json holds, plain values.

        ``{"data": name, "train": {"of": "train", "indices": [...], "sha256": ...}, ...}``: the hash is that of the part's
        images and labels, in order.
        """
        record: dict[str, Any] = {"data": self.name}
        for key, part in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            record[key] = {"of": self.sources[key], "indices": part.indices.tolist(), "sha256": part.sha256}
        return record


@dataclass(frozen=True)
class _Where:
    """Where a loader may look: the torchvision root, whether it is our own cache, the npz file, may it download."""

    root: Path
    is_our_cache: bool
    data_path: Path | None
    download: bool


@dataclass(frozen=True)
class _Loaded:
    """What a loader returns: everything that may be trained on, and the test part."""

    train: Part
    test: Part
    num_classes: int
    sources: dict[str, str] = field(default_factory=lambda: {"train": "train", "validation": "train", "test": "test"})


def load(
    name: str = "digits",
    *,
    data_dir: str | Path | None = None,
    data_path: str | Path | None = None,
    download: bool = True,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Load a data set and split a validation part, stratified by class, off its training part.

    Args:
        name: a key of ``DATASETS``, or the path of an .npz file.
        data_dir: folder that holds MNIST/, FashionMNIST/ or cifar-10-batches-py/. By default the environment variable
            EVOCERT_DATA, else .cache/evocert in the home folder. Not looked at for digits and npz.
        data_path: the file of ``name="npz"``.
        download: fetch what is missing; damaged files are replaced in the default cache only.
        validation_fraction: in (0, 1), of each class, rounded; every class keeps at least one training image.
        seed: >= 0, of the validation part alone; the test part never depends on it, nor on global generators.

    Raises:
        DataError: bad argument, missing or damaged file, failed download, or npz content that is not allowed.
    """
    if not isinstance(validation_fraction, float | int) or not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction!r}: allowed is a number above 0 and below 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed={seed!r}: allowed is an integer >= 0")
    if name.endswith(".npz"):
        if data_path is not None:
            raise DataError(f"data={name!r} is a file already, so data_path={str(data_path)!r} must be left out")
        name, data_path = "npz", name
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS)
        hint = f"; did you mean {' or '.join(near)}?" if near else ";"
        raise DataError(f"data={name!r} is not known{hint} allowed: {', '.join(DATASETS)}, or the path of an .npz file")
    if data_path is not None and name != "npz":
        raise DataError(f"data_path={str(data_path)!r} is for data='npz' only, found data={name!r}")

    given = data_dir or os.environ.get("EVOCERT_DATA")
    root = data_folder(given) if given else Path.home() / ".cache" / "evocert"
    loaded = DATASETS[name](_Where(root, not given, None if data_path is None else Path(data_path), download))
    kept, taken = _stratified(loaded.train.labels, validation_fraction, seed)
    if len(taken) == 0:
        found = f"{validation_fraction} of {len(kept)} images"
        raise DataError(f"validation_fraction={validation_fraction} leaves no validation image ({found} of {name!r})")
    train, validation = loaded.train._take(kept), loaded.train._take(taken)
    return Dataset(name, train, validation, loaded.test, loaded.num_classes, loaded.sources)


def data_folder(given: str | Path) -> Path:
    """A folder as a user writes it, ``~`` and relative paths included, as an absolute path."""
    return Path(given).expanduser().resolve()


def channel_statistics(part: Part) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (over N, H and W) of each channel, in [0, 1] pixel units; a zero std becomes 1.0."""
    # Counted from a pixel of each channel: a constant channel gives exactly 0, and uint8 sums are exact in any order.
    origin = part.images[0, :, :1, :1].to(torch.float64)
    total, squares = torch.zeros(len(origin), dtype=torch.float64), torch.zeros(len(origin), dtype=torch.float64)
    for chunk in part.images.split(1024):
        offset = chunk.to(torch.float64) - origin
        total += offset.sum(dim=(0, 2, 3))
        squares += offset.square().sum(dim=(0, 2, 3))
    count = part.images[:, 0].numel()
    std = (squares / count - (total / count).square()).clamp(min=0).sqrt() / part.scale
    mean = (origin.flatten() + total / count) / part.scale
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def _stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows kept and rows taken, both sorted, round(fraction * count) of each class taken and at least one kept."""
    # Raw bits, because numpy keeps a bit generator's stream for good but not what Generator methods make of it.
    keys = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(labels))
    taken = np.zeros(len(labels), dtype=bool)
    for label in labels.unique().tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        number = min(round(fraction * len(rows)), len(rows) - 1)
        taken[rows[np.argsort(keys[rows], kind="stable")[:number]]] = True
    return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))


def _whole(images: np.ndarray, labels: np.ndarray, scale: float) -> Part:
    """A published set as one part; images ``[N, C, H, W]``, labels ``[N]``. Copies, since a source may be read-only."""
    numbers = torch.from_numpy(labels.astype(np.int64))
    return Part(torch.from_numpy(np.array(images, order="C")), numbers, torch.arange(len(labels)), scale)


def _load_digits(where: _Where) -> _Loaded:
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = _whole(digits.images[:, None].astype(np.uint8), digits.target, 16.0)
    rest, test = _stratified(whole.labels, DIGITS_TEST_FRACTION, DIGITS_TEST_SEED)
    sources = {"train": "all", "validation": "all", "test": "all"}
    return _Loaded(whole._take(rest), whole._take(test), 10, sources)


def _load_idx(where: _Where, torchvision_class: str) -> _Loaded:
    files = _verified_files(where, Path(torchvision_class, "raw"), _IDX_MD5[torchvision_class], torchvision_class)

    def part(prefix: str) -> Part:
        images, labels = (_parse_idx(files[f"{prefix}-{kind}-ubyte"]) for kind in ("images-idx3", "labels-idx1"))
        return _whole(images[:, None], labels, 255.0)

    return _Loaded(part("train"), part("t10k"), 10)


def _load_cifar10(where: _Where) -> _Loaded:
    from torchvision.datasets import CIFAR10

    md5s = dict(CIFAR10.train_list + CIFAR10.test_list) | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    _verified_files(where, Path(CIFAR10.base_folder), md5s, "CIFAR10")

    def part(train: bool) -> Part:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions of numpy warn about pickles as old as these
            try:
                source = CIFAR10(where.root, train=train)
            except RuntimeError as error:
                raise DataError(f"{where.root / CIFAR10.base_folder}: {_one_line(error)}") from error
        return _whole(source.data.transpose(0, 3, 1, 2), np.array(source.targets), 255.0)

    return _Loaded(part(train=True), part(train=False), 10)


def _load_npz(where: _Where) -> _Loaded:
    path = where.data_path
    if path is None:
        raise DataError("data='npz' needs data_path, the path of an .npz file")
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not a complete zip file")
            with np.load(file, allow_pickle=False) as archive:
                found = archive.files
                arrays = {key: np.asarray(archive[key]) for key in names if key in found}
    except FileNotFoundError as error:
        raise DataError(f"data='npz': there is no file {path}") from error
    except Exception as error:  # a cut, altered, encrypted or pickled file makes numpy and zipfile raise many things
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {_one_line(error)}") from error
    if missing := [key for key in names if key not in found]:
        present = ", ".join(found) or "nothing"
        raise DataError(f"{path} has no {', '.join(missing)}; found: {present}; needed: {', '.join(names)}")

    train, test = (_npz_part(path, arrays, part) for part in ("train", "test"))
    if train.image_shape != test.image_shape:
        shapes = f"{list(train.image_shape)} and {list(test.image_shape)}"
        raise DataError(f"{path}: x_train and x_test must have the same C,H,W, found {shapes}")
    num_classes = int(train.labels.max()) + 1
    if num_classes < 2:
        raise DataError(f"{path}: y_train has labels up to {num_classes - 1}, one class; at least two are needed")
    present = train.labels.unique()
    if len(present) < num_classes:
        absent = next(k for k, label in enumerate(present.tolist()) if label != k)
        raise DataError(
            f"{path}: y_train has label {num_classes - 1} but no {absent}; allowed is 0 to K - 1, each present"
        )
    if (largest := int(test.labels.max())) >= num_classes:
        raise DataError(f"{path}: y_test has label {largest}, allowed is 0 to {num_classes - 1} as in y_train")
    return _Loaded(train, test, num_classes)


def _npz_part(path: Path, arrays: dict[str, np.ndarray], part: str) -> Part:
    images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    x, y = f"{path}: x_{part}", f"{path}: y_{part}"
    if images.dtype.name not in ("uint8", "float16", "float32", "float64"):  # in either byte order
        raise DataError(f"{x} has dtype {images.dtype}, allowed is uint8 (0..255), or float16, 32 or 64 in [0, 1]")
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{x} has shape {list(images.shape)}, allowed is N,C,H,W, each at least 1")
    if images.dtype != np.uint8:
        if not np.isfinite(images).all():
            raise DataError(f"{x} has NaN or infinite values, allowed are floats in [0, 1]")
        if images.min() < 0 or images.max() > 1:
            raise DataError(f"{x} has values from {images.min()} to {images.max()}, allowed are floats in [0, 1]")
        images = images.astype(np.float32)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{y} has dtype {labels.dtype}, allowed are integers")
    if labels.shape != (len(images),):
        raise DataError(f"{y} has shape {list(labels.shape)}, allowed is [{len(images)}], one label for each image")
    if labels.min() < 0 or labels.max() >= 2**31:
        raise DataError(f"{y} has labels from {labels.min()} to {labels.max()}, allowed is 0 to {2**31 - 1}")
    return _whole(images, labels, 255.0 if images.dtype == np.uint8 else 1.0)


def _verified_files(where: _Where, below: Path, md5s: dict[str, str], torchvision_class: str) -> dict[str, bytes]:
    """The unpacked content of every file in ``md5s``, file name -> MD5, that lies in the folder root/below."""
    folder = where.root / below
    contents, missing = {}, []
    for name, md5 in md5s.items():
        try:
            contents[name] = _read_verified(folder / name, md5)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
        except DataError:
            if not (where.download and where.is_our_cache):
                raise
            missing.append(name)
    if not missing:
        return contents
    if not where.download:
        found = f"{folder} lacks {', '.join(missing)}" if folder.is_dir() else f"there is no folder {folder}"
        raise DataError(f"{found}; put the files there, or name the folder above {below} {_HOW}, or set download=true")
    _download(where.root, below, md5s, torchvision_class)
    return _verified_files(replace(where, download=False), below, md5s, torchvision_class)


def _read_verified(path: Path, md5: str) -> bytes:
    """Content of a file, or of the .gz beside it when only that exists; unpacked in memory, for read-only copies."""
    source = path
    try:
        if not path.exists():
            source = path.with_name(f"{path.name}.gz")
        content = source.read_bytes()
        if source != path:
            content = gzip.decompress(content)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be read: {_one_line(error)}; put a good copy in its place") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        advice = "put a good copy in its place, or delete it and set download=true"
        raise DataError(f"{source} is truncated or altered: MD5 found {found}, expected {md5}; {advice}")
    return content


def _download(root: Path, below: Path, names: Iterable[str], torchvision_class: str) -> None:
    """Let torchvision download into a folder of its own, then move: nothing half-written is ever left in place."""
    try:
        from torchvision import datasets

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            with contextlib.redirect_stdout(sys.stderr):
                getattr(datasets, torchvision_class)(temporary, download=True)
            (root / below).mkdir(parents=True, exist_ok=True)
            for name in names:
                os.replace(Path(temporary, below, name), root / below / name)
    except Exception as error:  # network, server, archive or disk: whatever it is, the user needs the way around it
        cause = f"{torchvision_class} could not be downloaded to {root}: {_one_line(error)}"
        raise DataError(f"{cause}; name the folder above a local copy's {below} {_HOW}, with download=false") from error


def _parse_idx(content: bytes) -> np.ndarray:
    """The uint8 array of an IDX file: a magic number whose last byte counts the axes, big-endian sizes, the values."""
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


TORCHVISION: dict[str, Callable[[_Where], _Loaded]] = {  # those that are looked up in ``data_dir``
    "mnist": partial(_load_idx, torchvision_class="MNIST"),
    "fashion_mnist": partial(_load_idx, torchvision_class="FashionMNIST"),
    "cifar10": _load_cifar10,
}
DATASETS: dict[str, Callable[[_Where], _Loaded]] = {"digits": _load_digits, **TORCHVISION, "npz": _load_npz}
