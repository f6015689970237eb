"""A standalone library on this machine, or on an emulated board; neither needs TVM."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.store import Bundle
from netship.devices.sessions.emulated import check_cpu, emulated_cpu, find_qemu
from netship.devices.sessions.local import check_runs_here
from netship.devices.sessions.runner import Command, Runner, compile_runner
from netship.devices.sessions.session import Origin, Outputs, Session, check_inputs
from netship.targets.errors import UserError
from netship.targets.presets import native, this_cpu

_CALL_SECONDS = 60.0
_EMULATED_CALL_SECONDS = 600.0
# MAX_INPUTS and MAX_OUTPUTS of compile.frontend.limits
_MOST_PORTS = 64
# LONGEST_BATCH of runner.c
_BATCH = 64
# Static, so that an emulated board needs no C library.
_STATIC = {"aarch64": "aarch64-linux-musl", "arm": "arm-linux-musleabihf"}


class Memory(NamedTuple):
    """Bytes resident in the library's process; on an emulated board the emulator's are included."""

    now: int
    peak: int


def open_standalone(
    bundle: Bundle, threads: int | None = None, *, call_timeout: float = _CALL_SECONDS
) -> StandaloneSession:
    """Load the shared library here, in a process of its own, on ``threads`` threads (the manifest's where None).

    Args:
        call_timeout: seconds for one call; up to 64 inferences when timing.

    Raises:
        UserError: built for another architecture or CPU, it cannot be loaded, or it gives no model.
    """
    check_runs_here(bundle)
    _check_ports(bundle)
    with tempfile.TemporaryDirectory(prefix="netship-") as scratch:
        program = compile_runner(
            Path(scratch),
            native().linker,
            ["-ldl", "-lpthread"],
            inputs=len(bundle.manifest.inputs),
            outputs=len(bundle.manifest.outputs),
        )
        command = [str(program), str(bundle.library), bundle.manifest.name]
        runner = Runner(command, bundle, this_cpu().model, call_timeout)
    return StandaloneSession(bundle, runner, Origin.HOST, threads)


def open_standalone_emulated(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    threads: int | None = None,
) -> StandaloneSession:
    """Link the static library into a program and run that on an emulated aarch64 or armv7 board.

    The first time zig builds a C library for that architecture, which takes about a minute.

    Args:
        cpu: a CPU that QEMU knows (``qemu-aarch64 -cpu help``); the target's where None.

    Raises:
        UserError: for another architecture, no QEMU, QEMU does not know the CPU, the library cannot
            be linked, needs an instruction the CPU lacks, or gives no model.
    """
    manifest, library = bundle.manifest, f"lib{bundle.manifest.name}.a"
    machine, cpu = emulated_cpu(bundle, library, cpu)
    _check_ports(bundle)
    for file in (library, f"{manifest.name}.h"):
        if file not in manifest.files:
            raise UserError(f"{bundle.path}: it has no {file}; build it again")
    qemu = find_qemu(machine)
    check_cpu(qemu, cpu)
    on_progress(f"linking {library} for {machine}")
    options = [
        f"-DSTATIC_NAME={manifest.name}",
        "-iquote",
        str(bundle.path.resolve()),
        str((bundle.path / library).resolve()),
        "-static",
    ]
    with tempfile.TemporaryDirectory(prefix="netship-") as scratch:
        program = compile_runner(
            Path(scratch),
            _STATIC[machine],
            options,
            inputs=len(manifest.inputs),
            outputs=len(manifest.outputs),
        )
        on_progress(f"starting an emulated {cpu}")
        command = [qemu, "-cpu", cpu, str(program)]
        runner = Runner(command, bundle, f"the emulated {cpu}", _EMULATED_CALL_SECONDS)
    return StandaloneSession(bundle, runner, Origin.EMULATED, threads)


def _check_ports(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for what, ports in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if len(ports) > _MOST_PORTS:
            raise UserError(
                f"{bundle.path}: a standalone library has at most {_MOST_PORTS} {what}, the manifest says "
                f"{len(ports)}; build it again"
            )


class StandaloneSession(Session):
    """A session over a library in a runner; `open_standalone` and `open_standalone_emulated` make one.

    Attributes:
        version: as the library says it: model, target, build.
        workspace_bytes: memory that one model takes for activations.
    """

    def __init__(
        self, bundle: Bundle, runner: Runner, origin: Origin, threads: int | None
    ) -> None:
        self.origin = origin
        self.threads = threads or bundle.manifest.threads
        (self.workspace_bytes,) = struct.unpack_from("<Q", runner.greeting)
        self.version = runner.greeting[8:].decode(errors="replace")
        self._inputs, self._outputs = bundle.manifest.inputs, bundle.manifest.outputs
        self._runner = runner
        # payload.creation of runner.c
        sizes = [self.threads, *(each.nbytes for each in self._inputs)]
        for each in self._outputs:
            sizes += [each.nbytes, np.dtype(each.dtype).itemsize]
        runner.ask(Command.CREATE, struct.pack(f"<{len(sizes)}Q", *sizes))

    def run(self, *tensors: NDArray[Any]) -> Outputs:
        """As `Session.run`; to write no output, or more than that, is an error of the library."""
        self._set_inputs(tensors)
        answer, outputs = self._runner.ask(Command.RUN), []
        for each in self._outputs:
            stored = np.dtype(each.dtype).newbyteorder("<")
            values = np.frombuffer(answer[: each.nbytes], stored)
            outputs.append(values.reshape(each.shape).copy())
            answer = answer[each.nbytes :]
        return outputs

    def time(self, tensors: Sequence[NDArray[Any]], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences on ``tensors``, by CLOCK_MONOTONIC around NAME_run."""
        self._set_inputs(tensors)
        seconds: list[float] = []
        while len(seconds) < repeat:
            batch = struct.pack("<I", min(_BATCH, repeat - len(seconds)))
            answer = self._runner.ask(Command.TIME, batch)
            seconds += np.frombuffer(answer, "<f8").tolist()
        return seconds

    def self_test(self) -> None:
        """Have the library check its weights and its golden data; a UserError says which is wrong."""
        self._runner.ask(Command.SELF_TEST)

    def memory(self) -> Memory:
        """Memory of the process, which holds little else than the library."""
        return Memory(*struct.unpack("<QQ", self._runner.ask(Command.MEMORY)))

    def close(self) -> None:
        """Destroy the model and end its process."""
        self._runner.close()

    def _set_inputs(self, tensors: Sequence[NDArray[Any]]) -> None:
        check_inputs(tensors, self._inputs)
        data = b""
        for tensor, port in zip(tensors, self._inputs, strict=True):
            stored = np.dtype(port.dtype).newbyteorder("<")
            data += np.ascontiguousarray(tensor, stored).tobytes()
        self._runner.ask(Command.INPUT, data)
