"""Starting TVM RPC servers on this machine, which always end with this process."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from targets.arguments import host_and_port
from targets.errors import UserError, last_line

SCRIPT = Path(__file__).with_name("rpc_server.py")
_END_WITHIN = 10.0


class Server:
    """A server process. Close it; it also ends when this process does, however that ends.

    Attributes:
        port: on 127.0.0.1.
        key: that a client has to give; no other user of the machine knows it.
    """

    def __init__(
        self,
        command: Callable[[str], Sequence[str]],
        environment: Mapping[str, str],
        key: str | None = None,
    ) -> None:
        self.port = 0
        self.key = key or secrets.token_hex(16)
        self._scratch = tempfile.mkdtemp(prefix="netship-rpc-")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(
            command(self._scratch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            # Ctrl-C in a terminal reaches only this process, which then ends the server in order.
            start_new_session=True,
        )

    def wait_until_ready(self, seconds: float) -> None:
        """Send the key to the server, and read its port.

        Raises:
            UserError: the server ended, or printed nothing in time.
        """
        process = self._process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{self.key}\n".encode())
            process.stdin.flush()
        readable, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if readable else b""
        if not line:
            raise UserError(
                f"the RPC server did not start within {seconds:g} s: "
                f"{last_line(self._said())}; try again"
            )
        text = line.decode(errors="replace").strip()
        _, self.port = host_and_port(text.removeprefix("listening on "))

    def why_ended(self, within: float = 2.0) -> str:
        """Why the server, or its process for the last client, has ended within so many seconds; empty where it has not."""
        deadline = time.monotonic() + within
        while (code := self._process.poll()) is None:
            if signalled := re.search(r"ended by (SIG\w+)", self._said()):
                return signalled[1]
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.02)
        number = code - 128 if code > 128 else -code
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
        return f"exit code {code}: {last_line(self._said())}"

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        process = self._process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        # A server that is not ready has started no other process, and may notice the end of its input late.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_WITHIN if self.port else 0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        self._log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def start_server(
    python: Sequence[str], environment: Mapping[str, str], ready_within: float
) -> Server:
    """Start `rpc_server.py` under an interpreter that has tvm.

    Args:
        python: the command that is the interpreter.
        environment: variables in addition to this process's own.
        ready_within: seconds until it must listen.

    Raises:
        UserError: it did not start, or not in time.
    """
    return _started(
        Server(
            lambda scratch: [*python, "-P", str(SCRIPT), scratch],
            {**environment, "TVM_USE_RUNTIME_LIB": "1"},
        ),
        ready_within,
    )


def start_native(
    program: Sequence[str],
    ready_within: float,
    options: Sequence[str] = (),
    key: str | None = None,
) -> Server:
    """Start the native server on a port of 127.0.0.1 that is free.

    Args:
        program: the command of the server, in an emulator where it is for another architecture.
        options: further options of the server.
        key: that a client has to give; a random one where None.

    Raises:
        UserError: as `start_server`.
    """
    own = ("--port", "0", "--key-stdin", "--end-with-stdin")
    return _started(
        Server(
            lambda scratch: [*program, *own, "--work-dir", scratch, *options], {}, key
        ),
        ready_within,
    )


def _started(server: Server, ready_within: float) -> Server:
    try:
        server.wait_until_ready(ready_within)
    except BaseException:
        server.close()
        raise
    return server


def this_python() -> list[str]:
    return [sys.executable]
