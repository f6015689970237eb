"""Models in float16, bfloat16 or double as float32 models: the one type of real numbers that the compiler reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from netship.compile.frontend.fold import UNKNOWN, is_onnx, value_of, values
from netship.compile.frontend.fold import fold as folded
from netship.compile.frontend.model_file import tensors
from netship.targets.escapes import shown

OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Attributes that name the type of what a node makes or computes in.
_TYPES = ("dtype", "output_datatype", "output_dtype", "precision", "to")
_LARGEST = float(np.finfo(np.float32).max)


def as_float32(static: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model with float32 in the place of other types of real numbers; a note for a person where that changes it.

    float16 and bfloat16 convert exactly. A double is rounded, and one beyond float32's range becomes its largest number,
    as it stands in limits and masks. What exporters compute from constants is computed before, in the model's own type.

    Args:
        static: a valid model of static shapes, its weights checked.
    """
    found = Counter(_types(static))
    if not found:
        return static, ()
    if all(is_onnx(node.domain) for node in static.graph.node):
        static = folded(static)
    wide = onnx.ModelProto()
    wide.CopyFrom(static)
    for tensor in tensors(wide):
        if tensor.data_type in OTHER_FLOATS:
            exact = numpy_helper.to_array(tensor).astype(np.float64)
            inside = np.clip(exact, -_LARGEST, _LARGEST)
            value = np.where(np.isfinite(exact), inside, exact).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i in OTHER_FLOATS:
                attribute.i = TensorProto.FLOAT
    graph = wide.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in OTHER_FLOATS:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    _drop_casts(graph)
    given = [
        f"{what} {shown(info.name)!r}"
        for what, infos in (
            ("input", static.graph.input),
            ("output", static.graph.output),
        )
        for info in infos
        if info.type.tensor_type.elem_type in OTHER_FLOATS
    ]
    return wide, tuple(_notes(found, given))


def _types(proto: onnx.ModelProto) -> Iterable[int]:
    """Of tensors and nodes: the types of real numbers that are not float32."""
    graph = proto.graph
    for info in (*graph.input, *graph.output):
        yield from {value_of(info).dtype}.intersection(OTHER_FLOATS)
    for tensor in tensors(proto):
        yield from {tensor.data_type}.intersection(OTHER_FLOATS)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPES:
                yield from {attribute.i}.intersection(OTHER_FLOATS)


def _drop_casts(graph: onnx.GraphProto) -> None:
    """Remove the casts of float32 to float32, but those that make an output."""
    known = values(graph)
    kept, same = [], dict[str, str]()
    outputs = {each.name for each in graph.output}
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Cast" and node.output[0] not in outputs:
            to = helper.get_node_attr_value(node, "to")
            if known.get(node.input[0], UNKNOWN).dtype == to == TensorProto.FLOAT:
                same[node.output[0]] = node.input[0]
                continue
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _notes(found: Counter[int], given: list[str]) -> Iterable[str]:
    names = " and ".join(TensorProto.DataType.Name(each).lower() for each in found)
    rounded = TensorProto.DOUBLE in found
    how = "rounded to float32" if rounded else "which converts to float32 exactly"
    ports = f"; float32: {', '.join(given)}" if given else ""
    yield f"the model is in {names}, {how}{ports}"
