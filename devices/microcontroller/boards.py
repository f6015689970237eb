"""The microcontroller boards of QEMU: their memory maps and their clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from netship.targets.cores import CORES, Core


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
        core: the one that it has.
        cpu: for ``-mcpu``; that of another core where its code runs on this one.
        older: for ``-mcpu`` of compilers that do not know ``cpu``.
        unknown: the core that the compiler does not know, whose code ``cpu`` stands for.
        code: address of the memory for code and tables.
        weights: external memory for the weights.
        data: memory for arena, output and stack.
        megahertz: of SysTick. With ``-icount shift=0`` an instruction takes 1 ns.
        float_abi: for ``-mfloat-abi``; "soft" for a core without an FPU.
    """

    machine: str
    core: str
    cpu: str
    code: int
    weights: Memory
    data: Memory
    megahertz: int
    float_abi: str = "hard"
    older: str = ""
    unknown: str = ""

    @property
    def instructions_per_tick(self) -> float:
        return 1e3 / self.megahertz

    @property
    def title(self) -> str:
        """Its name and its core, for a person; the code's too, if it is another one."""
        code = ""
        if self.cpu != self.core or self.unknown:
            code = f", code compiled for {self.cpu}"
        if self.unknown:
            code += f" as the compiler does not know {self.unknown}"
        return f"{self.machine} ({self.core}{code})"


# Addresses and sizes: Arm application notes AN385, AN386, AN500, AN505 and AN547, memory maps.
_MACHINES = {
    core: (machine, code, Memory(*weights), Memory(*data), megahertz)
    for machine, core, code, weights, data, megahertz in (
        ("mps2-an385", "cortex-m3", 0, (0x2100_0000, 16), (0x2000_0000, 4), 25),
        ("mps2-an386", "cortex-m4", 0, (0x2100_0000, 16), (0x2000_0000, 4), 25),
        ("mps2-an500", "cortex-m7", 0, (0x6000_0000, 16), (0x2000_0000, 4), 25),
        ("mps2-an505", "cortex-m33", 1 << 28, (0x8000_0000, 16), (0x3800_0000, 4), 20),
        ("mps3-an547", "cortex-m55", 0, (0x6000_0000, 256), (0x2000_0000, 0.5), 32),
    )
}
# Cores that no board of QEMU has, and cores whose instructions have all of theirs.
_RUN_ON = {
    "cortex-m0plus": "cortex-m3",
    "cortex-m4-nofpu": "cortex-m4",
    "cortex-m85": "cortex-m55",
}


def _board(target: str, core: Core) -> Board:
    runs = _RUN_ON.get(target, target)
    machine, code, weights, data, megahertz = _MACHINES[runs]
    memories = (code, weights, data)
    abi = core.float_abi
    return Board(machine, runs, core.cpu, *memories, megahertz, abi, core.older)


BOARDS = {name: _board(name, core) for name, core in CORES.items() if core.cpu}
"""The board of each target that is a core."""
