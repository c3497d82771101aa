"""A run that is finished, small and good enough to classify some images: written once, read by many tests."""

from pathlib import Path

import pytest

from evocert.display import Silent
from evocert.training import start

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", width=4, mean=[0.3], std=[0.4], eps=0.03, train_eps=0.003, generations=250, batch_size=64, popsize=64,
    stdev_init=0.02, center_learning_rate=0.01, validations=1, select="last",
    attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "toy.py").write_text(PROBLEM)
    start(folder / "toy.py", [], folder / "run", Silent())
    return folder / "run"
