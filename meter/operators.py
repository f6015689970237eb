"""The cost of an inference of a bundle on a core, and each operator's share."""

from __future__ import annotations

import re
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from netship.bundle.manifest import Group, Records
from netship.bundle.store import Bundle, open_bundle
from netship.devices.board.programs import native_verifier
from netship.devices.sysroot import prepare
from netship.meter import counting, cycles, memory, parallel
from netship.meter.board_files import check_threads
from netship.meter.counting import Block, Part
from netship.records.workloads import operator_of
from netship.targets.errors import UserError
from netship.targets.escapes import ending, listed
from netship.targets.files import copy_folder
from netship.targets.toolchain import llvm_tool, run_tool

# Multiply-adds a cycle in float32: four lanes for each 128-bit FMLA that a core issues in a cycle. Cortex-A53 one (LLVM 22,
# AArch64SchedA53.td), and so Cortex-A55 (AArch64SchedA55.td: both 64-bit pipelines); Cortex-A72 one (Arm, Cortex-A72
# Software Optimization Guide, UAN 0016A, 3.15); Cortex-A76, A78 and Neoverse N1 two (Arm, Cortex-A76 Software Optimization
# Guide, PJDOC-466751330-7215, 3.15).
_TWO = ("cortex-a76", "cortex-a78", "neoverse-n1")
PEAK_MACS = {"cortex-a53": 4, "cortex-a55": 4, "cortex-a72": 4} | dict.fromkeys(_TWO, 8)
# In int8: SMLAL, of eight products, once a cycle (the same; UAN 0016A, 3.14); SDOT, of sixteen, as often as an FMLA.
_INT8_MACS = {"cortex-a53": 8, "cortex-a55": 16, "cortex-a72": 8} | dict.fromkeys(
    _TWO, 32
)
# In float16, where the core has it: eight lanes.
_FLOAT16_MACS = {"cortex-a55": 8} | dict.fromkeys(_TWO, 16)
PEAKS = {"float32": PEAK_MACS, "int8": _INT8_MACS, "float16": _FLOAT16_MACS}
OUTSIDE = "outside the kernels"
_KERNEL = re.compile(r"tvmgen_(?:default|\w+?)_(fused_\w+?)(?:_compute_)?$")
_PREFIX = re.compile(r"^(fused_)?(netship_int8_)?")
# Two layers that a kernel joins, in the name of its group.
_JOINED = " + "
# Two layers that share a kernel, in `Operator.layer`.
_NEXT = ", "
# Of a name for people, characters; of a kernel's layers, how many.
_SHOWN, _LISTED = 60, 6
LINE_BYTES = 64
# How many blocks are asked for the place where the library was loaded.
_VOTES = 64
# The real network takes half a minute with the cache model.
_SECONDS = 3600.0


class Operator(NamedTuple):
    """One kernel's share of an inference.

    Attributes:
        name: the kernel's, as the manifest's groups have it; `OUTSIDE` for the executor and the libraries.
        layer: names of its layers in the ONNX graph; a kernel may serve several.
        calls: how often an inference runs it.
        missed_bytes: 64 bytes for each line that each level of the cache model did not have.
        layers: the names in ``layer``, one by one.
        task: what ``--tasks`` of a search calls it; empty where no tuning record gave the schedule.
        own: whether this project wrote its code, which no search changes.
    """

    name: str
    layer: str
    calls: int
    instructions: int
    core_cycles: float
    memory_cycles: float
    macs: int
    missed_bytes: tuple[int, ...]
    layers: tuple[str, ...] = ()
    task: str = ""
    own: bool = False

    @property
    def title(self) -> str:
        """For people: its layers by the ends of their names, or what the kernel does if no layer is its own."""
        if not self.layer:
            return _PREFIX.sub("", self.name).replace("_", " ")
        layers = [
            _JOINED.join(ending(part, _SHOWN) for part in each.split(_JOINED))
            for each in self.layer.split(_NEXT)
        ]
        return listed(layers, _LISTED)

    @property
    def cycles(self) -> float:
        return self.core_cycles + self.memory_cycles

    @property
    def macs_per_cycle(self) -> float:
        return self.macs / self.core_cycles if self.core_cycles else 0.0

    @property
    def memory_bytes(self) -> int:
        """What it had to fetch from memory."""
        return self.missed_bytes[-1] if self.missed_bytes else 0


