"""Reads VNN-LIB files that say of one network and one box that no class but one is the largest; nothing else.

It shares no code with what writes them (``generate_properties``), so that each export is read back by another hand. Both
versions of the format are read: 1.0, ``(declare-const X_0 Real)``, and 2.0, ``(declare-network …)`` with ``X[0,0,0,0]``.
"""

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from evocert.errors import InputError

_TOKEN = re.compile(r"[()]|\[[^\]()]*\]|<[^<>\s()]*>|[^\s()\[\]]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d*)")

DEPTH = 20  # of parentheses, far beyond what such files have

_Term: TypeAlias = "str | list[_Term]"


@dataclass(frozen=True, eq=False)
class Property:
    """A counterexample is a point of the box at which a class of ``targets`` is at least as large as ``label``.

    Attributes:
        lower, upper: ``[n]`` float64, of each input in C-order, in the network's own units; rounded outward, so that they
            hold the box as it is written.
        label: the class that is to be the largest.
        targets: other classes, rising.
        classes: how many outputs are declared.
        shape: of the input, where the file gives it (VNN-LIB 2.0).
        version: "1.0" or "2.0".
    """

    lower: np.ndarray
    upper: np.ndarray
    label: int
    targets: tuple[int, ...]
    classes: int
    shape: tuple[int, ...] | None
    version: str


