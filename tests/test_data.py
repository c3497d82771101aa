"""Data sets: what is read, what is refused, and how the parts are split."""

import gzip
import hashlib
import json
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor

from evocert import data
from evocert.data import DATASETS, DataError, Dataset, Part, channel_statistics, load
from evocert.errors import InputError

REAL = os.environ.get("EVOCERT_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="EVOCERT_DATA does not point to a folder with the data sets")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the machine's own settings or caches is seen, or written."""
    monkeypatch.delenv("EVOCERT_DATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message with which load refuses; always one line."""
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def counts(part: Part, num_classes: int = 10) -> list[int]:
    return part.labels.bincount(minlength=num_classes).tolist()


def indices(dataset: Dataset) -> tuple[set[int], set[int], set[int]]:
    return tuple(set(part.indices.tolist()) for part in (dataset.train, dataset.validation, dataset.test))


# Parts


@pytest.fixture
def part() -> Part:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(4, 1, 1, 1)
    return Part(images, torch.tensor([3, 1, 2, 0]), torch.tensor([10, 11, 12, 13]), 255.0)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])])
def test_batch_scales_to_unit_floats(part: Part, rows: Tensor | slice) -> None:
    images, labels = part.batch(rows)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.flatten().tolist() == [np.float32(0.2), 1.0]
    assert labels.tolist() == [1, 2]


def test_batch_keeps_the_order_of_rows(part: Part) -> None:
    images, labels = part.batch(torch.tensor([2, 0, 2]))
    assert images.flatten().tolist() == [1.0, 0.0, 1.0]
    assert labels.tolist() == [2, 3, 2]


def test_batch_of_floats_is_a_copy() -> None:
    stored = Part(torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.int64), torch.arange(2), 1.0)
    stored.batch(slice(0, 2))[0].zero_()
    assert stored.images.flatten().tolist() == [0.5, 0.5]


def test_part_knows_its_size() -> None:
    stored = Part(torch.zeros(5, 3, 2, 4), torch.zeros(5, dtype=torch.int64), torch.arange(5), 1.0)
    assert len(stored) == 5
    assert stored.image_shape == (3, 2, 4)


# Channel statistics


