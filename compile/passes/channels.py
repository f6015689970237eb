"""Channels in whole blocks, as kernels with a dot product take them; what is added has weights of zero and is read by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Graph, Operator, Tensor, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    GlobalAverage,
    View,
)

BLOCK = 16


def fill_blocks(graph: Graph) -> Graph:
    """Every convolution's channels a multiple of `BLOCK`; where another kind of operator reads them, the first ones.

    The image keeps its own.
    """
    return _Filler(graph).run()


class _Filler:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._outputs = {each.name for each in graph.outputs}
        self._fresh = graph.fresh_names()
        # By a tensor's name: the same with channels added, and what was cut off it again.
        self._filled: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._made: list[Operator] = []

    def run(self) -> Graph:
        for operator in self._graph.operators:
            filled = self._with_all(operator)
            self._made.append(
                filled or operator.with_tensors(self._with_first(operator.activations))
            )
        self._with_first(self._graph.outputs)
        return self._graph.with_operators(self._made)

    def _with_all(self, operator: Operator) -> Operator | None:
        """The operator on all channels; None where it is one that wants its own alone."""
        if operator.output.quantisation is None:
            return None
        source = self._filled.get(operator.input.name, operator.input)
        if isinstance(operator, Convolution):
            return self._convolution(operator, source.shape[1])
        if isinstance(operator, Addition):
            filled = (self._filled.get(x.name, x) for x in operator.activations)
            alike = len({each.shape for each in filled}) == 1
            if not operator.elementwise or not alike:
                return None
        if isinstance(operator, Addition | GlobalAverage):
            return self._filled_up(operator, source.shape[1])
        if isinstance(operator, View) and self._is_dense(operator):
            # Channels lie first in such a row: what is added comes behind it.
            return self._filled_up(operator, source.size // source.shape[0])
        return None

    def _is_dense(self, view: View) -> bool:
        reader = self._graph.only_reader(view.output)
        return (
            isinstance(reader, Convolution)
            and reader.pointwise
            and view.output.shape[0] == view.input.shape[0]
            and view.output.shape[2:] == (1, 1)
        )

    def _convolution(self, operator: Convolution, into: int) -> Operator | None:
        channels = -(-operator.output.shape[1] // BLOCK) * BLOCK
        attributes = dict(operator.attributes)
        if operator.depthwise:
            channels, per_group = into, 1
            attributes["group"] = into
        elif operator.group == 1:
            per_group = into
        else:
            return None
        _, weights, *rest = operator.inputs
        assert weights is not None and weights.value is not None
        value = _longer(_longer(weights.value, 0, channels), 1, per_group)
        quantisation = weights.quantisation
        if quantisation is not None and quantisation.axis == 0:
            added = channels - len(quantisation.scale)
            scale = quantisation.scale + quantisation.scale[-1:] * added
            quantisation = replace(quantisation, scale=scale)
        inputs = [operator.input, constant(weights.name, value, quantisation)]
        for bias in filter(None, rest):
            assert bias.value is not None
            inputs.append(constant(bias.name, _longer(bias.value, 0, channels)))
        made = replace(operator, inputs=tuple(inputs), attributes=attributes)
        return self._filled_up(made, channels)

    def _filled_up(self, operator: Operator, channels: int) -> Operator:
        output = operator.output
        if channels != output.shape[1]:
            shape = (output.shape[0], channels, *output.shape[2:])
            name = output.name
            if name in self._outputs:
                name = self._fresh(f"{name}/all channels")
            self._filled[output.name] = replace(output, name=name, shape=shape)
        return operator.with_tensors(self._filled)

    def _with_first(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is read in the place of filled ones of ``tensors``: their own channels."""
        for tensor in tensors:
            if tensor.name in self._filled and tensor.name not in self._first:
                first = tensor
                if tensor.name not in self._outputs:
                    name = self._fresh(f"{tensor.name}/own channels")
                    first = replace(tensor, name=name)
                self._first[tensor.name] = first
                filled = self._filled[tensor.name]
                self._made.append(make("channels", "", [filled], [first]))
        return self._first


def _longer(values: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    """``values`` with zeros at the end of ``axis``."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, size - values.shape[axis])
    return np.pad(values, widths)
