"""The command line: parses, calls, prints. What needs torch is imported inside the commands."""

import errno
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import evocert
from evocert.errors import InputError

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
    from evocert.training import start

    _conduct(lambda display: start(problem, overrides, run_dir, display), quiet)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run; the result is bit for bit that of the uninterrupted one."""
    from evocert.training import resume as continue_run

    _conduct(lambda display: continue_run(run_folder, display), quiet)


def _conduct(work: Callable[[Any], Any], quiet: bool) -> None:
    from evocert.display import Silent, Terminal, show_results, summary

    folder, results = work(Silent() if quiet else Terminal())
    if quiet:
        print(summary(results, folder.path))
    else:
        show_results(results, folder.path, ["results.json", "metrics.jsonl", "checkpoint.pt", "network.onnx"])


def main() -> None:
    """The console script. Exit status: 0 done, 1 the work failed, 2 bad input, 130 stopped by the user."""
    # Third parties' warnings and log lines are not for a user's eyes.
    warnings.simplefilter("ignore")
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
    sys.exit(_status())


def _status() -> int:
    try:
        return app(prog_name="evocert", standalone_mode=False) or 0
    except InputError as error:
        return _complain(error, "", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped before the training began", "", 130)
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

    from evocert.bounds import UnsupportedLayer
    from evocert.evaluation import ContradictionError
    from evocert.problem import NonFiniteFitnessError
    from evocert.training import Interrupted

    if isinstance(error, UnsupportedLayer):
        return _complain(error, "", 2)
    if isinstance(error, Interrupted):
        return _complain(error, f"; to continue: evocert resume {shlex.quote(str(error.run_path))}", 130)
    if isinstance(error, ContradictionError | NonFiniteFitnessError):
        return _complain(error, "", 1)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        smaller = "; a smaller memory_budget, popsize or batch_size needs less; what a run has written is kept"
        return _complain("out of memory", smaller, 1)
    if isinstance(error, OSError):
        kept = "; the last good checkpoint is kept: free some space, then evocert resume RUN"
        return _complain(error, kept if error.errno in (errno.ENOSPC, errno.EDQUOT) else "", 1)
    raise error


def _complain(what: Any, hint: str, status: int) -> int:
    line = " ".join(str(what).split())
    print(f"evocert: {line}{hint}", file=sys.stderr)
    return status
