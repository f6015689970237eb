"""The microcontroller boards of QEMU: their memory maps and their clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Memory(NamedTuple):
    """Where a memory begins, and its bytes."""

    address: int
    size: int


@dataclass(frozen=True)
class Board:
    """A board of ``qemu-system-arm -M``.

    Attributes:
        cpu: for ``-mcpu``.
        code: address of the memory for code and tables.
        weights: external memory for the weights.
        data: memory for arena, output and stack.
        hertz: of SysTick. With ``-icount shift=0`` an instruction takes 1 ns.
    """

    machine: str
    cpu: str
    code: int
    weights: Memory
    data: Memory
    hertz: int

    @property
    def instructions_per_tick(self) -> float:
        return 1e9 / self.hertz


_MIB = 1 << 20

# Addresses and sizes: Arm application notes AN386, AN500, AN505 and AN547, memory maps.
BOARDS: dict[str, Board] = {
    board.cpu: board
    for board in (
        Board(
            "mps2-an386",
            "cortex-m4",
            code=0,
            weights=Memory(0x2100_0000, 16 * _MIB),
            data=Memory(0x2000_0000, 4 * _MIB),
            hertz=25_000_000,
        ),
        Board(
            "mps2-an500",
            "cortex-m7",
            code=0,
            weights=Memory(0x6000_0000, 16 * _MIB),
            data=Memory(0x2000_0000, 4 * _MIB),
            hertz=25_000_000,
        ),
        Board(
            "mps2-an505",
            "cortex-m33",
            code=0x1000_0000,
            weights=Memory(0x8000_0000, 16 * _MIB),
            data=Memory(0x3800_0000, 4 * _MIB),
            hertz=20_000_000,
        ),
        Board(
            "mps3-an547",
            "cortex-m55",
            code=0,
            weights=Memory(0x6000_0000, 256 * _MIB),
            data=Memory(0x2000_0000, _MIB // 2),
            hertz=32_000_000,
        ),
    )
}
