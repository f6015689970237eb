"""A model that passed the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from netship.bundle.manifest import ModelIdentity, Tensor, image_of


@dataclass(frozen=True)
class Model:
    """An ONNX model that passed the gate; plain data between the stages.

    Attributes:
        proto: the graph as the user wrote it, its batch made 1, its external data inlined:
            what ONNX Runtime, the reference, runs.
        identity: name and hashes of the file(s) it came from.
        inputs: static; of those that may be images the first has its layout.
        outputs: every graph output, static.
        probabilities: the first output already is a softmax's.
        notes: what the user should know, a line each (a symbolic batch made 1, …).
        pixels: of a .tflite file whose first input has 8 bits: the real values of the lowest and the highest stored one.
    """

    proto: onnx.ModelProto
    identity: ModelIdentity
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    probabilities: bool
    notes: tuple[str, ...] = ()
    pixels: tuple[float, float] | None = None

    @property
    def image(self) -> Tensor | None:
        """The input that photographs become; None where all are data."""
        return image_of(self.inputs)

    def feeds(self, arrays: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays in the order of the inputs, by name."""
        names = (each.name for each in self.inputs)
        return dict(zip(names, arrays, strict=True))
