"""Schedules of neighbouring tasks: a convolution's schedule is a good first guess for one with other extents.

AutoScheduler's workload key begins with a hash of the computation without its extents. A schedule of a task with the
same hash keeps its steps; only the lengths of its splits are fitted to the new extents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from netship.compile.relay.tiles import nearest
from netship.records.lookup import Record, RecordLog
from netship.tuning.tasks import Task

_SPLIT = "SP"
# float16 values of a vector of 128 bits.
_LANES = 8


def candidates(task: Task, logs: Sequence[RecordLog], count: int) -> Iterator[str]:
    """Records of other logs, rewritten for a task, as JSON lines; those that do not fit are left out.

    Records of the task itself come first, log by log, the quickest first. Then come neighbours, tasks of the same
    structure: the quickest record of each, the nearest shapes first; then the second quickest of each, and so on.

    Args:
        logs: the preferred one first.
        count: neighbours fill the number of records up to it.
    """
    own = [
        record
        for log in logs
        if log.numbers == task.numbers
        for record in log.best.get(task.key, ())
    ]
    seen: set[str] = set()
    for record, widened in chain(((each, 1) for each in own), _neighbours(task, logs)):
        if not (widened == 1 and record.workload == task.key) and len(seen) >= count:
            return
        line = fitted(record, task, widened)
        if line and line not in seen:
            seen.add(line)
            yield line


def _neighbours(task: Task, logs: Sequence[RecordLog]) -> Iterator[tuple[Record, int]]:
    """Records of other tasks, and how many times as many numbers a vector has in this one."""
    found = []
    for order, log in enumerate(logs):
        same = log.numbers == task.numbers
        key = task.key if same else task.float32_key
        for workload, own in (
            log.best.items() if same or log.numbers == "float32" else ()
        ):
            away = distance(workload, key)
            if away < math.inf and not (same and workload == task.key):
                found += [
                    (rank, away, order, record, 1 if same else 2)
                    for rank, record in enumerate(own)
                ]
    return (
        (record, widened)
        for *_, record, widened in sorted(found, key=lambda each: each[:3])
    )


def distance(one: str, other: str) -> float:
    """Between two workload keys: the sum of their extents' ratios, as logarithms; infinite for different structures."""
    structure, *shapes = json.loads(one) or [None]
    other_structure, *other_shapes = json.loads(other)
    if structure != other_structure or list(map(_rank, shapes)) != list(
        map(_rank, other_shapes)
    ):
        return math.inf
    pairs = [
        pair
        for shape, other_shape in zip(shapes, other_shapes, strict=True)
        if isinstance(shape, list)
        for pair in zip(shape, other_shape, strict=True)
    ]
    if not all(isinstance(each, int) and each > 0 for each in chain(*pairs)):
        return math.inf
    return sum(abs(math.log(a) - math.log(b)) for a, b in pairs)


def _rank(shape: object) -> int:
    return len(shape) if isinstance(shape, list) else -1


def fitted(record: Record, task: Task, widened: int = 1) -> str | None:
    """A record's schedule for another task of its structure, as a JSON line; None if the steps do not fit.

    Args:
        widened: how many times as many numbers a vector has in the task.
    """
    whole = json.loads(record.line)
    whole["i"][0][0] = task.key
    steps = whole["i"][1][1]
    # Of each stage the innermost axis but for those of sums, which is the vector's.
    vectors = {
        step[1]: number
        for number, step in enumerate(steps)
        if step[0] == _SPLIT and len(step[4]) > 1
    }
    try:
        for number, step in enumerate(steps):
            if step[0] == _SPLIT and (widened != 1 or record.workload != task.key):
                _, stage, axis, _, lengths, _ = step
                if vectors.get(stage) == number:
                    lengths[-1] *= widened
                before = replayed(_with(whole, steps[:number]), task)
                extent = int(before.stages[stage].iters[axis].range.extent)
                unit = _LANES if widened != 1 and vectors.get(stage) == number else 1
                step[3:5] = extent, refit(lengths, extent, unit)
        replayed(whole, task)
    except Exception:  # noqa: BLE001 - foreign steps can fail in any way
        return None
    return json.dumps(whole)


def replayed(record: dict[str, Any], task: Task) -> Any:
    """The state of a task after a record's steps, each axis with its extent; loads the engine's compiler."""
    from tvm import auto_scheduler

    line = json.dumps(record)
    measured, _ = auto_scheduler.measure_record.load_record_from_string(line)
    return task.search.compute_dag.infer_bound_from_state(measured.state)


def _with(record: dict[str, Any], steps: list[Any]) -> dict[str, Any]:
    task, (constants, _) = record["i"]
    return {**record, "i": [task, [constants, steps]]}


def refit(lengths: Sequence[int], extent: int, unit: int = 1) -> list[int]:
    """The lengths of a split's inner axes for another extent, the innermost last.

    Their product divides the extent. Beginning with the innermost axis, the vector's, each keeps its length if that
    divides the rest of the extent, else it takes the divisor nearest in ratio.

    Args:
        unit: the innermost length is a multiple of it, where the extent is.
    """
    found: list[int] = []
    for length in reversed(lengths):
        found.insert(0, nearest(length, extent, 1 if found else unit))
        extent //= found[0]
    return found
