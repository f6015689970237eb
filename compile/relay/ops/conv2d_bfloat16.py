"""Convolutions whose inputs and weights are rounded to bfloat16, and whose products are added in float32.

AVX512-BF16's ``vdpbf16ps`` multiplies twice as many numbers as a multiply-add of float32 and takes as long (measured on
Zen 4: 0.28 ns each, one thread). TVM 0.19 knows no vectors of bfloat16 in its own code, so that the two instructions are
called in functions of LLVM IR, whose arguments are integers of 16 and 32 bits. Tensors between operators stay in
float32: a tile of inputs is rounded once, beside the loop that reads it for all output channels.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.passes.bfloat16 import CHANNELS, rounded
from netship.compile.relay.expressions import shape
from netship.compile.relay.ops import registration
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te, tir
from tvm.relay.transform.infer_layout_utils import InferCorrectLayoutOutput

OPERATOR = "netship.conv2d_bfloat16"
_LONGEST = 16
# Registers for sums; others hold an input and the weights.
_SUMS = 24
_MOST_PIXELS = 14
_MOST_VECTORS = 4
# Tiles that read the same weights, one after the other, while these are in the first-level cache.
_TILES = 4
_UNROLLED = 4
_ROUND, _DOT = "netship_bfloat16_round", "netship_bfloat16_dot"


def convolution(
    data: Any, weights: NDArray[np.float32], label: str, **attributes: Any
) -> Any:
    """A call on ``data`` [1, channels, height, width].

    Args:
        weights: [out, in, height, width].
        attributes: ``strides`` and ``dilation`` of two, ``padding`` of four: above, left, below, right.
    """
    made = registration.call(
        OPERATOR,
        [data, relay.const(packed(weights))],
        data_layout="NCHW",
        kernel_size=weights.shape[2:],
        **attributes,
    )
    return registration.named(made, label)


def packed(weights: NDArray[np.float32]) -> NDArray[np.int16]:
    """[out, in, height, width] in bfloat16 as [out / lanes, height · width · in / 2, lanes, 2]."""
    outputs, inputs, height, width = weights.shape
    lanes = _lanes(outputs)
    bits = rounded(weights).view(np.int32) >> 16
    apart = bits.astype(np.int16).reshape(
        outputs // lanes, lanes, inputs // 2, 2, height * width
    )
    return np.ascontiguousarray(apart.transpose(0, 4, 2, 1, 3)).reshape(
        outputs // lanes, -1, lanes, 2
    )


def _lanes(channels: int) -> int:
    return _LONGEST if channels % _LONGEST == 0 else CHANNELS


def _pixels(attrs: Any, data: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the output, of ``data`` [1, height, width, channels]."""
    top, left, bottom, right = (int(each) for each in attrs["padding"])
    sizes = (data[1] + top + bottom, data[2] + left + right)
    found = [
        (size - int(dilation) * (int(kernel) - 1) - 1) // int(stride) + 1
        for size, kernel, stride, dilation in zip(
            sizes,
            attrs["kernel_size"],
            attrs["strides"],
            attrs["dilation"],
            strict=True,
        )
    ]
    return found[0], found[1]


def _last(attrs: Any, data: tuple[int, ...]) -> tuple[int, ...]:
    """The data's shape with channels last."""
    if attrs["data_layout"] == "NHWC":
        return data
    return tuple(data[axis] for axis in (0, 2, 3, 1))


def _relation(types: Any, attrs: Any) -> Any:
    data, weights = shape(types[0]), shape(types[1])
    height, width = _pixels(attrs, _last(attrs, data))
    made: tuple[int, ...] = (data[0], height, width, weights[0] * weights[2])
    if attrs["data_layout"] == "NCHW":
        made = tuple(made[axis] for axis in (0, 3, 1, 2))
    return relay.TensorType(made, "float32")


def _macs(call: Any) -> int:
    blocks, pairs, lanes, _ = shape(call.args[1].checked_type)
    output = prod(shape(call.checked_type))
    assert blocks * lanes in shape(call.checked_type)
    return output * pairs * 2


