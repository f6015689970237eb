"""Rules of operators with sliding windows: convolution, pooling; and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from compile.frontend.canonical.graph import (
    Graph,
    attributes_of,
    make_node,
    refusal,
    text_of,
)


class _Windows:
    """The sliding windows of a convolution or pooling, each attribute a list over the spatial axes."""

    def __init__(self, node: onnx.NodeProto, graph: Graph) -> None:
        attributes = attributes_of(node)
        self.input = graph.shape(node.input[0])[2:]
        self.output = graph.shape(node.output[0])[2:]
        kernel = attributes.get("kernel_shape") or graph.shape(node.input[1])[2:]
        axes = len(self.input)
        self.strides = list(attributes.get("strides") or [1] * axes)
        dilations = list(attributes.get("dilations") or [1] * axes)
        self.extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = list(attributes.get("pads") or [0] * (2 * axes))
        self.before, self.after = pads[:axes], pads[axes:]

    def padded_to(self) -> list[int]:
        """How far the last window reaches, in elements from the first one's start."""
        sizes = zip(self.output, self.strides, self.extent, strict=True)
        return [(count - 1) * stride + extent for count, stride, extent in sizes]


def _split_padding(total: Sequence[int], lower: bool) -> list[int]:
    """``pads`` (all begins, then all ends): SAME_UPPER puts the odd element at the end, SAME_LOWER at the begin."""
    small = [max(each, 0) // 2 for each in total]
    large = [max(each, 0) - s for each, s in zip(total, small, strict=True)]
    return large + small if lower else small + large


def _same_pads(node: onnx.NodeProto, graph: Graph) -> dict[str, Any]:
    """The node's attributes with ``pads`` in the place of ``auto_pad``."""
    attributes = attributes_of(node)
    mode = text_of(attributes.pop("auto_pad", "NOTSET"))
    if mode == "VALID":
        attributes.pop("pads", None)
    if mode.startswith("SAME"):
        windows = _Windows(node, graph)
        total = [
            reach - size
            for reach, size in zip(windows.padded_to(), windows.input, strict=True)
        ]
        attributes["pads"] = _split_padding(total, mode == "SAME_LOWER")
    return attributes


def convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """auto_pad=SAME_* fails in LLVM's verifier; pads take its place."""
    return [make_node(node, "Conv", node.input, node.output, **_same_pads(node, graph))]


def pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """SAME_*, as above; TVM refuses an unread Indices output, and counts the padding that ceil_mode adds."""
    if any(name in graph.read for name in node.output[1:]):
        raise refusal(
            node, "its Indices output is used, which TVM cannot make; pool without it"
        )
    attributes = _same_pads(node, graph)
    attributes.pop(
        "storage_order", None
    )  # The order of the Indices, which no node reads.
    source = node.input[0]
    padding: list[onnx.NodeProto] = []
    if attributes.pop("ceil_mode", 0):
        windows = _Windows(node, graph)
        reach = windows.padded_to()
        starts = [r - extent for r, extent in zip(reach, windows.extent, strict=True)]
        ends = zip(starts, windows.before, windows.input, strict=True)
        if any(start >= before + size for start, before, size in ends):
            raise refusal(
                node,
                "with ceil_mode its last window lies in the padding, where ONNX Runtime and "
                "ONNX's shapes disagree; export with ceil_mode off",
            )
        if attributes.get("count_include_pad") and any(windows.before + windows.after):
            # The padding counts but what ceil_mode adds does not, so a node of its own pads first.
            source = graph.fresh(f"{node.output[0]}/padded")
            pads = [0, 0, *windows.before, 0, 0, *windows.after]
            padding.append(_pad_node(node, graph, node.input[0], source, pads))
            sizes = zip(windows.before, windows.input, windows.after, strict=True)
            sizes_in, begin = [sum(each) for each in sizes], [0] * len(reach)
        else:
            sizes_in, begin = list(windows.input), windows.before
        attributes["count_include_pad"] = 0
        needs = zip(reach, begin, sizes_in, strict=True)
        attributes["pads"] = begin + [max(0, r - b - size) for r, b, size in needs]
    if node.op_type != "AveragePool":
        attributes.pop("count_include_pad", None)
    return [
        *padding,
        make_node(node, node.op_type, [source], node.output[:1], **attributes),
    ]


def transposed_convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """auto_pad depends on the installed ONNX Runtime; TVM has no schedule for dilations, so the weights get zeros."""
    attributes = attributes_of(node)
    mode = text_of(attributes.pop("auto_pad", "NOTSET"))
    windows = _Windows(node, graph)
    if "output_shape" in attributes or mode.startswith("SAME"):
        attributes.pop("output_shape", None)
        extra = attributes.get("output_padding") or [0] * len(windows.strides)
        sizes = zip(
            windows.strides,
            windows.input,
            windows.extent,
            extra,
            windows.output,
            strict=True,
        )
        total = [s * (i - 1) + k + e - o for s, i, k, e, o in sizes]
        attributes["pads"] = _split_padding(total, mode != "SAME_UPPER")
    inputs = list(node.input)
    dilations = attributes.pop("dilations", None) or []
    if any(each != 1 for each in dilations):
        weights = graph.constant(node, 1)
        assert weights is not None
        holed = np.zeros((*weights.shape[:2], *windows.extent), weights.dtype)
        holes: tuple[Any, ...] = tuple(slice(None, None, each) for each in dilations)
        holed[(slice(None), slice(None), *holes)] = weights
        inputs[1] = graph.add_constant(f"{node.input[1]}/dilated", holed, holed.dtype)
        attributes["kernel_shape"] = windows.extent
    return [make_node(node, "ConvTranspose", inputs, node.output, **attributes)]


def _pad_node(
    node: onnx.NodeProto,
    graph: Graph,
    source: str,
    output: str,
    pads: Sequence[int],
    mode: str = "constant",
    value: float = 0.0,
) -> onnx.NodeProto:
    if graph.opset < 11:
        return make_node(
            node, "Pad", [source], [output], pads=list(pads), mode=mode, value=value
        )
    amounts = graph.add_constant(f"{output}/pads", pads, np.int64)
    fill = graph.add_constant(f"{output}/value", value, np.float32)
    return make_node(node, "Pad", [source, amounts, fill], [output], mode=mode)


def pad(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Axes (opset 18) abort the importer, so pads of all axes are given; mode wrap is unknown."""
    attributes = attributes_of(node)
    mode = text_of(attributes.get("mode", "constant"))
    if mode == "wrap":
        raise refusal(
            node, "mode wrap is not known to TVM; pad with constant, edge or reflect"
        )
    if graph.opset < 11:
        return [node]
    pads, axes, value = (graph.constant(node, index) for index in (1, 3, 2))
    assert pads is not None
    rank = len(graph.shape(node.input[0]))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    full = np.zeros((2, rank), np.int64)
    full[:, list(chosen)] = pads.reshape(2, -1)
    fill = 0.0 if value is None or not value.size else float(value.flat[0])
    flat = full.ravel().tolist()
    return [_pad_node(node, graph, node.input[0], node.output[0], flat, mode, fill)]