def test_channel_statistics_agree_with_numpy_across_chunks() -> None:
    images = torch.randint(0, 256, (2500, 3, 2, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 1] //= 3
    zeros = torch.zeros(2500, dtype=torch.int64)
    mean, std = channel_statistics(Part(images, zeros, zeros, 255.0))
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_channel_statistics_by_hand() -> None:
    images = torch.tensor([[[[0.25, 0.75]], [[0.1, 0.1]]], [[[0.25, 0.75]], [[0.1, 0.1]]]])  # [2, 2, 1, 2]
    mean, std = channel_statistics(Part(images, torch.zeros(2), torch.zeros(2), 1.0))
    assert mean == [0.5, pytest.approx(0.1)]
    assert std == [0.25, 1.0]  # a constant channel is left unscaled


def test_channel_statistics_keep_a_small_deviation() -> None:
    images = 0.9 + 2.0**-20 * torch.tensor([0.0, 1.0]).repeat(2000).reshape(-1, 1, 1, 1)
    _, std = channel_statistics(Part(images, torch.zeros(4000), torch.zeros(4000), 1.0))
    assert std == [pytest.approx(images.double().std(correction=0).item(), rel=1e-9)]


# Arguments


@pytest.mark.parametrize(
    ("name", "meant"), [("mnits", "mnist"), ("fashion-mnist", "fashion_mnist"), ("CIFAR10", "cifar10")]
)
def test_unknown_name_gets_the_nearest_and_all(name: str, meant: str) -> None:
    message = refusal(name)
    assert f"data={name!r} is not known; did you mean {meant}" in message
    assert all(known in message for known in DATASETS)
    assert ".npz" in message


def test_unknown_name_far_from_all() -> None:
    assert "did you mean" not in refusal("zzz")


def test_registry_names() -> None:
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10", "npz"]


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_validation_fraction_outside_its_range(fraction: Any) -> None:
    assert f"validation_fraction={fraction!r}: allowed is a number above 0 and below 1" in refusal(
        validation_fraction=fraction
    )


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_seed_outside_its_range(seed: Any) -> None:
    assert f"seed={seed!r}: allowed is an integer >= 0" in refusal(seed=seed)


def test_data_path_without_npz() -> None:
    message = refusal("digits", data_path="a.npz")
    assert "data_path='a.npz' is for data='npz' only, found data='digits'" in message


def test_npz_named_twice() -> None:
    assert "data_path='b.npz' must be left out" in refusal("a.npz", data_path="b.npz")


def test_npz_without_a_path() -> None:
    assert "data='npz' needs data_path" in refusal("npz")


def test_data_error_is_an_input_error() -> None:
    assert issubclass(DataError, InputError)


# Digits


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load()


def test_digits_are_scikit_learns(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    published = load_digits()
    for part in (digits.train, digits.validation, digits.test):
        images, labels = part.batch(slice(None))
        rows = part.indices.numpy()
        assert part.images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy()[:, 0], published.images[rows] / 16)
        np.testing.assert_array_equal(labels.numpy(), published.target[rows])
    assert (digits.name, digits.num_classes, digits.image_shape) == ("digits", 10, (1, 8, 8))


def test_digits_are_split_by_class(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    published = np.bincount(load_digits().target)
    test = [round(0.2 * count) for count in published]
    assert counts(digits.test) == test
    rest = published - test
    assert counts(digits.validation) == [round(0.1 * count) for count in rest]
    train, validation, tested = indices(digits)
    assert sorted([*train, *validation, *tested]) == list(range(1797))


def test_digits_test_part_is_fixed_for_good(digits: Dataset) -> None:
    digest = hashlib.sha256(json.dumps(digits.test.indices.tolist()).encode()).hexdigest()
    assert digest == "4d49093f6282b4247f2893d906c6125d48f0022af93686d033bbeeb3d27fb642"


def test_seed_moves_validation_and_not_the_test_part(digits: Dataset) -> None:
    other = load(seed=1)
    assert torch.equal(other.test.indices, digits.test.indices)
    assert torch.equal(other.test.images, digits.test.images)
    assert not torch.equal(other.validation.indices, digits.validation.indices)
    assert counts(other.validation) == counts(digits.validation)


def test_split_depends_on_nothing_but_the_seed(digits: Dataset) -> None:
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - the global generator is what must not matter
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = load()
    assert again.split_record() == digits.split_record()
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_split_record_is_plain_and_points_into_the_one_set(digits: Dataset) -> None:
    record = digits.split_record()
    assert json.loads(json.dumps(record)) == record
    assert list(record) == ["data", "train", "validation", "test"]
    assert record["data"] == "digits"
    assert [record[key]["of"] for key in ("train", "validation", "test")] == ["all"] * 3
    assert record["validation"]["indices"] == sorted(digits.validation.indices.tolist())
    assert (len(record["train"]["indices"]), len(record["test"]["indices"])) == (len(digits.train), len(digits.test))


# Npz


def arrays(**changes: Any) -> dict[str, Any]:
    """Ten training and four test images of shape [2, 3, 5], three classes; ``None`` leaves an array out."""
    generator = np.random.default_rng(0)
    plain = {
        "x_train": generator.integers(0, 256, (10, 2, 3, 5), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]),
        "x_test": generator.integers(0, 256, (4, 2, 3, 5), dtype=np.uint8),
        "y_test": np.array([2, 1, 0, 0]),
    }
    return {name: array for name, array in (plain | changes).items() if array is not None}


def npz(folder: Path, **changes: Any) -> Path:
    path = folder / "file.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_npz_holds_what_was_saved(tmp_path: Path) -> None:
    dataset = load("npz", data_path=npz(tmp_path, extra=np.zeros(3)), validation_fraction=0.3)
    saved = arrays()
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("npz", 3, (2, 3, 5))
    assert counts(dataset.validation, 3) == [1, 1, 1]
    for part, which in ((dataset.train, "train"), (dataset.validation, "train"), (dataset.test, "test")):
        np.testing.assert_array_equal(part.images.numpy(), saved[f"x_{which}"][part.indices.numpy()])
        np.testing.assert_array_equal(part.labels.numpy(), saved[f"y_{which}"][part.indices.numpy()])
    train, validation, test = indices(dataset)
    assert sorted([*train, *validation]) == list(range(10))
    assert test == {0, 1, 2, 3}
    assert {key: value["of"] for key, value in dataset.split_record().items() if key != "data"} == {
        "train": "train",
        "validation": "train",
        "test": "test",
    }


def test_npz_by_its_path_alone(tmp_path: Path) -> None:
    path = npz(tmp_path)
    by_path, by_name = load(str(path), validation_fraction=0.3), load("npz", data_path=path, validation_fraction=0.3)
    assert by_path.split_record() == by_name.split_record()
    assert torch.equal(by_path.train.images, by_name.train.images)


def test_relative_npz_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(load("file.npz", validation_fraction=0.3).test) == 4


def test_uint8_and_float_files_are_the_same_data(tmp_path: Path) -> None:
    saved = arrays()
    whole = load(str(npz(tmp_path)), validation_fraction=0.3)
    x_train, x_test = (saved[name].astype(np.float32) / np.float32(255) for name in ("x_train", "x_test"))
    halves = load(str(npz(tmp_path, x_train=x_train, x_test=x_test)), validation_fraction=0.3)
    assert halves.train.images.dtype == torch.float32
    for one, other in ((whole.train, halves.train), (whole.validation, halves.validation), (whole.test, halves.test)):
        assert torch.equal(one.batch(slice(None))[0], other.batch(slice(None))[0])
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_every_allowed_float_becomes_float32(tmp_path: Path, dtype: str) -> None:
    x_train = (arrays()["x_train"] // 128 / 2).astype(dtype)  # 0 and 0.5: exact in each of them
    dataset = load(str(npz(tmp_path, x_train=x_train)), validation_fraction=0.3)
    assert dataset.train.images.dtype == torch.float32
    np.testing.assert_array_equal(dataset.train.images.numpy(), x_train[dataset.train.indices.numpy()])
    assert dataset.test.images.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "uint64"])
