"""Resize and Upsample as constant matrices, an axis at a time."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compile.frontend.canonical.graph import (
    Graph,
    attributes_of,
    make_node,
    refusal,
    text_of,
)
from compile.frontend.names import node_label
from targets.onnx_runtime import Session


def resize(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's nearest takes wrong neighbours at fractional scales; its linear and cubic fail in LLVM's verifier.

    Resizing is linear and separable, so each axis is a product with a constant matrix: ONNX Runtime's
    result for the identity. Where each output is one input, it is a Gather.
    """
    attributes = attributes_of(node)
    if (
        text_of(attributes.get("coordinate_transformation_mode", ""))
        == "tf_crop_and_resize"
    ):
        raise refusal(
            node, "tf_crop_and_resize is not supported; use half_pixel or align_corners"
        )
    if text_of(attributes.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        raise refusal(node, "keep_aspect_ratio_policy is not supported; give the sizes")
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    resized = [
        axis for axis, (m, n) in enumerate(zip(before, after, strict=True)) if m != n
    ]
    nodes, current = [], node.input[0]
    for axis in resized:
        matrix = _axis_matrix(node, graph, axis)
        result = graph.fresh(f"{node.output[0]}/axis{axis}")
        if np.isin(matrix, (0, 1)).all() and (matrix.sum(axis=0) == 1).all():
            picked = graph.add_constant(
                f"{result}/from", matrix.argmax(axis=0), np.int64
            )
            nodes.append(
                make_node(node, "Gather", [current, picked], [result], axis=axis)
            )
        else:
            order = [each for each in range(len(before)) if each != axis] + [axis]
            last, product = (
                graph.fresh(f"{result}/{stem}") for stem in ("last", "product")
            )
            weights = graph.add_constant(f"{result}/weights", matrix, np.float32)
            back = np.argsort(order).tolist()
            nodes += [
                make_node(node, "Transpose", [current], [last], perm=order),
                make_node(node, "MatMul", [last, weights], [product]),
                make_node(node, "Transpose", [product], [result], perm=back),
            ]
        current = result
    return [*nodes, make_node(node, "Identity", [current], node.output)]


def _axis_matrix(node: onnx.NodeProto, graph: Graph, axis: int) -> NDArray[np.float32]:
    """[size before, size after]: ``x @ matrix`` resizes the last axis as ``node`` does ``axis``."""
    before = graph.shape(node.input[0])[axis]
    after = graph.shape(node.output[0])[axis]
    attributes = attributes_of(node)
    upsample = node.op_type == "Upsample"
    sizes = None if upsample or graph.opset < 11 else graph.constant(node, 3)
    axes = attributes.pop("axes", None) or list(range(len(graph.shape(node.input[0]))))
    at = [each % len(graph.shape(node.input[0])) for each in axes].index(axis)
    none = numpy_helper.from_array(np.zeros(0, np.float32), "none")
    constants, inputs = [none], ["x"]
    if sizes is not None and sizes.size:
        given = np.array([1, 1, before, after], np.int64)
        constants.append(numpy_helper.from_array(given, "sizes"))
        inputs += ["none", "none", "sizes"]
    else:
        scales = attributes.pop("scales", None)
        if scales is None:
            found = graph.constant(node, 1 if upsample or graph.opset < 11 else 2)
            assert found is not None
            scales = found.tolist()
        scale = np.array([1, 1, 1, scales[at]], np.float32)
        if upsample and graph.opset < 9:
            attributes["scales"] = scale.tolist()
        else:
            constants.append(numpy_helper.from_array(scale, "scales"))
            inputs += ["scales"] if upsample or graph.opset < 11 else ["none", "scales"]
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
            [each for each in constants if each.name in inputs],
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=8,
    )
    session = Session(model.SerializeToString(), node_label(node))
    identity = np.eye(before, dtype=np.float32)[np.newaxis, np.newaxis]
    return np.asarray(session.run(["y"], {"x": identity})[0][0, 0])
