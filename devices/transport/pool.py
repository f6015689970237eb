"""Boards that share work. One that goes away leaves its work to the others, and is waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Generic, Protocol, TypeVar

from netship.devices.transport.link import LostError, Note
from netship.targets.errors import UserError

_RETRY_SECONDS = 0.5
_LOOK_SECONDS = 0.2


class Connection(Protocol):
    """What work on a board is done through; ``name`` is the board's, for messages."""

    @property
    def name(self) -> str: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Connection)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class _Board(Generic[C]):
    connect: Callable[[], C]
    connection: C | None
    # Why the connection was lost, until there is a new one.
    loss: LostError | None = None
    in_use: Lock = field(default_factory=Lock)


@dataclass(eq=False)
class _Job(Generic[T, R]):
    item: T
    losses: int = 0
    done: Future[R] = field(default_factory=Future)


class Pool(Generic[C]):
    """Boards, each with a connection that is opened when it is needed, and again when it was lost.

    Args:
        boards: what connects to each, and its connection where it has one already. To connect raises
            UserError while the board is away.
        patience: seconds that a board which is away is waited for.
        losses: an item during which boards went away so often is to blame for it.
        on_note: called with a line when a board goes away or comes back, from any thread.

    Attributes:
        stopped: set by `stop`.
    """

    def __init__(
        self,
        boards: Sequence[tuple[Callable[[], C], C | None]],
        patience: float,
        losses: int,
        on_note: Note = lambda line: None,
    ) -> None:
        self._boards = [_Board(*board) for board in boards]
        self._patience, self._losses, self._on_note = patience, losses, on_note
        self.stopped = Event()

    def map(
        self,
        work: Callable[[C, T], R],
        items: Iterable[T],
        ahead: int,
        give_up: Callable[[LostError], R] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Every item with the result of ``work``, in order; after `stop` those that are done.

        Args:
            work: raises LostError where the board goes away; any other error ends the map.
            items: read so far that ``ahead`` of them are being worked on or wait.
            give_up: the result of an item that is to blame for losses; where None, the loss ends the map.

        Raises:
            LostError: no board is left, or an item is to blame.
        """
        jobs: SimpleQueue[_Job[T, R] | None] = SimpleQueue()
        pending: deque[_Job[T, R]] = deque()
        source, ended, gone = iter(items), Event(), list[BaseException]()

        def attempt(job: _Job[T, R], board: _Board[C], connection: C) -> None:
            try:
                job.done.set_result(work(connection, job.item))
            except LostError as error:
                self._lose(board, error)
                job.losses += 1
                if job.losses < self._losses:
                    jobs.put(job)
                elif give_up:
                    job.done.set_result(give_up(error))
                else:
                    job.done.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - raised by the map
                job.done.set_exception(error)

        def serve(board: _Board[C]) -> None:
            # The thread of an earlier map may still be connecting.
            with board.in_use:
                try:
                    while connection := self._connected(board, ended):
                        if (job := jobs.get()) is None:
                            return
                        attempt(job, board, connection)
                except BaseException as error:  # noqa: BLE001 - raised by the map
                    gone.append(error)

        threads = [
            Thread(target=serve, args=(board,), daemon=True) for board in self._boards
        ]
        for thread in threads:
            thread.start()
        try:
            while not self.stopped.is_set():
                for item in islice(source, ahead - len(pending)):
                    pending.append(_Job(item))
                    jobs.put(pending[-1])
                if not pending:
                    return
                if wait([pending[0].done], _LOOK_SECONDS).done:
                    job = pending.popleft()
                    yield job.item, job.done.result()
                elif not any(thread.is_alive() for thread in threads):
                    raise gone[-1]
            for job in pending:
                if job.done.done():
                    yield job.item, job.done.result()
        finally:
            ended.set()
            for _ in threads:
                jobs.put(None)

    def do(self, work: Callable[[C, T], R], item: T) -> R:
        """The result of one item; a LostError as of `map`."""
        for _, result in self.map(work, [item], 1):
            return result
        raise LostError("the boards were let go; run the command again")

    def first(self) -> C:
        """The connection of the first board that is there."""
        for board in self._boards:
            if board.connection is not None:
                return board.connection
        raise UserError("no board is left; run the command again")

    def stop(self) -> None:
        """Give out no more work; from any thread, and from a signal handler."""
        self.stopped.set()

    def hang_up(self) -> None:
        """Close all connections; they are opened again when they are needed."""
        for board in self._boards:
            connection, board.connection, board.loss = board.connection, None, None
            if connection is not None:
                connection.close()

    def close(self) -> None:
        self.stop()
        self.hang_up()

    def _connected(self, board: _Board[C], ended: Event) -> C | None:
        """The board's connection, opened if need be; None where the map has ended."""
        end = time.monotonic() + self._patience
        while not (board.connection or ended.is_set() or self.stopped.is_set()):
            try:
                board.connection = board.connect()
            except UserError as error:
                if time.monotonic() > end:
                    loss, board.loss = board.loss, None
                    raise loss or LostError(
                        f"{error} (waited {self._patience:g} s for it); run the command again when it is there"
                    ) from None
                ended.wait(_RETRY_SECONDS)
            else:
                if board.loss:
                    self._on_note(f"{board.connection.name} is back")
                board.loss = None
        return board.connection

    def _lose(self, board: _Board[C], error: LostError) -> None:
        connection, board.connection = board.connection, None
        if connection is None:  # `hang_up` closed it
            return
        board.loss = error
        self._on_note(f"{error}")
        self._on_note(
            f"waiting up to {self._patience:g} s for {connection.name} to come back"
        )
        connection.close()
