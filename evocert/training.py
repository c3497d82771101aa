"""One run, from a problem file to a certificate: set up, the loop, the evaluation. What is resumed is exactly the loop."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from evotorch.logging import Logger
from torch import Tensor

from evocert import bounds, config, evaluation, networks
from evocert.centres import CentreAverage, Selection
from evocert.display import Display
from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.export.onnx import ExportError, export_onnx
from evocert.logging import attach_loggers, close_loggers, kept_rows
from evocert.memory import parse_bytes
from evocert.parts import Parts, Stage, build, chosen_centre
from evocert.problem_files import load_problem
from evocert.runs import Run, environment, warn
from evocert.searchers import SAMPLING, method

ONNX_IMAGES = 100  # test images on which the exported file is compared with torch


class Interrupted(Exception):  # noqa: N818 (no error: the user's wish)
    """The user stopped the run in ``run_path``, whose last checkpoint is of ``generation`` (None: there is none yet)."""

    def __init__(self, run_path: Path, generation: int | None) -> None:
        kept = (
            "it has no checkpoint yet and begins again"
            if generation is None
            else f"checkpoint at generation {generation}"
        )
        super().__init__(f"run {run_path} was stopped; {kept}")
        self.run_path = run_path


class Unwritable(Exception):  # noqa: N818 (what the run folder is)
    """The disk refused something in the middle of the run in ``run_path``; what was written before is kept."""

    def __init__(self, run_path: Path, error: OSError) -> None:
        super().__init__(f"run {run_path} stopped: {error.strerror or error}")
        self.run_path = run_path


def start(
    problem: Path, overrides: Sequence[str], run_dir: Path | None, display: Display
) -> tuple[Run, dict[str, Any]]:
    """Run a problem file from the beginning, in a new run folder. Returns the folder and its results.

    Raises:
        InputError, UnsupportedLayer: bad input; no run folder was made, or an empty one was left as it was.
        Interrupted: stopped by the user.
    """
    loaded = load_problem(problem, overrides)
    parts = build(loaded.experiment)
    run = Run.create(run_dir, loaded.experiment.problem)
    with contextlib.closing(run):
        with run.beginning():
            run.write_bytes("problem.py", loaded.file.source)
            run.write_json("environment.json", environment(parts.device, bounds.worker_count()))
            run.write_json("split.json", parts.data.split_record())
            run.write_json("config.json", config.record(loaded, problem, parts, run))
            _try_export(parts, run)
            loggers = attach_loggers(parts.experiment.loggers, parts.searcher, run.path)
        return run, _train(parts, run, loggers, None, display)


def resume(path: Path, display: Display) -> tuple[Run, dict[str, Any]]:
    """Continue a run where its last good checkpoint stands; the result is that of the run without the interruption.

    Raises:
        InputError: no such run, a finished one, a changed copy of the problem file, other data, or no checkpoint that can
            be read.
        Interrupted: stopped by the user.
    """
    run = Run.open(path)
    with contextlib.closing(run):
        if run.finished:
            raise InputError(f"run {path} is finished: its results are in {path / 'results.json'}")
        found = config.reload(run)
        parts = build(found.loaded.experiment, found.tiles, found.statistics, warm_start=not run.has_checkpoint)
        config.check_imported(run, found.loaded)
        run.check_split(parts.data.split_record())
        if parts.device.type != found.device_type:
            warn(f"the run began on {found.device_type} and goes on on {parts.device.type}: its bits will differ")
        state = run.load_checkpoint(warn, accept=lambda state: _restore(parts, state))
        loggers = attach_loggers(
            parts.experiment.loggers, parts.searcher, run.path, state["loggers"] if state else None
        )
        return run, _train(parts, run, loggers, state, display)


def _try_export(parts: Parts, run: Run) -> None:
    """Whether the network can be handed over at all: to be known before the training."""
    trial = run.path / "trial.onnx"
    try:
        export_onnx(parts.module, trial, parts.data.test.batch(slice(0, 1))[0])
    except ExportError as error:
        raise InputError(f"network: {error}") from error
    trial.unlink()


def _restore(parts: Parts, state: dict[str, Any]) -> None:
    """A checkpoint's state into the searcher. Raises whatever it may if something is lacking or does not fit."""
    for key in ("generation", "seconds", "best", "trained", "loggers"):
        state[key]  # a KeyError names it
    parts.enter(parts.stage_of(max(state["generation"], 1)))
    parts.searcher.load_state_dict(state["searcher"])


