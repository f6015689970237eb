"""Operators that work on each element by itself, with broadcasting, and activation functions."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from netship.compile.frontend.names import Unfit
from netship.compile.frontend.tflite.graph import TO_NHWC, Builder, Order
from netship.compile.frontend.tflite.reader import Operator

# Fused activation functions by their numbers in the schema: what they limit values to.
_NONE, _TANH = 0, 4
_LIMITS = {
    _NONE: (-math.inf, math.inf),
    1: (0.0, math.inf),
    2: (-1.0, 1.0),
    3: (0.0, 6.0),
}
LIMITS = {
    "RELU": (0.0, math.inf),
    "RELU6": (0.0, 6.0),
    "RELU_0_TO_1": (0.0, 1.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
# Of the same meaning in both, and the ONNX operators one after the other where it takes two.
UNARY = {
    "ABS": ("Abs",),
    "CEIL": ("Ceil",),
    "COS": ("Cos",),
    "ELU": ("Elu",),
    "EXP": ("Exp",),
    "FLOOR": ("Floor",),
    "HARD_SWISH": ("HardSwish",),
    "LOG": ("Log",),
    "LOGISTIC": ("Sigmoid",),
    "NEG": ("Neg",),
    "ROUND": ("Round",),
    "RSQRT": ("Sqrt", "Reciprocal"),
    "SIGN": ("Sign",),
    "SIN": ("Sin",),
    "SQRT": ("Sqrt",),
    "TANH": ("Tanh",),
    "LOGICAL_NOT": ("Not",),
}
BINARY = {
    "ADD": "Add",
    "SUB": "Sub",
    "MUL": "Mul",
    "DIV": "Div",
    "POW": "Pow",
    "MAXIMUM": "Max",
    "MINIMUM": "Min",
    "ADD_N": "Sum",
    "PRELU": "PRelu",
    "EQUAL": "Equal",
    "GREATER": "Greater",
    "LESS": "Less",
    "GREATER_EQUAL": "GreaterOrEqual",
    "LESS_EQUAL": "LessOrEqual",
    "LOGICAL_AND": "And",
    "LOGICAL_OR": "Or",
    "SELECT": "Where",
    "SELECT_V2": "Where",
}
_FUSED = ("ADD", "SUB", "MUL", "DIV")


def limited(graph: Builder, made: str, index: int, limits: tuple[float, float]) -> str:
    """``made`` within limits; as it is where the stored values of the tensor ``index`` do not go beyond them."""
    tensor, (low, high) = graph.tensors[index], limits
    if tensor.quantised and tensor.quantisation is not None:
        facts, stored = tensor.quantisation, np.iinfo(tensor.dtype)
        scale, zero = float(facts.scale[0]), int(facts.zero[0])
        if low > -math.inf and round(low / scale) + zero <= stored.min:
            low = -math.inf
        if high < math.inf and round(high / scale) + zero >= stored.max:
            high = math.inf
    if low == -math.inf and high == math.inf:
        return made
    if low == 0.0 and high == math.inf:
        return graph.node("Relu", made)
    low = max(low, limits[0])
    return graph.node("Clip", made, graph.number(low), graph.number(limits[1]))


def activated(graph: Builder, operator: Operator, made: str) -> str:
    """``made`` after the operator's fused activation function."""
    function = operator.option("FusedActivationFunction")
    index = operator.outputs[0]
    if function == _TANH and not graph.tensors[index].quantised:
        return graph.node("Tanh", made)
    if function not in _LIMITS:
        raise Unfit(
            f"{operator.label}: its fused activation function {function} is not read; convert without it"
        )
    return limited(graph, made, index, _LIMITS[function])


def common_order(graph: Builder, operator: Operator) -> Order:
    """The order of axes in which an operator of several inputs works: that of images where one is an image."""
    whole = len(graph.shape(operator.outputs[0])) == 4
    found = whole and any(graph.is_image(index) for index in operator.inputs)
    return "NCHW" if found else "file"


