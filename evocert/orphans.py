"""A cell's process ends with the sweep that started it, even where that is killed. Imports nothing of the package."""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with(parent: int) -> None:
    """From now on, the death of the process ``parent`` reaches this one as SIGTERM, at which a run writes a checkpoint.

    On Linux only; elsewhere a cell whose sweep is killed goes on, and the next sweep waits for it.
    """
    # A shell may have started the sweep with SIGINT ignored, and it is how the sweep stops its cells.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died before this was heard
            sys.exit(130)
