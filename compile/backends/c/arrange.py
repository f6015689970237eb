"""Operators fused into steps, and the steps' memory, so that the arena is as small as it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from netship.compile.backends.c.scratch import ALIGNMENT, scratch
from netship.compile.backends.c.steps import (
    FusedBlock,
    FusedBlocks,
    Step,
    chained,
    inplace,
)
from netship.compile.ir.graph import Graph, Tensor
from netship.compile.ir.operators import View
from netship.compile.program import program, verifier
from netship.compile.program.planner import Plan, plan
from netship.compile.program.program import Call, Program
from netship.targets.errors import UserError


@dataclass(frozen=True)
class Arranged:
    """Steps as calls of a program, and where its tensors lie.

    Attributes:
        index: of the program's tensors, by a tensor's name.
    """

    steps: tuple[Step, ...]
    program: Program
    plan: Plan
    index: dict[str, int]

    @property
    def quantised(self) -> bool:
        """Whether int8 makes nothing smaller: it is int8."""
        tensors = (x for step in self.steps for x in (*step.inputs, *step.outputs))
        return any(tensor.quantisation for tensor in tensors)

    def owner(self, tensor: Tensor) -> int:
        """The program's tensor whose memory ``tensor`` is."""
        return self.program.storage(self.index[tensor.name])

    def spare(self, step: Step) -> bool:
        """Whether a single convolution may use its output's memory before it writes it, by words."""
        if not (
            isinstance(step, FusedBlock) and step.depthwise is None and step.pixels
        ):
            return False
        source, output = step.inputs[0], step.output
        begin = self.plan.offsets.get(self.owner(source))
        own = self.plan.offsets.get(self.owner(output))
        if begin is None or own is None or output.row_bytes % 4:
            return False
        return own + output.nbytes <= begin or begin + source.nbytes <= own


# How many pixels the kernels that widen their inputs may take at a time, best first.
_PIXELS = (4, 2, 1)


def arrange(
    graph: Graph, steps: tuple[Step, ...], *, widened: bool = False
) -> Arranged:
    """Fuse two blocks around the peak as long as the arena gets smaller by it.

    Args:
        widened: the kernels widen the inputs of convolutions into scratch memory: of as many pixels as the arena of one
            has room for.
    """
    if not widened:
        return _smallest(graph, steps)
    least = tuple(_taking(each, _PIXELS[-1]) for each in steps)
    best = _smallest(graph, least)
    found = _planned(graph, tuple(_taking(each, _PIXELS[0]) for each in best.steps))
    if found.plan.nbytes <= best.plan.nbytes:
        return _verified(found)
    for index, step in enumerate(best.steps):
        for pixels in _PIXELS[:-1]:
            changed = _taking(step, pixels)
            tried = (*best.steps[:index], changed, *best.steps[index + 1 :])
            found = _planned(graph, tried)
            if found.plan.nbytes <= best.plan.nbytes:
                best = found
                break
    return _verified(best)


def _taking(step: Step, pixels: int) -> Step:
    if isinstance(step, FusedBlock):
        return replace(step, pixels=pixels)
    if isinstance(step, FusedBlocks):
        blocks = (replace(each, pixels=pixels) for each in step.blocks)
        return FusedBlocks(*blocks)
    return step


def _verified(arranged: Arranged) -> Arranged:
    verifier.verify(arranged.program, arranged.plan, arranged.program.outputs)
    return arranged


def _smallest(graph: Graph, steps: tuple[Step, ...]) -> Arranged:
    best = _planned(graph, steps)
    while True:
        tried = (
            chained(best.steps, index) for index in (best.plan.peak - 1, best.plan.peak)
        )
        found = [_planned(graph, each) for each in tried if each is not None]
        smaller = [each for each in found if each.plan.nbytes < best.plan.nbytes]
        if not smaller:
            return _verified(best)
        best = min(smaller, key=lambda each: each.plan.nbytes)


def _planned(graph: Graph, steps: tuple[Step, ...]) -> Arranged:
    named = [(each.name, each) for each in graph.inputs]
    named += [(step.name, each) for step in steps for each in step.outputs]
    made = {tensor.name for _, tensor in named}
    views = [
        each
        for each in graph.operators
        if isinstance(each, View) and each.output.name not in made
    ]
    named += [(view.label, view.output) for view in views]
    index = {tensor.name: number for number, (_, tensor) in enumerate(named)}
    tensors = tuple(
        program.Tensor(name, tensor.shape, tensor.dtype) for name, tensor in named
    )
    calls = tuple(
        Call(
            kernel=type(step).__name__,
            layer=step.name,
            operators=tuple(part.kind for part in step.parts),
            inputs=tuple(index[each.name] for each in step.inputs),
            outputs=tuple(index[each.name] for each in step.outputs),
            scratch=scratch(step).nbytes,
            inplace=inplace(step),
        )
        for step in steps
    )
    whole = Program(
        tensors,
        calls,
        inputs=tuple(index[each.name] for each in graph.inputs),
        outputs=tuple(index[each.name] for each in graph.outputs),
        aliases={index[view.output.name]: index[view.input.name] for view in views},
    )
    return Arranged(steps, whole, plan(whole, ALIGNMENT, whole.outputs), index)


def check_arena(arranged: Arranged, limit: int | None) -> None:
    """Refuse an arena larger than the user's ``--arena-limit`` in a UserError."""
    arena = arranged.plan
    if limit is None or arena.nbytes <= limit:
        return
    int8 = "" if arranged.quantised else ", or --quantize int8"
    raise UserError(
        f"--arena-limit {limit:,} bytes: the arena takes {arena.nbytes:,}, {arena.nbytes - limit:,} too "
        f"many; the peak is {arranged.steps[arena.peak].name!r}; no plan can take less than "
        f"{arena.lower_bound:,}, the most bytes live at once: choose a smaller width or resolution{int8}"
    )


def check_flash(
    nbytes: int, largest: tuple[str, int], limit: int | None, quantised: bool
) -> None:
    """Refuse weights that take more than the user's ``--flash-limit`` in a UserError.

    Args:
        largest: the layer with the most of them, and its bytes.
        quantised: int8 is no advice.
    """
    if limit is None or nbytes <= limit:
        return
    name, its_bytes = largest
    int8 = "" if quantised else ", or --quantize int8"
    raise UserError(
        f"--flash-limit {limit:,} bytes: the weights take {nbytes:,}, {nbytes - limit:,} too many; most are of "
        f"{name!r} ({its_bytes:,}): choose a smaller width or fewer classes{int8}"
    )
