"""Exact counts of the instructions of an aarch64 process, block by block, by a plugin in QEMU's user mode.

A program marks the part to count with two hints that are no-ops everywhere else: ``hint #0x60`` begins it,
``hint #0x61`` ends it. Without them everything is counted, and `subtract` takes one run from another.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from netship.targets.errors import UserError, last_line
from netship.targets.presets import native
from netship.targets.toolchain import compile_once

PLUGIN = Path(__file__).with_name("plugin.c")
SERIAL = Path(__file__).with_name("serial.c")
# QEMU's plugin API 1: docs/devel/tcg-plugins.rst of each release.
_OLDEST, _NEWEST = (4, 2), (8, 1)
# Addresses decide which lines share a set of a cache. In a reserved region QEMU gives the same ones in every run.
_SAME_PLACE = ("-R", "64G")
# Our own programs begin a refusal with it.
_REFUSAL = "error: "
_INSTALL = "install it with `apt install qemu-user` (the static QEMU takes no plugins)"


class Cache(NamedTuple):
    """One level: its size in bytes and its ways; lines have 64 bytes."""

    bytes: int
    ways: int

    @property
    def sets(self) -> int:
        return self.bytes // (64 * self.ways)


class Block(NamedTuple):
    """One translated block of one run.

    Attributes:
        address: of its first instruction, in the process.
        code: its instructions, four bytes each.
        executions: how often it ran.
        misses: lines that each level of the cache model did not have.
    """

    address: int
    code: bytes
    executions: int
    misses: tuple[int, ...] = ()

    @property
    def instructions(self) -> int:
        return len(self.code) // 4

    @property
    def end(self) -> int:
        return self.address + len(self.code)


class Part(NamedTuple):
    """What ran between two marks.

    Attributes:
        thread: of the parallel region, from 0; None outside of one.
    """

    thread: int | None
    blocks: list[Block]


def find_qemu() -> str:
    """The QEMU that takes plugins; a UserError where there is none, or one with another plugin API."""
    found = shutil.which("qemu-aarch64")
    if found is None:
        raise UserError(f"no qemu-aarch64 to count with; {_INSTALL}")
    match = re.search(r"version (\d+)\.(\d+)", qemu_version())
    release = (int(match[1]), int(match[2])) if match else (0, 0)
    if not _OLDEST <= release <= _NEWEST:
        raise UserError(
            f"{found}: QEMU {release[0]}.{release[1]} has another plugin API; the meter knows that of QEMU "
            f"{_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]} (Debian 12 has 7.2)"
        )
    return found


def qemu_version() -> str:
    """What the QEMU that counts says of itself; empty where there is none."""
    found = shutil.which("qemu-aarch64")
    if found is None:
        return ""
    command = [found, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def plugin() -> Path:
    """The plugin's library for this machine, compiled once and kept in the cache folder."""
    target = ("-target", native().linker)
    options = ("-O2", "-shared", "-fPIC")
    return compile_once(PLUGIN, "meter-plugin.so", *target, *options)


