"""What Thumb instructions cost a Cortex-M core whose memory never waits.

Cores that issue one instruction at a time are reckoned by tables (`Table`), Cortex-M7 by measured rules (`Dual`),
Cortex-M55 and M85 by LLVM's scheduling models (`Simulated`). Blocks are reckoned one by one. All figures are estimates: alignment
of instructions inside a block, the early end of a division, and contention on a bus are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from netship.meter.thumb import Block, Instruction, disassemble, run_llvm, split
from netship.meter.thumb_dual import Dual, dual_cycles
from netship.meter.thumb_registers import (
    LOAD,
    MULTIPLE,
    STORE,
    addend,
    addressed,
    read,
    registers,
    written,
)
from netship.targets.errors import UserError


class Table(NamedTuple):
    """A core that issues one instruction at a time.

    Attributes:
        source: document and section of the instruction timings.
        cycles: of instructions that the first pattern matches; every other one takes 1.
        load, store: of a load and a store of one register.
        pipelined: a load takes one cycle where a load or store follows that does not need it for its address.
        early_address: cycles that an address waits for the instruction before that makes it.
        load_use: cycles that an instruction waits for the load before it.
        multiple: of LDM, STM, PUSH and POP, added to their number of registers.
        late_float: cycles that an instruction waits for the result of a floating-point one before it.
        refill: of a taken branch, and of BL; of one whose target is in a register; of a POP of the program counter.
        aligned: a taken branch to an instruction of four bytes that is not aligned to four takes one more.
        pairs: two instructions of two bytes issue together where one of them is simple.
    """

    triple: str
    cpu: str
    source: str
    cycles: tuple[tuple[str, float], ...]
    load: int = 2
    store: int = 1
    pipelined: bool = True
    early_address: int = 1
    load_use: int = 0
    multiple: int = 1
    late_float: int = 1
    refill: tuple[int, int, int, int] = (1, 1, 2, 2)
    aligned: bool = True
    pairs: bool = False


class Simulated(NamedTuple):
    """A core by LLVM's scheduling model.

    Attributes:
        mispredicted: cycles of each time that a branch goes the rarer of its two ways.
        taken: cycles that each taken branch adds, LE and LETP left out.
    """

    triple: str
    cpu: str
    source: str
    mispredicted: float
    taken: float


# Middle of "2 to 12".
_DIVISION = (r"[su]div", 7.0)
# As LLVM's ARMScheduleM4.td has them. VLDR and VSTR of a double have a register more.
_FLOAT = (
    (r"vf(n)?m[as]\.f32|v(n)?ml[as]\.f32", 3.0),
    (r"v(div|sqrt)\.f32", 14.0),
)
_MEASURED = (
    "github.com/jnk0le/random, pipeline cycle test, measured on STM32F103 and STM32F407"
)

CORES: Mapping[str, Table | Dual | Simulated] = {
    "cortex-m0plus": Table(
        "thumbv6m-none-eabi",
        "cortex-m0plus",
        "Cortex-M0+ TRM, DDI 0484C, table 3.1, with the single-cycle multiplier; not checked against its text",
        cycles=((r"mrs|msr|dmb|dsb|isb", 3.0),),
        store=2,
        pipelined=False,
        early_address=0,
        refill=(1, 2, 1, 2),
        aligned=False,
    ),
    "cortex-m3": Table(
        "thumbv7m-none-eabi",
        "cortex-m3",
        f"Cortex-M3 TRM, DDI 0337H, table 3.1; {_MEASURED}",
        cycles=(
            _DIVISION,
            (r"ml[as]", 2.0),
            # Middle of "3 to 5" and of "4 to 7".
            (r"[su]mull", 4.0),
            (r"[su]mlal", 5.5),
        ),
    ),
    "cortex-m4": Table(
        "thumbv7em-none-eabihf",
        "cortex-m4",
        f"Cortex-M4 TRM, 100166_0001, 3.3.1; LLVM's ARMScheduleM4.td for the FPU; {_MEASURED}",
        cycles=(_DIVISION, *_FLOAT),
    ),
    "cortex-m33": Table(
        "thumbv8m.main-none-eabihf",
        "cortex-m33",
        "no table is published; Cortex-M4's, with loads of one cycle whose result the next instruction waits for, and "
        "pairs of 16-bit instructions as LLVM describes for Cortex-M55 (ARMScheduleM55.td)",
        cycles=(_DIVISION, *_FLOAT),
        load=1,
        pipelined=False,
        early_address=0,
        load_use=1,
        multiple=0,
        pairs=True,
    ),
    "cortex-m7": Dual(
        "thumbv7em-none-eabihf",
        "cortex-m7",
        "pairs, latencies and mispredicted branches measured on STM32H743: github.com/jnk0le/random, pipeline cycle test",
        mispredicted=8.0,
    ),
    "cortex-m55": Simulated(
        "thumbv8.1m.main-none-eabihf",
        "cortex-m55",
        "LLVM's model of cortex-m55 (ARMScheduleM55.td: two beats an MVE instruction; a taken branch costs 3 cycles)",
        mispredicted=0.0,
        taken=2.0,
    ),
    "cortex-m85": Simulated(
        "thumbv8.1m.main-none-eabihf",
        "cortex-m85",
        "LLVM's model of cortex-m85 (ARMScheduleM85.td: two instructions a cycle, two beats an MVE instruction; a "
        "mispredicted forward branch costs 7 cycles)",
        mispredicted=7.0,
        taken=0.0,
    ),
}
# Arm describes pairs of 16-bit instructions of which one is simple: LLVM's ARMScheduleM55.td, "Dual Issue".
_SIMPLE = re.compile(r"nop|it[te]*|b\w{0,2}|(add|sub)s? .*#.*|[su]xt[bh] .*|movs? .*")
_CONDITIONS = "eq|ne|hs|lo|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le"
_BRANCH = re.compile(
    rf"b(l|x|lx|xns|lxns)?|b({_CONDITIONS})|cbn?z|tb[bh]|let?p?|[wd]lst?p?(\.\d+)?"
)
_CONDITIONAL = re.compile(rf"b({_CONDITIONS})|cbn?z|let?p?")
_LOOP_END = re.compile(r"le(tp)?")
# Rounds that llvm-mca simulates of a block: the difference is the steady state.
_FEW, _MANY = 4, 20


def core(cpu: str) -> Table | Dual | Simulated:
    """How a CPU is modelled.

    Raises:
        UserError: it is not.
    """
    if cpu not in CORES:
        raise UserError(
            f"no cycle model for {cpu!r}; of microcontrollers there are {', '.join(CORES)}"
        )
    return CORES[cpu]


def costs(blocks: Sequence[Block], cpu: str) -> list[float]:
    """Core cycles of all executions of each block; ``blocks`` have all that a branch leads to.

    Raises:
        UserError: no model of the CPU, or LLVM fails.
    """
    model = core(cpu)
    codes = list(dict.fromkeys(block.code for block in blocks))
    texts = dict(zip(codes, disassemble(codes, model.triple, model.cpu), strict=True))
    if isinstance(model, Table):
        straight = {code: straight_cycles(text, model) for code, text in texts.items()}
        wide = {block.address for block in blocks if len(next(split(block.code))) == 4}
        return [
            block.executions * straight[block.code]
            + block.jumps * _refill(block, texts[block.code], wide, model)
            for block in blocks
        ]
    each = (
        [dual_cycles(text) for text in texts.values()]
        if isinstance(model, Dual)
        else simulate(list(texts.values()), model)
    )
    simulated = dict(zip(codes, each, strict=True))
    return [
        block.executions * simulated[block.code]
        + _branching(block, texts[block.code], model)
        for block in blocks
    ]


def straight_cycles(texts: Sequence[Instruction], table: Table) -> float:
    """Cycles of instructions one after the other, no branch taken."""
    total, paired = 0.0, False
    for at, each in enumerate(texts):
        following = texts[at + 1] if at + 1 < len(texts) else None
        before = texts[at - 1] if at else None
        waits = _waits(before, each, table) if before else 0
        together = (
            table.pairs
            and before is not None
            and not (paired or waits)
            and _can_pair(before, each)
        )
        paired = together
        total += waits + (0 if together else _own(each, following, table))
    return total


def _own(each: Instruction, following: Instruction | None, table: Table) -> float:
    if MULTIPLE.fullmatch(each.name):
        return table.multiple + registers(each.operands)
    if each.name in ("ldrd", "strd"):
        return table.multiple + 2
    double = each.operands.startswith("d") and each.name.startswith("v")
    if LOAD.fullmatch(each.name):
        piped = (
            table.pipelined
            and following is not None
            and not double
            and (LOAD.fullmatch(following.name) or STORE.fullmatch(following.name))
            and not written(each) & addressed(following)
        )
        return 1 if piped else table.load + double
    if STORE.fullmatch(each.name):
        by_register = re.search(r"\[[^,\]]+, [a-z]", each.operands) is not None
        stalls = table.pipelined and (
            by_register
            or (following is not None and LOAD.fullmatch(following.name) is not None)
        )
        # VSTR takes 2 in every case.
        floats = table.pipelined and each.name.startswith("v")
        return table.store + (stalls or floats) + double
    for pattern, cycles in table.cycles:
        if re.fullmatch(pattern, each.name):
            return cycles
    return 1


def _waits(before: Instruction, each: Instruction, table: Table) -> int:
    results = written(before)
    if LOAD.fullmatch(before.name) or before.name == "ldrd":
        return table.load_use if results & read(each) else 0
    if (
        before.name.startswith("v")
        and each.name.startswith("v")
        and not STORE.fullmatch(before.name)
        and not re.match(r"vmov|vmrs|vmsr|vcmp|v(ldm|stm|push|pop)", before.name)
    ):
        # A sum takes its addend a cycle later.
        return table.late_float if results & read(each) - addend(each) else 0
    moves = LOAD.fullmatch(each.name) or STORE.fullmatch(each.name)
    return table.early_address if moves and results & addressed(each) else 0


def _can_pair(one: Instruction, other: Instruction) -> bool:
    if one.wide or other.wide or written(one) & (read(other) | written(other)):
        return False
    return any(
        _SIMPLE.fullmatch(f"{x.name} {x.operands}".strip()) or _BRANCH.fullmatch(x.name)
        for x in (one, other)
    )


def _refill(
    block: Block, texts: Sequence[Instruction], wide: set[int], table: Table
) -> int:
    """Cycles that a taken branch at the end of a block adds."""
    if not texts:
        return 0
    last = texts[-1]
    direct, link, register, popped = table.refill
    target = re.search(r"#(-?\d+)$", last.operands)
    if "pc" in last.operands.split(", ")[-1] and MULTIPLE.fullmatch(last.name):
        return popped
    if not _BRANCH.fullmatch(last.name) or target is None:
        return register if _BRANCH.fullmatch(last.name) or "pc" in last.operands else 0
    width = 4 if last.wide else 2
    address = block.end - width + 4 + int(target[1])
    late = table.aligned and address % 4 != 0 and address in wide
    return (link if last.name == "bl" else direct) + late


def _branching(
    block: Block, texts: Sequence[Instruction], model: Dual | Simulated
) -> float:
    if not texts or not block.jumps:
        return 0.0
    last = texts[-1]
    rarer = min(block.jumps, block.executions - block.jumps)
    conditional = _CONDITIONAL.fullmatch(last.name) or last.conditional
    taken = 0.0 if _LOOP_END.fullmatch(last.name) else block.jumps * model.taken
    return taken + (rarer * model.mispredicted if conditional else 0.0)


def simulate(blocks: Iterable[Sequence[Instruction]], model: Simulated) -> list[float]:
    """Cycles of each block in the steady state of llvm-mca, as if it ran again and again."""
    # The end of a hardware loop costs nothing. LLVM's model of Cortex-M85 has 100 cycles for one.
    bodies = [
        [each.text for each in _complete(texts) if not _LOOP_END.fullmatch(each.name)]
        for texts in blocks
    ]
    regions = []
    for index, body in enumerate(bodies):
        regions += [f"# LLVM-MCA-BEGIN {index}", *(body or ["nop"]), "# LLVM-MCA-END"]
    few, many = (_total_cycles(regions, rounds, model) for rounds in (_FEW, _MANY))
    return [
        (long - short) / (_MANY - _FEW) if body else 0.0
        for body, short, long in zip(bodies, few, many, strict=True)
    ]


def _total_cycles(regions: list[str], rounds: int, model: Simulated) -> list[int]:
    options = [
        f"-mtriple={model.triple}",
        f"-mcpu={model.cpu}",
        f"-iterations={rounds}",
    ]
    options += ["-skip-unsupported-instructions=any", "-json"]
    options += ["-instruction-info=false", "-resource-pressure=false"]
    said = json.loads(
        "\n".join(run_llvm("llvm-mca", options, "\n".join(regions) + "\n"))
    )
    found = {
        int(each["Name"]): each["SummaryView"]["TotalCycles"]
        for each in said["CodeRegions"]
    }
    # A block of which LLVM has nothing costs nothing.
    return [
        found.get(index, 0) for index in range(sum("BEGIN" in line for line in regions))
    ]


def _complete(texts: Sequence[Instruction]) -> Sequence[Instruction]:
    """Without an IT whose instructions the block does not have."""
    for at, each in enumerate(texts):
        if re.fullmatch("it[te]{0,3}", each.name) and at + len(each.name) > len(texts):
            return texts[:at]
    return texts
