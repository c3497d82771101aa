"""What one run has on record, read without torch: results.json, config.json, certify.json and metrics.jsonl."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evocert.errors import InputError

# What config.json records beside the settings. The problem file's hash and the device are compared under names of their own.
_RECORDS = {
    "tile", "stage_tiles", "statistics", "layers", "device_type", "overrides", "problem_file", "problem_path",
    "problem_sha256", "imported", "evocert",
}  # fmt: skip
# Settings that decide where and how something is kept, not what comes out.
_INDIFFERENT = {"data_dir", "download", "device", "loggers", "checkpoint_seconds"}
_DEEPEST = 10  # stages of warm starts that are followed
_SHORT = 8  # digits of a hash that are shown


@dataclass(frozen=True)
class Certification:
    """What ``evocert certify`` found of a run at the run's own eps. Fractions of ``examples`` test images.

    Attributes:
        certified: for each stage the part that it was the first to prove, and their ``total``.
    """

    examples: int
    methods: tuple[str, ...]
    timeout: float
    natural: float
    attacked: float
    undecided: float
    certified: dict[str, float]
    contradictions: int

    @property
    def basis(self) -> str:
        """What two certifications must share to be averaged."""
        return f"{self.examples} examples by {', '.join(self.methods)} with {self.timeout:g} s each"


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        path: its folder.
        eps: the radius that it certifies.
        data: the data set's name and, of arrays of the user's own, their file.
        examples: test images that its figures are fractions of.
        generations: that were trained, those of all stages.
        train_seconds: of training, validations included.
        evaluations: losses of one network on one image, alone ("values") and with their gradients ("gradients"); empty where
            they are not on record.
        natural, attacked, certified: of results.json; ``certified`` by bound.
        settings: all that may change the figures, but for the seed; groups by dotted names.
        version: of evocert.
        certification: None where there is none at this eps.
        notes: lines about what was found in the folder and is not used.
    """

    path: Path
    problem: str
    method: str
    bound: str
    eps: float
    data: str
    examples: int
    seed: int
    generations: int
    train_seconds: float
    evaluations: dict[str, float]
    natural: float
    attacked: float
    certified: dict[str, float]
    settings: dict[str, Any]
    version: str
    certification: Certification | None
    notes: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Equal for runs that differ by their seed alone."""
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Curve:
    """The validations of a run: at which generation, after how many seconds of generations, and what they gave."""

    generations: list[float]
    seconds: list[float]
    certified: list[float]
    natural: list[float]


def read_run(path: Path) -> RunRecord | None:
    """A run folder; None where the run is not finished.

    Raises:
        InputError: it is no run folder, or one of its files is damaged.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no run folder: it has no config.json")
    if not (path / "results.json").is_file():
        return None
    results, config = _Object.of(path / "results.json"), _Object.of(path / "config.json")
    for name in ("problem", "method", "bound", "eps", "seed"):
        if results.content.get(name) != config.content.get(name):
            raise InputError(
                f"{results.path}: {name}={results.content.get(name)!r}, but config.json has {config.content.get(name)!r}: "
                "allowed are the files of one run"
            )
    accuracy = results.object("accuracy")
    eps, data = results.number("eps", 1.0), results.text("dataset")
    certification, notes = _certification(path, eps, data)
    arrays = config.content.get("data_path") or config.content.get("data")
    return RunRecord(
        path=path,
        problem=results.text("problem"),
        method=results.text("method"),
        bound=results.text("bound"),
        eps=eps,
        data=f"{data} ({arrays})" if data == "npz" else data,
        examples=results.whole("examples"),
        seed=results.whole("seed"),
        generations=results.whole("generations"),
        train_seconds=results.number("train_seconds"),
        evaluations=results.object("evaluations").numbers() if "evaluations" in results.content else {},
        natural=accuracy.number("natural", 1.0),
        attacked=accuracy.number("attacked", 1.0),
        certified=accuracy.object("certified").numbers(1.0),
        settings=_settings(config.content),
        version=str(config.content.get("evocert")),
        certification=certification,
        notes=notes,
    )


def read_curve(path: Path) -> Curve:
    """The validations in a finished run's metrics.jsonl.

    Raises:
        InputError: the file is damaged, or has none.
    """
    curve = Curve([], [], [], [])
    seconds = 0.0
    for row in _rows(path / "metrics.jsonl"):
        if row.content.get("event") == "validation":
            curve.generations.append(row.number("generation"))
            curve.seconds.append(seconds)
            curve.certified.append(row.number("certified", 1.0))
            curve.natural.append(row.number("natural", 1.0))
        else:
            seconds += row.object("timing").number("seconds")
    if not curve.generations:
        raise InputError(f"{path / 'metrics.jsonl'} has no validation, which every finished run has")
    return curve


