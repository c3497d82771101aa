"""Checks of settings: types, choices and ranges, and settings written as text. Each failure is one line, an InputError."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from evocert.errors import InputError

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "none",
    Mapping: "a dict",
    Callable: "a function",
}


def type_of(owner: type, name: str) -> Any:
    """The declared type of a setting."""
    return typing.get_type_hints(owner)[name]


def parse_setting(name: str, text: str, kind: Any) -> Any:
    """Text as one of the types that a setting has: 12, 2/255, true, none, 0.1,0.2. Raises InputError."""
    options, text = _options(kind), text.strip()
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    parsers = [_PARSERS[option] for option in options if option in _PARSERS]
    if not parsers:
        raise InputError(f"--set {name}={text}: it cannot be written as text, allowed is a value in the problem file")
    for parse in parsers:
        try:
            return parse(text)
        except (ValueError, KeyError, ZeroDivisionError):
            continue
    raise InputError(f"--set {name}={text}: allowed is {_names(kind, text_only=True)}")


def number(name: str, text: str) -> float:
    """Text such as 0.1 or 2/255. Raises InputError."""
    try:
        return _number(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{name} {text}: allowed is a number such as 0.1 or 2/255") from None


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.strip("[]()").removesuffix(",").split(","))


_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: _BOOLEANS[text.lower()],
    int: int,
    float: _number,
    str: str,
    Sequence[float]: _numbers,
}


def check_types(settings: Any) -> None:
    """Check a frozen dataclass against its annotations; whole numbers and lists get the one type that is declared.

    A setting that is a number is then a float, a list a tuple: however it was written, it reads the same in config.json.

    Raises:
        InputError: a wrong type, or NaN.
    """
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, kind = getattr(settings, f.name), hints[f.name]
        options = _options(kind)
        if not any(_is(value, option) for option in options):
            raise InputError(f"{f.name}={shown(value)} is of type {type(value).__name__}: allowed is {_names(kind)}")
        if float in options and int not in options and isinstance(value, int):
            value = as_float(f.name, value)
        elif isinstance(value, list):
            value = tuple(value)
        if Sequence[float] in options and value is not None:
            value = tuple(as_float(f.name, item) for item in value)
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{f.name}={value!r}: allowed is a number")
        object.__setattr__(settings, f.name, value)


def _is(value: Any, option: Any) -> bool:
    if option is Any:
        return True
    origin = typing.get_origin(option) or option
    if origin is Callable:
        return callable(value)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if option == Sequence[float]:
        return isinstance(value, list | tuple) and all(_is(item, float) for item in value)
    if origin is Sequence:
        return isinstance(value, list | tuple)
    return isinstance(value, origin)


def as_float(name: str, value: Any) -> float:
    """A number that may be whole and too large. Raises InputError."""
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name}={shown(value)}: allowed is a finite number") from None


def _options(kind: Any) -> tuple[Any, ...]:
    """``A | B`` as (A, B), with Callable by its origin: its arguments cannot be checked."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(Callable if typing.get_origin(option) is Callable else option for option in options)


def _names(kind: Any, text_only: bool = False) -> str:
    return " or ".join(_name(option) for option in _options(kind) if not text_only or option in (*_PARSERS, type(None)))


def _name(option: Any) -> str:
    if option == Sequence[float]:
        return "a list of numbers"
    origin = typing.get_origin(option) or option
    if origin is Sequence:
        return "a list"
    article = "an" if origin.__name__[0] in "AEIOU" else "a"
    return _KINDS.get(origin) or f"{article} {origin.__name__}"


def shown(value: Any) -> str:
    """A value in a message: its repr on one line, cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a user's own class, or a whole number with more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 120 else f"{text[:117]}..."


def plain(value: Any) -> Any:
    """A setting as JSON takes it: groups nested, paths as text, functions, classes and modules by their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def check_choice(name: str, value: str, allowed: Iterable[str], more: str = "") -> None:
    """``more``: what else is allowed, in words. Raises InputError."""
    allowed = list(allowed)
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{name}={shown(value)}: allowed are {', '.join(allowed) or 'none'}{more}{hint}")


def check_range(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises InputError."""
    if not condition:
        raise InputError(f"{name}={shown(value)}: allowed is {allowed}")


def nearest(name: str, allowed: Iterable[str], count: int = 1) -> list[str]:
    """What a mistyped name was meant to be, the nearest first."""
    spelled = {_spelling(a): a for a in allowed}
    return [spelled[near] for near in difflib.get_close_matches(_spelling(name), spelled, n=count)]


def _spelling(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
