"""A process that this one talks to over pipes, and ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence


class Process:
    """A program that ends when its standard input does, which also happens when this process ends.

    What it writes to standard error is kept. Ctrl-C in a terminal reaches only this process, which then ends it in order.

    Args:
        environment: variables in addition to this process's own.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._received = b""

    def code_within(self, seconds: float) -> int | None:
        """Its exit code; None where it has not ended within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll()

    def said(self) -> str:
        """What it has written to standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def send_line(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._to.write(f"{line}\n".encode())

    def read_line(self, seconds: float) -> str | None:
        """The next line that it prints; None where it ended, or printed none in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._from], [], [], left)[0]:
                return None
            part = self._from.read(4096)
            if not part:
                return None
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def end(self, seconds: float) -> None:
        """Close its standard input; kill it, and what it started, where it does not end in time."""
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        if self.code_within(seconds) is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._from.close()
        self._log.close()