def _rows(path: Path) -> Iterator["_Object"]:
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        yield _Object(f"{path}, line {number}", _parsed(f"{path}, line {number}", line))


def _certification(path: Path, eps: float, data: str) -> tuple[Certification | None, tuple[str, ...]]:
    """Of the records in a run folder that are about its own eps and data, the one of most examples."""
    found: list[Certification] = []
    notes: list[str] = []
    files = [path / "certify.json", *sorted(path.glob("certify-????????.json"))]
    for file in (file for file in files if file.is_file()):
        content = _Object.of(file)
        key = content.object("key")
        if (key.content.get("data"), key.content.get("part")) != (data, "test"):
            notes.append(f"{file} is about other data: not in the table")
        elif not math.isclose(at := key.number("eps", 1.0), eps, rel_tol=1e-9):
            notes.append(f"{file} is at eps = {at:g}, the run at {eps:g}: not in the table")
        elif "certified" not in content.content:
            notes.append(f"{file} has no figures yet, its certification was stopped: not in the table")
        else:
            found.append(_certified(content))
    return max(found, key=lambda one: one.examples, default=None), tuple(notes)


def _certified(content: "_Object") -> Certification:
    settings, certified = content.object("settings"), content.object("certified")
    methods = settings.content.get("methods")
    if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
        raise InputError(f"{content.path}: methods={methods!r}, allowed is a list of names")
    certified.number("total", 1.0)
    contradictions = content.content.get("contradictions", [])
    return Certification(
        examples=content.whole("examples"),
        methods=tuple(methods),
        timeout=settings.number("timeout"),
        natural=content.number("natural", 1.0),
        attacked=content.number("attacked", 1.0),
        undecided=content.number("undecided", 1.0),
        certified=certified.numbers(1.0),
        contradictions=len(contradictions) if isinstance(contradictions, list) else 0,
    )


def _settings(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """All in config.json that may change a run's figures, but for its seed."""
    kept = {key: value for key, value in config.items() if key not in _RECORDS | _INDIFFERENT | {"seed"}}
    settings = dict(_flat(kept))
    if (start := config.get("init_from")) is not None:
        settings["init_from"] = _start(str(start), depth)
    settings["problem.py"] = str(config.get("problem_sha256"))[:_SHORT]
    if imported := config.get("imported"):
        settings["its imports"] = _digest(imported)
    settings["device"] = config.get("device_type")
    return settings


def _start(path: str, depth: int) -> str:
    """A warm start by what it is: starts of several runs that differ by their seed alone are one."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
        name = f"{config['problem']} by {config['method']}"
    except (OSError, ValueError, KeyError, TypeError):  # moved, removed or damaged: then it is its place
        return path
    return f"{name} ({_digest(_settings(config, depth + 1))})" if depth < _DEEPEST else path


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, dict):  # an empty group has no settings
            yield f"{prefix}{key}", value


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_SHORT]


@dataclass(frozen=True)
class _Object:
    """A JSON object whose entries are checked as they are read: an InputError names file, key and value."""

    path: Path | str
    content: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> "_Object":
        return cls(path, _parsed(path, _bytes(path)))

    def object(self, name: str) -> "_Object":
        return _Object(self.path, self._checked(name, dict, "an object"))

    def text(self, name: str) -> str:
        value: str = self._checked(name, str, "a text")
        return value

    def whole(self, name: str) -> int:
        value: int = self._checked(name, int, "a whole number, 0 or more")
        if value < 0:
            raise self._wrong(name, "a whole number, 0 or more")
        return value

    def number(self, name: str, most: float = math.inf) -> float:
        """A finite number from 0 to ``most``."""
        allowed = "a finite number, 0 or more" if most == math.inf else f"a number from 0 to {most:g}"
        value: float = self._checked(name, int | float, allowed)
        if not (0 <= value <= most and value < math.inf):
            raise self._wrong(name, allowed)
        return float(value)

    def numbers(self, most: float = math.inf) -> dict[str, float]:
        return {name: self.number(name, most) for name in self.content}

    def _checked(self, name: str, kind: Any, allowed: str) -> Any:
        value = self.content.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._wrong(name, allowed)
        return value

    def _wrong(self, name: str, allowed: str) -> InputError:
        found = f"{name}={str(self.content[name])[:80]}" if name in self.content else f"there is no {name}"
        return InputError(f"{self.path} is damaged: {found}, allowed is {allowed}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(path: Path | str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is no JSON ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds a {type(content).__name__}, allowed is an object")
    return content
