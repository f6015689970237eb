"""Integer operators as calls of kernels.h: sizes as constants, parameters as the kernels read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Operator
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    GlobalAverage,
    Limited,
    Quantise,
)
from netship.compile.ir.requantise import Requantisation

Bytes = NDArray[np.int8]

# kernels.h: the structure of sizes that each function takes, and its inputs.
_FUNCTIONS = {
    "quantise": ("Quantisation", "const float *a"),
    "convolution": ("Convolution", "const int8_t *a"),
    "depthwise": ("Depthwise", "const int8_t *a"),
    "addition": ("Addition", "const int8_t *a, const int8_t *b"),
    "average": ("Average", "const int8_t *a"),
}
KINDS = tuple(_FUNCTIONS)
_LANES = 8
_HEAD = 64
_MAGIC = int(np.float32(1.5 * 2**23).view(np.int32))
_MAGIC_SUMS, _MAGIC_STEPS = 1 << 22, 1 << 15
# Steps beyond which every quantised value is the largest.
_MOST_STEPS = 512
# What a kernel works on at a time stays well within the first-level cache: 32 KB and more on all of these CPUs.
_BAND_BYTES = 16 << 10
# Pixels of 8 channels in registers, as the meter chose them: with SDOT a register sums four channels, without it one.
_ROWS_DOT, _ROWS = (8, 7, 6), (3,)
# A network's parallel loops: one part for each core.
_CORES = 4


@dataclass(frozen=True)
class Kernel:
    """A call of a C function ``void symbol(int first, int last, const int8_t *x, …, const int8_t *parameters, int8_t *y)``.

    Attributes:
        kind: what it is, as Relay's operator is called.
        call: its body, in C.
        units: what ``first`` and ``last`` count; every split of them gives the same numbers.
        parameters: what the function reads besides its inputs.
    """

    kind: str
    call: str
    units: int
    parameters: Bytes
    macs: int = 0

    @property
    def tasks(self) -> int:
        return min(self.units, _CORES)


def definition(kind: str, call: str, symbol: str) -> str:
    """The C function ``symbol`` of a kernel, declared before it is defined."""
    _, inputs = _FUNCTIONS[kind]
    parameters = f"int first, int last, {inputs}, const int8_t *parameters, int8_t *y"
    signature = f"void {symbol}({parameters})"
    hidden = '__attribute__((visibility("hidden")))'
    return f"{hidden} {signature};\n{signature} {{ {call} }}"


def kernel(operator: Operator, dot: bool) -> Kernel | None:
    """One operator on int8, channels last; None where there is no kernel for it.

    Args:
        dot: for a CPU with SDOT.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    if isinstance(operator, Quantise):
        return _quantise(operator)
    if operator.output.quantisation is None:
        return None
    if isinstance(operator, Addition) and operator.elementwise:
        return _addition(operator, dot)
    if isinstance(operator, GlobalAverage):
        return _average(operator)
    if isinstance(operator, Convolution) and operator.dilations == (1, 1):
        if operator.depthwise:
            return _depthwise(operator, dot)
        if operator.group == 1:
            return _convolution(operator, dot)
    return None


def _quantise(operator: Quantise) -> Kernel:
    """From float32 [channels, height, width]."""
    height, width, channels = operator.output.image
    scale = np.float32(operator.output.scale)
    reciprocal = np.float32(1) / scale
    # Of a mantissa of ones alone the rounded reciprocal may not do; of a scale that is next to nothing neither.
    mantissa = int(scale.view(np.int32)) & 0x7FFFFF
    safe = mantissa != 0x7FFFFF and 2**-64 < float(scale) < 2**64
    sizes = {
        "height": height,
        "width": width,
        "channels": channels,
        "reciprocal": safe,
    }
    values = [float(scale), float(reciprocal), float(scale) * _MOST_STEPS]
    return _made("quantise", sizes, height, _head(operator, values))


