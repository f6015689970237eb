"""A bundle on an emulated board: the kit's server under QEMU's user mode, with a Debian system of that architecture.

Results are the same as on the board. Times are the emulator's and say nothing of the board; kernel, caches, clock and
memory sizes are this machine's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

from netship.bundle.store import Bundle
from netship.devices.board.programs import Machine, native_server
from netship.devices.sessions.rpc import open_served
from netship.devices.sessions.session import Origin, Session
from netship.devices.sysroot import ARCHITECTURES, prepare
from netship.devices.transport.link import Address
from netship.devices.transport.server import Server, start_native
from netship.devices.transport.tracker import boards_of
from netship.targets.errors import UserError

# With more, the emulated process hangs at its exit.
_THREADS = 1
_START_SECONDS = 60.0
_CALL_SECONDS = 600.0
_LOOK_SECONDS = 0.1
# The emulated dynamic linker would obey these variables of this machine.
_REMOVED_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH")


class Board(NamedTuple):
    """An emulated board: the name of its CPU in QEMU, and the command that starts its server."""

    cpu: str
    program: tuple[str, ...]


def prepare_board(
    machine: str, cpu: str, on_progress: Callable[[str], None] = lambda stage: None
) -> Board:
    """Prepare an emulated board; the first time its system is fetched and its server is built.

    Args:
        machine: aarch64 or arm.
        cpu: its name in QEMU.
    """
    qemu = find_qemu(machine)
    check_cpu(qemu, cpu)
    root = prepare(on_progress, machine)
    server = native_server(cast(Machine, machine), on_progress)
    unset = [word for name in _REMOVED_VARIABLES for word in ("-U", name)]
    return Board(cpu, (qemu, "-cpu", cpu, "-L", str(root), *unset, str(server)))


@contextmanager
def serve_boards(
    emulated: Board, count: int, key: str, tracker_port: int
) -> Iterator[list[Server]]:
    """Servers of ``count`` emulated boards, registered under ``key`` at a tracker on 127.0.0.1; they end with the context."""
    options = ["--threads", str(_THREADS), "--tracker", f"127.0.0.1:{tracker_port}"]
    with ExitStack() as stack:
        servers = []
        for _ in range(count):
            server = start_native(emulated.program, _START_SECONDS, options, key)
            stack.callback(server.close)
            servers.append(server)
        end = time.monotonic() + _START_SECONDS
        while not _all_registered(tracker_port, key, count):
            if time.monotonic() > end:
                raise UserError(
                    f"the emulated boards did not reach the tracker within {_START_SECONDS:g} s; try again"
                )
            time.sleep(_LOOK_SECONDS)
        yield servers


def _all_registered(port: int, key: str, count: int) -> bool:
    try:
        return boards_of(Address("127.0.0.1", port, key)).boards >= count
    except UserError:  # none yet
        return False


def open_emulated(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    threads: int | None = None,
) -> Session:
    """Load a bundle on an emulated board, on one thread.

    Args:
        cpu: a CPU that QEMU knows (``qemu-aarch64 -cpu help``); the target's where None.

    Raises:
        UserError: as `prepare_board`; more ``threads``, a bundle for another machine, or model.so needs an
            instruction the CPU lacks.
    """
    if threads not in (None, _THREADS):
        raise UserError("--threads: an emulated board runs on 1 thread; leave it out")
    machine, cpu = emulated_cpu(bundle, bundle.manifest.library, cpu)
    emulated = prepare_board(machine, cpu, on_progress)
    on_progress(f"starting an emulated {emulated.cpu}")
    return open_served(
        bundle,
        lambda: start_native(
            emulated.program, _START_SECONDS, ["--threads", str(_THREADS)]
        ),
        cpu=f"the emulated {emulated.cpu}",
        threads=_THREADS,
        origin=Origin.EMULATED,
        call_timeout=_CALL_SECONDS,
    )


def emulated_cpu(bundle: Bundle, library: str, cpu: str | None) -> tuple[str, str]:
    """The architecture of the board to emulate for a library of the bundle, and the CPU: the target's where None."""
    target = bundle.manifest.target
    if target.machine not in ARCHITECTURES:
        raise UserError(
            f"{bundle.path}: {library} is for {target.machine}, emulated boards are aarch64 or arm; "
            "build with --target arm-cortex-a72 or leave --board out"
        )
    return target.machine, cpu or target.qemu_cpu or "max"


def find_qemu(machine: str = "aarch64") -> str:
    """QEMU's user-mode emulator of ``machine``, as it names it; a UserError where it is not installed."""
    for name in (f"qemu-{machine}-static", f"qemu-{machine}"):
        if found := shutil.which(name):
            return found
    raise UserError(
        f"no QEMU for {machine}; install it with `apt install qemu-user-static`, "
        "or use a board"
    )


def check_cpu(qemu: str, cpu: str) -> None:
    """Refuse a CPU that QEMU does not know; the UserError lists those that it knows."""
    shown = subprocess.run(
        [qemu, "-cpu", "help"], capture_output=True, text=True, check=False
    )
    known = re.findall(r"^\s+([\w-]+)\s*$", shown.stdout, re.MULTILINE)
    if cpu not in known:
        raise UserError(
            f"{qemu}: knows no CPU {cpu!r}, only {', '.join(known)}; "
            "install QEMU 7.1 or newer, or choose one of these"
        )
