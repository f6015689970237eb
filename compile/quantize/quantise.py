"""Float32 into int8: a QDQ graph by ONNX Runtime's quantiser, its ranges from the user's photographs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from bundle import photos
from bundle.accuracy import INT8_COSINE, INT8_STEPS
from bundle.manifest import CalibrationImage, Preprocessing, Quantisation
from bundle.store import sha256_of
from compile.frontend.fold import is_onnx, opset
from compile.frontend.model import Model
from compile.frontend.names import node_label
from compile.frontend.reference import Reference
from compile.ir import evaluate, graph
from compile.ir.graph import Network
from targets.errors import UserError
from targets.onnx_runtime import Session
from targets.progress import Progress

Array = NDArray[np.float32]

FEW_IMAGES = 8
"""With fewer calibration images a range is chance."""
MAX_IMAGES = 64
"""Histograms of every activation of these fit the memory; more were not seen to change a range."""

_Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[_Method, ...] = ("min-max", "percentile", "entropy")
_REFERENCE: Final = "reference/quantised.onnx"
# How ONNX Runtime's quantiser names what it dequantises.
_DEQUANTISED = "_DequantizeLinear_Output"


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


def is_quantised(proto: onnx.ModelProto) -> bool:
    """Whether a graph has its own QuantizeLinear or DequantizeLinear."""
    return any(
        n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in proto.graph.node
    )


def quantise(
    model: Model,
    images: Sequence[Array],
    unsigned: bool,
    stage: Callable[[str], None],
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
    best: tuple[float, _Method, Model] | None = None
    cosines: dict[str, float] = {}
    for method in METHODS:
        stage(f"calibrating by {method} on {len(images)} images")
        proto = _quantised(folded, model, images, method, unsigned)
        candidate = replace(model, proto=proto)
        reference = Reference(candidate)
        cosine = min(
            _cosine(reference.run(image)[0], answer)
            for image, answer in zip(images, expected, strict=True)
        )
        cosines[method] = round(cosine, 6)
        if best is None or cosine > best[0]:
            best = cosine, method, candidate
    assert best is not None
    return Calibrated(best[2], folded, best[1], cosines)


def _cosine(ours: Array, theirs: Array) -> float:
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 1.0


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


def _quantised(
    folded: onnx.ModelProto,
    model: Model,
    images: Sequence[Array],
    method: _Method,
    unsigned: bool,
) -> onnx.ModelProto:
    from onnxruntime import quantization

    methods = quantization.CalibrationMethod
    kinds = {
        "min-max": methods.MinMax,
        "percentile": methods.Percentile,
        "entropy": methods.Entropy,
    }
    # It talks through print and the root logger.
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as scratch,
        ):
            # Of a model in memory it writes external data, and loses them.
            source, path = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
            onnx.save(folded, source)
            quantization.quantize_static(
                source,
                path,
                _reader(model.input.name, images),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8
                if unsigned
                else quantization.QuantType.QInt8,
                calibrate_method=kinds[method],
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            return _plain(onnx.load(path))
    except Exception as error:
        first = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"{model.identity.name}: ONNX Runtime's quantiser refuses it ({first[0][:200]}); "
            "give a QDQ model, or build without --quantize"
        ) from error
    finally:
        logging.root.setLevel(level)


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


@dataclass(frozen=True)
class Int8:
    """An int8 network to build: its QDQ graph, its integer operators, and what is known of both."""

    model: Model
    network: Network
    facts: Quantisation
    measured: dict[str, Any]

    def answer(self, image: Array, reference: Reference) -> list[Array]:
        """What every device must answer, bit by bit: the outputs for float32 [1, C, H, W].

        Raises:
            UserError: farther than ``INT8_STEPS`` from what ``reference``, ONNX Runtime on the same
                graph, answers, or another best class.
        """
        output = evaluate.run(self.network, image).transpose(2, 0, 1)
        ours = output.reshape(self.model.outputs[0].shape)
        theirs = reference.run(image)[0].ravel()
        steps = float(np.abs(ours.ravel() - theirs).max()) / self.facts.output_step
        best = np.sort(theirs)[::-1]
        gap = float(best[0] - best[1]) / self.facts.output_step if best.size > 1 else 0
        another = int(ours.argmax()) != int(theirs.argmax()) and gap > INT8_STEPS
        if steps > INT8_STEPS + 1e-3 or another:
            raise UserError(
                f"{self.model.identity.name}: its integers are {steps:.1f} steps from ONNX Runtime's (at most "
                f"{INT8_STEPS}) on a golden input; give photographs with --golden, or report the model"
            )
        return [ours]


def prepare(
    model: Model,
    wanted: bool,
    calibration: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    unsigned: bool,
    trained: bool,
    progress: Progress,
) -> Int8 | None:
    """The int8 network that a build asks for; None where float32 is wanted.

    Args:
        wanted: ``--quantize int8``.
        calibration: ``--calibration``.
        unsigned: uint8 activations, as VNNI takes them.
        trained: refuse int8 that loses too much; with weights that mean nothing the loss is only told.

    Raises:
        UserError: the options contradict the model or each other, no image can be read, the graph is not wholly
            int8 (the first operator that is not is named), or int8 loses too much.
    """
    given = is_quantised(model.proto)
    if given and (wanted or calibration):
        raise UserError(
            f"{model.identity.name}: already is quantised; leave --quantize and --calibration out"
        )
    if not given and not wanted:
        if calibration:
            raise UserError("--calibration: goes with --quantize int8; add it")
        return None
    if given:
        network = graph.read(model.proto)
        facts = Quantisation(output_step=network.output.quantisation.scale)
        return Int8(model, network, facts, {})
    if not calibration:
        raise UserError(
            "--quantize int8: needs --calibration PHOTOS, a folder of 16 or more images of the kind that "
            "the network will see"
        )
    if len(model.outputs) != 1:
        raise UserError(
            f"{model.identity.name}: {len(model.outputs)} outputs, int8 takes one; cut the graph to one"
        )
    found = photos.find(calibration)
    if len(found) > MAX_IMAGES:
        progress.note(f"calibration: the first {MAX_IMAGES} of {len(found)} images")
    images, tensors, skipped = _read(found[:MAX_IMAGES], model, preprocessing, progress)
    calibrated = quantise(model, tensors, unsigned, progress.stage)
    network = graph.read(calibrated.model.proto)
    progress.stage("comparing int8 with float32")
    measured = _compare(model, calibrated, tensors)
    progress.finish()
    if loss := _loss(measured, calibrated, tensors):
        if trained:
            raise UserError(
                f"{loss}: calibrate with more and fitting photographs, or build float32"
            )
        progress.note(f"{loss}; its weights mean nothing, so it is built")
    facts = Quantisation(
        model=_REFERENCE,
        sha256=hashlib.sha256(calibrated.model.proto.SerializeToString()).hexdigest(),
        method=calibrated.method,
        images=images,
        skipped=skipped,
        output_step=network.output.quantisation.scale,
    )
    return Int8(calibrated.model, network, facts, measured)


def write_reference(int8: Int8, folder: Path) -> Quantisation:
    """Keep a graph that we quantised in the bundle; → the manifest's section."""
    if int8.facts.model:
        path = folder / int8.facts.model
        path.parent.mkdir()
        path.write_bytes(int8.model.proto.SerializeToString())
    return int8.facts


