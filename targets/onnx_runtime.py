"""ONNX Runtime on this machine's CPU: every session of the product is made here, with the same settings.

It was seen to end by SIGSEGV on small valid models, so sessions live in a process of their own
(targets/onnx_runtime_server.py), one for all of them.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from netship.targets.disk import why_full
from netship.targets.errors import UserError, ended_from_outside

Array = NDArray[Any]
Optimisation = Literal["none", "basic", "all"]

# What its messages say of its own sources, and before what is wrong.
_INTERNAL = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Non-zero status code returned while running |"
    r"/onnxruntime_src/\S+ .*? was false\. "
)
_FEWER: dict[Optimisation, Optimisation] = {"all": "basic", "basic": "none"}


class Session:
    """A model in ONNX Runtime's CPU provider; its telemetry is off since ``targets`` was imported.

    Where ONNX Runtime crashes on the model, fewer optimisations are tried.

    Args:
        model: serialised ONNX.
        name: of the model, for errors.
        threads: of one operator; operators run one after the other.
        optimisation: "basic" keeps to operators of ONNX.
        optimised: a file that the optimised graph is written to.
        disabled: names of its graph transformers that are left out.

    Attributes:
        version: of ONNX Runtime, with its optimisations where they are fewer than asked for.

    Raises:
        UserError: ONNX Runtime refuses the model, or crashes on it.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        *,
        threads: int = 1,
        optimisation: Optimisation = "all",
        optimised: Path | None = None,
        disabled: Sequence[str] = (),
    ) -> None:
        self._model, self._name = model, name
        self._threads, self._optimised = threads, optimised
        self._disabled = list(disabled)
        self._optimisation = self._asked = optimisation
        self._open()

    def _open(self) -> None:
        self._server = _server()
        optimised = str(self._optimised.resolve()) if self._optimised else None
        options = (self._threads, self._optimisation, optimised, self._disabled)
        try:
            opened = self._server.ask("open", self._model, *options)
        except _Crash as crash:
            self._try_fewer_optimisations(crash)
            return
        except _Refusal as error:
            folder = self._optimised.parent if self._optimised else None
            if folder and (full := why_full(folder)):
                raise UserError(f"{folder}: {full}; make room there") from None
            raise UserError(
                f"{self._name}: ONNX Runtime refuses it ({error}); export it again"
            ) from None
        self._key, version = opened
        fewer = self._optimisation != self._asked
        how = f" with optimisations: {self._optimisation}" if fewer else ""
        self.version = f"onnxruntime {version}{how}"
        weakref.finalize(self, self._server.unused.append, self._key)

    def _try_fewer_optimisations(self, crash: _Crash) -> None:
        fewer = _FEWER.get(self._optimisation)
        if fewer is None:
            raise UserError(
                f"{self._name}: ONNX Runtime crashes on it ({crash}), so there is nothing to compare with; "
                "export it with another opset, or report the model to ONNX Runtime"
            ) from None
        self._optimisation = fewer
        self._open()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        """One inference: the outputs named, in that order.

        Raises:
            UserError: an operator refuses its inputs: ONNX Runtime looks at many shapes here only.
        """
        found: list[Array] = self._ask("run", list(outputs), dict(inputs))
        return found

    def time(
        self, outputs: Sequence[str], inputs: Mapping[str, Array], repeat: int
    ) -> list[float]:
        """Seconds of each of ``repeat`` inferences.

        Raises:
            UserError: as `run`.
        """
        seconds: list[float] = self._ask("time", list(outputs), dict(inputs), repeat)
        return seconds

    def _ask(self, what: str, *arguments: object) -> Any:
        if self._server.ended:
            self._open()
        try:
            return self._server.ask(what, self._key, *arguments)
        except _Crash as crash:
            self._try_fewer_optimisations(crash)
            return self._ask(what, *arguments)
        except _Refusal as error:
            raise UserError(
                f"{self._name}: ONNX Runtime cannot run it ({error}); "
                "check --input-shape and the sizes in the graph, or export it again"
            ) from None


class _Refusal(Exception):
    """ONNX Runtime's own words."""


class _Crash(Exception):
    """The signal of a crash that ended ONNX Runtime."""


class _Server:
    """The process that ONNX Runtime runs in.

    Attributes:
        ended: it crashed or was interrupted; its sessions went with it.
        unused: keys of sessions that it can forget.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.ended = False
        self.unused: list[int] = []
        self._lock = threading.Lock()
        paths = map(os.path.abspath, sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    f"{__name__}_server",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                # It imports from where this process does.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for this process, which ends that one.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    def ask(self, *question: object) -> Any:
        """The answer of targets/onnx_runtime_server.py.

        Raises:
            _Refusal: ONNX Runtime's own error.
            _Crash: it crashed.
            UserError: something else ended it.
        """
        with self._lock:
            try:
                # What is appended meanwhile goes with the next question.
                unused = [self.unused.pop() for _ in range(len(self.unused))]
                self._connection.send((unused, *question))
                kind, answer = self._connection.recv()
            except (EOFError, OSError):
                raise self._why_ended() from None
            except BaseException:
                # An answer that nobody waits for must not be taken for the next one's.
                self._process.kill()
                self._end()
                raise
        if kind == "refused":
            raise _Refusal(_reason(answer))
        return answer

    def _why_ended(self) -> Exception:
        code = self._end()
        if code >= 0:
            return UserError(
                f"ONNX Runtime's process ended (exit code {code}); run make setup again, "
                "and report it if it stays so"
            )
        name = signal.Signals(-code).name
        if outside := ended_from_outside(name):
            return UserError(f"ONNX Runtime's process {outside}")
        return _Crash(name)

    def _end(self) -> int:
        self.ended = True
        self._connection.close()
        return self._process.wait()


_lock = threading.Lock()
_running: list[_Server] = []


def _server() -> _Server:
    """The process of all sessions; a new one where the last one ended."""
    with _lock:
        if not _running or _running[-1].ended:
            _running[:] = [_Server()]
        return _running[-1]


def _reason(said: str) -> str:
    return _INTERNAL.sub("", said)[:300]
