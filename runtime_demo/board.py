"""``python -m runtime_demo.board``: what goes to a board, whether one is fit, and emulated ones."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, cast

from netship.runtime_demo.options import count
from netship.targets import escapes
from netship.targets.arguments import (
    add_json,
    as_json,
    command_parser,
    host_and_port,
    named_path,
)
from netship.targets.commands import as_called
from netship.targets.errors import UserError, run_command
from netship.targets.interrupts import Interrupted
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.runtime_demo.doctor import Check, Found

_EPILOG = """\
examples:
  python -m runtime_demo.board kit --target arm-cortex-a72 --output kit.tar.gz
  ssh pi@raspberrypi 'mkdir -p netship && tar xzf - -C netship' < kit.tar.gz
  python -m runtime_demo.board doctor --ssh pi@raspberrypi
  python -m runtime_demo.board emulate --count 2

Exit codes: 0 done, 1 doctor: something is missing, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
_EMULATE = """\
Emulated boards under one of TVM's trackers, on 127.0.0.1 until Ctrl-C. Each is the kit's own server under
QEMU, in a Debian system of the board's. The answers are the board's, and an instruction its CPU lacks fails;
times, caches, memory, the kernel, the clock and the temperature are not.
"""
_MACHINES = ("aarch64", "arm", "x86_64")
_CPUS_OF_32_BIT = ("cortex-a7",)
_TRACKER_PORT = 9190


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    command: int = arguments.run(arguments)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "runtime_demo.board",
        "Boards: the kit for one, whether one is fit, and emulated ones.",
        _EPILOG,
    )
    verbs = parser.add_subparsers(required=True, metavar="kit | doctor | emulate")

    kit = verbs.add_parser(
        "kit", help="write what goes to a board: a server, verify, a page"
    )
    kit.set_defaults(run=_kit)
    which = kit.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--target", metavar="NAME", help="as python -m compile.build takes it"
    )
    which.add_argument(
        "--machine", choices=_MACHINES, help="what `uname -m` says there"
    )
    kit.add_argument(
        "--bundle", type=named_path, metavar="DIR", help="goes in, for ./verify there"
    )
    kit.add_argument(
        "--output", type=named_path, required=True, metavar="FILE", help="the .tar.gz"
    )

    doctor = verbs.add_parser("doctor", help="is a board fit, and what is missing?")
    doctor.set_defaults(run=_doctor)
    place = doctor.add_mutually_exclusive_group(required=True)
    place.add_argument("--ssh", metavar="USER@HOST", help="a board that ssh reaches")
    place.add_argument("--rpc", metavar="HOST:PORT", help="a native server")
    doctor.add_argument("--key", help="the server's")
    add_json(doctor)

    emulate = verbs.add_parser(
        "emulate",
        help="keep emulated boards up",
        description=_EMULATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    emulate.set_defaults(run=_emulate)
    emulate.add_argument("--count", type=count, default=1, metavar="N", help="boards")
    emulate.add_argument(
        "--cpu",
        default="cortex-a72",
        metavar="CPU",
        help="cortex-a53, cortex-a72 (the default), cortex-a76, cortex-a7 (32 bit)",
    )
    emulate.add_argument(
        "--key", default="emulated", help="at the tracker (default: emulated)"
    )
    emulate.add_argument(
        "--port",
        type=int,
        default=_TRACKER_PORT,
        metavar="PORT",
        help=f"of the tracker (default: {_TRACKER_PORT}; 0: any that is free)",
    )
    return parser


def _kit(arguments: argparse.Namespace) -> int:
    from netship.bundle.store import open_bundle
    from netship.devices.board.kit import write_kit
    from netship.targets.presets import resolve

    machine = arguments.machine
    if arguments.target:
        target = resolve(arguments.target)
        if target.microcontroller:
            raise UserError(
                f"--target {target.name}: a microcontroller takes C source, no kit; name a Linux board"
            )
        machine = target.machine
    bundle = open_bundle(arguments.bundle) if arguments.bundle else None
    with Progress() as progress:
        write_kit(
            cast(Literal["aarch64", "arm", "x86_64"], machine),
            arguments.output,
            bundle,
            progress.stage,
        )
    output = arguments.output
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB for {machine}; to the board:"
    )
    print(
        f"  ssh pi@raspberrypi 'mkdir -p netship && tar xzf - -C netship' < {shlex.quote(str(output))}"
    )
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from netship.devices.transport.link import Address
    from netship.runtime_demo import doctor

    with Progress(quiet=arguments.json) as progress:
        progress.stage(f"examining {arguments.ssh or arguments.rpc}")
        if arguments.ssh:
            found = doctor.examine_ssh(arguments.ssh, arguments.key)
        else:
            address = Address(*host_and_port(arguments.rpc), arguments.key or "")
            found = doctor.examine_rpc(address)
    rows = doctor.checks(found)
    fit = doctor.fit(rows)
    print(
        _json(found, rows, fit) if arguments.json else escapes.lines(_table(rows, fit))
    )
    return 0 if fit else 1


def _json(found: Found, rows: list[Check], fit: bool) -> str:
    checks = [row._asdict() for row in rows]
    board = found.state.model_dump()
    return as_json({"fit": fit, "checks": checks, "board": board})


def _table(rows: list[Check], fit: bool) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row.grade:<8} {row.name:<13} {row.found}".rstrip())
        if row.advice:
            lines.append(f"{'':<22} {row.advice}")
    lines += ["", "fit" if fit else "not fit yet: see what is missing"]
    return "\n".join(lines)


def _emulate(arguments: argparse.Namespace) -> int:
    from netship.devices.sessions.emulated import prepare_board, serve_boards
    from netship.devices.transport.tracker import open_tracker

    cpu, key, number = arguments.cpu, arguments.key, arguments.count
    machine = "arm" if cpu in _CPUS_OF_32_BIT else "aarch64"
    with ExitStack() as stack:
        with Progress() as progress:
            emulated = prepare_board(machine, cpu, progress.stage)
            port = stack.enter_context(open_tracker(arguments.port))
            progress.stage(f"starting {number} emulated {cpu}")
            servers = stack.enter_context(serve_boards(emulated, number, key, port))
        for server in servers:
            print(f"board    127.0.0.1:{server.port}, {cpu}, emulated")
        where = f"--tracker 127.0.0.1:{port} --key {shlex.quote(key)}"
        print(f"tracker  127.0.0.1:{port}, key {key}")
        print(as_called(f"check    python -m runtime_demo.check BUNDLE {where}"))
        print("end      Ctrl-C", flush=True)
        try:
            while not any(server.ended for server in servers):
                time.sleep(1)
        except KeyboardInterrupt:
            raise Interrupted("the boards and the tracker have ended") from None
    raise UserError("an emulated board ended; run the command again")


if __name__ == "__main__":
    run_command(main)
