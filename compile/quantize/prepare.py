"""The int8 network that a build asks for: the user's own QDQ graph, or a float32 network quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle import inputs
from netship.bundle.golden import of_all, seeded_inputs
from netship.bundle.manifest import (
    CalibrationImage,
    Preprocessing,
    Quantisation,
    Scaling,
)
from netship.bundle.store import sha256_of
from netship.bundle.task import Task
from netship.compile import passes
from netship.compile.frontend import byte_input
from netship.compile.frontend.model import Model
from netship.compile.frontend.quantised.operators import quantises
from netship.compile.ir.graph import Graph
from netship.compile.ir.operators import islands
from netship.compile.quantize import loss
from netship.compile.quantize.answer import output_steps
from netship.compile.quantize.calibrate import Sample, quantise
from netship.compile.quantize.search import FEWEST_IMAGES, report, search
from netship.targets.errors import UserError
from netship.targets.escapes import counted, listed, shown
from netship.targets.progress import Progress

Array = NDArray[np.float32]

FEW_IMAGES = 8
"""With fewer calibration images a range is chance."""
MAX_IMAGES = 64
"""Histograms of every activation of these fit the memory; more were not seen to change a range."""

REFERENCE: Final = "reference/quantised.onnx"


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
    keep_float: Sequence[str] = (),
    accept_loss: bool = False,
    strict: bool = False,
    task: Task | None = None,
) -> Int8 | None:
    """The int8 network that a build asks for; None where float32 is wanted.

    Args:
        wanted: ``--quantize int8``.
        calibration: ``--calibration``.
        unsigned: uint8 activations, as VNNI takes them.
        trained: refuse int8 that loses too much; with weights that mean nothing the loss is only reported.
        keep_float: ``--keep-float``, names of nodes that are not quantised.
        accept_loss: ``--accept-loss``, report what int8 loses and go on.
        strict: ``--strict-int8``, refuse a network of which a part computes in float32.
        task: what the outputs are for, where that is stated.

    Raises:
        UserError: the options contradict the model or each other, no image can be read, or int8 loses too much.
    """
    given = is_quantised(model.proto)
    options = {
        "--calibration": calibration,
        "--keep-float": keep_float,
        "--accept-loss": accept_loss,
    }
    named = [name for name, value in options.items() if value]
    if given and (wanted or named):
        raise UserError(
            f"{model.identity.name}: already is quantised; leave {' and '.join(['--quantize', *named])} out"
        )
    if not given and not wanted:
        for name in [*named, *(["--strict-int8"] if strict else [])]:
            also = (
                "" if name == "--strict-int8" else " or --precision float16 or bfloat16"
            )
            raise UserError(f"{name}: goes with --quantize int8{also}; add it")
        return None
    if given:
        graph = _read_graph(model, dump, strict)
        steps = output_steps(graph, of_all(seeded_inputs, model.inputs, preprocessing))
        return Int8(model, graph, Quantisation(output_steps=steps), {})
    if not calibration:
        raise UserError(
            "--quantize int8: needs --calibration PHOTOS, a folder of 16 or more images of the kind that "
            "the network will see"
        )
    dtypes = [each.dtype for each in model.inputs]
    if not {"int8", "uint8"}.isdisjoint(dtypes):
        found_types = " and ".join(dict.fromkeys(dtypes))
        raise UserError(
            f"{model.identity.name}: its input is {found_types}, int8 is made of a float32 input; export it with one"
        )
    found = inputs.find(calibration, model.inputs)
    if len(found) > MAX_IMAGES:
        progress.note(f"calibration: the first {MAX_IMAGES} of {len(found)} images")
    images, samples, skipped = read_images(
        found[:MAX_IMAGES], model, preprocessing, progress
    )
    calibrated = quantise(model, samples, unsigned, progress, keep_float, task)
    for head in calibrated.heads:
        progress.note(
            f"int8: the head of {counted(len(head.nodes), 'node')} stays in float32: {head.reason}, too much for one scale"
        )
    graph = _read_graph(calibrated.model, dump, strict)
    progress.stage("comparing int8 with float32")
    compared, measured = loss.compare(model, calibrated, samples, task)
    progress.finish()
    lost = loss.verdict(compared, calibrated, samples)
    kept: tuple[str, ...] = ()
    judging = None
    by_boxes = compared.boxes and compared.boxes.judged
    if lost and trained and not by_boxes and len(samples) >= FEWEST_IMAGES:
        better = search(
            calibrated,
            model,
            samples,
            graph,
            unsigned=unsigned,
            keep_float=keep_float,
            strict=strict,
            progress=progress,
        )
        for line in report(better, lost):
            progress.note(line)
        if better.calibrated is not calibrated:
            calibrated, kept = better.calibrated, better.kept
            graph = _read_graph(calibrated.model, dump, strict)
            _, measured = loss.compare(model, calibrated, samples, task)
        judging = better.tried
        lost = ""
        if better.judged.refused:
            lost = loss.too_much(better.judged.text(), calibrated, samples[0])
    if lost:
        if trained and not accept_loss:
            raise UserError(
                f"{lost}: calibrate with more and fitting photographs, leave that layer in float32 (--keep-float NODE), "
                "take it as it is (--accept-loss), or build float32"
            )
        why = "accepted" if accept_loss else "its weights mean nothing, so it is built"
        progress.note(f"{lost}; {why}")
    facts = Quantisation(
        model=REFERENCE,
        sha256=hashlib.sha256(calibrated.model.proto.SerializeToString()).hexdigest(),
        method=calibrated.method,
        images=images,
        skipped=skipped,
        keep_float=tuple(keep_float),
        kept_float=kept,
        judging=judging,
        accepted_loss=lost if accept_loss else "",
        output_steps=output_steps(graph, samples[:2]),
    )
    return Int8(calibrated.model, graph, facts, measured)


def taking_bytes(int8: Int8, scaling: Scaling, dump: passes.Dump, strict: bool) -> Int8:
    """The int8 network with an image of bytes, which it scales."""
    model = byte_input.taking_bytes(int8.model, scaling)
    facts = int8.facts
    if facts.model:
        digest = hashlib.sha256(model.proto.SerializeToString()).hexdigest()
        facts = facts.model_copy(update={"sha256": digest})
    graph = _read_graph(model, dump, strict)
    return replace(int8, model=model, graph=graph, facts=facts)


def _read_graph(model: Model, dump: passes.Dump, strict: bool) -> Graph:
    graph = passes.read(model.proto, passes.INTEGERS, dump)
    floats = [repr(shown(each.label)) for each in islands(graph)]
    if not graph.quantised and not is_quantised(model.proto):
        raise UserError(
            f"{model.identity.name}: none of its operators computes on integers; build it without --quantize"
        )
    if strict and floats:
        raise UserError(
            f"--strict-int8: {model.identity.name} computes in float32 in {listed(floats, 6)}; leave the option out, "
            "or replace these operators"
        )
    return graph


def write_reference(int8: Int8, folder: Path) -> Quantisation:
    """Keep a graph that we quantised in the bundle; → the manifest's section."""
    if int8.facts.model:
        path = folder / int8.facts.model
        path.parent.mkdir()
        path.write_bytes(int8.model.proto.SerializeToString())
    return int8.facts


def read_images(
    found: Sequence[Path],
    model: Model,
    preprocessing: Preprocessing | None,
    progress: Progress,
) -> tuple[tuple[CalibrationImage, ...], list[Sample], int]:
    images: list[CalibrationImage] = []
    samples: list[Sample] = []
    for path in found:
        try:
            samples.append(inputs.read(path, model.inputs, preprocessing).tensors)
        except UserError as error:
            progress.note(f"calibration: skipped {error}")
            continue
        images.append(CalibrationImage(name=path.name, sha256=sha256_of(path)))
    if not images:
        raise UserError(
            f"--calibration: no image or .npy file that can be read among {counted(len(found), 'file')}; give some"
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
    return tuple(images), samples, skipped
