"""The run folder: what a run leaves behind, written so that a run killed at any moment loses nothing but time."""

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import evocert
from evocert.errors import InputError
from evocert.files import Lock, sync_names, write_atomically

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

Accept = Callable[[dict[str, Any]], Any]  # raises whatever it may where a checkpoint's state is of no use


class Run:
    """One run folder. ``create`` a new one, ``open`` one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None
        self._metrics: io.TextIOWrapper | None = None
        self._made: list[Path] = []  # the folders that ``create`` made, the innermost first
        self._damaged: set[str] = set()  # checkpoints that could not be read

    @classmethod
    def create(cls, path: Path | None, problem: str) -> "Run":
        """A new folder: the one given, which must not exist or be empty, or ``runs/<problem>/<UTC time>-<short id>``.

        Raises:
            InputError: it is not empty, is no folder, or cannot be written to.
        """
        if path is None:
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
            path = Path("runs") / problem / f"{stamp}-{uuid.uuid4().hex[:6]}"
        run = cls(path)
        try:
            run._made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise InputError(f"run folder {path} is not empty: allowed is one that does not exist, or is empty")
            run._take_lock()
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"run folder {path}: there is a file of that name") from error
        except OSError as error:
            raise InputError(f"run folder {path} cannot be written to: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A folder that a run has made, for resuming it.

        Raises:
            InputError: it is no run folder, cannot be written to, or another process is at work in it.
        """
        for name in ("config.json", "problem.py"):
            if not (path / name).is_file():
                raise InputError(f"{path} is no run folder that can be resumed: it has no {name}")
        run = cls(path)
        try:
            run._take_lock()
        except OSError as error:
            raise InputError(f"run folder {path} cannot be written to: {error.strerror}") from error
        for leftover in (
            *path.glob(".*.tmp"),
            *path.glob(".network.onnx-*"),
        ):  # of a process that was killed while writing
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return run

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """``with run.beginning():`` what fails inside, before there is anything to resume, leaves the disk as it was."""
        try:
            yield
        except BaseException:
            for path in self.path.iterdir():  # it was empty when this process took it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in self._made:
                with contextlib.suppress(OSError):  # another process may have put something in a parent
                    folder.rmdir()
            raise

    def _take_lock(self) -> None:
        self._lock = Lock(self.path / ".lock", f"run folder {self.path}: another process is at work in it")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # on a full disk there is nothing left to flush to
                self._metrics.close()
        self._metrics = self._lock = None

    # Records

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Atomically: whoever reads sees the old file or the new one."""
        write_atomically(self.path / name, content)

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises InputError where it is no valid JSON object."""
        return self._read_json("config.json")

    def read_results(self) -> dict[str, Any]:
        """results.json. Raises InputError where it is no valid JSON object."""
        return self._read_json("results.json")

    def check_split(self, record: dict[str, Any]) -> None:
        """Whether the data are still those that the run began with.

        Args:
            record: what ``data.Dataset.split_record`` gives for the data as they are now.

        Raises:
            InputError: split.json says otherwise, or cannot be read.
        """
        began = self._read_json("split.json")
        if changed := sorted(key for key in {*began, *record} if began.get(key) != record.get(key)):
            raise InputError(
                f"the data are not those that run {self.path} began with: {', '.join(changed)} in its split.json differ"
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path / name} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path / name} holds a {type(content).__name__}: allowed is an object")
        return content

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").is_file()

    # Metrics

    def open_metrics(self, after: int, warn: Callable[[str], Any]) -> None:
        """Continue metrics.jsonl after generation ``after``: later rows and a torn last line are cut off.

        ``warn`` is called with one line where rows before it are lost or damaged; damaged ones are left out.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        generations = [_generation_of(line) for line in lines]
        kept = [line for line, at in zip(lines, generations, strict=True) if at is not None and at <= after]
        damaged = sum(at is None for at in generations[:-1])
        missing = len(set(range(1, after + 1)) - set(generations))
        if damaged or missing:
            warn(f"{path} has {damaged} damaged rows, which are left out, and lacks {missing} of {after} generations")
        if kept != lines[: len(kept)]:
            self.write_bytes(path.name, b"".join(kept))
        elif path.exists():
            os.truncate(path, sum(map(len, kept)))
        self._metrics = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl, flushed. Numbers that are no numbers are written as null."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.write(json.dumps(_finite(row)) + "\n")
        self._metrics.flush()

    # Checkpoints

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """The state, of tensors and plain values; the one before it is kept as ``checkpoint.previous.pt``."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())  # a checkpoint must not be ahead of the metrics that lead to it
        buffer = io.BytesIO()
        torch.save(state, buffer)
        current = self.path / CHECKPOINT
        temporary = self.path / f".{CHECKPOINT}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if current.exists() and CHECKPOINT not in self._damaged:  # the one before a damaged one is the good one
                # A second name, not a move: at every moment there is a checkpoint of the usual name.
                link = self.path / f".{PREVIOUS}.tmp"
                link.unlink(missing_ok=True)
                try:
                    os.link(current, link)
                except OSError:  # a file system without links
                    shutil.copyfile(current, link)
                os.replace(link, self.path / PREVIOUS)
            os.replace(temporary, current)
            sync_names(self.path)
            self._damaged.discard(CHECKPOINT)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one, good or bad."""
        return any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS))

    def load_checkpoint(self, warn: Callable[[str], Any], accept: Accept = lambda state: None) -> dict[str, Any] | None:
        """The last good checkpoint, or None where the run never came to one.

        Args:
            warn: called with one line for each that cannot be used.
            accept: called with its state; if that raises, the checkpoint counts as corrupted.

        Raises:
            InputError: there are checkpoints, but none can be used.
        """
        for name in (CHECKPOINT, PREVIOUS):
            path = self.path / name
            if not path.exists():
                continue
            try:
                with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums in the file
                    if archive.testzip() is not None:
                        raise ValueError("its checksums are not those of its content")
                state = torch.load(path, weights_only=True, map_location="cpu")
                if not isinstance(state, dict) or "generation" not in state:
                    raise ValueError("it holds no state of a run")
                accept(state)
            except Exception as error:  # torch and pickle raise whatever a damaged file leads them to
                self._damaged.add(name)
                lacking = "it lacks " if isinstance(error, KeyError) else ""
                reason = " ".join(str(error).split())[:120] or type(error).__name__
                warn(f"checkpoint {path} is corrupted ({lacking}{reason})")
                continue
            if self._damaged:
                warn(f"continuing from the previous good one, {path}, at generation {state['generation']}")
            return state
        if self._damaged:
            bad = ", ".join(sorted(self._damaged, reverse=True))
            raise InputError(f"run folder {self.path}: no checkpoint can be read ({bad}); start a new run")
        return None


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures of a run depend on besides its settings."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in ("torch", "evotorch", "numpy", "numba", "onnx", "onnxruntime")},
        "evocert": evocert.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": threads,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def _git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(evocert.__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def _generation_of(line: bytes) -> int | None:
    """Of a row of metrics.jsonl; None where it is torn or damaged."""
    try:
        generation = json.loads(line)["generation"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return generation if isinstance(generation, int) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def warn(line: str) -> None:
    """One line on stderr."""
    print(f"evocert: {line}", file=sys.stderr)
