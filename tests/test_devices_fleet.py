"""Several boards of one key, and what one of them does to the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from boards import HOST, KEY, Board, tracked
from numpy.typing import NDArray
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices.sessions.fleet import Fleet, Open, Opened, open_fleet, opener
from netship.devices.sessions.session import Origin
from netship.devices.transport.link import Address, LostError
from netship.targets.errors import UserError
from netship.targets.presets import native

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("fleet"), native())


def fleet(bundle: Bundle, port: int, notes: list[str], wait: float = 1) -> Fleet:
    return open_fleet(
        bundle, Address(HOST, port, KEY), most=64, wait=wait, on_note=notes.append
    )


def on(bundle: Bundle, server: Board, wait: float) -> Open:
    address = Address(HOST, server.port, KEY)
    return opener(bundle, lambda: nullcontext(address), wait=wait)


def expect_all_in_order(bundle: Bundle, done: list[tuple[int, list[Array]]]) -> None:
    pairs = read_golden(bundle)
    assert [index for index, _ in done] == list(range(len(done)))
    for index, [actual] in done:
        [expected] = pairs[index % len(pairs)][1]
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def tensors(bundle: Bundle) -> list[Array]:
    return [check.inputs[0] for check in read_golden(bundle)]


def test_every_free_board_does_some(bundle: Bundle, tmp_path: Path) -> None:
    images = tensors(bundle)
    with tracked(tmp_path, 3) as (port, _), fleet(bundle, port, []) as boards:
        numbers = iter(range(60))
        done = list(boards.run_all(numbers, lambda i: [images[i % len(images)]]))
        assert len(done) == 60
        expect_all_in_order(bundle, done)
        assert len(boards.done) == 3 and sum(boards.done.values()) == 60
        assert all(boards.done.values())


def test_a_board_that_dies_hands_its_images_to_the_others(
    bundle: Bundle, tmp_path: Path
) -> None:
    images, notes = tensors(bundle), list[str]()
    with tracked(tmp_path, 2) as (port, servers), fleet(bundle, port, notes) as boards:

        def numbers() -> Iterator[int]:
            for number in range(40):
                if number == 10:
                    servers[0].kill()
                yield number

        done = list(boards.run_all(numbers(), lambda i: [images[i % len(images)]]))
        assert len(done) == 40
        expect_all_in_order(bundle, done)
        assert boards.done[f"{HOST}:{servers[1].port}"] >= 30
    assert any("the connection was lost" in note for note in notes)
    assert any(f"waiting up to 1 s for {HOST}" in note for note in notes)


def test_all_boards_dead_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    images = tensors(bundle)
    with tracked(tmp_path, 2) as (port, servers), fleet(bundle, port, []) as boards:

        def numbers() -> Iterator[int]:
            for number in range(40):
                if number == 10:
                    for server in servers:
                        server.kill()
                yield number

        with pytest.raises(UserError, match="the connection"):
            list(boards.run_all(numbers(), lambda i: [images[i % len(images)]]))


def test_an_image_that_cannot_be_read_ends_the_run(
    bundle: Bundle, tmp_path: Path
) -> None:
    images = tensors(bundle)

    def broken() -> Iterator[int]:
        yield 0
        raise UserError("photo.jpg: is no image; leave it out")

    with (
        tracked(tmp_path, 2) as (port, _),
        fleet(bundle, port, []) as boards,
        pytest.raises(UserError, match=r"photo\.jpg: is no image"),
    ):
        list(boards.run_all(broken(), lambda i: [images[i]]))


def test_images_are_read_as_boards_get_free(bundle: Bundle, tmp_path: Path) -> None:
    """A folder of 50,000 photographs does not fit into memory."""
    images, read = tensors(bundle), list[int]()

    def numbers() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    with tracked(tmp_path, 2) as (port, _), fleet(bundle, port, []) as boards:
        outputs = boards.run_all(numbers(), lambda i: [images[i % len(images)]])
        next(outputs)
        # Time for a hundred more, if they were read.
        time.sleep(1)
        assert len(read) < 30


def test_a_restarted_board_serves_one_image_after_the_other(
    bundle: Bundle, tmp_path: Path
) -> None:
    notes: list[str] = []
    with Board(tmp_path / "board") as server:
        open_it = on(bundle, server, 20)
        with Fleet([(open_it, open_it())], 20, notes.append) as board:
            for [image], [expected], _ in read_golden(bundle):
                np.testing.assert_allclose(board.run(image)[0], expected, atol=1e-6)
                server.restart()
    assert sum("is back" in note for note in notes) == len(read_golden(bundle)) - 1


def test_a_board_that_does_not_come_back_is_one_line(
    bundle: Bundle, tmp_path: Path
) -> None:
    [image], _, _ = read_golden(bundle)[0]
    with Board(tmp_path / "board") as server:
        open_it = on(bundle, server, 1)
        with Fleet([(open_it, open_it())], 1, print) as board:
            server.kill()
            with pytest.raises(LostError, match="the connection was lost"):
                board.run(image)
            with pytest.raises(LostError, match="run the command again"):
                board.run(image)


def test_a_board_that_comes_back_as_an_emulated_one_is_not_taken(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Its times would be taken for the first one's."""
    [image], _, _ = read_golden(bundle)[0]
    notes: list[str] = []
    with Board(tmp_path / "board") as server:
        open_it = on(bundle, server, 1)

        def open_again() -> Opened:
            opened = open_it()
            opened.session.origin = Origin.EMULATED
            return opened

        with Fleet([(open_again, open_it())], 1, notes.append) as board:
            server.restart()
            with pytest.raises(LostError, match="the connection was lost"):
                board.run(image)
    assert not any("is back" in note for note in notes)
