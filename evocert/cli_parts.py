"""What several commands of the command line share."""

import contextlib
import signal
from collections.abc import Iterator

import typer


def whole_number(text: str | int) -> int:
    """As the parser's own, but its complaint names the value."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}, allowed is a whole number") from None


def real_number(text: str | float) -> float:
    """Likewise."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}, allowed is a number") from None


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Ctrl-C waits until what is imported is whole: in the middle of it, an extension may not bear it."""
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt
