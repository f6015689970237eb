"""A build from end to end: gate, engine, golden data, verification, bundle; whole or not at all."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from netship.bundle import golden, inputs
from netship.bundle.manifest import (
    BFloat16,
    Float16,
    Golden,
    Manifest,
    Preprocessing,
    Quantisation,
    TargetIdentity,
)
from netship.bundle.store import MANIFEST, Bundle, check_replaceable, sha256_of, staging
from netship.bundle.task import Task
from netship.compile import passes, sixteen_bits
from netship.compile.backends.backend import Backend, Built, Job
from netship.compile.backends.dump import Dump
from netship.compile.backends.registry import BACKENDS
from netship.compile.backends.request import BuildRequest
from netship.compile.backends.verify import Verification
from netship.compile.frontend import byte_input, sources
from netship.compile.frontend.detectors import resolve_task
from netship.compile.frontend.model import Model
from netship.compile.frontend.preprocessing import read_labels, resolve_preprocessing
from netship.compile.frontend.reference import Reference
from netship.compile.frontend.sources import Source
from netship.compile.ir.graph import Graph
from netship.compile.passes.bfloat16 import weight_bytes
from netship.compile.quantize.answer import check as integer_check
from netship.compile.quantize.bfloat16 import BFloat16Reference
from netship.compile.quantize.float16 import Float16Reference
from netship.compile.quantize.mixture import AS_ASKED, Chosen
from netship.compile.quantize.prepare import (
    Int8,
    is_quantised,
    prepare,
    taking_bytes,
    write_reference,
)
from netship.compile.quantize.reduced import Reduced
from netship.records import lookup
from netship.records.lookup import RecordLog
from netship.targets import licences
from netship.targets.child import EndedAbruptly
from netship.targets.errors import UserError
from netship.targets.escapes import c_prefix, counted, shown
from netship.targets.presets import this_cpu
from netship.targets.progress import Progress

_MAX_GOLDEN = 4
# Elements of golden outputs whose class or index rounding can change: as a share, and in a small output.
_MOST_UNDECIDED, _FEW_UNDECIDED = 0.05, 16


def build(
    request: BuildRequest, progress: Progress, chosen: Chosen = AS_ASKED
) -> Bundle:
    """Build, verify and write one bundle; returns it at its final place.

    Raises:
        UserError: anything that the user can correct; nothing half-made is left behind.
    """
    started = time.monotonic()
    backend = BACKENDS[request.format]
    backend.check_target(request.target)
    for field, why in backend.refused_options.items():
        if getattr(request, field) != getattr(BuildRequest, field):
            raise UserError(why.format(target=request.target.name))
    if request.precision != "float32":
        sixteen_bits.check(request)
    if request.output is not None:
        _check_places(request.output, request.dump)
    progress.stage("reading the model")
    source = sources.find(
        request.model, request.input_shapes, request.overrides.layout, progress.stage
    )
    overrides = request.overrides.with_defaults(source.overrides)
    preprocessing, note = resolve_preprocessing(
        overrides, source.preprocessing, source.model.inputs
    )
    if preprocessing and source.model.pixels and not note:
        note = f"preprocessing: {preprocessing.geometry()}"
    task, seen = resolve_task(overrides.task, overrides.decode, source.model)
    labels = read_labels(overrides.labels, source.model.outputs, task)
    taken, given = source.model, preprocessing
    if request.input_type:
        given = byte_input.outside(preprocessing, taken)
        taken = byte_input.taking_bytes(taken, given.inside)
    samples = _golden_inputs(request.golden, taken, given, progress)
    progress.finish()
    if given and given.inside and taken.image:
        note += f"; the input is uint8 {list(taken.image.shape)}, which the network scales itself"
    unnamed = ""
    if request.name and backend.name(request.name) != request.name:
        unnamed = f"--name {request.name}: a {backend.format} has no C functions; the name is not used"
    for line in filter(None, (source.note, *source.model.notes, note, seen, unnamed)):
        progress.note(line)
    output = request.output or Path("out") / f"{source.name}-{request.target.name}"
    _check_places(output, request.dump)
    dump = Dump(request.dump, fresh=True).graph if request.dump else passes.no_dump
    int8: Int8 | None = None
    half: Reduced[Float16] | Reduced[BFloat16] | None = None
    mixed = chosen.mixed
    if mixed:
        int8, taken = chosen.int8, mixed.model
    elif request.precision != "float32":
        half = sixteen_bits.network(
            request, replace(source, model=taken), given, progress, dump
        )
    else:
        int8 = _quantised(request, source, preprocessing, task, progress, dump)
    if int8 and given and given.inside:
        int8 = taking_bytes(int8, given.inside, dump, request.strict_int8)
    model, preprocessing = int8.model if int8 else taken, given
    reduced = int8 or half
    made = mixed or reduced
    graph = made.graph if made else backend.prepare(model, dump)
    progress.stage("asking ONNX Runtime for the golden outputs")
    rounded = mixed.rounded if mixed else half and half.graph
    of_bfloat16 = request.precision == "bfloat16"
    kind = BFloat16Reference if of_bfloat16 else Float16Reference
    reference = kind(model, rounded) if rounded else Reference(model)
    exact = int8 is not None and not rounded
    check = (
        partial(integer_check, graph, model, reference) if exact else reference.check
    )
    numbers = "int8" if int8 else request.precision
    name = backend.name(request.name or c_prefix(source.name))
    # Signed inputs judge the compiled code, which is the same wherever it runs: they are not written, as noise does not
    # compress.
    signed = golden.of_all(golden.signed_inputs, model.inputs, preprocessing)
    checks = [check(*sample) for sample in (*samples, *signed)]
    _check_decided(checks[: len(samples)], model, progress)
    with staging(output) as folder:
        written = golden.write_golden(folder, checks[: len(samples)])
        quantisation = write_reference(int8, folder) if int8 else None
        terms = licences.notice(model.identity.name, linked=backend.linked)
        (folder / "LICENSES").write_text(terms, encoding="utf-8")
        if labels:
            text = "\n".join(labels) + "\n"
            (folder / "labels.txt").write_text(text, encoding="utf-8")
        job = Job(
            model=model,
            graph=graph,
            target=request.target,
            name=name,
            version=_version(request, source, name, numbers),
            folder=folder,
            check=check,
            input_ranges=tuple(
                golden.input_range(each, preprocessing if each.is_image else None)
                for each in model.inputs
            ),
            preprocessing=preprocessing,
            task=task,
            labels=labels,
            dump=request.dump,
            arena_limit=request.arena_limit,
            flash_limit=request.flash_limit,
            packages=request.package,
            memory=request.memory,
            part=request.part,
        )
        facts = quantisation, half.facts if half else None
        describe = partial(
            _manifest, request, backend, job, preprocessing, written, *facts
        )
        logs = [] if int8 or mixed else _find_records(request, backend, progress)
        # Records that give wrong answers, or crash the engine, must not keep a network from being built.
        for attempt in (logs, []) if logs else ([],):
            built = None
            try:
                built = backend.build(job, attempt, progress)
                _check_tuned(request, built)
                manifest = describe(built)
                (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
                checked = backend.verify(folder, checks, request, progress)
                _name_records(built, attempt, progress)
                break
            except UserError as error:
                used = (
                    built.lowering.layout == "NHWC"
                    if built
                    else isinstance(error, EndedAbruptly)
                )
                if not (attempt and used) or request.require_tuned:
                    raise
                records = built and built.lowering.records
                named = (
                    f"the records of {records.file}" if records else "tuning records"
                )
                progress.finish()
                progress.note(f"with {named}: {error}")
                progress.note("building again without them")
                (folder / MANIFEST).unlink(missing_ok=True)
        progress.finish()
        lost: dict[str, Any] = {numbers: reduced.measured} if reduced else {}
        measured = _verification(
            checked, "its integers in numpy" if exact else reference.version
        ) | {
            **({"precision": chosen.judge(folder)} if chosen.judge else {}),
            **lost,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": _peak_memory(),
            "built_on": this_cpu().model,
            **_sizes(folder, manifest, model, graph if half or mixed else None),
        }
        manifest = manifest.model_copy(update={"measured": measured})
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(output, manifest)


def _check_places(output: Path, dump: Path | None) -> None:
    check_replaceable(output)
    if dump is not None and dump.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"--dump {dump}: is in the folder of the build, {output}, which is replaced; give another folder"
        )


def _quantised(
    request: BuildRequest,
    source: Source,
    preprocessing: Preprocessing | None,
    task: Task | None,
    progress: Progress,
    dump: passes.Dump,
) -> Int8 | None:
    """The int8 network, where one is asked for or given."""
    wanted = request.quantize or is_quantised(source.model.proto)
    if wanted and (request.records or request.require_tuned):
        raise UserError(
            "--records and --require-tuned: int8 is not tuned; leave them out"
        )
    return prepare(
        source.model,
        request.quantize,
        request.calibration,
        preprocessing,
        unsigned=request.target.machine == "x86_64",
        trained=source.trained,
        progress=progress,
        dump=dump,
        keep_float=request.keep_float,
        accept_loss=request.accept_loss,
        strict=request.strict_int8,
        task=task,
    )


def _version(request: BuildRequest, source: Source, name: str, numbers: str) -> str:
    """What generated code says of itself."""
    identity = source.model.identity
    return f"{name}: {identity.name} (SHA-256 {identity.sha256[:16]}) for {request.target.name}, {numbers}"


def _golden_inputs(
    paths: tuple[Path, ...],
    model: Model,
    preprocessing: Preprocessing | None,
    progress: Progress,
) -> list[tuple[NDArray[Any], ...]]:
    if not paths:
        return golden.of_all(golden.seeded_inputs, model.inputs, preprocessing)
    found = inputs.find(paths, model.inputs)
    if len(found) > _MAX_GOLDEN:
        progress.note(
            f"golden data: the first {_MAX_GOLDEN} of {len(found)} files are taken"
        )
    taken = [
        inputs.read(path, model.inputs, preprocessing) for path in found[:_MAX_GOLDEN]
    ]
    for note in (note for each in taken for note in each.notes):
        progress.note(note)
    return [each.tensors for each in taken]


def _check_decided(
    checks: Sequence[golden.Check], model: Model, progress: Progress
) -> None:
    """Say where classes tie, and refuse golden data in which too many do."""
    for name, (count, total) in golden.undecided(checks, model.outputs).items():
        said = f"golden data: output {shown(name)!r} has {count:,} of {counted(total, 'element')} that rounding can change"
        if count > max(_FEW_UNDECIDED, _MOST_UNDECIDED * total):
            raise UserError(
                f"{said}; at most {_MOST_UNDECIDED:.0%} are accepted: give photographs with --golden"
            )
        progress.finish()
        progress.note(f"{said}, as two classes tie; each of them is accepted there")


def _find_records(
    request: BuildRequest, backend: Backend, progress: Progress
) -> list[RecordLog]:
    if "records" in backend.refused_options:
        return []
    places = lookup.places(request.model)
    logs, notes = lookup.find(
        request.target, request.records, places, request.threads, request.numbers
    )
    for line in notes:
        progress.note(line)
    return logs


def _name_records(built: Built, logs: Sequence[RecordLog], progress: Progress) -> None:
    used = built.lowering.records
    if used is None or built.lowering.layout != "NHWC":
        return
    taken = [log for log in logs if log.name in used.file.split(", ")]
    for line in lookup.described(taken):
        progress.note(f"tuning records: {line}")


def _check_tuned(request: BuildRequest, built: Built) -> None:
    records = built.lowering.records
    tuned = built.lowering.layout == "NHWC" and (records is None or records.complete)
    if request.require_tuned and not tuned:
        raise UserError(
            f"--require-tuned: {built.lowering.reason} (target {request.target.name}); run python -m tuning.tune, "
            "give --records FILE, or leave --require-tuned out"
        )


def _manifest(
    request: BuildRequest,
    backend: Backend,
    job: Job,
    preprocessing: Preprocessing | None,
    written: Sequence[Golden],
    quantisation: Quantisation | None,
    sixteen: Float16 | BFloat16 | None,
    built: Built,
) -> Manifest:
    folder, model = job.folder, job.model
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        # The QDQ graph has its hash in its own section: no board needs it.
        if path.is_file() and path.parent.name != "reference"
    }
    return Manifest(
        format=backend.format,
        name=job.name,
        library=backend.library(job.name),
        model=model.identity,
        target=TargetIdentity.of(request.target),
        engine=backend.engine,
        threads=request.threads,
        inputs=model.inputs,
        outputs=model.outputs,
        probabilities=model.probabilities,
        preprocessing=preprocessing,
        task=job.task,
        labels="labels.txt" if "labels.txt" in files else None,
        quantisation=quantisation,
        float16=sixteen if isinstance(sixteen, Float16) else None,
        bfloat16=sixteen if isinstance(sixteen, BFloat16) else None,
        lowering=built.lowering,
        firmware=built.firmware,
        golden=tuple(written),
        files=files,
    )


def _sizes(
    folder: Path, manifest: Manifest, model: Model, graph: Graph | None
) -> dict[str, int]:
    """Of C source the weights alone: a device has no file of it."""
    if manifest.firmware:
        return {"weight_bytes": manifest.firmware.weights_bytes}
    if graph:
        weights = weight_bytes(graph)
    else:
        weights = sum(
            len(w.raw_data) or 4 * len(w.float_data)
            for w in model.proto.graph.initializer
        )
    library = (folder / manifest.library).stat().st_size
    return {"library_bytes": library, "weight_bytes": weights}


def _verification(checked: Verification | str, reference: str) -> dict[str, Any]:
    """The manifest's ``verification``: figures, or null with the reason why there are none."""
    if isinstance(checked, str):
        return {"verification": None, "not_verified_because": checked}
    return {"verification": {**checked._asdict(), "reference": reference}}


def _peak_memory() -> int:
    """Bytes: the largest of this process and those it ended (Linux counts in KiB)."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
