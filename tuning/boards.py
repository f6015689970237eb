"""Candidates measured on boards over TVM RPC: several at once, and one that goes away is waited for."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

from devices.board import board_state
from devices.sessions.rpc import Link, RefusedError, request_board
from devices.sessions.session import Origin
from devices.transport.ssh import open_server
from targets.errors import UserError
from targets.presets import Target
from targets.toolchain import link_shared
from tuning.measure import RUNTIME_DEVICE, Kernel
from tuning.workers import Failure

_CALL_SECONDS = 120.0
_PROBE_SECONDS = 10.0
# How long a board that went away is waited for, and how often it is looked for.
_ABSENCE_SECONDS = 900.0
_RETRY_SECONDS = 2.0
# A candidate during which the connection was lost so often is to blame for it.
_LOSSES = 2
# threading::ThreadGroup::kBig (tvm/runtime/threading_backend.h)
_BIG_CORES = 1
_REPEATS = 3
_REPEAT_MILLISECONDS = 20


class Board(NamedTuple):
    """A board, for a message and for a connection.

    Attributes:
        find: its host, port and key; asked anew for each connection.
    """

    name: str
    find: Callable[[], tuple[str, int, str]]


def at(host: str, port: int, key: str) -> Board:
    """The board whose RPC server is at an address."""
    return Board(f"{host}:{port}", lambda: (host, port, key))


def of_tracker(host: str, port: int, key: str) -> list[Board]:
    """All boards that a tracker has under a key, free or busy.

    Raises:
        UserError: no tracker there, or no board with that key (the keys that there are are named).
    """

    def find() -> tuple[str, int, str]:
        return request_board(host, port, key, _CALL_SECONDS, _PROBE_SECONDS)

    # Asks the tracker everything that can be missing; the board found so is free again when hung up.
    _hang_up(*_connect(Board(key, find)))
    from tvm import rpc

    servers = rpc.connect_tracker(host, port).summary()["server_info"]
    count = sum(server["key"].removeprefix("server:") == key for server in servers)
    return [
        Board(f"{key} {i + 1} of {host}:{port}", find) for i in range(max(count, 1))
    ]


def over_ssh(destination: str, key: str | None, cleanup: ExitStack) -> Board:
    """The board that ssh reaches, through a tunnel that is dug anew for each connection.

    Args:
        cleanup: closes the last one.
    """
    tunnel = cleanup.enter_context(ExitStack())

    def find() -> tuple[str, int, str]:
        tunnel.close()
        served = tunnel.enter_context(open_server(destination, key))
        return "127.0.0.1", served.port, served.key

    return Board(destination, find)


class BoardMeasurer:
    """On boards, linked on this machine, caches warm. The times of emulated ones are not a board's, and say so.

    Raises:
        UserError: a board does not answer, or is something else; some boards are emulated and others not.
    """

    def __init__(
        self,
        target: Target,
        boards: Sequence[Board],
        threads: int,
        absence: float = _ABSENCE_SECONDS,
    ) -> None:
        self._target, self._boards, self._threads = target, list(boards), threads
        self._absence = absence
        self._stopped = threading.Event()
        self.origin = _origin(self._boards)
        names = ", ".join(board.name for board in boards)
        self.how = f"{self.origin}: {names} over RPC, {threads} thread(s), warm caches"

    def measure(self, kernels: Sequence[Kernel]) -> list[list[float] | Failure]:
        batch = _Batch(kernels)
        with ThreadPoolExecutor(len(self._boards)) as threads:
            ends = [threads.submit(self._serve, board, batch) for board in self._boards]
            errors = [end.result() for end in ends]
        if batch.missing() and not self._stopped.is_set():
            raise next(error for error in errors if error)
        gone = Failure(RUNTIME_DEVICE, "the search ended")
        return [batch.results.get(i, gone) for i in range(len(kernels))]

    def _serve(self, board: Board, batch: _Batch) -> UserError | None:
        """Measure on one board what no other does, until the batch is whole; why the board was given up."""
        connection: tuple[Link, Any] | None = None
        try:
            while batch.missing() and not self._stopped.is_set():
                if connection is None:
                    connection = self._wait_for(board, batch)
                    continue
                index = batch.take()
                if index is None:
                    self._stopped.wait(0.05)
                    continue
                try:
                    batch.results[index] = self._time(*connection, batch.kernels[index])
                except RefusedError as error:
                    batch.results[index] = Failure(RUNTIME_DEVICE, str(error))
                except UserError as error:
                    batch.give_back(index, str(error))
                    _hang_up(*connection)
                    connection = None
        except UserError as error:
            return error
        finally:
            if connection:
                _hang_up(*connection)
        return None

    def _wait_for(self, board: Board, batch: _Batch) -> tuple[Link, Any] | None:
        until = time.monotonic() + self._absence
        while batch.missing() and not self._stopped.is_set():
            try:
                link, remote = _connect(board)
                link(lambda r=remote: self._set_threads(r))  # type: ignore[misc]
                return link, remote
            except UserError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"{error} (waited {self._absence:g} s for it; what was measured is kept: run the "
                        "command again when the board is there)"
                    ) from None
            self._stopped.wait(_RETRY_SECONDS)
        return None

    def _set_threads(self, remote: Any) -> None:
        remote.get_function("runtime.config_threadpool")(_BIG_CORES, self._threads)

    def _time(self, link: Link, remote: Any, kernel: Kernel) -> list[float] | Failure:
        import tvm

        library = kernel.path.with_suffix(".so")
        try:
            link_shared([kernel.path], library, self._target)
        except UserError as error:
            return Failure(RUNTIME_DEVICE, str(error))

        def run() -> list[float]:
            remote.upload(str(library))
            try:
                function = remote.load_module(library.name)
                fill = remote.get_function("tvm.contrib.random.random_fill")
                arrays = [
                    tvm.nd.empty(shape, "float32", remote.cpu())
                    for shape in kernel.shapes
                ]
                for array in arrays:
                    fill(array)
                evaluate = function.time_evaluator(
                    function.entry_name,
                    remote.cpu(),
                    number=1,
                    repeat=_REPEATS,
                    min_repeat_ms=_REPEAT_MILLISECONDS,
                )
                return [statistics.median(evaluate(*arrays).results)]
            finally:
                remote.remove(library.name)

        return link(run)

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self._stopped.set()


class _Batch:
    """What several boards share: kernels that wait, and results."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = kernels
        self.results: dict[int, list[float] | Failure] = {}
        self._waiting = deque(range(len(kernels)))
        self._losses: Counter[int] = Counter()

    def missing(self) -> bool:
        return len(self.results) < len(self.kernels)

    def take(self) -> int | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def give_back(self, index: int, reason: str) -> None:
        self._losses[index] += 1
        if self._losses[index] >= _LOSSES:
            self.results[index] = Failure(RUNTIME_DEVICE, reason)
        else:
            self._waiting.append(index)


def _origin(boards: Sequence[Board]) -> Origin:
    emulated = [_is_emulated(board) for board in boards]
    if any(emulated) and not all(emulated):
        names = ", ".join(
            board.name for board, each in zip(boards, emulated, strict=True) if each
        )
        raise UserError(
            f"{names}: emulated, other boards are not; their times are not comparable: tune on either"
        )
    return Origin.EMULATED if all(emulated) else Origin.BOARD


def _is_emulated(board: Board) -> bool:
    link, remote = _connect(board)
    try:
        said = link(lambda: board_state.ask(remote))
    finally:
        _hang_up(link, remote)
    return said is not None and board_state.parse(said, board.name).emulated


def _connect(board: Board) -> tuple[Link, Any]:
    host, port, key = board.find()
    link = Link(host, port, _CALL_SECONDS, _PROBE_SECONDS)
    return link, link.connect(key)


def _hang_up(link: Link, _remote: Any) -> None:
    link.close()
