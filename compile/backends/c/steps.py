"""Operators fused into steps: an inverted residual runs row by row and never has its expanded tensor whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from netship.compile.backends.c.support import has_kernel
from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.islands import CFunction, Island
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    Dequantise,
    Quantise,
    Table,
    View,
)
from netship.compile.ir.pointwise import OF_TWO, Pointwise
from netship.compile.kernels.cortex_m.pack import padded_depth
from netship.compile.program.planner import aligned

ALIGNMENT = 8
"""Of each part of the arena, in bytes."""
# Outputs of a convolution that the kernels compute together, by the bytes of a value.
_TOGETHER = {1: 2, 4: 4}
# Besides `Pointwise`: each value of the output depends on one of each input.
_ELEMENTWISE = {
    *(*OF_TWO, "PRelu", "Where", "Cast", "Not", "Mod", "Sum", "Mean"),
    *(
        "Erf",
        "Log",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Softplus",
        "Softsign",
        "Elu",
        "Selu",
        "Celu",
        "Gelu",
    ),
    *(
        "Mish",
        "Swish",
        "Reciprocal",
        "Sin",
        "Cos",
        "Tan",
        "ThresholdedRelu",
        "IsNaN",
        "IsInf",
    ),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
}


class Step:
    """Operators that run as one: the first reads the inputs, the last makes the output."""

    @property
    def parts(self) -> tuple[Operator, ...]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.parts[-1].label

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.parts[0].activations

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.parts[-1].outputs

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)


@dataclass(frozen=True)
class Single(Step):
    """An operator that is no convolution."""

    operator: Operator

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)


@dataclass(frozen=True)
class Generated(Step):
    """Operators without a kernel of ours, as a function that TVM writes."""

    island: Island
    function: CFunction | None = None

    @property
    def parts(self) -> tuple[Operator, ...]:
        return self.island.operators

    @property
    def name(self) -> str:
        own = [
            each for each in self.parts if not isinstance(each, Quantise | Dequantise)
        ]
        return (own or self.parts)[-1].label

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.island.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.island.outputs


@dataclass(frozen=True)
class FusedBlock(Step):
    """Convolutions that run row by row, each over the rows the one before it just made.

    Any of the first three may be missing, not all. ``residual`` adds the block's own input.
    A row of the output is written once the rows that it depends on were read.
    """

    expand: Convolution | None = None
    depthwise: Convolution | None = None
    project: Convolution | None = None
    residual: Addition | None = None

    @property
    def parts(self) -> tuple[Operator, ...]:
        parts = (self.expand, self.depthwise, self.project, self.residual)
        return tuple(part for part in parts if part is not None)

    @property
    def blocks(self) -> tuple[FusedBlock, ...]:
        return (self,)


@dataclass(frozen=True)
class FusedBlocks(Step):
    """Two blocks of which the second expands each row that the first makes: what lies between never lies whole."""

    first: FusedBlock
    second: FusedBlock

    @property
    def parts(self) -> tuple[Operator, ...]:
        return self.first.parts + self.second.parts

    @property
    def blocks(self) -> tuple[FusedBlock, ...]:
        return self.first, self.second


def chained(steps: Sequence[Step], index: int) -> tuple[Step, ...] | None:
    """``steps`` with those at ``index`` and after it as one; None where they cannot be.

    An addition of a block's own input wants it whole, so neither of the two has one.
    """
    match steps[index : index + 2] if index >= 0 else ():
        case (
            FusedBlock(depthwise=Convolution(), residual=None) as first,
            FusedBlock(
                expand=Convolution() as expand, depthwise=Convolution(), residual=None
            ) as second,
        ) if direct(expand):
            readers = [step for step in steps if first.output in step.inputs]
            if readers == [second]:
                pair = FusedBlocks(first, second)
                return (*steps[:index], pair, *steps[index + 2 :])
    return None


def fuse(graph: Graph) -> tuple[Step, ...]:
    """Every operator but the views that move nothing in one step."""
    blocks, taken = _blocks(graph)
    islands = _islands(graph)
    steps: list[Step] = []
    for operator in graph.operators:
        name = operator.output.name
        if name in blocks:
            steps.append(blocks[name])
        elif name in islands:
            steps.append(Generated(islands[name]))
        elif (
            name in taken
            or not has_kernel(operator, graph)
            or isinstance(operator, View)
        ):
            continue
        elif isinstance(operator, Convolution):
            steps.append(FusedBlock(expand=operator))
        else:
            steps.append(Single(operator))
    return tuple(steps)


def _blocks(graph: Graph) -> tuple[dict[str, FusedBlock], set[str]]:
    """Blocks by the name of what they make, and the names of what all their parts make.

    A depthwise convolution takes the convolution before it and the 1×1 after it into its step, and
    the addition of its input, where nothing else needs what lies between.
    """
    blocks: dict[str, FusedBlock] = {}
    taken: set[str] = set()

    def kernel(operator: Operator | None) -> Convolution | None:
        own = isinstance(operator, Convolution) and has_kernel(operator, graph)
        return operator if own else None  # type: ignore[return-value]

    for operator in graph.operators:
        filtering = kernel(operator)
        if filtering is None or not filtering.depthwise:
            continue
        before = kernel(graph.makers.get(operator.input.name))
        expand = (
            before
            if before is not None
            and not before.depthwise
            and before.output.name not in taken
            and graph.only_reader(before.output) is operator
            else None
        )
        after = kernel(graph.only_reader(operator.output))
        project = after if after is not None and direct(after) else None
        residual = None
        if project is not None and expand is not None:
            last = graph.only_reader(project.output)
            if (
                isinstance(last, Addition)
                and has_kernel(last, graph)
                and expand.input in last.inputs
            ):
                residual = last
        block = FusedBlock(expand, filtering, project, residual)
        blocks[block.output.name] = block
        taken |= {part.output.name for part in block.parts}
    return blocks, taken


def _islands(graph: Graph) -> dict[str, Island]:
    """Operators without a kernel, by the name of the first tensor that the last of them makes.

    What is read once and costs little is made where it is read: elementwise operators after others, and dequantised values.
    """
    groups: dict[str, list[Operator]] = {}
    for operator in graph.operators:
        if has_kernel(operator, graph):
            continue
        group: list[Operator] = []
        for tensor in dict.fromkeys(operator.activations):
            before = groups.get(tensor.name)
            if not before or graph.only_reader(tensor) is not operator:
                continue
            if len(before[-1].outputs) > 1:
                continue
            if operator.kind == "TopK":
                continue
            if _elementwise(operator) or isinstance(before[-1], Dequantise):
                group += groups.pop(tensor.name)
        groups[operator.output.name] = [*group, operator]
    return {
        name: _island(f"nn_step_{number}", group, graph)
        for number, (name, group) in enumerate(groups.items())
    }


def _elementwise(operator: Operator) -> bool:
    simple = isinstance(operator, Pointwise | Quantise | Dequantise)
    return simple or operator.kind in _ELEMENTWISE


def _island(name: str, operators: list[Operator], graph: Graph) -> Island:
    made = {tensor.name for each in operators for tensor in each.outputs}
    read = (tensor for each in operators for tensor in each.activations)
    inputs = dict.fromkeys(each for each in read if each.name not in made)
    return Island(name, tuple(operators), tuple(inputs), operators[-1].outputs)


class Offsets(NamedTuple):
    """Where each part of a block's scratch memory begins, in bytes.

    Attributes:
        ring: the rows that the depthwise convolution looks at, padded left and right.
        row: one row of the depthwise convolution's output, for the projection.
        sum: one row of the projection's output, for the addition.
        patch: what the outputs of a convolution larger than 1×1 that are computed together look at.
        made: of two blocks, the row that the first makes.
    """

    ring: int
    row: int
    sum: int
    patch: int
    made: int


class Scratch(NamedTuple):
    """A step's scratch memory: of each of its blocks the parts, and the bytes of all."""

    offsets: tuple[Offsets, ...] = ()
    nbytes: int = 0


