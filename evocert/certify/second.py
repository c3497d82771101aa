"""What an external verifier says of each example, and where it contradicts what is on record."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evocert.certify.external import Answer, Question, Verifier, ask
from evocert.certify.records import Records, Row
from evocert.certify.subject import Subject
from evocert.data import Part
from evocert.export.generate_properties import property_text


class SecondOpinion:
    """An external verifier on the examples of one certification.

    Args:
        name: of the verifier.
        verifier, path: how it is run.
        subject: the network; the verifier is given its ONNX file.
        part: the images.
        eps: radius in [0, 1] pixels.
        records: what evocert found; answers are kept beside it, in a file of their own.
        timeout: seconds for an example.
    """

    def __init__(
        self,
        name: str,
        verifier: Verifier,
        path: Path,
        subject: Subject,
        part: Part,
        eps: float,
        records: Records,
        timeout: float,
    ) -> None:
        self.name, self.verifier, self.path = name, verifier, path
        self.subject, self.part, self.eps, self.timeout = subject, part, eps, timeout
        self.records = records
        self.file = records.folder / f"{records.name}-{name}.jsonl"
        self.answers: dict[int, dict[str, Any]] = {}
        if self.file.exists():
            for line in self.file.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    self.answers[row["index"]] = row
                except (ValueError, KeyError, TypeError):
                    continue  # of a process that was killed while writing: it is asked again

    def wanted(self, indices: Sequence[int]) -> list[int]:
        """Those that are classified correctly, and that it was not asked of with as much time yet."""
        rows = self.records.rows
        return [
            index
            for index in indices
            if rows[index].verdict != "misclassified"
            and (
                index not in self.answers
                or (self.answers[index]["claim"] == "undecided" and self.answers[index]["timeout"] < self.timeout)
            )
        ]

    def ask(self, index: int) -> None:
        """Asks it of one example, and puts the answer on record."""
        image, label = self.part.batch(torch.tensor([index]))
        logs = self.records.folder / f"{self.records.name}-{self.name}-logs"
        logs.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            onnx, vnnlib = Path(folder, "network.onnx"), Path(folder, "property.vnnlib")
            onnx.write_bytes(self.subject.onnx)
            vnnlib.write_text(self._property(image[0], int(label), index))
            question = Question(onnx, vnnlib, Path(folder, "result.txt"), self.timeout)
            answer = ask(self.verifier, self.path, question, logs / f"{index:06}.txt")
        row: dict[str, Any] = {
            "index": index,
            "claim": answer.claim,
            "replayed": self._replayed(answer, image, label),
            "seconds": round(answer.seconds, 3),
            "timeout": self.timeout,
        }
        if answer.note is not None:
            row["note"] = answer.note
        self.answers[index] = row
        with self.file.open("ab") as file:
            file.write(f"{json.dumps(row)}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def summary(self, indices: Sequence[int]) -> dict[str, Any]:
        """How often it was asked, agreed, and did not decide; and the contradictions."""
        asked = [index for index in indices if index in self.answers]
        rows = [(self.records.rows[index], self.answers[index]) for index in asked]
        return {
            "verifier": self.name,
            "asked": len(asked),
            "proved": sum(answer["claim"] == "proved" for _, answer in rows),
            "refuted": sum(answer["claim"] == "refuted" and answer["replayed"] for _, answer in rows),
            "undecided": sum(
                answer["claim"] == "undecided" or (answer["claim"] == "refuted" and not answer["replayed"])
                for _, answer in rows
            ),
            "agree": sum(_agree(row, answer) for row, answer in rows),
            "contradictions": [found for row, answer in rows if (found := _contradiction(row, answer, self.name))],
        }

    def _property(self, image: Tensor, label: int, index: int) -> str:
        channels, height, width = image.shape
        sidecar = {
            "name": "property",
            "data": "the images",
            "eps": self.eps,
            "input_shape": [1, channels, height, width],
            "num_classes": self.subject.network.num_classes,
            "vnnlib": "1.0",
            "input_units": "pixels in [0, 1]",
            "normalisation": {"where": "folded"},
        }
        return property_text(image.numpy(), label, index, sidecar)

    def _replayed(self, answer: Answer, image: Tensor, label: Tensor) -> bool:
        """Whether a counterexample lies in the box and breaks the network."""
        if answer.claim != "refuted" or answer.values is None or answer.values.numel() != image.numel():
            return False
        lower, upper = (image.double() - self.eps).clamp(min=0), (image.double() + self.eps).clamp(max=1)
        point = answer.values.reshape(image.shape)
        if bool(((point < lower - 1e-6) | (point > upper + 1e-6)).any()):
            return False
        near = torch.from_numpy(np.clip(point.clamp(lower, upper).numpy().astype(np.float32), 0, 1))
        return bool(self.subject.replayed(near, label).all())


def _agree(row: Row, answer: dict[str, Any]) -> bool:
    return (row.verdict == "certified" and answer["claim"] == "proved") or (
        row.verdict == "attacked" and answer["claim"] == "refuted" and answer["replayed"]
    )


def _contradiction(row: Row, answer: dict[str, Any], name: str) -> dict[str, Any] | None:
    if row.verdict == "certified" and answer["claim"] == "refuted" and answer["replayed"]:
        return {"index": row.index, "certified_by": row.by, "broken_by": name}
    if row.verdict == "attacked" and answer["claim"] == "proved":
        return {"index": row.index, "certified_by": name, "broken_by": row.by}
    return None
