"""Operators fused into steps: an inverted residual runs row by row and never has its expanded tensor whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compile.ir.graph import Add, AveragePool, Convolution, Network, Tensor

_ALIGNMENT = 8
# Outputs of a convolution that the kernels compute together, by the bytes of a value.
_TOGETHER = {1: 2, 4: 4}


@dataclass(frozen=True)
class Block:
    """Convolutions that run row by row, each over the rows the one before it just made.

    Any of the first three may be missing, not all. ``residual`` adds the block's own input.
    A row of the output is written once the rows that it depends on were read.
    """

    expand: Convolution | None = None
    depthwise: Convolution | None = None
    project: Convolution | None = None
    residual: Add | None = None

    @property
    def parts(self) -> tuple[Convolution | Add, ...]:
        parts = (self.expand, self.depthwise, self.project, self.residual)
        return tuple(part for part in parts if part is not None)

    @property
    def name(self) -> str:
        return self.parts[-1].name

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

    operator: Add | AveragePool

    @property
    def parts(self) -> tuple[Add | AveragePool]:
        return (self.operator,)

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        if isinstance(self.operator, Add):
            return self.operator.input, self.operator.other
        return (self.operator.input,)

    @property
    def output(self) -> Tensor:
        return self.operator.output

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class Chain:
    """Two blocks of which the second expands each row that the first makes: what lies between never lies whole."""

    first: Block
    second: Block

    @property
    def parts(self) -> tuple[Convolution | Add, ...]:
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


Step = Block | Chain | Single


def chained(steps: Sequence[Step], index: int) -> tuple[Step, ...] | None:
    """``steps`` with those at ``index`` and after it as one; None where they cannot be.

    An addition of a block's own input wants it whole, so neither of the two has one.
    """
    pair = steps[index : index + 2] if index >= 0 else ()
    if len(pair) != 2:
        return None
    first, second = pair
    if not isinstance(first, Block) or not isinstance(second, Block):
        return None
    if first.depthwise is None or second.depthwise is None or second.expand is None:
        return None
    readers = [step for step in steps if first.output in step.inputs]
    if first.residual or second.residual or readers != [second]:
        return None
    if not direct(second.expand):
        return None
    return (*steps[:index], Chain(first, second), *steps[index + 2 :])


def fuse(network: Network) -> tuple[Step, ...]:
    """Every operator in one step.

    A depthwise convolution takes the convolution before it and the 1×1 after it into its step, and
    the addition of its input, where nothing else needs what lies between.
    """
    readers = Counter(
        name
        for operator in network.operators
        for name in {t.name for t in _inputs(operator)}
    )
    readers[network.output.name] += 1
    by_input: dict[str, list[Convolution | Add | AveragePool]] = {}
    by_output = {operator.output.name: operator for operator in network.operators}
    for operator in network.operators:
        for tensor in _inputs(operator):
            by_input.setdefault(tensor.name, []).append(operator)
    blocks: dict[str, Block] = {}
    taken: set[str] = set()

    def only_reader(
        operator: Convolution | Add,
    ) -> Convolution | Add | AveragePool | None:
        found = by_input.get(operator.output.name, [])
        return found[0] if len(found) == readers[operator.output.name] == 1 else None

    for operator in network.operators:
        if not isinstance(operator, Convolution) or not operator.depthwise:
            continue
        before = by_output.get(operator.input.name)
        expand = (
            before
            if isinstance(before, Convolution)
            and not before.depthwise
            and before.name not in taken
            and readers[operator.input.name] == 1
            else None
        )
        after = only_reader(operator)
        project = after if isinstance(after, Convolution) and direct(after) else None
        residual = None
        if project is not None and expand is not None:
            last = only_reader(project)
            if isinstance(last, Add) and expand.input in (last.input, last.other):
                residual = last
        block = Block(expand, operator, project, residual)
        blocks[block.name] = block
        taken |= {part.name for part in block.parts}
    steps: list[Step] = []
    for operator in network.operators:
        if operator.name in blocks:
            steps.append(blocks[operator.name])
        elif operator.name not in taken:
            alone = isinstance(operator, Convolution)
            steps.append(Block(expand=operator) if alone else Single(operator))  # type: ignore[arg-type]
    return tuple(steps)


def _inputs(operator: Convolution | Add | AveragePool) -> tuple[Tensor, ...]:
    if isinstance(operator, Add):
        return operator.input, operator.other
    return (operator.input,)


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
    if isinstance(step, Chain):
        rings = scratch(step.first).ring + scratch(step.second).ring
        return Scratch(ring=rings, row=max(_used_up(step), scratch(step.second).row))
    ring = row = patch = 0
    first, depthwise = step.expand, step.depthwise
    if depthwise is not None:
        width = depthwise.input.shape[1] + depthwise.pads[1] + depthwise.pads[3]
        pixel = depthwise.input.shape[2] * depthwise.input.itemsize
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


def _used_up(chain: Chain) -> int:
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


def offsets(step: Block | Chain) -> tuple[Offsets, ...]:
    """Of each block of a step, in bytes from the beginning of its scratch memory."""
    if isinstance(step, Block):
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
    return convolution.pointwise and convolution.input.shape[2] % 4 == 0


def padded_depth(convolution: Convolution) -> int:
    """``depth``, rounded up to the four values that the kernels take at a time."""
    return -(-convolution.depth // 4) * 4


def together(source: Tensor) -> int:
    """How many outputs a convolution computes together."""
    return _TOGETHER[source.itemsize]


def lag(step: Step) -> int | None:
    """How many bytes below its input a step's output must begin to be written over it.

    Row y of the output may only cover rows of the input that nothing needs any more. None where
    the two cannot share memory.
    """
    if isinstance(step, Single):
        return 0 if isinstance(step.operator, Add) else None
    source, output = step.inputs[0], step.output
    if (
        isinstance(step, Block)
        and step.depthwise is None
        and step.expand is not None
        and direct(step.expand)
    ):
        # Pixels one after the other, a few at a time.
        few = together(source)
        behind = max(0, source.nbytes - few * source.shape[2] * source.itemsize)
        ahead = few * output.shape[2] * output.itemsize
        return aligned(max(ahead, output.nbytes - behind))
    lag = 0
    for y in range(output.shape[0]):
        free = _first_needed(step, y) * source.row_bytes
        if isinstance(step, Block) and step.residual is not None:
            # Element by element in place.
            free = min(free, y * source.row_bytes) + source.row_bytes
        if free < source.nbytes:
            lag = max(lag, (y + 1) * output.row_bytes - free)
    return aligned(lag)


def _first_needed(step: Block | Chain, y: int) -> int:
    """The first row of the input that is read while or after row ``y`` of the output is written."""
    if isinstance(step, Chain):
        assert step.second.depthwise is not None
        made = _ready(step.second.depthwise, y)
        if made == step.first.output.shape[0]:
            return step.inputs[0].shape[0]
        return _first_needed(step.first, made - 1)
    depthwise, expand = step.depthwise, step.expand
    if depthwise is None:
        assert expand is not None
        return max(0, y * expand.strides[0] - expand.pads[0])
    ready = _ready(depthwise, y)
    if expand is None:
        return ready
    if ready == depthwise.input.shape[0]:
        return expand.input.shape[0]
    return max(0, ready * expand.strides[0] - expand.pads[0])


def _ready(depthwise: Convolution, y: int) -> int:
    """How many rows of what it reads are in the ring when row ``y`` of its output is written."""
    ready = y * depthwise.strides[0] - depthwise.pads[0] + depthwise.kernel[0]
    return min(ready, depthwise.input.shape[0])


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
