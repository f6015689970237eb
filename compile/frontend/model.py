"""A model that passed the gate."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from netship.bundle.manifest import ModelIdentity, Tensor


@dataclass(frozen=True)
class Model:
    """An ONNX model that passed the gate; plain data between the stages.

    Attributes:
        proto: the graph as the user wrote it, its batch made 1, its external data inlined:
            what ONNX Runtime, the reference, runs.
        identity: name and hashes of the file(s) it came from.
        input: the one input, static, with its layout where it may be an image.
        outputs: every graph output, static.
        probabilities: the first output already is a softmax's.
        notes: what the user should know, a line each (a symbolic batch made 1, …).
        pixels: of a .tflite file with an input of 8 bits: the real values of the lowest and the highest stored one.
    """

    proto: onnx.ModelProto
    identity: ModelIdentity
    input: Tensor
    outputs: tuple[Tensor, ...]
    probabilities: bool
    notes: tuple[str, ...] = ()
    pixels: tuple[float, float] | None = None