def _compute(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    assert attrs["data_layout"] == "NHWC", "the pass of layouts makes it NHWC"
    data, weights = inputs
    _, source_height, source_width, channels = shape(data)
    blocks, pairs, lanes, _ = shape(weights)
    height, width = _pixels(attrs, shape(data))
    top, left, *_ = (int(each) for each in attrs["padding"])
    down, across = (int(each) for each in attrs["strides"])
    rows, columns = (int(each) for each in attrs["dilation"])
    kernel_width = int(attrs["kernel_size"][1])
    padded = any(int(each) for each in attrs["padding"])
    tile, _ = _tile(width, blocks)
    whole = -(-width // tile) * tile

    def patch(row: Any, column: Any, tap: Any, channel: Any) -> Any:
        """What a pixel of the output reads at a place of the kernel."""
        y = row * down + tap // kernel_width * rows - top
        x = column * across + tap % kernel_width * columns - left
        inside = []
        if padded:
            inside += [y >= 0, y < source_height, x >= 0, x < source_width]
        if whole > width:
            inside.append(column < width)
        value = data[0, y, x, channel]
        if not inside:
            return value
        return tir.if_then_else(tir.all(*inside), value, tir.const(0, "float32"))

    half = channels // 2
    taps = pairs // half
    gathered = te.compute((height, whole, taps, channels), patch, name="gathered")
    short = te.compute(
        gathered.shape, lambda *place: gathered(*place).astype("int16"), name="short"
    )
    tap = te.reduce_axis((0, taps), name="tap")
    pair = te.reduce_axis((0, half), name="pair")
    two = te.reduce_axis((0, 2), name="two")
    sums = te.compute(
        (blocks, height, whole, lanes),
        lambda block, y, x, lane: te.sum(
            short[y, x, tap, pair * 2 + two].astype("float32")
            * weights[block, tap * half + pair, lane, two].astype("float32"),
            [tap, pair, two],
        ),
        name="sums",
    )
    return [
        te.compute(
            (1, height, width, blocks * lanes),
            lambda _, y, x, n: sums[n // lanes, y, x, n % lanes],
            name="convolution",
            tag=OPERATOR,
        )
    ]


def _tile(width: int, blocks: int) -> tuple[int, int]:
    """Pixels of a row and vectors of channels whose sums are held in registers: the fewest loads for a product."""

    def loads(pixel: int, vector: int) -> tuple[float, int]:
        filled = -(-width // pixel) * pixel / width
        return filled * (1 / pixel + 1 / vector + 1 / (2 * pixel * vector)), -pixel

    return min(
        (
            (pixel, vector)
            for vector in range(1, _MOST_VECTORS + 1)
            if blocks % vector == 0
            for pixel in range(1, _MOST_PIXELS + 1)
            if pixel * vector <= _SUMS
        ),
        key=lambda each: loads(*each),
    )


def _schedule(_: Any, outputs: Any, target: Any) -> Any:
    output = outputs[0]
    schedule = te.create_schedule(output.op)
    found = []

    def visit(operation: Any) -> None:
        if operation.tag == OPERATOR:
            found.append(operation)
        elif isinstance(operation, te.ComputeOp):
            if operation.output(0) != output:
                schedule[operation].compute_inline()
            for each in operation.input_tensors:
                visit(each.op)

    visit(output.op)
    made = found[0]
    (sums,) = made.input_tensors
    short, _ = sums.op.input_tensors
    (gathered,) = short.op.input_tensors
    if made.output(0) != output:
        schedule[made].compute_inline()
    blocks, height, _, lanes = shape(sums)
    channels = shape(short)[3]
    width = shape(output)[2]
    tile, vectors = _tile(width, blocks)
    stage = schedule[output]
    _, row, column, channel = stage.op.axis
    task, turn = stage.split(row, _rows(height, -(-width // tile)))
    outer, inner = stage.split(column, tile)
    group, rest = stage.split(channel, vectors * lanes)
    vector, lane = stage.split(rest, lanes)
    stage.reorder(task, group, turn, outer, inner, vector, lane)
    stage.vectorize(lane)
    stage.parallel(task)
    stage.pragma(task, "import_llvm", _functions(target))

    sum_stage = schedule[sums]
    sum_stage.compute_at(stage, outer)
    block, _, position, wide = sum_stage.op.axis
    tap, pair, two = sum_stage.op.reduce_axis
    far, near = sum_stage.split(pair, _UNROLLED)
    sum_stage.reorder(tap, far, near, block, position, wide, two)
    for each in (near, block, position):
        sum_stage.unroll(each)
    sum_stage.tensorize(wide, _products(lanes))

    rounding = schedule[short]
    rounding.compute_at(stage, task)
    lanes = _lanes(channels)
    apart, together = rounding.split(rounding.op.axis[3], lanes)
    rounding.tensorize(together, _rounding(lanes))
    schedule[gathered].compute_at(rounding, apart)
    schedule[gathered].vectorize(schedule[gathered].op.axis[3])
    return schedule


def _rows(height: int, tiles: int) -> int:
    """How many rows of so many tiles one task computes: few, and as many in each."""
    most = max(_TILES // tiles, 1)
    return max(each for each in range(1, most + 1) if height % each == 0)


def _functions(target: Any) -> str:
    """The two instructions in LLVM IR, for vectors of 16 and of 8."""
    cpu = str(target.attrs["mcpu"])
    text = []
    for lanes in (_LONGEST, CHANNELS):
        bits, sums = lanes * 32, f"<{lanes} x float>"
        words, shorts = f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
        dot = f"@llvm.x86.avx512bf16.dpbf16ps.{bits}"
        text.append(f"""
declare {sums} {dot}({sums}, {shorts}, {shorts})
define {sums} @{_DOT}{lanes}({sums} %s, {words} %a, {words} %b) #0 {{
  %x = bitcast {words} %a to {shorts}
  %y = bitcast {words} %b to {shorts}
  %r = call {sums} {dot}({sums} %s, {shorts} %x, {shorts} %y)
  ret {sums} %r
}}
""")
        kept, whole = f"<{lanes} x bfloat>", f"<{lanes} x i16>"
        text.append(f"""
define {whole} @{_ROUND}{lanes}({sums} %x) #0 {{
  %r = fptrunc {sums} %x to {kept}
  %b = bitcast {kept} %r to {whole}
  ret {whole} %b
}}
""")
    return "".join(text) + f'attributes #0 = {{ "target-cpu"="{cpu}" }}\n'


def _rounding(lanes: int) -> Any:
    """int16[lanes] = bfloat16 of float32[lanes]."""
    data = te.placeholder((lanes,), "float32", name="whole")
    made = te.compute((lanes,), lambda i: data[i].astype("int16"), name="short")

    def body(inputs: Any, outputs: Any) -> Any:
        value = inputs[0].vload([0], f"float32x{lanes}")
        call = tir.call_extern(f"int16x{lanes}", f"{_ROUND}{lanes}", value)
        return outputs[0].vstore(0, call)

    return te.decl_tensor_intrin(
        made.op,
        body,
        binds={each: _buffer(each, [1]) for each in (data, made)},
        default_buffer_params={"offset_factor": 1},
    )


def _products(lanes: int) -> Any:
    """float32[lanes] += the sum of two products of bfloat16."""
    data = te.placeholder((2,), "int16", name="data")
    weights = te.placeholder((lanes, 2), "int16", name="weights")
    two = te.reduce_axis((0, 2), name="two")
    made = te.compute(
        (lanes,),
        lambda i: te.sum(
            data[two].astype("float32") * weights[i, two].astype("float32"), two
        ),
        name="sums",
    )

    def body(inputs: Any, outputs: Any) -> tuple[Any, Any, Any]:
        """What TVM asks of a tensor intrinsic: the whole, setting to zero, adding."""
        sums, (output,) = f"float32x{lanes}", outputs
        pair = inputs[0].vload([0], "int16x2")
        word = tir.call_intrin("int32", "tir.reinterpret", pair)
        wide = word.astype(f"int32x{lanes}")
        loaded = inputs[1].vload([0, 0], f"int16x{2 * lanes}")
        words = tir.call_intrin(f"int32x{lanes}", "tir.reinterpret", loaded)

        def added(before: Any) -> Any:
            call = tir.call_extern(sums, f"{_DOT}{lanes}", before, wide, words)
            return output.vstore(0, call)

        zero = tir.const(0, sums)
        return added(zero), output.vstore(0, zero), added(output.vload([0], sums))

    return te.decl_tensor_intrin(
        made.op,
        body,
        binds={
            data: _buffer(data, [1]),
            weights: _buffer(weights, [te.var("row"), 1]),
        },
        default_buffer_params={"offset_factor": 1},
    )


def _buffer(tensor: Any, strides: list[Any]) -> Any:
    return tir.decl_buffer(
        tensor.shape, tensor.dtype, tensor.op.name, strides=strides, offset_factor=1
    )


def _layouts(attrs: Any, new: Any, old: Any, types: Any) -> Any:
    """Its own, whatever those before it have; of weights any of four axes, which never changes."""
    own, weights = tir.layout(attrs["data_layout"]), tir.layout("OIHW")
    return InferCorrectLayoutOutput([own, weights], [own], attrs)


def _channels_last(attrs: Any, inputs: Any, types: Any, wanted: Any) -> Any:
    """The call that TVM's pass of layouts puts in the place of one; ``wanted``: of the data and of the weights."""
    return registration.call(
        OPERATOR, inputs, **{**dict(attrs.items()), "data_layout": str(wanted[0])}
    )


_operator = registration.register(
    OPERATOR,
    "A convolution of bfloat16 with sums in float32.",
    ("data", "weight"),
    _relation,
    relay.op.OpPattern.OUT_ELEMWISE_FUSABLE,
    macs=_macs,
)
registration.use(_operator, _compute, _schedule)
_operator.set_attr("FInferCorrectLayout", _layouts)
relay.op.op.register_convert_op_layout(OPERATOR, _channels_last)
