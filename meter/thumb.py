"""Thumb blocks that QEMU counted, step by step, and their instructions as text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from netship.meter.counting import CountingError
from netship.targets.errors import UserError
from netship.targets.toolchain import llvm_tool

# Of thumb.c: lines fetched after a jump and after the line before them, then lines read from up to three ranges.
MISSES = 5
_NOP = "0x00 0xbf "
# Takes what an IT at the end of a block left over.
_SEPARATOR = _NOP * 4
_SHOWN = re.compile(r"^\s+(\S+)\s*(.*?)\s*@ encoding: \[(.*)\]$")
_MARK = re.compile(r"aff3[89a-e][0-9a-f]80")


class Block(NamedTuple):
    """One translated block of one step.

    Attributes:
        address: of its first instruction.
        code: its instructions, two or four bytes each.
        executions: how often it ran.
        jumps: how often the next block was not the one behind it.
        misses: lines that the models of flash and caches did not have (MISSES).
    """

    address: int
    code: bytes
    executions: int
    jumps: int
    misses: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.address + len(self.code)


class Instruction(NamedTuple):
    """One instruction; ``name`` has neither a width nor a condition.

    Attributes:
        text: as llvm-mca takes it; a call is a branch.
        conditional: it stands in an IT block.
        wide: it has four bytes.
    """

    name: str
    operands: str
    text: str
    conditional: bool
    wide: bool


def read_steps(path: Path, steps: int) -> list[list[Block]]:
    """Read the plugin's file; a block that was translated several times is one block.

    Raises:
        CountingError: the file is not whole, or has other steps.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    if not lines or lines.pop() != "end":
        raise CountingError(
            f"{path}: the counts were not written whole; is the disk full?"
        )
    found: list[dict[tuple[int, bytes], Block]] = []
    for line in lines:
        words = line.split()
        if words[0] == "step":
            found.append({})
            continue
        address, _, executions, jumps, *misses, code = words
        key = int(address, 16), bytes.fromhex(code)
        block = Block(*key, int(executions), int(jumps), tuple(map(int, misses)))
        known = found[-1].get(key)
        found[-1][key] = _sum(known, block) if known else block
    if len(found) != steps:
        raise CountingError(
            f"{len(found)} of {steps} steps ran; build the project again"
        )
    return [sorted(step.values()) for step in found]


def _sum(one: Block, other: Block) -> Block:
    return one._replace(
        executions=one.executions + other.executions,
        jumps=one.jumps + other.jumps,
        misses=tuple(a + b for a, b in zip(one.misses, other.misses, strict=True)),
    )


def split(code: bytes) -> Iterator[bytes]:
    """Each instruction's bytes (Arm v7-M ARM, DDI 0403E, A5.1: two halfwords begin with 0b11101 or 0b1111)."""
    at = 0
    while at < len(code):
        width = 4 if code[at + 1] >> 3 >= 0b11101 else 2
        yield code[at : at + width]
        at += width


def is_mark(word: bytes) -> bool:
    """One of the two hints that begin a step."""
    return len(word) == 4 and _MARK.fullmatch(word.hex()) is not None


def disassemble(
    codes: Sequence[bytes], triple: str, cpu: str
) -> list[tuple[Instruction, ...]]:
    """The instructions of each block, without the marks.

    Raises:
        UserError: one is not the CPU's.
    """
    words = [[word for word in split(code) if not is_mark(word)] for code in codes]
    lines = "\n".join(
        " ".join(f"0x{byte:02x}" for word in each for byte in word) + " " + _SEPARATOR
        for each in words
    )
    options = ["--disassemble", f"--triple={triple}", f"-mcpu={cpu}", "-show-encoding"]
    shown = (_SHOWN.match(line) for line in run_llvm("llvm-mc", options, lines))
    decoded = [(match[1], match[2], _bytes(match[3])) for match in shown if match]
    results, at = [], 0
    for each in words:
        rows = []
        for word in [*each, *[b"\x00\xbf"] * 4]:
            if at == len(decoded) or decoded[at][2] != word:
                raise UserError(
                    f"{cpu} has no instruction {word.hex()}; build for this CPU"
                )
            rows.append(decoded[at])
            at += 1
        results.append(tuple(_instructions(rows[:-4])))
    return results


def _instructions(rows: Iterable[tuple[str, str, bytes]]) -> Iterator[Instruction]:
    left = 0
    for mnemonic, operands, word in rows:
        name, dot, suffix = mnemonic.partition(".")
        kind = "" if suffix in ("w", "n") else dot + suffix
        conditional = left > 0
        if conditional:
            # VPST and VPT are no IT: their instructions end in "t" or "e", which no rule here reads.
            name, left = name[:-2], left - 1
        elif re.fullmatch("it[te]{0,3}", name):
            left = len(name) - 1
        # llvm-mca charges 100 cycles for a call.
        called = re.sub(r"^bl\b", "b", re.sub(r"^blx\b", "bx", mnemonic))
        text = f"{called} {operands}".strip()
        yield Instruction(name + kind, operands, text, conditional, len(word) == 4)


def _bytes(text: str) -> bytes:
    return bytes(int(each, 16) for each in text.split(","))


def run_llvm(tool: str, options: Sequence[str], text: str) -> list[str]:
    """Lines of a program of LLVM's.

    Raises:
        UserError: it printed nothing but an error.
    """
    command = [llvm_tool(tool), *options]
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False
    )
    # llvm-mc names what it cannot decode and goes on.
    if result.returncode and not result.stdout:
        raise UserError(
            f"{tool}: {(result.stderr.strip().splitlines() or ['failed'])[-1]}"
        )
    return result.stdout.splitlines()
