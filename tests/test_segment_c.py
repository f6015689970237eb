"""The generated C gives each pixel the class that numpy gives it, for every layout and type of an output."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL, c_float, c_int16, c_int32
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from netship.bundle.decode import NO_CLASS, map_on_photograph, segment
from netship.bundle.photos import Placement
from netship.bundle.task import Task
from netship.compile.backends.companions import Port, files
from netship.compile.backends.segmentation.emit import write
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

SIZE = (48, 64)
KINDS: dict[str, tuple[int | None, Port]] = {
    "planes": (1, Port("y", (1, 5, 6, 8))),
    "last": (3, Port("y", (1, 6, 8, 5))),
    "stored_last": (1, Port("y", (1, 5, 6, 8), channels_last=True)),
    "last_stored_last": (3, Port("y", (1, 6, 8, 5), channels_last=True)),
    "eight": (1, Port("y", (1, 5, 6, 8), "int8", True, 0.125, -3)),
    "line": (1, Port("y", (1, 2, 1, 8))),
    "pixel": (1, Port("y", (1, 3, 1, 1))),
    "map": (None, Port("y", (1, 6, 8))),
    "map_last": (None, Port("y", (1, 1, 6, 8), channels_last=True)),
    "map64": (None, Port("y", (1, 6, 8), "int64")),
    "map32": (None, Port("y", (6, 8), "int32")),
    "map8": (None, Port("y", (1, 6, 8, 1), "uint8")),
    "map_eight": (None, Port("y", (1, 6, 8), "int8", False, 0.5, -3)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CDLL]:
    folder = tmp_path_factory.mktemp("segment")
    sources = []
    for name, (axis, port) in KINDS.items():
        task = Task(kind="segment", class_axis=axis)
        write(folder, name, "test", task, SIZE, port)
        sources.append(folder / files(name, "segment")[1])
    options = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic")
    target = ("-target", native().linker, "-shared", "-fPIC")
    output = folder / "segment.so"
    assert run_zig("cc", output, *target, *options, "-Werror", *sources) == ""
    yield CDLL(str(output))


def values(port: Port, seed: int) -> NDArray[Any]:
    """Many equal ones; NaN, infinities, and numbers that are no class."""
    random = np.random.default_rng(seed)
    if port.dtype != "float32":
        limits = np.iinfo(port.dtype)
        odd = [0, 1, 2, 3, 32767, 32768, 2**32 + 3, -1, limits.min, limits.max]
        known = [each for each in odd if limits.min <= each <= limits.max]
        return random.choice(np.array(known, port.dtype), port.shape)
    found = np.rint(random.normal(2, 2, port.shape)).astype(np.float32)
    special = [np.nan, np.inf, -np.inf, -0.0, 0, 0.5, 32767, 32768, 3e38, -1]
    share = (0, 0.05, 0.5, 1)[seed % 4]
    mixed = random.choice(np.array(special, np.float32), port.shape)
    chosen: NDArray[Any] = np.where(random.random(port.shape) < share, mixed, found)
    return chosen


@pytest.mark.parametrize("name", KINDS)
def test_c_and_numpy_give_the_same_classes(library: CDLL, name: str) -> None:
    axis, port = KINDS[name]
    task = Task(kind="segment", class_axis=axis)
    counts = []
    for seed in range(12):
        given = values(port, seed)
        real = given
        if port.scale != 1:
            real = (given.astype(np.float32) - port.zero) * np.float32(port.scale)
        expected = segment(task, [real])
        stored = given
        if port.channels_last:
            stored = given.transpose(0, 2, 3, 1)
        ours = np.full(expected.size + 1, 99, np.int16)
        stored = np.ascontiguousarray(stored)
        without = getattr(library, f"{name}_segment")(stored.ctypes, ours.ctypes)
        assert ours[:-1].tolist() == expected.ravel().tolist() and ours[-1] == 99
        assert without == (expected == NO_CLASS).sum()
        counts.append(without)
    assert port.dtype in ("int8", "uint8") or max(counts) > 0


def test_c_finds_the_class_at_a_photographs_pixel_as_numpy_does(library: CDLL) -> None:
    random = np.random.default_rng(3)
    at = library.map_class_at
    at.argtypes = [np.ctypeslib.ndpointer(np.int16), *[c_int32] * 2, *[c_float] * 4]
    at.restype = c_int16
    classes = random.integers(0, 9, (6, 8)).astype(np.int16)
    for place in ((0.5, 0.25, 3, -2), (7.3, 6.1, -100, 0), (0.01, 0.02, 10, 20)):
        placed = Placement(*map(float, np.array(place, np.float32)))
        size = (40, 30)
        expected = map_on_photograph(classes.astype(np.int32), SIZE, placed, size)
        found = [[at(classes, x, y, *placed) for x in range(40)] for y in range(30)]
        assert np.array_equal(np.array(found, np.int16), expected)


def test_c_refuses_a_missing_pointer(library: CDLL) -> None:
    memory = np.zeros(48, np.float32)
    assert library.map_segment(None, memory.ctypes) == -1
    assert library.map_segment(memory.ctypes, None) == -1
