"""A .tflite file as the ONNX model that an exporter would write: QuantizeLinear and DequantizeLinear around 8 bits.

Inputs and outputs are float32, in the file's shape and order of axes; inside, images have their channels first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx.numpy_helper import to_array

from netship.compile.frontend.fold import infer, values
from netship.compile.frontend.names import Unfit
from netship.compile.frontend.tflite import arrange, elements, windows
from netship.compile.frontend.tflite.graph import TO_NCHW, Builder
from netship.compile.frontend.tflite.reader import Operator, read
from netship.targets.errors import first_line
from netship.targets.escapes import shown

_OPERATORS: dict[str, Callable[[Builder, Operator], None]] = {
    **dict.fromkeys(elements.UNARY, elements.unary),
    **dict.fromkeys(elements.BINARY, elements.binary),
    **dict.fromkeys(elements.LIMITS, elements.relu),
    **dict.fromkeys(arrange.REDUCTIONS, arrange.reduction),
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D"), windows.convolution),
    **dict.fromkeys(("AVERAGE_POOL_2D", "L2_POOL_2D", "MAX_POOL_2D"), windows.pool),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), windows.resize),
    **dict.fromkeys(("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"), windows.batches),
    **dict.fromkeys(("SPACE_TO_DEPTH", "DEPTH_TO_SPACE"), windows.blocks),
    **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS"), arrange.view),
    **dict.fromkeys(("SPLIT", "SPLIT_V"), arrange.split),
    **dict.fromkeys(("PAD", "PADV2", "MIRROR_PAD"), arrange.pad),
    **dict.fromkeys(("ARG_MAX", "ARG_MIN"), arrange.extreme_place),
    **dict.fromkeys(("TILE", "BROADCAST_TO"), arrange.repetition),
    **dict.fromkeys(("SOFTMAX", "LOG_SOFTMAX"), elements.softmax),
    "BATCH_MATMUL": windows.batch_matmul,
    "CAST": elements.cast,
    "CONCATENATION": arrange.concatenation,
    "DEQUANTIZE": elements.dequantise,
    "FULLY_CONNECTED": windows.fully_connected,
    "GATHER": arrange.gather,
    "GELU": elements.gelu,
    "L2_NORMALIZATION": elements.l2_normalisation,
    "LEAKY_RELU": elements.leaky_relu,
    "LOCAL_RESPONSE_NORMALIZATION": elements.local_response_normalisation,
    "PACK": arrange.pack,
    "QUANTIZE": elements.quantise,
    "SHAPE": arrange.shape_of,
    "SLICE": arrange.slice_,
    "SQUARE": elements.square,
    "SQUARED_DIFFERENCE": elements.squared_difference,
    "STRIDED_SLICE": arrange.strided_slice,
    "TRANSPOSE": arrange.transpose,
    "TRANSPOSE_CONV": windows.transposed_convolution,
    "UNPACK": arrange.unpack,
}


def convert(data: bytes) -> onnx.ModelProto:
    """The ONNX model of a .tflite file's bytes.

    Raises:
        Unfit: what is wrong with the file, or what of it is not read.
    """
    try:
        return _converted(data)
    except Unfit:
        raise
    except Exception as error:  # noqa: BLE001  (a flatbuffer says anything: struct, numpy and onnx raise errors of any class)
        raise Unfit(
            f"not a TFLite model, or cut short ({shown(first_line(error), 160)}); convert or copy it again"
        ) from None


def pixel_values(proto: onnx.ModelProto) -> tuple[float, float] | None:
    """Of a model that `convert` made with an input of 8 bits: the real values of the lowest and the highest stored one."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        source = node.input[0]
        if source in makers and makers[source].op_type == "Transpose":
            source = makers[source].input[0]
        if source == proto.graph.input[0].name:
            scale, zero = (to_array(constants[name]) for name in node.input[1:])
            info = np.iinfo(zero.dtype)
            low, high = (
                (limit - int(zero)) * float(scale) for limit in (info.min, info.max)
            )
            return low, high
    return None


def _converted(data: bytes) -> onnx.ModelProto:
    file = read(data)
    graph = Builder(file)
    for operator in file.operators:
        if operator.kind not in _OPERATORS:
            raise Unfit(
                f"{operator.label}: is not read; convert the network without it, or to ONNX"
            )
        if not operator.outputs:
            raise Unfit(f"{operator.label}: has no output; convert it again")
        graph.begin(operator)
        _OPERATORS[operator.kind](graph, operator)
    proto = graph.finished()
    _check_shapes(proto, graph)
    return proto


def _check_shapes(proto: onnx.ModelProto, graph: Builder) -> None:
    """Refuse a file whose operators make other shapes than it says."""
    try:
        known = values(infer(proto).graph)
    except onnx.shape_inference.InferenceError as error:
        raise Unfit(
            f"its operators contradict its shapes ({shown(first_line(error), 160)}); convert it again"
        ) from None
    for index, made in graph.made.items():
        for order, name in made.real.items():
            wanted = graph.shape(index)
            if order == "NCHW":
                wanted = tuple(wanted[axis] for axis in TO_NCHW)
            found = known[name].sizes if name in known else wanted
            if found not in (wanted, None):
                raise Unfit(
                    f"{graph.tensors[index].label}: its operators make {list(found or ())}, "
                    f"the file says {list(wanted)}; convert it again"
                )
