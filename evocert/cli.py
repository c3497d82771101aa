"""The command line: parses, calls, prints. What needs torch is imported inside the commands."""

import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import evocert
from evocert import cli_studies
from evocert.cli_parts import imports, real_number, whole_number
from evocert.errors import InputError

STOPPED = "stopped; nothing is lost"

app = typer.Typer(
    name="evocert",
    help="Train neural networks whose robustness can be proved: evolution strategies on relaxation-bounded losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress; one line of results at the end.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"evocert {evocert.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train neural networks whose robustness can be proved: evolution strategies on relaxation-bounded losses."""


@app.command()
def run(
    problem: Annotated[Path, typer.Argument(help="A problem file, such as problems/digits_cnn3.py.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The setting `seed`.")] = None,
    device: Annotated[str | None, typer.Option(help="The setting `device`: auto, cpu or cuda:0.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder: must not exist, or be empty.")] = None,
    quiet: Quiet = False,
) -> None:
    """Evolve the network of a problem file, certify it, and write a run folder.

    For example: evocert run problems/digits_cnn3.py --set popsize=128 --seed 3

    KEY is the dotted name of a setting, such as attack.steps, or the last part of it where that is unique. All of them with
    their meaning: python -c "import evocert; help(evocert.Experiment)"
    """
    overrides = list(settings or [])
    overrides += [f"seed={seed}"] if seed is not None else []
    overrides += [f"device={device}"] if device is not None else []
    with imports():
        from evocert.training import start

    _conduct(lambda display: start(problem, overrides, run_dir, display), quiet)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run; the result is bit for bit that of the uninterrupted one."""
    with imports():
        from evocert.training import resume as continue_run

    _conduct(lambda display: continue_run(run_folder, display), quiet)


@app.command()
def bench(
    network: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:WIDTH]", help="Such as cnn5 or cnn3:4; may be repeated.  [default: cnn3]"),
    ] = None,
    bound: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="May be repeated.  [default: ibp, crown-ibp, deeppoly and deeppoly-sparse]"),
    ] = None,
    members: Annotated[int, typer.Option(parser=whole_number, metavar="P", help="Networks in the population.")] = 16,
    images: Annotated[
        int, typer.Option(parser=whole_number, metavar="B", help="Images that each of them is bounded on.")
    ] = 32,
    weights: Annotated[
        str, typer.Option(metavar="random|ibp", help="Fresh for each member, or close around ones trained by IBP.")
    ] = "random",
    eps: Annotated[
        str | None, typer.Option(metavar="E", help="Radius in [0, 1] pixels, such as 2/255.  [default: by the images]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="digits|mnist|random",
            help="The images.  [default: mnist for small networks if it is at hand, else random]",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where mnist is, if not in EVOCERT_DATA.")
    ] = None,
    repeats: Annotated[int, typer.Option(parser=whole_number, metavar="N", help="How often each call is timed.")] = 5,
    memory_budget: Annotated[
        str, typer.Option(metavar="SIZE", help="From which the tiles are chosen, such as 64MiB.")
    ] = "2GiB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON, too.")] = None,
) -> None:
    """Measure the bounds: their speed and memory, how far they are from their floor, and beside other ways to have them.

    For example: evocert bench --bound deeppoly --weights ibp --data-dir DIR --out bench.json

    With auto_LiRPA's public source on PYTHONPATH it is measured too.
    """
    from evocert.bench import BenchStopped, Settings
    from evocert.bench import bench as measure
    from evocert.bench.table import Tables

    settings = Settings(
        tuple(network or ["cnn3"]),
        tuple(bound or ["ibp", "crown-ibp", "deeppoly", "deeppoly-sparse"]),
        members, images, weights, eps, data, data_dir, repeats, device, out, memory_budget,
    )  # fmt: skip
    tables = Tables()
    try:
        measure(settings, tables)
    except KeyboardInterrupt:
        raise BenchStopped("stopped" if out is None else f"stopped; {out} was not written") from None
    finally:
        tables.stop()
    if out is not None:
        print(out)


