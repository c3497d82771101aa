"""Loggers: EvoTorch's by name, and TensorBoard, which EvoTorch does not have.

A problem file's ``loggers`` holds names (``"StdOutLogger"``), names with arguments (``("StdOutLogger", {"interval": 100})``),
or functions of the searcher (``lambda searcher: MlflowLogger(searcher, client, run)``). The JSON lines of a run,
``metrics.jsonl``, are always written and need no logger.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evotorch.logging
from evotorch.algorithms.searchalgorithm import SearchAlgorithm
from evotorch.logging import Logger, PandasLogger
from torch import Tensor

from evocert.errors import InputError

# EvoTorch leaves out the loggers whose package is absent.
PACKAGES = {
    "MlflowLogger": "mlflow",
    "NeptuneLogger": "neptune",
    "SacredLogger": "sacred",
    "WandbLogger": "wandb",
    "TensorBoardLogger": "evocert[tensorboard]",
}
NAMES = ("StdOutLogger", "PandasLogger", *PACKAGES)


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
    loggers = [_attach(setting, searcher, folder) for setting in settings]
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


def _attach(setting: Any, searcher: SearchAlgorithm, folder: Path) -> Logger:
    if isinstance(setting, str):
        setting = (setting, {})
    if callable(setting):
        kind, arguments, name = setting, {}, getattr(setting, "__name__", type(setting).__name__)
    elif isinstance(setting, list | tuple) and len(setting) == 2 and isinstance(setting[1], dict):
        name, arguments = setting
        kind = _logger_class(name)
        if name == "TensorBoardLogger":
            arguments = {"directory": folder / "tensorboard", **arguments}
    else:
        raise InputError(
            f"loggers has {setting!r}: allowed are a name, (name, {{arguments}}), or a function of the searcher"
        )
    try:
        logger = kind(searcher, **arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"logger {name} with {arguments}: {' '.join(str(error).split())}") from error
    if isinstance(logger, Logger):
        if logger._interval < 1:
            raise InputError(f"logger {name} with interval={logger._interval}: allowed is 1 or more")
        logger._steps_count = searcher.step_count  # some of EvoTorch's count for themselves, from 1
    return logger


def _logger_class(name: str) -> Any:
    if name not in NAMES:
        raise InputError(f"loggers has {name!r}: allowed are {', '.join(NAMES)}, or a function of the searcher")
    if name == "TensorBoardLogger":
        return TensorBoardLogger
    kind = getattr(evotorch.logging, name, None)
    if kind is None:
        raise _missing(name)
    return kind


def _missing(name: str) -> InputError:
    return InputError(f"logger {name} needs a package that is not installed: pip install '{PACKAGES[name]}'")


def close_loggers(loggers: Sequence[Logger], folder: Path) -> None:
    """Flush what loggers hold; a PandasLogger's table goes to ``pandas.csv`` in the run folder."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.close()
        elif isinstance(logger, PandasLogger) and logger._data:
            frame = logger.to_dataframe(index=None).set_index("iter")
            frame[[c for c in frame.columns if frame[c].map(lambda v: isinstance(v, int | float)).all()]].to_csv(
                folder / "pandas.csv"
            )
