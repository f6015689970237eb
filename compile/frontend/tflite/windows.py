"""Operators that look at windows of an image, at matrices, or at blocks of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from netship.compile.frontend.names import Unfit
from netship.compile.frontend.tflite.elements import activated
from netship.compile.frontend.tflite.graph import Builder
from netship.compile.frontend.tflite.reader import Array, Operator, Quantisation

_SAME = 0
_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
_VIEWS = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
# Between an image and the fully connected layer that reads it.
_MOST_VIEWS = 4

Pads = list[tuple[int, int]]


def _two(operator: Operator, first: str, second: str) -> tuple[int, int]:
    """Two options that must be positive, of height and width."""
    sizes = operator.option(first, 1), operator.option(second, 1)
    if min(sizes) < 1:
        raise Unfit(f"{operator.label}: a stride or size below 1; convert it again")
    return sizes


def _pads(
    operator: Operator,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Pads:
    """Rows before and behind, columns before and behind, as the option Padding says."""
    if operator.option("Padding") != _SAME:
        return [(0, 0), (0, 0)]
    pads = []
    for size, k, stride, dilation in zip(
        sizes, kernel, strides, dilations, strict=True
    ):
        extent = (k - 1) * dilation + 1
        total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def _flat(pads: Pads) -> list[int]:
    (top, bottom), (left, right) = pads
    return [top, left, bottom, right]


def _weights(
    graph: Builder,
    operator: Operator,
    perm: Sequence[int],
    columns: Array | None = None,
) -> str:
    """Constant weights with their axes in ONNX's order; stored where the layer's input is.

    Args:
        columns: of a matrix, in another order.
    """
    source, index = operator.inputs[:2]
    stored, tensor = graph.value(index), graph.tensors[index]
    facts = tensor.quantisation
    is_stored = tensor.quantised and graph.tensors[source].quantised
    value = (stored if is_stored else tensor.real).transpose(perm)
    if columns is not None:
        value = value[:, columns]
    if facts is None or not is_stored:
        return graph.constant(value, tensor.name)
    facts = Quantisation(facts.scale, facts.zero, list(perm).index(facts.axis))
    return graph.dequantised(value, facts, tensor.name)


def _bias(graph: Builder, operator: Operator, place: int = 2) -> list[str]:
    """The bias, if there is one; integers are in units of the input's scale × that of the weights."""
    if len(operator.inputs) <= place or operator.inputs[place] == -1:
        return []
    index = operator.inputs[place]
    stored, tensor = graph.value(index), graph.tensors[index]
    if stored.dtype != np.int32:
        return [graph.constant(tensor.real.ravel(), tensor.name)]
    # The two before it are the weights and the input.
    first, second = (
        graph.tensors[each].quantisation for each in operator.inputs[place - 2 : place]
    )
    if first is None or second is None:
        raise Unfit(
            f"{operator.label}: a bias of int32 for weights or an input without scale; convert it again"
        )
    facts = Quantisation(first.scale * second.scale, np.zeros(1, np.int64))
    return [graph.dequantised(stored.ravel(), facts, tensor.name)]


def convolution(graph: Builder, operator: Operator) -> None:
    """CONV_2D and DEPTHWISE_CONV_2D, with a PAD or SPACE_TO_BATCH_ND before it."""
    source, pads, dilations = _padded_source(graph, operator)
    name, channels = graph.image(source), graph.shape(source)[3]
    shape = graph.value(operator.inputs[1]).shape
    if len(shape) != 4:
        raise Unfit(f"{operator.label}: weights of rank {len(shape)}; convert it again")
    if operator.kind == "CONV_2D":
        perm, group = (0, 3, 1, 2), channels // shape[3]
    else:
        perm, group = (3, 0, 1, 2), channels
    made = graph.node(
        "Conv",
        name,
        _weights(graph, operator, perm),
        *_bias(graph, operator),
        kernel_shape=shape[1:3],
        strides=_two(operator, "StrideH", "StrideW"),
        dilations=dilations,
        pads=_flat(pads),
        group=group,
    )
    made = activated(graph, operator, made)
    graph.define(_behind(graph, operator), made, "NCHW")


