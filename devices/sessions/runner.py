"""A standalone library in a process of its own, which runs runner.c and is controlled over two pipes."""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

from netship.bundle.store import Bundle
from netship.devices.transport.process import Process
from netship.targets.errors import UserError, last_line
from netship.targets.toolchain import run_zig

SOURCE = Path(__file__).with_name("runner.c")
_END_SECONDS = 10.0
_LONGEST_ANSWER = 1 << 30


class Command(IntEnum):
    """The requests to the runner; runner.c has the same numbers."""

    LOAD = 0  # done at its start, without a request
    CREATE = 1
    INPUT = 2
    RUN = 3
    TIME = 4
    SELF_TEST = 5
    MEMORY = 6
    QUIT = 7


_AGAIN = "build it again, and report the model if it stays so"
_ADVICE = {
    Command.LOAD: "build it again, for this machine",
    Command.CREATE: "give fewer --threads, make room in memory, or build it for this CPU",
}


class Runner(Process):
    """A runner process with a library. Close it; it also ends when this process does, however that ends.

    Args:
        command: starts the process, in an emulator where the library is for another architecture.
        bundle: that the library belongs to, for messages.
        cpu: that the process runs on, for messages.
        timeout: seconds for one answer.

    Attributes:
        greeting: its first answer (see ``greet`` of runner.c).
    """

    def __init__(
        self, command: Sequence[str], bundle: Bundle, cpu: str, timeout: float
    ) -> None:
        self._bundle = bundle
        self._cpu = cpu
        self._timeout = timeout
        super().__init__(command)
        os.set_blocking(self._to.fileno(), False)
        self._closed = False
        self.greeting = self._exchange(Command.LOAD, b"")

    def ask(self, command: Command, payload: bytes = b"") -> bytes:
        """The answer to one request.

        Raises:
            UserError: the library gave an error, crashed, was killed, or took too long. The runner
                has ended in all of these cases but the first.
        """
        if self._closed:
            raise UserError(
                f"{self._bundle.library}: its process has ended; open it again"
            )
        return self._exchange(
            command, struct.pack("<II", command, len(payload)) + payload
        )

    def close(self) -> None:
        """Destroy the model and end the process; the second time does nothing.

        Raises:
            UserError: the library crashed in it, or took too long.
        """
        if not self._closed:
            self._timeout = min(self._timeout, _END_SECONDS)
            self.ask(Command.QUIT)
            self._end()

    def _exchange(self, command: Command, request: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout
        try:
            self._send(request, deadline)
            status, size = struct.unpack("<II", self._receive(8, deadline))
            if status > 1 or size > _LONGEST_ANSWER:
                self._refuse("its answer is garbled; it wrote where it must not")
            answer = self._receive(size, deadline)
        except TimeoutError:
            self._end()
            self._refuse(f"no answer to {command.name} within {self._timeout:g} s")
        except (BrokenPipeError, EOFError):
            self._explain_end(command)
        except BaseException:
            self._end()
            raise
        if status:
            if command in (Command.LOAD, Command.CREATE):
                self._end()
            self._refuse(answer.decode(errors="replace"), _ADVICE.get(command, _AGAIN))
        return answer

    def _send(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            _wait(self._to.fileno(), select.POLLOUT, deadline)
            left = left[os.write(self._to.fileno(), left) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            _wait(self._from.fileno(), select.POLLIN, deadline)
            part = os.read(self._from.fileno(), size)
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _explain_end(self, command: Command) -> NoReturn:
        code = self.code_within(_END_SECONDS)
        said = last_line(self.said(), otherwise="")
        self._end()
        target = self._bundle.manifest.target.name
        if code is None:
            self._refuse(f"its process fell silent at {command.name}")
        if code >= 0:
            self._refuse(
                f"ended its process at {command.name} (exit code {code}{said and ': '}{said})"
            )
        name = signal.Signals(-code).name
        if name == "SIGILL":
            raise UserError(
                f"{self._bundle.library}: built for {target}, needs an instruction that "
                f"{self._cpu} does not have; build it for that CPU"
            )
        if name == "SIGKILL":
            raise UserError(
                f"{self._bundle.library}: its process was killed at {command.name} (SIGKILL), as "
                "Linux does when memory is short; end other programs, then try again"
            )
        self._refuse(f"crashed at {command.name} ({name})")

    def _refuse(self, what: str, advice: str = _AGAIN) -> NoReturn:
        raise UserError(f"{self._bundle.library}: {what}; {advice}")

    def _end(self) -> None:
        self._closed = True
        self.end(0)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def compile_runner(
    folder: Path,
    triple: str,
    options: Sequence[str],
    *,
    inputs: int = 1,
    outputs: int = 1,
) -> Path:
    """Compile runner.c into ``folder``; zig's cache makes all but the first time quick.

    Args:
        triple: the target, as zig names it.
        options: more compiler options, and libraries; where one does not fit, it is a UserError.
        inputs, outputs: how many pointers of each the library's ``run`` takes.
    """
    output = folder / "runner"
    taken = [f"inputs[{index}].data" for index in range(inputs)]
    given = [f"outputs[{index}].data" for index in range(outputs)]
    types = ["const void *"] * inputs + ["void *"] * outputs
    common = (
        *("-target", triple, "-std=c99", "-O2", "-s"),
        *(f"-DINPUTS={inputs}", f"-DOUTPUTS={outputs}"),
        f"-DTYPES={', '.join(types)}",
        f"-DPOINTERS={', '.join([*taken, *given])}",
    )
    run_zig("cc", output, *common, SOURCE, *options, advice="build it again")
    return output
