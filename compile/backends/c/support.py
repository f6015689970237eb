"""What the C kernels take; everything else is refused by the operator's name."""

from __future__ import annotations

from typing import NoReturn

from compile.ir.graph import Graph, Operator
from compile.ir.operators import (
    Addition,
    Convolution,
    Dense,
    Dequantise,
    GlobalAverage,
    Known,
    Table,
    View,
)
from compile.ir.pointwise import FUNCTIONS, Pointwise
from compile.kernels.cortex_m.pack import padded_depth
from targets.errors import UserError
from targets.escapes import counted, listed, shown

_LOWERED = (
    "Conv, Gemm, MatMul, Add, GlobalAveragePool, ReduceMean over height and width, Flatten, Reshape, "
    f"Squeeze, {', '.join(FUNCTIONS)}"
)
# The kernels hold sizes in int16 and rows of a depthwise convolution in an array of 7.
_LARGEST = 32767
_LARGEST_KERNEL = 7


def check(graph: Graph) -> None:
    """Refuse what there is no kernel for.

    Raises:
        UserError: the first such operator, or another number of inputs and outputs than one.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UserError(
            f"{counted(len(graph.inputs), 'input')} and {counted(len(graph.outputs), 'output')}: C for a microcontroller takes "
            "one of each; cut the graph to one"
        )
    if graph.quantised:
        _check_all_integer(graph)
    for operator in graph.operators:
        if fault := _fault(operator) or _fault_of_sizes(operator):
            _refuse(operator, fault)
    if all(isinstance(each, View) for each in graph.operators):
        raise UserError(
            f"output {shown(graph.outputs[0].name)!r}: no operator with a C lowering makes it; "
            f"these have: {_LOWERED}"
        )


def _check_all_integer(graph: Graph) -> None:
    floats = [
        each
        for each in graph.operators
        if each.output.quantisation is None and not isinstance(each, Dequantise)
    ]
    if not floats:
        return
    first, *others = floats
    if not isinstance(first, Known):
        _refuse(first, f"{first.kind} has no C lowering; these have: {_LOWERED}")
    too = [repr(shown(each.label)) for each in others]
    also = f", and so do {listed(too, 6)}" if too else ""
    _refuse(first, f"works on float32{also}; quantise the whole network to int8")


def _fault(operator: Operator) -> str:
    """Why there is no kernel for an operator; empty where there is one."""
    match operator:
        case Convolution():
            if (
                operator.constant(1) is None
                or len(operator.input.shape) != 4
                or operator.dilations != (1, 1)
            ):
                return "only two-dimensional convolutions with constant weights, without dilation, are lowered"
            if operator.group > 1 and not operator.depthwise:
                return f"has {operator.group} groups: only 1, or one for each channel, are lowered"
        case Addition():
            shapes = {each.shape for each in (*operator.activations, operator.output)}
            if len(operator.activations) != 2 or len(shapes) != 1:
                return f"adds {operator.other.shape} to {operator.input.shape}; only equal shapes are lowered"
        case Dense():
            return "with alpha, beta or transA, or more than one row, is not lowered; fold them in"
        case View():
            if not operator.in_place:
                return "mixes channels with rows and columns, which would have to be moved; that is not lowered"
        case GlobalAverage() | Pointwise() | Table():
            pass
        case _ if operator.kind in ("Conv", "GlobalAveragePool"):
            return f"of {len(operator.input.shape)} dimensions; only images, of four, are lowered"
        case _:
            return f"{operator.kind} has no C lowering; these have: {_LOWERED}"
    return ""


def _fault_of_sizes(operator: Operator) -> str:
    tensors = (*operator.activations, operator.output)
    sizes = [size for each in tensors for size in each.image]
    if isinstance(operator, Convolution):
        sizes.append(padded_depth(operator))
        rows = max(*operator.kernel, *operator.strides, *operator.pads)
        if rows > (_LARGEST_KERNEL if operator.depthwise else 127):
            return (
                f"kernel, stride or padding of {rows}; the C kernels take {_LARGEST_KERNEL} for a depthwise "
                "convolution, 127 for others"
            )
    if max(sizes) > _LARGEST and not isinstance(operator, View):
        return f"a size of {max(sizes):,}; the C kernels take up to {_LARGEST:,}"
    return ""


def _refuse(operator: Operator, why: str) -> NoReturn:
    raise UserError(f"node {shown(operator.label)!r} ({operator.kind}): {why}")
