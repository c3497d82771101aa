"""Sizes of memory as users write them."""

import re

from evocert.errors import InputError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LARGEST = 2**63 - 1


def parse_bytes(size: int | str) -> int:
    """``2 * 2**30``, ``"2GiB"``, ``"500 MB"`` -> bytes.

    Raises:
        InputError: not a positive number of bytes.
    """
    number = size if isinstance(size, int) else _parse(str(size))
    if not 1 <= number <= _LARGEST:
        shown = repr(size) if isinstance(size, str) or number.bit_length() < 200 else "a number of that length"
        raise InputError(f"memory_budget={shown}: allowed is a positive number of bytes, such as 2GiB or 512MiB")
    return number


def _parse(text: str) -> int:
    """0 where it is no size."""
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{0,30})?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        return 0
    number, unit = match[1], _UNITS[match[2].upper()]
    return int(number) * unit if number.isdecimal() else int(float(number) * unit)
