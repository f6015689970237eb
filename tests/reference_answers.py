"""ONNX Runtime's answers to seeded images, for tests of the operator graph."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.targets.onnx_runtime import Session

Floats = NDArray[np.float32]


def reference(proto: onnx.ModelProto, image: Floats) -> Floats:
    session = Session(proto.SerializeToString(), "reference")
    found: Floats = session.run([proto.graph.output[0].name], {"image": image})[0]
    return found


def seeded(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)
