"""Quantised models in the one form that the compiler knows: float operators between DequantizeLinear and QuantizeLinear.

These stay: QuantizeLinear to 8 bits, DequantizeLinear of 8 bits or of a constant of 32. ONNX Runtime, the reference, runs the
model as it is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from netship.compile.frontend.fold import is_onnx, opset
from netship.compile.frontend.limits import MAX_NODES
from netship.compile.frontend.names import Unfit, node_label
from netship.compile.frontend.quantised.scaling import Scaling
from netship.compile.frontend.quantised.writer import attributes_of, input_of

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class _Form(NamedTuple):
    """How an operator on integers lists its inputs; a scale and a zero point follow each operand.

    Attributes:
        kind: the float operator.
        operands: their places.
        result: the place of the result's scale; its zero point follows.
        bias: the place of int32 in units of the product of the operands' scales.
        plain: the place of an input that is not quantised.
    """

    kind: str
    operands: tuple[int, ...]
    result: int
    bias: int | None = None
    plain: int | None = None


_FORMS = {
    "QGemm": _Form("Gemm", (0, 3), 7, bias=6),
    "QLinearConv": _Form("Conv", (0, 3), 6, bias=8),
    "QLinearMatMul": _Form("MatMul", (0, 3), 6),
    "QLinearWhere": _Form("Where", (1, 4), 7, plain=0),
    **{f"QLinear{kind}": _Form(kind, (0, 3), 6) for kind in ("Add", "Mul")},
    **{
        f"QLinear{kind}": _Form(kind, (0,), 3)
        for kind in (
            *("AveragePool", "GlobalAveragePool", "LeakyRelu"),
            *("Sigmoid", "Softmax"),
        )
    },
}
_SCALED = ("QuantizeLinear", "DequantizeLinear")
_OF_MICROSOFT = frozenset([*_FORMS, *_SCALED, "QLinearConcat"])
_OF_ONNX = ("QLinearConv", "QLinearMatMul")
# Their scales are computed for each input.
_DYNAMIC = frozenset(
    ["ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeLinear"]
    + ["DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"]
)
# They move stored values, or choose among them.
_MOVERS = frozenset(
    ["DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"]
    + ["Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"]
    + ["Unsqueeze"]
)


def is_taken(node: onnx.NodeProto) -> bool:
    """Whether a node of `MICROSOFT` has a form in ONNX's own operators here."""
    return node.domain == MICROSOFT and node.op_type in _OF_MICROSOFT


def is_dynamic(node: onnx.NodeProto) -> bool:
    """Whether an operator on integers computes its scales while the model runs."""
    return node.op_type in _DYNAMIC and (
        is_onnx(node.domain) or node.domain == MICROSOFT
    )


def quantises(node: onnx.NodeProto) -> bool:
    """Whether a node's output is quantised."""
    known = is_onnx(node.domain) or node.domain == MICROSOFT
    return known and (
        node.op_type == "QuantizeLinear" or node.op_type in (*_FORMS, "QLinearConcat")
    )


def on_integers(node: onnx.NodeProto) -> bool:
    """Whether a node is an operator on integers, its scales among its inputs."""
    if is_onnx(node.domain):
        return node.op_type in _OF_ONNX
    return is_taken(node) and node.op_type not in _SCALED


def as_qdq(proto: onnx.ModelProto, only: str = "") -> onnx.ModelProto:
    """The model with DequantizeLinear, a float operator and QuantizeLinear in the place of each operator on integers.

    What quantises to 16 bits becomes float32 operators. Constants of 4 bits become constants of 8; those of 16, those in
    blocks, and in a network whose activations are float32 all of them, become float32.

    Args:
        proto: a model that passed the gate's checks of nodes.
        only: the one kind of operator that is rewritten, where not all are.

    Raises:
        Unfit: a form that has no such equal.
    """
    nodes = proto.graph.node
    if only and all(node.op_type != only for node in nodes):
        return proto
    if not any(on_integers(n) or n.op_type in _SCALED for n in nodes):
        return proto
    return _Rewriter(proto, only).run()


