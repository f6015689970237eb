"""What the C kernels take; TVM writes C for everything else."""

from __future__ import annotations

from dataclasses import replace

from netship.compile.ir.graph import NHWC, Graph, Operator, Tensor
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    GlobalAverage,
    Table,
    View,
)
from netship.compile.ir.pointwise import Pointwise
from netship.compile.kernels.cortex_m.pack import padded_depth
from netship.targets.errors import UserError
from netship.targets.escapes import shown

# The kernels hold sizes in int16 and rows of a depthwise convolution in an array of 7.
_LARGEST = 32767
_LARGEST_KERNEL = 7


def check(graph: Graph) -> None:
    """Refuse a network of which nothing is left to compute.

    Raises:
        UserError: so it is; its output is named.
    """
    if all(isinstance(each, View) for each in graph.operators):
        raise UserError(
            f"output {shown(graph.outputs[0].name)!r}: no operator makes it; C for a microcontroller takes a network "
            "that computes something"
        )


def has_kernel(operator: Operator, graph: Graph) -> bool:
    """Whether a kernel of ours runs an operator of a graph; a view needs none where it moves nothing."""
    if isinstance(operator, View):
        return operator.in_place
    if isinstance(operator, Table) and operator.input.dtype == "uint8":
        # An image's bytes as they are.
        return operator.input.layout == operator.output.layout
    dtype = "int8" if graph.quantised else "float32"
    tensors = (*operator.activations, operator.output)
    if not all(_fits(each, dtype, graph.quantised) for each in tensors):
        return False
    match operator:
        case Convolution():
            return _is_plain(operator) and _channels_last(operator)
        case Addition():
            alike = {(each.shape, each.layout) for each in tensors}
            return len(operator.activations) == 2 and len(alike) == 1
        case GlobalAverage():
            small = max(_sizes(operator)) <= _LARGEST
            return operator.input.shape[0] == 1 and small and _channels_last(operator)
        case Table() | Pointwise():
            return operator.input.layout == operator.output.layout
    return False


def _fits(tensor: Tensor, dtype: str, quantised: bool) -> bool:
    return tensor.dtype == dtype and (tensor.quantisation is not None) == quantised


def _is_plain(operator: Convolution) -> bool:
    """One image, constant weights, one group or one for each channel, no dilation, and sizes that fit."""
    if (
        operator.constant(1) is None
        or operator.input.shape[0] != 1
        or operator.dilations != (1, 1)
        or (operator.group > 1 and not operator.depthwise)
    ):
        return False
    rows = max(*operator.kernel, *operator.strides, *operator.pads)
    sizes = (*_sizes(operator), padded_depth(operator))
    most = _LARGEST_KERNEL if operator.depthwise else 127
    return rows <= most and max(sizes) <= _LARGEST


def _channels_last(operator: Operator) -> bool:
    """Whether the images lie in memory as the kernels read them."""
    images = (operator.input, operator.output)
    return all(each.layout or replace(each, layout=NHWC).in_order for each in images)


def _sizes(operator: Operator) -> list[int]:
    return [size for each in (operator.input, operator.output) for size in each.image]