def _read(
    found: Sequence[Path],
    model: Model,
    preprocessing: Preprocessing,
    progress: Progress,
) -> tuple[tuple[CalibrationImage, ...], list[Array], int]:
    images, tensors = [], []
    for path in found:
        try:
            photo = photos.read(path, model.input.channels)
        except UserError as error:
            progress.note(f"calibration: skipped {error}")
            continue
        tensors.append(photos.to_tensor(photo, preprocessing, model.input))
        images.append(CalibrationImage(name=path.name, sha256=sha256_of(path)))
    if not images:
        raise UserError(
            f"--calibration: none of {len(found)} files is an image that can be read; give photographs"
        )
    skipped = len(found) - len(images)
    if skipped:
        progress.note(f"calibration: {skipped} of {len(found)} files skipped")
    if len(images) < FEW_IMAGES:
        progress.note(
            f"calibration: only {len(images)} images; with fewer than {FEW_IMAGES} the ranges are chance"
        )
    return tuple(images), tensors, skipped


def _compare(
    model: Model, calibrated: Calibrated, images: Sequence[Array]
) -> dict[str, Any]:
    """int8 against float32 on the calibration images."""
    floating, ours = Reference(model), Reference(calibrated.model)
    answers = [(ours.run(x)[0].ravel(), floating.run(x)[0].ravel()) for x in images]
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in answers)
    cosine = min(_cosine(a, b) for a, b in answers)
    return {
        "cosine": round(cosine, 6),
        "top1_agreement": same / len(images),
        "images": len(images),
        "cosine_by_method": calibrated.cosines,
    }


def _loss(
    measured: dict[str, Any], calibrated: Calibrated, images: Sequence[Array]
) -> str:
    """What int8 loses, and where most, if it is too much; else empty."""
    same, cosine = (
        round(measured["top1_agreement"] * len(images)),
        measured["cosine"],
    )
    if cosine >= INT8_COSINE and len(images) - same <= max(1, len(images) // 16):
        return ""
    layer, decibels = worst_layer(calibrated, images[0])
    return (
        f"int8 loses too much: top-1 as float32's on {same} of {len(images)} images, cosine {cosine:.4f} (at "
        f"least {INT8_COSINE}); most at {layer} (signal to noise {decibels:.1f} dB)"
    )


def worst_layer(calibrated: Calibrated, image: Array) -> tuple[str, float]:
    """The layer at which the signal to quantisation noise falls most, and the ratio after it in dB."""
    quantised = calibrated.model.proto
    makers = {
        name: node for node in calibrated.folded.graph.node for name in node.output
    }
    dequantised = {
        node.output[0]: node.output[0].removesuffix(_DEQUANTISED)
        for node in quantised.graph.node
        if node.op_type == "DequantizeLinear"
    }
    pairs = [(after, name) for after, name in dequantised.items() if name in makers]
    ours = _outputs(quantised, [after for after, _ in pairs], calibrated, image)
    theirs = _outputs(calibrated.folded, [name for _, name in pairs], calibrated, image)
    worst, before, after_it = "the output", np.inf, 0.0
    fall = -np.inf
    for (_, name), a, b in zip(pairs, ours, theirs, strict=True):
        noise = float(((a - b) ** 2).sum()) or 1e-30
        ratio = 10 * float(np.log10((float((b**2).sum()) or 1e-30) / noise))
        if before - ratio > fall and np.isfinite(before):
            worst, fall, after_it = node_label(makers[name]), before - ratio, ratio
        before = ratio
    return worst, after_it


def _outputs(
    proto: onnx.ModelProto, names: list[str], calibrated: Calibrated, image: Array
) -> list[Array]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {output.name for output in copy.graph.output}
    copy.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in known
    )
    session = Session(copy.SerializeToString(), calibrated.model.identity.name)
    found = session.run(names, {calibrated.model.input.name: image})
    return [each.astype(np.float64) for each in found]
