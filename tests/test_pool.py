"""The pool of boards with boards that are objects of this process: who does what, and what is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from netship.devices.transport.link import LostError
from netship.devices.transport.pool import Pool
from netship.targets.errors import UserError


class Connection:
    def __init__(self, board: Board) -> None:
        self.board, self.name, self.closed = board, board.name, False

    def close(self) -> None:
        self.closed = True


class Board:
    """``away``: how many times it cannot be connected to from now on; for ever where negative."""

    def __init__(self, name: str, away: int = 0) -> None:
        self.name, self.away = name, away
        self.connections: list[Connection] = []

    def connect(self) -> Connection:
        if self.away:
            self.away -= 1
            raise UserError(f"{self.name}: nobody listens")
        self.connections.append(Connection(self))
        return self.connections[-1]

    @property
    def open(self) -> int:
        return sum(not connection.closed for connection in self.connections)


def pool(*boards: Board, patience: float = 20, **options: object) -> Pool[Connection]:
    places = [(board.connect, None) for board in boards]
    return Pool(places, patience, 3, **options)  # type: ignore[arg-type]


def lose(connection: Connection) -> LostError:
    return LostError(f"{connection.name}: the connection was lost")


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_every_item_comes_back_in_order(count: int, ahead: int) -> None:
    def work(_: Connection, item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item * item

    with closing(pool(*(Board(f"b{i}") for i in range(count)))) as boards:
        assert list(boards.map(work, [], ahead)) == []
        done = list(boards.map(work, range(50), ahead))
        assert done == [(item, item * item) for item in range(50)]
        assert boards.do(work, 7) == 49


def test_items_are_read_no_further_than_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    with closing(pool(Board("a"), Board("b"))) as boards:
        results = boards.map(lambda _, item: item, items(), 4)
        for expected in range(10):
            assert next(results) == (expected, expected)
            assert len(read) <= expected + 5


def test_a_board_that_goes_away_leaves_its_item_to_the_others_and_comes_back() -> None:
    one, other, notes = Board("one"), Board("other"), list[str]()
    lost = threading.Event()

    def work(connection: Connection, item: int) -> str:
        if connection.board is one and not lost.is_set():
            lost.set()
            one.away = 1
            raise lose(connection)
        # Long enough for the first one to be back.
        lost.wait(20)
        time.sleep(0.05)
        return connection.name

    with closing(pool(one, other, on_note=notes.append)) as boards:
        done = [name for _, name in boards.map(work, range(40), 8)]
    assert len(done) == 40 and set(done) == {"one", "other"}
    assert notes == [
        "one: the connection was lost",
        "waiting up to 20 s for one to come back",
        "one is back",
    ]
    assert len(one.connections) == 2 and one.open == other.open == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_item_that_takes_boards_down_is_given_up(count: int) -> None:
    tries: list[int] = []

    def work(connection: Connection, item: int) -> str:
        if item == 3:
            tries.append(item)
            raise lose(connection)
        return "done"

    with closing(pool(*(Board(f"b{i}") for i in range(count)))) as boards:
        done = dict(boards.map(work, range(6), 6, lambda error: f"blamed: {error}"))
        assert len(tries) == 3
        assert done.pop(3).startswith("blamed: b")
        assert list(done.values()) == ["done"] * 5
        with pytest.raises(LostError, match="the connection was lost"):
            list(boards.map(work, range(6), 6))
        assert len(tries) == 6


def test_a_board_that_stays_away_is_done_without_and_the_last_one_is_the_end() -> None:
    one, other = Board("one"), Board("other")

    def work(connection: Connection, item: int) -> int:
        if item >= 5 and connection.board is one:
            one.away = -1
            raise lose(connection)
        time.sleep(0.01)
        return item

    with closing(pool(one, other, patience=0.2)) as boards:
        assert len(list(boards.map(work, range(30), 4))) == 30
        other.away = -1
        boards.hang_up()
        words = r"nobody listens \(waited 0.2 s for it\); run the command again"
        with pytest.raises(LostError, match=words):
            list(boards.map(work, range(30), 4))
        with pytest.raises(UserError, match="no board is left"):
            boards.first()


@pytest.mark.parametrize("broken", ["work", "items", "connect"])
def test_any_other_error_ends_the_map(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError

    def items() -> Iterator[int]:
        yield 0
        if broken == "items":
            fail()
        yield 1

    boards = Board("a"), Board("b")
    if broken == "connect":
        for board in boards:
            monkeypatch.setattr(board, "connect", fail)
    work: Callable[[Connection, int], int] = (
        fail if broken == "work" else lambda _, item: item
    )
    with closing(pool(*boards)) as shared, pytest.raises(ZeroDivisionError):
        list(shared.map(work, items(), 4))


def test_what_is_done_when_the_pool_is_stopped_is_not_lost() -> None:
    hung, boards = threading.Event(), pool(Board("a"), Board("b"))
    finished: list[int] = []

    def work(connection: Connection, item: int) -> int:
        if item == 0:
            hung.wait(20)
            raise lose(connection)
        finished.append(item)
        if len(finished) == 9:
            boards.stop()
        return item

    results = list(boards.map(work, range(10), 10))
    assert results == [(item, item) for item in range(1, 10)]
    hung.set()
    boards.close()
    with pytest.raises(LostError, match="run the command again"):
        boards.do(work, 1)


def test_a_loss_is_no_reason_any_more_after_connections_were_let_go() -> None:
    one, other, lost = Board("one"), Board("other"), threading.Event()

    def work(connection: Connection, item: int) -> str:
        if connection.board is one:
            one.away = -1
            lost.set()
            raise lose(connection)
        assert lost.wait(20)
        return connection.name

    with closing(pool(one, other, patience=0.2)) as boards:
        done = list(boards.map(work, range(2), 2))
        assert done == [(0, "other"), (1, "other")]
        other.away = -1
        boards.hang_up()
        with pytest.raises(LostError, match="nobody listens"):
            boards.do(work, 3)


def test_connections_are_opened_again_after_they_were_let_go() -> None:
    board = Board("a")
    with closing(pool(board)) as boards:
        for number in (1, 2):
            assert boards.do(lambda connection, _: connection.name, None) == "a"
            assert boards.first().name == "a"
            boards.hang_up()
            assert (len(board.connections), board.open) == (number, 0)