def test_every_integer_label_becomes_int64(tmp_path: Path, dtype: str) -> None:
    dataset = load(str(npz(tmp_path, y_test=np.array([2, 1, 0, 0]).astype(dtype))), validation_fraction=0.3)
    assert dataset.test.labels.dtype == torch.int64
    assert dataset.test.labels.tolist() == [2, 1, 0, 0]


def test_one_pixel_images_are_enough(tmp_path: Path) -> None:
    path = npz(tmp_path, x_train=np.zeros((10, 1, 1, 1)), x_test=np.zeros((4, 1, 1, 1)))
    assert load(str(path), validation_fraction=0.3).image_shape == (1, 1, 1)


def with_value(value: float) -> np.ndarray:
    x = np.full((10, 2, 3, 5), 0.5)
    x[7, 1, 2, 4] = value
    return x


IMAGES, LABELS = arrays()["x_train"], arrays()["y_train"]
BAD_ARRAYS = {
    "no y_test": ({"y_test": None}, ["has no y_test", "found: x_train, y_train, x_test;", "needed: x_train, y_train"]),
    "signed pixels": ({"x_train": IMAGES.astype(np.int32)}, ["x_train has dtype int32", "uint8", "float16, 32 or 64"]),
    "bool pixels": ({"x_train": IMAGES > 9}, ["x_train has dtype bool"]),
    "long floats": ({"x_train": np.zeros(IMAGES.shape, np.longdouble)}, ["x_train has dtype float128"]),
    "text": ({"x_test": np.array("cat")}, ["x_test has dtype <U3"]),
    "three axes": ({"x_train": IMAGES[:, 0]}, ["x_train has shape [10, 3, 5]", "N,C,H,W, each at least 1"]),
    "no test images": ({"x_test": IMAGES[:0]}, ["x_test has shape [0, 2, 3, 5]", "each at least 1"]),
    "no channels": ({"x_train": IMAGES[:, :0]}, ["x_train has shape [10, 0, 3, 5]"]),
    "no width": ({"x_train": IMAGES[..., :0]}, ["x_train has shape [10, 2, 3, 0]"]),
    "nan": ({"x_train": with_value(np.nan)}, ["x_train has NaN or infinite values", "[0, 1]"]),
    "infinite": ({"x_train": with_value(np.inf)}, ["x_train has NaN or infinite values"]),
    "too bright": ({"x_train": with_value(255.0)}, ["x_train has values from 0.5 to 255.0", "[0, 1]"]),
    "negative": ({"x_train": with_value(-0.25)}, ["x_train has values from -0.25 to 0.5"]),
    "just above 1": ({"x_train": with_value(1 + 1e-12)}, ["x_train has values from 0.5 to 1.000000000001"]),
    "other sizes": ({"x_test": IMAGES[:4, :, :, :4]}, ["same C,H,W", "[2, 3, 5] and [2, 3, 4]"]),
    "float labels": ({"y_train": LABELS.astype(float)}, ["y_train has dtype float64", "integers"]),
    "bool labels": ({"y_train": LABELS > 1}, ["y_train has dtype bool"]),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[LABELS]}, ["y_train has shape [10, 3]", "allowed is [10]"]),
    "one label short": ({"y_train": LABELS[:9]}, ["y_train has shape [9]", "allowed is [10]"]),
    "negative label": ({"y_test": np.array([0, -1, 1, 2])}, ["y_test has labels from -1 to 2", "0 to"]),
    "huge label": ({"y_train": np.full(10, 2**64 - 1, np.uint64)}, [f"y_train has labels from {2**64 - 1}"]),
    "one class": ({"y_train": LABELS * 0}, ["y_train has labels up to 0", "at least two"]),
    "new test class": ({"y_test": np.array([0, 3, 1, 2])}, ["y_test has label 3, allowed is 0 to 2"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_npz_arrays_that_are_refused(tmp_path: Path, case: str) -> None:
    if case == "long floats" and np.dtype(np.longdouble) == np.float64:
        pytest.skip("long double is double here")
    changes, parts = BAD_ARRAYS[case]
    path = npz(tmp_path, **changes)
    message = refusal(str(path), validation_fraction=0.3)
    assert str(path) in message
    for expected in parts:
        assert expected in message


def test_npz_that_is_not_there(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / 'no.npz'}" in refusal(str(tmp_path / "no.npz"))


def test_npz_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    assert "folder.npz cannot be read as an .npz file" in refusal(str(tmp_path / "folder.npz"))


@pytest.mark.parametrize("content", [b"", b"x_train", pickle.dumps([1, 2]), b"\x93NUMPY\x01\x00"])
def test_npz_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    assert f"{path} cannot be read as an .npz file of plain arrays: not a complete zip" in refusal(str(path))


def test_npz_that_is_one_array(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with path.open("wb") as file:
        np.save(file, IMAGES)
    assert "not a complete zip" in refusal(str(path))


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_npz_that_was_cut(tmp_path: Path, share: float) -> None:
    path = npz(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path} cannot be read" in refusal(str(path))


def test_npz_with_a_flipped_bit(tmp_path: Path) -> None:
    path = npz(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()[:64]) + 8] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in refusal(str(path))


def test_npz_whose_member_is_no_array(tmp_path: Path) -> None:
    path = npz(tmp_path, x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"no array")
    assert "x_train" in refusal(str(path))


def test_npz_with_pickled_objects_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([Trap(tmp_path / "sprung"), None], dtype=object)
    path = npz(tmp_path, y_train=objects)
    message = refusal(str(path))
    assert f"{path} cannot be read as an .npz file of plain arrays" in message
    assert "allow_pickle=False" in message
    assert not (tmp_path / "sprung").exists()
    assert load(str(npz(tmp_path, extra=objects)), validation_fraction=0.3).num_classes == 3  # not asked for, not read


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# The validation part


def labelled(folder: Path, sizes: list[int]) -> Path:
    """A file whose class k has sizes[k] training images, in mixed order."""
    y_train = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    x_train = np.arange(len(y_train), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return npz(folder, x_train=x_train, y_train=y_train, x_test=x_train[:1], y_test=y_train[:1])


@pytest.mark.parametrize(
    ("fraction", "taken"),
    [
        (0.1, [0, 0, 0, 1, 4]),
        (0.3, [0, 1, 2, 3, 12]),
        (0.5, [0, 1, 2, 5, 20]),
        (0.9, [0, 1, 4, 9, 36]),
        (0.999, [0, 1, 4, 9, 39]),
    ],
)
def test_each_class_gives_its_share_and_keeps_one(tmp_path: Path, fraction: float, taken: list[int]) -> None:
    sizes = [1, 2, 5, 10, 40]
    dataset = load(str(labelled(tmp_path, sizes)), validation_fraction=fraction)
    assert counts(dataset.validation, 5) == taken
    assert counts(dataset.train, 5) == [size - number for size, number in zip(sizes, taken, strict=True)]
    train, validation, _ = indices(dataset)
    assert sorted([*train, *validation]) == list(range(58))
    for part in (dataset.train, dataset.validation):
        assert part.indices.tolist() == sorted(part.indices.tolist())
        assert part.images.flatten().tolist() == part.indices.tolist()  # images moved along with their indices


def test_every_image_can_be_validated_on(tmp_path: Path) -> None:
    path = str(labelled(tmp_path, [6, 6]))
    picked = [load(path, validation_fraction=0.34, seed=seed).validation.indices.tolist() for seed in range(40)]
    assert {len(rows) for rows in picked} == {4}
    assert {row for rows in picked for row in rows} == set(range(12))


def test_validation_part_that_would_be_empty(tmp_path: Path) -> None:
    message = refusal(str(labelled(tmp_path, [3, 3])), validation_fraction=0.1)
    assert "validation_fraction=0.1 leaves no validation image (0.1 of 6 images" in message


# MNIST and its kind, on small stand-ins


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


STAND_IN = {
    "train-images-idx3-ubyte": np.random.default_rng(2).integers(0, 256, (40, 4, 3), dtype=np.uint8),
    "train-labels-idx1-ubyte": (np.arange(40) % 10).astype(np.uint8),
    "t10k-images-idx3-ubyte": np.random.default_rng(3).integers(0, 256, (20, 4, 3), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
}
IDX = {name: idx(array) for name, array in STAND_IN.items()}
CUT = "train-images-idx3-ubyte"


def write(folder: Path, files: dict[str, bytes], suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content, mtime=0) if suffix else content)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files are now the published ones."""
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in IDX.items()}
    monkeypatch.setattr(data, "_IDX_MD5", {"MNIST": md5s, "FashionMNIST": md5s})


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A mirror that serves the small files; the list is of what was asked for."""
    asked: list[str] = []

    def serve(url: str, download_root: str, filename: str, md5: str) -> None:
        asked.append(filename)
        print("Downloading", url)
        name = filename.removesuffix(".gz")
        write(Path(download_root), {name: IDX[name]})
        write(Path(download_root), {name: IDX[name]}, ".gz")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", serve)
    return asked


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


@pytest.mark.usefixtures("stand_in", "offline")
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_unpacked_or_packed(tmp_path: Path, name: str, folder: str, suffix: str) -> None:
    write(tmp_path / folder / "raw", IDX, suffix)
    before = listing(tmp_path)
    dataset = load(name, data_dir=tmp_path, validation_fraction=0.25)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == (name, 10, (1, 4, 3))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 10, 20)
    for part, which in ((dataset.train, "train"), (dataset.validation, "train"), (dataset.test, "t10k")):
        rows = part.indices.numpy()
        np.testing.assert_array_equal(part.images.numpy()[:, 0], STAND_IN[f"{which}-images-idx3-ubyte"][rows])
        np.testing.assert_array_equal(part.labels.numpy(), STAND_IN[f"{which}-labels-idx1-ubyte"][rows])
        assert part.scale == 255.0
    assert dataset.sources == {"train": "train", "validation": "train", "test": "test"}
    assert listing(tmp_path) == before  # a local copy is only read


@pytest.mark.usefixtures("stand_in")
def test_folder_from_the_environment_and_from_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good" / "MNIST" / "raw", IDX)
    monkeypatch.setenv("EVOCERT_DATA", str(tmp_path / "good"))
    assert len(load("mnist", download=False, validation_fraction=0.25).test) == 20
    assert str(tmp_path / "other") in refusal("mnist", data_dir=tmp_path / "other", download=False)


def test_missing_folder(tmp_path: Path) -> None:
    message = refusal("mnist", data_dir=tmp_path, download=False)
    assert f"there is no folder {tmp_path / 'MNIST' / 'raw'}" in message
    assert all(way in message for way in ("data_dir", "EVOCERT_DATA", "download=true"))


def test_default_folder_is_in_the_home_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(home / ".cache" / "evocert" / "FashionMNIST") in refusal("fashion_mnist", download=False)
    monkeypatch.setenv("EVOCERT_DATA", "")
    assert str(home / ".cache" / "evocert" / "FashionMNIST") in refusal("fashion_mnist", download=False)


@pytest.mark.usefixtures("stand_in")
def test_missing_files_are_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "MNIST" / "raw", IDX)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    (folder / CUT).unlink()
    assert f"{folder} lacks {CUT}, t10k-labels-idx1-ubyte;" in refusal("mnist", data_dir=tmp_path, download=False)


def cut(content: bytes) -> bytes:
    return content[:-7]


def altered(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


@pytest.mark.usefixtures("stand_in", "offline")
@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("damage", [cut, altered, lambda content: b""])
@pytest.mark.parametrize("name", list(IDX))
def test_damaged_file(tmp_path: Path, name: str, damage: Any, download: bool) -> None:
    folder = write(tmp_path / "MNIST" / "raw", IDX)
    write(folder, IDX, ".gz")  # a good .gz does not hide a bad file
    bad = damage(IDX[name])
    (folder / name).write_bytes(bad)
    message = refusal("mnist", data_dir=tmp_path, download=download)
    found, expected = (hashlib.md5(content).hexdigest() for content in (bad, IDX[name]))
    assert f"{folder / name} is truncated or altered: MD5 found {found}, expected {expected}" in message
    assert (folder / name).read_bytes() == bad  # somebody's own folder is not touched


@pytest.mark.usefixtures("stand_in")
def test_damaged_gz(tmp_path: Path) -> None:
    folder = write(tmp_path / "MNIST" / "raw", IDX, ".gz")
    packed = folder / f"{CUT}.gz"
    good = packed.read_bytes()
    for bad in (good[:-20], altered(good), b"", b"text", good[:40] + bytes([good[40] ^ 255]) + good[41:]):
        packed.write_bytes(bad)
        message = refusal("mnist", data_dir=tmp_path, download=False)
        assert str(packed) in message
        assert "cannot be read" in message or "truncated or altered" in message
    write(folder, {CUT: altered(IDX[CUT])}, ".gz")  # a sound archive of the wrong content
    assert f"{packed} is truncated or altered: MD5" in refusal("mnist", data_dir=tmp_path, download=False)


@pytest.mark.usefixtures("stand_in")
def test_files_in_torchvisions_old_form_are_not_trusted(tmp_path: Path) -> None:
    old = tmp_path / "MNIST" / "processed"
    old.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64)), old / name)
    assert "there is no folder" in refusal("mnist", data_dir=tmp_path, download=False)
    write(tmp_path / "MNIST" / "raw", IDX)
    assert len(load("mnist", data_dir=tmp_path, download=False, validation_fraction=0.25).test) == 20


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("explicit", [False, True])
def test_download(
    tmp_path: Path, home: Path, downloads: list[str], capsys: pytest.CaptureFixture[str], explicit: bool
) -> None:
    root = tmp_path / "new" if explicit else home / ".cache" / "evocert"
    data_dir = root if explicit else None
    dataset = load("mnist", data_dir=data_dir, validation_fraction=0.25)
    assert len(dataset.train) == 30
    assert len(downloads) == 4
    assert capsys.readouterr().out == ""
    assert listing(root) == {f"MNIST/raw/{name}": content for name, content in IDX.items()}
    load("mnist", data_dir=data_dir, validation_fraction=0.25)
    assert len(downloads) == 4  # once is enough


