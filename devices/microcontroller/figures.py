"""The resources that an inference needs of a microcontroller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from netship.bundle.manifest import Firmware


class Part(NamedTuple):
    """A step's multiply-adds, its instructions, and those of its parts."""

    name: str
    macs: int
    instructions: float
    expand: float
    depthwise: float
    project: float


@dataclass(frozen=True)
class Figures:
    """Bytes, and instructions as counted by QEMU.

    Attributes:
        interface: the project's; its arena holds the input.
        stack_bytes: the most that an inference takes.
        static_bytes: data that the network itself declares.
        code_bytes, weights_bytes: of the network; code includes its tables.
        max_error: largest difference from the same C compiled for this machine, for every input that was
            run: in steps of an int8 output, or the values' difference of a float32 one.
        parts: by step; counted in a separate run, where the counting takes less than 1 %.
    """

    board: str
    interface: Firmware
    stack_bytes: int
    static_bytes: int
    code_bytes: int
    weights_bytes: int
    instructions: int
    max_error: float
    parts: tuple[Part, ...]

    @property
    def ram_bytes(self) -> int:
        ports = self.interface.arena_bytes + self.interface.output_bytes
        return ports + self.static_bytes + self.stack_bytes

    @property
    def flash_bytes(self) -> int:
        return self.code_bytes + self.weights_bytes