def _train(
    parts: Parts, run: Run, loggers: Sequence[Logger], state: dict[str, Any] | None, display: Display
) -> dict[str, Any]:
    """The loop. ``state`` is the checkpoint to go on from, which the searcher has loaded, or None."""
    experiment, last = parts.experiment, parts.stages[-1].end
    done, seconds, trained = 0, 0.0, False
    average, selection = CentreAverage(experiment.averaging), Selection(experiment.patience)
    if state is not None:
        done, seconds, selection.best, trained = (state[key] for key in ("generation", "seconds", "best", "trained"))
        selection.worse = state.get("worse", 0)
        if "average_state" in state:
            average.load_state_dict(state["average_state"], _centre(parts))
    run.open_metrics(done, warn)
    saved = lap = time.monotonic()

    if not trained:
        display.start(_title(parts, run), done, last)
    try:
        with _interrupts() as interrupted:
            while not trained:
                parts.enter(parts.stage_of(done + 1))
                stage, searcher = parts.stage, parts.searcher
                _follow_schedules(stage, searcher, done)
                step_began = time.perf_counter()
                searcher.step()
                done += 1
                _log_generation(parts, run, done, time.perf_counter() - step_began, display)
                reported = _centre(parts)
                if parts.in_last_stage:
                    average.add(reported)
                if done == stage.end:
                    searcher.finish()
                    if parts.in_last_stage and not torch.equal(_centre(parts), reported):  # an update that was pending
                        average.add(_centre(parts))
                # At equal distances, as nearly as whole generations allow, and at the end.
                if done * experiment.validations // last > (done - 1) * experiment.validations // last or done == last:
                    validated = _validate(parts, run, done, average, display)
                    if parts.in_last_stage:
                        settled = experiment.eps_schedule(stage.fraction(done)) == experiment.eps_schedule(1.0)
                        selection.consider(validated, settled=settled)
                trained = done == last or selection.exhausted
                if trained and done < last:  # what is handed over is what was validated: no pending update is applied
                    display.say(f"stopped at generation {done}: {selection.worse} validations in a row were no better")
                now = time.monotonic()
                seconds, lap = seconds + now - lap, now
                if trained or interrupted or now - saved >= experiment.checkpoint_seconds:
                    snapshot = {
                        "generation": done,
                        "seconds": seconds,
                        "best": selection.best,
                        "trained": trained,
                        "worse": selection.worse,
                        "searcher": searcher.state_dict(),
                        **_averaged(experiment, average),
                        "loggers": kept_rows(loggers),
                    }
                    run.save_checkpoint(snapshot)
                    state, saved = snapshot, now
                if interrupted:
                    raise Interrupted(run.path, done)
        display.stop()
        if parts.searcher._end_of_run_hook:
            parts.searcher._end_of_run_hook(dict(parts.searcher.status))
        assert state is not None, "the end of the training is a checkpoint"
        results = _finish(parts, run, state, display)
    except OSError as error:
        raise Unwritable(run.path, error) from error
    except KeyboardInterrupt as interrupt:  # in the evaluation, which resume does again, or a second Ctrl-C
        raise Interrupted(run.path, state["generation"] if state else None) from interrupt
    finally:
        display.stop()
        with contextlib.suppress(OSError):  # on a full disk; what matters is written by others
            close_loggers(loggers, run.path)
        if parts.problem.actors is not None:
            parts.problem.kill_actors()
    try:
        run.write_json("results.json", results)
    except OSError as error:
        raise Unwritable(run.path, error) from error
    return results


def _title(parts: Parts, run: Run) -> str:
    """What is about to be done, in a line."""
    experiment = parts.experiment
    names = [f"{stage.experiment.method} with {stage.experiment.bound}" for stage in parts.stages]
    members = f"population {experiment.popsize}, " if experiment.method in SAMPLING else ""
    return (
        f"{experiment.problem}: {', then '.join(names)}, D = {parts.problem.network.num_parameters} parameters, "
        f"{members}minibatch {experiment.batch_size}, {parts.device}  ->  {run.path}"
    )


def _centre(parts: Parts) -> Tensor:
    """``[D]``."""
    centre: Tensor = parts.searcher.status["center"].as_subclass(Tensor).detach()
    return centre


