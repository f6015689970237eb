"""A float32 network quantised by ONNX Runtime, its ranges from the user's photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from compile.frontend.fold import is_onnx
from compile.frontend.model import Model
from compile.frontend.normalisation import fold_normalisation
from compile.frontend.reference import Reference
from targets.child import run_in_child
from targets.errors import UserError
from targets.progress import Progress

Array = NDArray[np.float32]

_Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[_Method, ...] = ("min-max", "percentile", "entropy")


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

    Raises:
        UserError: the quantiser refused the model.
    """
    folded = fold_normalisation(model)
    expected = [Reference(model).run(image)[0] for image in images]
    arguments = (folded, model, images, unsigned)
    # Its calibration ends the process with ONNX Runtime, where that crashes.
    candidates = run_in_child(
        _candidates, *arguments, stage=progress.stage, tick=progress.tick
    )
    best: tuple[float, _Method, Model] | None = None
    cosines: dict[str, float] = {}
    for method, proto in candidates.items():
        candidate = replace(model, proto=proto)
        reference = Reference(candidate)
        cosine = min(
            cosine_of(reference.run(image)[0], answer)
            for image, answer in zip(images, expected, strict=True)
        )
        cosines[method] = round(cosine, 6)
        if best is None or cosine > best[0]:
            best = cosine, method, candidate
    assert best is not None
    return Calibrated(best[2], folded, best[1], cosines)


def cosine_of(ours: Array, theirs: Array) -> float:
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 1.0


def _candidates(
    folded: onnx.ModelProto,
    model: Model,
    images: Sequence[Array],
    unsigned: bool,
    stage: Callable[[str], None],
) -> dict[_Method, onnx.ModelProto]:
    """The QDQ graph by each method."""
    from onnxruntime import quantization

    methods = quantization.CalibrationMethod
    kinds = (methods.MinMax, methods.Percentile, methods.Entropy)
    activations = (
        quantization.QuantType.QUInt8 if unsigned else quantization.QuantType.QInt8
    )
    found = {}
    for method, kind in zip(METHODS, kinds, strict=True):
        stage(f"calibrating by {method} on {len(images)} images")
        with tempfile.TemporaryDirectory() as scratch:
            # Of a model in memory it writes external data, and loses them.
            source, path = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
            onnx.save(folded, source)
            try:
                quantization.quantize_static(
                    source,
                    path,
                    _reader(model.input.name, images),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                    activation_type=activations,
                    calibrate_method=kind,
                    extra_options={
                        "WeightSymmetric": True,
                        "ActivationSymmetric": False,
                    },
                )
            except Exception as error:
                first = str(error).splitlines() or [type(error).__name__]
                raise UserError(
                    f"{model.identity.name}: ONNX Runtime's quantiser refuses it ({first[0][:200]}); "
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


def _reader(name: str, images: Sequence[Array]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Array] = iter(images)

        def get_next(self) -> dict[str, Array] | None:
            image = next(self.rest, None)
            return None if image is None else {name: image}

    return Reader()
