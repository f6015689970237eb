"""Native RPC servers on this machine, TVM's client for them, and a client by hand."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from boards import HOST

from netship.devices.board.programs import native_server
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

MAGIC, MISMATCH, TRACKER_MAGIC = 0xFF271, 0xFF273, 0x2F271
WITHIN = 20.0


class Server:
    """A native server on this machine with a work folder of its own."""

    def __init__(
        self, folder: Path, *options: str, command: Sequence[str] = (), **popen: Any
    ) -> None:
        program = str(native_server(native().machine))  # type: ignore[arg-type]
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.log = folder.with_suffix(".log")
        self.process = subprocess.Popen(
            [
                *(command or [program]),
                *("--port", "0", "--work-dir", str(folder), *options),
            ],
            stdin=popen.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            **popen,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", line), line
        self.port = int(line.rsplit(":", 1)[1])

    def said(self) -> str:
        return self.log.read_text()

    def children(self) -> list[int]:
        text = Path(
            f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        ).read_text()
        return [int(pid) for pid in text.split()]

    def client_folders(self) -> list[Path]:
        return list(self.folder.glob("netship-serve-*/client"))

    def kept(self) -> list[Path]:
        return list(self.folder.glob("netship-serve-*/kept/*"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers in ``folder``, and sees that each one leaves no folder when it ends in order."""
    servers: list[Server] = []

    def begin(*options: str, **popen: Any) -> Server:
        server = Server(folder / f"work{len(servers)}", *options, **popen)
        servers.append(server)
        return server

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
            assert server.process.wait(WITHIN) == 0
            assert list(server.folder.iterdir()) == []
        assert server.process.stdout
        server.process.stdout.close()


def connect(server: Server, key: str = "pi", timeout: int = 0) -> Any:
    """TVM's stock client."""
    from netship.targets import engine

    if "tvm" not in sys.modules:
        engine.runtime(1)
    import tvm.rpc

    return tvm.rpc.connect(HOST, server.port, key, session_timeout=timeout)


def greet(server: Server, key: str = "pi") -> tuple[socket.socket, int]:
    """A client by hand, up to the server's answer."""
    client = socket.create_connection((HOST, server.port), WITHIN)
    word = f"client:{key}".encode()
    client.sendall(struct.pack("<ii", MAGIC, len(word)) + word)
    (answer,) = struct.unpack("<i", client.recv(4, socket.MSG_WAITALL))
    return client, answer


def library(folder: Path, name: str, on_load: str) -> Path:
    """A shared library that does something when it is loaded."""
    path, source = folder / name, folder / f"{name}.c"
    source.write_text(
        "#include <signal.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void load(void) {{ {on_load} }}"
    )
    run_zig("cc", path, "-target", native().linker, "-shared", source)
    return path
