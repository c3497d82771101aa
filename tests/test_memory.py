"""Sizes of memory as users write them."""

import pytest

from evocert.errors import InputError
from evocert.memory import parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (2 * 2**30, 2**31),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        (" 500 MB ", 500 * 10**6),
        ("0.5 KiB", 512),
        ("3.", 3),
        ("7B", 7),
        ("9007199254740993", 2**53 + 1),  # which no float holds
        (2e9, 2 * 10**9),
    ],
)
def test_read(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    [0, -1, "", "GiB", "-2GiB", "2 GiB!", "2 TiB", "1e9", "0.1", "nan", "inf", "9" * 400, "9" * 29 + "GiB", 2**70],
)
def test_refused(size):
    with pytest.raises(InputError, match=r"^memory_budget=.*2GiB") as refused:
        parse_bytes(size)
    assert len(str(refused.value)) < 600


def test_a_number_that_python_does_not_print():
    with pytest.raises(InputError, match=r"^memory_budget=a number of that length: "):
        parse_bytes(10**5000)