class Metered(NamedTuple):
    """One inference on one core, estimated; the operators' figures sum to the whole.

    Attributes:
        numbers: the network's, "float32", "float16" or "int8".
        peak: multiply-adds a cycle that the threads' cores can do in these numbers.
        board: whose memory, by its name for `memory.hierarchy`.
        threads: the operators' figures are those of each parallel region's slowest.
        regions: how many parallel regions an inference has.
        barriers: cycles of the core for their ends.
        saturated: cycles in which the memory has not yet served every thread.
        target: that the build is for.
        records: the tuning records that it used; None where it takes none.
    """

    cpu: str
    operators: tuple[Operator, ...]
    numbers: str
    peak: int
    board: str = ""
    threads: int = 1
    regions: int = 0
    barriers: float = 0.0
    saturated: float = 0.0
    target: str = ""
    records: Records | None = None

    @property
    def hierarchy(self) -> memory.Hierarchy:
        """The caches and the memory of the board."""
        return memory.hierarchy(self.cpu, self.board)

    @property
    def instructions(self) -> int:
        return sum(operator.instructions for operator in self.operators)

    @property
    def core_cycles(self) -> float:
        return self.barriers + sum(each.core_cycles for each in self.operators)

    @property
    def memory_cycles(self) -> float:
        return self.saturated + sum(each.memory_cycles for each in self.operators)

    @property
    def cycles(self) -> float:
        return self.core_cycles + self.memory_cycles

    def milliseconds(self, clock: float) -> tuple[float, float]:
        """At a clock in GHz: if core and memory overlap completely, and if they do not."""
        most = max(self.core_cycles, self.memory_cycles)
        return most / clock / 1e6, self.cycles / clock / 1e6

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)


def measure_bundle(
    path: Path,
    cpu: str,
    on_progress: Callable[[str], None] = lambda stage: None,
    board: str = "",
    threads: int = 1,
) -> Metered:
    """Run a bundle's golden inputs under QEMU and estimate the last inference, whose caches are warm.

    Args:
        path: a bundle or a standalone library for aarch64.
        cpu: a key of `cycles.CORES`.
        board: whose memory; the core's default one where empty.
        threads: how many, 4 at most.

    Raises:
        UserError: not for aarch64, no model of the CPU, the board has fewer cores, the CPU lacks an instruction, the answers are
            wrong, or QEMU cannot count.
    """
    hierarchy = memory.hierarchy(cpu, board)
    check_threads(cpu, board, threads)
    bundle = open_countable(path, cpu)
    counting.find_qemu()
    parts = _count(bundle, cpu, hierarchy, threads, on_progress)
    on_progress("estimating cycles")
    numbers = bundle.manifest.numbers
    with closing(cycles.Costs(cpu)) as costs:
        path_taken = parallel.critical(parts, costs, hierarchy)
        operators = tuple(_operators(bundle, path_taken.blocks, costs, hierarchy))
    return Metered(
        cpu,
        operators,
        numbers,
        PEAKS[numbers][cpu] * threads,
        board,
        threads,
        path_taken.regions,
        path_taken.barriers,
        path_taken.saturated,
        bundle.manifest.target.name,
        bundle.manifest.lowering.records,
    )


def open_countable(path: Path, cpu: str) -> Bundle:
    """A build of which an inference can be counted on a core.

    Raises:
        UserError: it is not for aarch64, or there is no model of the CPU.
    """
    bundle = open_bundle(path)
    cycles.model(cpu)
    if bundle.manifest.firmware:
        core = bundle.manifest.firmware.cpu
        raise UserError(f"{path}: is a C project for {core}; give --cpu {core}")
    if bundle.manifest.target.machine != "aarch64":
        raise UserError(
            f"{path}: model.so is for {bundle.manifest.target.machine}; the meter takes aarch64, "
            "such as --target arm-cortex-a72"
        )
    return bundle


def _count(
    bundle: Bundle,
    cpu: str,
    hierarchy: memory.Hierarchy,
    threads: int,
    on_progress: Callable[[str], None],
) -> list[Part]:
    verifier = native_verifier("aarch64", on_progress)
    root = prepare(on_progress)
    own_launch = {}
    if threads > 1 and bundle.manifest.format == "standalone":
        own_launch["NETSHIP_METER_LAUNCH"] = f"{_launch(bundle.library):x}"
    on_progress("counting an inference")
    # A path of another length would shift the stack, and so change which lines share a set of a cache.
    with tempfile.TemporaryDirectory(prefix="netship-meter-") as scratch:
        copied = Path(scratch, "bundle")
        copy_folder(bundle.path, copied)
        try:
            parts, _ = counting.count_parts(
                [str(verifier), "--repeat", "0", "--threads", "1", str(copied)],
                cpu=cycles.core(cpu).qemu,
                root=root,
                caches=hierarchy.caches,
                private=hierarchy.private,
                threads=threads,
                environment=own_launch,
                seconds=_SECONDS,
            )
        except counting.CountingError as error:
            raise UserError(f"{bundle.path}: {error}") from None
    return parts


