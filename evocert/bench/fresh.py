"""Measurements in a process that has done nothing yet, and whose stderr nobody sees."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evocert.bench import lirpa, measure
from evocert.bench.work import Work
from evocert.bounds import Tile, compiled

PROGRAM = "import sys; from evocert.bench.fresh import main; main(sys.argv[1])"
SHARE = 0.9  # of the memory that is free, which a process may take: the system must not fall with it


class ProcessFailed(RuntimeError):  # noqa: N818 (as subprocess has it)
    """The process came to nothing: the message says why, in a few words."""


def peak_memory(work: Work, bound: str, tile: Tile, device: torch.device) -> int:
    """What a bound of the whole population takes, in bytes."""
    found = _done({"kind": "memory", "work": work.record(), "bound": bound, "tile": list(tile)}, device)
    return int(found["peak"])


def auto_lirpa(work: Work, method: str, chunks: list[int], repeats: int, device: torch.device) -> dict[str, Any]:
    """See ``lirpa.measured``; the keys of ``seconds`` are text."""
    job = {"kind": "auto_LiRPA", "method": method, "chunks": chunks, "repeats": repeats}
    return _done({**job, "work": work.record()}, device)


def _done(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The result of a job."""
    job |= {"device": str(device), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="evocert-bench-") as folder:
        path, result = Path(folder, "job.pt"), Path(folder, "result.json")
        torch.save(job, path)
        paths = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": paths},
        )
        if done.returncode or not result.is_file():
            raise ProcessFailed(_reason(done))
        return json.loads(result.read_text())


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    lack = "MemoryError", "OutOfMemoryError", "can't allocate memory", "bad_alloc"
    if done.returncode == -9 or any(words in done.stderr for words in lack):
        return "out of memory"
    return last[:160]


def prepare(device: torch.device) -> None:
    """A device as a run uses it; on CUDA the same bits every time, and products of float32 in float32."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first CUDA call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


def main(path: str) -> None:
    """The other process: reads a job and writes its result beside it."""
    job = torch.load(path, weights_only=True)
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    work = Work.of(job["work"])
    if device.type == "cpu":
        _limit_memory()
    if job["kind"] == "memory":
        prepare(device)
        work.network  # noqa: B018 (it is read now, not in the call)
        if device.type == "cpu":
            compiled.load(work.parameters.dtype)  # as a process has it once, whatever it bounds
        call = partial(measure.margins, work, job["bound"], Tile(*job["tile"]))
        result: dict[str, Any] = {"peak": measure.peak(call, device)}
    else:
        result = lirpa.measured(work, job["method"], job["chunks"], job["repeats"])
    Path(path).with_name("result.json").write_text(json.dumps(result))


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):
        sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(sizes["MemAvailable"].split()[0]) * 1024
        pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data and stack, as the limit counts them
        most = pages * os.sysconf("SC_PAGE_SIZE") + int(SHARE * free)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
