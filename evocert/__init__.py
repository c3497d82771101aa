"""evocert: certified training by evolution strategies.

The public names, imported when they are first used, so that ``evocert --help`` need not wait for torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AttackSettings": "evocert.experiment",
    "CertifiedTraining": "evocert.problem",
    "Experiment": "evocert.experiment",
    "InputError": "evocert.errors",
    "Normalize": "evocert.modules",
    "Residual": "evocert.modules",
    "Schedule": "evocert.schedules",
    "Tile": "evocert.bounds",
    "UnsupportedLayer": "evocert.bounds",
    "channel_statistics": "evocert.data",
    "cnn3": "evocert.networks",
    "cnn4": "evocert.networks",
    "cnn5": "evocert.networks",
    "cnn7": "evocert.networks",
    "cnn7_bn": "evocert.networks",
    "fully_connected": "evocert.networks",
    "load_data": "evocert.data",
    "resnet": "evocert.networks",
}

_MODULES = ("bounds", "searchers")

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"evocert.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evocert' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return getattr(module, "load" if name == "load_data" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
