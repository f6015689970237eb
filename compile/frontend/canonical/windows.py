"""Rules of operators with sliding windows: convolution, pooling; and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.compile.frontend.canonical.forms import axes_form, extreme
from netship.compile.frontend.canonical.graph import (
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
        self.kernel = np.array(kernel)
        self.extent = (self.kernel - 1) * dilations + 1
        # How far the last window reaches, in elements from the first one's start.
        self.reach = (self.output - 1) * self.strides + self.extent
        mode = text_of(attributes.get("auto_pad", "NOTSET"))
        pads = attributes.get("pads") if mode == "NOTSET" else None
        if mode.startswith("SAME"):
            pads = _split_padding(self.reach - self.input, mode == "SAME_LOWER")
        self.before, self.after = np.reshape(pads or [0, 0] * len(kernel), (2, -1))

    def pads(self) -> list[int]:
        """What the windows need at each end: ``pads`` without ``auto_pad`` and ``ceil_mode``."""
        after = np.maximum(self.reach - self.before - self.input, 0)
        return [*self.before.tolist(), *after.tolist()]


def _split_padding(total: NDArray[np.int64], lower: bool) -> list[int]:
    """``pads`` (all begins, then all ends): SAME_UPPER puts the odd element at the end, SAME_LOWER at the begin."""
    total = np.maximum(total, 0)
    small, large = (total // 2).tolist(), (total - total // 2).tolist()
    return [*large, *small] if lower else [*small, *large]


def _same_pads(node: onnx.NodeProto, windows: _Windows, least: int) -> dict[str, Any]:
    """The node's attributes with ``pads`` in the place of ``auto_pad``.

    Args:
        least: ONNX Runtime pads by less than 0 where SAME_UPPER's total is below this, SAME_LOWER's one lower.
    """
    attributes = attributes_of(node)
    mode = text_of(attributes.pop("auto_pad", "NOTSET"))
    if mode != "NOTSET":
        attributes.pop("pads", None)
    if mode.startswith("SAME"):
        attributes["pads"] = [*windows.before.tolist(), *windows.after.tolist()]
        total, least = windows.reach - windows.input, least - (mode == "SAME_LOWER")
        expected = -(-windows.input // windows.strides)
        if (
            np.any(windows.extent != windows.kernel)
            or np.any(total < least)
            or np.any(windows.output != expected)
        ):
            raise refusal(
                node,
                f"auto_pad={mode} with dilations, strides above the kernel or this ceil_mode is not the same in ONNX "
                "and in ONNX Runtime; export with pads",
            )
    return attributes


def convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """auto_pad=SAME_* fails in LLVM's verifier; pads take its place."""
    attributes = _same_pads(node, _Windows(node, graph), -2)
    return Chain(node, graph).end("Conv", *node.input, **attributes)


def _pool_pads(node: onnx.NodeProto, windows: _Windows) -> dict[str, Any]:
    attributes = _same_pads(node, windows, -1)
    last, end = windows.reach - windows.extent, windows.before + windows.input
    if attributes.get("ceil_mode") and np.any(last >= end):
        raise refusal(
            node,
            "with ceil_mode a window lies in the padding, where ONNX Runtime and ONNX's shapes disagree; export with "
            "ceil_mode off",
        )
    if np.any(windows.extent > end + windows.after):
        raise refusal(
            node,
            f"its window {windows.extent.tolist()} is larger than the padded tensor {(end + windows.after).tolist()}, "
            "of which ONNX makes no output; export with a smaller kernel, or with a global pool",
        )
    return attributes


def pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """SAME_*, as above; TVM refuses an unread Indices output, and counts the padding that ceil_mode adds."""
    if graph.read.intersection(node.output[1:]):
        raise refusal(
            node, "its Indices output is used, which TVM cannot make; pool without it"
        )
    windows = _Windows(node, graph)
    attributes = _pool_pads(node, windows)
    # The order of the Indices, which no node reads.
    attributes.pop("storage_order", None)
    chain, source = Chain(node, graph), node.input[0]
    if attributes.pop("ceil_mode", 0):
        before, after = windows.before, windows.after
        if attributes.get("count_include_pad") and np.any([before, after]):
            # The padding counts but what ceil_mode adds does not, so a node of its own pads first.
            pads = [0, 0, *before.tolist(), 0, 0, *after.tolist()]
            inputs, named = _pad_form(pads, 0.0, graph)
            source = chain.add("Pad", source, *inputs, **named)
            windows.input += before + after
            windows.before = 0 * before
        attributes["count_include_pad"] = 0
        attributes["pads"] = windows.pads()
    if node.op_type != "AveragePool":
        attributes.pop("count_include_pad", None)
    # ONNX Runtime's dilated windows start from the largest finite number too.
    if node.op_type != "MaxPool" or np.any(windows.extent != windows.kernel):
        return chain.end(node.op_type, source, **attributes)
    return extreme(chain, graph, node.op_type, source, **attributes)


def lp_pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM adds up x^p with its sign, and knows neither dilations nor default strides: sums of |x|^p instead."""
    windows = _Windows(node, graph)
    attributes = _pool_pads(node, windows)
    chain, p, source = Chain(node, graph), attributes.get("p", 2), node.input[0]
    powers, slides = _powers(chain, source, p), {"strides": windows.strides.tolist()}
    slides["pads"] = windows.pads()
    if np.any(windows.extent != windows.kernel):
        channels, dilations = graph.shape(source)[1], attributes["dilations"]
        ones = np.ones((channels, 1, *windows.kernel))
        sums = chain.add(
            "Conv", powers, ones, group=channels, dilations=dilations, **slides
        )
    else:
        kernel, counted = windows.kernel.tolist(), {"count_include_pad": 1}
        means = chain.add(
            "AveragePool", powers, kernel_shape=kernel, **counted, **slides
        )
        sums = chain.add("Mul", means, float(np.prod(kernel)))
    return _root(chain, sums, p)


def global_lp_pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """As `lp_pool`."""
    chain, p = Chain(node, graph), attributes_of(node).get("p", 2)
    axes = range(2, len(graph.shape(node.input[0])))
    inputs, named = axes_form("ReduceSum", axes, graph)
    powers = _powers(chain, node.input[0], p)
    return _root(chain, chain.add("ReduceSum", powers, *inputs, **named), p)


def global_max_pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """ONNX's reference evaluator, which answers for int8, takes the maximum over two axes whatever the rank."""
    rank = len(graph.shape(node.input[0]))
    if rank == 4:
        return [node]
    inputs, named = axes_form("ReduceMax", range(2, rank), graph)
    return Chain(node, graph).end("ReduceMax", node.input[0], *inputs, **named)


def _powers(chain: Chain, x: str, p: int) -> str:
    size = chain.add("Abs", x)
    return size if p == 1 else chain.add("Pow", size, float(p))


def _root(chain: Chain, x: str, p: int) -> list[onnx.NodeProto]:
    return chain.end("Identity", x) if p == 1 else chain.end("Pow", x, 1 / p)


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
    """Axes (opset 18) abort the importer, so pads of all axes are given; mode wrap, which is unknown, is a Gather."""
    mode = text_of(attributes_of(node).get("mode", "constant"))
    if graph.opset < 11:
        return [node]
    pads, axes, value = (graph.constant(node, index) for index in (1, 3, 2))
    assert pads is not None
    rank = len(graph.shape(node.input[0]))
    full = np.zeros((2, rank), np.int64)
    full[:, np.arange(rank) if axes is None else axes] = pads.reshape(2, -1)
    if mode == "wrap":
        chain, current = Chain(node, graph), node.input[0]
        for axis in np.flatnonzero(full.any(axis=0)).tolist():
            size, (before, after) = graph.shape(node.input[0])[axis], full[:, axis]
            # Negative pads cut first; what they leave is repeated.
            kept = np.arange(max(-before, 0), size - max(-after, 0))
            places = np.arange(-max(before, 0), kept.size + max(after, 0)) % kept.size
            current = chain.add("Gather", current, kept[places], axis=axis)
        return chain.end("Identity", current)
    fill: Any = 0.0 if value is None or not value.size else float(value.flat[0])
    if graph.dtype(node.input[0]) != onnx.TensorProto.FLOAT:
        fill = node.input[2] if value is not None else ""
    return Chain(node, graph).end("Pad", node.input[0], full.ravel(), fill, mode=mode)
