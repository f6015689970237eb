"""Operators fused into steps: an inverted residual runs row by row and never has its expanded tensor whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from compile.c.graph import Add, AveragePool, Convolution, Network, Tensor

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


Step = Block | Single


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
    if step.depthwise is None and step.expand is not None and direct(step.expand):
        # Pixels one after the other, a few at a time.
        few = together(source)
        behind = max(0, source.nbytes - few * source.shape[2] * source.itemsize)
        ahead = few * output.shape[2] * output.itemsize
        return aligned(max(ahead, output.nbytes - behind))
    lag = 0
    for y in range(output.shape[0]):
        free = _first_needed(step, y) * source.row_bytes
        if step.residual is not None:
            # Element by element in place.
            free = min(free, y * source.row_bytes) + source.row_bytes
        if free < source.nbytes:
            lag = max(lag, (y + 1) * output.row_bytes - free)
    return aligned(lag)


def _first_needed(block: Block, y: int) -> int:
    """The first row of the input that is read while or after row ``y`` of the output is written."""
    depthwise, expand = block.depthwise, block.expand
    if depthwise is None:
        assert expand is not None
        return max(0, y * expand.strides[0] - expand.pads[0])
    # Rows up to this one are in the ring already.
    ready = y * depthwise.strides[0] - depthwise.pads[0] + depthwise.kernel[0]
    ready = min(ready, depthwise.input.shape[0])
    if expand is None:
        return ready
    if ready == depthwise.input.shape[0]:
        return expand.input.shape[0]
    return max(0, ready * expand.strides[0] - expand.pads[0])


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
