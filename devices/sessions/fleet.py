"""One or more boards with the same bundle, as one session: inputs are spread over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from netship.bundle.store import Bundle
from netship.devices.board.board_state import BoardState
from netship.devices.sessions.rpc import open_rpc
from netship.devices.sessions.session import OperatorTime, Origin, Outputs, Session
from netship.devices.transport.link import Address, Find, Note
from netship.devices.transport.pool import Pool
from netship.devices.transport.tracker import boards_of, request_board
from netship.targets.errors import UserError

T = TypeVar("T")
Array = NDArray[Any]

# Seconds for a board that the tracker lists as free.
_FREE_SECONDS = 3.0
_LOSSES = 3
# Inputs that are in work or wait, for each board.
_AHEAD = 4


class Opened(NamedTuple):
    """A bundle on a board; ``name`` is the board's, for the report."""

    name: str
    session: Session

    def close(self) -> None:
        self.session.close()


Open = Callable[[], Opened]


class Fleet(Session):
    """A session over several boards. What is timed or profiled runs on the first one that is there.

    A board that goes away leaves its inputs to the others and is waited for.

    Args:
        boards: what opens the bundle on each, and the bundle open there.
        patience: seconds that a board which went away is waited for.
        on_note: called with a line when a board goes away or comes back, from any thread.
    """

    done: Counter[str]

    def __init__(
        self,
        boards: Sequence[tuple[Open, Opened]],
        patience: float,
        on_note: Note = lambda line: None,
    ) -> None:
        first = boards[0][1].session
        self.origin, self.threads = first.origin, first.threads
        self.done = Counter({opened.name: 0 for _, opened in boards})
        self._ahead = _AHEAD * len(boards)
        alike = [(self._alike(open_it), opened) for open_it, opened in boards]
        self._pool = Pool(alike, patience, _LOSSES, on_note)

    def _alike(self, open_it: Open) -> Open:
        return lambda: _check_alike(open_it(), self.origin)

    def run(self, *tensors: Array) -> Outputs:
        """As `Session.run`, again where the board went away and came back.

        Raises:
            UserError: it did not come back in time.
        """
        return self._pool.do(self._run, tensors)

    def run_all(
        self, items: Iterable[T], tensors: Callable[[T], Sequence[Array]]
    ) -> Iterator[tuple[T, Outputs]]:
        """Every item with its outputs, in order; ``items`` is read as boards get free, by their threads.

        Raises:
            UserError: no board is left, or an item takes every board down.
        """
        return self._pool.map(
            lambda board, item: self._run(board, tensors(item)), items, self._ahead
        )

    def _run(self, board: Opened, tensors: Sequence[Array]) -> Outputs:
        outputs = board.session.run(*tensors)
        self.done[board.name] += 1
        return outputs

    def time(self, tensors: Sequence[Array], repeat: int) -> list[float]:
        """As `Session.time`."""
        return self._pool.first().session.time(tensors, repeat)

    def profile(self, tensors: Sequence[Array]) -> list[OperatorTime]:
        """As `Session.profile`."""
        return self._pool.first().session.profile(tensors)

    def board(self) -> BoardState | None:
        """As `Session.board`."""
        return self._pool.first().session.board()

    def close(self) -> None:
        self._pool.close()


def _check_alike(opened: Opened, origin: Origin) -> Opened:
    """Keep emulated boards and real ones apart: their times must not be mixed up."""
    if opened.session.origin is not origin:
        opened.close()
        raise UserError(
            f"{opened.name}: {opened.session.origin}, the others {origin}; give them a key of their own"
        )
    return opened


def opener(
    bundle: Bundle,
    find: Find,
    *,
    threads: int | None = None,
    wait: float,
    on_note: Note = lambda line: None,
) -> Open:
    """What opens the bundle on the board that ``find`` leads to, as `open_rpc`."""

    def open_it() -> Opened:
        with ExitStack() as stack:
            address = stack.enter_context(find())
            session = open_rpc(
                bundle,
                address,
                threads=threads,
                wait=wait,
                cleanup=stack.pop_all(),
                on_note=on_note,
            )
            return Opened(str(address), session)

    return open_it


def open_fleet(
    bundle: Bundle,
    tracker: Address,
    *,
    most: int,
    threads: int | None = None,
    wait: float,
    priority: int = 1,
    on_note: Note,
) -> Fleet:
    """Every free board that a tracker has under a key, at most ``most``; the first is waited for.

    Raises:
        UserError: no tracker there, no board with that key, all are busy; and as `open_rpc`, for the first board.
    """

    def open_within(seconds: float) -> Open:
        def find() -> AbstractContextManager[Address]:
            return nullcontext(
                request_board(tracker, seconds, priority=priority, on_note=on_note)
            )

        return opener(bundle, find, threads=threads, wait=seconds)

    open_again = open_within(_FREE_SECONDS)
    with ExitStack() as stack:
        opened = [open_within(wait)()]
        stack.callback(opened[0].close)
        for _ in range(min(boards_of(tracker).free, most - 1)):
            try:
                another = _check_alike(open_again(), opened[0].session.origin)
            except UserError as error:
                on_note(f"done without a board: {error}")
                continue
            stack.callback(another.close)
            opened.append(another)
        stack.pop_all()
    return Fleet([(open_again, one) for one in opened], wait, on_note)
