"""A build in float16 or bfloat16: what it refuses, and its network from what the user gave."""

from __future__ import annotations

from netship.bundle import golden, inputs
from netship.bundle.manifest import BFloat16, Float16, Preprocessing
from netship.compile import passes
from netship.compile.backends.request import BuildRequest
from netship.compile.frontend.preprocessing import resolve_preprocessing
from netship.compile.frontend.sources import Source
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph
from netship.compile.quantize import bfloat16, float16
from netship.compile.quantize.prepare import MAX_IMAGES, is_quantised
from netship.compile.quantize.reduced import Reduced, loss
from netship.records import lookup
from netship.targets.errors import UserError
from netship.targets.progress import Progress


def check(request: BuildRequest) -> None:
    """Raises: UserError: the target has no such numbers, or another option contradicts them, or a named log does."""
    precision, target = request.precision, request.target
    if precision == "float16" and not target.has_float16:
        raise UserError(
            f"--precision float16: {target.name} has no float16 arithmetic; leave the option out, or build for "
            "arm-cortex-a76"
        )
    if precision == "bfloat16" and not target.has_bfloat16:
        raise UserError(
            f"--precision bfloat16: {target.name} has no bfloat16 arithmetic; leave the option out, or build for "
            "znver4 or sapphirerapids"
        )
    for name, given in (
        ("--quantize", request.quantize),
        ("--strict-int8", request.strict_int8),
    ):
        if given:
            raise UserError(
                f"{name}: --precision {precision} makes no int8; leave one of them out"
            )
    # What stays in float32 takes a while to find: a log that cannot be used is refused before.
    lookup.find(request.target, request.records, (), numbers=request.numbers)


def tuned_graph(request: BuildRequest, source: Source, progress: Progress) -> Graph:
    """The operators that a build as ``request`` has tuning tasks of.

    Raises:
        UserError: as a build.
    """
    if request.precision == "float32":
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
) -> Reduced[Float16] | Reduced[BFloat16]:
    """The network of 16 bits, its ranges from the calibration images, or else from seeded inputs."""
    model, precision = source.model, request.precision
    if is_quantised(model.proto):
        raise UserError(
            f"{model.identity.name}: is quantised; leave --precision {precision} out"
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
            f"{precision}: {'ranges' if precision == 'float16' else 'losses'} are those of seeded inputs; give photographs "
            "with --calibration"
        )
    seeded = [
        *golden.of_all(golden.seeded_inputs, model.inputs, preprocessing),
        *golden.of_all(golden.signed_inputs, model.inputs, preprocessing),
    ]
    progress.stage("finding what stays in float32")
    prepare = float16.prepare if precision == "float16" else bfloat16.prepare
    half = prepare(model, [*samples, *seeded], len(samples), request.keep_float, dump)
    progress.finish()
    if lost := loss(half.measured, precision):
        if source.trained and not request.accept_loss:
            raise UserError(
                f"{lost}: leave that layer in float32 (--keep-float NODE), take it as it is (--accept-loss), or build "
                "float32"
            )
        progress.note(f"{lost}; it is built")
    return half
