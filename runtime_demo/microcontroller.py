"""The results of a check on a microcontroller: memory, and instructions of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from netship.devices.microcontroller.parts import too_large
from netship.meter import thumb_cycles
from netship.targets.cores import CORES
from netship.targets.escapes import counted, ending, milliseconds

if TYPE_CHECKING:
    from netship.devices.microcontroller.figures import Figures

# MHz that boards with these cores commonly run at.
_CLOCKS = {
    "cortex-m0plus": 64,
    "cortex-m3": 72,
    "cortex-m4": 168,
    "cortex-m4-nofpu": 72,
    "cortex-m7": 480,
    "cortex-m33": 160,
    "cortex-m55": 400,
    "cortex-m85": 480,
}


class Estimate(NamedTuple):
    """The time of an inference at one instruction a cycle, memory that never waits, and a usual clock."""

    milliseconds: float
    megahertz: int


def estimate(figures: Figures) -> Estimate:
    megahertz = _CLOCKS[figures.interface.cpu]
    return Estimate(figures.instructions / megahertz / 1e3, megahertz)


def misfits(figures: Figures) -> list[str]:
    """What no known part of the core has room for: the emulated board has more memory than any."""
    interface, cpu = figures.interface, CORES[figures.interface.cpu].cpu
    if interface.arenas or not cpu:
        return []
    ports = (*interface.inputs, *interface.outputs)
    quantised = any(each.quantised for each in ports)
    return too_large(cpu, interface.weights_bytes, interface.arena_bytes, quantised)


def to_json(figures: Figures | None, quantised: bool) -> dict[str, Any]:
    """The keys that ``check --json`` adds; none except for a microcontroller.

    Args:
        quantised: the output's errors are steps of int8, not real numbers.
    """
    if figures is None:
        return {}
    return {
        "board": figures.board,
        "ram_bytes": figures.ram_bytes,
        "arena_bytes": figures.interface.arena_bytes,
        "stack_bytes": figures.stack_bytes,
        "flash_bytes": figures.flash_bytes,
        "code_bytes": figures.code_bytes,
        "warnings": misfits(figures),
        "instructions": figures.instructions,
        "max_error_lsb": round(figures.max_error) if quantised else None,
        "max_error_host": figures.max_error,
        "steps": [part._asdict() for part in figures.parts],
    }


def lines(figures: Figures) -> list[str]:
    """The same as text."""
    interface = figures.interface
    macs = sum(part.macs for part in figures.parts)
    guess = estimate(figures)
    columns = ("instructions", "expand", "depthwise", "project", "MAC/instr.")
    rows = ["", f"{'step':<22}{'MAC':>12}" + "".join(f"{c:>14}" for c in columns)]
    rows += [
        f"{ending(part.name, 21):<22}{part.macs:>12,}"
        + "".join(f"{count:>14,.0f}" for count in part[2:])
        + f"{part.macs / max(part.instructions, 1):>14.2f}"
        for part in figures.parts
    ]
    ram = (
        f"arena {interface.arena_bytes:,} with the input in it, output {interface.output_bytes:,}, "
        f"static data {figures.static_bytes:,}, stack {figures.stack_bytes:,}"
    )
    work = f"{figures.instructions:,} instructions, {macs / figures.instructions:.2f} multiply-adds each"
    time = f"{milliseconds(guess.milliseconds, 1)} at {guess.megahertz} MHz if an instruction takes one cycle and memory never waits"
    if "float32" in {each.dtype for each in interface.inputs}:
        time += "; those that load many registers at once take more"
    error = (
        "gives the same bits"
        if not figures.max_error
        else f"differs by at most {counted(round(figures.max_error), 'step')} of the output"
        if all(each.quantised for each in interface.outputs)
        else f"differs by at most {figures.max_error:.1e}"
    )
    cpu = CORES[interface.cpu].cpu
    cycles = f"cycles     python -m meter estimates them: --cpu {cpu}"
    placed = [f"placed     {interface.placed}"] if interface.placed else []
    return [
        *rows,
        "",
        *placed,
        f"RAM        {figures.ram_bytes:,} bytes: {ram}",
        f"flash      {figures.flash_bytes:,} bytes: code and tables {figures.code_bytes:,}, the rest weights",
        f"work       {work}, counted by QEMU on {figures.board}",
        f"estimate   {time}",
        *([cycles] if cpu in thumb_cycles.CORES else []),
        f"host       the same C on this machine {error}",
        *(f"warning    {each}" for each in misfits(figures)),
    ]