@pytest.mark.usefixtures("stand_in")
def test_missing_file_is_downloaded_into_any_folder(tmp_path: Path, downloads: list[str]) -> None:
    folder = write(tmp_path / "MNIST" / "raw", IDX)
    (folder / CUT).unlink()
    assert len(load("mnist", data_dir=tmp_path, validation_fraction=0.25).train) == 30
    assert downloads
    assert listing(folder) == IDX


@pytest.mark.usefixtures("stand_in")
def test_damaged_file_in_the_default_cache_is_downloaded_again(home: Path, downloads: list[str]) -> None:
    folder = write(home / ".cache" / "evocert" / "MNIST" / "raw", IDX | {CUT: cut(IDX[CUT])})
    assert "truncated or altered" in refusal("mnist", download=False)
    assert not downloads
    assert len(load("mnist", validation_fraction=0.25).train) == 30
    assert listing(folder) == IDX


@pytest.mark.usefixtures("stand_in", "downloads")
def test_download_of_something_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IDX, CUT, altered(IDX[CUT]))
    assert f"{CUT} is truncated or altered: MD5" in refusal("mnist")


@pytest.mark.usefixtures("stand_in", "offline")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_no_network(tmp_path: Path, name: str) -> None:
    message = refusal(name, data_dir=tmp_path / "new")
    assert f"could not be downloaded to {tmp_path / 'new'}:" in message
    assert "no route to host" in message
    assert all(way in message for way in ("data_dir", "EVOCERT_DATA", "download=false"))
    assert listing(tmp_path) == {}


