"""What is on record of each example: one JSON object a line, appended as it is found."""

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from evocert.certify.subject import digest
from evocert.certify.verdict import Verdict
from evocert.errors import InputError
from evocert.files import Lock, write_atomically


@dataclass(frozen=True)
class Row:
    """What is known of one example.

    Attributes:
        index: its place in the part.
        label, prediction: classes.
        verdict: see ``Verdict``.
        by: the method that decided; None where none did.
        seconds: that were spent on it: its share of what was done for many at once, and what was done for it alone.
        point: the file of the counterexample, in the folder of the records.
        tried: of an undecided example, the methods and the seconds of the exact one that did not decide it.
        contradicted: who says the opposite.
    """

    index: int
    label: int
    prediction: int
    verdict: Verdict
    by: str | None
    seconds: float
    point: str | None = None
    tried: dict[str, Any] | None = None
    contradicted: str | None = None

    def json(self) -> str:
        content = {name: value for name, value in vars(self).items() if value is not None or name == "by"}
        return json.dumps({**content, "seconds": round(self.seconds, 4)})

    def to_retry(self, methods: Iterable[str], timeout: float) -> bool:
        """Whether these methods may decide what is undecided: one of them is new, or has more time."""
        if self.verdict != "undecided" or self.tried is None:
            return False
        new = set(methods) - set(self.tried["methods"])
        return bool(new) or ("exact" in methods and timeout > self.tried["timeout"])


@dataclass
class Records:
    """The records of one key in one folder, held by one process.

    Attributes:
        folder: where they are.
        name: of the files, without their ends.
        rows: by index.
    """

    folder: Path
    name: str
    rows: dict[int, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any]) -> "Records":
        """Those that are there, or new ones.

        Args:
            folder: made if it is not there.
            key: what verdicts are about. The first key in a folder has the plain names ``certify.jsonl`` and ``certify.json``,
                every other one names with a part of its digest.

        Raises:
            InputError: the folder cannot be written to, another process is at work in it, or a file is damaged.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder / ".certify.lock", f"{folder}: another process is certifying there")
        except OSError as error:
            raise InputError(f"{folder} cannot be written to: {error.strerror}") from error
        try:
            name = "certify"
            first = _read(folder / "certify.json")
            if first is not None and first.get("key") != key:
                name = f"certify-{digest(json.dumps(key, sort_keys=True).encode())[:8]}"
            records = cls(folder, name)
            records._lock = lock
            if _read(records.path("json")) is None:
                if (rows := records.path("jsonl")).exists():  # the key is always written first
                    raise InputError(
                        f"{rows}: {records.path('json').name} is gone, which says what the records are about; "
                        "move the file away to begin anew"
                    )
                records.write({"key": key})
            records._load()
        except BaseException:
            lock.release()
            raise
        return records

    def path(self, end: str) -> Path:
        return self.folder / f"{self.name}.{end}"

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows, so that they are on the disk when this returns; one replaces what was known of the same example."""
        rows = list(rows)
        replaced = any(row.index in self.rows for row in rows)
        self.rows.update({row.index: row for row in rows})
        if replaced:
            self._rewrite()
        elif rows:
            with self.path("jsonl").open("ab") as file:
                file.write("".join(f"{row.json()}\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())

    def write(self, content: dict[str, Any]) -> None:
        """The summary. Atomically."""
        write_atomically(self.path("json"), (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def store(self, index: int, point: Tensor) -> str:
        """A counterexample ``[C, H, W]``, as an array in a file; its name."""
        folder = self.folder / f"{self.name}-counterexamples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{index:06}.npy"
        content = io.BytesIO()
        np.save(content, point.numpy())
        write_atomically(path, content.getvalue())  # on the disk before the row that names it
        return str(path.relative_to(self.folder))

    def close(self) -> None:
        self._lock.release()

    _lock: Lock = field(init=False, repr=False)

    def _load(self) -> None:
        """The rows that are whole: a torn last line is of a process that was killed while writing."""
        path = self.path("jsonl")
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = Row(**json.loads(line))
                if type(row.index) is not int or row.verdict not in get_args(Verdict):
                    raise ValueError("no index, or no verdict")
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise InputError(
                    f"{path}, line {number}: no record of an example; move the file away to begin anew"
                ) from error
            self.rows[row.index] = row
        if lines[-1]:
            self._rewrite()

    def _rewrite(self) -> None:
        write_atomically(self.path("jsonl"), "".join(f"{row.json()}\n" for row in self.rows.values()).encode())


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no JSON; move the file away to begin anew") from error
    return content if isinstance(content, dict) else {}