def _padded_source(
    graph: Builder, operator: Operator
) -> tuple[int, Pads, tuple[int, int]]:
    """What a convolution reads once what pads its input is part of it, with its padding and dilation."""
    source = operator.inputs[0]
    strides = _two(operator, "StrideH", "StrideW")
    dilations = _two(operator, "DilationHFactor", "DilationWFactor")
    kernel = graph.value(operator.inputs[1]).shape[1:3]
    pads = _pads(operator, graph.shape(source)[1:3], kernel, strides, dilations)
    before = graph.makers.get(source)
    if before is None:
        return source, pads, dilations
    if before.kind == "SPACE_TO_BATCH_ND":
        after = _batched(graph, operator)
        block = [int(size) for size in graph.value(before.inputs[1])]
        added, cut = (graph.value(each.inputs[2]).tolist() for each in (before, after))
        pads = [
            (first * size + more[0] - less[0], last * size + more[1] - less[1])
            for (first, last), size, more, less in zip(
                pads, block, added, cut, strict=True
            )
        ]
        if min(_flat(pads)) < 0:
            raise _alone(before)
        return before.inputs[0], pads, (block[0], block[1])
    if before.kind == "PAD" and graph.same_scale(before.inputs[0], source):
        widths = graph.value(before.inputs[1]).tolist()
        if widths[0] == widths[3] == [0, 0]:
            pads = [
                (first + more[0], last + more[1])
                for (first, last), more in zip(pads, widths[1:3], strict=True)
            ]
            return before.inputs[0], pads, dilations
    return source, pads, dilations


def _batched(graph: Builder, operator: Operator) -> Operator:
    """The BATCH_TO_SPACE_ND behind a convolution that has a SPACE_TO_BATCH_ND before it."""
    before = graph.makers[operator.inputs[0]]
    readers = graph.readers.get(operator.outputs[0], [])
    strides = _two(operator, "StrideH", "StrideW")
    dilations = _two(operator, "DilationHFactor", "DilationWFactor")
    if (
        len(readers) != 1
        or readers[0].kind != "BATCH_TO_SPACE_ND"
        or (*strides, *dilations) != (1, 1, 1, 1)
        or graph.value(before.inputs[1]).shape != (2,)
        or not np.array_equal(
            graph.value(before.inputs[1]), graph.value(readers[0].inputs[1])
        )
        or not graph.same_scale(before.inputs[0], operator.inputs[0])
        or not graph.same_scale(operator.outputs[0], readers[0].outputs[0])
    ):
        raise _alone(before)
    return readers[0]


def _behind(graph: Builder, operator: Operator) -> int:
    """The tensor that a convolution makes: of one in batches what BATCH_TO_SPACE_ND would make of it."""
    before = graph.makers.get(operator.inputs[0])
    if before is not None and before.kind == "SPACE_TO_BATCH_ND":
        return _batched(graph, operator).outputs[0]
    return operator.outputs[0]


def _alone(operator: Operator) -> Unfit:
    return Unfit(
        f"{operator.label}: is read only around one convolution, which it dilates; convert with dilated convolutions"
    )


def batches(graph: Builder, operator: Operator) -> None:
    """SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND: the convolution between them is read with both."""
    if operator.kind == "BATCH_TO_SPACE_ND":
        if operator.outputs[0] not in graph.made:
            raise _alone(operator)
        return
    for reader in graph.readers.get(operator.outputs[0], []):
        if reader.kind not in _CONVOLUTIONS:
            raise _alone(operator)


def transposed_convolution(graph: Builder, operator: Operator) -> None:
    _, weights, source = operator.inputs[:3]
    output = operator.outputs[0]
    shape = graph.value(weights).shape
    strides = _two(operator, "StrideH", "StrideW")
    sizes, wanted = graph.shape(source)[1:3], graph.shape(output)[1:3]
    # The padding is that of the convolution from the output to the input.
    pads, more = [], []
    for (before, _), size, out, k, stride in zip(
        _pads(operator, wanted, shape[1:3], strides, (1, 1)),
        *(sizes, wanted, shape[1:3], strides),
        strict=True,
    ):
        behind = stride * (size - 1) + k - out - before
        pads.append((before, max(behind, 0)))
        more.append(max(-behind, 0))
    layer = Operator(
        operator.index, operator.kind, (source, weights), (output,), operator.table
    )
    made = graph.node(
        "ConvTranspose",
        graph.image(source),
        _weights(graph, layer, (3, 0, 1, 2)),
        *_bias(graph, operator, 3),
        kernel_shape=shape[1:3],
        strides=strides,
        pads=_flat(pads),
        output_padding=more,
    )
    graph.define(output, activated(graph, operator, made), "NCHW")


