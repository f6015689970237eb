"""A QDQ or float32 graph as a list of operators with a C lowering, NHWC, or the name of one that has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from targets.errors import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class Quantisation:
    """Real value = (q − zero) × scale, q of −128 to 127.

    Attributes:
        offset: what the stored value is above q: 128 of uint8, 0 of int8.
    """

    scale: float
    zero: int
    offset: int = 0


# A float32 tensor's.
_REAL = Quantisation(1.0, 0)


@dataclass(frozen=True)
class Tensor:
    """One image's activation: [height, width, channels], int8 or float32 by ``itemsize``, its bytes a value."""

    name: str
    shape: tuple[int, int, int]
    quantisation: Quantisation = _REAL
    itemsize: int = 1

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.itemsize


@dataclass(frozen=True)
class Convolution:
    """A convolution (group 1), a depthwise one, or a fully connected layer (kernel 1×1 on 1×1).

    Attributes:
        weights: int8 or float32 [out, kernel height, kernel width, in]; [kernel height, kernel width,
            channels] where ``depthwise``.
        bias: int32 [out], in units of input scale × weight scale; float32 of a float32 network.
        scales: float64 [out], of the weights; 1 in a float32 network.
        pads: rows above, columns left, rows below, columns right.
        low, high: the clamp of an int8 output, −128 and 127 where the type is the only one.
        limits: the clamp of a float32 output.
    """

    name: str
    input: Tensor
    output: Tensor
    weights: Array
    bias: Array
    scales: NDArray[np.float64]
    depthwise: bool = False
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    low: int = -128
    high: int = 127
    limits: tuple[float, float] = (-np.inf, np.inf)

    @property
    def kernel(self) -> tuple[int, int]:
        axis = 0 if self.depthwise else 1
        return self.weights.shape[axis], self.weights.shape[axis + 1]

    @property
    def depth(self) -> int:
        """Products that one output sums."""
        return prod(self.kernel) * (1 if self.depthwise else self.input.shape[2])

    @property
    def macs(self) -> int:
        return self.output.size * self.depth

    @property
    def pointwise(self) -> bool:
        return (
            not self.depthwise
            and self.kernel == self.strides == (1, 1)
            and not any(self.pads)
        )


@dataclass(frozen=True)
class Add:
    """A residual: the sum of two tensors of one shape; its clamp is as a convolution's."""

    name: str
    input: Tensor
    other: Tensor
    output: Tensor
    low: int = -128
    high: int = 127
    limits: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True)
class AveragePool:
    """The mean over height and width."""

    name: str
    input: Tensor
    output: Tensor


Operator = Convolution | Add | AveragePool


@dataclass(frozen=True)
class Network:
    """Operators in the order they run; one input, one output."""

    input: Tensor
    output: Tensor
    operators: tuple[Operator, ...]

    @property
    def floating(self) -> bool:
        """Whether it works on float32, not on int8."""
        return self.input.itemsize == 4


_POOLS = ("GlobalAveragePool", "ReduceMean")
_LOWERED = (
    "Conv, Gemm, MatMul, Add, Relu, Clip, GlobalAveragePool, ReduceMean over height and width, "
    "Flatten, Reshape to one row, Squeeze"
)

_RESHAPING = ("Flatten", "Reshape", "Squeeze")
# How many inputs of each must be quantised.
_COMPUTING = {
    "Conv": 2,
    "Gemm": 2,
    "MatMul": 2,
    "Add": 2,
    "GlobalAveragePool": 1,
    "ReduceMean": 1,
}
_NAMED = 6


def read(proto: onnx.ModelProto) -> Network:
    """The operators of a graph with one image input and one output: integers if it is QDQ, else float32.

    Raises:
        UserError: an operator has no C lowering (named, with what has one), stays in float32 in a QDQ
            graph, has weights with a zero point, or types other than int8 and uint8.
    """
    quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    return _Reader(proto, floating=not quantised).read()


@dataclass
class _Float:
    """What a float operator computes whose clamp, and in a QDQ graph scale, are not yet known."""

    node: onnx.NodeProto
    low: float = -np.inf
    high: float = np.inf


