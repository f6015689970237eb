"""Sums that fit into 32 bits: coarser scales for channels whose bias nearly fills them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

from netship.compile.frontend.canonical.graph import attributes_of

# Largest of a sum's products, input less zero point times weight, for each unit of the weight; inputs are 8 bits.
_INPUT = 512
_LIMIT = 1 << 31


def make_room(proto: onnx.ModelProto) -> None:
    """Double the scales of channels until every sum fits, in a QDQ graph of ONNX Runtime's quantiser, in place.

    Where a channel's weights are tiny beside its bias, the quantiser takes the smallest scale with which the bias fits
    into 32 bits. Nothing is left for the products then. A coarser scale loses nothing that an output step shows.
    """
    tensors = {each.name: each for each in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node if node.output}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        parts = [makers.get(name) for name in node.input[1:3]]
        names = [
            list(part.input[:2])
            for part in parts
            if part is not None and part.op_type == "DequantizeLinear"
        ]
        every = [name for pair in names for name in pair]
        if len(every) != 4 or any(
            name not in tensors or readers[name] > 1 for name in every
        ):
            continue
        weights, scales, bias, bias_scales = (
            numpy_helper.to_array(tensors[name]) for name in every
        )
        if scales.ndim != 1 or bias.shape != scales.shape != bias_scales.shape:
            continue
        axis = attributes_of(makers[node.input[1]]).get("axis", 1)
        rows = np.moveaxis(weights, axis, 0).reshape(scales.size, -1).astype(np.int64)
        most = _INPUT * np.abs(rows).sum(axis=1) + np.abs(bias.astype(np.int64))
        factor = np.exp2(np.ceil(np.log2(np.maximum(most / (_LIMIT - 1), 1))))
        if factor.max() == 1:
            continue
        shape = [1] * weights.ndim
        shape[axis] = -1
        changed = (
            np.rint(weights / factor.reshape(shape)).astype(weights.dtype),
            (scales * factor).astype(scales.dtype),
            np.rint(bias / factor).astype(bias.dtype),
            (bias_scales * factor).astype(bias_scales.dtype),
        )
        for name, values in zip(every, changed, strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))