@app.command()
def certify(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL.onnx", help="The folder of a finished run, or a network.")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set, or the path of an .npz.  [default: the run's]")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it is, if not in EVOCERT_DATA.")] = None,
    eps: Annotated[
        str | None, typer.Option(metavar="E", help="Radius in [0, 1] pixels, such as 2/255.  [default: the run's]")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(parser=whole_number, metavar="N", help="The first N test images.  [default: all]")
    ] = None,
    indices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The numbers of the test images to take.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(metavar="A,B,C", help="Names of bounds, attack and exact, in the order in which they are tried."),
    ] = "ibp,crown-ibp,deeppoly,attack,alpha-crown,exact",
    timeout: Annotated[
        float, typer.Option(parser=real_number, metavar="SECONDS", help="Of the exact method, for an example.")
    ] = 30.0,
    workers: Annotated[int, typer.Option(parser=whole_number, metavar="N", help="Processes for the exact method.")] = 1,
    verifier: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A second opinion: neuralsat, marabou or abcrown, if it is installed."),
    ] = None,
    verifier_path: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The python that has it; for abcrown, its abcrown.py.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the records.  [default: the run, or certify-MODEL]")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Decide for each test image whether a network is robust around it: cheap bounds, attack, exact verification.

    For example: evocert certify runs/mine --examples 100 --timeout 30

    What is found is on record at once, in certify.jsonl; the same command goes on where it was stopped, and one with a
    larger timeout or more methods tries what is undecided again. Exit status 1: an example is certified and broken at once.
    """
    with imports():
        from evocert.certify import display as shown
        from evocert.certify.cascade import Settings
        from evocert.certify.command import Request, prepare
        from evocert.certify.command import certify as decide
        from evocert.settings import number

    names = tuple(name.strip() for name in methods.split(","))
    wanted = Settings(0.0 if eps is None else number("--eps", eps), names, timeout, workers)
    request = Request(target, data, data_dir, None if eps is None else wanted.eps, examples, indices, out)
    prepared = prepare(request)
    content, records = decide(
        prepared,
        replace(wanted, eps=prepared.eps),
        shown.Silent() if quiet else shown.Terminal(),
        verifier,
        verifier_path,
    )
    shown.show_summary(content, records, quiet)
    if content["contradictions"]:
        raise typer.Exit(1)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder to write: must not exist, or be empty.  [default: export-VERSION-NORMALISATION in RUN]",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="N",
            help="The first N test images.  [default: 100, or all if there are fewer]",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            parser=real_number, metavar="SECONDS", help="For each property; 6 hours at most for all together."
        ),
    ] = 100.0,
    vnnlib: Annotated[str, typer.Option(metavar="1.0|2.0", help="Version of the properties' format.")] = "1.0",
    normalisation: Annotated[
        str,
        typer.Option(
            metavar="folded|outside", help="In the ONNX file's weights, or left to whoever feeds the network."
        ),
    ] = "folded",
    gz: Annotated[bool, typer.Option("--gz", help="Pack the ONNX and VNN-LIB files.")] = False,
) -> None:
    """Write a finished run as a folder that other people's verifiers read: ONNX, VNN-LIB, instances.csv.

    For example: evocert export runs/digits_cnn3/RUN --examples 50 --timeout 60
    """
    with imports():
        from evocert.export.benchmark import Request, summary
        from evocert.export.benchmark import export as write

    done = write(Request(run_folder, out, examples, timeout, vnnlib, normalisation, ".gz" if gz else ""))
    try:
        print(summary(done), flush=True)
    except OSError as error:
        raise InputError(f"stdout cannot be written to ({error.strerror}); the export is in {done.path}") from error


app.command()(cli_studies.compare)
app.command()(cli_studies.sweep)


def _conduct(work: Callable[[Any], Any], quiet: bool) -> None:
    from evocert.display import Silent, Terminal, show_results, summary

    folder, results = work(Silent() if quiet else Terminal())
    try:
        if quiet:
            print(summary(results, folder.path), flush=True)
        else:
            show_results(results, folder.path, ["results.json", "metrics.jsonl", "checkpoint.pt", "network.onnx"])
    except OSError as error:
        raise InputError(f"stdout cannot be written to ({error.strerror}); the results are in {folder.path}") from error


def main() -> None:
    """The console script. Exit status: 0 done, 1 the work failed, 2 bad input, 130 stopped by the user."""
    # Third parties' warnings and log lines are not for a user's eyes.
    warnings.simplefilter("ignore")
    if sys.stdout is None:  # closed by whoever called
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the whole process)
    for stream in (sys.stdout, sys.stderr):  # a folder's name may have what the terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
    sys.exit(_status())


def _status() -> int:
    try:
        status = app(prog_name="evocert", standalone_mode=False) or 0
        return status if status != 130 else _complain(STOPPED, "", 130)  # typer's own answer to Ctrl-C
    except InputError as error:
        return _complain(error, "", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(STOPPED, "", 130)
    except Exception as error:
        if callable(message := getattr(error, "format_message", None)):
            return _parser_complaint(error, message())
        return _failure(error)


def _parser_complaint(error: Exception, message: str) -> int:
    """Of the parser's exceptions, which come from click or, in newer versions of typer, from its own copy of it."""
    context: Any = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    return _complain(message, f" (see {context.command_path} --help)" if context else "", 2)


def _failure(error: Exception) -> int:
    """What only torch's side of the package can raise, so that it is not imported before."""
    import torch

    from evocert.bench import BenchFailed, BenchStopped
    from evocert.bounds import UnsupportedLayer
    from evocert.certify.command import CertifyStopped
    from evocert.evaluation import ContradictionError
    from evocert.export.onnx import ExportError
    from evocert.problem import NonFiniteFitnessError
    from evocert.sweep import SweepStopped
    from evocert.training import Interrupted, Unwritable

    if isinstance(error, UnsupportedLayer):
        return _complain(error, "", 2)
    if isinstance(error, Interrupted | Unwritable):
        how = f"; to continue: evocert resume {shlex.quote(str(error.run_path))}"
        return _complain(error, how, 130 if isinstance(error, Interrupted) else 1)
    if isinstance(error, BenchStopped | CertifyStopped | SweepStopped):
        return _complain(error, "", 130)
    if isinstance(error, BenchFailed | ContradictionError | ExportError | NonFiniteFitnessError):
        return _complain(error, "", 1)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        smaller = "; a smaller memory_budget, popsize or batch_size needs less; what a run has written is kept"
        return _complain("out of memory", smaller, 1)
    if isinstance(error, OSError):
        return _complain(error, "", 1)
    raise error


def _complain(what: Any, hint: str, status: int) -> int:
    line = " ".join(str(what).split())
    print(f"evocert: {line}{hint}", file=sys.stderr)
    return status
