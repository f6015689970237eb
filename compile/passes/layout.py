"""Images with their channels last in memory, as the kernels in C read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compile.ir.graph import NHWC, Graph, Operator, Tensor
from compile.ir.operators import Convolution, View


def channels_last(graph: Graph) -> Graph:
    """Images in the layout NHWC: of a quantised network those of integers, else all.

    Where a fully connected layer reads an image through a view, its weights are put into the order of the image's memory.
    """
    views: dict[str, Tensor] = {}
    operators: list[Operator] = []
    for operator in graph.operators:
        reader = graph.only_reader(operator.output)
        if isinstance(operator, View) and isinstance(reader, Convolution):
            height, width, _ = operator.input.image
            if (
                reader.pointwise
                and reader.output.image[:2] == (1, 1)
                and height * width > 1
            ):
                operator = operator.with_attributes(order=NHWC)
                views[operator.output.name] = operator.input
        elif isinstance(operator, Convolution) and operator.input.name in views:
            operator = _reordered(operator, views[operator.input.name])
        operators.append(operator)
    ordered = graph.with_operators(operators)
    return ordered.with_tensors(
        {
            tensor.name: replace(tensor, layout=NHWC)
            for tensor in ordered.tensors.values()
            if len(tensor.shape) == 4
            and tensor.value is None
            and (tensor.quantisation is not None or not graph.quantised)
        }
    )


def _reordered(dense: Convolution, image: Tensor) -> Convolution:
    """The layer for pixels of channels in the place of channels of pixels."""
    weights = dense.inputs[1]
    assert weights is not None and weights.value is not None
    apart = weights.value.reshape(-1, *image.shape[1:])
    value = np.moveaxis(apart, 1, -1).reshape(weights.shape)
    changed = replace(weights, value=np.ascontiguousarray(value))
    return replace(dense, inputs=(dense.inputs[0], changed, *dense.inputs[2:]))
