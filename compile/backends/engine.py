"""The engine's share of a build: the operator graph in, a library out. Runs in a process of its own."""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netship.bundle.manifest import Lowering, MemoryPlan
from netship.bundle.store import elf_machine
from netship.compile.backends.dump import Dump, writing
from netship.compile.ir.graph import Graph
from netship.records.lookup import RecordLog
from netship.targets import engine
from netship.targets.disk import DISK_FULL
from netship.targets.errors import UserError, last_line, reason
from netship.targets.escapes import listed, shown
from netship.targets.presets import Target

if TYPE_CHECKING:
    from netship.compile.relay.convert import Converted
    from netship.compile.relay.lower import Lowered


@dataclass(frozen=True)
class EngineJob:
    """What the engine's process is asked for.

    Attributes:
        model: its name, for errors.
        library: the file that is made.
        symbols: what the kernels' symbols begin with, of a library without TVM's runtime.
    """

    model: str
    graph: Graph
    target: Target
    records: tuple[RecordLog, ...]
    library: Path
    dump: Path | None
    symbols: str | None = None


Link = Callable[["Lowered", "Converted", EngineJob], "MemoryPlan | None"]
"""Makes the library of compiled kernels; its memory plan, where the library has one of its own."""


def compile_network(
    job: EngineJob, link: Link, stage: Callable[[str], None]
) -> Lowering:
    """Compile ``job.graph`` into ``job.library``; a UserError says what the importer, compiler or linker refused."""
    _check_target(job.target)
    stage("importing into Relay")
    from netship.compile.relay.convert import to_relay

    dump = Dump(job.dump)
    try:
        network = to_relay(job.graph, job.target, dump.graph)
        stage(f"lowering and compiling for {job.target.name}")
        lowered = _lower(job, network, dump)
    except UserError as error:
        raise UserError(f"{job.model}: {error}") from None
    if job.dump is not None:
        with writing(job.dump):
            _write_kernels(job.dump, network, lowered.factory)
    stage("linking")
    memory = link(lowered, network, job)
    machine = elf_machine(job.library)
    if machine != job.target.machine:
        raise UserError(
            f"target {job.target.name}: the code is for {machine}, not {job.target.machine}"
        )
    facts: dict[str, Any] = {"memory": memory}
    if job.graph.quantised:
        named = named_once(network.islands)
        floats = f"; in float32: {listed(named, 6)}" if named else ""
        facts |= {
            "reason": network.instruction + floats,
            "float_operators": len(network.islands),
            "float_shares": network.float_shares,
        }
    return lowered.description.model_copy(update=facts)


def named_once(operators: Sequence[str]) -> list[str]:
    """Each name in quotes; where several operators have it, how many. One of a .tflite file may become several."""
    counts = Counter(repr(shown(name)) for name in operators)
    return [f"{name} ({n} operators)" if n > 1 else name for name, n in counts.items()]


def _lower(job: EngineJob, network: Converted, dump: Dump) -> Lowered:
    from netship.compile.relay.lower import lower

    try:
        return lower(network, job.target, job.records, job.symbols, dump.module)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        # TVM has no class for "this network I cannot compile": it fails in whatever way.
        raise UserError(
            f"TVM cannot compile it for {job.target.name} ({reason(error)[:200]}); "
            "try another --target, or replace what it names"
        ) from error


def _check_target(target: Target) -> None:
    """TVM's words for a target string of the user's own; LLVM would silently build for a generic CPU."""
    tvm = engine.compiler()
    try:
        parsed = tvm.target.Target(target.tvm)
        known = set(map(str, tvm.target.codegen.llvm_get_cpu_archlist(parsed)))
    except (ValueError, TypeError, AttributeError, tvm.TVMError) as error:
        said = last_line(str(error)).removeprefix("ValueError: ")
        raise UserError(f"--target {target.tvm!r}: {said[:300]}") from None
    if parsed.mcpu and parsed.mcpu not in known:
        near = difflib.get_close_matches(parsed.mcpu, sorted(known), cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see llc -mcpu=help"
        raise UserError(
            f"--target {target.tvm!r}: LLVM has no -mcpu={parsed.mcpu} for it; {hint}"
        )


def _write_kernels(folder: Path, network: Converted, factory: Any) -> None:
    """Relay's fused kernels, their TIR, the assembly, and the C that is called with its own assembly."""
    metadata = factory.function_metadata
    (fused,) = metadata["__tvm_main__"].relay_primfuncs.values()
    (folder / "kernels.txt").write_text(fused.astext(show_meta_data=False))
    kernels = [
        f"# {name}\n{function.script()}\n"
        for name, information in sorted(metadata.items(), key=lambda item: str(item[0]))
        for function in information.tir_primfuncs.values()
    ]
    (folder / "tir.txt").write_text("\n".join(kernels))
    (folder / "model.s").write_text(factory.get_lib().get_source("asm"))
    if network.source is not None:
        from netship.compile.relay.neon_kernels import HEADER

        (folder / "native.c").write_text(network.source.text)
        shutil.copyfile(HEADER, folder / HEADER.name)
        # In the place of -c, which zig then warns of.
        options = ("-S", "-Wno-unused-command-line-argument")
        network.source.compile(folder / "native.s", *options)
