"""Images with their channels last in memory, as the kernels in C read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compile.ir.graph import NHWC, Graph, Operator, Tensor
from compile.ir.operators import Convolution, Identity, Transpose, View
from targets.errors import UserError
from targets.escapes import shown


def channels_first_input(graph: Graph) -> Graph:
    """The input [1, height, width, channels] as [1, channels, height, width], which has the same memory in NHWC.

    Raises:
        UserError: an operator reads it that is neither a view nor a transposition to NCHW.
    """
    (image,) = graph.inputs
    batch, height, width, channels = image.shape
    image = replace(image, shape=(batch, channels, height, width))

    def rule(operator: Operator) -> list[Operator] | None:
        if image.name not in (each.name for each in operator.activations):
            return None
        inputs = (image, *operator.inputs[1:])
        if isinstance(operator, Transpose) and operator.order == (0, 3, 1, 2):
            return [Identity("Identity", operator.label, (image,), operator.outputs)]
        if isinstance(operator, View):
            return [replace(operator.with_attributes(order=NHWC), inputs=inputs)]
        raise UserError(
            f"node {shown(operator.label)!r} ({operator.kind}): reads input {shown(image.name)!r} with its channels "
            "last; C takes that through a Transpose to NCHW or a Flatten; give --layout NCHW if its axes are in that order"
        )

    return replace(graph.rewritten(rule), inputs=(image,))


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
                not operator.attributes.get("order")
                and reader.pointwise
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
