"""A build in float16: what it refuses, and its network from what the user gave."""

from __future__ import annotations

from netship.bundle import golden, inputs
from netship.bundle.manifest import Preprocessing
from netship.compile import passes
from netship.compile.backends.request import BuildRequest
from netship.compile.frontend.preprocessing import resolve_preprocessing
from netship.compile.frontend.sources import Source
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph
from netship.compile.quantize import float16
from netship.compile.quantize.float16 import Half
from netship.compile.quantize.prepare import MAX_IMAGES, is_quantised
from netship.records import lookup
from netship.targets.errors import UserError
from netship.targets.progress import Progress


def check(request: BuildRequest) -> None:
    """Raises: UserError: the target has no float16, or another option contradicts it, or a named log does."""
    if not request.target.has_float16:
        raise UserError(
            f"--precision float16: {request.target.name} has no float16 arithmetic; leave the option out, or build for "
            "arm-cortex-a76"
        )
    for name, given in (
        ("--quantize", request.quantize),
        ("--strict-int8", request.strict_int8),
    ):
        if given:
            raise UserError(
                f"{name}: --precision float16 makes no int8; leave one of them out"
            )
    # What stays in float32 takes a while to find: a log that cannot be used is refused before.
    lookup.find(request.target, request.records, (), numbers=request.numbers)


def tuned_graph(request: BuildRequest, source: Source, progress: Progress) -> Graph:
    """The operators that a build as ``request`` has tuning tasks of.

    Raises:
        UserError: as a build.
    """
    if not request.float16:
        return onnx_form.read(source.model.proto)
    check(request)
    preprocessing, _ = resolve_preprocessing(
        request.overrides.with_defaults(source.overrides),
        source.preprocessing,
        source.model.inputs,
    )
    return network(request, source, preprocessing, progress, passes.no_dump).graph


def network(
    request: BuildRequest,
    source: Source,
    preprocessing: Preprocessing | None,
    progress: Progress,
    dump: passes.Dump,
) -> Half:
    """The float16 network, its ranges from the calibration images, or else from seeded inputs."""
    model = source.model
    if is_quantised(model.proto):
        raise UserError(
            f"{model.identity.name}: is quantised; leave --precision float16 out"
        )
    found = (
        inputs.find(request.calibration, model.inputs) if request.calibration else []
    )
    samples = [
        inputs.read(path, model.inputs, preprocessing).tensors
        for path in found[:MAX_IMAGES]
    ]
    if not samples:
        progress.note(
            "float16: ranges are those of seeded inputs; give photographs with --calibration"
        )
    seeded = [
        *golden.of_all(golden.seeded_inputs, model.inputs, preprocessing),
        *golden.of_all(golden.signed_inputs, model.inputs, preprocessing),
    ]
    progress.stage("finding what stays in float32")
    half = float16.prepare(
        model, [*samples, *seeded], len(samples), request.keep_float, dump
    )
    progress.finish()
    if lost := float16.loss(half.measured):
        if source.trained and not request.accept_loss:
            raise UserError(
                f"{lost}: leave that layer in float32 (--keep-float NODE), take it as it is (--accept-loss), or build "
                "float32"
            )
        progress.note(f"{lost}; it is built")
    return half