@dataclass
class _Reader:
    proto: onnx.ModelProto
    floating: bool
    constants: dict[str, Array] = field(default_factory=dict)
    # Quantised tensors and the float names that mean them, constants dequantised, pending operators.
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    pending: dict[str, _Float] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)

    def read(self) -> Network:
        graph = self.proto.graph
        self.constants = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise UserError(
                f"{len(inputs)} inputs and {len(graph.output)} outputs: C for a microcontroller takes "
                "one of each; cut the graph to one"
            )
        self.image = inputs[0].name
        shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if len(shape) != 4 or shape[0] not in (0, 1):
            raise UserError(
                f"input {self.image!r}: shape {shape} is not [1, channels, height, width]; "
                "export it as one image"
            )
        self.image_shape = (shape[2], shape[3], shape[1])
        if self.floating:
            self.tensors[self.image] = Tensor(self.image, self.image_shape, itemsize=4)
        for node in graph.node:
            if self.floating and node.op_type not in ("Relu", "Clip"):
                self._settle(*node.input)
            self._node(node)
        name = graph.output[0].name
        if self.floating:
            self._settle(name)
        elif name in self.pending:
            self._in_float(self.pending[name].node)
        if name not in self.tensors or not self.operators:
            raise UserError(
                f"output {name!r}: no operator with a C lowering makes it; these have: {_LOWERED}"
                if self.floating
                else f"output {name!r}: is not quantised; build with --quantize int8"
            )
        first = next(t for t in self.tensors.values() if t.name == self.image)
        return Network(first, self.tensors[name], tuple(self.operators))

    def _settle(self, *names: str) -> None:
        """A float32 operator whose output something other than a clamp reads has all its parts."""
        for name in names:
            if name in self.pending:
                self.tensors[name] = self._finish(self.pending.pop(name), _REAL)

    def _node(self, node: onnx.NodeProto) -> None:
        kind = node.op_type
        if kind == "Constant":
            self.constants[node.output[0]] = numpy_helper.to_array(
                _attributes(node)["value"]
            )
        elif kind == "QuantizeLinear":
            self._quantise(node)
        elif kind == "DequantizeLinear":
            self._dequantise(node)
        elif kind in ("Relu", "Clip"):
            self._clamp(node)
        elif kind in _RESHAPING:
            self._reshape(node)
        elif kind == "ReduceMean":
            self._reduce_mean(node)
        elif kind in _COMPUTING:
            self.pending[node.output[0]] = _Float(node)
        else:
            _refuse(node, f"{kind} has no C lowering; these have: {_LOWERED}")

    def _quantise(self, node: onnx.NodeProto) -> None:
        quantisation = self._quantisation(node)
        source, output = node.input[0], node.output[0]
        if source == self.image:
            self.tensors[output] = Tensor(self.image, self.image_shape, quantisation)
        elif source in self.tensors:
            tensor = self.tensors[source]
            if tensor.quantisation != quantisation:
                _refuse(node, "changes the scale of a tensor without an operator")
            self.tensors[output] = tensor
        elif source in self.pending:
            self.tensors[output] = self._finish(self.pending.pop(source), quantisation)
        elif source in self.constants or source in self.weights:
            values = self.constants.get(source)
            if values is None:
                stored, own = self.weights[source]
                values = stored * own
            steps = np.rint(values / quantisation.scale) + quantisation.zero
            quantised = np.clip(steps, -128, 127)
            self.constants[output] = quantised.astype(np.int8)
        else:
            _refuse(node, f"quantises {source!r}, which no operator before it makes")

    def _quantisation(self, node: onnx.NodeProto) -> Quantisation:
        scale = self._constant(node, 1)
        zero = self._constant(node, 2) if len(node.input) > 2 else np.uint8(0)
        kind = np.asarray(zero).dtype
        if scale.size != 1 or np.asarray(zero).size != 1:
            _refuse(
                node,
                "has a scale for each channel of an activation; quantise per tensor",
            )
        if kind not in (np.int8, np.uint8):
            _refuse(
                node,
                f"quantises an activation to {kind}; only int8 and uint8 are lowered",
            )
        if not float(scale.ravel()[0]) > 0:
            _refuse(
                node,
                "has scale 0: this activation is constant; calibrate with photographs",
            )
        # uint8 is int8 with everything 128 higher.
        offset = 128 if kind == np.uint8 else 0
        return Quantisation(
            float(scale.ravel()[0]), int(np.asarray(zero).ravel()[0]) - offset, offset
        )

    def _dequantise(self, node: onnx.NodeProto) -> None:
        source, output = node.input[0], node.output[0]
        if source in self.tensors:
            if self._quantisation(node) != self.tensors[source].quantisation:
                _refuse(node, "has another scale than its QuantizeLinear")
            self.tensors[output] = self.tensors[source]
            return
        stored = self._constant(node, 0)
        scale = self._constant(node, 1).astype(np.float64)
        zero = self._constant(node, 2) if len(node.input) > 2 else np.zeros(1)
        if stored.dtype == np.uint8:
            stored, zero = (
                stored.astype(np.int64) - 128,
                np.asarray(zero, np.int64) - 128,
            )
        if np.any(np.asarray(zero) != 0):
            _refuse(node, "weights have a zero point; quantise them symmetrically")
        self.weights[output] = stored.astype(np.int64), scale.ravel()

    def _clamp(self, node: onnx.NodeProto) -> None:
        before = self.pending.pop(node.input[0], None)
        if before is None or before.node.op_type in _POOLS:
            _refuse(
                node,
                "stands alone; C is made only for one that follows a Conv, Gemm or Add",
            )
        low, high = 0.0, np.inf
        if node.op_type == "Clip":
            attributes = _attributes(node)
            low = attributes.get("min", -np.inf)
            high = attributes.get("max", np.inf)
            if len(node.input) > 1 and node.input[1]:
                low = float(self._constant(node, 1).item())
            if len(node.input) > 2 and node.input[2]:
                high = float(self._constant(node, 2).item())
        self.pending[node.output[0]] = _Float(
            before.node, max(low, before.low), min(high, before.high)
        )

    def _reshape(self, node: onnx.NodeProto) -> None:
        self.tensors[node.output[0]] = self._activation(node, 0)

    def _reduce_mean(self, node: onnx.NodeProto) -> None:
        axes = _attributes(node).get("axes")
        if axes is None and len(node.input) > 1:
            axes = self._constant(node, 1).tolist()
        if sorted(a % 4 for a in axes or ()) != [2, 3]:
            _refuse(
                node, f"over axes {axes}: only the mean over height and width (2, 3)"
            )
        self.pending[node.output[0]] = _Float(node)

    def _finish(self, pending: _Float, to: Quantisation) -> Tensor:
        node = pending.node
        source = self._activation(node, 0)
        limits = pending.low, pending.high
        clamp: dict[str, Any] = {"limits": limits}
        if not self.floating:
            clamp = {
                end: int(np.clip(to.zero + round(v / to.scale), -128, 127))
                if np.isfinite(v)
                else default
                for end, v, default in zip(
                    ("low", "high"), limits, (-128, 127), strict=True
                )
            }
        name = node.name or node.output[0]
        operator: Operator
        if node.op_type in _POOLS:
            output = self._made(name, (1, 1, source.shape[2]), to)
            operator = AveragePool(name, source, output)
        elif node.op_type == "Add":
            other = self._activation(node, 1)
            if other.shape != source.shape:
                _refuse(
                    node,
                    f"adds {other.shape} to {source.shape}; only equal shapes are lowered",
                )
            output = self._made(name, source.shape, to)
            operator = Add(name, source, other, output, **clamp)
        elif node.op_type == "Conv":
            operator = self._convolution(node, source, to, clamp)
        else:
            operator = self._fully_connected(node, source, to, clamp)
        self.operators.append(operator)
        return operator.output

    def _made(self, name: str, shape: tuple[int, int, int], to: Quantisation) -> Tensor:
        return Tensor(name, shape, to, 4 if self.floating else 1)

    def _convolution(
        self,
        node: onnx.NodeProto,
        source: Tensor,
        to: Quantisation,
        clamp: dict[str, Any],
    ) -> Convolution:
        stored, scale = self._weights(node, 1)
        attributes = _attributes(node)
        group = attributes.get("group", 1)
        strides = tuple(attributes.get("strides", (1, 1)))
        if stored.ndim != 4 or any(d != 1 for d in attributes.get("dilations", (1, 1))):
            _refuse(
                node, "only two-dimensional convolutions without dilation are lowered"
            )
        depthwise = group > 1
        if depthwise and not (group == source.shape[2] == stored.shape[0]):
            _refuse(
                node,
                f"has {group} groups: only 1, or one for each channel, are lowered",
            )
        kernel, sizes = stored.shape[2:], source.shape[:2]
        pads = _pads(attributes, kernel, strides, sizes)
        height, width = (
            (sizes[a] + pads[a] + pads[a + 2] - kernel[a]) // strides[a] + 1
            for a in (0, 1)
        )
        order = (2, 3, 0) if depthwise else (0, 2, 3, 1)
        weights = (
            stored[:, 0].transpose(1, 2, 0) if depthwise else stored.transpose(order)
        )
        name = node.name or node.output[0]
        channels = stored.shape[0]
        return Convolution(
            name,
            source,
            self._made(name, (height, width, channels), to),
            self._stored(weights),
            self._bias(node, channels, source, scale),
            np.broadcast_to(scale, (channels,)),
            depthwise,
            (strides[0], strides[1]),
            pads,
            **clamp,
        )

    def _fully_connected(
        self,
        node: onnx.NodeProto,
        source: Tensor,
        to: Quantisation,
        clamp: dict[str, Any],
    ) -> Convolution:
        stored, scale = self._weights(node, 1)
        attributes = _attributes(node)
        if (
            attributes.get("alpha", 1.0) != 1.0
            or attributes.get("beta", 1.0) != 1.0
            or attributes.get("transA", 0)
        ):
            _refuse(node, "with alpha, beta or transA is not lowered; fold them in")
        if not attributes.get("transB", 0):
            stored = stored.T
        height, width, channels = source.shape
        if stored.shape[1] != source.size:
            _refuse(
                node, f"takes {stored.shape[1]} values, its input has {source.size}"
            )
        # ONNX flattens channels first; here they are last.
        weights = stored.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        count = stored.shape[0]
        name = node.name or node.output[0]
        flat = self._made(source.name, (1, 1, source.size), source.quantisation)
        return Convolution(
            name,
            flat,
            self._made(name, (1, 1, count), to),
            self._stored(weights.reshape(count, 1, 1, -1)),
            self._bias(node, count, source, scale),
            np.broadcast_to(scale, (count,)),
            **clamp,
        )

    def _bias(
        self, node: onnx.NodeProto, channels: int, source: Tensor, scale: Array
    ) -> Array:
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(channels, np.float32 if self.floating else np.int64)
        unit = source.quantisation.scale * scale
        if node.input[2] in self.weights:
            stored, own = self.weights[node.input[2]]
            values = stored * own
        else:
            values = self._constant(node, 2)
        if self.floating:
            return np.broadcast_to(values.ravel(), (channels,))
        return np.rint(np.broadcast_to(values / unit, (channels,))).astype(np.int64)

    def _stored(self, weights: Array) -> Array:
        return np.ascontiguousarray(weights, np.float32 if self.floating else np.int8)

    def _weights(self, node: onnx.NodeProto, index: int) -> tuple[Array, Array]:
        if self.floating:
            return self._constant(node, index), np.ones(1)
        if len(node.input) <= index or node.input[index] not in self.weights:
            self._in_float(node)
        return self.weights[node.input[index]]

    def _activation(self, node: onnx.NodeProto, index: int) -> Tensor:
        name = node.input[index]
        if name not in self.tensors:
            if self.floating:
                _refuse(
                    node, f"its input {name!r} is no activation that the C lowering has"
                )
            self._in_float(node)
        return self.tensors[name]

    def _constant(self, node: onnx.NodeProto, index: int) -> Array:
        name = node.input[index] if len(node.input) > index else ""
        if name not in self.constants:
            _refuse(node, f"its input {name!r} is not a constant")
        return self.constants[name]

    def _in_float(self, node: onnx.NodeProto) -> NoReturn:
        others = [_name(n) for n in self._unquantised() if _name(n) != _name(node)]
        named = ", ".join(map(repr, others[:_NAMED]))
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        too = f", and so do {named}{more}" if others else ""
        _refuse(node, f"works on float32{too}; quantise the whole network to int8")

    def _unquantised(self) -> list[onnx.NodeProto]:
        """The operators with an input that is not quantised."""
        nodes = self.proto.graph.node
        quantised = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
        for node in nodes:
            if node.op_type in _RESHAPING and node.input[0] in quantised:
                quantised.add(node.output[0])
        return [
            node
            for node in nodes
            if node.op_type in _COMPUTING
            and not quantised.issuperset(node.input[: _COMPUTING[node.op_type]])
        ]


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else "")


def _refuse(node: onnx.NodeProto, why: str) -> NoReturn:
    raise UserError(f"node {_name(node)!r} ({node.op_type}): {why}")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _pads(
    attributes: dict[str, Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    sizes: Sequence[int],
) -> tuple[int, int, int, int]:
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
        return top, left, bottom, right
    totals = [
        max((ceil(sizes[a] / strides[a]) - 1) * strides[a] + kernel[a] - sizes[a], 0)
        for a in (0, 1)
    ]
    less = [total // 2 for total in totals]
    more = [total - total // 2 for total in totals]
    before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return before[0], before[1], after[0], after[1]
