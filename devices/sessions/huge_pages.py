"""Huge pages for the parameters of an executor.

An inference reads all weights once. 14 MB of them take 3,600 pages of 4 KB, more than the entries of a CPU's
TLB; in huge pages they take 7.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

# A page of the second level on x86-64, and on aarch64 with pages of 4 KB; elsewhere the kernel refuses it.
HUGE_PAGE_BYTES = 2 << 20
# Linux, include/uapi/asm-generic/mman-common.h. The first applies to pages that are touched for the first
# time later, and allows the second, which moves pages in use at once (Linux 6.1).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_for_parameters(executor: Any) -> None:
    """Move the parameters of a graph executor in this process into huge pages, where Linux allows it."""
    spans = []
    for index in range(executor["get_num_inputs"]()):
        array = executor["get_input"](index)
        tensor = array.handle.contents
        address = int(tensor.data) + int(tensor.byte_offset)
        spans.append((address, np.dtype(array.dtype).itemsize * math.prod(array.shape)))
    use_for(spans)


def use_for(spans: Iterable[tuple[int, int]]) -> None:
    """Ask for huge pages for spans of memory, each an address and a number of bytes.

    The C library maps large arrays next to each other, and Linux joins the mappings, so that a huge page can
    hold several arrays. Nothing changes where Linux has no huge pages or a page is not mapped as a whole.
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