@pytest.mark.usefixtures("stand_in")
def test_download_that_breaks_off_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(url: str, download_root: str, filename: str, md5: str) -> None:
        write(Path(download_root), {CUT: cut(IDX[CUT])})
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        load("mnist")
    assert listing(home) == {}


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal("mnist", data_dir=tmp_path / "file")
    assert str(tmp_path / "file") in message


# CIFAR-10, on small stand-ins


def unpickle_with_a_warning(array: np.ndarray) -> np.ndarray:
    warnings.warn("the file is old", DeprecationWarning, stacklevel=2)
    return array


class OldArray:
    """An array whose unpickling warns, as that of the published files does with some versions of numpy."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickle_with_a_warning, (self.array,)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two training files and a test file of twenty images in the published format, in tmp_path."""
    from torchvision.datasets import CIFAR10

    generator = np.random.default_rng(4)
    pixels = {name: generator.integers(0, 256, (20, 3072), dtype=np.uint8) for name in ("one", "two", "test_batch")}
    labels = list(range(10)) * 2
    files = {name: pickle.dumps({"data": OldArray(array), "labels": labels}, 2) for name, array in pixels.items()}
    files["batches.meta"] = pickle.dumps({"label_names": [str(label) for label in range(10)]}, 2)
    write(tmp_path / CIFAR10.base_folder, files)
    md5s = [[name, hashlib.md5(content).hexdigest()] for name, content in files.items()]
    monkeypatch.setattr(CIFAR10, "train_list", md5s[:2])
    monkeypatch.setattr(CIFAR10, "test_list", md5s[2:3])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5s[3][1]})
    return pixels


