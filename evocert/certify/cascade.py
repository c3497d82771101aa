"""The cascade: cheap methods first, each on what those before it have left undecided, and the dearest example by example.

Blocks of examples go through the cheap methods together. A block is always the same examples whatever is on record of them, so
that what is found does not depend on where a process before this one was stopped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from evocert.attacks import apgd, pgd
from evocert.bounds import BOUNDS, box_around, choose_tile
from evocert.certify import exact
from evocert.certify.records import Records, Row
from evocert.certify.solver import Solver
from evocert.certify.subject import Subject
from evocert.certify.verdict import ROUNDING, Verdict
from evocert.data import Part
from evocert.errors import InputError

DEFAULT = ("ibp", "crown-ibp", "deeppoly", "attack", "alpha-crown", "exact")
METHODS = (*BOUNDS, "attack", "exact")
BLOCK = 100  # examples
CHECK_STEPS = 20  # of the attack on what is certified already


class Show(Protocol):
    """Where a certification reports to."""

    def begin(self, title: str, total: int, done: int) -> None: ...
    def working(self, method: str, examples: int) -> None: ...
    def decided(self, rows: Sequence[Row]) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """How examples are decided.

    Attributes:
        eps: radius in [0, 1] pixels.
        methods: of ``METHODS``, in the order in which they are tried.
        timeout: seconds of the exact method for an example.
        workers: processes for it.
        steps, restarts: of the attack.
        budget: bytes for the temporaries of the bounds.
    """

    eps: float
    methods: tuple[str, ...] = DEFAULT
    timeout: float = 30.0
    workers: int = 1
    steps: int = 100
    restarts: int = 10
    budget: int = 2 * 2**30

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"method {name!r}: allowed are {', '.join(METHODS)}")
        if len(set(self.methods)) < len(self.methods):
            raise InputError(f"methods {','.join(self.methods)}: each is allowed once")
        if not 0 <= self.eps < float("inf"):
            raise InputError(f"eps is {self.eps}: a finite number >= 0 in [0, 1] pixels is allowed")
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"timeout is {self.timeout}: a positive number of seconds is allowed")
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}: 1 or more are allowed")


def run(subject: Subject, part: Part, indices: Sequence[int], settings: Settings, records: Records, show: Show) -> None:
    """Decides examples of a part, and puts on record what it finds; what is decided already stays.

    Args:
        subject: the network.
        part: the images.
        indices: which of them, rising.
        settings: how.
        records: of earlier processes, too.
        show: is told.
    """
    done = [
        i for i in indices if i in records.rows and not records.rows[i].to_retry(settings.methods, settings.timeout)
    ]
    left = sorted(set(indices) - set(done))
    show.begin(subject.name, len(indices), len(done))
    show.decided([records.rows[i] for i in done])
    with Solver(subject, settings.eps, settings.timeout, settings.workers) as solver:
        for first in range(0, len(part), BLOCK):
            block = [i for i in indices if first <= i < first + BLOCK]
            missing = {i for i in left if first <= i < first + BLOCK}
            if missing:
                _Block(subject, part, block, missing, settings, records, show).run(solver)


@dataclass
class _Block:
    subject: Subject
    part: Part
    indices: list[int]
    missing: set[int]
    settings: Settings
    records: Records
    show: Show

    def run(self, solver: Solver) -> None:
        indices = torch.tensor(self.indices)
        self.images, self.labels = self.part.batch(indices)
        self.seconds = torch.zeros(len(indices))
        with torch.no_grad(), self._timed("clean", torch.arange(len(indices))):
            logits = self.subject.members.logits(self.images.double())[0]
        # A tie is no decision for the label.
        correct = (logits.argmax(1) == self.labels) & ((logits >= logits.amax(1, keepdim=True)).sum(1) == 1)
        self.predictions = logits.argmax(1)
        self.found: dict[int, Row] = {}
        self.broken: dict[int, Tensor] = {}  # points of the check
        for place in (~correct).nonzero().flatten().tolist():
            self._note(place, "misclassified", "clean")
        for method in self.settings.methods:
            places = self._open()
            if len(places) and method != "exact":
                with self._timed(method, places):
                    self._attack(places) if method == "attack" else self._bound(method, places)
        self._check(correct.nonzero().flatten())
        if "exact" not in self.settings.methods or not exact.takes(self.subject.members):
            for place in self._open().tolist():
                self._note(place, "undecided", None)
        self._record(sorted(self.found))
        self._exactly(solver)

    def _open(self) -> Tensor:
        return torch.tensor([p for p in range(len(self.indices)) if p not in self.found], dtype=torch.long)

    def _timed(self, method: str, places: Tensor) -> "_Timed":
        self.show.working(method, len(places))
        return _Timed(self.seconds, places)

    def _note(self, place: int, verdict: Verdict, by: str | None, point: Tensor | None = None) -> None:
        index = self.indices[place]
        stored = None if point is None or index not in self.missing else self.records.store(index, point)
        tried = self._tried(index) if verdict == "undecided" else None
        self.found[place] = Row(
            index, int(self.labels[place]), int(self.predictions[place]), verdict, by, 0.0, stored, tried
        )

    def _tried(self, index: int) -> dict[str, Any]:
        """What has not decided an example, now and before."""
        row = self.records.rows.get(index)
        before = (row.tried if row is not None else None) or {"methods": [], "timeout": 0.0}
        timeout = self.settings.timeout if "exact" in self.settings.methods else 0.0
        return {
            "methods": list(dict.fromkeys([*before["methods"], *self.settings.methods])),
            "timeout": max(timeout, before["timeout"]),
        }

    def _bound(self, name: str, places: Tensor) -> None:
        network, parameters = self.subject.network, self.subject.parameters.double().unsqueeze(0)
        bound = BOUNDS[name]
        try:
            tile = choose_tile(
                bound.cost(network, torch.device("cpu")),
                len(places),
                self.settings.budget,
                torch.device("cpu"),
                torch.float64,
            )
        except ValueError as error:
            raise InputError(f"method {name}: {error}") from error
        box = box_around(self.images[places].double(), self.settings.eps)
        with torch.no_grad():
            margins = bound(network, parameters, box, self.labels[places], tile=tile._replace(members=1))[0]
        for place in places[(margins > ROUNDING).all(1)].tolist():
            self._note(place, "certified", name)

    def _attack(self, places: Tensor) -> None:
        images, labels = self.images[places], self.labels[places]
        numbers = [self.indices[place] for place in places.tolist()]
        settings = self.settings
        found = apgd(
            self.subject.module, images, labels, settings.eps,
            numbers=numbers, steps=settings.steps, restarts=settings.restarts,
        )  # fmt: skip
        broken = found.broken.nonzero().flatten()
        replayed = self.subject.replayed(found.points[broken], labels[broken])
        for one in broken[replayed].tolist():
            self._note(int(places[one]), "attacked", "attack", found.points[one])

    def _check(self, places: Tensor) -> None:
        """A short attack on everything that is classified correctly: what it breaks cannot be certified."""
        if not len(places):
            return
        self.show.working("check", len(places))
        found = pgd(
            self.subject.module,
            self.images[places],
            self.labels[places],
            self.settings.eps,
            steps=CHECK_STEPS,
            restarts=1,
        )
        broken = found.broken.nonzero().flatten()
        replayed = self.subject.replayed(found.points[broken], self.labels[places[broken]])
        for one in broken[replayed].tolist():
            self.broken[int(places[one])] = found.points[one]

    def _record(self, places: list[int]) -> None:
        rows = [self._final(place) for place in places if self.indices[place] in self.missing]
        self.records.add(rows)
        self.show.decided(rows)

    def _final(self, place: int) -> Row:
        """With its seconds, and with what the check found against it."""
        row = replace(self.found[place], seconds=float(self.seconds[place]))
        if row.verdict == "certified" and place in self.broken:
            stored = self.records.store(row.index, self.broken[place])
            row = replace(row, contradicted="attack", point=stored)
        return row

    def _exactly(self, solver: Solver) -> None:
        places = [place for place in self._open().tolist() if self.indices[place] in self.missing]
        if not places:
            return
        self.show.working("exact", len(places))
        jobs = [(self.images[place], int(self.labels[place])) for place in places]
        for number, outcome, seconds in solver.solved(jobs):
            place = places[number]
            self.seconds[place] += seconds
            point = outcome.point
            verdict = outcome.verdict
            if point is not None and not self.subject.replayed(point.unsqueeze(0), self.labels[place, None]).all():
                verdict, point = "undecided", None
            self._note(place, verdict, None if verdict == "undecided" else "exact", point)
            self._record([place])


@dataclass
class _Timed:
    """Shares out the seconds of a ``with`` block among some examples."""

    seconds: Tensor
    places: Tensor

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if len(self.places):
            self.seconds[self.places] += (time.perf_counter() - self.began) / len(self.places)
