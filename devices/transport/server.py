"""Starting TVM RPC servers on this machine, which always end with this process."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from netship.devices.transport.process import Process
from netship.targets.arguments import host_and_port
from netship.targets.errors import UserError, last_line

SCRIPT = Path(__file__).with_name("rpc_server.py")
_END_WITHIN, _NOTICED_WITHIN = 10.0, 2.0


class Server(Process):
    """A server process. Close it; it also ends when this process does, however that ends.

    Args:
        command: of the server, with its folder for clients' files.
        ready_within: seconds until it must listen.

    Attributes:
        port: on 127.0.0.1.
        key: that a client has to give; no other user of the machine knows it.
    """

    def __init__(
        self,
        command: Callable[[str], Sequence[str]],
        environment: Mapping[str, str],
        ready_within: float,
        key: str | None = None,
    ) -> None:
        self.port = 0
        self.key = key or secrets.token_hex(16)
        self._scratch = tempfile.mkdtemp(prefix="netship-rpc-")
        super().__init__(command(self._scratch), environment)
        try:
            self.send_line(self.key)
            line = self.read_line(ready_within)
            if not line:
                raise UserError(
                    f"the RPC server did not start within {ready_within:g} s: "
                    f"{last_line(self.said())}; try again"
                )
            _, self.port = host_and_port(line.removeprefix("listening on "))
        except BaseException:
            self.close()
            raise

    def why_ended(self) -> str:
        """Why the server, or its process for the last client, has ended; empty where it has not soon."""
        deadline = time.monotonic() + _NOTICED_WITHIN
        while (code := self.code_within(0)) is None:
            if signalled := re.search(r"ended by (SIG\w+)", self.said()):
                return signalled[1]
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.02)
        number = code - 128 if code > 128 else -code
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
        return f"exit code {code}: {last_line(self.said())}"

    @property
    def ended(self) -> bool:
        return self.code_within(0) is not None

    def close(self) -> None:
        # A server that is not ready has started no other process, and may notice the end of its input late.
        self.end(_END_WITHIN if self.port else 0)
        shutil.rmtree(self._scratch, ignore_errors=True)


def start_server(
    python: Sequence[str], environment: Mapping[str, str], ready_within: float
) -> Server:
    """Start `rpc_server.py` under the command of an interpreter that has tvm."""
    return Server(
        lambda scratch: [*python, "-P", str(SCRIPT), scratch],
        {**environment, "TVM_USE_RUNTIME_LIB": "1"},
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
    """
    own = ("--port", "0", "--key-stdin", "--end-with-stdin")
    return Server(
        lambda scratch: [*program, *own, "--work-dir", scratch, *options],
        {},
        ready_within,
        key,
    )


def this_python() -> list[str]:
    return [sys.executable]
