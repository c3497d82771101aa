"""Checks of settings: types, choices and ranges, and settings written as text. Each failure is one line, an InputError."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evocert.errors import InputError


def type_of(owner: type, name: str) -> Any:
    return typing.get_type_hints(owner)[name]


def parse_setting(name: str, text: str, kind: Any) -> Any:
    """Text as one of the types that a setting has. Raises InputError."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    text = text.strip()
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        try:
            if option is bool:
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
            if option is int:
                return int(text)
            if option is float:
                numerator, slash, denominator = text.partition("/")
                return float(numerator) / float(denominator) if slash else float(text)
            if option is str:
                return text
            if typing.get_origin(option) in (Sequence, typing.get_origin(Sequence[float])) and name in ("mean", "std"):
                return tuple(float(part) for part in text.strip("[]()").split(",") if part.strip())
        except (ValueError, KeyError, ZeroDivisionError):
            continue
    raise InputError(f"--set {name}={text}: allowed is {_type_name(kind)}")


def check_types(settings: Any) -> None:
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, kind = getattr(settings, f.name), hints[f.name]
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if not any(_is(value, option) for option in options):
            raise InputError(f"{f.name}={value!r} is of type {type(value).__name__}: allowed is {_type_name(kind)}")
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{f.name}={value!r}: allowed is a number")


def _is(value: Any, option: Any) -> bool:
    origin = typing.get_origin(option) or option
    if origin is Callable or origin is typing.get_origin(Callable[..., int]):
        return callable(value)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is typing.get_origin(Sequence[float]):
        return isinstance(value, list | tuple)
    return option is Any or isinstance(value, origin)


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}


def _type_name(kind: Any) -> str:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(_TYPE_NAMES.get(o, getattr(typing.get_origin(o) or o, "__name__", str(o))) for o in options)


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def check_choice(what: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{what}={value!r}: allowed are {', '.join(allowed) or 'none'}{hint}")


def check_range(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name}={value}: allowed is {allowed}")
