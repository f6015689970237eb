"""Constant folding of ONNX graphs: it removes the nodes by which exporters compute shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from netship.compile.frontend.limits import check_ranks
from netship.compile.frontend.names import Unfit, node_label

# Pure functions of their inputs, which exporters use between Shape and Reshape or on weights.
_FOLDABLE = frozenset(
    re.findall(
        r"\w+",
        """
    Abs Add And BatchNormalization Cast Ceil Concat ConstantOfShape Div Equal Exp Expand Flatten Floor Gather Greater Identity Less
    Max Min Mod Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Reshape Shape
    Size Slice Sqrt Squeeze Sub Tile Transpose Unsqueeze Where
    """,
    )
)
# What is never folded: quantised weights stay as they are, and an answer that is random has no value.
_KEPT = frozenset(
    re.findall(
        r"\w+",
        """
    Bernoulli DequantizeLinear Dropout DynamicQuantizeLinear Multinomial QuantizeLinear RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike
    """,
    )
)
# Rounds over the whole graph; what they leave is folded node by node, in one pass.
_ROUNDS = 4
# What a shape, padding or slice can have; inference needs the values of no larger constant.
_SHAPE_ELEMENTS = 64
# Elements that folding may add to a model: a hostile Expand must not fill the memory.
_LARGEST = 1 << 22
_BUDGET = 1 << 25
# And as often as that each weight may be computed anew, up to so many elements.
_PASSES, _MOST_WEIGHTS = 4, 1 << 27


class Value(NamedTuple):
    """What shape inference knows of a tensor; ``None`` for a rank or a dimension it does not know."""

    dtype: int
    shape: tuple[int | None, ...] | None

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The shape, where all of it is known."""
        if self.shape is None or None in self.shape:
            return None
        return tuple(dim or 0 for dim in self.shape)


UNKNOWN = Value(0, None)


