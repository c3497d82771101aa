"""``evocert certify``: from what the user names to records and a summary."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

import evocert
from evocert.bounds import read_network
from evocert.certify import cascade, external
from evocert.certify.cascade import Settings, Show
from evocert.certify.foreign import read_onnx
from evocert.certify.records import Records
from evocert.certify.second import SecondOpinion
from evocert.certify.subject import Subject, digest
from evocert.certify.summary import summary
from evocert.data import Dataset, Part, load
from evocert.errors import InputError
from evocert.finished import load_finished
from evocert.networks import statistics

REPLAYED = 8  # images on which a run's ONNX file is compared with its checkpoint


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        target: a run folder, or an ONNX file.
        data: a data set's name or the path of an ``.npz``; None: the run's own.
        data_dir: where data sets are; None: as the run, or by EVOCERT_DATA.
        eps: radius in [0, 1] pixels; None: the run's own.
        examples: the first so many of the test part; None: all.
        indices: a file with the numbers of examples; None: all.
        out: folder of the records; None: the run's own, or one beside the ONNX file's name in the current folder.
    """

    target: Path
    data: str | None = None
    data_dir: Path | None = None
    eps: float | None = None
    examples: int | None = None
    indices: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What is certified, on what, and where it is put on record."""

    subject: Subject
    data: str
    part: Part
    eps: float
    indices: list[int]
    folder: Path

    @property
    def key(self) -> dict[str, Any]:
        """What verdicts are about: records of another key are others."""
        return {
            "weights": self.subject.sha256,
            "data": self.data,
            "part": "test",
            "images": self.part.sha256,
            "eps": self.eps,
        }


class CertifyStopped(Exception):  # noqa: N818 (no error: the user's wish)
    """The user stopped it: the message says what is kept."""


def prepare(request: Request) -> Prepared:
    """Reads everything that a certification is about.

    Raises:
        InputError: whatever of it cannot be had, or does not fit together.
    """
    if request.target.is_dir():
        subject, data, eps, folder = _of_run(request)
    elif request.target.is_file():
        subject, data, eps, folder = _of_file(request)
    else:
        raise InputError(f"{request.target}: there is no such run folder or ONNX file")
    part = data.test
    if part.image_shape != subject.network.input_shape:
        raise InputError(
            f"data {data.name} has images of shape {list(part.image_shape)}, the network takes "
            f"{list(subject.network.input_shape)}"
        )
    if int(part.labels.max()) >= subject.network.num_classes:
        raise InputError(
            f"data {data.name} has {data.num_classes} classes, the network {subject.network.num_classes} outputs"
        )
    return Prepared(subject, data.name, part, eps, _chosen(request, len(part)), folder)


def certify(
    prepared: Prepared, settings: Settings, show: Show, verifier: str | None = None, verifier_path: Path | None = None
) -> tuple[dict[str, Any], Records]:
    """Decides the examples, asks an external verifier of them if that is wanted, and writes the summary.

    Returns:
        The summary as in certify.json, and the records, which are closed.

    Raises:
        CertifyStopped: by Ctrl-C; what was found is on record.
    """
    second = None if verifier is None else external.find(verifier, verifier_path)
    records = Records.open(prepared.folder, prepared.key)
    with contextlib.closing(records):
        opinion: SecondOpinion | None = None
        try:
            cascade.run(prepared.subject, prepared.part, prepared.indices, settings, records, show)
            if second is not None and verifier is not None:
                opinion = SecondOpinion(
                    verifier, *second, prepared.subject, prepared.part, settings.eps, records, settings.timeout
                )
                wanted = opinion.wanted(prepared.indices)
                for number, index in enumerate(wanted):
                    show.working(f"{verifier}: {number} of {len(wanted)} examples, on", 1)
                    opinion.ask(index)
        except KeyboardInterrupt:
            done = sum(index in records.rows for index in prepared.indices)
            raise CertifyStopped(
                f"stopped; {done} of {len(prepared.indices)} examples are on record in {records.path('jsonl')}, and the same "
                "command goes on"
            ) from None
        finally:
            show.stop()
        rows = [records.rows[index] for index in prepared.indices]
        content = {
            "key": prepared.key,
            "settings": {
                "network": prepared.subject.name,
                "eps": settings.eps,
                "methods": list(settings.methods),
                "timeout": settings.timeout,
                "steps": settings.steps,
                "restarts": settings.restarts,
                "evocert": evocert.__version__,
            },
            **summary(rows, settings.methods),
        }
        if opinion is not None:
            content["second_opinion"] = opinion.summary(prepared.indices)
            content["contradictions"] += content["second_opinion"]["contradictions"]
        records.write(content)
    return content, records


def _of_run(request: Request) -> tuple[Subject, Dataset, float, Path]:
    finished = load_finished(request.target)
    buffers = json.dumps(statistics(finished.module), sort_keys=True).encode()
    sha256 = digest(finished.parameters.numpy().tobytes(), buffers)
    try:
        content = (request.target / "network.onnx").read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    name = f"{finished.results.get('problem')} ({request.target})"
    subject = Subject(name, finished.module, finished.network, finished.parameters, content, sha256)
    subject.check_onnx(finished.data.test.batch(slice(0, REPLAYED))[0])
    data = finished.data if request.data is None else _data(request)
    return subject, data, finished.eps if request.eps is None else request.eps, request.out or request.target


def _of_file(request: Request) -> tuple[Subject, Dataset, float, Path]:
    for name in ("data", "eps"):
        if getattr(request, name) is None:
            raise InputError(
                f"{request.target} is no run folder, and does not say on what it is judged: --{name} is needed"
            )
    found = read_onnx(request.target)
    parameters: Tensor = torch.nn.utils.parameters_to_vector(found.module.parameters()).detach()
    network = read_network(found.module, found.input_shape)
    content = onnx.load(str(request.target)).SerializeToString()  # weights beside the file are then in it
    subject = Subject(request.target.name, found.module, network, parameters, content, found.sha256)
    assert request.eps is not None
    return subject, _data(request), request.eps, request.out or Path(f"certify-{request.target.stem}")


def _data(request: Request) -> Dataset:
    assert request.data is not None
    place = None if request.data_dir is None else str(request.data_dir)
    # The test part does not depend on the validation part, which must not be empty: half of it is what few images allow, too.
    return load(request.data, data_dir=place, download=False, validation_fraction=0.5)


def _chosen(request: Request, count: int) -> list[int]:
    """The numbers of the examples, rising."""
    if request.examples is not None and request.indices is not None:
        raise InputError("examples and indices: one of the two is allowed")
    if request.indices is not None:
        return _listed(request.indices, count)
    if request.examples is None:
        return list(range(count))
    if not 1 <= request.examples <= count:
        raise InputError(f"examples is {request.examples}: 1 to {count} are allowed, the images of the test part")
    return list(range(request.examples))


def _listed(path: Path, count: int) -> list[int]:
    try:
        words: Sequence[str] = path.read_text().replace(",", " ").split()
        numbers = sorted({int(word) for word in words})
    except OSError as error:
        raise InputError(f"indices {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"indices {path}: whole numbers are allowed ({error})") from error
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise InputError(f"indices {path}: one or more numbers from 0 to {count - 1} are allowed")
    return numbers
