"""The command line: parses, calls, prints. What needs torch is imported inside the commands."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
import typer

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


@app.callback()
def _main() -> None:
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
    """Evolve the network of a problem file, certify it, and write a run folder."""
    overrides = list(settings or [])
    overrides += [f"seed={seed}"] if seed is not None else []
    overrides += [f"device={device}"] if device is not None else []
    with _ready():
        from evocert.training import start
    _conduct(lambda display: start(problem, overrides, run_dir, display), quiet)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run; the result is bit for bit that of the uninterrupted one."""
    with _ready():
        from evocert.training import resume as continue_run
    _conduct(lambda display: continue_run(run_folder, display), quiet)


def _conduct(work: Callable[[Any], Any], quiet: bool) -> None:
    from evocert.display import Silent, Terminal, show_results, summary

    with _ready():
        folder, results = work(Silent() if quiet else Terminal())
    if quiet:
        print(summary(results, folder.path))
    else:
        show_results(results, folder.path, ["results.json", "metrics.jsonl", "checkpoint.pt", "network.onnx"])


@contextlib.contextmanager
def _ready() -> Any:
    """Third parties' warnings and log lines are not for a user's eyes."""
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """The console script. Exit status: 0 done, 1 the work failed, 2 bad input, 130 stopped by the user."""
    sys.exit(_status())


def _status() -> int:
    try:
        return app(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return _complain(error.format_message(), hint, 2)
    except InputError as error:
        return _complain(error, "", 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _complain("stopped before there was anything to resume, or by a second Ctrl-C", "", 130)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> int:
    """What only torch's side of the package can raise, so that it is not imported before."""
    from evocert.bounds import UnsupportedLayer
    from evocert.evaluation import ContradictionError
    from evocert.problem import NonFiniteFitnessError
    from evocert.training import Interrupted

    if isinstance(error, UnsupportedLayer):
        return _complain(error, "", 2)
    if isinstance(error, Interrupted):
        return _complain(error, "", 130)
    if isinstance(error, ContradictionError | NonFiniteFitnessError):
        return _complain(error, "", 1)
    if isinstance(error, OSError):
        return _complain(error, "", 1)
    raise error


def _complain(what: Any, hint: str, status: int) -> int:
    line = " ".join(str(what).split())
    print(f"evocert: {line}{hint}", file=sys.stderr)
    return status
