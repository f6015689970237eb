"""Images with their channels last in memory, as the kernels in C read them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from netship.compile.ir.graph import NHWC, Graph, Operator, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Convolution, Identity, Table, Transpose, View
from netship.compile.ir.pointwise import Pointwise


def channels_first_inputs(graph: Graph, names: Collection[str]) -> Graph:
    """The inputs ``names`` [1, height, width, channels] as [1, channels, height, width], which have the same memory in NHWC."""
    for given in graph.inputs:
        if given.name in names:
            graph = _channels_first(graph, given)
    return graph


def _channels_first(graph: Graph, given: Tensor) -> Graph:
    batch, height, width, channels = given.shape
    image = replace(given, shape=(batch, channels, height, width))
    copy = replace(given, name=graph.fresh_names()(f"{given.name}/in order"))
    copied = False

    def rule(operator: Operator) -> list[Operator] | None:
        nonlocal copied
        if given.name not in (each.name for each in operator.activations):
            return None
        inputs = (image, *operator.inputs[1:])
        if isinstance(operator, Transpose) and operator.order == (0, 3, 1, 2):
            return [Identity("Identity", operator.label, (image,), operator.outputs)]
        if isinstance(operator, View):
            return [replace(operator.with_attributes(order=NHWC), inputs=inputs)]
        # Its memory has another order of axes than the copy's.
        made = [operator.with_tensors({given.name: copy})]
        if not copied:
            order = {"perm": (0, 2, 3, 1)}
            made.insert(0, make("Transpose", "", [image], [copy], order))
            copied = True
        return made

    inputs = (image if each.name == given.name else each for each in graph.inputs)
    return replace(graph.rewritten(rule), inputs=tuple(inputs))


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
                and operator.input.shape[0] == operator.output.shape[0]
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


def ports_channels_last(graph: Graph) -> Graph:
    """The network's own inputs and outputs likewise, also those of a quantised network that are float32."""
    ports = (*graph.inputs, *graph.outputs)
    return graph.with_tensors(
        {
            each.name: replace(each, layout=NHWC)
            for each in ports
            if len(each.shape) == 4
        }
    )


def transposed_as_views(graph: Graph) -> Graph:
    """A transposition of an image to [batch, height, width, channels] moves nothing: these are in order in memory.

    What functions of each value make of it has the same order.
    """
    outputs = {tensor.name for tensor in graph.outputs}
    changed: dict[str, Tensor] = {}
    made = []
    for operator in graph.operators:
        operator = operator.with_tensors(changed)
        output = operator.output
        in_order = replace(output, layout="")
        if len(output.shape) == 4 and output.name not in outputs:
            source = operator.activations[0]
            if isinstance(operator, Transpose) and source.layout == NHWC:
                if operator.order == (0, 2, 3, 1):
                    order = {"order": NHWC}
                    name, changed[output.name] = operator.name, in_order
                    operator = make("Reshape", name, [source], [in_order], order)
            elif isinstance(operator, Pointwise | Table) and not source.layout:
                changed[output.name] = in_order
                operator = operator.with_tensors(changed)
        made.append(operator)
    return graph.with_operators(made)


def _reordered(dense: Convolution, image: Tensor) -> Convolution:
    """The layer for pixels of channels in the place of channels of pixels."""
    weights = dense.inputs[1]
    assert weights is not None and weights.value is not None
    apart = weights.value.reshape(-1, *image.shape[1:])
    value = np.moveaxis(apart, 1, -1).reshape(weights.shape)
    changed = replace(weights, value=np.ascontiguousarray(value))
    return replace(dense, inputs=(dense.inputs[0], changed, *dense.inputs[2:]))
