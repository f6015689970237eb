"""A network in the form that LiteRT's and ncnn's conversions are made for, whatever exporter wrote it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Operator, Quantisation, Tensor, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Dense
from netship.compile.passes.layout import channels_first_inputs
from netship.compile.passes.simplify import drop_identities

if TYPE_CHECKING:
    import onnx


def plain(proto: onnx.ModelProto, channels_last: Collection[str]) -> onnx.ModelProto:
    """The same network: an image with its channels first, scales and padding in the convolutions, padding in numbers.

    A network that has this form already stays as it is.

    Args:
        channels_last: names of the inputs [1, height, width, channels].
    """
    written, graph = onnx_form.read_as_written(proto), onnx_form.read_absorbed(proto)
    automatic = any(map(_padded_in_numbers, graph.operators))
    same = len(graph.operators) == len(written.operators)
    if same and not channels_last and not automatic:
        return proto
    graph = channels_first_inputs(graph, channels_last).rewritten(_padded_in_numbers)
    return onnx_form.write(drop_identities(graph))


def _padded_in_numbers(operator: Operator) -> list[Operator] | None:
    """``pads`` in the place of ``auto_pad``, which ncnn's converter takes for none."""
    attributes = dict(operator.attributes)
    mode = attributes.pop("auto_pad", None)
    if mode in (None, b"NOTSET"):
        return None
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        rank = len(operator.input.shape) - 2
        kernel = attributes.get("kernel_shape") or _weights(operator).shape[2:]
        strides, dilations = (
            np.array(attributes.get(name) or [1] * rank)
            for name in ("strides", "dilations")
        )
        spread = (np.array(kernel) - 1) * dilations + 1
        needed = (np.array(operator.output.shape[2:]) - 1) * strides + spread
        total = np.maximum(needed - operator.input.shape[2:], 0)
        ends = [total // 2, total - total // 2]
        ends = ends if mode == b"SAME_UPPER" else ends[::-1]
        attributes["pads"] = np.concatenate(ends).tolist()
    made = operator.inputs, operator.outputs, attributes
    return [make(operator.kind, operator.name, *made)]


def _weights(operator: Operator) -> Tensor:
    _, weights, *_ = operator.inputs
    assert weights is not None
    return weights


def added_as_bias(graph: Graph) -> Graph:
    """A constant row that is added to what a fully connected layer makes is its bias."""
    fresh = graph.fresh_names()
    biases: dict[str, Tensor] = {}

    def rule(operator: Operator) -> list[Operator] | None:
        reader = graph.only_reader(operator.output)
        if isinstance(operator, Dense) and len(operator.inputs) == 2:
            row = _added_row(reader) if reader and reader.kind == "Add" else None
            if reader and row is not None and row.size == operator.output.shape[-1]:
                bias = constant(fresh(f"{operator.output.name}/bias"), row.ravel())
                biases[reader.output.name] = bias
                inputs = (*operator.inputs, bias)
                return [replace(operator, inputs=inputs, outputs=reader.outputs)]
        return [] if operator.output.name in biases else None

    return graph.rewritten(rule)


def _added_row(addition: Operator) -> np.ndarray[Any, Any] | None:
    """The constant of an addition whose sizes are all 1 but the last; None where there is no such."""
    for row in (addition.constant(0), addition.constant(1)):
        if row is not None and row.ndim and row.size == row.shape[-1]:
            return row if row.dtype == np.float32 else None
    return None


def no_bias(source: Tensor, weights: Tensor) -> Tensor:
    """Zeros; of an int8 layer in its units."""
    count = weights.shape[0]
    facts = weights.quantisation
    if source.quantisation is None or facts is None:
        return constant("", np.zeros(count, np.float32))
    scales = np.multiply(source.scale, facts.scale).tolist()
    units = Quantisation(tuple(scales), (0,), axis=facts.axis)
    return constant("", np.zeros(count, np.int32), units)


def ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor with its axes in another order."""
    shape = tuple(tensor.shape[axis] for axis in order)
    value = None if tensor.value is None else tensor.value.transpose(order)
    quantisation = tensor.quantisation
    if quantisation is not None:
        axis = order.index(quantisation.axis or 0)
        quantisation = replace(quantisation, axis=axis)
    return replace(tensor, shape=shape, value=value, quantisation=quantisation)
