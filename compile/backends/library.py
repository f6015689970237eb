"""The engine's share of a build: ONNX in, model.so out. Runs in a process of its own."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.manifest import Lowering, MemoryPlan, Tensor
from bundle.store import LIBRARY, elf_machine
from compile.backends.standalone.emit import Standalone
from records.lookup import RecordLog
from targets import engine
from targets.errors import UserError
from targets.presets import Target

if TYPE_CHECKING:
    import onnx

    from compile.relay.lower import Lowered
    from compile.relay.neon import Native


@dataclass(frozen=True)
class Job:
    """What the engine's process is asked for.

    Attributes:
        proto: a gated ONNX model, serialised.
        output: the folder that the library goes into.
        standalone: what the standalone library is called, for that format.
        int8: the output, where ``proto`` is a QDQ graph whose integers are to be built.
    """

    model: str
    proto: bytes
    target: Target
    records: tuple[RecordLog, ...]
    output: Path
    dump: Path | None
    standalone: Standalone | None
    int8: Tensor | None = None


def build_library(job: Job, stage: Callable[[str], None]) -> Lowering:
    """Compile ``job.proto`` into the library of a bundle, in the folder ``job.output``.

    Raises:
        UserError: the importer, the compiler or the linker refused, or the result is for another
            machine.
    """
    _check_target(job.target)
    stage("importing into Relay")
    import onnx

    proto = onnx.load_model_from_string(job.proto)
    inside: int | None = None
    native: Native | None = None
    told: dict[str, Any] = {}
    try:
        if job.int8 is None:
            from compile.relay.importer import to_relay

            module = to_relay(proto)
        else:
            from compile.relay import integer

            module, native, instruction = _integers(proto, job.int8, job.target)
            told["reason"] = instruction
            inside = len(integer.float_operators(module))
            assert inside == 0, integer.float_operators(module)
        stage(f"lowering and compiling for {job.target.name}")
        lowered = _lower(job, module, native.instruction if native else "")
    except UserError as error:
        raise UserError(f"{job.model}: {error}") from None
    if job.dump is not None:
        _dump(job.dump, module, lowered.factory)
        if native:
            _dump_native(job.dump, native, job.target)
    stage("linking")
    if job.standalone is None:
        library, memory = job.output / LIBRARY, None
        _link(lowered.factory, job.target, library, native)
    else:
        library = job.output / f"lib{job.standalone.name}.so"
        memory = _emit(lowered, job.standalone, job, native)
    machine = elf_machine(library)
    if machine != job.target.machine:
        raise UserError(
            f"target {job.target.name}: the code is for {machine}, not {job.target.machine}"
        )
    return lowered.description.model_copy(
        update={"memory": memory, "float_operators": inside, **told}
    )


def _integers(
    proto: onnx.ModelProto, output: Tensor, target: Target
) -> tuple[Any, Native | None, str]:
    """The integers of a QDQ graph in Relay, the C that they call, and what they multiply by."""
    from compile.ir import graph
    from compile.relay import integer, neon
    from compile.relay.ops import dot_product

    operators = graph.read(proto)
    if neon.serves(target):
        native = neon.lower(operators, output, target)
        return native.module, native, native.instruction
    return (
        integer.to_relay(operators, output, target),
        None,
        dot_product.instruction(target),
    )


def _lower(job: Job, module: Any, native: str) -> Lowered:
    from compile.relay.lower import lower

    name = job.standalone.name if job.standalone else None
    try:
        return lower(module, job.target, job.records, name, native)
    except Exception as error:
        # TVM has no class for "this network I cannot compile": it fails in whatever way.
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"TVM cannot compile it for {job.target.name} ({type(error).__name__}: {last[:200]}); "
            "try another --target, or replace what it names"
        ) from error


def _emit(
    lowered: Lowered, wanted: Standalone, job: Job, native: Native | None
) -> MemoryPlan:
    from compile.backends.standalone.emit import emit
    from compile.program.program import read_program
    from compile.relay.lower import workspaces
    from compile.relay.neon import compile_source

    factory = lowered.factory
    program = read_program(
        factory.get_graph_json(),
        factory.get_params(),
        lowered.description.groups,
        workspaces(factory),
    )
    # The outer module only registers the kernels with TVM's C runtime; they are inside.
    with tempfile.TemporaryDirectory() as scratch:
        kernels = []
        for number, inner in enumerate(factory.get_lib().imported_modules):
            kernels.append(Path(scratch) / f"kernels{number}.o")
            inner.save(str(kernels[-1]))
        if native:
            kernels.append(Path(scratch) / "native.o")
            compile_source(native.source, kernels[-1], job.target)
        return emit(job.output, wanted, program, kernels, job.target, job.dump)


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


def _link(
    factory: Any, target: Target, output: Path, native: Native | None = None
) -> None:
    from compile.relay.neon import compile_source
    from targets.toolchain import is_hard_float, link_shared, strip_debug

    def compile_function(path: str, objects: list[str], **_: object) -> None:
        kernels = [Path(item) for item in objects]
        if target.machine == "arm" and not all(map(is_hard_float, kernels)):
            raise UserError(
                f"target {target.name}: the code passes floats as soft-float systems do, and its numbers "
                "would be wrong on armhf; give the target -mfloat-abi=hard"
            )
        if native:
            kernels.append(Path(path).with_name("native.o"))
            compile_source(native.source, kernels[-1], target)
        link_shared(kernels, Path(path), target)
        # TVM's would be a fifth of an int8 library.
        strip_debug(Path(path))

    # TVM asks a compile function for its output format through this attribute.
    compile_function.output_format = "so"  # type: ignore[attr-defined]
    # The linker cannot say that a disk is full; copying can.
    with tempfile.TemporaryDirectory() as scratch:
        linked = Path(scratch) / output.name
        factory.export_library(str(linked), fcompile=compile_function)
        shutil.copyfile(linked, output)


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


def _dump_native(folder: Path, native: Native, target: Target) -> None:
    """The C beside TVM's kernels: source, what it includes, assembly."""
    from compile.relay.neon import HEADER, compile_source

    (folder / "native.c").write_text(native.source)
    shutil.copyfile(HEADER, folder / HEADER.name)
    # In the place of -c, which zig then warns of.
    options = ("-S", "-Wno-unused-command-line-argument")
    compile_source(native.source, folder / "native.s", target, *options)
