"""Cycles of Thumb instructions on Cortex-M7, which issues up to two a cycle, in order.

Arm publishes no timings of this core. The rules are measurements on an STM32H743 by github.com/jnk0le/random
("pipeline cycle test", README.md, "cortex m7"). LLVM's model of the core is not used: llvm-mca lets no instruction end
before an older one, so that a load or an extension waits behind each multiply-accumulate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from netship.meter.thumb import Instruction
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


class Dual(NamedTuple):
    """The core as `dual_cycles` has it.

    Attributes:
        mispredicted: cycles of each time that a branch goes the rarer of its two ways.
        taken: cycles that each taken branch adds: none, as it is predicted.
    """

    triple: str
    cpu: str
    source: str
    mispredicted: float
    taken: float = 0.0


class _Result(NamedTuple):
    """After how many cycles an instruction can issue that needs a result.

    Attributes:
        address: for an address, or a shift before the sum.
        multiply: as a factor.
        addend: as what a multiply-accumulate adds to.
        store: as what is stored.
    """

    use: int
    address: int
    multiply: int
    addend: int
    store: int


_KINDS = {
    "load": _Result(1, 2, 2, 1, 0),
    # Bytes and halfwords.
    "narrow": _Result(2, 3, 3, 2, 0),
    "multiply": _Result(2, 3, 2, 1, 0),
    "bits": _Result(1, 2, 1, 1, 0),
    "integer": _Result(1, 1, 1, 1, 0),
    "float": _Result(3, 3, 3, 3, 1),
    "fma": _Result(5, 5, 5, 3, 3),
    "vldr": _Result(2, 2, 2, 3, 0),
    "vmov": _Result(3, 3, 3, 3, 1),
    "to core": _Result(2, 2, 2, 1, 1),
}
_MULTIPLIES = re.compile(r"mul|ml[as]|[su]mu|[su]ml|smm|umaal")
# Extensions, bit fields and DSP, which share one unit and go first in a pair.
_BITS = re.compile(
    r"[su]xt|[su]bfx|bf[ci]|pkh|clz|rev|rbit|[su]sat|u?q?d?[su]?h?(add|sub)(8|16)|[su]?q(add|sub)|[su]h?(asx|sax)|sel|usad"
)
# They shift before they compute.
_EARLY = re.compile(r"[su]bfx|rbit|rev")
_SHIFTED = re.compile(r", (lsl|lsr|asr|ror) #")
_FLOAT = re.compile(r"v(add|sub|n?mul|cvt|abs|neg|cmp|max|min|sel|rint)")
_FMA = re.compile(r"v(fn?m[as]|n?ml[as])\.")
# Middle of 2 to 12, as Cortex-M4's.
_BLOCKING = {"sdiv": 7, "udiv": 7, "vdiv.f32": 16, "vsqrt.f32": 14}
# Rounds that a block runs before the one whose cycles count.
_ROUNDS = 3


def dual_cycles(texts: Sequence[Instruction]) -> float:
    """Cycles of a block in its steady state, as if it ran again and again."""
    if not texts:
        return 0.0
    issued: dict[str, tuple[int, _Result]] = {}
    cycle, older = 0, None
    ends = [0]
    for _ in range(_ROUNDS + 2):
        for each in texts:
            ready = max(
                (at + _wait(result, name, each))
                for name, (at, result) in [
                    ("", (0, _KINDS["integer"])),
                    *issued.items(),
                ]
                if not name or name in read(each)
            )
            if older is None or ready > cycle or not _can_pair(older, each):
                cycle = max(cycle + 1, ready)
                older = each
            else:
                # A third one has to wait for the next cycle.
                older = None
            result = _KINDS[_kind(each)]
            for name in written(each):
                moved = name in addressed(each)
                issued[name] = cycle, _KINDS["integer"] if moved else result
            busy = _busy(each)
            if busy > 1:
                cycle, older = cycle + busy - 1, None
        ends.append(cycle)
    return (ends[-1] - ends[-3]) / 2


def _wait(result: _Result, name: str, each: Instruction) -> int:
    if not name:
        return 0
    if name in addressed(each):
        return result.address
    if STORE.fullmatch(each.name) or each.name == "strd" or each.name.startswith("st"):
        return result.store
    if name in addend(each):
        return result.addend
    if _kind(each) == "multiply":
        return result.multiply
    shifts = _SHIFTED.search(each.operands) and each.operands.rfind(name) > 3
    return (
        max(result.use, result.address - 1)
        if shifts or _EARLY.match(each.name)
        else result.use
    )


def _kind(each: Instruction) -> str:
    if LOAD.fullmatch(each.name):
        if each.name.startswith("v"):
            return "vldr"
        return "load" if each.name == "ldr" else "narrow"
    if each.name == "ldrd" or MULTIPLE.fullmatch(each.name):
        return "load"
    if _MULTIPLIES.match(each.name):
        return "multiply"
    if _BITS.match(each.name):
        return "bits"
    if _FMA.match(each.name):
        return "fma"
    if each.name.startswith("vmov"):
        return "to core" if re.match(r"r|lr", each.operands) else "vmov"
    return "float" if _FLOAT.match(each.name) else "integer"


def _busy(each: Instruction) -> int:
    if MULTIPLE.fullmatch(each.name):
        return (registers(each.operands) + 1) // 2
    return _BLOCKING.get(each.name, 1)


def _can_pair(older: Instruction, younger: Instruction) -> bool:
    kinds = _kind(older), _kind(younger)
    stores = [bool(STORE.fullmatch(each.name)) for each in (older, younger)]
    for each in (older, younger):
        if each.name in ("ldrd", "strd") or MULTIPLE.fullmatch(each.name):
            return False
        # A double, or two registers at once.
        if each.name.startswith("v") and re.match(
            r"d|\w+, \w+, \w+, \w+", each.operands
        ):
            return False
    if written(older) & written(younger) or all(stores):
        return False
    if kinds[1] == "bits" or kinds == ("multiply", "multiply"):
        return False
    if "multiply" in kinds and any(stores):
        return False
    arithmetic = {"float", "fma"}
    if arithmetic.issuperset(kinds) or (
        "fma" in kinds and {"vldr", "vmov", "to core"} & set(kinds)
    ):
        return False
    return not all(
        _SHIFTED.search(each.operands) and not LOAD.fullmatch(each.name)
        for each in (older, younger)
    )
