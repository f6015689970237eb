"""Quantised activations in the one type that a backend's kernels work on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from netship.compile.ir.graph import Graph, Operator, Quantisation, Tensor, constant
from netship.compile.ir.operators import Addition, Multiplication, Table
from netship.compile.ir.pooling import AveragePool
from netship.compile.passes.movement import moved

_ROUNDED_WITH_ZERO = (Addition, AveragePool, Multiplication)


def store_as_int8(graph: Graph) -> Graph:
    """For kernels that work on int8."""
    return _store_as(graph, "int8")


def store_as_uint8(graph: Graph) -> Graph:
    """For kernels that work on uint8."""
    return _store_as(graph, "uint8")


def _store_as(graph: Graph, dtype: Literal["int8", "uint8"]) -> Graph:
    """Every quantised activation in ``dtype``: uint8 is int8 with stored values and zero point 128 higher.

    Some operators keep what the model's own values are above the new ones: their rounding depends on them.
    """
    shifts: dict[str, int] = {}
    changed: dict[str, Tensor] = {}
    for tensor in graph.tensors.values():
        if tensor.quantisation is None or tensor.value is not None:
            continue
        shift = {"int8": -128, "uint8": 128}[dtype] if tensor.dtype != dtype else 0
        quantisation = Quantisation((tensor.scale,), (tensor.zero + shift,))
        shifts[tensor.name] = shift
        changed[tensor.name] = replace(tensor, dtype=dtype, quantisation=quantisation)
    stored = graph.with_tensors(changed)
    return stored.with_operators(
        _shifted(each, shifts.get(each.output.name, 0)) for each in stored.operators
    )


def _shifted(operator: Operator, shift: int) -> Operator:
    """The operator whose constants fit an output that is ``shift`` higher than the model's."""
    if operator.output.quantisation is None:
        return operator
    if isinstance(operator, _ROUNDED_WITH_ZERO):
        offset = operator.attributes.get("offset", 0) - shift
        operator = operator.with_attributes(offset=offset)
    if moved(operator) or isinstance(operator, Addition | Multiplication):
        stored = {
            each.name: _constant_as(operator.output.dtype, each)
            for each in operator.inputs
            if each and each.value is not None and each.quantisation
        }
        return operator.with_tensors(stored)
    if isinstance(operator, Table):
        source, table = operator.inputs
        assert table is not None
        dtype = operator.output.dtype
        values = (operator.values.astype(np.int64) + shift).astype(dtype)
        return replace(
            operator, inputs=(source, replace(table, dtype=dtype, value=values))
        )
    return operator


def _constant_as(dtype: str, tensor: Tensor) -> Tensor:
    """A constant in the place of an activation."""
    assert tensor.value is not None
    shift = np.iinfo(dtype).min - tensor.limits[0]
    value = (tensor.value.astype(np.int64) + shift).astype(dtype)
    quantisation = Quantisation((tensor.scale,), (tensor.zero + shift,))
    return constant(tensor.name, value, quantisation)