def test_cifar10_is_channels_first(tmp_path: Path, cifar: dict[str, np.ndarray]) -> None:
    dataset = load("cifar10", data_dir=tmp_path, download=False, validation_fraction=0.25)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("cifar10", 10, (3, 32, 32))
    assert (counts(dataset.train), counts(dataset.validation), counts(dataset.test)) == ([3] * 10, [1] * 10, [2] * 10)
    published = np.concatenate([cifar["one"], cifar["two"]])  # [40, 3072]: red, green, blue planes, row by row
    for part, source in (
        (dataset.train, published),
        (dataset.validation, published),
        (dataset.test, cifar["test_batch"]),
    ):
        assert part.images.is_contiguous()
        np.testing.assert_array_equal(part.images.flatten(1).numpy(), source[part.indices.numpy()])
        np.testing.assert_array_equal(part.labels.numpy(), part.indices.numpy() % 10)


@pytest.mark.usefixtures("cifar")
@pytest.mark.parametrize("name", ["one", "two", "test_batch", "batches.meta"])
def test_cifar10_damaged_or_missing_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "cifar-10-batches-py" / name
    path.write_bytes(cut(path.read_bytes()))
    for download in (False, True):
        assert f"{path} is truncated or altered: MD5 found" in refusal("cifar10", data_dir=tmp_path, download=download)
    path.unlink()
    assert f"{path.parent} lacks {name};" in refusal("cifar10", data_dir=tmp_path, download=False)