def pool(graph: Builder, operator: Operator) -> None:
    """AVERAGE_POOL_2D and L2_POOL_2D, whose padding does not count, and MAX_POOL_2D."""
    source, output = operator.inputs[0], operator.outputs[0]
    name, sizes = graph.image(source), graph.shape(source)[1:3]
    kernel = _two(operator, "FilterHeight", "FilterWidth")
    strides = _two(operator, "StrideH", "StrideW")
    pads = _pads(operator, sizes, kernel, strides, (1, 1))
    squares = operator.kind == "L2_POOL_2D"
    if squares:
        name = graph.node("Mul", name, name)
    if operator.kind != "MAX_POOL_2D" and kernel == sizes and not any(_flat(pads)):
        made = graph.node("GlobalAveragePool", name)
    else:
        kind = "MaxPool" if operator.kind == "MAX_POOL_2D" else "AveragePool"
        made = graph.node(
            kind, name, kernel_shape=kernel, strides=strides, pads=_flat(pads)
        )
    if squares:
        made = graph.node("Sqrt", made)
    graph.define(output, activated(graph, operator, made), "NCHW")


def fully_connected(graph: Builder, operator: Operator) -> None:
    source, weights = operator.inputs[:2]
    output = operator.outputs[0]
    if operator.option("WeightsFormat") or len(graph.shape(weights)) != 2:
        raise Unfit(
            f"{operator.label}: its weights are no matrix in the default format; convert it again"
        )
    units, depth = graph.shape(weights)
    rows = math.prod(graph.shape(source)) // depth
    if graph.is_constant(weights):
        name, columns = _rows(graph, source, (rows, depth))
        matrix = _weights(graph, operator, (0, 1), columns)
    else:
        name, matrix = graph.plain(source), graph.plain(weights)
    made = graph.node("Gemm", name, matrix, *_bias(graph, operator), transB=1)
    made = activated(graph, operator, made)
    if graph.shape(output) != (rows, units):
        made = graph.requantised(output, made)
        made = graph.node("Reshape", made, graph.integers(*graph.shape(output)))
    graph.define(output, made)


def _rows(
    graph: Builder, source: int, shape: tuple[int, int]
) -> tuple[str, Array | None]:
    """A tensor as a matrix, and which columns of the weights fit its own; None for the weights' order.

    Of a flattened image the channels stay first: the weights' columns are moved, not the image.
    """
    behind = source
    for _ in range(_MOST_VIEWS):
        before = graph.makers.get(behind)
        if before is None or before.kind not in _VIEWS:
            break
        if not graph.same_scale(before.inputs[0], behind):
            break
        behind = before.inputs[0]
    if shape[0] == 1 and graph.is_image(behind):
        _, h, w, c = graph.shape(behind)
        columns = np.arange(shape[1]).reshape(h, w, c).transpose(2, 0, 1).ravel()
        image, sizes = graph.image(behind), graph.integers(*shape)
        return graph.moved(behind, "Reshape", image, sizes), columns
    if graph.shape(source) == shape:
        return graph.plain(source), None
    values, sizes = graph.in_memory(source), graph.integers(*shape)
    return graph.moved(source, "Reshape", values, sizes), None


def batch_matmul(graph: Builder, operator: Operator) -> None:
    names = []
    for index, option in zip(operator.inputs, ("AdjX", "AdjY"), strict=True):
        name, rank = graph.plain(index), len(graph.shape(index))
        if operator.option(option):
            order = [*range(rank - 2), rank - 1, rank - 2]
            name = graph.moved(index, "Transpose", name, perm=order)
        names.append(name)
    graph.define(operator.outputs[0], graph.node("MatMul", *names))


def resize(graph: Builder, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    height, width = (int(size) for size in graph.value(operator.inputs[1]))
    linear = operator.kind == "RESIZE_BILINEAR"
    halves = operator.option("HalfPixelCenters", False)
    corners = operator.option("AlignCorners", False)
    mode = "half_pixel" if halves else "align_corners" if corners else "asymmetric"
    n, _, _, c = graph.shape(source)
    made = graph.node(
        "Resize",
        *(graph.image(source), "", "", graph.integers(n, c, height, width)),
        mode="linear" if linear else "nearest",
        coordinate_transformation_mode=mode,
        nearest_mode="round_prefer_ceil" if halves or corners else "floor",
    )
    graph.define(output, made, "NCHW")


def blocks(graph: Builder, operator: Operator) -> None:
    """SPACE_TO_DEPTH and DEPTH_TO_SPACE."""
    kind = "SpaceToDepth" if operator.kind == "SPACE_TO_DEPTH" else "DepthToSpace"
    size = operator.option("BlockSize")
    made = graph.node(kind, graph.image(operator.inputs[0]), blocksize=size)
    graph.define(operator.outputs[0], made, "NCHW")
