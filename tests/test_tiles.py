"""The lengths of splits: they divide the extents, fill vectors and stay within the registers."""

from __future__ import annotations

from math import prod

import pytest

from netship.compile.relay import tiles
from netship.compile.relay.tiles import Vectors, vectors_of
from netship.targets.presets import resolve

NEON, AVX512 = Vectors(4, 32), Vectors(16, 32)
TILED = ((1, 1, 1), (7, 1, 2), (2, 2, 7), (12, 1, 16), (1,), (1,), (16,))


@pytest.mark.parametrize(
    "extents",
    [
        (1, 10, 10, 288, 1, 1, 48),
        (1, 1, 1, 19, 1, 1, 1280),
        (1, 13, 17, 24, 3, 3, 7),
        (1, 1, 1, 1, 1, 1, 1),
    ],
)
def test_splits_divide_the_extents(extents: tuple[int, ...]) -> None:
    _, lengths = tiles.fitted(TILED, extents, NEON)
    assert all(
        extent % prod(each) == 0 for extent, each in zip(extents, lengths, strict=True)
    )
    assert tiles.fitted(TILED, extents, NEON)[1] == lengths


def test_a_vector_has_a_power_of_two_where_the_channels_have_one() -> None:
    # 24 numbers would divide 288 as well, and be nearer to none of the record's lengths; LLVM keeps no array of them.
    for channels in (24, 48, 144, 288, 320):
        _, lengths = tiles.fitted(TILED, (1, 14, 14, channels, 1, 1, 64), NEON)
        vector = lengths[3][-1]
        assert vector & (vector - 1) == 0 and vector >= 8


def test_sums_stay_within_the_registers() -> None:
    for lanes in ("x86-64-v3", "znver4", "arm-cortex-a72"):
        vectors = vectors_of(resolve(lanes))
        _, lengths = tiles.fitted(TILED, (1, 56, 56, 64, 1, 1, 64), vectors)
        inner = prod(each[-1] for each in lengths[:4])
        assert inner <= vectors.lanes * vectors.registers


@pytest.mark.parametrize(
    ("vector", "vectors", "taken"),
    [
        (16, AVX512, 1),
        (8, AVX512, 2),
        (8, NEON, 1),
        (8, NEON.of("float16"), 1),
        (4, NEON.of("float16"), 2),
        # 32 and 4: three registers of 16 for 36 numbers, and the compiler does not keep such a vector in registers.
        (36, AVX512, 3 * 48 / 36),
    ],
)
def test_lanes_taken_for_each_that_computes(
    vector: int, vectors: Vectors, taken: float
) -> None:
    lengths = [[1, 1, 1], [1, 1, 1], [1, 1, 4], [1, 1, vector], [1], [1], [2]]
    assert tiles.lanes_taken(lengths, vectors) == pytest.approx(taken)


def test_vectors_of_float16_are_chosen_longer() -> None:
    # Both take two registers of NEON.
    record = (*TILED[:3], (12, 1, 8), *TILED[4:])
    extents = (1, 14, 14, 64, 1, 1, 64)
    chosen = [
        tiles.fitted(record, extents, NEON.of(numbers))[1][3][-1]
        for numbers in ("float32", "float16")
    ]
    assert chosen == [8, 16]