class _Rewriter(Scaling):
    def __init__(self, proto: onnx.ModelProto, only: str) -> None:
        super().__init__(proto, any(map(quantises, proto.graph.node)))
        self._only = only

    def run(self) -> onnx.ModelProto:
        for node in self.proto.graph.node:
            self._node(node)
            if len(self.made) > MAX_NODES:
                raise Unfit(
                    f"its quantised operators become more than {MAX_NODES} nodes; quantise fewer of them"
                )
        return self.finish(plain=not self._only)

    def _node(self, node: onnx.NodeProto) -> None:
        rewritten = not self._only or node.op_type == self._only
        if rewritten and on_integers(node):
            self._check(node)
            if node.op_type == "QLinearConcat":
                self._concatenation(node)
            else:
                self._operator(node, _FORMS[node.op_type])
        elif rewritten and node.op_type in _SCALED:
            self._check(node)
            if node.op_type == "QuantizeLinear":
                self.quantise(node)
            else:
                self.dequantise(node)
        elif rewritten and self.scales.keys() & set(node.input[:1]) and _moves(node):
            self._move(node)
        else:
            if self.wide.intersection(node.input[:1]):
                self.wide.update(node.output)
            self.made.append(node)

    def _check(self, node: onnx.NodeProto) -> None:
        if opset(self.proto) < 10:
            raise Unfit(
                f"{node_label(node)}: opset {opset(self.proto)} has no quantisation; quantise it again from "
                "opset 13 or newer"
            )
        if attributes_of(node).get("channels_last"):
            raise Unfit(
                f"{node_label(node)}: its channels are last, as ONNX Runtime optimises a model for one CPU; give "
                "the model from before that"
            )

    def _operator(self, node: onnx.NodeProto, form: _Form) -> None:
        attributes = attributes_of(node)
        attributes.pop("channels_last", None)
        inputs = [
            self._operand(node, place, _axis(node, index))
            for index, place in enumerate(form.operands)
        ]
        if form.plain is not None:
            inputs.insert(0, node.input[form.plain])
        if form.bias is not None and (bias := input_of(node, form.bias)):
            inputs.append(self._bias(node, bias, form, attributes.get("alpha", 1.0)))
        if form.kind == "Softmax":
            written = attributes.pop("opset", 13)
            if (written < 13) != (opset(self.proto) < 13) and attributes.get(
                "axis", -1
            ) != -1:
                raise Unfit(
                    f"{node_label(node)}: is of opset {written} in a model of opset {opset(self.proto)}; "
                    "quantise it again"
                )
            attributes.setdefault("axis", -1)
        self._end(node, form.kind, inputs, form.result, attributes)

    def _concatenation(self, node: onnx.NodeProto) -> None:
        inputs = [
            self._operand(node, place) for place in range(2, len(node.input) - 1, 3)
        ]
        self._end(node, "Concat", inputs, 0, attributes_of(node))

    def _operand(
        self, node: onnx.NodeProto, place: int, axis: int | None = None
    ) -> str:
        """The float tensor that a quantised operand stands for."""
        source, scale, zero = (input_of(node, place + k) for k in range(3))
        known = self.constants.get(scale)
        attributes = {}
        if known is not None and np.prod(known.dims) > 1:
            if axis is None or max(known.dims) != np.prod(known.dims):
                raise Unfit(
                    f"{node_label(node)}: an operand has {list(known.dims)} scales; quantise per tensor, or the "
                    "weights per output channel"
                )
            attributes["axis"] = axis
            # A row of a matrix may be written with axes of 1.
            scale, zero = self.flat(scale, node), self.flat(zero, node)
        return self._scaled(node, source, scale, zero, attributes)

    def _scaled(
        self,
        node: onnx.NodeProto,
        source: str,
        scale: str,
        zero: str,
        attributes: dict[str, Any],
    ) -> str:
        real = self.fresh(f"{source}/real")
        inputs = [source, scale, *([zero] if zero else [])]
        self.add_dequantise(node, inputs, real, attributes)
        return real

    def _bias(self, node: onnx.NodeProto, bias: str, form: _Form, alpha: float) -> str:
        scales = [
            self.array(node, place + 1).astype(np.float32).ravel()
            for place in form.operands
        ]
        unit = np.float32(alpha) * scales[0] * scales[1]
        scale = self.constant(unit if unit.size > 1 else unit.reshape(()), node)
        # Of a matrix of one row the last axis.
        axis = {"axis": 0 if form.kind == "Conv" else -1} if unit.size > 1 else {}
        return self._scaled(node, bias, scale, "", axis)

    def _end(
        self,
        node: onnx.NodeProto,
        kind: str,
        inputs: list[str],
        result: int,
        attributes: dict[str, Any],
    ) -> None:
        scale, zero = input_of(node, result), input_of(node, result + 1)
        if not scale:
            self.add(kind, inputs, node.output[0], node.name, **attributes)
            return
        if not zero:
            # The result is of the first operand's type.
            first = input_of(node, _FORMS[node.op_type].operands[0] + 2)
            dtype = (
                self.array_of(first, node).dtype if first in self.constants else "uint8"
            )
            zero = self.constant(np.zeros((), dtype), node)
        real = self.fresh(f"{node.output[0]}/real")
        self.add(kind, inputs, real, node.name, **attributes)
        self.add_quantise(real, scale, zero, node.output[0], {})

    def _move(self, node: onnx.NodeProto) -> None:
        """An operator that moves stored values, on the real ones, which gives the same."""
        scale, zero = self.scales[node.input[0]]
        inputs = list(node.input)
        inputs[0] = self._scaled(node, inputs[0], scale, zero, {})
        if node.op_type == "Pad":
            # Without a value it pads with the stored value 0.
            factor, middle = (
                self.array_of(each, node).astype(np.float32) for each in (scale, zero)
            )
            stored = self.array(node, 2) if input_of(node, 2) else np.zeros(())
            value = (stored.astype(np.float32) - middle) * factor
            inputs += [""] * (3 - len(inputs))
            inputs[2] = self.constant(value.astype(np.float32), node)
        real = [self.fresh(f"{name}/real") for name in node.output]
        made = helper.make_node(
            node.op_type, inputs, real, node.name, **attributes_of(node)
        )
        self.made.append(made)
        for output, name in zip(node.output, real, strict=True):
            self.add_quantise(name, scale, zero, output, {})


def _axis(node: onnx.NodeProto, operand: int) -> int | None:
    """The axis for whose indices an operand may have a scale each; None where ONNX Runtime has none."""
    if node.op_type == "QLinearConv" and operand == 1:
        return 0
    if node.op_type == "QLinearMatMul":
        return operand - 2
    if node.op_type == "QGemm" and operand == 1:
        return 0 if attributes_of(node).get("transB") else 1
    return None


def _moves(node: onnx.NodeProto) -> bool:
    """Whether a node moves stored values, or chooses among them."""
    return node.op_type in _MOVERS and not (
        node.op_type == "MaxPool" and len(node.output) > 1
    )