def scratch(step: Step) -> Scratch:
    """The rings lie first. The rest of two blocks shares memory: the second filters what the first has made."""
    if isinstance(step, Generated):
        assert step.function is not None
        return Scratch(nbytes=step.function.scratch)
    if not isinstance(step, FusedBlock | FusedBlocks):
        return Scratch()
    first, last = step.blocks[0], step.blocks[-1]
    rings = [_ring_bytes(block) for block in step.blocks]
    begin = sum(rings)
    made = begin + _row_bytes(first) + _sum_bytes(first) + _patch_bytes(first)
    offsets = []
    for number, block in enumerate(step.blocks):
        total = begin + _row_bytes(block)
        patch = total + _sum_bytes(block)
        offsets.append(Offsets(sum(rings[:number]), begin, total, patch, made))
    end = made + (_aligned(first.output.row_bytes) if first is not last else 0)
    return Scratch(tuple(offsets), max(end, begin + _row_bytes(last)))


def _ring_bytes(block: FusedBlock) -> int:
    depthwise = block.depthwise
    if depthwise is None:
        return 0
    width = depthwise.input.image[1] + depthwise.pads[1] + depthwise.pads[3]
    pixel = depthwise.input.image[2] * depthwise.input.itemsize
    return _aligned(depthwise.kernel[0] * width * pixel)


