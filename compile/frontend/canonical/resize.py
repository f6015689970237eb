"""The rule of Resize and Upsample."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)
from netship.compile.frontend.names import node_label
from netship.targets.onnx_runtime import Session

# Elements of an axis's matrix: from and to 4096 takes a quarter of it.
_LARGEST_MATRIX = 1 << 26
# Elements that ONNX Runtime resizes at once, and in all, to find an axis's matrix.
_AT_ONCE, _LARGEST_PROBE = 1 << 24, 1 << 30


def resize(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's nearest takes wrong neighbours at fractional scales; its linear and cubic fail in LLVM's verifier.

    Resizing is linear and separable, so each axis is a product with a constant matrix: ONNX Runtime's
    result for the identity. Where each output is one input, it is a Gather.
    """
    chain, current = Chain(node, graph), node.input[0]
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    crops = "tf_crop" in text_of(
        attributes_of(node).get("coordinate_transformation_mode", "")
    )
    if before == after and not crops:
        return chain.end("Identity", current)
    outside: Any = np.zeros(1, bool)
    for axis in range(len(before)):
        found = _axis_matrix(node, graph, axis)
        if found is None:
            continue
        matrix, beyond = found
        if matrix.shape[1] != after[axis]:
            raise refusal(
                node,
                f"ONNX gives axis {axis} {after[axis]} elements, ONNX Runtime {matrix.shape[1]}; give the sizes",
            )
        outside = outside | beyond.reshape(-1, *[1] * (len(before) - 1 - axis))
        if np.array_equal(matrix, np.eye(before[axis])):
            continue
        if np.isin(matrix, (0, 1)).all() and (matrix.sum(axis=0) == 1).all():
            current = chain.add("Gather", current, matrix.argmax(axis=0), axis=axis)
        else:
            if graph.dtype(node.input[0]) != onnx.TensorProto.FLOAT:
                raise refusal(
                    node, "resizes whole numbers by weights; cast them to float32 first"
                )
            order = [each for each in range(len(before)) if each != axis] + [axis]
            last = chain.add("Transpose", current, perm=order)
            product = chain.add("MatMul", last, matrix)
            back = np.argsort(order).tolist()
            current = chain.add("Transpose", product, perm=back)
    if outside.any():
        value = attributes_of(node).get("extrapolation_value", 0.0)
        current = chain.add("Add", current, outside * np.float32(value))
    return chain.end("Identity", current)


def _axis_matrix(
    node: onnx.NodeProto, graph: Graph, axis: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """How ``node`` resizes one axis; None where it stays as it is.

    Returns:
        [size before, size after], a matrix: ``x @ matrix`` resizes the last axis as ``node`` does ``axis``; and
        [size after]: which elements tf_crop_and_resize takes from outside the input, where the matrix is 0.
    """
    shape = graph.shape(node.input[0])
    before, after = shape[axis], graph.shape(node.output[0])[axis]
    attributes = attributes_of(node)
    axes = [
        each % len(shape) for each in attributes.pop("axes", None) or range(len(shape))
    ]
    crops = (
        text_of(attributes.get("coordinate_transformation_mode", ""))
        == "tf_crop_and_resize"
    )
    if crops:
        attributes["extrapolation_value"] = 1.0
    if axis not in axes:
        return None
    place, region = axes.index(axis), [0.0, 1.0]
    if crops:
        given = graph.constant(node, 1)
        assert given is not None
        region = given.reshape(2, -1)[:, place].tolist()
    has_region = node.op_type == "Resize" and graph.opset >= 11
    sizes = graph.constant(node, 3) if has_region else None
    # ONNX Runtime copies where no size changes, so the height does where this axis's size stays.
    height, taller = 1, 2 if before == after else 1
    if sizes is not None and sizes.size:
        wanted = [1, before + 1, taller, after]
        policy = text_of(attributes.get("keep_aspect_ratio_policy", "stretch"))
        if policy != "stretch":
            # Another axis may decide on the scale: one of its own beside this one has that ratio.
            ratios = [
                Fraction(int(s), shape[a]) for s, a in zip(sizes, axes, strict=True)
            ]
            ratio = min(ratios) if policy == "not_larger" else max(ratios)
            height = ratio.denominator
            last = before * math.ceil(ratio) if policy == "not_larger" else 1
            attributes["axes"], wanted = [2, 3], [ratio.numerator, last]
            if before * before * height > _LARGEST_PROBE:
                raise refusal(
                    node,
                    f"keeps the aspect ratio {ratio}, too large to compute; give the sizes that it has",
                )
        elif before == after and not crops:
            return None
        inputs, value = ["x", "region", "none", "sizes"], np.array(wanted)
    else:
        scales = attributes.pop("scales", None)
        if scales is None:
            scales = graph.constant(node, 2 if has_region else 1)
            assert scales is not None
        if scales[place] == 1 and region == [0, 1]:
            return None
        inputs = ["x", "region", "scales"] if has_region else ["x", "scales"]
        value = np.array([1, 1, taller, scales[place]], np.float32)
    # The identity that it resizes is as large as the longer side squared.
    if before * max(before, after) > _LARGEST_MATRIX:
        raise refusal(
            node,
            f"resizes an axis from {before} to {after}, too large to compute; export with less",
        )
    if node.op_type == "Upsample" and graph.opset < 9:
        inputs, attributes["scales"] = ["x"], value.tolist()
    bounds = [0, 0, 0, region[0], 1, 1, 1, region[1]]
    if len(value) == 2:
        bounds = [0, region[0], 1, region[1]]
    constants = {
        "none": np.zeros(0, np.float32),
        "region": np.array(bounds, np.float32),
        inputs[-1]: value,
    }
    source, result = (
        helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, (1, None, size, None)
        )
        for name, size in (("x", height), ("y", None))
    )
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(node.op_type, inputs, ["y"], **attributes)],
            "axis",
            [source],
            [result],
            [
                numpy_helper.from_array(constants[name], name)
                for name in dict.fromkeys(inputs[1:])
            ],
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=8,
    )
    session = Session(model.SerializeToString(), node_label(node))
    # Each unit vector, and zeros, where only what lies outside shows.
    vectors = np.eye(before + 1, before, dtype=np.float32)
    # Sizes of all axes, where they are given, say how many channels there are.
    parts = math.ceil(vectors.size * height / _AT_ONCE) if len(value) == 2 else 1
    made = np.concatenate(
        [
            session.run(
                ["y"], {"x": np.repeat(part[np.newaxis, :, np.newaxis], height, axis=2)}
            )[0][0, :, 0]
            for part in np.array_split(vectors, parts)
        ]
    )
    return made[:-1] * (made[-1] == 0), made[-1] != 0
