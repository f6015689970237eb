"""The microcontroller boards of QEMU: their memory maps and their clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Memory(NamedTuple):
    """Where a memory begins, and its size."""

    address: int
    mebibytes: float

    @property
    def size(self) -> int:
        return int(self.mebibytes * (1 << 20))


@dataclass(frozen=True)
class Board:
    """A board of ``qemu-system-arm -M``.

    Attributes:
        cpu: for ``-mcpu``.
        code: address of the memory for code and tables.
        weights: external memory for the weights.
        data: memory for arena, output and stack.
        megahertz: of SysTick. With ``-icount shift=0`` an instruction takes 1 ns.
        float_abi: for ``-mfloat-abi``; "soft" for a core without an FPU.
    """

    machine: str
    cpu: str
    code: int
    weights: Memory
    data: Memory
    megahertz: int
    float_abi: str = "hard"

    @property
    def instructions_per_tick(self) -> float:
        return 1e3 / self.megahertz


# Addresses and sizes: Arm application notes AN386, AN500, AN505 and AN547, memory maps.
BOARDS = {
    cpu: Board(machine, cpu, code, Memory(*weights), Memory(*data), megahertz)
    for machine, cpu, code, weights, data, megahertz in (
        ("mps2-an386", "cortex-m4", 0, (0x2100_0000, 16), (0x2000_0000, 4), 25),
        ("mps2-an500", "cortex-m7", 0, (0x6000_0000, 16), (0x2000_0000, 4), 25),
        ("mps2-an505", "cortex-m33", 1 << 28, (0x8000_0000, 16), (0x3800_0000, 4), 20),
        ("mps3-an547", "cortex-m55", 0, (0x6000_0000, 256), (0x2000_0000, 0.5), 32),
    )
}