def _row_bytes(block: FusedBlock) -> int:
    if block.depthwise is None or block.project is None:
        return 0
    return _aligned(block.depthwise.output.row_bytes)


def _sum_bytes(block: FusedBlock) -> int:
    return _aligned(block.output.row_bytes) if block.residual is not None else 0


def _patch_bytes(block: FusedBlock) -> int:
    if block.expand is None or direct(block.expand):
        return 0
    source = block.expand.input
    return _aligned(
        _TOGETHER[source.itemsize] * padded_depth(block.expand) * source.itemsize
    )


def direct(convolution: Convolution) -> bool:
    """Whether a kernel can read the input as it lies: a 1×1 over channels by the four."""
    return convolution.pointwise and convolution.input.image[2] % 4 == 0


def inplace(step: Step) -> tuple[tuple[int, int], ...] | None:
    """How a step's output may take its input's place: bytes written, and the byte of the input from which on all is needed.

    Row y of the output may only cover rows of the input that nothing needs any more. None where
    the two cannot share memory.
    """
    if isinstance(step, Generated):
        source, output = step.inputs[0], step.output
        alike = (source.shape, source.layout, source.itemsize) == (
            output.shape,
            output.layout,
            output.itemsize,
        )
        return ((0, 0),) if alike and all(map(_elementwise, step.parts)) else None
    if not isinstance(step, FusedBlock | FusedBlocks):
        elementwise = isinstance(step.parts[0], Addition | Pointwise | Table)
        return ((0, 0),) if elementwise else None
    source, output = step.inputs[0], step.output
    match step:
        case FusedBlock(expand=Convolution() as only, depthwise=None) if direct(only):
            # Pixels one after the other, a few at a time: the first of them, and the last.
            pixels = output.image[0] * output.image[1]
            few = min(_TOGETHER[source.itemsize], pixels)
            first = few * output.image[2] * output.itemsize
            rest = source.nbytes - few * source.image[2] * source.itemsize
            return (first, 0), (output.nbytes, max(0, rest))
    pairs = [(0, 0)]
    for y in range(output.image[0]):
        needed = _first_needed(step, y) * source.row_bytes
        if isinstance(step, FusedBlock) and step.residual is not None:
            # Element by element in place.
            needed = min(needed, y * source.row_bytes) + source.row_bytes
        if needed < source.nbytes:
            pairs.append(((y + 1) * output.row_bytes, needed))
    return tuple(pairs)


def _first_needed(step: FusedBlock | FusedBlocks, y: int) -> int:
    """The first row of the input that is read while or after row ``y`` of the output is written."""
    if isinstance(step, FusedBlocks):
        made = _ready(step.second, y)
        if made == step.first.output.image[0]:
            return step.inputs[0].image[0]
        return _first_needed(step.first, made - 1)
    ready, expand = _ready(step, y), step.expand
    if expand is None:
        return ready
    if ready == expand.output.image[0]:
        return expand.input.image[0]
    return max(0, ready * expand.strides[0] - expand.pads[0])


def _ready(block: FusedBlock, y: int) -> int:
    """How many rows the depthwise convolution, if there is one, has read when row ``y`` of its output is written."""
    depthwise = block.depthwise
    if depthwise is None:
        return y
    ready = y * depthwise.strides[0] - depthwise.pads[0] + depthwise.kernel[0]
    return min(ready, depthwise.input.image[0])


def _aligned(nbytes: int) -> int:
    return aligned(nbytes, ALIGNMENT)
