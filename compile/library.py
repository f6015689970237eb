"""The engine's share of a build: ONNX in, model.so out. Runs in a process of its own."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.manifest import Lowering
from bundle.store import elf_machine
from targets import engine
from targets.errors import UserError
from targets.presets import Target
from tuning.records import RecordLog


@dataclass(frozen=True)
class Job:
    """What the engine's process is asked for: ``proto`` is a gated ONNX model, serialised."""

    proto: bytes
    target: Target
    records: RecordLog | None
    output: Path
    dump: Path | None


def build_library(job: Job, stage: Callable[[str], None]) -> Lowering:
    """Compile ``job.proto`` into the shared library ``job.output``.

    Raises:
        UserError: the importer or the linker refused, or the result is for another machine.
    """
    _check_target(job.target)
    stage("importing into Relay")
    import onnx

    from compile.importer import to_relay

    module, _ = to_relay(onnx.load_model_from_string(job.proto))
    stage(f"lowering and compiling for {job.target.name}")
    from compile.lower import lower

    lowered = lower(module, job.target, job.records)
    if job.dump is not None:
        _dump(job.dump, module, lowered.factory)
    stage("linking")
    _link(lowered.factory, job.target, job.output)
    return lowered.description


def _check_target(target: Target) -> None:
    """TVM's words for a target string of the user's own; LLVM would silently build for a generic CPU."""
    tvm = engine.compiler()
    try:
        parsed = tvm.target.Target(target.tvm)
        known = set(map(str, tvm.target.codegen.llvm_get_cpu_archlist(parsed)))
    except (ValueError, TypeError, AttributeError, tvm.TVMError) as error:
        said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        raise UserError(f"--target {target.tvm!r}: {said[:300]}") from None
    if parsed.mcpu and parsed.mcpu not in known:
        near = difflib.get_close_matches(parsed.mcpu, sorted(known), cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see llc -mcpu=help"
        raise UserError(
            f"--target {target.tvm!r}: LLVM has no -mcpu={parsed.mcpu} for it; {hint}"
        )


def _link(factory: Any, target: Target, output: Path) -> None:
    from targets.toolchain import link_shared

    def compile_function(path: str, objects: list[str], **_: object) -> None:
        link_shared([Path(item) for item in objects], Path(path), target)

    # TVM asks a compile function for its output format through this attribute.
    compile_function.output_format = "so"  # type: ignore[attr-defined]
    # The linker cannot say that a disk is full; copying can.
    with tempfile.TemporaryDirectory() as scratch:
        linked = Path(scratch) / output.name
        factory.export_library(str(linked), fcompile=compile_function)
        shutil.copyfile(linked, output)
    machine = elf_machine(output)
    if machine != target.machine:
        raise UserError(
            f"target {target.name}: the code is for {machine}, not {target.machine}"
        )


def _dump(folder: Path, module: Any, factory: Any) -> None:
    """For the engineer who wants to see: Relay before and after, the fused TIR, the assembly."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = factory.function_metadata
    (after,) = metadata["__tvm_main__"].relay_primfuncs.values()
    (folder / "relay-before.txt").write_text(module.astext(show_meta_data=False))
    (folder / "relay-after.txt").write_text(after.astext(show_meta_data=False))
    kernels = [
        f"# {name}\n{function.script()}\n"
        for name, information in sorted(metadata.items(), key=lambda item: str(item[0]))
        for function in information.tir_primfuncs.values()
    ]
    (folder / "tir.txt").write_text("\n".join(kernels))
    (folder / "model.s").write_text(factory.get_lib().get_source("asm"))
