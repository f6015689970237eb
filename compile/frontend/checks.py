"""What the gate checks of a graph: functions, operators, order of nodes, weights."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.inliner import inline_local_functions

from netship.compile.frontend.fold import constant_value, is_onnx, opset
from netship.compile.frontend.limits import MAX_NODES
from netship.compile.frontend.model_file import tensors
from netship.compile.frontend.names import Unfit, node_label
from netship.compile.frontend.quantised.operators import is_dynamic, is_taken
from netship.compile.frontend.widening import OTHER_FLOATS
from netship.targets.escapes import shown

_WEIGHTED = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Mul")

_AUTO_PADS = (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")
_CONTROL_FLOW = frozenset(["If", "Loop", "Scan", "SequenceMap"])


def inlined_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    _check_expansion(proto)
    return inline_local_functions(proto)


def _check_expansion(proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves or expand to more than MAX_NODES nodes."""
    bodies = {(f.domain, f.name): f.node for f in proto.functions}
    calls = {
        key: {(n.domain, n.op_type) for n in nodes} & bodies.keys()
        for key, nodes in bodies.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        raise Unfit(
            f"function {shown(error.args[1][0][1])!r} calls itself; export again"
        ) from None
    sizes: dict[tuple[str, str], int] = {}
    for key in order:
        sizes[key] = sum(sizes.get((n.domain, n.op_type), 1) for n in bodies[key])
    total = sum(sizes.get((n.domain, n.op_type), 1) for n in proto.graph.node)
    if total > MAX_NODES:
        raise Unfit(
            f"its functions expand to {total} nodes, more than the {MAX_NODES} allowed"
        )


def check_nodes(proto: onnx.ModelProto) -> None:
    graph, version = proto.graph, opset(proto)
    if not graph.node:
        raise Unfit("the graph has no nodes; export a network")
    if graph.sparse_initializer:
        raise Unfit("sparse initializers are not supported; export dense weights")
    dynamic = Counter(node.op_type for node in graph.node if is_dynamic(node))
    for name, count in dynamic.most_common(1):
        raise Unfit(
            f"is quantised dynamically, by {count} {shown(name)} nodes that find scales while it runs; quantise it "
            "statically (onnxruntime.quantization.quantize_static), or give the float32 model with --quantize int8"
        )
    for node in graph.node:
        if node.op_type in _CONTROL_FLOW or any(
            each.HasField("g") or each.graphs for each in node.attribute
        ):
            raise Unfit(
                f"{node_label(node)}: control flow is not supported; export the network without branches or loops"
            )
        if is_taken(node):
            continue
        if not is_onnx(node.domain):
            raise Unfit(
                f"{node_label(node)}: is of the domain {shown(node.domain)!r}, only ai.onnx is supported; "
                "export without custom or fused operators"
            )
        for each in node.attribute:
            if each.name == "auto_pad" and each.s not in _AUTO_PADS:
                raise Unfit(
                    f"{node_label(node)}: auto_pad {shown(each.s.decode(errors='replace'), 40)!r} "
                    "is not one of ONNX's; export it again"
                )
        if not onnx.defs.has(node.op_type, max_inclusive_version=version):
            raise Unfit(
                f"{node_label(node)}: is not an operator of ONNX opset {version}; export without it"
            )


def check_order(graph: onnx.GraphProto) -> None:
    """Refuse an input that no earlier node produces."""
    made = {each.name for each in (*graph.input, *graph.initializer)}
    for node in graph.node:
        for name in node.input:
            if name and name not in made:
                raise Unfit(_why_not_made(graph, node, name))
        made.update(node.output)


def _why_not_made(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> str:
    """A missing node, a cycle or a wrong order."""
    maker = {
        name: index
        for index, node in enumerate(graph.node)
        for name in node.output
        if name
    }
    if name not in maker:
        return f"{node_label(node)}: reads {shown(name)!r}, which nothing makes; export it again"
    edges = {
        index: {maker[each] for each in node.input if each in maker}
        for index, node in enumerate(graph.node)
    }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found = (node_label(graph.node[index]) for index in error.args[1][:4])
        return f"its nodes form a cycle ({' → '.join(found)}); export a feed-forward network"
    return (
        f"{node_label(node)}: reads {shown(name)!r} before it is made; "
        "sort the nodes or export it again"
    )


def check_all_inlined(proto: onnx.ModelProto) -> None:
    """Refuse external data in a model that is no file: onnx.checker would look for it in the working directory."""
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise Unfit(
                f"tensor {shown(tensor.name)!r}: has external data; give the model as a file"
            )


def check_weights(proto: onnx.ModelProto) -> None:
    """Refuse NaN, and infinite weights of what multiplies by them; a limit or an attention's mask may be infinite."""
    multiplied = {
        name
        for node in proto.graph.node
        if node.op_type in _WEIGHTED
        for name in node.input
    }
    constants = (node for node in proto.graph.node if node.op_type == "Constant")
    made = filter(None, map(constant_value, constants))
    for tensor in (*proto.graph.initializer, *made):
        try:
            array = numpy_helper.to_array(tensor)
        except ValueError:
            raise Unfit(
                f"weights {shown(tensor.name)!r}: their bytes do not fill the shape {list(tensor.dims)[:8]}; "
                "export it again"
            ) from None
        if tensor.data_type not in (TensorProto.FLOAT, *OTHER_FLOATS):
            continue
        if np.isnan(array).any():
            kind = "NaN"
        elif tensor.name in multiplied and np.isinf(array).any():
            kind = "infinite values"
        else:
            continue
        raise Unfit(
            f"weights {shown(tensor.name)!r} hold {kind}; train or export it again"
        )
