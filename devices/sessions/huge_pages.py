"""Huge pages under an executor's parameters.

Weights are read from end to end once an inference. 14 MB of them in 4 KB pages are 3,600 pages, more than
a CPU's TLB has entries for; in huge pages they are 7.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

# The second level's page on x86-64, and on aarch64 with pages of 4 KB; elsewhere the kernel refuses.
HUGE_PAGE_BYTES = 2 << 20
# Linux, include/uapi/asm-generic/mman-common.h. The first takes effect where pages are touched for the
# first time, and lets the second move those that are in use, at once (Linux 6.1).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_for_parameters(executor: Any) -> None:
    """Move the parameters of a graph executor in this process into huge pages, as far as Linux does it."""
    arrays = [executor["get_input"](i) for i in range(executor["get_num_inputs"]())]
    use_for((_address(array), _bytes(array)) for array in arrays)


def use_for(spans: Iterable[tuple[int, int]]) -> None:
    """Ask for huge pages under spans of memory, each an address and its bytes.

    The C library maps arrays of some size one beside another, which Linux joins: a huge page holds
    several. Where a whole one is not mapped alike, or there are none, nothing changes.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in sorted({page for span in spans for page in _pages(*span)}):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(page * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, advice)


def _pages(address: int, size: int) -> range:
    return range(address // HUGE_PAGE_BYTES, -(-(address + size) // HUGE_PAGE_BYTES))


def _address(array: Any) -> int:
    tensor = array.handle.contents
    return int(tensor.data) + int(tensor.byte_offset)


def _bytes(array: Any) -> int:
    return int(np.dtype(array.dtype).itemsize * math.prod(array.shape))