def unary(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    for kind in UNARY[operator.kind]:
        made = graph.node(kind, made)
    graph.define(operator.outputs[0], made, order)


def binary(graph: Builder, operator: Operator) -> None:
    order = common_order(graph, operator)
    inputs = [graph.broadcast(index, order) for index in operator.inputs]
    made = graph.node(BINARY[operator.kind], *inputs)
    if operator.kind in _FUSED:
        made = activated(graph, operator, made)
    graph.define(operator.outputs[0], made, order)


def relu(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    output = operator.outputs[0]
    made = limited(graph, made, output, LIMITS[operator.kind])
    graph.define(output, made, order)


def leaky_relu(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    made = graph.node("LeakyRelu", made, alpha=operator.option("Alpha", 0.0))
    graph.define(operator.outputs[0], made, order)


def gelu(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    form = "tanh" if operator.option("Approximate", False) else "none"
    made = graph.node("Gelu", made, approximate=form)
    graph.define(operator.outputs[0], made, order)


def square(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    graph.define(operator.outputs[0], graph.node("Mul", made, made), order)


def squared_difference(graph: Builder, operator: Operator) -> None:
    order = common_order(graph, operator)
    inputs = [graph.broadcast(index, order) for index in operator.inputs]
    made = graph.node("Sub", *inputs)
    graph.define(operator.outputs[0], graph.node("Mul", made, made), order)


def axis_of(graph: Builder, index: int, axis: int, order: Order) -> int:
    """An axis of a tensor of the file as ``order`` has it."""
    rank = len(graph.shape(index))
    if not -rank <= axis < rank:
        raise Unfit(
            f"{graph.tensors[index].label}: has no axis {axis}; convert it again"
        )
    return TO_NHWC[axis % rank] if order == "NCHW" else axis % rank


def softmax(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    beta = operator.option("Beta", 1.0)
    if operator.kind == "SOFTMAX" and beta != 1.0:
        made = graph.node("Mul", made, graph.number(beta))
    kind = "Softmax" if operator.kind == "SOFTMAX" else "LogSoftmax"
    axis = axis_of(graph, operator.inputs[0], -1, order)
    graph.define(operator.outputs[0], graph.node(kind, made, axis=axis), order)


def l2_normalisation(graph: Builder, operator: Operator) -> None:
    made, order = graph.either(operator.inputs[0])
    axis = axis_of(graph, operator.inputs[0], -1, order)
    made = graph.node("LpNormalization", made, axis=axis, p=2)
    graph.define(operator.outputs[0], activated(graph, operator, made), order)


def local_response_normalisation(graph: Builder, operator: Operator) -> None:
    size = 2 * operator.option("Radius") + 1
    made = graph.node(
        "LRN",
        graph.image(operator.inputs[0]),
        size=size,
        alpha=operator.option("Alpha") * size,
        beta=operator.option("Beta"),
        bias=operator.option("Bias"),
    )
    graph.define(operator.outputs[0], made, "NCHW")


def quantise(graph: Builder, operator: Operator) -> None:
    """To the output's stored values, from real or other stored ones."""
    made, order = graph.either(operator.inputs[0])
    graph.define(operator.outputs[0], made, order)


def dequantise(graph: Builder, operator: Operator) -> None:
    """To real values; of constants, such as weights of float16, at once."""
    (source,), (output,) = operator.inputs, operator.outputs
    if graph.is_constant(source):
        graph.fold(output, graph.tensors[source].real)
    else:
        graph.define(output, *graph.dequantise(source))


def cast(graph: Builder, operator: Operator) -> None:
    """Between numbers of other types; stored values are cast as they are, so they must be the real ones."""
    source, output = operator.inputs[0], operator.outputs[0]
    for index in (source, output):
        facts = graph.tensors[index].quantisation
        if facts is not None and (facts.scale != 1).any() | facts.zero.any():
            raise Unfit(
                f"{operator.label}: casts the stored values of a quantised tensor; convert with QUANTIZE or DEQUANTIZE"
            )
    made, order = graph.either(source)
    tensor = graph.tensors[output]
    target = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    target = TensorProto.FLOAT if tensor.quantised else target
    graph.define(output, graph.node("Cast", made, to=target), order)
