"""Biases corrected for the rounding of weights (Nagel et al., arXiv 1906.04721, section 4.2).

A weight that is rounded by e moves its output by e times the input, and by e times the input's mean on average over
the images. The bias takes that back, so that no channel is shifted as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from netship.compile.frontend.canonical.graph import attributes_of
from netship.compile.frontend.names import fresh_names
from netship.compile.frontend.reference import with_outputs
from netship.targets.onnx_runtime import Session

Array = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]


def corrected(
    proto: onnx.ModelProto, images: Sequence[Feeds], kept: Collection[str]
) -> onnx.ModelProto:
    """The float32 network with the biases that its int8 weights ask for.

    Args:
        proto: batch normalisation folded.
        images: the inputs of inferences, by name.
        kept: names of nodes whose weights are not quantised.
    """
    constants = {
        each.name: numpy_helper.to_array(each) for each in proto.graph.initializer
    }
    nodes = [
        node
        for node in proto.graph.node
        if node.op_type in ("Conv", "Gemm")
        and node.name not in kept
        and node.input[1] in constants
        and node.input[0] not in constants
        # Its channels would lie along the first axis.
        and not attributes_of(node).get("transA", 0)
        and all(name in constants for name in node.input[2:3] if name)
    ]
    means = _means(proto, {node.input[0] for node in nodes}, images)
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    fresh = fresh_names([*constants, *(x for n in proto.graph.node for x in n.output)])
    wanted = {node.output[0]: node for node in nodes}
    for node in changed.graph.node:
        if node.output[0] not in wanted:
            continue
        attributes = attributes_of(node)
        weights = constants[node.input[1]]
        if node.op_type == "Gemm":
            weights = weights if attributes.get("transB") else weights.T
            weights = weights * np.float32(attributes.get("alpha", 1.0))
        shift = _shift(weights, means[node.input[0]], attributes.get("group", 1))
        if len(node.input) > 2 and node.input[2]:
            old = constants[node.input[2]]
            if old.shape != shift.shape or attributes.get("beta", 1.0) != 1:
                continue
            shift = shift - old
        name = fresh(f"{node.output[0]}/bias")
        changed.graph.initializer.append(numpy_helper.from_array(-shift, name))
        del node.input[2:]
        node.input.append(name)
    return changed


def rounding(weights: Array) -> Array:
    """By how much ONNX Runtime's quantiser moves weights [outputs, …]: symmetric, int8, one scale an output."""
    axes = tuple(range(1, weights.ndim))
    largest = np.abs(weights).max(axis=axes, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    moved: Array = np.rint(weights / scale) * scale - weights
    return moved


def _shift(weights: Array, means: Array, groups: int) -> Array:
    """What rounding moves each output by on average, the border's padding not counted."""
    moved = rounding(weights)
    by_input = moved.reshape(*moved.shape[:2], -1).sum(axis=2)
    outputs, inputs = by_input.shape
    rows = np.repeat(means.reshape(groups, inputs), outputs // groups, axis=0)
    shift: Array = (by_input * rows).sum(axis=1).astype(np.float32)
    return shift


def _means(
    proto: onnx.ModelProto, names: Collection[str], images: Sequence[Feeds]
) -> Mapping[str, Array]:
    """Of each tensor [1, channels, …] the mean of each channel over all images."""
    sources = {each.name for each in proto.graph.input}
    asked = sorted(set(names) - sources)
    session = Session(with_outputs(proto, asked).SerializeToString(), "the network")
    sums: dict[str, Array] = {}
    for image in images:
        found = session.run(asked, dict(image)) if asked else []
        known = {**image, **dict(zip(asked, found, strict=True))}
        for name in names:
            values = known[name]
            axes = (0, *range(2, values.ndim))
            sums[name] = sums.get(name, np.float32(0)) + values.mean(axis=axes)
    return {name: total / np.float32(len(images)) for name, total in sums.items()}
