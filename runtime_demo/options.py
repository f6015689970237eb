"""What run and check share: the bundle, where it runs, on how many threads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from netship.targets.arguments import check_key, count_up_to, host_and_port, named_path
from netship.targets.errors import UserError
from netship.targets.escapes import listed, shown

if TYPE_CHECKING:
    from netship.bundle.store import Bundle
    from netship.devices.sessions.session import Session
    from netship.targets.progress import Progress

DEVICES_HELP = """\
where it runs (default: in this process):
  --ssh USER@HOST           a board that ssh reaches: its running server, or the kit's in ~/netship for
                            the time of the command (python -m runtime_demo.board kit makes the kit)
  --rpc HOST:PORT           a TVM RPC server, the kit's or TVM's own. It runs whatever it is sent: keep it
                            on 127.0.0.1 there
  --rpc local               TVM's own server, started here on 127.0.0.1 and ended again
  --tracker HOST:PORT --key KEY    the free boards that a tracker knows under KEY; check uses all of them
  --board emulated          an emulated board: the kit's server under QEMU, in a Debian of its own. Answers
                            are the CPU's, and an instruction it lacks fails; times, caches, memory, the
                            kernel and the clock are not a board's
A board that goes away under a running command is waited for, and the command goes on.
"""
_WAIT_SECONDS = 60
_MOST_BOARDS = 64
count = count_up_to(1_000_000)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=named_path, help="the folder that python -m compile.build made"
    )
    place = parser.add_argument_group("device").add_mutually_exclusive_group()
    place.add_argument("--ssh", metavar="USER@HOST", help="a board that ssh reaches")
    place.add_argument("--rpc", metavar="HOST:PORT", help="a TVM RPC server, or local")
    place.add_argument(
        "--tracker", metavar="HOST:PORT", help="a TVM RPC tracker; needs --key"
    )
    place.add_argument("--board", choices=["emulated"], help="an emulated board")
    parser.add_argument(
        "--cpu",
        metavar="CPU",
        help="of the emulated board: cortex-a53, cortex-a72, cortex-a76, cortex-a7 (default: the target's)",
    )
    parser.add_argument("--key", help="the boards' key at the tracker, or the server's")
    parser.add_argument(
        "--priority",
        type=count,
        default=1,
        metavar="N",
        help="at the tracker, where several wait for a board: the largest goes first (default: 1)",
    )
    parser.add_argument(
        "--wait",
        type=count,
        default=_WAIT_SECONDS,
        metavar="S",
        help="seconds to wait for a busy board, and for one that went away "
        f"(default: {_WAIT_SECONDS})",
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="threads (default: the manifest's)"
    )


def add_input_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=_named_file,
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="an input that is the same for each image; once for each such input",
    )


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.rpartition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE.npy")
    return name, named_path(path)


def check_given(
    bundle: Bundle, found: Sequence[Path], fixed: Mapping[str, object]
) -> None:
    """Refuse that neither ``--image`` nor ``--input`` gives an input, or both give it."""
    free = [x.name for x in bundle.manifest.inputs if x.name not in fixed]
    if free and not found:
        names = listed([repr(shown(each)) for each in free], 4)
        raise UserError(
            f"{bundle.path}: needs the input{'s' * (len(free) > 1)} {names}; give --image FILE or --input NAME=FILE.npy"
        )
    if found and not free:
        raise UserError(
            "--input gives all inputs, nothing is left for images; leave one out"
        )


def open_session(
    bundle: Bundle,
    arguments: argparse.Namespace,
    progress: Progress,
    most: int = _MOST_BOARDS,
) -> Session:
    """Load the bundle on the device that the options name.

    Args:
        most: boards of a tracker, where several are free.

    Raises:
        UserError: the options contradict each other, or the device cannot take the bundle.
    """
    check_key(arguments)
    if arguments.cpu and not arguments.board:
        raise UserError("--cpu goes with --board emulated; leave it out")
    from netship.devices.sessions.opening import (
        check_served,
        open_here,
        open_on_emulated,
    )

    threads, wait, note = arguments.threads, arguments.wait, progress.note
    if arguments.board == "emulated":
        return open_on_emulated(bundle, threads, progress.stage, arguments.cpu)
    if arguments.rpc == "local":
        from netship.devices.sessions.rpc import open_rpc_local

        check_served(bundle)
        progress.stage("starting an RPC server on 127.0.0.1")
        return open_rpc_local(bundle, threads=threads)
    if not (arguments.ssh or arguments.tracker or arguments.rpc):
        progress.stage("loading the bundle")
        return open_here(bundle, threads)
    from netship.devices.sessions import fleet
    from netship.devices.transport.link import Address
    from netship.devices.transport.ssh import open_server

    check_served(bundle)
    if arguments.tracker:
        progress.stage(f"asking the tracker at {arguments.tracker} for {arguments.key}")
        return fleet.open_fleet(
            bundle,
            Address(*host_and_port(arguments.tracker), arguments.key),
            most=most,
            threads=threads,
            wait=wait,
            priority=arguments.priority,
            on_note=note,
        )
    if arguments.ssh:
        progress.stage(f"reaching {arguments.ssh}")
    else:
        progress.stage(f"sending the bundle to {arguments.rpc}")
        address = Address(*host_and_port(arguments.rpc), arguments.key or "")

    def find() -> AbstractContextManager[Address]:
        if arguments.ssh:
            return open_server(arguments.ssh, arguments.key, on_note=note)
        return nullcontext(address)

    open_it = fleet.opener(bundle, find, threads=threads, wait=wait, on_note=note)
    return fleet.Fleet([(open_it, open_it())], wait, note)
