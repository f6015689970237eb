"""The int8 network that a build asks for: the user's own QDQ graph, or a float32 network quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from bundle import inputs
from bundle.manifest import CalibrationImage, Preprocessing, Quantisation
from bundle.store import sha256_of
from compile import passes
from compile.frontend.model import Model
from compile.frontend.quantised.operators import quantises
from compile.ir.graph import Graph
from compile.quantize import loss
from compile.quantize.answer import output_steps
from compile.quantize.calibrate import quantise
from targets.errors import UserError
from targets.escapes import counted
from targets.progress import Progress

Array = NDArray[np.float32]

FEW_IMAGES = 8
"""With fewer calibration images a range is chance."""
MAX_IMAGES = 64
"""Histograms of every activation of these fit the memory; more were not seen to change a range."""

_REFERENCE: Final = "reference/quantised.onnx"


@dataclass(frozen=True)
class Int8:
    """An int8 network to build: its QDQ graph, its integer operators, and what is known of both."""

    model: Model
    graph: Graph
    facts: Quantisation
    measured: dict[str, Any]


def is_quantised(proto: onnx.ModelProto) -> bool:
    """Whether a graph quantises its own activations."""
    return any(map(quantises, proto.graph.node))


def prepare(
    model: Model,
    wanted: bool,
    calibration: Sequence[Path],
    preprocessing: Preprocessing | None,
    *,
    unsigned: bool,
    trained: bool,
    progress: Progress,
    dump: passes.Dump = passes.no_dump,
) -> Int8 | None:
    """The int8 network that a build asks for; None where float32 is wanted.

    Args:
        wanted: ``--quantize int8``.
        calibration: ``--calibration``.
        unsigned: uint8 activations, as VNNI takes them.
        trained: refuse int8 that loses too much; with weights that mean nothing the loss is only reported.

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
        graph = passes.read(model.proto, passes.INTEGERS, dump)
        return Int8(
            model,
            graph,
            Quantisation(output_steps=output_steps(graph)),
            {},
        )
    if not calibration:
        raise UserError(
            "--quantize int8: needs --calibration PHOTOS, a folder of 16 or more images of the kind that "
            "the network will see"
        )
    if model.input.dtype != "float32":
        raise UserError(
            f"{model.identity.name}: its input is {model.input.dtype}, int8 is made of a float32 input; export it with one"
        )
    if len(model.outputs) != 1:
        raise UserError(
            f"{model.identity.name}: {len(model.outputs)} outputs, int8 takes one; cut the graph to one"
        )
    found = inputs.find(calibration, model.input)
    if len(found) > MAX_IMAGES:
        progress.note(f"calibration: the first {MAX_IMAGES} of {len(found)} images")
    images, tensors, skipped = _read(found[:MAX_IMAGES], model, preprocessing, progress)
    calibrated = quantise(model, tensors, unsigned, progress)
    graph = passes.read(calibrated.model.proto, passes.INTEGERS, dump)
    progress.stage("comparing int8 with float32")
    measured = loss.compare(model, calibrated, tensors)
    progress.finish()
    if lost := loss.verdict(measured, calibrated, tensors):
        if trained:
            raise UserError(
                f"{lost}: calibrate with more and fitting photographs, or build float32"
            )
        progress.note(f"{lost}; its weights mean nothing, so it is built")
    facts = Quantisation(
        model=_REFERENCE,
        sha256=hashlib.sha256(calibrated.model.proto.SerializeToString()).hexdigest(),
        method=calibrated.method,
        images=images,
        skipped=skipped,
        output_steps=output_steps(graph),
    )
    return Int8(calibrated.model, graph, facts, measured)


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
    preprocessing: Preprocessing | None,
    progress: Progress,
) -> tuple[tuple[CalibrationImage, ...], list[Array], int]:
    images, tensors = [], []
    for path in found:
        try:
            tensors.append(inputs.read(path, model.input, preprocessing).tensor)
        except UserError as error:
            progress.note(f"calibration: skipped {error}")
            continue
        images.append(CalibrationImage(name=path.name, sha256=sha256_of(path)))
    if not images:
        raise UserError(
            f"--calibration: none of {len(found)} files is an image or a .npy file that can be read; give some"
        )
    skipped = len(found) - len(images)
    if skipped:
        progress.note(
            f"calibration: {skipped} of {counted(len(found), 'file')} skipped"
        )
    if len(images) < FEW_IMAGES:
        progress.note(
            f"calibration: only {counted(len(images), 'image')}; with fewer than {FEW_IMAGES} the ranges are chance"
        )
    return tuple(images), tensors, skipped