def read_property(path: Path) -> Property:
    """Read a ``.vnnlib`` file, or a ``.vnnlib.gz``.

    Raises:
        InputError: it cannot be read, or holds anything else: the place and what is allowed.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _Reading().read(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


class _Reading:
    """What has been read of one file."""

    def __init__(self) -> None:
        self.version = "1.0"
        self.shapes: dict[str, tuple[int, ...]] = {}  # of X and Y, in 2.0
        self.numbers: dict[str, list[int]] = {"X": [], "Y": []}  # as declared, in 1.0
        self.bounds: dict[str, dict[int, float]] = {">=": {}, "<=": {}}
        self.pairs: list[tuple[int, int]] | None = None  # (label, target)

    def read(self, text: str) -> Property:
        commands: dict[str, Callable[[list, int], None]] = {
            "declare-const": self._declare,
            "vnnlib-version": self._version,
            "declare-network": self._network,
            "assert": self._assert,
        }
        for line, command in _commands(text):
            head = command[0] if command else ""
            if not isinstance(head, str) or head not in commands:
                raise InputError(f"line {line}: {_written(command)}, allowed are {', '.join(commands)}")
            commands[head](command, line)
        return self._property()

    def _version(self, command: list, line: int) -> None:
        if command[1:] != ["<2.0>"] or self.version != "1.0" or any(self.numbers.values()):
            raise InputError(f"line {line}: {_written(command)}, allowed is <2.0>, once and before everything else")
        self.version = "2.0"

    def _declare(self, command: list, line: int) -> None:
        match = _VARIABLE.fullmatch(command[1]) if len(command) == 3 and isinstance(command[1], str) else None
        if self.version != "1.0" or match is None or command[2] != "Real":
            raise InputError(f"line {line}: {_written(command)}, allowed in 1.0 is (declare-const X_0 Real)")
        numbers = self.numbers[match[1]]
        if int(match[2]) != len(numbers):
            raise InputError(f"line {line}: {command[1]} is declared, the next is {match[1]}_{len(numbers)}")
        numbers.append(int(match[2]))

    def _network(self, command: list, line: int) -> None:
        allowed = "(declare-network N (declare-input X float32 [1,1,28,28]) (declare-output Y float32 [1,10]))"
        parts = [part for part in command[2:] if isinstance(part, list) and len(part) == 4]
        kinds = {f"{p[0]} {p[1]}": p[3] for p in parts if p[2] in ("real", "float32", "float64")}
        wanted = {"X": kinds.get("declare-input X"), "Y": kinds.get("declare-output Y")}
        if self.version != "2.0" or self.shapes or len(command) != 4 or None in wanted.values():
            raise InputError(f"line {line}: {_written(command)}, allowed once in 2.0 is {allowed}")
        for name, text in wanted.items():
            sizes = _indices(text)
            if sizes is None or not all(size > 0 for size in sizes):
                raise InputError(f"line {line}: {text!r} as the shape of {name}, allowed are sizes of 1 or more")
            self.shapes[name] = sizes

    def _assert(self, command: list, line: int) -> None:
        if len(command) != 2 or not isinstance(command[1], list) or not command[1]:
            raise InputError(f"line {line}: {_written(command)}, allowed is one comparison or disjunction")
        claim = command[1]
        if claim[0] == "or":
            self._disjunction([self._pair(part, line) for part in claim[1:]], line)
            return
        relation, left, right = self._comparison(claim, line)
        if left[0] == "Y":
            self._disjunction([self._pair(claim, line)], line)
            return
        if left[0] != "X" or not isinstance(right, float):
            raise InputError(f"line {line}: {_written(claim)}, allowed is a bound of an input by a number")
        known = self.bounds[relation]
        if left[1] in known:
            raise InputError(f"line {line}: {_written(claim)} is a second such bound of this input, allowed is one")
        known[left[1]] = right

    def _disjunction(self, pairs: list[tuple[int, int]], line: int) -> None:
        if self.pairs is not None:
            raise InputError(f"line {line}: a second condition on outputs, allowed is one disjunction")
        self.pairs = pairs

    def _pair(self, term: _Term, line: int) -> tuple[int, int]:
        if isinstance(term, list) and len(term) == 2 and term[0] == "and":
            term = term[1]
        relation, left, right = self._comparison(term, line)
        if left[0] != "Y" or isinstance(right, float) or right[0] != "Y":
            raise InputError(f"line {line}: {_written(term)}, allowed is (<= Y_t Y_j), one comparison of two outputs")
        return (left[1], right[1]) if relation == "<=" else (right[1], left[1])

    def _comparison(self, term: _Term, line: int) -> tuple[str, tuple[str, int], tuple[str, int] | float]:
        """``(<= variable variable-or-number)``, or ``>=``; a number at the left is brought to the right."""
        if not isinstance(term, list) or len(term) != 3 or term[0] not in ("<=", ">="):
            raise InputError(f"line {line}: {_written(term)}, allowed are <= and >= of two terms")
        relation = str(term[0])
        sides = [self._variable(side) for side in term[1:]]
        if sides[0] is None:
            relation, term, sides = {"<=": ">=", ">=": "<="}[relation], [relation, term[2], term[1]], sides[::-1]
        left, right = sides
        if left is None:
            raise InputError(f"line {line}: {_written(term)} compares no declared variable")
        number = None if right is not None else _number(term[2], -math.inf if relation == ">=" else math.inf)
        if right is None and number is None:
            raise InputError(f"line {line}: {_written(term[2])}, allowed are declared variables and finite numbers")
        return relation, left, right if right is not None else number  # type: ignore[return-value]

    def _variable(self, term: _Term) -> tuple[str, int] | None:
        """A declared one: (X or Y, its place in C-order)."""
        if self.version == "1.0":
            match = _VARIABLE.fullmatch(term) if isinstance(term, str) else None
            return (match[1], int(match[2])) if match and int(match[2]) < len(self.numbers[match[1]]) else None
        name, _, rest = term.partition("[") if isinstance(term, str) else ("", "", "")
        shape, at = self.shapes.get(name), _indices(f"[{rest}")
        if shape is None or at is None or len(at) != len(shape) or any(i >= n for i, n in zip(at, shape, strict=True)):
            return None
        return name, int(np.ravel_multi_index(at, shape))

    def _property(self) -> Property:
        if self.version == "2.0":
            sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        else:
            sizes = {name: len(numbers) for name, numbers in self.numbers.items()}
        if not sizes.get("X") or sizes.get("Y", 0) < 2:
            raise InputError(
                f"{sizes.get('X', 0)} inputs and {sizes.get('Y', 0)} outputs are declared, allowed are 1 and 2 or more"
            )
        for relation, known in self.bounds.items():
            if len(known) < sizes["X"]:
                absent = next(i for i in range(sizes["X"]) if i not in known)
                raise InputError(f"input {absent} has no bound by {relation}: each needs both")
        if not self.pairs:
            raise InputError("there is no condition on outputs, or an empty one")
        labels, targets = {label for label, _ in self.pairs}, sorted({target for _, target in self.pairs})
        if len(labels) != 1 or labels & set(targets):
            raise InputError(f"outputs {sorted(labels)} are compared with {targets}, allowed is one with others")
        lower, upper = (np.array([known[i] for i in range(sizes["X"])]) for known in self.bounds.values())
        if (empty := np.flatnonzero(lower > upper)).size:
            at = int(empty[0])
            raise InputError(f"input {at} lies between {lower[at]} and {upper[at]}: there is no such number")
        return Property(lower, upper, labels.pop(), tuple(targets), sizes["Y"], self.shapes.get("X"), self.version)


def _commands(text: str) -> Iterator[tuple[int, list]]:
    """The line at which each command begins, and the command as nested lists of words."""
    stack: list[list] = []
    began = 0
    for line, content in enumerate(text.splitlines(), 1):
        code = content.partition(";")[0]
        if (rest := _TOKEN.sub("", code).strip()) != "":
            raise InputError(f"line {line}: {rest[:40]!r} belongs to nothing")
        for token in _TOKEN.findall(code):
            if token == "(":
                began = began if stack else line
                stack.append([])
                if len(stack) > DEPTH:
                    raise InputError(f"line {line}: more than {DEPTH} parentheses are open")
            elif not stack:
                raise InputError(f"line {line}: {token!r} outside of parentheses")
            elif token == ")":
                done = stack.pop()
                if stack:
                    stack[-1].append(done)
                else:
                    yield began, done
            elif token.startswith("[") and stack[-1] and stack[-1][-1] in ("X", "Y"):
                stack[-1][-1] += token
            else:
                stack[-1].append(token)
    if stack:
        raise InputError(f"the parenthesis in line {began} is never closed")


def _indices(text: object) -> tuple[int, ...] | None:
    """``[0,3]`` -> (0, 3); None for anything else."""
    words = text[1:-1].split(",") if isinstance(text, str) and text.startswith("[") and text.endswith("]") else []
    numbers = [word.strip() for word in words]
    return tuple(map(int, numbers)) if numbers and all(word.isdecimal() for word in numbers) else None


def _number(term: _Term, towards: float) -> float | None:
    """``0.5``, ``-2e-3`` or ``(- 0.5)``; None for anything else."""
    if isinstance(term, list) and len(term) == 2 and term[0] == "-":
        inner = _number(term[1], -towards)
        return None if inner is None else -inner
    return _rounded(term, towards) if isinstance(term, str) and _NUMBER.fullmatch(term) else None


@lru_cache(maxsize=2**16)
def _rounded(text: str, towards: float) -> float | None:
    """The nearest float64 at the number or ``towards`` -inf or inf of it."""
    number = float(text)
    if not math.isfinite(number):
        return None
    exact = Fraction(text)
    inside = Fraction(number) > exact if towards < 0 else Fraction(number) < exact
    return math.nextafter(number, towards) if inside else number


def _written(term: _Term) -> str:
    text = term if isinstance(term, str) else f"({' '.join(map(_written, term))})"
    return text if len(text) <= 60 else f"{text[:57]}..."