def _follow_schedules(stage: Stage, searcher: Any, done: int) -> None:
    """Learning rate and sigma of the next generation."""
    settings, fraction = stage.experiment, stage.fraction(done)
    searcher.set_learning_rate(settings.center_learning_rate * settings.learning_rate_schedule(fraction))
    if settings.stdev_learning_rate == 0:
        searcher.set_stdev(settings.stdev_init * settings.stdev_schedule(fraction))


def _averaged(experiment: Experiment, average: CentreAverage) -> dict[str, Any]:
    """What a checkpoint keeps of the average, if one is wanted and begun."""
    state = average.state_dict()
    if not experiment.averaging or state["sum"] is None:
        return {}
    return {"average": average.value.cpu(), "average_state": state}


def _evaluations(parts: Parts, done: int) -> dict[str, int]:
    """How many losses of one network on one image were computed, alone and with their gradients."""
    values = gradients = 0
    for stage in parts.stages:
        settings = stage.experiment
        images = settings.batch_size * max(min(done, stage.end) - stage.first, 0)
        alone, followed = method(settings.method).members(settings)
        values, gradients = values + images * alone, gradients + images * followed
    return {"values": values, "gradients": gradients}


def _log_generation(parts: Parts, run: Run, generation: int, seconds: float, display: Display) -> None:
    status, problem = parts.searcher.status, parts.problem
    settings = parts.stage.experiment
    row = {
        "event": "generation",
        "generation": generation,
        **({"stage": parts.stage.number + 1} if len(parts.stages) > 1 else {}),
        "eps": problem.eps_at(generation - 1),
        "sigma": float(status["stdev"].max()) if settings.stdev_learning_rate == 0 else float(status["stdev"].mean()),
        "mean_eval": status["mean_eval"],
        **{
            key: problem.status[key]
            for key in ("natural_loss", "certified", "nonfinite_evals")
            if key in problem.status
        },
        "timing": {"seconds": seconds, **parts.searcher.timing},
    }
    run.log(row)
    display.generation(generation, row["mean_eval"], row["eps"], row["sigma"])


def _validate(parts: Parts, run: Run, generation: int, average: CentreAverage, display: Display) -> dict[str, Any]:
    """Validate the centre, or in the last stage what it is on average, at the full eps."""
    experiment = parts.experiment
    centre = average.value.clone() if experiment.averaging and parts.in_last_stage else _centre(parts).clone()
    began = time.perf_counter()
    natural, certified = evaluation.validate(
        parts.problem.network,
        centre,
        parts.data.validation,
        experiment.eps,
        experiment.bound,
        parse_bytes(experiment.memory_budget),
    )
    row = {"event": "validation", "generation": generation, "natural": natural, "certified": certified}
    run.log({**row, "timing": {"validate": time.perf_counter() - began}})
    display.validation(natural, certified)
    return {"centre": centre.cpu(), "generation": generation, "natural": natural, "certified": certified}


def _finish(parts: Parts, run: Run, state: dict[str, Any], display: Display) -> dict[str, Any]:
    """Evaluate the chosen centre on the test part, and write the network. ``state``: the last checkpoint."""
    experiment, test = parts.experiment, parts.data.test
    centre = chosen_centre(state, experiment.select)
    module = networks.with_parameters(parts.module, centre).to(parts.device)
    display.say(f"evaluating on {len(test)} test images")
    accuracy = evaluation.evaluate(
        module,
        parts.problem.network,
        centre.to(parts.device),
        test,
        experiment.eps,
        bounds=dict.fromkeys(("ibp", experiment.bound)),
        steps=experiment.attack.steps,
        restarts=experiment.attack.restarts,
        step_size=experiment.attack.step_size,
        budget=parse_bytes(experiment.memory_budget),
    )
    export_onnx(module, run.path / "network.onnx", test.batch(slice(0, ONNX_IMAGES))[0])
    return {
        "problem": experiment.problem,
        "method": experiment.method,
        "bound": experiment.bound,
        "eps": experiment.eps,
        "dataset": parts.data.name,
        "split": "test",
        "examples": len(test),
        "seed": experiment.seed,
        "generations": state["generation"],
        "init_from": experiment.init_from,
        "train_seconds": state["seconds"],
        "evaluations": _evaluations(parts, state["generation"]),
        "accuracy": dataclasses.asdict(accuracy),
    }


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """``with _interrupts() as interrupted``: a list that Ctrl-C and SIGTERM append to. A second Ctrl-C ends at once."""
    interrupted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
