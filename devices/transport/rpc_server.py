"""A script: TVM's stock RPC server on 127.0.0.1, for as long as its standard input stays open.

It runs under any Python that has tvm and imports nothing of this project. Its argument is a
folder for the files that clients send. The first line of standard input is the key that a
client has to give, so that nobody else on the machine can use the server; the first line of
standard output is "listening on HOST:PORT". When standard input ends, which also happens when
the parent is killed, the server ends its processes, removes the folder and exits. If a signal
ends a process that serves a client, the script exits with 128 + signal.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from typing import NoReturn

_ending = threading.Lock()


def main() -> None:
    tempfile.tempdir = sys.argv[1]
    threading.excepthook = lambda died: end(_exit_code(str(died.exc_value)))
    port = _serve(_read_line())
    try:
        print(f"listening on 127.0.0.1:{port}", flush=True)
        while os.read(0, 4096):
            pass
    finally:
        end(0)


def _read_line() -> str:
    # Not sys.stdin: a thread that waits for it holds its lock, and a forked child would hang on the lock.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("no key on standard input")
        line += byte
    return line.decode().strip()


def _serve(key: str) -> int:
    from tvm.rpc.server import PopenRPCServerState

    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        try:
            PopenRPCServerState("127.0.0.1", port, port + 1, key=key, silent=True)
        except ValueError:  # another program took the port in the meantime
            continue
        return port


def _exit_code(message: str) -> int:
    signalled = re.search(r"exited unsuccessfully with error code -(\d+)", message)
    return 128 + int(signalled[1]) if signalled else 1


def end(code: int) -> NoReturn:
    """Remove everything, and exit without waiting for threads."""
    _ending.acquire()
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os._exit(code)


if __name__ == "__main__":
    main()
