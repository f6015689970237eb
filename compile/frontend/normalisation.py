"""Batch normalisation folded into convolutions, by ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from compile.frontend.fold import opset
from compile.frontend.model import Model
from targets.onnx_runtime import Session


def fold_normalisation(model: Model) -> onnx.ModelProto:
    """Batch normalisation in the convolutions' weights, in an opset that has scales per channel (13)."""
    proto = model.proto
    if opset(proto) < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / "folded.onnx"
        data, name = proto.SerializeToString(), model.identity.name
        Session(data, name, optimisation="basic", optimised=folded)
        return onnx.load(folded)
