"""Operators fused into steps: an inverted residual runs row by row and never has its expanded tensor whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compile.ir.graph import Graph, Operator, Tensor
from compile.ir.operators import Addition, Convolution, Table, View
from compile.ir.pointwise import Pointwise
from compile.kernels.cortex_m.pack import padded_depth

_ALIGNMENT = 8
# Outputs of a convolution that the kernels compute together, by the bytes of a value.
_TOGETHER = {1: 2, 4: 4}


@dataclass(frozen=True)
class FusedBlock:
    """Convolutions that run row by row, each over the rows the one before it just made.

    Any of the first three may be missing, not all. ``residual`` adds the block's own input.
    A row of the output is written once the rows that it depends on were read.
    """

    expand: Convolution | None = None
    depthwise: Convolution | None = None
    project: Convolution | None = None
    residual: Addition | None = None

    @property
    def parts(self) -> tuple[Convolution | Addition, ...]:
        parts = (self.expand, self.depthwise, self.project, self.residual)
        return tuple(part for part in parts if part is not None)

    @property
    def name(self) -> str:
        return self.parts[-1].label

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.parts[0].input,)

    @property
    def output(self) -> Tensor:
        return self.parts[-1].output

    @property
    def macs(self) -> int:
        return sum(p.macs for p in self.parts if isinstance(p, Convolution))


@dataclass(frozen=True)
class Single:
    """An operator that is no convolution."""

    operator: Operator

    @property
    def parts(self) -> tuple[Operator]:
        return (self.operator,)

    @property
    def name(self) -> str:
        return self.operator.label

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.operator.activations

    @property
    def output(self) -> Tensor:
        return self.operator.output

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class FusedBlocks:
    """Two blocks of which the second expands each row that the first makes: what lies between never lies whole."""

    first: FusedBlock
    second: FusedBlock

    @property
    def parts(self) -> tuple[Convolution | Addition, ...]:
        return self.first.parts + self.second.parts

    @property
    def name(self) -> str:
        return self.second.name

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.first.inputs

    @property
    def output(self) -> Tensor:
        return self.second.output

    @property
    def macs(self) -> int:
        return self.first.macs + self.second.macs


Step = FusedBlock | FusedBlocks | Single


def chained(steps: Sequence[Step], index: int) -> tuple[Step, ...] | None:
    """``steps`` with those at ``index`` and after it as one; None where they cannot be.

    An addition of a block's own input wants it whole, so neither of the two has one.
    """
    pair = steps[index : index + 2] if index >= 0 else ()
    if len(pair) != 2:
        return None
    first, second = pair
    if not isinstance(first, FusedBlock) or not isinstance(second, FusedBlock):
        return None
    if first.depthwise is None or second.depthwise is None or second.expand is None:
        return None
    readers = [step for step in steps if first.output in step.inputs]
    if first.residual or second.residual or readers != [second]:
        return None
    if not direct(second.expand):
        return None
    return (*steps[:index], FusedBlocks(first, second), *steps[index + 2 :])


def fuse(graph: Graph) -> tuple[Step, ...]:
    """Every operator but the views in one step.

    A depthwise convolution takes the convolution before it and the 1×1 after it into its step, and
    the addition of its input, where nothing else needs what lies between.
    """
    blocks: dict[str, FusedBlock] = {}
    taken: set[str] = set()
    for operator in graph.operators:
        if not isinstance(operator, Convolution) or not operator.depthwise:
            continue
        before = graph.makers.get(operator.input.name)
        expand = (
            before
            if isinstance(before, Convolution)
            and not before.depthwise
            and before.output.name not in taken
            and graph.only_reader(before.output) is operator
            else None
        )
        after = graph.only_reader(operator.output)
        project = after if isinstance(after, Convolution) and direct(after) else None
        residual = None
        if project is not None and expand is not None:
            last = graph.only_reader(project.output)
            if isinstance(last, Addition) and expand.input in last.inputs:
                residual = last
        block = FusedBlock(expand, operator, project, residual)
        blocks[block.output.name] = block
        taken |= {part.output.name for part in block.parts}
    steps: list[Step] = []
    for operator in graph.operators:
        name = operator.output.name
        if name in blocks:
            steps.append(blocks[name])
        elif name not in taken and isinstance(operator, Convolution):
            steps.append(FusedBlock(expand=operator))
        elif name not in taken and not isinstance(operator, View):
            steps.append(Single(operator))
    return tuple(steps)


@dataclass(frozen=True)
class Scratch:
    """What a block needs besides its input and output, in bytes.

    Attributes:
        ring: the rows that the depthwise convolution looks at, padded left and right.
        row: one row of the depthwise convolution's output, for the projection.
        sum: one row of the projection's output, for the addition.
        patch: what the outputs of a convolution larger than 1×1 that are computed together look at.
    """

    ring: int = 0
    row: int = 0
    sum: int = 0
    patch: int = 0

    @property
    def nbytes(self) -> int:
        return self.ring + self.row + self.sum + self.patch


def scratch(step: Step) -> Scratch:
    """The scratch memory of a step."""
    if isinstance(step, Single):
        return Scratch()
    if isinstance(step, FusedBlocks):
        rings = scratch(step.first).ring + scratch(step.second).ring
        return Scratch(ring=rings, row=max(_used_up(step), scratch(step.second).row))
    ring = row = patch = 0
    first, depthwise = step.expand, step.depthwise
    if depthwise is not None:
        width = depthwise.input.image[1] + depthwise.pads[1] + depthwise.pads[3]
        pixel = depthwise.input.image[2] * depthwise.input.itemsize
        ring = aligned(depthwise.kernel[0] * width * pixel)
        if step.project is not None:
            row = aligned(depthwise.output.row_bytes)
    if first is not None and not direct(first):
        source = first.input
        patch = aligned(
            together(source) * padded_depth(first) * source.itemsize,
        )
    total = aligned(step.output.row_bytes) if step.residual is not None else 0
    return Scratch(ring, row, total, patch)


def _used_up(chain: FusedBlocks) -> int:
    """What a chain's first block needs but its ring, and its row: used up before the second block filters."""
    need = scratch(chain.first)
    return need.nbytes - need.ring + aligned(chain.first.output.row_bytes)


