"""A QDQ graph into integer operators: what lies between DequantizeLinear and QuantizeLinear works on the stored values.

What has no integer form keeps its DequantizeLinear and QuantizeLinear, and computes in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from compile.ir.evaluate import apply
from compile.ir.graph import (
    Graph,
    Operator,
    Quantisation,
    Tensor,
    along_axis,
    constant,
)
from compile.ir.kinds import make
from compile.ir.operators import (
    Addition,
    Convolution,
    Dequantise,
    GlobalAverage,
    Quantise,
    Scaled,
    Transpose,
    View,
)
from compile.passes.views import Moving
from targets.errors import UserError
from targets.escapes import shown

_ACTIVATIONS = ("int8", "uint8")
# Operators whose integers ONNX Runtime computes.
_INTEGER = (Convolution, Addition, GlobalAverage)


def absorb_constants(graph: Graph) -> Graph:
    """Constants in the place of the operators that scale or move them; dequantised ones keep their integers."""
    constants: dict[str, Tensor] = {}
    kept = []
    for operator in graph.operators:
        operator = operator.with_tensors(constants)
        made = None
        if not operator.activations:
            made = _moved(operator)
        if isinstance(operator, Scaled) and operator.input.value is not None:
            made = _absorbed(operator)
        if made is None:
            kept.append(operator)
        else:
            constants[operator.output.name] = made
    return graph.with_operators(kept)


def _moved(operator: Operator) -> Tensor | None:
    """A constant with its axes in another order or of other sizes; None where a scale for each index keeps it from that."""
    facts = (
        operator.input.quantisation if operator.inputs and operator.inputs[0] else None
    )
    if facts is None or not isinstance(operator, Transpose | View):
        return None
    if facts.axis is not None:
        if not isinstance(operator, Transpose):
            return None
        facts = replace(facts, axis=operator.order.index(facts.axis))
    value = operator.input.value
    assert value is not None
    return constant(operator.output.name, operator.evaluate(value), facts)


def _absorbed(operator: Scaled) -> Tensor:
    """The constant that the operator makes; of DequantizeLinear integers around zero, in 16 bits where 8 are too few."""
    output, stored = operator.output, operator.constant(0)
    assert stored is not None
    if isinstance(operator, Quantise):
        return replace(output, value=apply(operator, {})[output.name])
    scale, zero = _scale(operator), _zero(operator)
    axis = int(operator.attributes.get("axis", 1)) % max(stored.ndim, 1)
    steps = stored.astype(np.int64) - along_axis(zero, axis, stored.ndim)
    dtype = stored.dtype
    if dtype.itemsize == 1:
        fits = not steps.size or -128 <= steps.min() <= steps.max() <= 127
        dtype = np.dtype(np.int8 if fits else np.int16)
    facts = Quantisation(tuple(scale.tolist()), axis=axis if scale.size > 1 else None)
    return constant(output.name, steps.astype(dtype), facts)


def _scale(operator: Scaled) -> NDArray[np.float64]:
    scale = operator.constant(1)
    if scale is None:
        _refuse(operator, "its scale is computed; quantise statically")
    return scale.astype(np.float64).ravel()


def _zero(operator: Scaled) -> NDArray[np.int64]:
    zero = operator.constant(2)
    return np.zeros(1, np.int64) if zero is None else zero.astype(np.int64).ravel()


def to_integers(graph: Graph) -> Graph:
    """Integer operators in the place of float ones between DequantizeLinear and QuantizeLinear."""
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
        for given in self._graph.inputs:
            reader = self._graph.only_reader(given)
            while isinstance(reader, Moving):
                reader = self._graph.only_reader(reader.output)
            if isinstance(reader, Dequantise):
                self._type(given, replace(given, quantisation=_quantisation(reader)))
        for operator in self._graph.operators:
            operator = operator.with_tensors(self._typed)
            if isinstance(operator, Quantise):
                self._quantise(operator)
                continue
            if isinstance(operator, Dequantise):
                operator = self._dequantise(operator)
            elif (
                isinstance(operator, Moving)
                and operator.input.quantisation
                and operator.input.value is None
            ):
                typed = self._type(operator.output, operator.input)
                operator = replace(operator, outputs=(typed,))
            self._made[operator.output.name] = operator
        graph = self._graph.with_tensors(self._typed)
        made = graph.with_operators(self._made.values())
        return made.rewritten(_with_real_constants)

    def _type(self, tensor: Tensor, like: Tensor) -> Tensor:
        typed = replace(tensor, dtype=like.dtype, quantisation=like.quantisation)
        self._typed[typed.name] = typed
        return typed

    def _dequantise(self, operator: Dequantise) -> Operator:
        if _quantisation(operator) != operator.input.quantisation:
            _refuse(
                operator,
                "has another scale than its QuantizeLinear; quantise the model again",
            )
        self._stored[operator.output.name] = operator.input
        return replace(operator, inputs=operator.inputs[:1])

    def _quantise(self, operator: Quantise) -> None:
        """The operator, or the integer operator that gives its output in the place of the float one."""
        quantisation = _quantisation(operator)
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
        if not isinstance(operator, _INTEGER):
            return None
        count = 2 if isinstance(operator, Addition) else 1
        stored = [self._stored.get(each.name) for each in operator.activations]
        if len(stored) != count or not all(stored):
            return None
        if self._graph.only_reader(operator.output) is None:
            return None
        inputs = (*stored, *operator.inputs[count:])
        integer = replace(operator, inputs=inputs, outputs=(output,))
        if isinstance(integer, Addition):
            return _addition(integer)
        return _sums(integer) if isinstance(integer, Convolution) else integer


def _quantisation(operator: Scaled) -> Quantisation:
    scale, zero, dtype = _scale(operator), _zero(operator), operator.stored.dtype
    for wrong, why in (
        (
            scale.size != 1 or zero.size != 1,
            "has a scale for each channel of an activation; quantise per tensor",
        ),
        (
            dtype not in _ACTIVATIONS,
            f"quantises an activation to {dtype}; quantise activations to 8 or 16 bits",
        ),
        (
            not scale[0] > 0,
            "has scale 0: this activation is constant; calibrate with photographs",
        ),
    ):
        if wrong:
            _refuse(operator, why)
    return Quantisation((float(scale[0]),), (int(zero[0]),))


def _addition(operator: Addition) -> Addition | None:
    first, second = operator.input, operator.other
    if first.shape != second.shape:
        return None
    if {first.dtype, second.dtype} != {operator.output.dtype}:
        _refuse(operator, "adds int8 and uint8; quantise both and the sum alike")
    return operator


def _sums(operator: Convolution) -> Convolution | None:
    """With a bias in units of input scale × weight scale."""
    source, weights, *rest = operator.inputs
    facts = weights.quantisation if weights else None
    # Of a scale for each input channel no integer sum can be made.
    if not weights or not facts or facts.axis not in (None, 0):
        return None
    if weights.dtype not in ("int8", "int16"):
        return None
    inputs = [source, weights]
    for bias in filter(None, rest):
        if bias.quantisation and bias.dtype == "int32":
            # ONNX Runtime takes these integers whatever their scale.
            stored = np.ravel(bias.value)  # type: ignore[arg-type]
            whole = np.broadcast_to(stored, weights.shape[:1])
            inputs.append(constant(bias.name, whole.astype(np.int64)))
            continue
        if not all(facts.scale):
            return None
        unit = operator.input.scale * np.array(facts.scale)
        steps = np.broadcast_to(bias.real.ravel() / unit, weights.shape[:1])
        inputs.append(constant(bias.name, np.rint(steps).astype(np.int64)))
    return replace(operator, inputs=tuple(inputs))


def _with_real_constants(operator: Operator) -> list[Operator] | None:
    """An operator that computes in float32 gets its constants so."""
    if operator.output.quantisation is not None:
        return None
    stored = (each for each in operator.inputs if each and each.value is not None)
    real = {each.name: each.as_float() for each in stored if each.quantisation}
    return [operator.with_tensors(real)]


def _refuse(operator: Operator, why: str) -> NoReturn:
    raise UserError(f"node {shown(operator.label)!r} ({operator.kind}): {why}")
