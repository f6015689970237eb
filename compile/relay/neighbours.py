"""Schedules of neighbours: a convolution without a record takes that of a record of another convolution, fitted to it.

AutoScheduler tiles every convolution in one way: each axis of the output is split into four loops, each axis that is
summed into two. So a record's steps serve a convolution of other extents, another kernel, and with other operators
fused behind it, once its stages are numbered as there and the lengths of its splits divide the new extents.

The cost of a fitted schedule is estimated from the record's own time, and by a model of the innermost loops, before
and after: how full its vectors are, and how many of them are sums at a time. Nothing is compiled or measured for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from netship.compile.relay import tiles
from netship.compile.relay.tiles import Vectors, vectors_of
from netship.records.lookup import Record, RecordLog
from netship.targets.presets import PRESETS

_CONVOLUTION, _DEPTHWISE = "conv2d_nhwc", "depthwise_conv2d_nhwc"
# A cost is this times higher for each factor e between the extents of two convolutions, and for a stride, a kernel or a
# padding of another kind: a record is for the caches too, which the model leaves out.
_STRANGE, _OTHER_KIND = 0.15, 0.3


def _of_preset(name: str, numbers: str) -> Vectors | None:
    found = (vectors_of(each).of(numbers) for each in PRESETS if each.name == name)
    return next(found, None)


class Loops(NamedTuple):
    """The loops of a convolution.

    Attributes:
        extents: of its axes as AutoScheduler has them: n, h, w, channels; then what is summed: h, w, and input channels
            but of a depthwise convolution.
        stride: how many rows of the input lie between two of the output.
    """

    extents: tuple[int, ...]
    stride: int

    @property
    def depthwise(self) -> bool:
        return len(self.extents) == 6

    def like(self, other: Loops) -> bool:
        """Whether a schedule for ``other`` can be expected to be as good here: both pass over their input in one way."""
        if self.depthwise or other.depthwise:
            return self.depthwise == other.depthwise
        kinds = [(*each.extents[4:6], each.stride) for each in (self, other)]
        return kinds[0] == kinds[1] or self.pointwise and other.pointwise

    @property
    def pointwise(self) -> bool:
        return self.extents[4:6] == (1, 1)

    def away(self, other: Loops) -> float:
        """How strange a record for ``other`` is here: a factor of its cost, 1 for the same loops."""
        h, w = (math.prod(each.extents[1:3]) for each in (self, other))
        pairs = [(h, w), (self.extents[3], other.extents[3])]
        pairs += zip(self.extents[6:], other.extents[6:], strict=True)
        logarithms = sum(abs(math.log(a / b)) for a, b in pairs)
        kinds = (self.stride != other.stride) + (
            self.extents[4:6] != other.extents[4:6]
        )
        return 1 + _STRANGE * logarithms + _OTHER_KIND * kinds


class Stages(NamedTuple):
    """Which of a kernel's stages is which, by AutoScheduler's numbers.

    Attributes:
        padding: what pads the image; None where nothing does.
        copies: the padding is one of zero pixels.
        sums: the convolution.
        between: what lies between it and the last stage.
        last: what is stored; the convolution itself where nothing is fused behind it.
    """

    padding: int | None
    copies: bool
    sums: int
    between: tuple[int, ...]
    last: int


class Fitted(NamedTuple):
    """A record for a kernel that has none, made of one that a neighbour has.

    Attributes:
        record: with the estimated seconds.
        log: the neighbour's.
        attained: seconds of the kernel at the neighbour's rate.
        alike: whether the neighbour is a convolution of the same kind.
        lanes: how many lanes of the vectors are taken for each that computes.
    """

    record: Record
    log: RecordLog
    attained: float
    alike: bool = True
    lanes: float = 1.0


def multiplies(dag: Any) -> bool:
    """Whether a kernel sums products of two tensors, as convolutions do: it is slow without a schedule."""
    return any(len(each.input_tensors) > 1 for each in _sums(dag))


def _sums(dag: Any) -> list[Any]:
    return [each for each in dag.ops if getattr(each, "reduce_axis", None)]


def fitting(
    key: str, dag: Any, logs: Sequence[RecordLog], vectors: Vectors
) -> Iterator[Fitted]:
    """Schedules for a kernel without a record, the one first that is estimated to be the quickest.

    Args:
        key: AutoScheduler's workload key of the kernel.
        logs: the preferred one first, which of equal estimates decides.
        vectors: of the target, in float32.
    """
    if not multiplies(dag):
        for log in logs:
            for own in log.best.values():
                yield from (
                    Fitted(
                        _record(key, each, _steps(each), each.seconds),
                        log,
                        each.seconds,
                    )
                    for each in own[:1]
                    if json.loads(each.workload)[0] == json.loads(key)[0]
                    and all(step[0] != "SP" for step in _steps(each))
                )
        return
    loops, stages = _loops_of(key, dag), _stages(dag)
    if loops is None or stages is None:
        return
    vectors = vectors.of(str(dag.ops[stages.sums].output(0).dtype))
    found = []
    known: tuple[str, float] | None = None
    for order, log in enumerate(logs):
        near = [
            (record, other, record.seconds / math.prod(other.extents))
            for record, other in _neighbours(log)
            if len(other.extents) == len(loops.extents)
        ]
        if not near:
            continue
        # Times that were taken on different machines say how good a schedule is among its log's only.
        quickest = min(rate for *_, rate in near)
        known = known or (log.measured, quickest)
        scale = 1.0 if log.measured == known[0] else known[1] / quickest
        before = _of_preset(log.preset, log.numbers) or vectors
        for number, (record, other, rate) in enumerate(near):
            attained = rate * scale * math.prod(loops.extents)
            lengths = [step[4] for step in _steps(record) if step[0] == "SP"]
            cost, chosen = tiles.fitted(
                tuple(map(tuple, lengths)), loops.extents, vectors
            )
            worse = cost / tiles.cost_of(lengths, loops.depthwise, before)
            seconds = attained * max(1.0, worse) * loops.away(other)
            whole = record, chosen, log, attained, loops.like(other)
            found.append((seconds, order, number, whole))
    for seconds, _, _, (record, chosen, log, attained, alike) in sorted(
        found, key=lambda each: each[:3]
    ):
        try:
            steps = _moved(record, loops, stages, chosen)
        except (LookupError, TypeError, ValueError):
            continue
        if steps is not None:
            fitted_record = _record(key, record, steps, seconds)
            lanes = tiles.lanes_taken(chosen, vectors)
            yield Fitted(fitted_record, log, attained, alike, lanes)


def _steps(record: Record) -> list[list[Any]]:
    steps: list[list[Any]] = json.loads(record.line)["i"][1][1]
    return steps


def _record(key: str, record: Record, steps: list[list[Any]], seconds: float) -> Record:
    whole = json.loads(record.line)
    whole["i"][0][0], whole["i"][1][1], whole["r"][0] = key, steps, [seconds]
    return Record(key, seconds, 0, record.when, json.dumps(whole))


@lru_cache(maxsize=64)
def _of_log(log: tuple[Record, ...]) -> tuple[tuple[Record, Loops], ...]:
    found = []
    for record in log:
        try:
            loops = _loops_of_record(record)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            continue  # A log may hold anything.
        if loops:
            found.append((record, loops))
    return tuple(found)


def _loops_of_record(record: Record) -> Loops | None:
    """What a record is of, by the splits that it begins with; None where it is not of a convolution's form."""
    splits = [step for step in _steps(record) if step[0] == "SP"]
    stride = _stride(record.workload)
    parts = [3] * 4 + [1] * (len(splits) - 4)
    if (
        not stride
        or len(splits) not in (6, 7)
        or len({step[1] for step in splits}) > 1
        or [len(step[4]) for step in splits] != parts
        or min(min(step[3], *step[4]) for step in splits) < 1
        or not all(
            isinstance(each, int) for step in _steps(record) for each in step[1:2]
        )
    ):
        return None
    return Loops(tuple(step[3] for step in splits), stride)