@pytest.mark.usefixtures("cifar")
def test_cifar10_that_torchvision_refuses(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-py" / "two"
    write(path.parent, {"two": path.read_bytes()}, ".gz")
    path.unlink()
    message = refusal("cifar10", data_dir=tmp_path, download=False)
    assert f"{path.parent}: Dataset not found or corrupted" in message


# Published data


@needs_real_data
@pytest.mark.parametrize(
    ("name", "train_counts", "first_test_labels", "mean", "std"),
    [
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [7, 2, 1, 0, 4], 0.1307, 0.3081),
        ("fashion_mnist", [6000] * 10, [9, 2, 1, 1, 6], 0.2860, 0.3530),
    ],
)
def test_published_set(
    name: str, train_counts: list[int], first_test_labels: list[int], mean: float, std: float
) -> None:
    dataset = load(name, data_dir=REAL, download=False)
    assert dataset.image_shape == (1, 28, 28)
    assert len(dataset.test) == 10000
    assert dataset.test.labels[:5].tolist() == first_test_labels
    assert counts(dataset.validation) == [round(0.1 * count) for count in train_counts]
    assert (torch.tensor(counts(dataset.train)) + torch.tensor(counts(dataset.validation))).tolist() == train_counts
    found_mean, found_std = channel_statistics(dataset.train)
    assert found_mean == [pytest.approx(mean, abs=1e-3)]
    assert found_std == [pytest.approx(std, abs=1e-3)]


