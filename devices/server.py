"""Starting a TVM RPC server of our own on this machine, and always ending it."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from targets.errors import UserError

SCRIPT = Path(__file__).with_name("rpc_server.py")
_END_WITHIN = 10.0


class Server:
    """A running server process. Close it; it also ends when this process does, however that ends.

    Attributes:
        port: on 127.0.0.1.
        key: what a client has to give; no other user of the machine knows it.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, key: str, log: IO[bytes]
    ) -> None:
        self.port = port
        self.key = key
        self._process = process
        self._log = log

    def death(self, within: float = 2.0) -> str:
        """Why the server has ended, or is about to; empty where it has not."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            return ""
        number = code - 128 if code > 128 else -code
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
        return f"exit code {code}: {_last_line(self._log)}"

    def close(self) -> None:
        _end(self._process)
        self._log.close()


def start_server(
    python: Sequence[str], environment: Mapping[str, str], ready_within: float
) -> Server:
    """Start `rpc_server.py` under an interpreter that has tvm.

    Args:
        python: the command that is the interpreter, the emulator before it if need be.
        environment: variables beside this process's own.
        ready_within: seconds until it must listen.

    Raises:
        UserError: it did not start, or not in time.
    """
    key = secrets.token_hex(16)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
    process = subprocess.Popen(
        [*python, "-P", str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **environment, "TVM_USE_RUNTIME_LIB": "1"},
        # Ctrl-C in a terminal reaches this process alone, which then ends the server in order.
        start_new_session=True,
    )
    try:
        port = _handshake(process, key, ready_within)
        if port is None:
            raise UserError(
                f"the RPC server did not start within {ready_within:g} s: "
                f"{_last_line(log)}; try again"
            )
        return Server(process, port, key, log)
    except BaseException:
        _end(process)
        log.close()
        raise


def this_python() -> list[str]:
    return [sys.executable]


def _handshake(process: subprocess.Popen[bytes], key: str, within: float) -> int | None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{key}\n".encode())
        process.stdin.flush()
    readable, _, _ = select.select([process.stdout], [], [], within)
    line = process.stdout.readline() if readable else b""
    return int(line) if line else None


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
