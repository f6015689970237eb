"""Rules of operators with sliding windows: convolution, pooling; and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)


class _Windows:
    """The sliding windows of a convolution or pooling, each attribute an array over the spatial axes."""

    def __init__(self, node: onnx.NodeProto, graph: Graph) -> None:
        attributes = attributes_of(node)
        self.input = np.array(graph.shape(node.input[0])[2:])
        self.output = np.array(graph.shape(node.output[0])[2:])
        kernel = attributes.get("kernel_shape") or graph.shape(node.input[1])[2:]
        ones = [1] * len(kernel)
        self.strides = np.array(attributes.get("strides") or ones)
        dilations = np.array(attributes.get("dilations") or ones)
        self.extent = (np.array(kernel) - 1) * dilations + 1
        pads = attributes.get("pads") or [0, 0] * len(kernel)
        self.before, self.after = np.reshape(pads, (2, -1))
        # How far the last window reaches, in elements from the first one's start.
        self.reach = (self.output - 1) * self.strides + self.extent


def _split_padding(total: NDArray[np.int64], lower: bool) -> list[int]:
    """``pads`` (all begins, then all ends): SAME_UPPER puts the odd element at the end, SAME_LOWER at the begin."""
    total = np.maximum(total, 0)
    small, large = (total // 2).tolist(), (total - total // 2).tolist()
    return [*large, *small] if lower else [*small, *large]


def _same_pads(node: onnx.NodeProto, graph: Graph) -> dict[str, Any]:
    """The node's attributes with ``pads`` in the place of ``auto_pad``."""
    attributes = attributes_of(node)
    mode = text_of(attributes.pop("auto_pad", "NOTSET"))
    if mode == "VALID":
        attributes.pop("pads", None)
    if mode.startswith("SAME"):
        windows = _Windows(node, graph)
        total = windows.reach - windows.input
        attributes["pads"] = _split_padding(total, mode == "SAME_LOWER")
    return attributes


def convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """auto_pad=SAME_* fails in LLVM's verifier; pads take its place."""
    return Chain(node, graph).end("Conv", *node.input, **_same_pads(node, graph))


def pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """SAME_*, as above; TVM refuses an unread Indices output, and counts the padding that ceil_mode adds."""
    if graph.read.intersection(node.output[1:]):
        raise refusal(
            node, "its Indices output is used, which TVM cannot make; pool without it"
        )
    attributes = _same_pads(node, graph)
    # The order of the Indices, which no node reads.
    attributes.pop("storage_order", None)
    chain, source = Chain(node, graph), node.input[0]
    if attributes.pop("ceil_mode", 0):
        windows = _Windows(node, graph)
        before, size = windows.before, windows.input
        if np.any(windows.reach - windows.extent >= before + size):
            raise refusal(
                node,
                "with ceil_mode its last window lies in the padding, where ONNX Runtime and "
                "ONNX's shapes disagree; export with ceil_mode off",
            )
        if attributes.get("count_include_pad") and np.any([before, windows.after]):
            # The padding counts but what ceil_mode adds does not, so a node of its own pads first.
            pads = [0, 0, *before.tolist(), 0, 0, *windows.after.tolist()]
            inputs, named = _pad_form(pads, 0.0, graph)
            source = chain.add("Pad", source, *inputs, **named)
            before, size = 0 * before, before + size + windows.after
        attributes["count_include_pad"] = 0
        after = np.maximum(windows.reach - before - size, 0)
        attributes["pads"] = np.concatenate([before, after]).tolist()
    if node.op_type != "AveragePool":
        attributes.pop("count_include_pad", None)
    return chain.end(node.op_type, source, **attributes)


def transposed_convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """auto_pad depends on the installed ONNX Runtime; TVM has no schedule for dilations, so the weights get zeros."""
    attributes = attributes_of(node)
    mode = text_of(attributes.pop("auto_pad", "NOTSET"))
    windows = _Windows(node, graph)
    if "output_shape" in attributes or mode.startswith("SAME"):
        attributes.pop("output_shape", None)
        extra = np.array(attributes.get("output_padding") or 0 * windows.extent)
        full = windows.strides * (windows.input - 1) + windows.extent + extra
        total = full - windows.output
        attributes["output_padding"] = (extra + np.maximum(-total, 0)).tolist()
        attributes["pads"] = _split_padding(total, mode != "SAME_UPPER")
    inputs: list[Any] = list(node.input)
    dilations = attributes.pop("dilations", None) or []
    if any(each != 1 for each in dilations):
        weights = graph.constant(node, 1)
        assert weights is not None
        inputs[1] = np.zeros((*weights.shape[:2], *windows.extent), weights.dtype)
        inputs[1][..., *(slice(None, None, each) for each in dilations)] = weights
        attributes["kernel_shape"] = windows.extent.tolist()
    return Chain(node, graph).end("ConvTranspose", *inputs, **attributes)


def _pad_form(
    pads: Sequence[int], value: float, graph: Graph
) -> tuple[list[Any], dict[str, Any]]:
    """The amounts and the value of a padding as its opset has them: inputs, or attributes."""
    if graph.opset < 11:
        return [], {"pads": pads, "value": value}
    return [pads, value], {}


def pad(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Axes (opset 18) abort the importer, so pads of all axes are given; mode wrap is unknown."""
    mode = text_of(attributes_of(node).get("mode", "constant"))
    if mode == "wrap":
        raise refusal(
            node, "mode wrap is not known to TVM; pad with constant, edge or reflect"
        )
    if graph.opset < 11:
        return [node]
    pads, axes, value = (graph.constant(node, index) for index in (1, 3, 2))
    assert pads is not None
    rank = len(graph.shape(node.input[0]))
    full = np.zeros((2, rank), np.int64)
    full[:, np.arange(rank) if axes is None else axes] = pads.reshape(2, -1)
    fill = 0.0 if value is None or not value.size else float(value.flat[0])
    return Chain(node, graph).end("Pad", node.input[0], full.ravel(), fill, mode=mode)
