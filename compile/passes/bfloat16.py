"""A float32 network whose convolutions and fully connected layers multiply bfloat16; everything else is unchanged."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Graph, Operator
from netship.compile.ir.operators import Convolution

KIND = "conv_bfloat16"
"""A Conv that rounds its input to bfloat16, has weights of bfloat16, and adds the products in float32."""
CHANNELS = 8
"""Its channels are multiples of this, the numbers of the shortest vectors."""


def to_bfloat16(graph: Graph, kept: Collection[str]) -> Graph:
    """The network with its convolutions in bfloat16.

    Args:
        graph: after `netship.compile.passes.half.BEFORE`.
        kept: the outputs of those that stay in float32, in addition to those that `unfit` names.
    """
    made: list[Operator] = []
    for operator in graph.operators:
        if is_reduced(operator, kept):
            _, weights, *bias = operator.inputs
            assert weights is not None and weights.value is not None
            short = replace(
                weights, name=f"{weights.name}/bfloat16", value=rounded(weights.value)
            )
            operator = replace(
                operator, kind=KIND, inputs=(operator.input, short, *bias)
            )
        made.append(operator)
    return graph.with_operators(made)


def is_reduced(operator: Operator, kept: Collection[str]) -> bool:
    """Whether an operator of a network after ``BEFORE`` is computed in bfloat16."""
    return (
        operator.kind == "Conv"
        and not unfit(operator)
        and operator.outputs[0].name not in kept
    )


def unfit(operator: Operator) -> str:
    """Why a Conv cannot be computed in bfloat16; empty where it can."""
    if not isinstance(operator, Convolution) or len(operator.activations) > 1:
        return "its weights are computed, or it is not over two axes"
    if operator.input.shape[0] != 1:
        return f"a batch of {operator.input.shape[0]}"
    if operator.group > 1:
        return "its channels are in groups"
    channels = operator.input.shape[1], operator.output.shape[1]
    if any(each % CHANNELS for each in channels):
        return f"{channels[0]} and {channels[1]} channels, not multiples of {CHANNELS}"
    return ""


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers of bfloat16, half to even; what float32 has no normal number for becomes 0, as in the CPU."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    short = np.where(tiny, np.float32(0), up.view(np.float32))
    return np.where(np.isnan(values), np.float32(np.nan), short)


def short_weights(graph: Graph) -> set[str]:
    """The names of the weights of bfloat16."""
    return {
        operator.inputs[1].name
        for operator in graph.operators
        if operator.kind == KIND and operator.inputs[1]
    }


def weight_bytes(graph: Graph) -> int:
    """Of all constants, those of bfloat16 with two bytes a number."""
    short = short_weights(graph)
    return sum(
        2 * prod(each.shape) if each.name in short else each.nbytes
        for each in graph.tensors.values()
        if each.value is not None
    )
