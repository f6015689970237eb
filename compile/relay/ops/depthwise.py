"""A depthwise convolution of int8 for AVX-512: the taps of a row in one dot product.

Channels lie in blocks of 16, so that four neighbouring pixels are 64 bytes. These, transposed to 16 channels of four
pixels, are what a dot product by fours takes: a 3×3 kernel is three of them for each 16 outputs, with a zero as fourth tap.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from netship.compile.ir.operators import Convolution
from netship.compile.relay.ops import registration
from netship.compile.relay.ops.dot_product import intrinsic
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te, tir, topi
from tvm.relay.op import op as registry
from tvm.relay.transform.infer_layout_utils import InferCorrectLayoutOutput
from tvm.target.codegen import target_has_features

OPERATOR = "netship.depthwise"
_LANES, _TAPS = 16, 4
# Rows of the output that share a padded copy of their input, which stays in the first-level cache.
_BAND = 14
# Sums kept in registers, besides a row of the kernel.
_MOST_COLUMNS = 16


def serves(target: Any, kernel: tuple[int, int], channels: int) -> bool:
    """Whether ``target`` and the shape have this operator."""
    return (
        kernel[1] <= _TAPS
        and channels % _LANES == 0
        and bool(target_has_features(["avx512bw", "avx512f"], target))
    )


def depthwise(data: Any, operator: Convolution) -> Any:
    """int32 sums of uint8 NCHW, around it the zero point."""
    height, width, channels = operator.weights.shape
    blocks = operator.weights.reshape(height, width, channels // _LANES, _LANES)
    packed = np.zeros((channels // _LANES, height, _LANES, _TAPS), np.int8)
    packed[..., :width] = blocks.transpose(2, 0, 3, 1)
    rows, columns, _ = operator.output.image
    return registration.call(
        OPERATOR,
        [data, relay.const(packed)],
        strides=operator.strides,
        pads=operator.pads,
        zero=operator.input.zero,
        rows=rows,
        columns=columns,
        macs=operator.macs,
    )


def _relation(types: Any, attrs: Any) -> Any:
    batch, channels, _, _, *block = types[0].shape
    shape = [batch, channels, attrs["rows"], attrs["columns"], *block]
    return relay.TensorType(shape, "int32")


def _layouts(attrs: Any, new: Any, old: Any, _: Any) -> Any:
    """NCHW as it is written, blocks of 16 channels as it is computed."""
    layout = tir.layout(f"NCHW{_LANES}c" if new else "NCHW")
    # The kernel is packed already; its layout only must not change.
    inputs = [layout, tir.layout("OIHW")]
    return InferCorrectLayoutOutput(inputs, [layout], attrs)


def _compute(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    data, kernel = inputs
    width = data.shape[3]
    rows, columns = (int(stride) for stride in attrs["strides"])
    top, left, bottom, _ = (int(pad) for pad in attrs["pads"])
    read = (int(output_type.shape[3]) - 1) * columns + _TAPS
    right = max(read - left - int(width), 0)
    before, after = (0, 0, top, left, 0), (0, 0, bottom, right, 0)
    zero = tir.const(int(attrs["zero"]), "uint8")
    padded = topi.nn.pad(data, before, after, zero, name="padded")
    y = te.reduce_axis((0, kernel.shape[1]), "y")
    x = te.reduce_axis((0, _TAPS), "x")
    return [
        te.compute(
            output_type.shape,
            lambda n, c, h, w, lane: te.sum(
                padded[n, c, h * rows + y, w * columns + x, lane].astype("int32")
                * kernel[c, y, lane, x].astype("int32"),
                axis=[y, x],
            ),
            name="depthwise",
            tag=OPERATOR,
        )
    ]


def _schedule(_: Any, outputs: Any, target: Any) -> Any:
    output = outputs[0]
    schedule = te.create_schedule(output.op)
    found: list[Any] = []

    def callback(operation: Any) -> None:
        if operation.tag == OPERATOR:
            found.append(operation.output(0))

    topi.utils.traverse_inline(schedule, output.op, callback)
    (sums,) = found
    padded = sums.op.input_tensors[0]
    height, width = (int(sums.shape[axis]) for axis in (2, 3))
    band = max(n for n in range(1, _BAND + 1) if height % n == 0)
    columns = max(n for n in range(1, _MOST_COLUMNS + 1) if width % n == 0)

    if sums.op == output.op:
        sums = schedule.cache_write(output, "global")
    n, c, h, w, lane = schedule[output].op.axis
    outer, row = schedule[output].split(h, band)
    piece, column = schedule[output].split(w, columns)
    bands = schedule[output].fuse(n, c, outer)
    schedule[output].reorder(bands, row, piece, column, lane)
    schedule[output].vectorize(lane)
    schedule[output].unroll(column)
    schedule[output].parallel(bands)

    schedule[sums].compute_at(schedule[output], piece)
    n, c, h, w, lane = schedule[sums].op.axis
    y, x = schedule[sums].op.reduce_axis
    schedule[sums].reorder(n, c, h, y, w, lane, x)
    schedule[sums].unroll(y)
    schedule[sums].unroll(w)
    schedule[sums].tensorize(lane, _dot_products())

    schedule[padded].compute_at(schedule[output], bands)
    schedule[padded].vectorize(schedule[padded].op.axis[4])
    return schedule


def _dot_products() -> Any:
    """int32[16] += uint8[4 pixels, 16] · int8[16, 4]."""
    pixels = te.placeholder((_TAPS, _LANES), dtype="uint8", name="pixels")
    kernel = te.placeholder((_LANES, _TAPS), dtype="int8", name="kernel")
    x = te.reduce_axis((0, _TAPS), name="x")
    result = te.compute(
        (_LANES,),
        lambda i: te.sum(
            pixels[x, i].astype("int32") * kernel[i, x].astype("int32"), x
        ),
        name="sums",
    )
    return intrinsic(result, ([_LANES, 1], [_TAPS, 1]), _load)


def _load(pixels: Any, kernel: Any) -> tuple[Any, Any]:
    octets = _LANES * _TAPS
    loaded = pixels.vload([0, 0], f"uint8x{octets}")
    order = [_LANES * tap + lane for lane in range(_LANES) for tap in range(_TAPS)]
    turned = tir.Shuffle([loaded], [tir.const(i, "int32") for i in order])
    data = tir.call_intrin(f"int8x{octets}", "tir.reinterpret", turned)
    return data, kernel.vload([0, 0], f"int8x{octets}")


_operator = registration.register(
    OPERATOR,
    "A depthwise convolution, uint8 × int8 to int32.",
    ("data", "kernel"),
    _relation,
    relay.op.OpPattern.OUT_ELEMWISE_FUSABLE,
    macs=lambda call: int(call.attrs["macs"]),
)
_operator.set_attr("FInferCorrectLayout", _layouts)
registration.use(_operator, _compute, _schedule)
registry.register_alter_op_layout(
    OPERATOR,
    lambda attrs, inputs, infos, out: relay.Call(relay.op.get(OPERATOR), inputs, attrs),
)
