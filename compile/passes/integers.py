"""A QDQ graph into integer operators: what lies between DequantizeLinear and QuantizeLinear works on the stored values.

What has no integer form keeps its DequantizeLinear and QuantizeLinear, and computes in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from compile.ir.graph import Graph, Operator, Quantisation, Tensor, along_axis
from compile.ir.kinds import make
from compile.ir.operators import Addition, Convolution, GlobalAverage, View
from targets.errors import UserError
from targets.escapes import shown

_ACTIVATIONS = ("int8", "uint8")
# Operators whose integers ONNX Runtime computes, and which of their inputs are activations.
_INTEGER = (Convolution, Addition, GlobalAverage)


def absorb_constants(graph: Graph) -> Graph:
    """Constants in the place of their DequantizeLinear and QuantizeLinear; of integers around zero the integers."""
    constants: dict[str, Tensor] = {}
    kept = []
    for operator in graph.operators:
        operator = operator.with_tensors(constants)
        output = operator.output
        if operator.kind == "DequantizeLinear" and operator.input.value is not None:
            constants[output.name] = _dequantised(operator)
        elif operator.kind == "QuantizeLinear" and operator.input.value is not None:
            constants[output.name] = _quantised(operator)
        else:
            kept.append(operator)
    return graph.with_operators(kept)


def _dequantised(operator: Operator) -> Tensor:
    """The constant that a DequantizeLinear makes: its integers where their zero point is the middle of their type."""
    stored = operator.constant(0)
    assert stored is not None
    scale, zero = _scale(operator), _zero(operator)
    axis = int(operator.attributes.get("axis", 1)) % max(stored.ndim, 1)
    middle = 128 if stored.dtype == np.uint8 else 0
    values = stored.astype(np.int64) - middle
    if np.any(zero != middle):
        steps = stored.astype(np.int64) - along_axis(zero, axis, stored.ndim)
        real = (steps * along_axis(scale, axis, stored.ndim)).astype(np.float32)
        return replace(operator.output, value=real)
    dtype = "int8" if stored.dtype == np.uint8 else stored.dtype.name
    facts = Quantisation(tuple(scale.tolist()), axis=axis if scale.size > 1 else None)
    return Tensor(
        operator.output.name, stored.shape, dtype, facts, value=values.astype(dtype)
    )


def _quantised(operator: Operator) -> Tensor:
    """The constant that a QuantizeLinear makes."""
    source = operator.input
    assert source.value is not None
    values = source.real
    axis = int(operator.attributes.get("axis", 1)) % max(values.ndim, 1)
    scale, zero = (
        along_axis(each, axis, values.ndim)
        for each in (_scale(operator), _zero(operator))
    )
    info = np.iinfo(operator.output.dtype)
    steps = np.clip(np.rint(values / scale) + zero, info.min, info.max)
    return replace(operator.output, value=steps.astype(operator.output.dtype))


def _scale(operator: Operator) -> NDArray[np.float64]:
    scale = operator.constant(1)
    if scale is None:
        _refuse(operator, "its scale is not a constant")
    return scale.astype(np.float64).ravel()


def _zero(operator: Operator) -> NDArray[np.int64]:
    zero = operator.constant(2)
    if zero is None:
        quantised = (
            operator.output if operator.kind == "QuantizeLinear" else operator.input
        )
        zero = np.zeros(1, quantised.dtype)
    return zero.astype(np.int64).ravel()


def move_views(graph: Graph) -> Graph:
    """Quantising before a view, dequantising after it: a view of integers moves nothing."""
    made: list[Operator] = []
    makers: dict[str, Operator] = {}
    fresh = graph.fresh_names()
    for operator in graph.operators:
        source = operator.activations[:1]
        before = makers.get(source[0].name) if source else None
        if isinstance(operator, View) and before and before.kind == "DequantizeLinear":
            whole = before.input
            moved = replace(
                whole,
                name=fresh(f"{operator.output.name}/stored"),
                shape=operator.output.shape,
            )
            new = [
                replace(operator, inputs=(whole,), outputs=(moved,)),
                replace(
                    before, inputs=(moved, *before.inputs[1:]), outputs=operator.outputs
                ),
            ]
        elif operator.kind == "QuantizeLinear" and isinstance(before, View):
            whole = before.input
            stored = replace(
                operator.output, name=fresh(f"{whole.name}/stored"), shape=whole.shape
            )
            new = [
                replace(
                    operator, inputs=(whole, *operator.inputs[1:]), outputs=(stored,)
                ),
                replace(before, inputs=(stored,), outputs=operator.outputs),
            ]
        else:
            new = [operator]
        made += new
        makers |= {tensor.name: each for each in new for tensor in each.outputs}
    return graph.with_operators(made)


def to_integers(graph: Graph) -> Graph:
    """Integer operators in the place of float ones between DequantizeLinear and QuantizeLinear.

    Raises:
        UserError: a quantisation that is not built: an activation with a scale for each channel, or of another type than
            int8 and uint8, with scale 0.
    """
    return _Integers(graph).run()


class _Integers:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        # Of a float tensor that a DequantizeLinear makes: the stored values that it stands for.
        self._stored: dict[str, Tensor] = {}
        # Tensors with the quantisation that their QuantizeLinear gives them.
        self._typed: dict[str, Tensor] = {}
        # The new operators, each by the name of its first output.
        self._made: dict[str, Operator] = {}

    def run(self) -> Graph:
        for operator in self._graph.operators:
            operator = operator.with_tensors(self._typed)
            if operator.kind == "QuantizeLinear":
                self._quantise(operator)
                continue
            if operator.kind == "DequantizeLinear":
                operator = self._dequantise(operator)
            elif isinstance(operator, View) and operator.input.quantisation:
                operator = replace(
                    operator, outputs=(self._type(operator.output, operator.input),)
                )
            self._made[operator.output.name] = operator
        graph = self._graph.with_tensors(self._typed).with_operators(
            self._made.values()
        )
        return _with_real_constants(graph)

    def _type(self, tensor: Tensor, like: Tensor) -> Tensor:
        typed = replace(tensor, dtype=like.dtype, quantisation=like.quantisation)
        self._typed[typed.name] = typed
        return typed

    def _dequantise(self, operator: Operator) -> Operator:
        if self._quantisation(operator) != operator.input.quantisation:
            _refuse(operator, "has another scale than its QuantizeLinear")
        self._stored[operator.output.name] = operator.input
        return replace(operator, inputs=operator.inputs[:1])

    def _quantise(self, operator: Operator) -> None:
        """The operator, or the integer operator that gives its output in the place of the float one."""
        quantisation = self._quantisation(operator)
        typed = self._type(
            operator.output, replace(operator.output, quantisation=quantisation)
        )
        source = operator.input
        stored = self._stored.get(source.name)
        before = self._made.get(source.name)
        integer = before and self._integer(before, typed)
        if integer is not None:
            del self._made[source.name]
        elif stored is not None and stored.quantisation == quantisation:
            integer = make("Identity", "", [stored], [typed])
        else:
            integer = replace(operator, inputs=(source,), outputs=(typed,))
        self._made[typed.name] = integer

    def _integer(self, operator: Operator, output: Tensor) -> Operator | None:
        """The operator on stored values; None where it has no such form."""
        if (
            not isinstance(operator, _INTEGER)
            or self._graph.only_reader(operator.output) is None
        ):
            return None
        stored = [self._stored.get(each.name) for each in operator.activations]
        wanted = 2 if isinstance(operator, Addition) else 1
        if len(stored) != wanted or any(each is None for each in stored):
            return None
        inputs = [*stored, *operator.inputs[wanted:]]
        if isinstance(operator, Addition):
            return _addition(operator, inputs, output)
        if isinstance(operator, Convolution):
            return _sums(operator, inputs, output)
        return make(operator.kind, operator.name, inputs, [output], operator.attributes)

    def _quantisation(self, operator: Operator) -> Quantisation:
        scale, zero = _scale(operator), _zero(operator)
        dtype = (
            operator.output.dtype
            if operator.kind == "QuantizeLinear"
            else operator.input.dtype
        )
        if scale.size != 1 or zero.size != 1:
            _refuse(
                operator,
                "has a scale for each channel of an activation; quantise per tensor",
            )
        if dtype not in _ACTIVATIONS:
            _refuse(
                operator,
                f"quantises an activation to {dtype}; only int8 and uint8 are lowered",
            )
        if not scale[0] > 0:
            _refuse(
                operator,
                "has scale 0: this activation is constant; calibrate with photographs",
            )
        return Quantisation((float(scale[0]),), (int(zero[0]),))


def _addition(
    operator: Operator, inputs: list[Tensor | None], output: Tensor
) -> Operator | None:
    first, second = inputs
    if first is None or second is None or first.shape != second.shape:
        return None
    if {first.dtype, second.dtype} != {output.dtype}:
        _refuse(operator, "adds int8 and uint8; quantise both and the sum alike")
    return make("Add", operator.name, inputs, [output], operator.attributes)


def _sums(
    operator: Convolution, inputs: list[Tensor | None], output: Tensor
) -> Operator | None:
    weights = inputs[1]
    # Of a scale for each input channel no integer sum can be made.
    if (
        weights is None
        or weights.quantisation is None
        or weights.quantisation.axis not in (None, 0)
        or weights.dtype != "int8"
    ):
        return None
    source = inputs[0]
    assert source is not None
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is not None:
        assert bias.value is not None
        scale = np.array(weights.quantisation.scale)
        values = bias.real
        unit = source.scale * scale
        steps = np.rint(np.broadcast_to(values.ravel() / unit, weights.shape[:1]))
        bias = replace(
            bias,
            shape=steps.shape,
            dtype="int64",
            quantisation=None,
            value=steps.astype(np.int64),
        )
    return make(
        operator.kind,
        operator.name,
        [source, weights, bias],
        [output],
        operator.attributes,
    )


def _with_real_constants(graph: Graph) -> Graph:
    """Operators that compute in float32 get their constants so."""
    made = []
    for operator in graph.operators:
        if operator.outputs[0].quantisation is None:
            operator = operator.with_tensors(
                {
                    each.name: each.as_float()
                    for each in operator.inputs
                    if each is not None and each.value is not None and each.quantisation
                }
            )
        made.append(operator)
    return graph.with_operators(made)


def _refuse(operator: Operator, why: str) -> NoReturn:
    raise UserError(f"node {shown(operator.label)!r} ({operator.kind}): {why}")