@needs_real_data
def test_published_set_agrees_with_torchvision() -> None:
    from torchvision.datasets import FashionMNIST

    dataset, published = load("fashion_mnist", data_dir=REAL, download=False), FashionMNIST(REAL, train=True)
    for part in (dataset.train, dataset.validation):
        assert torch.equal(part.images[:, 0], published.data[part.indices])
        assert torch.equal(part.labels, published.targets[part.indices])


@needs_real_data
def test_published_set_with_one_label_changed(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for path in Path(str(REAL), "MNIST", "raw").iterdir():
        (folder / path.name).symlink_to(path)
    labels = folder / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.unlink()
    labels.write_bytes(content)
    assert f"{labels} is truncated or altered: MD5" in refusal("mnist", data_dir=tmp_path)


# Imports


def test_heavy_imports_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A local file is read, and a local copy of MNIST too, with neither scikit-learn nor torchvision."""
    for module in [name for name in sys.modules if name.split(".")[0] in ("sklearn", "torchvision")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert load(str(npz(tmp_path)), validation_fraction=0.3).num_classes == 3
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in IDX.items()}
    monkeypatch.setattr(data, "_IDX_MD5", {"MNIST": md5s})
    write(tmp_path / "MNIST" / "raw", IDX)
    assert len(load("mnist", data_dir=tmp_path, validation_fraction=0.25).test) == 20
