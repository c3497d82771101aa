"""Loggers: EvoTorch's by name, and TensorBoard, which EvoTorch does not have.

A problem file's ``loggers`` holds names (``"StdOutLogger"``), names with arguments (``("StdOutLogger", {"interval": 100})``),
or functions of the searcher (``lambda searcher: MlflowLogger(searcher, client, run)``). The JSON lines of a run,
``metrics.jsonl``, are always written and need no logger.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evotorch.logging
from evotorch.algorithms.searchalgorithm import SearchAlgorithm
from evotorch.logging import Logger, PandasLogger
from torch import Tensor

from evocert.errors import InputError
from evocert.runs import warn

# EvoTorch leaves out the loggers whose package is absent.
PACKAGES = {
    "MlflowLogger": "mlflow",
    "NeptuneLogger": "neptune",
    "SacredLogger": "sacred",
    "WandbLogger": "wandb",
    "TensorBoardLogger": "evocert[tensorboard]",
}


class TensorBoardLogger(Logger):
    """Scalars of the status and, every so often, a histogram of the centre, for TensorBoard.

    Args:
        searcher: whose status is logged.
        directory: where the event files go.
        interval: every so-manyth generation is logged.
        histogram_interval: every so-manyth generation, of those, the centre's histogram too. 0: never.
    """

    def __init__(
        self, searcher: SearchAlgorithm, directory: Path | str, *, interval: int = 10, histogram_interval: int = 500
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("TensorBoardLogger") from error
        super().__init__(searcher, interval=interval)
        # After a resume, what a killed process wrote past its checkpoint is hidden.
        self._writer = SummaryWriter(str(directory), purge_step=searcher.step_count + 1)
        self._histogram_interval = histogram_interval
        searcher.end_of_run_hook.append(lambda status: self._writer.flush())

    def _log(self, status: dict[str, Any]) -> None:
        step = int(status["iter"])
        for key, value in status.items():
            if isinstance(value, bool | int | float) and key != "iter":
                self._writer.add_scalar(key, value, step)
        if self._histogram_interval and step % self._histogram_interval < self._interval:
            self._writer.add_histogram("center", status["center"].as_subclass(Tensor).detach().cpu(), step)

    def close(self) -> None:
        self._writer.close()


Rows = list[dict[str, Any]]


def attach_loggers(
    settings: Sequence[Any], searcher: SearchAlgorithm, folder: Path, rows: Sequence[Rows | None] | None = None
) -> list[Logger]:
    """The loggers of an experiment, attached to its searcher.

    Args:
        settings: as in a problem file, see above.
        searcher: which they follow; after a resume their steps go on where it stands.
        folder: the run folder; TensorBoard's files go to ``tensorboard`` in it.
        rows: what ``kept_rows`` gave in the process before.

    Raises:
        InputError: an unknown name, a missing package, or arguments that the logger does not take.
    """
    hooks = (searcher.before_step_hook, searcher.after_step_hook, searcher.log_hook, searcher.end_of_run_hook)
    own = [len(hook) for hook in hooks]
    loggers = [_attach(setting, searcher, folder) for setting in settings]
    for hook, first in zip(hooks, own, strict=True):
        for place in range(first, len(hook)):
            hook[place] = _Guarded(hook[place])
    for logger, kept in zip(loggers, rows or [None] * len(loggers), strict=True):
        if kept is not None:
            logger._data = list(kept)
    return loggers


def kept_rows(loggers: Sequence[Logger]) -> list[Rows | None]:
    """What loggers hold in memory until the end, for a checkpoint: plain values, None for those that hold nothing."""
    return [
        [{k: v for k, v in row.items() if isinstance(v, bool | int | float | str | None)} for row in logger._data]
        if isinstance(logger, PandasLogger)
        else None
        for logger in loggers
    ]


class _Guarded:
    """A logger or a hook of a user's: if it raises, the run says so once, and goes on without it."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook: Callable[..., Any] | None = hook

    def __call__(self, *arguments: Any) -> Any:
        if self._hook is None:
            return None
        try:
            return self._hook(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            name = getattr(self._hook, "__qualname__", type(self._hook).__name__)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            warn(f"the logger or hook {name} failed ({what}); the run goes on without it")
            self._hook = None
            return None


def _attach(setting: Any, searcher: SearchAlgorithm, folder: Path) -> Logger:
    """One of the forms that ``Experiment`` has let pass."""
    if callable(setting):
        kind, arguments, name = setting, {}, getattr(setting, "__name__", type(setting).__name__)
    else:
        name, arguments = (setting, {}) if isinstance(setting, str) else setting
        if name == "TensorBoardLogger":
            kind, arguments = TensorBoardLogger, {"directory": folder / "tensorboard", **arguments}
        elif (kind := getattr(evotorch.logging, name, None)) is None:
            raise _missing(name)
    try:
        logger = kind(searcher, **arguments)
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"logger {name} with {arguments}: {' '.join(str(error).split())}") from error
    if isinstance(logger, Logger):
        if logger._interval < 1:
            raise InputError(f"logger {name} with interval={logger._interval}: allowed is 1 or more")
        logger._steps_count = searcher.step_count  # some of EvoTorch's count for themselves, from 1
    return logger


def _missing(name: str) -> InputError:
    return InputError(f"logger {name} needs a package that is not installed: pip install '{PACKAGES[name]}'")


def close_loggers(loggers: Sequence[Logger], folder: Path) -> None:
    """Flush what loggers hold; a PandasLogger's table goes to ``pandas.csv`` in the folder, a second's to ``pandas-2.csv``."""
    tables = 0
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.close()
        elif isinstance(logger, PandasLogger):
            tables += 1
            if logger._data:
                frame = logger.to_dataframe(index=None).set_index("iter")
                scalars = [c for c in frame.columns if frame[c].map(lambda v: isinstance(v, int | float)).all()]
                frame[scalars].to_csv(folder / ("pandas.csv" if tables == 1 else f"pandas-{tables}.csv"))
