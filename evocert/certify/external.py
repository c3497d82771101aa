"""Second opinions: external verifiers, each in a process of its own, on the files that it reads."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from evocert.errors import InputError

Claim = Literal["proved", "refuted", "undecided"]
GRACE = 30.0  # seconds beyond its own timeout after which a verifier counts as hanging


@dataclass(frozen=True)
class Question:
    """What a verifier is asked.

    Attributes:
        onnx, vnnlib: the files.
        result: where it may write its answer.
        timeout: seconds.
    """

    onnx: Path
    vnnlib: Path
    result: Path
    timeout: float


@dataclass(frozen=True)
class Answer:
    """What it said.

    Attributes:
        claim: "undecided" also for a crash, a hang, or nonsense.
        values: with "refuted", its counterexample as a flat vector ``[C * H * W]``, if it gave one.
        seconds: that it took.
        note: what went wrong, if anything.
    """

    claim: Claim
    values: Tensor | None
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class Verifier:
    """How an external tool is run.

    Attributes:
        command: (what --verifier-path names, question) -> the command line.
        probe: the command line that succeeds where the tool is installed.
        default: what --verifier-path is if it is not given; None: it must be given.
        how: to get the tool, for people.
    """

    command: Callable[[Path, Question], list[str]]
    probe: Callable[[Path], list[str]]
    default: Path | None
    how: str


def ask(verifier: Verifier, path: Path, question: Question, log: Path) -> Answer:
    """Runs a verifier once. What it prints is kept in ``log`` where it gives no answer.

    Never raises for what the tool does.
    """
    began = time.monotonic()
    note: str | None = None
    with log.open("wb") as output:
        process = subprocess.Popen(
            verifier.command(path, question),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # with all that it starts it is ended at once
        )
        try:
            status = process.wait(question.timeout + GRACE)
            note = None if status == 0 else f"it ended with status {status}"
        except subprocess.TimeoutExpired:
            note = f"it did not end within {question.timeout + GRACE:.0f} seconds"
        finally:
            _end(process)
    seconds = time.monotonic() - began
    text = question.result.read_text(errors="replace") if question.result.is_file() else ""
    claim = _claim(text)
    if claim is None:
        return Answer("undecided", None, seconds, note or "it gave no answer")
    if claim != "undecided":
        log.unlink()
    return Answer(claim, _values(text) if claim == "refuted" else None, seconds)


def find(name: str, path: Path | None) -> tuple[Verifier, Path]:
    """A verifier that is installed.

    Raises:
        InputError: an unknown name, or it is not installed there.
    """
    if name not in VERIFIERS:
        raise InputError(f"verifier {name!r}: allowed are {', '.join(VERIFIERS)}")
    verifier = VERIFIERS[name]
    place = path or verifier.default
    if place is None:
        raise InputError(f"verifier {name}: --verifier-path is needed; {verifier.how}")
    try:
        found = subprocess.run(verifier.probe(place), capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if not found:
        raise InputError(f"verifier {name} is not installed at {place}; {verifier.how}")
    return verifier, place


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _claim(text: str) -> Claim | None:
    """Of a result file as VNN-COMP has it: its first word."""
    words: dict[str, Claim] = {
        "unsat": "proved",
        "holds": "proved",
        "sat": "refuted",
        "violated": "refuted",
        "unknown": "undecided",
        "timeout": "undecided",
    }
    first = re.match(r"\s*([a-z]+)\b", text.lower())
    return words.get(first[1]) if first else None


def _values(text: str) -> Tensor | None:
    """``(X_0 0.5) (X_1 0.25)`` -> the vector, whole and in order, or nothing."""
    found = {int(i): value for i, value in re.findall(r"\(\s*X_(\d+)\s+([^\s()]+)\s*\)", text)}
    try:
        values = [float(found[i]) for i in range(len(found))]
    except (KeyError, ValueError):
        return None
    return torch.tensor(values, dtype=torch.float64) if values else None


def _neuralsat(python: Path, question: Question) -> list[str]:
    # Its modules are installed under the name src, as a program that is run in its own folder.
    return [
        str(python), "-c", _RUN_MODULE, "src",
        "--net", str(question.onnx), "--spec", str(question.vnnlib),
        "--timeout", f"{question.timeout:g}", "--device", "cpu", "--verbosity", "0",
        "--result_file", str(question.result), "--export_cex",
    ]  # fmt: skip


_RUN_MODULE = """
import importlib.util, os, runpy, sys
place = os.path.dirname(importlib.util.find_spec(sys.argv.pop(1)).origin)
sys.path[0] = place
runpy.run_path(os.path.join(place, "main.py"), run_name="__main__")
"""
_PROBE_NEURALSAT = """
import importlib.util, os, sys
spec = importlib.util.find_spec("src")
sys.exit(0 if spec and spec.origin and os.path.isdir(os.path.join(os.path.dirname(spec.origin), "abstractor")) else 1)
"""


def _marabou(python: Path, question: Question) -> list[str]:
    script = Path(__file__).with_name("ask_marabou.py")
    arguments: Sequence[Path | str] = (question.onnx, question.vnnlib, question.result, f"{question.timeout:g}")
    return [str(python), str(script), *map(str, arguments)]


def _abcrown(program: Path, question: Question) -> list[str]:
    # Without a configuration file it does not start.
    config = question.result.with_name("abcrown.yaml")
    config.write_text("general:\n  device: cpu\n")
    python = [shutil.which("python3") or sys.executable] if program.suffix == ".py" else []
    return [
        *python, str(program), "--config", str(config),
        "--onnx_path", str(question.onnx), "--vnnlib_path", str(question.vnnlib),
        "--timeout", f"{question.timeout:g}", "--device", "cpu",
        "--results_file", str(question.result), "--save_adv_example",
    ]  # fmt: skip


VERIFIERS: dict[str, Verifier] = {
    "neuralsat": Verifier(
        _neuralsat,
        lambda python: [str(python), "-c", _PROBE_NEURALSAT],
        Path(sys.executable),
        "pip install neuralsat, best in an environment of its own whose python --verifier-path names",
    ),
    "marabou": Verifier(
        _marabou,
        lambda python: [str(python), "-c", "import maraboupy"],
        Path(sys.executable),
        "pip install maraboupy with Python 3.11 or older, in an environment whose python --verifier-path names",
    ),
    "abcrown": Verifier(
        _abcrown,
        lambda program: ["test", "-f", str(program)],
        None,
        "clone alpha-beta-CROWN, and name its complete_verifier/abcrown.py, or a script that runs it, by --verifier-path",
    ),
}