def _operators(
    bundle: Bundle,
    blocks: list[Block],
    costs: cycles.Costs,
    hierarchy: memory.Hierarchy,
) -> Iterable[Operator]:
    called = {
        group.symbol: group.name
        for group in bundle.manifest.lowering.groups
        if group.symbol
    }
    kernel_at = _attribution(bundle.library, blocks, called)
    core: dict[str, float] = {}
    found = cycles.traces(blocks)
    for trace, each in zip(found, costs.of(found), strict=True):
        kernel = kernel_at(trace.blocks[0].address)
        core[kernel] = core.get(kernel, 0.0) + trace.executions * each
    by_kernel: dict[str, list[Block]] = {}
    for block in blocks:
        by_kernel.setdefault(kernel_at(block.address), []).append(block)
    groups: dict[str, list[Group]] = {}
    for group in bundle.manifest.lowering.groups:
        groups.setdefault(group.name, []).append(group)
    for name in [*groups, *(kernel for kernel in by_kernel if kernel not in groups)]:
        own, described = by_kernel.get(name, []), groups.get(name, [])
        yield Operator(
            name=name,
            layer=_NEXT.join(group.layer for group in described if group.layer),
            calls=len(described),
            instructions=sum(block.instructions * block.executions for block in own),
            core_cycles=core.get(name, 0.0),
            memory_cycles=hierarchy.cycles(own),
            macs=sum(group.macs for group in described),
            missed_bytes=tuple(
                LINE_BYTES * sum(block.misses[level] for block in own)
                for level in range(len(hierarchy.caches))
            ),
            layers=tuple(
                layer
                for group in described
                for layer in group.layer.split(_JOINED)
                if layer
            ),
            task=_task(described),
            own=any(
                group.symbol or each.startswith("netship.")
                for group in described
                for each in group.operators
            ),
        )


def _task(groups: Sequence[Group]) -> str:
    """What a search calls the task of a kernel; a manifest is from outside."""
    try:
        return operator_of(groups[0].task) if groups and groups[0].task else ""
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""


def _attribution(
    library: Path, blocks: list[Block], called: Mapping[str, str] = MappingProxyType({})
) -> Callable[[int], str]:
    """A function from a block's address in the process to the kernel that it belongs to.

    Code from a kernel's symbol up to the next one belongs to the kernel: bodies of parallel loops have no names.

    Args:
        called: the kernel that calls a C function, by the function's symbol.
    """
    symbols = _functions(library)
    if not any(_KERNEL.match(name) for _, name in symbols):
        raise UserError(
            f"{library}: its kernels have no symbols (stripped, or an old build); build it again"
        )
    bias = _bias(library, blocks)
    starts = [address for address, _ in symbols]

    def kernel_at(address: int) -> str:
        index = bisect_right(starts, address - bias) - 1
        if index < 0 or address - bias >= starts[-1]:
            return OUTSIDE
        symbol = symbols[index][1]
        match = _KERNEL.match(symbol)
        return match[1] if match else called.get(symbol, OUTSIDE)

    return kernel_at


def _functions(library: Path) -> list[tuple[int, str]]:
    """Function symbols by address; the end of the code is the last one, without a name."""
    names = re.findall(
        r"^([0-9a-f]+) (?:[0-9a-f]+ )?[tTwW] (\S+)$",
        _shown("llvm-nm", library, "-n", "--print-size", "--defined-only"),
        re.MULTILINE,
    )
    address, _, size = _text(library)
    return [*((int(at, 16), name) for at, name in names), (address + size, "")]


def _launch(library: Path) -> int:
    """The address in a standalone library of the function that runs a parallel loop (runtime.c)."""
    for address, name in _functions(library):
        if name == "TVMBackendParallelLaunch":
            return address
    raise UserError(
        f"{library}: the function that starts its threads has no symbol (stripped, or an old build); build it again"
    )


def _text(library: Path) -> tuple[int, int, int]:
    """Address, offset in the file and size of the code."""
    shown = _shown("llvm-readelf", library, "-S", "--wide")
    match = re.search(r" \.text\s+PROGBITS\s+(\w+) (\w+) (\w+)", shown)
    if match is None:
        raise UserError(f"{library}: has no code; build it again")
    address, offset, size = (int(number, 16) for number in match.groups())
    return address, offset, size


def _bias(library: Path, blocks: list[Block]) -> int:
    """Where the library was loaded: blocks are found in it by their bytes, and the place most of them imply is taken."""
    address, offset, size = _text(library)
    with library.open("rb") as file:
        file.seek(offset)
        code = file.read(size)
    votes: Counter[int] = Counter()
    for block in sorted(blocks, key=lambda block: -len(block.code)):
        at = code.find(block.code)
        if at >= 0 and code.find(block.code, at + 4) < 0:
            votes[block.address - (address + at)] += 1
        if votes.total() == _VOTES:
            break
    if not votes:
        raise UserError(f"{library}: nothing of it ran under QEMU; build it again")
    return votes.most_common(1)[0][0]


def _shown(tool: str, file: Path, *options: str) -> str:
    return run_tool([llvm_tool(tool), *options, str(file)], file).stdout
