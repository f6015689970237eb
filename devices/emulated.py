"""A bundle on an emulated board: QEMU user mode, an arm64 system, TVM's stock RPC server.

Numbers are those of the board; times are the emulator's and say nothing of it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

from bundle.store import Bundle
from devices.rpc import open_served
from devices.session import Origin, Session
from devices.sysroot import prepare, site_packages
from targets.errors import UserError

# More make the emulated process hang at its exit.
_THREADS = 1
_START_SECONDS = 120.0
_CALL_SECONDS = 600.0
# Variables of this machine that the emulated dynamic linker and Python would obey.
_NOT_FOR_THE_BOARD = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONHOME")


def open_emulated(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Session:
    """Load a bundle on an emulated aarch64 board, on one thread.

    Args:
        cpu: a name of QEMU's (``qemu-aarch64 -cpu help``); the target's where None.
        on_progress: called with each stage; the first time the arm64 system is fetched.

    Raises:
        UserError: not an aarch64 bundle, no QEMU, QEMU does not know the CPU, the arm64
            system cannot be fetched, or model.so needs an instruction the CPU lacks.
    """
    target = bundle.manifest.target
    if target.machine != "aarch64":
        raise UserError(
            f"{bundle.path}: model.so is for {target.machine}, emulated boards are aarch64; "
            "build with --target arm-cortex-a72 or leave --board out"
        )
    qemu = find_qemu()
    cpu = cpu or target.qemu_cpu or "max"
    check_cpu(qemu, cpu)
    sysroot = prepare(on_progress)
    on_progress(f"starting an emulated {cpu}")
    unset = [word for name in _NOT_FOR_THE_BOARD for word in ("-U", name)]
    python = [qemu, "-cpu", cpu, "-L", str(sysroot), *unset]
    return open_served(
        bundle,
        # -S: no site-packages of this machine, whose files the emulated process can see.
        [*python, str(sysroot / "usr/bin/python3.11"), "-S"],
        {"PYTHONPATH": str(site_packages(sysroot))},
        cpu=f"the emulated {cpu}",
        threads=_THREADS,
        origin=Origin.EMULATED,
        ready_within=_START_SECONDS,
        call_timeout=_CALL_SECONDS,
    )


def find_qemu(machine: str = "aarch64") -> str:
    """QEMU's user-mode emulator of ``machine``, aarch64 or arm.

    Raises:
        UserError: not installed.
    """
    for name in (f"qemu-{machine}-static", f"qemu-{machine}"):
        if found := shutil.which(name):
            return found
    raise UserError(
        f"no QEMU for {machine}; install it with `apt install qemu-user-static`, "
        "or use a board"
    )


def check_cpu(qemu: str, cpu: str) -> None:
    """Refuse a CPU that QEMU does not know.

    Raises:
        UserError: with the ones that it knows.
    """
    shown = subprocess.run(
        [qemu, "-cpu", "help"], capture_output=True, text=True, check=False
    )
    known = re.findall(r"^\s+([\w-]+)\s*$", shown.stdout, re.MULTILINE)
    if cpu not in known:
        raise UserError(
            f"{qemu}: knows no CPU {cpu!r}, only {', '.join(known)}; "
            "install QEMU 7.1 or newer, or choose one of these"
        )
