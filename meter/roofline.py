"""How far kernels are from what the core and its memory allow (Williams et al., Roofline, CACM 52(4), 2009)."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from netship.meter.operators import LINE_BYTES, Metered, Operator
from netship.targets.escapes import counted

# Of the inference: a kernel with less to gain is not named.
_WORTH = 0.01
_MOST = 5


class Roof(NamedTuple):
    """What a core and its memory can do in a cycle: multiply-adds, and bytes from memory."""

    macs: float
    bytes: float

    def cycles(self, operator: Operator) -> float:
        """Cycles that the operator's multiply-adds, or the bytes that it fetched from memory, take at least."""
        return max(operator.macs / self.macs, operator.memory_bytes / self.bytes)


def roof(metered: Metered) -> Roof | None:
    """The roof of a build; None on several threads, of which only the slowest one's bytes are known."""
    if metered.threads > 1:
        return None
    return Roof(metered.peak, LINE_BYTES / sum(metered.hierarchy.line_cycles))


class Step(NamedTuple):
    """A kernel with much to gain.

    Attributes:
        operator: its layers, for people.
        above: cycles above the roof.
        core: of them, those in the core; the rest waits for memory.
        share: of the inference.
        advice: in words; empty where nothing can be done.
        command: what tunes it; empty where no search does.
    """

    operator: str
    above: float
    core: float
    share: float
    advice: str
    command: str


class Advice(NamedTuple):
    """What to do next.

    Attributes:
        above: cycles that all kernels together are above their roofs.
        first: what comes before all kernels, with its command; empty where there is nothing.
        steps: the kernels for which something can be done, most to gain first.
        fixed: cycles that kernels which no search changes, being this project's own code, are above their roofs.
    """

    above: float
    share: float
    first: str
    command: str
    steps: tuple[Step, ...]
    fixed: float


def advice(metered: Metered) -> Advice | None:
    """What a build's kernels have to gain; None on several threads."""
    over = roof(metered)
    if over is None:
        return None
    first = _untuned(metered)
    steps = [_step(metered, each, over) for each in metered.operators]
    steps.sort(key=lambda step: -step.above)
    worth = [step for step in steps if step.advice and step.share >= _WORTH]
    above = sum(step.above for step in steps)
    fixed = sum(step.above for step in steps if not step.advice)
    command = tuning_command(metered) if first else ""
    share = above / metered.cycles
    return Advice(above, share, first, command, tuple(worth[:_MOST]), fixed)


def _untuned(metered: Metered) -> str:
    found = metered.records
    if found is None or found.complete:
        return ""
    return (
        f"{found.covered} of the network's {counted(found.tasks, 'task')} have tuning records of their own: tune the "
        "network"
    )


def _step(metered: Metered, operator: Operator, over: Roof) -> Step:
    above = operator.cycles - over.cycles(operator)
    core = min(above, operator.core_cycles - operator.macs / over.macs)
    command = tuning_command(metered, operator.task) if operator.task else ""
    if operator.task:
        words = "tune it"
    elif operator.own:
        words = ""
    elif operator.macs:
        words = "no tuning record gave its schedule"
    else:
        words = "it has no multiply-adds: it moves data"
    if 2 * core < above and metered.numbers == "float32":
        waits = "most of it waits for caches and memory, and int8 moves fewer bytes"
        words = f"{words}; {waits}" if words else waits
    share = above / metered.cycles
    return Step(operator.title, above, core, share, words, command)


def tuning_command(metered: Metered, task: str = "") -> str:
    """The search for one task of a build, or for all; MODEL stands for what the build was made from."""
    words = ["python -m tuning.tune", "--target", shlex.quote(metered.target)]
    words += ["--model MODEL", "--measure meter"]
    if metered.numbers == "float16":
        words.append("--precision float16 --calibration photos/")
    return " ".join([*words, *(["--tasks", shlex.quote(task)] if task else [])])
