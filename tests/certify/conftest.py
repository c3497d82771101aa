"""A network that is trained in seconds, finished runs of it, and the command line."""

import shutil
from pathlib import Path

import pytest

from evocert.certify.command import Request, prepare
from evocert.display import Silent
from evocert.training import start

PROBLEM = """\
import evocert

experiment = evocert.Experiment(
    data="digits", width=2, eps=0.06, method="grad", generations=150, batch_size=64, center_learning_rate=0.02,
    eps_schedule=evocert.Schedule("linear", end=0.5, first=0.0), validations=1,
    attack=evocert.AttackSettings(steps=2, restarts=1),
)
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run, not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "toy.py").write_text(PROBLEM)
    start(folder / "toy.py", [], folder / "run", Silent())
    return folder / "run"


@pytest.fixture(scope="session")
def prepared(trained):
    """Its network and test images, at a radius at which every verdict occurs."""
    return prepare(Request(trained, eps=0.1, out=Path("nowhere")))


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A finished run that a certification may write to."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"
