"""What is certified: one network, whatever it came from, and how a point is replayed on it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from evocert.attacks import worst_margin
from evocert.bounds import Members, Network
from evocert.errors import InputError

TOLERANCE = 1e-4  # of the largest logit, and of 1, as for what is exported


@dataclass(frozen=True)
class Subject:
    """One network.

    Attributes:
        name: for people.
        module: float32, in eval mode, on the CPU; pixels in, logits out.
        network: what ``read_network`` gave for it.
        parameters: ``[D]`` float32.
        onnx: the file's bytes, in which a counterexample must break the network, too.
        sha256: of the weights.
    """

    name: str
    module: nn.Module
    network: Network
    parameters: Tensor
    onnx: bytes
    sha256: str

    @cached_property
    def members(self) -> Members:
        """The network bound in float64, in which every verdict stands."""
        return self.network.bind(self.parameters.double().unsqueeze(0))

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])

    def onnx_logits(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` float32 -> ``[N, K]`` by ONNX Runtime, one image at a time as in the file's own shape."""
        name = self._session.get_inputs()[0].name
        rows = [self._session.run(None, {name: image[None]})[0].reshape(1, -1) for image in images.numpy()]
        return torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, self.network.num_classes)

    def check_onnx(self, images: Tensor) -> None:
        """Whether the file holds this very network, as seen on some images.

        Raises:
            InputError: it does not, or cannot be run.
        """
        try:
            found = self.onnx_logits(images)
        except Exception as error:  # whatever ONNX Runtime objects to
            raise InputError(
                f"the ONNX file of {self.name} cannot be run: {' '.join(str(error).split())[:200]}"
            ) from error
        with torch.no_grad():
            expected = self.members.logits(images.double())[0]
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            raise InputError(f"the ONNX file of {self.name} holds another network than its checkpoint")

    def replayed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Which points ``[N, C, H, W]`` float32 break the network in float64 and in ONNX Runtime: bools ``[N]``.

        A tie counts as broken: neither of two equal logits is the larger.
        """
        if not len(points):
            return torch.zeros(0, dtype=torch.bool)
        with torch.no_grad():
            exactly = worst_margin(self.members.logits(points.double())[0], labels) <= 0
        return exactly & (worst_margin(self.onnx_logits(points), labels) <= 0)


def digest(*parts: bytes) -> str:
    """SHA-256 of several parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.hexdigest()
