"""A C99 project for any CPU as 32-bit RISC-V code under QEMU, compared with this machine bit by bit."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from netship.bundle.store import Bundle
from netship.devices.microcontroller.host import (
    compile_for_host,
    compile_program,
    run_program,
)
from netship.devices.microcontroller.session import (
    check_options,
    from_outputs,
    interface_of,
    open_firmware,
    to_input,
)
from netship.devices.sessions.emulated import find_qemu
from netship.devices.sessions.session import Origin, Outputs, Session
from netship.targets.cores import ANY
from netship.targets.errors import UserError

# RV32IMAC, as ESP32-C6 has it; musl's library is part of zig.
_RISCV = ("riscv32-linux-musl", "-mcpu=generic_rv32+m+a+c", "-static")


def open_c(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    threads: int | None = None,
) -> Session:
    """Load a C project on the emulated board of its core; one for any CPU as 32-bit RISC-V code."""
    if interface_of(bundle).cpu != ANY:
        return open_firmware(bundle, cpu, on_progress, threads)
    check_options(bundle, cpu, threads)
    return PortableSession(bundle, on_progress)


class PortableSession(Session):
    """A `Session` for which every run starts two programs: 32-bit RISC-V code under QEMU, and this machine's."""

    origin = Origin.EMULATED
    threads = 1

    def __init__(self, bundle: Bundle, on_progress: Callable[[str], None]) -> None:
        qemu = find_qemu("riscv32")
        self._bundle, self._interface = bundle, interface_of(bundle)
        self._folder = tempfile.TemporaryDirectory(prefix="netship-")
        emulated, host = (Path(self._folder.name) / x for x in ("riscv32", "host"))
        project = (bundle.path, bundle.manifest.name, self._interface)
        try:
            on_progress("compiling for 32-bit RISC-V")
            compile_program(*project, emulated, *_RISCV)
            compile_for_host(*project, host)
        except BaseException:
            self.close()
            raise
        self._emulated, self._host = [qemu, str(emulated)], [str(host)]
        tested = subprocess.run([*self._emulated, "self-test"], check=False)
        if tested.returncode:
            self.close()
            raise UserError(
                f"{bundle.path}: {bundle.manifest.name}_self_test returned {tested.returncode} as 32-bit RISC-V code; "
                "build it again, and report the model if it stays so"
            )

    def run(self, *tensors: NDArray[Any]) -> Outputs:
        """As `Session.run`.

        Raises:
            UserError: of a project that gives the same bits everywhere, this machine gives others.
        """
        name, inputs = self._bundle.manifest.name, [to_input(tensors, self._bundle)]
        found, here = (
            run_program(command, name, self._interface, inputs)[0]
            for command in (self._emulated, self._host)
        )
        alike = all((a == b).all() for a, b in zip(found, here, strict=True))
        if self._interface.exact and not alike:
            raise UserError(
                f"{self._bundle.path}: 32-bit RISC-V code gives other integers than this machine; report the model"
            )
        return from_outputs(found, self._bundle)

    def time(self, tensors: Sequence[NDArray[Any]], repeat: int) -> list[float]:
        """Raises: UserError always, as the emulator's times say nothing of a board."""
        raise UserError(
            "--repeat: 32-bit RISC-V code under QEMU has no times; leave it out"
        )

    def close(self) -> None:
        self._folder.cleanup()
