"""The rule of Resize and Upsample."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)
from compile.frontend.names import node_label
from targets.onnx_runtime import Session

# Elements of an axis's matrix: from and to 4096 takes a quarter of it.
_LARGEST_MATRIX = 1 << 26


def resize(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's nearest takes wrong neighbours at fractional scales; its linear and cubic fail in LLVM's verifier.

    Resizing is linear and separable, so each axis is a product with a constant matrix: ONNX Runtime's
    result for the identity. Where each output is one input, it is a Gather.
    """
    attributes = attributes_of(node)
    mode = text_of(attributes.get("coordinate_transformation_mode", ""))
    if mode == "tf_crop_and_resize":
        raise refusal(
            node, "tf_crop_and_resize is not supported; use half_pixel or align_corners"
        )
    if text_of(attributes.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        raise refusal(node, "keep_aspect_ratio_policy is not supported; give the sizes")
    chain, current = Chain(node, graph), node.input[0]
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    for axis in np.flatnonzero(np.not_equal(before, after)).tolist():
        matrix = _axis_matrix(node, graph, axis)
        if np.isin(matrix, (0, 1)).all() and (matrix.sum(axis=0) == 1).all():
            current = chain.add("Gather", current, matrix.argmax(axis=0), axis=axis)
        else:
            order = [each for each in range(len(before)) if each != axis] + [axis]
            last = chain.add("Transpose", current, perm=order)
            product = chain.add("MatMul", last, matrix)
            back = np.argsort(order).tolist()
            current = chain.add("Transpose", product, perm=back)
    return chain.end("Identity", current)


def _axis_matrix(node: onnx.NodeProto, graph: Graph, axis: int) -> NDArray[np.float32]:
    """[size before, size after]: ``x @ matrix`` resizes the last axis as ``node`` does ``axis``."""
    shape = graph.shape(node.input[0])
    before, after = shape[axis], graph.shape(node.output[0])[axis]
    attributes = attributes_of(node)
    if before * after > _LARGEST_MATRIX:
        raise refusal(
            node,
            f"resizes an axis from {before} to {after}, too large to compute; export with less",
        )
    axes = attributes.pop("axes", None) or range(len(shape))
    place = [each % len(shape) for each in axes].index(axis)
    has_region = node.op_type == "Resize" and graph.opset >= 11
    sizes = graph.constant(node, 3) if has_region else None
    if sizes is not None and sizes.size:
        inputs, value = ["x", "none", "none", "sizes"], np.array([1, 1, before, after])
    else:
        scales = attributes.pop("scales", None)
        if scales is None:
            scales = graph.constant(node, 2 if has_region else 1)
            assert scales is not None
        inputs = ["x", "none", "scales"] if has_region else ["x", "scales"]
        value = np.array([1, 1, 1, scales[place]], np.float32)
    if node.op_type == "Upsample" and graph.opset < 9:
        inputs, attributes["scales"] = ["x"], value.tolist()
    constants = {"none": np.zeros(0, np.float32), inputs[-1]: value}
    source, result = (
        helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, (1, 1, before, size)
        )
        for name, size in (("x", before), ("y", after))
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
    identity = np.eye(before, dtype=np.float32)[np.newaxis, np.newaxis]
    return np.asarray(session.run(["y"], {"x": identity})[0][0, 0])
