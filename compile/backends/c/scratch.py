"""Memory that a step of a C project needs while it runs."""

from __future__ import annotations

from typing import NamedTuple

from netship.compile.backends.c.steps import (
    TOGETHER,
    FusedBlock,
    FusedBlocks,
    Generated,
    Step,
    direct,
)
from netship.compile.ir.operators import Convolution
from netship.compile.kernels.cortex_m.pack import padded_depth
from netship.compile.program.planner import aligned

ALIGNMENT = 8
"""Of each part of the arena, in bytes."""


class Offsets(NamedTuple):
    """Where each part of a block's scratch memory begins, in bytes.

    Attributes:
        ring: the rows that the depthwise convolution looks at, padded left and right.
        row: one row of the depthwise convolution's output, for the projection.
        sum: one row of the projection's output, for the addition.
        patch: what the outputs of the first convolution that are computed together look at; the parts but for the
            ring may lie over it.
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
    made = begin + _besides_ring(first)
    if first is not last:
        made = max(made, begin + _patch_bytes(last))
    offsets = []
    for number, block in enumerate(step.blocks):
        total = begin + _row_bytes(block)
        offsets.append(Offsets(sum(rings[:number]), begin, total, begin, made))
    end = made + (_aligned(first.output.row_bytes) if first is not last else 0)
    return Scratch(tuple(offsets), max(end, begin + _besides_ring(last)))


def _besides_ring(block: FusedBlock) -> int:
    """The first convolution's patch is no longer needed when the depthwise one makes its row."""
    return max(_patch_bytes(block), _row_bytes(block) + _sum_bytes(block))


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
    expand = block.expand
    if expand is None or (direct(expand) and not block.pixels):
        return 0
    source = expand.input
    each = TOGETHER[source.itemsize] * source.itemsize
    if block.pixels:
        pixels = min(block.pixels, _row_pixels(expand))
        each = 2 * pixels if pixels > 1 else int(not direct(expand))
    return _aligned(each * padded_depth(expand))


def _row_pixels(convolution: Convolution) -> int:
    """How many pixels a kernel gets at once: of a whole image where it is `direct`."""
    height, width, _ = convolution.output.image
    return height * width if direct(convolution) else width


def project_pixels(block: FusedBlock) -> int:
    """`FusedBlock.pixels` of the projection, which has the ring's first row for them."""
    depthwise = block.depthwise
    if depthwise is None or not block.pixels:
        return 0
    return (depthwise.input.image[1] + depthwise.pads[1] + depthwise.pads[3]) // 2


def _aligned(nbytes: int) -> int:
    return aligned(nbytes, ALIGNMENT)
