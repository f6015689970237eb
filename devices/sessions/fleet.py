"""One or more boards with the same bundle: inputs spread over them, and one that goes away waited for or done without."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from threading import Condition, Event, Thread
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from bundle.store import Bundle
from devices.board.board_state import BoardState
from devices.sessions.rpc import LostError, Note, boards_of, open_rpc, request_board
from devices.sessions.session import OperatorTime, Origin, Session
from devices.transport.ssh import open_server
from targets.errors import UserError

T = TypeVar("T")
Array = NDArray[np.float32]

_RETRY_SECONDS = 0.5
_TRACKER_SECONDS = 5.0
# For a board that a tracker called free.
_FREE_SECONDS = 3.0
# An input with which boards went away so often is to blame for it.
_LOSSES = 3
# Results that wait for an earlier one, a board.
_AHEAD = 4


class Opened(NamedTuple):
    """A bundle on a board; ``name`` is the board's, for the report."""

    name: str
    session: Session


Open = Callable[[], Opened]


class _Member:
    def __init__(self, open_again: Open, opened: Opened) -> None:
        self.open_again = open_again
        self.name = opened.name
        self.session: Session | None = opened.session


class Fleet:
    """A `Session` over several boards. What is timed or profiled runs on the first one that is there.

    Args:
        boards: the bundle, open on each, and what opens it again.
        patience: seconds that a board which went away is waited for.
        on_note: called with a line when a board goes away or comes back, from any thread.

    Attributes:
        done: how many inputs each board did.
    """

    def __init__(
        self,
        boards: Sequence[tuple[Open, Opened]],
        patience: float,
        on_note: Note = lambda line: None,
    ) -> None:
        self._members = [_Member(*board) for board in boards]
        self._patience = patience
        self._on_note = on_note
        self._closing = Event()
        first = boards[0][1].session
        self.origin, self.threads = first.origin, first.threads
        self.done = Counter({opened.name: 0 for _, opened in boards})

    def run(self, tensor: Array) -> list[Array]:
        """As `Session.run`, again where the board went away and came back.

        Raises:
            UserError: it did not come back in time.
        """
        return self._insist(self._members[0], tensor)

    def run_all(
        self, items: Iterable[T], tensor: Callable[[T], Array]
    ) -> Iterator[tuple[T, list[Array]]]:
        """Every item with its outputs, in order; ``items`` is read as boards get free, by their threads.

        Raises:
            UserError: no board is left, or an item takes every board down.
        """
        if len(self._members) == 1:
            for item in items:
                yield item, self._insist(self._members[0], tensor(item))
            return
        work = _Work(items, _AHEAD * len(self._members))
        threads = [
            Thread(target=self._serve, args=(member, work, tensor), daemon=True)
            for member in self._members
        ]
        for thread in threads:
            thread.start()
        try:
            yield from work.results(threads)
        finally:
            work.stop()

    def _insist(self, member: _Member, tensor: Array) -> list[Array]:
        losses = 0
        while True:
            try:
                outputs = self._here(member).run(tensor)
            except LostError as error:
                losses += 1
                self._lose(member, error)
                if losses == _LOSSES or not self._reopen(member, lambda: True):
                    raise
            else:
                self.done[member.name] += 1
                return outputs

    def _serve(
        self, member: _Member, work: _Work[T], tensor: Callable[[T], Array]
    ) -> None:
        while member.session is not None or self._reopen(member, work.wants_more):
            job = work.take()
            if job is None:
                return
            index, item = job
            try:
                outputs = self._here(member).run(tensor(item))
            except LostError as error:
                self._lose(member, error)
                work.give_back(index, item, error)
            except BaseException as error:  # noqa: BLE001 - handed over, not handled
                work.fail(error)
                return
            else:
                self.done[member.name] += 1
                work.finish(index, item, outputs)

    def _here(self, member: _Member) -> Session:
        if member.session is None:
            raise LostError(f"{member.name}: is gone; run the command again")
        return member.session

    def _lose(self, member: _Member, error: UserError) -> None:
        if not self._closing.is_set():
            self._on_note(f"{error}")
            self._on_note(
                f"waiting up to {self._patience:g} s for {member.name} to come back"
            )
        session, member.session = member.session, None
        if session is not None:
            session.close()

    def _reopen(self, member: _Member, wanted: Callable[[], bool]) -> bool:
        """Whether the board came back within the patience, and while it was wanted."""
        end = time.monotonic() + self._patience
        while wanted() and not self._closing.wait(_RETRY_SECONDS):
            # It may still be away, or at its start.
            with suppress(UserError):
                opened = member.open_again()
                _check_alike(opened, self.origin)
                member.name, member.session = opened
                self._on_note(f"{member.name} is back")
                return True
            if time.monotonic() > end:
                return False
        return False

    def time(self, tensor: Array, repeat: int) -> list[float]:
        """As `Session.time`."""
        return self._first().time(tensor, repeat)

    def profile(self, tensor: Array) -> list[OperatorTime]:
        """As `Session.profile`."""
        return self._first().profile(tensor)

    def board(self) -> BoardState | None:
        """As `Session.board`."""
        return self._first().board()

    def _first(self) -> Session:
        for member in self._members:
            if member.session is not None:
                return member.session
        raise UserError("no board is left; run the command again")

    def close(self) -> None:
        self._closing.set()
        for member in self._members:
            session, member.session = member.session, None
            if session is not None:
                session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Work(Generic[T]):
    """Items for several threads, and their results in order."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._items = enumerate(items)
        self._ahead = ahead
        self._changed = Condition()
        self._returned: deque[tuple[int, T]] = deque()
        self._losses: Counter[int] = Counter()
        self._results: dict[int, tuple[T, list[Array]]] = {}
        self._running = 0
        self._next = 0
        self._exhausted = self._stopped = False
        self._error: BaseException | None = None
        self._last_loss: UserError | None = None

    def take(self) -> tuple[int, T] | None:
        """The next item; None where there are no more and nobody may give one back."""
        with self._changed:
            while not self._stopped:
                if self._returned:
                    self._running += 1
                    return self._returned.popleft()
                if not self._exhausted and len(self._results) < self._ahead:
                    try:
                        job = next(self._items)
                    except StopIteration:
                        self._exhausted = True
                        self._changed.notify_all()
                        continue
                    except BaseException as error:  # noqa: BLE001 - handed over
                        self._fail(error)
                        return None
                    self._running += 1
                    return job
                if self._exhausted and not self._running:
                    return None
                self._changed.wait(1)
            return None

    def give_back(self, index: int, item: T, error: UserError) -> None:
        with self._changed:
            self._running -= 1
            self._losses[index] += 1
            self._last_loss = error
            if self._losses[index] >= _LOSSES:
                self._fail(error)
            else:
                self._returned.appendleft((index, item))
            self._changed.notify_all()

    def finish(self, index: int, item: T, outputs: list[Array]) -> None:
        with self._changed:
            self._running -= 1
            self._results[index] = (item, outputs)
            self._changed.notify_all()

    def wants_more(self) -> bool:
        with self._changed:
            left = self._returned or self._running or not self._exhausted
            return bool(left) and not self._stopped

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stopped = True
        self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def results(self, threads: Sequence[Thread]) -> Iterator[tuple[T, list[Array]]]:
        while True:
            with self._changed:
                while self._next not in self._results:
                    if self._error is not None:
                        raise self._error
                    if self._exhausted and not self._running and not self._returned:
                        return
                    if not any(thread.is_alive() for thread in threads):
                        raise self._last_loss or UserError(
                            "no board is left; run the command again"
                        )
                    self._changed.wait(0.2)
                result = self._results.pop(self._next)
                self._next += 1
                self._changed.notify_all()
            yield result


def _check_alike(opened: Opened, origin: Origin) -> None:
    """Keep emulated boards and real ones apart, whose times must not be taken for each other's."""
    if opened.session.origin is not origin:
        opened.session.close()
        raise UserError(
            f"{opened.name}: {opened.session.origin}, the others {origin}; give them a key of their own"
        )