def _neighbours(log: RecordLog) -> tuple[tuple[Record, Loops], ...]:
    """The quickest record of each convolution of a log, and the loops that it is of."""
    return _of_log(tuple(own[0] for own in log.best.values()))


def _stride(key: str) -> int | None:
    """Of the convolution that a workload key is of; None where its shapes do not show one."""
    shapes = [each for each in json.loads(key)[1:] if isinstance(each, list)]
    for image, weight in pairwise(shapes):
        if len(image) == len(weight) == len(shapes[-1]) == 4 and image[3] == weight[2]:
            return max(1, round(int(image[1]) / int(shapes[-1][1])))
    return None


def _loops_of(key: str, dag: Any) -> Loops | None:
    sums, stride = _sums(dag), _stride(key)
    if len(sums) != 1 or sums[0].tag not in (_CONVOLUTION, _DEPTHWISE) or not stride:
        return None
    axes = (*sums[0].axis, *sums[0].reduce_axis)
    extents = tuple(int(each.dom.extent) for each in axes)
    return Loops(extents, stride) if len(extents) in (6, 7) else None


def _stages(dag: Any) -> Stages | None:
    computed = [n for n, each in enumerate(dag.ops) if hasattr(each, "body")]
    sums = next(n for n in computed if len(dag.ops[n].reduce_axis))
    before = [n for n in computed if n < sums]
    after = [n for n in computed if n > sums]
    if len(before) > 1:
        return None
    padding = before[0] if before else None
    copies = padding is not None and "if_then_else" not in str(dag.ops[padding].body)
    last = after[-1] if after else sums
    return Stages(padding, copies, sums, tuple(after[:-1]), last)