@dataclass(frozen=True)
class Offsets:
    """Where each part of a block's scratch memory lies, and in a chain the row that the block before it made."""

    ring: int
    row: int
    sum: int
    patch: int
    made: int


def offsets(step: FusedBlock | FusedBlocks) -> tuple[Offsets, ...]:
    """Of each block of a step, in bytes from the beginning of its scratch memory."""
    if isinstance(step, FusedBlock):
        need = scratch(step)
        return (_offsets(need, 0, need.ring),)
    first, second = scratch(step.first), scratch(step.second)
    rings = first.ring + second.ring
    before = _offsets(first, 0, rings)
    return before, replace(_offsets(second, first.ring, rings), made=before.made)


def _offsets(need: Scratch, ring: int, rest: int) -> Offsets:
    after_row = rest + need.row
    patch = after_row + need.sum
    return Offsets(ring, rest, after_row, patch, patch + need.patch)


def direct(convolution: Convolution) -> bool:
    """Whether a kernel can read the input as it lies: a 1×1 over channels by the four."""
    return convolution.pointwise and convolution.input.image[2] % 4 == 0


def together(source: Tensor) -> int:
    """How many outputs a convolution computes together."""
    return _TOGETHER[source.itemsize]


def inplace(step: Step) -> tuple[tuple[int, int], ...] | None:
    """How a step's output may take its input's place: bytes written, and the byte of the input from which on all is needed.

    Row y of the output may only cover rows of the input that nothing needs any more. None where
    the two cannot share memory.
    """
    if isinstance(step, Single):
        elementwise = isinstance(step.operator, Addition | Pointwise | Table)
        return ((0, 0),) if elementwise else None
    source, output = step.inputs[0], step.output
    if (
        isinstance(step, FusedBlock)
        and step.depthwise is None
        and step.expand is not None
        and direct(step.expand)
    ):
        # Pixels one after the other, a few at a time: the first of them, and the last.
        few = together(source)
        rest = source.nbytes - few * source.image[2] * source.itemsize
        return (few * output.image[2] * output.itemsize, 0), (
            output.nbytes,
            max(0, rest),
        )
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
        assert step.second.depthwise is not None
        made = _ready(step.second.depthwise, y)
        if made == step.first.output.image[0]:
            return step.inputs[0].image[0]
        return _first_needed(step.first, made - 1)
    depthwise, expand = step.depthwise, step.expand
    if depthwise is None:
        assert expand is not None
        return max(0, y * expand.strides[0] - expand.pads[0])
    ready = _ready(depthwise, y)
    if expand is None:
        return ready
    if ready == depthwise.input.image[0]:
        return expand.input.image[0]
    return max(0, ready * expand.strides[0] - expand.pads[0])


def _ready(depthwise: Convolution, y: int) -> int:
    """How many rows of what it reads are in the ring when row ``y`` of its output is written."""
    ready = y * depthwise.strides[0] - depthwise.pads[0] + depthwise.kernel[0]
    return min(ready, depthwise.input.image[0])


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
