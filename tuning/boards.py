"""Candidates measured on boards over TVM RPC, on several at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

from netship.devices.sessions.rpc import describe
from netship.devices.sessions.session import Origin
from netship.devices.transport.link import (
    Address,
    Find,
    Link,
    LostError,
    RefusedError,
    limit_threads,
)
from netship.devices.transport.pool import Pool
from netship.devices.transport.ssh import open_server
from netship.devices.transport.tracker import boards_of, request_board
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.presets import Target
from netship.targets.toolchain import link_shared
from netship.tuning.measure import RUNTIME_DEVICE, Kernel
from netship.tuning.workers import Failure

_CALL_SECONDS = 120.0
_PROBE_SECONDS = 10.0
# How long a board that went away is waited for.
_PATIENCE_SECONDS = 900.0
_LOSSES = 2
_REPEATS = 3
_REPEAT_MILLISECONDS = 20


class Board(NamedTuple):
    """A board, for a message and for a connection."""

    name: str
    find: Find


def of_address(address: Address) -> Board:
    """The board whose RPC server is at ``address``."""
    return Board(str(address), lambda: nullcontext(address))


def of_tracker(tracker: Address) -> list[Board]:
    """All boards that a tracker has under a key, free or busy."""

    def find() -> AbstractContextManager[Address]:
        return nullcontext(
            request_board(tracker, _CALL_SECONDS, timeout=_PROBE_SECONDS)
        )

    count = boards_of(tracker).boards
    return [Board(f"{tracker.key} {i + 1} of {tracker}", find) for i in range(count)]


def of_ssh(destination: str, key: str | None) -> Board:
    """The board that ssh reaches, with a tunnel of its own for each connection."""
    return Board(destination, lambda: open_server(destination, key))


class _Connection(NamedTuple):
    name: str
    link: Link
    remote: Any
    cleanup: ExitStack

    def close(self) -> None:
        self.cleanup.close()


class BoardMeasurer:
    """On boards, linked on this machine, caches warm. The times of emulated boards are not a board's, and say so."""

    def __init__(
        self,
        target: Target,
        boards: Sequence[Board],
        threads: int,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        self._target, self._threads = target, threads
        self.origin = _origin(boards)
        names = ", ".join(board.name for board in boards)
        self.how = f"{self.origin}: {names} over RPC, {counted(threads, 'thread')}, warm caches"
        places = [(self._connect(board), None) for board in boards]
        self._pool: Pool[_Connection] = Pool(places, patience, _LOSSES)

    def _connect(self, board: Board) -> Callable[[], _Connection]:
        def connect() -> _Connection:
            with ExitStack() as stack:
                address = stack.enter_context(board.find())
                link = Link(address, _CALL_SECONDS, _PROBE_SECONDS)
                stack.callback(link.close)
                remote = link.connect()
                link(lambda: limit_threads(remote, self._threads))
                return _Connection(board.name, link, remote, stack.pop_all())

        return connect

    def measure(self, kernels: Sequence[Kernel]) -> list[list[float] | Failure]:
        results: dict[int, list[float] | Failure] = {}
        try:
            for (index, _), result in self._pool.map(
                lambda board, item: self._time(board.link, board.remote, item[1]),
                enumerate(kernels),
                ahead=len(kernels),
                give_up=lambda error: Failure(RUNTIME_DEVICE, str(error)),
            ):
                results[index] = result
        except LostError as error:
            if not self._pool.stopped.is_set():
                raise UserError(f"{error}; what was measured is kept") from None
        finally:
            self._pool.hang_up()
        stopped = Failure(RUNTIME_DEVICE, "the search ended")
        return [results.get(index, stopped) for index in range(len(kernels))]

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
                    tvm.nd.empty(shape, dtype, remote.cpu())
                    for shape, dtype in zip(kernel.shapes, kernel.dtypes, strict=True)
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

        try:
            return link(run)
        except RefusedError as error:
            return Failure(RUNTIME_DEVICE, str(error))

    def stop(self) -> None:
        self._pool.stop()

    def close(self) -> None:
        self._pool.close()


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
    with board.find() as address:
        state = describe(address, _CALL_SECONDS)
    return state is not None and state.emulated
