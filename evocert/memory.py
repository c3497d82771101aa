"""Sizes of memory as users write them."""

import re

from evocert.errors import InputError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(size: int | str) -> int:
    """``2 * 2**30``, ``"2GiB"``, ``"500 MB"`` -> bytes.

    Raises:
        InputError: not a positive number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or (number := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise InputError(f"memory_budget={size!r}: allowed is a positive number of bytes, such as 2GiB or 512MiB")
    return number