def count(
    command: Sequence[str],
    *,
    cpu: str,
    root: Path | None = None,
    caches: Sequence[Cache] = (),
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> tuple[list[Block], str]:
    """Run an aarch64 program on one thread and count; returns the blocks that ran and what it printed.

    Args and errors as `count_parts`.
    """
    parts, said = count_parts(
        command,
        cpu=cpu,
        root=root,
        caches=caches,
        environment=environment,
        seconds=seconds,
    )
    return merged(parts), said


def serial_library() -> Path:
    """What makes an aarch64 program run the tasks of its parallel regions one after another, when it is preloaded."""
    options = ("-target", "aarch64-linux-gnu.2.28", "-O2", "-shared", "-fPIC")
    return compile_once(SERIAL, "meter-serial.so", *options)


def count_parts(
    command: Sequence[str],
    *,
    cpu: str,
    root: Path | None = None,
    caches: Sequence[Cache] = (),
    private: int = 0,
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> tuple[list[Part], str]:
    """Run an aarch64 program and count; returns its parts in the order they ran, and what it printed.

    Args:
        command: the program and its arguments.
        cpu: QEMU's name of the CPU.
        root: where the program finds its libraries (QEMU's ``-L``).
        caches: from the first level outwards; without them counting is faster.
        private: how many of the levels each thread has for itself.
        threads: of OpenMP's and TVM's parallel regions, 4 at most.
        environment: the program's whole environment; this process's would shift its stack and change its counts.
        seconds: time limit.

    Raises:
        UserError: QEMU is missing or cannot take the plugin.
        CountingError: the program failed, or took too long.
    """
    qemu = find_qemu()
    with tempfile.TemporaryDirectory(prefix="netship-meter-") as scratch:
        output = Path(scratch, "blocks")
        words = f"{plugin()},out={output}"
        if caches:
            words += ",caches=" + "/".join(f"{c.sets}:{c.ways}" for c in caches)
            words += f",private={private}"
        # In the emulated program's environment alone: this machine's linker cannot load the library.
        parallel = [
            f"LD_PRELOAD={serial_library()}",
            f"NETSHIP_METER_THREADS={threads}",
        ]
        given = (
            [word for each in parallel for word in ("-E", each)] if threads > 1 else []
        )
        where = ["-L", str(root)] if root else []
        result = run(
            [
                qemu,
                *_SAME_PLACE,
                *given,
                "-cpu",
                cpu,
                *where,
                "-plugin",
                words,
                *command,
            ],
            environment or {},
            seconds,
        )
        if result.returncode:
            said = result.stderr.strip() or result.stdout
            raise CountingError(_failure(cpu, result.returncode, said))
        return read_parts(output), result.stdout


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """A program's end under QEMU, with what it printed.

    Args:
        environment: the program's whole environment.
        seconds: time limit.
        folder: where it runs.

    Raises:
        CountingError: it took too long.
    """
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CountingError(f"no end within {seconds:g} s under QEMU") from None


class CountingError(UserError):
    """The program that was to be counted failed."""


def _failure(cpu: str, code: int, said: str) -> str:
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        return "was killed under QEMU; end other programs if memory is short, then try again"
    last = last_line(said)
    if code in (-4, 132) or "SIGILL" in said or "Illegal instruction" in said:
        return f"needs an instruction that {cpu} does not have; build for that CPU"
    if last.startswith(_REFUSAL):
        return last.removeprefix(_REFUSAL)
    return f"failed under QEMU with exit code {code}: {last}"


def read_blocks(path: Path) -> list[Block]:
    """Read the plugin's file as one part."""
    return merged(read_parts(path))


def read_parts(path: Path) -> list[Part]:
    """Read the plugin's file; a block that was translated several times is one block of each part."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    if not lines or lines.pop() != "end":
        raise CountingError(
            f"{path}: the counts were not written whole; is the disk full?"
        )
    parts = [Part(None, [])]
    for line in lines:
        if line.startswith("part "):
            number = int(line.removeprefix("part "))
            parts.append(Part(number - 1 if number else None, []))
            continue
        address, _, executions, *misses, code = line.split()
        block = Block(
            int(address, 16),
            bytes.fromhex(code),
            int(executions),
            tuple(map(int, misses)),
        )
        parts[-1].blocks.append(block)
    return [Part(part.thread, merged([part])) for part in parts if part.blocks]


def merged(parts: Iterable[Part]) -> list[Block]:
    """The blocks of all parts, each block once."""
    found: dict[tuple[int, bytes], Block] = {}
    for block in (block for part in parts for block in part.blocks):
        key = block.address, block.code
        found[key] = _plus(found[key], block) if key in found else block
    return sorted(found.values())


def _plus(one: Block, other: Block, sign: int = 1) -> Block:
    misses = tuple(a + sign * b for a, b in zip(one.misses, other.misses, strict=True))
    return one._replace(
        executions=one.executions + sign * other.executions, misses=misses
    )


def subtract(longer: Iterable[Block], shorter: Iterable[Block]) -> list[Block]:
    """The blocks that the longer run has in addition to the shorter one's, matched by address and code."""
    rest = {(block.address, block.code): block for block in shorter}
    differences = (
        _plus(block, rest[block.address, block.code], -1)
        if (block.address, block.code) in rest
        else block
        for block in longer
    )
    return [block for block in differences if block.executions > 0]
