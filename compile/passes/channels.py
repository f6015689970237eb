"""A network whose channels fill whole blocks: what is added has weights of zero and is read by nobody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.ir.graph import Add, AveragePool, Network, Operator, Tensor


def fill_blocks(network: Network, block: int) -> Network:
    """``network`` with every convolution's channels a multiple of ``block``.

    The first channels of its output are those of ``network``'s; the image keeps its own.
    """
    filled = {network.input.name: network.input}
    shapes = {network.input.name: network.input.shape}
    operators: list[Operator] = []
    for operator in network.operators:
        shapes[operator.output.name] = operator.output.shape
        made = _filled(operator, filled, shapes[operator.input.name], block)
        filled[made.output.name] = made.output
        operators.append(made)
    return Network(network.input, filled[network.output.name], tuple(operators))


def _filled(
    operator: Operator,
    filled: dict[str, Tensor],
    image: tuple[int, int, int],
    block: int,
) -> Operator:
    """Args: image: the shape of the operator's input before it was filled."""
    source = filled[operator.input.name]
    if isinstance(operator, Add):
        other = filled[operator.other.name]
        output = _with(operator.output, source.shape[2])
        return replace(operator, input=source, other=other, output=output)
    if isinstance(operator, AveragePool):
        output = _with(operator.output, source.shape[2])
        return replace(operator, input=source, output=output)
    channels = operator.output.shape[2]
    if operator.depthwise:
        count = source.shape[2]
        weights = _longer(operator.weights, 2, count)
    else:
        count = -(-channels // block) * block
        weights = _longer(operator.weights, 0, count)
        if operator.input.shape != image:
            # A fully connected layer reads an image's pixels as one row.
            by_pixels = weights.reshape(count, *image)
            weights = _longer(by_pixels, 3, source.shape[2]).reshape(count, 1, 1, -1)
            source = replace(source, shape=(1, 1, source.nbytes))
        else:
            weights = _longer(weights, 3, source.shape[2])
    added = count - channels
    return replace(
        operator,
        input=source,
        output=_with(operator.output, count),
        weights=weights,
        bias=_longer(operator.bias, 0, count),
        scales=np.pad(operator.scales, (0, added), mode="edge"),
    )


def _with(tensor: Tensor, channels: int) -> Tensor:
    return replace(tensor, shape=(*tensor.shape[:2], channels))


def _longer(values: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    """``values`` with zeros at the end of ``axis``."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, size - values.shape[axis])
    return np.pad(values, widths)
