"""What int8 loses against float32, and in which layer most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.task import Task
from netship.compile.frontend.model import Model
from netship.compile.frontend.names import node_label
from netship.compile.frontend.reference import Reference, opened, with_outputs
from netship.compile.quantize.agreement import Agreement, agreement
from netship.compile.quantize.calibrate import Calibrated, Sample

Array = NDArray[np.float32]

# How ONNX Runtime's quantiser names what it dequantises.
_DEQUANTISED = "_DequantizeLinear_Output"


def compare(
    model: Model,
    calibrated: Calibrated,
    samples: Sequence[Sample],
    task: Task | None = None,
) -> tuple[Agreement, dict[str, Any]]:
    """int8 against float32 on the calibration images, and the same for the manifest.

    ``top1_agreement`` is None where no class has one score, ``boxes`` where no decoding is known.
    """
    floating, ours = Reference(model), Reference(calibrated.model)
    answers, expected = (
        [each.run(*sample) for sample in samples] for each in (ours, floating)
    )
    found = agreement(model, answers, expected, task)
    boxes = None
    if found.boxes:
        counts = {"judged": found.boxes.judged, "wrong": found.boxes.wrong}
        boxes = counts | found.boxes.matched.to_json()
    return found, {
        "cosine": round(found.cosine, 6),
        "cosine_output": found.output,
        "top1_agreement": None if found.same is None else found.same / found.images,
        "boxes": boxes,
        "images": found.images,
        "cosine_by_method": calibrated.cosines,
    }


def verdict(found: Agreement, calibrated: Calibrated, samples: Sequence[Sample]) -> str:
    """What int8 loses, and where most, if it is too much; else empty."""
    if found.enough:
        return ""
    return too_much(found.text(len(calibrated.model.outputs)), calibrated, samples[0])


def too_much(found: str, calibrated: Calibrated, sample: Sample) -> str:
    """That int8 loses too much, by what was found, and where most."""
    layer, decibels = worst_layer(calibrated, sample)
    return f"int8 loses too much: {found}; most at {layer} (signal to noise {decibels:.1f} dB)"


def worst_layer(calibrated: Calibrated, sample: Sample) -> tuple[str, float]:
    """The layer at which the signal to quantisation noise falls most, and the ratio after it in dB."""
    layers = by_layer(calibrated, sample)
    if len(layers) < 2:
        return "the output", 0.0
    worst = max(layers[1:], key=lambda each: each.fall)
    return node_label(worst.node), worst.decibels


class Layer(NamedTuple):
    """What quantisation does to the output of a node.

    Attributes:
        decibels: the signal to quantisation noise.
        fall: by how much less that is than after the layer before.
    """

    node: onnx.NodeProto
    decibels: float
    fall: float


def by_layer(calibrated: Calibrated, sample: Sample) -> list[Layer]:
    """The nodes whose outputs are stored, in the order they run; the first one falls by nothing."""
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
    ours = _outputs(quantised, [after for after, _ in pairs], calibrated, sample)
    theirs = _outputs(
        calibrated.folded, [name for _, name in pairs], calibrated, sample
    )
    energies = [
        ((b**2).sum() or 1e-30, ((a - b) ** 2).sum() or 1e-30)
        for a, b in zip(ours, theirs, strict=True)
    ]
    ratios = [10 * float(np.log10(signal / noise)) for signal, noise in energies]
    return [
        Layer(makers[name], ratio, before - ratio)
        for (_, name), ratio, before in zip(
            pairs, ratios, [*ratios[:1], *ratios], strict=False
        )
    ]


def _outputs(
    proto: onnx.ModelProto, names: list[str], calibrated: Calibrated, sample: Sample
) -> list[Array]:
    session = opened(with_outputs(proto, names), calibrated.model.identity.name)
    found = session.run(names, calibrated.model.feeds(sample))
    return [each.astype(np.float64) for each in found]