def value_of(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return Value(tensor.elem_type, None)
    dims = (
        dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim
    )
    return Value(tensor.elem_type, tuple(dims))


def values(graph: onnx.GraphProto) -> dict[str, Value]:
    """Every tensor of a shape-inferred graph by name."""
    known = {
        info.name: value_of(info)
        for info in (*graph.value_info, *graph.input, *graph.output)
    }
    for tensor in graph.initializer:
        known[tensor.name] = Value(tensor.data_type, tuple(tensor.dims))
    return known


def opset(proto: onnx.ModelProto) -> int:
    """The version of ai.onnx that a model uses; 0 where it names none."""
    return max(
        (each.version for each in proto.opset_import if is_onnx(each.domain)), default=0
    )


def is_onnx(domain: str) -> bool:
    return domain in ("", "ai.onnx")


def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes of every tensor, strictly; onnx raises where they contradict each other.

    Without onnx's data propagation, which has no limit: 40 Concat nodes that double
    a tensor would take all memory. :func:`fold` does the same within a limit.
    """
    check_ranks(proto.graph)
    weights = {each.name: list(each.dims) for each in proto.graph.initializer}
    originals, shapes = {}, []
    for index, node in enumerate(proto.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        stand_in = _stand_in(node, weights, f"shape {index} of a stand-in")
        if stand_in is not None:
            originals[index] = node
            shapes += stand_in[1:]
            if len(originals) == 1:
                given, proto = proto, onnx.ModelProto()
                proto.CopyFrom(given)
            proto.graph.node[index].CopyFrom(stand_in[0])
    proto.graph.initializer.extend(shapes)
    _check_sizes(proto)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True
    )
    for index, node in originals.items():
        inferred.graph.node[index].CopyFrom(node)
    if shapes:
        del inferred.graph.initializer[-len(shapes) :]
    return inferred


def _check_sizes(proto: onnx.ModelProto) -> None:
    """Refuse what would end this process: onnx's inference of Slice asserts that no axis is less than empty."""
    version, opsets = opset(proto), list(proto.opset_import)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = _types(proto.graph)
    for node in proto.graph.node:
        if node.op_type == "Slice" and _is_backwards_through_nothing(
            node, types, constants
        ):
            raise Unfit(
                f"{node_label(node)}: goes backwards through an empty axis; export again"
            )
        types |= _infer_node(node, types, constants, version, opsets)
        for name in node.output:
            sizes = types[name].tensor_type.shape.dim if name in types else ()
            if any(dim.dim_value < 0 for dim in sizes):
                raise Unfit(
                    f"{node_label(node)}: an axis of its output has a negative size; export again"
                )


def _types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    types = {each.name: each.type for each in graph.input}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(
            tensor.data_type, tensor.dims
        )
    return types


def _is_backwards_through_nothing(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> bool:
    steps = constants.get(node.input[4]) if len(node.input) > 4 else None
    if steps is None or node.input[0] not in types:
        return False
    sizes = types[node.input[0]].tensor_type.shape.dim
    empty = any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in sizes)
    return empty and bool((numpy_helper.to_array(steps) < 0).any())


def _stand_in(
    node: onnx.NodeProto, weights: Mapping[str, list[int]], name: str
) -> list[Any] | None:
    """A node of the right shape, then its constant, where onnx infers none or not that of ONNX Runtime.

    Args:
        weights: the shape of each constant.
        name: of the new constant.
    """
    make = onnx.helper.make_node
    if node.op_type in ("GroupNormalization", "MeanVarianceNormalization"):
        return [make("Identity", node.input[:1], node.output)]
    if node.op_type == "MaxUnpool" and len(node.input) > 2 and node.input[2]:
        return [make("Reshape", [node.input[0], node.input[2]], node.output)]
    if node.op_type != "ConvTranspose":
        return None
    named = {
        each.name: onnx.helper.get_attribute_value(each) for each in node.attribute
    }
    if "output_shape" in named and node.input[1] in weights:
        # onnx stops at an output smaller than the input. A Reshape's 0 copies the batch's size.
        channels = weights[node.input[1]][1] * named.get("group", 1)
        sizes = np.array(
            [0, channels, *named["output_shape"][-len(weights[node.input[1]]) + 2 :]]
        )
        shape = numpy_helper.from_array(sizes.astype(np.int64), name)
        return [make("Reshape", [node.input[0], name], node.output), shape]
    if named.get("auto_pad", b"").startswith(b"SAME") and named.pop(
        "output_padding", 0
    ):
        return [make("ConvTranspose", node.input, node.output, **named)]
    return None


def fold(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the same outputs: constants folded, shapes inferred, dead nodes removed.

    ``Constant`` nodes become initializers. Folding stops, silently, at 2^25 elements beside four times those of the
    weights in all, or at 2^22 in one tensor: the nodes then stay.
    """
    weights = sum(prod(each.dims) for each in proto.graph.initializer)
    budget = _BUDGET + min(_PASSES * weights, _MOST_WEIGHTS)
    for round_ in count(1):
        if round_ == _ROUNDS:
            proto = _folded_in_order(proto, budget)
        proto = infer(proto)
        known = values(proto.graph)
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        read = names_read(proto.graph)
        kept = []
        for node in proto.graph.node:
            limit = min(budget, _LARGEST)
            folded = _evaluate(node, known, constants, opset(proto), limit, read)
            if folded is None:
                kept.append(node)
                continue
            budget -= prod(folded.dims) if node.op_type != "Constant" else 0
            constants[folded.name] = folded
        if len(kept) == len(proto.graph.node) or round_ > _ROUNDS:
            return proto
        proto = with_nodes(proto, kept, constants)
    raise AssertionError


def _folded_in_order(proto: onnx.ModelProto, budget: int) -> onnx.ModelProto:
    """The model with constants folded in one pass: each node's shape is inferred from those before it.

    A chain of shapes that each need the one before costs one pass, not one inference of the whole graph for each.
    """
    version = opset(proto)
    opsets = list(proto.opset_import)
    types = _types(proto.graph)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights = {name: list(each.dims) for name, each in constants.items()}
    read = names_read(proto.graph)
    kept = []
    for node in proto.graph.node:
        known_form, *shapes = _stand_in(node, weights, "a stand-in's shape") or [node]
        for shape in shapes:
            types[shape.name] = onnx.helper.make_tensor_type_proto(
                shape.data_type, shape.dims
            )
        given = (
            constants | {each.name: each for each in shapes} if shapes else constants
        )
        inferred = _infer_node(known_form, types, given, version, opsets)
        types |= inferred
        known = {
            name: value_of(onnx.helper.make_value_info(name, types[name]))
            for name in (*node.input, *node.output)
            if name in types
        }
        limit = min(budget, _LARGEST)
        folded = _evaluate(node, known, constants, version, limit, read)
        if folded is None:
            kept.append(node)
            continue
        budget -= prod(folded.dims) if node.op_type != "Constant" else 0
        constants[folded.name] = folded
    return with_nodes(proto, kept, constants)


def names_read(graph: onnx.GraphProto) -> set[str]:
    """The names of the tensors that a node reads, or that are outputs."""
    names = (name for node in graph.node for name in node.input)
    return {*names, *(each.name for each in graph.output)}


def _infer_node(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, onnx.TensorProto],
    version: int,
    opsets: list[onnx.OperatorSetIdProto],
) -> dict[str, onnx.TypeProto]:
    """The types of a node's outputs; nothing where they cannot be inferred: inference of the whole says why."""
    if any(name and name not in types for name in node.input):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version)
    inputs = {name: types[name] for name in node.input if name}
    data = {name: constants[name] for name in node.input if name in constants}
    small = {k: v for k, v in data.items() if prod(v.dims) <= _SHAPE_ELEMENTS}
    try:
        found: dict[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, node, inputs, small, opset_imports=opsets
        )
    except Exception:  # noqa: BLE001  (onnx has no public base class for it)
        return {}
    return found


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a ``Constant`` node, from whichever attribute holds it."""
    (attribute,) = node.attribute
    value: Any = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.asarray(value, np.float32), node.output[0])
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.asarray(value, np.int64), node.output[0])
    return None


def _evaluate(
    node: onnx.NodeProto,
    known: dict[str, Value],
    constants: dict[str, onnx.TensorProto],
    version: int,
    limit: int,
    read: set[str],
) -> onnx.TensorProto | None:
    """The node's first output where it is a constant of at most ``limit`` elements.

    Args:
        read: names that something needs; of the node's outputs none but the first may be one.
    """
    if not is_onnx(node.domain) or read.intersection(node.output[1:]):
        return None
    if node.op_type == "Constant":
        return constant_value(node)
    result = known.get(node.output[0], UNKNOWN)
    if node.op_type not in _FOLDABLE:
        limit = min(limit, _SHAPE_ELEMENTS)
        if not _is_shape_arithmetic(node, constants):
            return None
    if result.sizes is None or prod(result.sizes) > limit:
        return None
    if node.op_type in ("Shape", "Size"):
        sizes = known.get(node.input[0], UNKNOWN).sizes
        if sizes is None:
            return None
        # Only the shape matters, so the array has no bytes of its own.
        inputs = {node.input[0]: np.broadcast_to(np.float32(0), sizes)}
    else:
        names = [name for name in node.input if name]
        if any(name not in constants for name in names):
            return None
        inputs = {name: numpy_helper.to_array(constants[name]) for name in names}
    output = _run(node, inputs, version)
    if output is None or output.shape != result.sizes:
        return None
    tensor = numpy_helper.from_array(output, node.output[0])
    return tensor if tensor.data_type == result.dtype else None


def _is_shape_arithmetic(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether a node computes from constants that are no larger than a shape; any operator may."""
    graphs = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS
    names = [name for name in node.input if name]
    return (
        node.op_type not in _KEPT
        and not any(each.type in graphs for each in node.attribute)
        and all(name in constants for name in names)
        and all(prod(constants[name].dims) <= _SHAPE_ELEMENTS for name in names)
    )


def _run(
    node: onnx.NodeProto, inputs: dict[str, NDArray[Any]], version: int
) -> NDArray[Any] | None:
    from onnx.reference import ReferenceEvaluator

    opsets = [onnx.helper.make_opsetid("", version)]
    function = onnx.helper.make_function(
        "", "constant", list(inputs), node.output, [node], opsets
    )
    try:
        with np.errstate(all="ignore"):
            result: Any = ReferenceEvaluator(function).run(None, inputs, {})
    except Exception:  # noqa: BLE001  (the evaluator does not support every form of every operator)
        return None
    return np.asarray(result[0])


def with_nodes(
    proto: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> onnx.ModelProto:
    """A copy of the model with these nodes and constants, without those that no output needs."""
    needed = {output.name for output in proto.graph.output}
    live = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    copy = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    graph = copy.graph
    graph.name = proto.graph.name
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.node.extend(reversed(live))
    graph.initializer.extend(
        tensor for name, tensor in constants.items() if name in needed
    )
    graph.value_info.extend(
        info for info in proto.graph.value_info if info.name in needed
    )
    return copy
