"""What several tests need: small data, a small network, the command line, and one torch thread for the tests' process."""

import os
import signal
import sys

os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")

import numpy as np
import pytest
import torch

from evocert import cli
from evocert.data import Part
from evocert.networks import cnn3

# One thread: operations as small as the tests' only wait for each other on two, for minutes where another process is busy.
torch.set_num_threads(1)

# Started in the background of a script, a process ignores Ctrl-C, and so do those that it starts: not so the tests of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _threads():
    """Tests leave the number of torch's threads as they found it: it decides what runs on how many workers."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def part() -> Part:
    """40 random images [1, 8, 8] of 3 classes, each class with its own bright quarter, so that there is something to learn."""
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 3
    images = generator.uniform(0, 0.4, (40, 1, 8, 8))
    for i, label in enumerate(labels):
        images[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.5
    return Part(torch.tensor(images, dtype=torch.float32), torch.tensor(labels), torch.arange(40), 1.0)


@pytest.fixture
def network():
    """CNN3 with two channels on 8x8 images, 3 classes, with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cnn3((1, 8, 8), 3, mean=[0.3], std=[0.3], width=2)


@pytest.fixture
def evocert(monkeypatch, capsys):
    """Runs a command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evocert", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = cli._status()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run