def open_board(open_it: Open, patience: float, on_note: Note) -> Fleet:
    """A fleet of one.

    Raises:
        UserError: as ``open_it`` does.
    """
    return Fleet([(open_it, open_it())], patience, on_note)


def at(
    bundle: Bundle,
    host: str,
    port: int,
    key: str,
    *,
    threads: int | None = None,
    wait: float,
    on_note: Note,
) -> Open:
    """The board whose RPC server is at ``host:port``."""

    def open_it() -> Opened:
        session = open_rpc(
            bundle, host, port, key=key, threads=threads, wait=wait, on_note=on_note
        )
        return Opened(f"{host}:{port}", session)

    return open_it


def through_ssh(
    bundle: Bundle,
    destination: str,
    key: str | None,
    *,
    threads: int | None = None,
    wait: float,
    on_note: Note,
) -> Open:
    """A board that ssh reaches: its running server, or its kit's for as long as the session."""

    def open_it() -> Opened:
        with ExitStack() as stack:
            served = stack.enter_context(open_server(destination, key))
            if served.started:
                on_note(f"started ~/netship/serve on {destination} for this command")
            session = open_rpc(
                bundle,
                "127.0.0.1",
                served.port,
                key=served.key,
                threads=threads,
                wait=wait,
                name=destination,
                cleanup=stack.pop_all(),
                on_note=on_note,
            )
            return Opened(destination, session)

    return open_it


def open_fleet(
    bundle: Bundle,
    host: str,
    port: int,
    key: str,
    *,
    most: int,
    threads: int | None = None,
    wait: float,
    priority: int = 1,
    on_note: Note,
) -> Fleet:
    """Every free board that a tracker has under ``key``, at most ``most``; the first is waited for.

    Raises:
        UserError: as `devices.sessions.rpc.open_tracker` for the first board.
    """

    def open_any(seconds: float) -> Opened:
        board_host, board_port, match = request_board(
            host, port, key, seconds, _TRACKER_SECONDS, priority, on_note
        )
        session = open_rpc(
            bundle, board_host, board_port, key=match, threads=threads, wait=seconds
        )
        return Opened(f"{board_host}:{board_port}", session)

    def open_again() -> Opened:
        return open_any(_FREE_SECONDS)

    with ExitStack() as stack:
        opened = [open_any(wait)]
        stack.callback(opened[0].session.close)
        for _ in range(min(boards_of(host, port, key).free, most - 1)):
            try:
                another = open_any(_FREE_SECONDS)
                _check_alike(another, opened[0].session.origin)
            except UserError as error:
                on_note(f"done without a board: {error}")
                continue
            stack.callback(another.session.close)
            opened.append(another)
        stack.pop_all()
    return Fleet([(open_again, one) for one in opened], wait, on_note)
