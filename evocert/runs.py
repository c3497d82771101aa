"""The run folder: what a run leaves behind, written so that a run killed at any moment loses nothing but time."""

import contextlib
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import evocert
from evocert.errors import InputError

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


class Run:
    """One run folder. ``create`` a new one, ``open`` one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: io.TextIOWrapper | None = None
        self._metrics: io.TextIOWrapper | None = None

    @classmethod
    def create(cls, path: Path | None, problem: str) -> "Run":
        """A new folder: the one given, which must not exist or be empty, or ``runs/<problem>/<UTC time>-<short id>``.

        Raises:
            InputError: it is not empty, is no folder, or cannot be written to.
        """
        if path is None:
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
            path = Path("runs") / problem / f"{stamp}-{uuid.uuid4().hex[:6]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise InputError(f"run folder {path} is not empty: allowed is one that does not exist, or is empty")
            run = cls(path)
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

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise InputError(f"run folder {self.path}: another process is at work in it") from None

    def close(self) -> None:
        for file in (self._metrics, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):  # on a full disk there is nothing left to flush to
                    file.close()
        self._metrics = self._lock = None
        with contextlib.suppress(OSError):
            (self.path / ".lock").unlink()

    # Records

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Atomically: whoever reads sees the old file or the new one."""
        temporary = self.path / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises InputError where it is no valid JSON object."""
        try:
            config = json.loads((self.path / "config.json").read_text())
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path / 'config.json'} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise InputError(f"{self.path / 'config.json'} holds no settings")
        return config

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").is_file()

    # Metrics

    def open_metrics(self, after: int) -> None:
        """Continue metrics.jsonl after generation ``after``: later rows and a torn line are cut off."""
        path = self.path / "metrics.jsonl"
        end = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["generation"] > after:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
            os.truncate(path, end)
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
            if current.exists():
                # A second name, not a move: at every moment there is a checkpoint of the usual name.
                link = self.path / f".{PREVIOUS}.tmp"
                link.unlink(missing_ok=True)
                os.link(current, link)
                os.replace(link, self.path / PREVIOUS)
            os.replace(temporary, current)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def load_checkpoint(self, warn: Any) -> dict[str, Any] | None:
        """The last good checkpoint, or None where the run never came to one.

        ``warn`` is called with one line for each that cannot be read.

        Raises:
            InputError: there are checkpoints, but none can be read.
        """
        bad = []
        for name in (CHECKPOINT, PREVIOUS):
            path = self.path / name
            if not path.exists():
                continue
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                if not isinstance(state, dict) or "generation" not in state:
                    raise ValueError("it holds no state of a run")
            except Exception as error:  # torch and pickle raise whatever a damaged file leads them to
                bad.append(name)
                reason = " ".join(str(error).split())[:120]
                warn(f"checkpoint {path} is corrupted ({reason})")
                continue
            if bad:
                warn(f"continuing from the previous good one, {path}, at generation {state['generation']}")
            return state
        if bad:
            raise InputError(f"run folder {self.path}: no checkpoint can be read ({', '.join(bad)}); start a new run")
        return None


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures of a run depend on besides its settings."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in ("torch", "evotorch", "numpy", "onnx", "onnxruntime")},
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


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def warn(line: str) -> None:
    """One line on stderr."""
    print(f"evocert: {line}", file=sys.stderr)
