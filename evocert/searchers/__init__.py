"""How the centre is moved: one method, one file, one line in ``METHODS``.

Each is an EvoTorch ``SearchAlgorithm`` over ``CertifiedTraining`` that can be built from an experiment (``configured``), end
(``finish``), be scheduled (``set_learning_rate``, ``set_stdev``), and be saved and restored (``state_dict``,
``load_state_dict``). It reports ``center``, ``mean_eval`` and ``stdev``, and the seconds of its last step in ``timing``.
"""

import importlib
from typing import Any

# Named, not imported: settings are checked without waiting for EvoTorch.
METHODS: dict[str, str] = {
    "pgpe": "evocert.searchers.pgpe:PGPE",
    "rgs": "evocert.searchers.gradient:RGS",
    "grad": "evocert.searchers.gradient:Grad",
    "sabr": "evocert.searchers.gradient:SABR",
    "mtl-ibp": "evocert.searchers.gradient:MTLIBP",
    "cc-ibp": "evocert.searchers.gradient:CCIBP",
    "exp-ibp": "evocert.searchers.gradient:EXPIBP",
    "pgd": "evocert.searchers.gradient:PGD",
    "standard": "evocert.searchers.gradient:Standard",
}
# Those that look around the centre, at a distance of about sigma.
SAMPLING = ("pgpe", "rgs")
# Those that descend on a certified loss, of whatever bound; the others have losses of their own.
BY_GRADIENT = ("rgs", "grad")


def method(name: str) -> Any:
    """The searcher class of a method."""
    module, _, searcher = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), searcher)


def __getattr__(name: str) -> Any:
    for path in METHODS.values():
        module, _, searcher = path.partition(":")
        if searcher == name:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