# Steps


def _moved(
    record: Record, loops: Loops, stages: Stages, lengths: list[list[int]]
) -> list[list[Any]] | None:
    """A record's steps with the numbers of a kernel's stages; None where they have another form."""
    steps = _steps(record)
    first = next(step for step in steps if step[0] == "SP")
    local = any(step[0] == "CHW" for step in steps)
    sums, last = first[1], max(step[1] for step in steps)
    if local and last != sums + 1:
        return None
    stored = last if last > sums else None
    moved: list[list[Any]] = [["CI", each] for each in reversed(stages.between)]
    names = {sums: stages.sums}
    if stages.last == stages.sums:
        moved.append(["CHW", stages.sums, "local"])
        names[last] = stages.sums + 1
    elif stored is not None:
        names[last] = stages.last
    padding = sums - 2
    if stages.padding is not None:
        names[padding] = stages.padding
    pads = stages.padding is not None and not stages.copies
    inlined = ["CI", padding] in steps
    numbers: dict[int, int] = {}
    splits = iter(zip(lengths, loops.extents, strict=True))
    for number, step in enumerate(steps):
        kind, stage, *rest = step
        if kind == "CHW" or (kind == "CI" and stage > sums):
            continue
        if stage == padding and (stages.padding is None or stages.copies or inlined):
            if kind == "CI" and stages.padding is not None:
                moved += _padding(stages.padding, pads)
            elif ["CI", stages.padding] not in moved and stages.copies:
                moved.append(["CI", stages.padding])
            continue
        if stage not in names:
            return None
        if kind == "SP":
            new, extent = next(splits)
            rest = [rest[0], extent, new, rest[3]]
        elif kind == "FSP":
            rest = [rest[0], numbers[rest[1]], rest[2]]
        elif kind == "CA":
            rest = [names[rest[0]], rest[1]]
        elif kind == "PR" and stage == sums:
            pragma, _, steps_unrolled = str(rest[1]).partition("$")
            most = max(int(steps_unrolled), tiles.unrolled(lengths))
            rest = [rest[0], f"{pragma}${most}"]
        elif kind not in ("RE", "FU", "AN", "CR", "CI", "PR"):
            return None
        numbers[number] = len(moved)
        moved.append([kind, names[stage], *rest])
    return moved


def _padding(stage: int, pads: bool) -> list[list[Any]]:
    """Steps for the padding: none where it has no pixels, else once for the image, rows in parallel."""
    if not pads:
        return [["CI", stage]]
    return [
        ["CR", stage],
        ["FU", stage, [0, 1]],
        ["AN", stage, 0, 3],
        ["AN", stage, 2, 2],
    ]
