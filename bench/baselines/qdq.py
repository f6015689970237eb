"""What runtimes with an int8 of their own need of a QDQ graph: the float network, and the ranges of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from targets.errors import UserError

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

LOWEST, HIGHEST = -128, 127
# Operators whose values can lie outside the range of a QuantizeLinear after them.
_UNBOUNDED = frozenset(["Conv", "Gemm", "Add", "BatchNormalization"])


class Range(NamedTuple):
    """An int8 value stands for (value - zero) * scale."""

    scale: float
    zero: int

    @property
    def high(self) -> float:
        return (HIGHEST - self.zero) * self.scale

    @property
    def magnitude(self) -> float:
        return max((self.zero - LOWEST) * self.scale, self.high)

    @property
    def is_relu(self) -> bool:
        """It begins at zero: QDQ graphs leave out a ReLU before such a QuantizeLinear."""
        return self.zero == LOWEST


class Layer(NamedTuple):
    """A Conv or Gemm whose integers are int8.

    Attributes:
        input, output: their ranges; without ``output`` the layer's result stays float.
        kernel: float32, output channels first.
        scales: of the kernel, one for each output channel; its zero point is 0.
    """

    input: Range
    output: Range | None
    kernel: NDArray[np.float32]
    scales: NDArray[np.float32]


class Network(NamedTuple):
    """The float32 network that a QDQ graph stands for, and its int8.

    Attributes:
        proto: without QuantizeLinear and DequantizeLinear; values keep their names.
        ranges: of its activations, uint8 shifted to int8.
        layers: by the name of their output.
    """

    proto: onnx.ModelProto
    ranges: dict[str, Range]
    layers: dict[str, Layer]


def is_quantised(proto: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in proto.graph.node)


def take_apart(proto: onnx.ModelProto) -> Network:
    """The network without its quantisation; a ReLU that only a range implies is missing: see `with_relu`.

    Raises:
        UserError: an activation that is neither int8 nor uint8 with one scale, or weights with a zero point.
    """
    import onnx
    from onnx import numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    del graph.node[:], graph.value_info[:]
    ranges: dict[str, Range] = {}
    scales: dict[str, Array] = {}
    plain: dict[str, str] = {}
    for node in proto.graph.node:
        inputs = [plain.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            ranges[inputs[0]] = activation_range(node, arrays)
            plain[node.output[0]] = inputs[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            name = node.output[0]
            arrays[name], scales[name] = _weights(node, arrays)
            graph.initializer.append(numpy_helper.from_array(arrays[name], name))
        elif node.op_type == "DequantizeLinear":
            plain[node.output[0]] = inputs[0]
        else:
            kept = graph.node.add()
            kept.CopyFrom(node)
            kept.input[:] = inputs
    for output in graph.output:
        if output.name in plain:
            _rename(graph, plain[output.name], output.name)
            ranges[output.name] = ranges.pop(plain[output.name])
    layers = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[0] not in ranges:
            continue
        kernel = arrays[node.input[1]]
        if node.op_type == "Gemm":
            kernel = dense_kernel(node, kernel)
        if node.input[1] in scales:
            each = np.broadcast_to(scales[node.input[1]], kernel.shape[:1])
            output_range = ranges.get(node.output[0])
            layers[node.output[0]] = Layer(
                ranges[node.input[0]], output_range, kernel, each
            )
    drop_unused(graph)
    return Network(made, ranges, layers)


def with_relu(network: Network, layers_too: bool) -> onnx.ModelProto:
    """The float network with the ReLUs that only ranges imply, as Clip to the range.

    Args:
        layers_too: also after a layer of ``network.layers``, whose int8 output cannot be negative anyway.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(network.proto)
    del made.graph.node[:]
    for node in network.proto.graph.node:
        name = node.output[0]
        found = network.ranges.get(name)
        added = made.graph.node.add()
        added.CopyFrom(node)
        if (
            found is not None
            and found.is_relu
            and node.op_type in _UNBOUNDED
            and (layers_too or name not in network.layers)
        ):
            added.output[0] = f"{name}/unbounded"
            limits = {f"{name}/low": 0.0, f"{name}/high": found.high}
            made.graph.initializer.extend(
                numpy_helper.from_array(np.array(limit, np.float32), key)
                for key, limit in limits.items()
            )
            clip = helper.make_node("Clip", [added.output[0], *limits], [name])
            made.graph.node.append(clip)
    return made


def dense_kernel(gemm: onnx.NodeProto, weights: Array) -> Array:
    """A Gemm's weights, output channels first."""
    transposed = any(a.name == "transB" and a.i for a in gemm.attribute)
    return weights if transposed else np.ascontiguousarray(weights.T)


def activation_range(node: onnx.NodeProto, arrays: dict[str, Array]) -> Range:
    """Of a QuantizeLinear or DequantizeLinear of an activation.

    Raises:
        UserError: neither int8 nor uint8 with one scale.
    """
    scale = arrays[node.input[1]]
    zero = arrays[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.uint8)
    if scale.size != 1 or zero.dtype not in (np.int8, np.uint8):
        raise UserError(
            f"{node.output[0]}: quantised otherwise than in int8 or uint8 with one scale"
        )
    return Range(scale.item(), zero.item() - (128 if zero.dtype == np.uint8 else 0))


def _weights(node: onnx.NodeProto, arrays: dict[str, Array]) -> tuple[Array, Array]:
    """Float32 values of constant integers, and their scales."""
    values = arrays[node.input[0]]
    scale = arrays[node.input[1]].astype(np.float32)
    if len(node.input) > 2 and arrays[node.input[2]].any():
        raise UserError(
            f"{node.output[0]}: its zero point is not 0; weights with one are not converted"
        )
    along = [1] * values.ndim
    if scale.size > 1:
        along[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
    return values.astype(np.float32) * scale.reshape(along), scale.ravel()


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
