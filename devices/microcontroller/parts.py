"""The flash and caches of microcontrollers, and what a read that they do not have at hand costs.

A part's memory waits for flash only: activations and the stack lie in RAM without wait states (SRAM, or the tightly
coupled memory of Cortex-M7 and M55). Code is fetched and weights are read in lines. A line that the cache lacks costs

- after a jump, the wait states of its first read, and what the rest of the line takes longer than its execution;
- behind the line before it, where flash prefetches, only what all of it takes longer than its execution;
- when it is data, the wait states of its first read: the rest arrives while the core computes.

While code arrives the core executes 2.4 bytes a cycle: an instruction has two or four bytes, and takes 1.25 cycles in the
networks of MLPerf Tiny on Cortex-M4. Caches replace the least recently used line. All this is a model: no part was
measured.

A part also has sizes, by which the meter says whether a network fits. They leave out what the rest of a program takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from netship.targets.errors import UserError

# Executed while code arrives.
_BYTES_A_CYCLE = 2.4
# Memory-mapped quad SPI at half of the core's clock: a command, an address and dummy cycles take 14 clocks, each byte two.
EXTERNAL_FIRST, EXTERNAL_BYTE = 28.0, 4.0
# 16-bit SDRAM at half of the core's clock: precharge, row and column take 12 clocks, each two bytes one.
SDRAM_FIRST, SDRAM_BYTE = 24.0, 1.0
# SRAM behind the AXI bus, where a core has caches and tightly coupled memory; bytes of their lines.
SRAM_FIRST, LINE = 6.0, 32

# Name, bytes and address of a memory, as devices.microcontroller.regions names them.
Memories = tuple[tuple[str, int, int], ...]
_K, _M = 1 << 10, 1 << 20


class Sizes(NamedTuple):
    """The memories of a part, in KiB as its data sheet gives them.

    Attributes:
        ram: what arena and outputs can lie in; of STM32F746 its DTCM is the beginning of it.
        itcm, dtcm: tightly coupled memory for code and for data; 0 where there is none.
    """

    source: str
    flash: int
    ram: int
    itcm: int = 0
    dtcm: int = 0
    dtcm_in_ram: bool = False


class Cache(NamedTuple):
    """Bytes in all, ways, and bytes of a line."""

    bytes: int
    ways: int
    line: int

    @property
    def option(self) -> str:
        """As thumb.c takes it."""
        return f"{self.bytes // (self.ways * self.line)}:{self.ways}:{self.line.bit_length() - 1}"


@dataclass(frozen=True)
class Part:
    """A microcontroller at one clock.

    Attributes:
        cpu: its core, as ``-mcpu`` names it.
        source: documents that the figures are from.
        sizes: of its memories.
        wait: wait states of flash at this clock; those of the bus between cache and flash included.
        width: bytes of one read of flash.
        fetch: the cache for code; of a flash without one its read buffer.
        read: the cache for data in flash; None where `fetch` has them, too.
        prefetch: flash reads the next line of code ahead.
        regions: its memories for activations and weights, by its reference manual's memory map.
    """

    cpu: str
    megahertz: int
    source: str
    sizes: Sizes
    wait: int
    width: int
    fetch: Cache
    read: Cache | None = None
    prefetch: bool = True
    regions: Memories = ()

    def fetch_cycles(self) -> tuple[float, float]:
        """Of a line of code after a jump, and of one behind the line before it."""
        reads = max(1, self.fetch.line // self.width)
        slower = max(0.0, self.wait + 1 - self.width / _BYTES_A_CYCLE)
        jump = self.wait + (reads - 1) * slower
        return jump, reads * slower if self.prefetch else jump

    def read_cycles(self, place: str) -> float:
        """Of a line of data in flash or in external memory."""
        line = (self.read or self.fetch).line
        return self.wait if place == "flash" else EXTERNAL_FIRST + EXTERNAL_BYTE * line


_F746: Memories = (
    ("dtcm", 64 * _K, 0x2000_0000),
    ("sram", 256 * _K, 0x2001_0000),
    ("flash", _M, 0x0800_0000),
)
PARTS: Mapping[str, Part] = {
    "stm32l4r5": Part(
        "cortex-m4",
        120,
        "RM0432, embedded flash memory: 5 wait states at 120 MHz, 64-bit reads in dual-bank mode, prefetch of code, "
        "caches of 1 KB for code and 256 bytes for data, filled by the read",
        Sizes("DS12023", flash=2048, ram=640),
        wait=5,
        width=8,
        fetch=Cache(1024, 128, 8),
        read=Cache(256, 32, 8),
        regions=(
            ("sram", 640 * _K, 0x2000_0000),
            ("flash", 2 * _M, 0x0800_0000),
        ),
    ),
    "stm32u575": Part(
        "cortex-m33",
        160,
        "RM0456, embedded flash memory and ICACHE: 4 wait states at 160 MHz, 128-bit reads; 8 KB, 2 ways, 128-bit lines "
        "for code and data",
        Sizes("DS13737", flash=2048, ram=786),
        wait=4,
        width=16,
        fetch=Cache(8 << 10, 2, 16),
        regions=(
            ("sram", 768 * _K, 0x2000_0000),
            ("flash", 2 * _M, 0x0800_0000),
        ),
    ),
    "nrf5340": Part(
        "cortex-m33",
        128,
        "nRF5340 Product Specification, CACHE: 8 KB, 2 ways, 128-bit lines for code and data; 7 wait states assumed",
        Sizes("nRF5340 Product Specification, application core", flash=1024, ram=512),
        wait=7,
        width=16,
        fetch=Cache(8 << 10, 2, 16),
        prefetch=False,
        regions=(("sram", 512 * _K, 0x2000_0000), ("flash", _M, 0)),
    ),
    "stm32h7a3": Part(
        "cortex-m7",
        280,
        "RM0455, embedded flash memory: 6 wait states at 280 MHz, 128-bit reads; 16 KB caches; 6 cycles of the AXI bus "
        "assumed",
        Sizes("DS13195", flash=2048, ram=1184, itcm=64, dtcm=128),
        wait=12,
        width=16,
        fetch=Cache(16 << 10, 2, 32),
        read=Cache(16 << 10, 4, 32),
        prefetch=False,
        regions=(
            ("dtcm", 128 * _K, 0x2000_0000),
            ("sram", 1024 * _K, 0x2400_0000),
            ("flash", 2 * _M, 0x0800_0000),
        ),
    ),
    "stm32f746": Part(
        "cortex-m7",
        216,
        "RM0385, embedded flash memory: 7 wait states at 216 MHz, 256-bit reads; 4 KB caches; 6 cycles of the AXI bus "
        "assumed",
        Sizes("DS10916", flash=1024, ram=320, itcm=16, dtcm=64, dtcm_in_ram=True),
        wait=13,
        width=32,
        fetch=Cache(4 << 10, 2, 32),
        read=Cache(4 << 10, 4, 32),
        prefetch=False,
        regions=_F746,
    ),
    "stm32g0b1": Part(
        "cortex-m0plus",
        64,
        "RM0444, embedded flash memory: 2 wait states at 64 MHz, 64-bit reads with prefetch, a cache of 2 lines",
        Sizes("DS13560", flash=512, ram=144),
        wait=2,
        width=8,
        fetch=Cache(16, 2, 8),
        read=Cache(8, 1, 8),
        regions=(
            ("sram", 144 * _K, 0x2000_0000),
            ("flash", 512 * _K, 0x0800_0000),
        ),
    ),
}

# The Discovery board has 8 MiB of SDRAM in reach (32F746GDISCOVERY, UM1907) and 16 MiB of quad SPI flash.
PARTS = {
    **PARTS,
    "stm32f746g-disco": replace(
        PARTS["stm32f746"],
        regions=(
            *_F746,
            ("sdram", 8 * _M, 0xC000_0000),
            ("qspi", 16 * _M, 0x9000_0000),
        ),
    ),
}


def too_large(cpu: str, weights: int, arena: int, quantised: bool) -> list[str]:
    """What of a network no known part of a core has room for, and what to do; of a core without known parts, no part.

    Args:
        weights, arena: bytes, without code and stack; 0 leaves one out.
        quantised: int8 is no advice.
    """
    known = {name: each for name, each in PARTS.items() if "-" not in name}
    same = {name: each for name, each in known.items() if each.cpu == cpu}
    whose = cpu if same else "part"
    found = []
    for what, nbytes, memory, given in (
        ("weights", weights, "flash", "sram=1M,qspi"),
        ("activations", arena, "RAM", "sdram"),
    ):
        parts = (same or known).items()
        sizes = {x: _K * getattr(each.sizes, memory.lower()) for x, each in parts}
        most = max(sizes.values())
        if nbytes <= most:
            continue
        smaller = "take a narrower network"
        if not quantised and nbytes <= 4 * most:
            smaller = "--quantize int8 takes about a quarter of it"
        listed = ", ".join(f"{name} has {each:,}" for name, each in sizes.items())
        found.append(
            f"the {what} take {nbytes:,} bytes, {nbytes - most:,} more than the {memory} of any {whose} known here "
            f"({listed}): {smaller}, --memory {given}={1 << (nbytes // _M).bit_length()}M uses external memory, or "
            "choose another --target"
        )
    return found


def part(name: str) -> Part:
    """Raises: UserError where it is not known."""
    if name not in PARTS:
        raise UserError(f"--part {name}: not known; there are {', '.join(PARTS)}")
    return PARTS[name]
