"""A QDQ graph into integer operators: what lies between DequantizeLinear and QuantizeLinear works on the stored values.

What has no integer form keeps its DequantizeLinear and QuantizeLinear, and computes in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.evaluate import apply
from netship.compile.ir.graph import (
    Graph,
    Operator,
    Quantisation,
    Tensor,
    along_axis,
    constant,
)
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    Dequantise,
    GlobalAverage,
    Multiplication,
    Quantise,
    Scaled,
    Transpose,
    View,
)
from netship.compile.ir.pooling import AveragePool
from netship.compile.passes.movement import behind_moves, facts, moved
from netship.targets.errors import UserError
from netship.targets.escapes import shown

_ACTIVATIONS = ("int8", "uint8")
# Operators whose integers ONNX Runtime computes.
_OF_TWO = (Addition, Multiplication)
_INTEGER = (*_OF_TWO, AveragePool, Convolution, GlobalAverage)


def absorb_constants(graph: Graph) -> Graph:
    """Constants in the place of the operators that scale or move them; dequantised ones keep their integers."""
    constants: dict[str, Tensor] = {}
    kept = []
    for operator in _with_operands(graph).operators:
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


def _with_operands(graph: Graph) -> Graph:
    """Constants that are added or multiplied by, as they are stored; one number is part of a table."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, _OF_TWO):
            return None
        stored: dict[str, Tensor] = {}
        for tensor in operator.activations:
            maker = graph.makers.get(tensor.name)
            if not isinstance(maker, Dequantise) or tensor.size == 1:
                continue
            value, known = maker.constant(0), facts(maker)
            if value is not None and known is not None:
                name = fresh(f"{tensor.name}/stored")
                stored[tensor.name] = constant(name, value, known[0])
        return [operator.with_tensors(stored)]

    return graph.rewritten(rule)


def _moved(operator: Operator) -> Tensor | None:
    """A constant with its axes in another order or of other sizes; None where a scale for each index keeps it from that."""
    known = (
        operator.input.quantisation if operator.inputs and operator.inputs[0] else None
    )
    if known is None or not isinstance(operator, Transpose | View):
        return None
    if known.axis is not None:
        if not isinstance(operator, Transpose):
            return None
        known = replace(known, axis=operator.order.index(known.axis))
    value = operator.input.value
    assert value is not None
    return constant(operator.output.name, operator.evaluate(value), known)


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


def as_stored(graph: Graph) -> Graph:
    """Tensors with the quantisation that their QuantizeLinear gives them."""
    typed: dict[str, Tensor] = {}
    for given in graph.inputs:
        _, readers = behind_moves(graph, given)
        facts = {_quantisation(x) for x in readers if isinstance(x, Dequantise)}
        if len(facts) == 1 and all(isinstance(x, Dequantise) for x in readers):
            typed[given.name] = replace(given, quantisation=facts.pop())

    def made(operator: Operator) -> Operator:
        operator = operator.with_tensors(typed)
        moving = (each for each in moved(operator) if each.value is None)
        if isinstance(operator, Dequantise):
            if _quantisation(operator) != operator.input.quantisation:
                _refuse(
                    operator,
                    "has another scale than its QuantizeLinear; quantise the model again",
                )
            return replace(operator, inputs=operator.inputs[:1])
        if isinstance(operator, Quantise):
            quantisation = _quantisation(operator)
            like: Tensor | None = replace(operator.output, quantisation=quantisation)
            operator = replace(operator, inputs=operator.inputs[:1])
        else:
            like = next((each for each in moving if each.quantisation), None)
        if like is None:
            return operator
        for each in operator.outputs:
            typed[each.name] = replace(
                each, dtype=like.dtype, quantisation=like.quantisation
            )
        return operator.with_tensors(typed)

    operators = [made(each) for each in graph.operators]
    return graph.with_tensors(typed).with_operators(operators)


def to_integers(graph: Graph) -> Graph:
    """Integer operators in the place of float ones between DequantizeLinear and QuantizeLinear."""

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Quantise):
            return None
        output, before = operator.output, graph.makers.get(operator.input.name)
        if isinstance(before, Dequantise):
            same = replace(before.input, name=output.name) == output
            inputs = [before.input]
            return [make("Identity", "", inputs, [output])] if same else None
        integer = before and _integer(graph, before, output)
        return [integer] if integer else None

    return graph.rewritten(rule).rewritten(_with_real_constants)


def _integer(graph: Graph, operator: Operator, output: Tensor) -> Operator | None:
    """The operator on stored values; None where it has no such form."""
    if not isinstance(operator, _INTEGER) or not operator.activations:
        return None
    if graph.only_reader(operator.output) is None:
        return None
    count = 2 if isinstance(operator, _OF_TWO) else 1
    stored = [each and _operand(graph, each) for each in operator.inputs[:count]]
    if not all(stored):
        return None
    inputs = (*stored, *operator.inputs[count:])
    integer = replace(operator, inputs=inputs, outputs=(output,))
    if isinstance(integer, Addition | Multiplication):
        return _of_two(integer)
    if isinstance(integer, AveragePool):
        return _average(integer)
    return _sums(integer) if isinstance(integer, Convolution) else integer


def _operand(graph: Graph, tensor: Tensor) -> Tensor | None:
    """The stored values that a float tensor stands for."""
    if tensor.value is not None:
        return (
            tensor if tensor.quantisation and tensor.quantisation.per_tensor else None
        )
    maker = graph.makers.get(tensor.name)
    return maker.input if isinstance(maker, Dequantise) else None


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


def _of_two(operator: Addition | Multiplication) -> Operator | None:
    """With the operand second whose last axis is broadcast, where ONNX Runtime exchanges them, too."""
    first, second, output = operator.input, operator.other, operator.output
    if {first.dtype, second.dtype} != {output.dtype}:
        return None
    rank = len(output.shape)
    ours, theirs = ((1,) * (rank - len(x.shape)) + x.shape for x in (first, second))
    last = max((a for a in range(rank) if output.shape[a] > 1), default=None)
    if last is not None and ours[last] < theirs[last]:
        return replace(operator, inputs=(second, first))
    return operator


def _average(operator: AveragePool) -> Operator | None:
    """ONNX Runtime takes the mean of a whole image as a global one, and knows no dilations."""
    if len(operator.kernel) > 3 or any(each > 1 for each in operator.dilations):
        return None
    if operator.kernel == operator.input.shape[2:] and not any(map(any, operator.pads)):
        inputs, outputs = operator.inputs, operator.outputs
        pooled = make("GlobalAveragePool", operator.name, inputs, outputs)
        return pooled if isinstance(pooled, GlobalAverage) else None
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
