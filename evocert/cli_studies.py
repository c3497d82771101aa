"""The commands that look at many runs or make them: ``evocert compare`` and ``evocert sweep``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from evocert.cli_parts import imports, whole_number
from evocert.errors import InputError


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or of a sweep.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table, too: as .md, .csv or .json.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw curves of certified and natural accuracy.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="generation|seconds|budget",
            help="What is drawn: training curves on the validation part over generations or over seconds; or the figures of "
            "the test part over each run's time, with a line through runs that differ by their generations.  [default: both "
            "training curves]",
        ),
    ] = None,
) -> None:
    """One table of finished runs; those that differ by their seed alone are one row, mean ± standard deviation.

    For example: evocert compare runs/digits_cnn3/* --out table.md --plot curves.png

    Certified figures are of results.json and, where evocert certify was at work in the run's folder, of certify.json.
    """
    from evocert.compare import compare as compared
    from evocert.compare.write import check_end, show, writer

    axes = {None: None, "generation": "generations", "seconds": "seconds", "budget": "budget"}
    if by not in axes:
        raise InputError(f"--by {by}: allowed are generation, seconds and budget")
    if by is not None and plot is None:
        raise InputError(f"--by {by}: allowed is together with --plot")
    write = None if out is None else writer(out)
    if plot is not None:
        check_end("--plot", plot, (".png",))
    comparison = compared(runs)
    if plot is not None:
        with imports():
            from evocert.plots import plot as draw

        draw(comparison, plot, axes[by])
    if write is not None:
        write(comparison)
    show(comparison)
    for path in (out, plot):
        if path is not None:
            print(path)


def sweep(
    problem: Annotated[Path, typer.Argument(help="A problem file, such as problems/digits_cnn3.py.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Values of a setting; KEY=A|B if they contain commas. May be repeated."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Values of the setting `seed`.")] = None,
    jobs: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Runs at a time, each with its share of the threads.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the runs.  [default: runs/sweeps/PROBLEM-DIGEST]"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of all runs.")
    ] = None,
) -> None:
    """Run every combination of some settings' values, and end in the table of evocert compare.

    For example: evocert sweep problems/digits_cnn3.py --grid method=pgpe,rgs --grid bound=ibp,deeppoly --seeds 0,1,2

    The same command goes on where it was stopped: finished runs are kept, interrupted ones continued, failed ones tried
    again. Exit status 1: a run failed; the others are finished all the same.
    """
    with imports():
        from evocert.compare import compare as compared
        from evocert.compare.write import show
        from evocert.sweep import plan
        from evocert.sweep import sweep as work
        from evocert.sweep.display import Terminal

    outcome = work(plan(problem, grid or [], seeds, settings or []), out, jobs, Terminal())
    if outcome.finished:
        show(compared(outcome.finished))
        print(f"the same table again: evocert compare {shlex.quote(str(outcome.folder))}")
    for line in outcome.failed:
        print(f"evocert: {line}", file=sys.stderr)
    if outcome.failed:
        raise typer.Exit(1)
