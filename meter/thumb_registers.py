"""Which registers a Thumb instruction reads and writes, as far as the timing of the Cortex-M cores asks."""

from __future__ import annotations

import re

from netship.meter.thumb import Instruction

LOAD = re.compile(r"v?ldr(?!d$)\w*(\.\d+)?")
STORE = re.compile(r"v?str(?!d$)\w*(\.\d+)?")
MULTIPLE = re.compile(r"(v?)(ldm|stm|push|pop)\w*")
_REGISTER = re.compile(r"\b(?:r\d+|sp|lr|pc|[sdq]\d+)\b")
_WRITES_NONE = re.compile(r"cmp|cmn|tst|teq|b|cb|vcmp|push|stm|vpush|vstm|strd|it")
# Those that begin with "b" and write: bic, bfi, bfc.
_WRITES = re.compile(r"bic|bf[ci]")
_WRITES_TWO = re.compile(r"ldrd|[su]ml[as]l|[su]mull|umaal|vmov")
# They add to, or keep part of, what they write.
_READS_FIRST = re.compile(r"[su]ml[as]l|bf[ci]|movt|umaal|vf?n?m[al]?[as]\.")


def registers(operands: str) -> int:
    """Words in a register list, such as ``{r4, r5, pc}``; a double register has two."""
    listed = operands[operands.find("{") + 1 : operands.find("}")]
    return sum(2 if word.strip().startswith("d") else 1 for word in listed.split(","))


def written(each: Instruction) -> set[str]:
    """The registers that an instruction writes."""
    names = _REGISTER.findall(each.operands)
    # An index before or behind changes the base.
    base = re.search(r"\[(\w+)[^\]]*\](!|, )", each.operands)
    changed = {base[1]} if base else set()
    if STORE.fullmatch(each.name) or each.name == "strd":
        return changed
    if _WRITES_NONE.match(each.name) and not _WRITES.match(each.name):
        return changed
    if re.match(r"v?(ldm|pop)", each.name):
        return set(names)
    if each.name == "vmov" and len(names) < 4:
        return set(names[:1])
    return changed | set(names[: 2 if _WRITES_TWO.match(each.name) else 1])


def read(each: Instruction) -> set[str]:
    """The registers that an instruction reads."""
    names = _REGISTER.findall(each.operands)
    if STORE.fullmatch(each.name) or (
        _WRITES_NONE.match(each.name) and not _WRITES.match(each.name)
    ):
        return set(names)
    if re.match(r"v?(ldm|pop)", each.name):
        return set(names[:1])
    if each.name == "vmov" and len(names) == 4:
        return set(names[2:])
    # ADDS r0, #1 and ADD r0, r1 read what they write.
    constant = re.match(r"movs?$|movw|v?ldr|vmov|mvns?$", each.name)
    short = not constant and len(names) < 3 and each.operands.count(",") < 2
    unary = re.match(
        r"[su]xt|rev|clz|rbit|negs|vcvt|vabs|vneg|vsqrt|vmrs|mrs", each.name
    )
    if _READS_FIRST.match(each.name) or (short and not unary):
        return set(names)
    return set(names[1:])


def addend(each: Instruction) -> set[str]:
    """The registers that a multiply-accumulate adds to; it needs them later than the others."""
    names = _REGISTER.findall(each.operands)
    if re.match(r"vf?n?m[al]?[as]\.", each.name):
        return set(names[:1])
    if re.match(r"[su]ml[as]ld?x?$|umaal|smlal(bb|bt|tb|tt)", each.name):
        return set(names[:2])
    return (
        set(names[3:])
        if re.match(r"ml[as]|sml[as]|smml[as]|usada8", each.name)
        else set()
    )


def addressed(each: Instruction) -> set[str]:
    """The registers that an address is made of."""
    found = re.search(r"\[([^\]]*)\]", each.operands)
    return set(_REGISTER.findall(found[1])) if found else set()
