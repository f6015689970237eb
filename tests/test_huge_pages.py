"""Huge pages under the parameters of a bundle on this machine."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from netship.devices.sessions import huge_pages
from netship.devices.sessions.huge_pages import HUGE_PAGE_BYTES
from netship.targets import engine

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LINUX = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])

needs_huge_pages = pytest.mark.skipif(
    LINUX < (6, 1)
    or not ENABLED.exists()
    or "[never]" in ENABLED.read_text()
    or mmap.PAGESIZE != 4096,
    reason="Linux has no huge pages of 2 MB to give, or not at once",
)


def in_huge_pages(address: int) -> int:
    """Bytes in huge pages of the mapping around ``address``."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            found += int(line.split()[1]) << 10
    return found


def whole_pages(count: int) -> np.ndarray:
    """``count`` huge pages' room, used and in small pages."""
    room = mmap.mmap(
        -1, (count + 1) * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    room.madvise(mmap.MADV_NOHUGEPAGE)
    every = np.frombuffer(room, np.uint8)
    start = -every.ctypes.data % HUGE_PAGE_BYTES
    memory = every[start : start + count * HUGE_PAGE_BYTES]
    memory[:] = np.arange(memory.size, dtype=np.uint64) % 251
    return memory


@needs_huge_pages
def test_parameters_move_to_huge_pages_and_keep_their_values() -> None:
    memory = whole_pages(3)
    before = memory.copy()
    assert in_huge_pages(memory.ctypes.data) == 0
    # One across a boundary, a small one, and one that ends inside the last page.
    parts = np.split(memory, [HUGE_PAGE_BYTES + 4096, HUGE_PAGE_BYTES + 4160])
    arrays = [
        engine.runtime(1).nd.from_dlpack(part[:HUGE_PAGE_BYTES]) for part in parts
    ]
    executor = {"get_num_inputs": lambda: 3, "get_input": arrays.__getitem__}
    huge_pages.use_for_parameters(executor)
    assert in_huge_pages(memory.ctypes.data) == memory.size
    np.testing.assert_array_equal(memory, before)


def test_where_linux_says_no_nothing_happens(capfd: pytest.CaptureFixture[str]) -> None:
    hole = whole_pages(1).ctypes.data  # gone with the array
    function = ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value
    assert function
    huge_pages.use_for([(hole, 4096), (function, 64), (0, 1)])
    assert capfd.readouterr() == ("", "")