def _addition(operator: Addition, dot: bool) -> Kernel:
    a, b, fixed, offset = operator.requantisation
    size = operator.output.nbytes
    largest = 255 * (abs(float(a)) + abs(float(b))) + abs(float(fixed))
    sizes = {
        "size": size,
        "a_offset": offset,
        "b_offset": offset,
        "output_offset": offset,
        "magic": dot and largest + 1 < _MAGIC_STEPS,
        "clamped": _clamped(operator),
    }
    head = _head(operator, [float(a), float(b), float(fixed)])
    return _made("addition", sizes, -(-size // 16), head)


def _average(operator: GlobalAverage) -> Kernel:
    channels = operator.input.image[2]
    sizes = {"pixels": operator.pixels, "channels": channels}
    ratios = operator.requantisation.ratio.tolist()
    head = _head(operator, ratios, operator.input.zero)
    return _made("average", sizes, -(-channels // _LANES), head)


def _convolution(operator: Convolution, dot: bool) -> Kernel:
    scales, magic = _sums(operator, dot)
    outputs = operator.output.image[2]
    taps = operator.depth
    depth = _whole(taps)
    matrix = np.zeros((_whole(outputs), depth), np.int8)
    matrix[:outputs, :taps] = operator.weights.reshape(outputs, taps)
    pixels = prod(operator.output.image[:2])
    rows = min(
        _ROWS_DOT if dot else _ROWS, key=lambda rows: (-(-pixels // rows)) * (rows + 1)
    )
    direct = operator.pointwise and taps == depth
    if not direct:
        # The gathered rows are on the stack.
        rows = max(1, min(rows, _BAND_BYTES // depth))
    rows = min(rows, pixels)
    tiles, blocks = -(-pixels // rows), -(-outputs // _LANES)
    by_channels = tiles < 4 * _CORES
    sizes = {
        **_geometry(operator),
        "outputs": outputs,
        "direct": direct,
        "depth": depth,
        "rows": rows,
        "band": rows
        * max(1, min(_BAND_BYTES // ((depth + min(outputs, 64)) * rows), tiles)),
        "by_channels": by_channels,
        **_facts(operator, magic),
    }
    packed = [_head(operator, input_zero=operator.input.zero)]
    for at in range(0, outputs, _LANES):
        own = slice(at, at + _LANES)
        packed += [*_scales(scales, own), _interleaved(matrix[own], dot)]
    units = blocks if by_channels else tiles
    return _made("convolution", sizes, units, np.concatenate(packed), operator.macs)


def _interleaved(block: Bytes, dot: bool) -> Bytes:
    """8 channels' weights as `tile` reads them: with SDOT in fours, without in sixteens and a last eight."""
    depth = block.shape[1]
    if dot:
        return block.reshape(_LANES, depth // 4, 4).transpose(1, 0, 2).ravel()
    whole = depth // 16 * 16
    sixteens = block[:, :whole].reshape(_LANES, -1, 16).transpose(1, 0, 2)
    return np.concatenate([sixteens.ravel(), block[:, whole:].ravel()])


def _depthwise(operator: Convolution, dot: bool) -> Kernel:
    scales, magic = _sums(operator, dot)
    channels = operator.output.image[2]
    taps = prod(operator.kernel)
    (height, width), (_, stride) = operator.kernel, operator.strides
    # Two steps: whole rows of few channels, or parts of rows where even 16 channels are too many.
    columns = operator.output.image[1]
    row = (columns - 1) * stride + width
    slab = max(16, _BAND_BYTES // (height * row) // 16 * 16)
    if height * row * slab > 2 * _BAND_BYTES:
        columns = max(1, (_BAND_BYTES // (16 * height) - width) // stride + 1)
    dots = dot and operator.kernel == (3, 3) and stride <= 2
    sizes = {
        **_geometry(operator),
        "slab": min(slab, _whole(channels)),
        "columns": columns,
        "dots": dots,
        **_facts(operator, magic),
    }
    weights = np.zeros((taps, _whole(channels)), np.int8)
    weights[:, :channels] = operator.weights.reshape(taps, channels)
    packed = [_head(operator, input_zero=operator.input.zero)]
    at = 0
    while at < channels:
        own = slice(at, at + (16 if channels - at >= 16 and not dots else 8))
        block = _columns(weights[:, own]) if dots else weights[:, own].ravel()
        packed += [*_scales(scales, own), block]
        at = own.stop
    rows = operator.output.image[0]
    return _made("depthwise", sizes, rows, np.concatenate(packed), operator.macs)


def _columns(weights: Bytes) -> Bytes:
    """8 channels' 3×3 weights for SDOT: column by column, of each channel three and a zero."""
    columns = np.zeros((3, 2, 4, 4), np.int8)
    columns[..., :3] = weights.reshape(3, 3, 2, 4).transpose(1, 2, 3, 0)
    return columns.ravel()


def _geometry(operator: Convolution) -> dict[str, int]:
    height, width, channels = operator.input.image
    output_height, output_width, _ = operator.output.image
    return {
        "height": height,
        "width": width,
        "channels": channels,
        "output_height": output_height,
        "output_width": output_width,
        "kernel_height": operator.kernel[0],
        "kernel_width": operator.kernel[1],
        "stride_h": operator.strides[0],
        "stride_w": operator.strides[1],
        "top": operator.pads[0],
        "left": operator.pads[1],
    }


def _facts(operator: Convolution, magic: bool) -> dict[str, bool]:
    # Two products may leave 16 bits: 2 × 128 × 128 does.
    pairs = not (operator.weights == -128).any()
    return {"pairs": pairs, "magic": magic, "clamped": _clamped(operator)}


def _made(
    kind: str,
    sizes: Mapping[str, int],
    units: int,
    parameters: Bytes,
    macs: int = 0,
) -> Kernel:
    fields = ", ".join(f".{name} = {int(value)}" for name, value in sizes.items())
    inputs = "a, b" if kind == "addition" else "a"
    constants = f"({_FUNCTIONS[kind][0]}){{{fields}}}"
    call = f"{kind}(first, last, {inputs}, parameters, y, {constants});"
    return Kernel(kind, call, units, parameters, macs)


def _whole(count: int) -> int:
    return -(-count // _LANES) * _LANES


def _clamped(operator: Limited) -> bool:
    return operator.stored_limits != operator.output.limits


def _head(
    operator: Operator, ratios: Sequence[float] = (), input_zero: int = 0
) -> Bytes:
    output = operator.output
    limits = operator.stored_limits if isinstance(operator, Limited) else output.limits
    head = np.zeros(_HEAD // 4, np.int32)
    head[:4] = output.zero, *limits, input_zero
    head[4 : 4 + len(ratios)] = np.asarray(ratios, np.float32).view(np.int32)
    return head.view(np.int8)


def _scales(scales: Requantisation, own: slice) -> list[Bytes]:
    missing = max(own.stop - scales.bias.size, 0)
    bias = np.pad(scales.bias[own].astype(np.int32), (0, missing))
    return [bias.view(np.int8), np.pad(scales.ratio[own], (0, missing)).view(np.int8)]


def _sums(operator: Convolution, dot: bool) -> tuple[Requantisation, bool]:
    """What turns sums into output values, and whether `scaled` may take its short way."""
    scales = operator.requantisation
    steps = scales.largest * scales.ratio.astype(np.float64)
    magic = (
        dot and scales.largest.max() < _MAGIC_SUMS and steps.max() + 1 < _MAGIC_STEPS
    )
    if magic:
        scales = scales._replace(bias=scales.bias + _MAGIC)
    return scales, bool(magic)
