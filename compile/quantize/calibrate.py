"""A float32 network quantised by ONNX Runtime, its ranges from the user's photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from bundle.accuracy import cosine
from compile.frontend.fold import is_onnx, opset
from compile.frontend.model import Model
from compile.frontend.reference import Reference
from targets.child import run_in_child
from targets.errors import UserError, first_line
from targets.escapes import counted
from targets.onnx_runtime import Session
from targets.progress import Progress

Array = NDArray[np.float32]

_Method = Literal["min-max", "percentile", "entropy"]
# By our names: ONNX Runtime's.
METHODS: dict[_Method, str] = {
    "min-max": "MinMax",
    "percentile": "Percentile",
    "entropy": "Entropy",
}


class Calibrated(NamedTuple):
    """A quantised model, and how the ranges of its activations were found.

    Attributes:
        method: of ``METHODS``, the one whose answers are nearest to the float network's.
        cosines: of each method: the smallest cosine of the first output, on the calibration images.
        folded: the float network, batch normalisation folded, its tensors named as the quantised one's.
    """

    model: Model
    folded: onnx.ModelProto
    method: _Method
    cosines: dict[str, float]


def quantise(
    model: Model,
    images: Sequence[Array],
    unsigned: bool,
    progress: Progress,
) -> Calibrated:
    """Quantise a float model: weights symmetric per channel, activations per tensor.

    Batch normalisation is folded before. A ReLU6 disappears: its bounds are those of its
    output's type, so no range is left for it to cut.

    Args:
        images: float32 tensors of the model's input shape.
        unsigned: activations as uint8, which x86's dot product takes, in the place of int8.
    """
    folded, reference = _folded(model), Reference(model)
    expected = [reference.run(image)[0] for image in images]
    # Its calibration ends the process with ONNX Runtime, where that crashes.
    candidates = run_in_child(
        _candidates,
        *(folded, model, images, unsigned),
        stage=progress.stage,
        tick=progress.tick,
    )
    found: list[tuple[float, _Method, Model]] = []
    for method, proto in candidates.items():
        candidate = Reference(replace(model, proto=proto))
        cosines = (
            cosine(candidate.run(image)[0], answer)
            for image, answer in zip(images, expected, strict=True)
        )
        found.append((min(cosines), method, replace(model, proto=proto)))
    _, method, best = max(found, key=lambda each: each[0])
    return Calibrated(
        best, folded, method, {name: round(least, 6) for least, name, _ in found}
    )


def _folded(model: Model) -> onnx.ModelProto:
    """Batch normalisation in the convolutions' weights, in an opset that has scales per channel (13)."""
    proto = model.proto
    if opset(proto) < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / "folded.onnx"
        data, name = proto.SerializeToString(), model.identity.name
        Session(data, name, optimisation="basic", optimised=folded)
        return onnx.load(folded)


def _candidates(
    folded: onnx.ModelProto,
    model: Model,
    images: Sequence[Array],
    unsigned: bool,
    stage: Callable[[str], None],
) -> dict[_Method, onnx.ModelProto]:
    """The QDQ graph by each method."""
    from onnxruntime import quantization

    types = quantization.QuantType
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Of a model in memory it writes external data, and loses them.
        source, path = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        onnx.save(folded, source)
        for method, theirs in METHODS.items():
            stage(f"calibrating by {method} on {counted(len(images), 'image')}")
            feeds = iter([{model.input.name: image} for image in images])
            try:
                quantization.quantize_static(
                    source,
                    path,
                    SimpleNamespace(get_next=partial(next, feeds, None)),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    weight_type=types.QInt8,
                    activation_type=types.QUInt8 if unsigned else types.QInt8,
                    calibrate_method=quantization.CalibrationMethod[theirs],
                    extra_options={
                        "WeightSymmetric": True,
                        "ActivationSymmetric": False,
                    },
                )
            except Exception as error:
                raise UserError(
                    f"{model.identity.name}: ONNX Runtime's quantiser refuses it ({first_line(error)[:200]}); "
                    "give a QDQ model, or build without --quantize"
                ) from error
            found[method] = _plain(onnx.load(path))
    return found


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the domains that ONNX Runtime imports and nothing uses."""
    imports = [each for each in proto.opset_import if is_onnx(each.domain)]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    return proto
