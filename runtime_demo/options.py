"""What run and check share: the bundle, where it runs, on how many threads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from targets.errors import UserError

if TYPE_CHECKING:
    from bundle.store import Bundle
    from devices.session import Session
    from targets.progress import Progress

DEVICES_HELP = """\
where it runs (default: in this process):
  --rpc local               a TVM RPC server that is started here, on 127.0.0.1, and ended again
  --rpc HOST:PORT           a TVM RPC server on a board. It runs whatever it is sent: keep it on
                            127.0.0.1 there and tunnel with ssh -L 9090:127.0.0.1:9090 pi@raspberrypi
  --tracker HOST:PORT --key KEY    any free board that a tracker knows under KEY
  --board emulated          an emulated arm64 board (QEMU, Debian); its times mean nothing
"""


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=Path, help="the folder that python -m compile.build made"
    )
    place = parser.add_argument_group("device").add_mutually_exclusive_group()
    place.add_argument("--rpc", metavar="HOST:PORT", help="a TVM RPC server, or local")
    place.add_argument(
        "--tracker", metavar="HOST:PORT", help="a TVM RPC tracker; needs --key"
    )
    place.add_argument("--board", choices=["emulated"], help="an emulated board")
    parser.add_argument("--key", help="the boards' key at the tracker, or the server's")
    parser.add_argument(
        "--threads", type=count, metavar="N", help="threads (default: the manifest's)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for machines"
    )


def open_session(
    bundle: Bundle, arguments: argparse.Namespace, progress: Progress
) -> Session:
    """Load the bundle on the device that the options name.

    Raises:
        UserError: the options contradict each other, or the device cannot take the bundle.
    """
    if arguments.tracker and not arguments.key:
        raise UserError("--tracker needs --key KEY: which of its boards?")
    if arguments.key and not (arguments.tracker or arguments.rpc):
        raise UserError("--key goes with --tracker or --rpc; leave it out")
    from devices.opening import check_served, open_here, open_on_emulated

    threads = arguments.threads
    if arguments.board == "emulated":
        return open_on_emulated(bundle, threads, progress.stage)
    if arguments.tracker or arguments.rpc:
        check_served(bundle)
    if arguments.tracker:
        from devices.rpc import open_tracker

        progress.stage(f"asking the tracker at {arguments.tracker} for {arguments.key}")
        host, port = _address(arguments.tracker)
        return open_tracker(bundle, host, port, arguments.key, threads=threads)
    if arguments.rpc == "local":
        from devices.rpc import open_rpc_local

        progress.stage("starting an RPC server on 127.0.0.1")
        return open_rpc_local(bundle, threads=threads)
    if arguments.rpc:
        from devices.rpc import open_rpc

        progress.stage(f"sending the bundle to {arguments.rpc}")
        host, port = _address(arguments.rpc)
        return open_rpc(bundle, host, port, key=arguments.key or "", threads=threads)
    progress.stage("loading the bundle")
    return open_here(bundle, threads)


def count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def threads_text(threads: int) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9090")
    return host.strip("[]"), int(port)
