"""Float32 operators into Relay, by TVM's ONNX importer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper, numpy_helper

from netship.compile.frontend.fold import values
from netship.compile.frontend.names import node_label
from netship.compile.ir.graph import Graph, Operator
from netship.compile.ir.onnx_form import write
from netship.targets.engine import compiler
from netship.targets.errors import UserError, reason
from netship.targets.escapes import listed, shown

# Known to the importer, but not built: their answer changes with every run, or TVM cannot schedule them.
_NOT_BUILT = {
    *("Bernoulli", "Hardmax", "Multinomial"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
}


def to_relay(graph: Graph) -> Any:
    """A float32 network as a Relay module: static, its weights constants.

    Raises:
        UserError: an operator that TVM does not know, a form it cannot import, or an output
            whose shape is not the one ONNX gives it; the node or the output is named.
    """
    tvm = compiler()
    from tvm.relay.frontend import onnx as frontend

    proto = _with_axes_as_attributes(write(graph))
    known = frontend._get_convert_map(graph.opset).keys() - _NOT_BUILT
    unknown = [node for node in proto.graph.node if node.op_type not in known]
    if unknown:
        named = listed([node_label(node) for node in unknown], 3)
        raise UserError(
            f"{named}: not an operator that TVM 0.19 can build; replace it before exporting"
        )
    module = _import(tvm, proto, graph.opset)
    _compare_shapes(module, proto)
    return module


def operator(operator: Operator, inputs: list[Any], opset: int) -> list[Any]:
    """The outputs of one operator as Relay expressions.

    Args:
        inputs: expressions, one for each of ``operator.activations``.
    """
    tvm = compiler()
    # One may be read twice.
    given = dict(zip(operator.activations, inputs, strict=True))
    alone = Graph(tuple(given), operator.outputs, (operator,), opset)
    function = to_relay(alone)["main"]
    bound = dict(zip(function.params, given.values(), strict=True))
    body = tvm.relay.bind(function.body, bound)
    if len(operator.outputs) == 1:
        return [body]
    return [
        tvm.relay.TupleGetItem(body, index) for index in range(len(operator.outputs))
    ]


def _with_axes_as_attributes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Of axes given as an input the importer takes the first alone, or dies: not always valid ONNX, for the importer only."""
    constants = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
    return proto


def _import(tvm: Any, proto: onnx.ModelProto, version: int) -> Any:
    known = values(proto.graph)
    # Beforehand: the importer gives nameless nodes names of its own.
    labels = {node.output[0]: node_label(node) for node in proto.graph.node}
    shapes = {each.name: known[each.name].shape for each in proto.graph.input}
    try:
        with warnings.catch_warnings():
            # The importer runs onnx.checker, which rightly objects to for_relay's reductions.
            warnings.simplefilter("ignore")
            module, _ = tvm.relay.frontend.from_onnx(
                proto, shapes, opset=version, freeze_params=True
            )
        return tvm.relay.transform.InferType()(module)
    except Exception as error:
        why = shown(reason(error), 120)
        raise UserError(
            f"{_blamed(error, labels)}: TVM cannot import it ({why}); replace it before exporting"
        ) from error


def _blamed(error: BaseException, labels: Mapping[str, str]) -> str:
    """The node that was being converted, read from the importer's own frame; else the graph."""
    trace = error.__traceback__
    blamed = "the graph"
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        if isinstance(node, onnx.NodeProto):
            blamed = labels.get(node.output[0], blamed)
        trace = trace.tb_next
    return blamed


def _compare_shapes(module: Any, proto: onnx.ModelProto) -> None:
    made = module["main"].checked_type.ret_type
    types = list(getattr(made, "fields", [made]))
    known = values(proto.graph)
    for output, got in zip(proto.graph.output, types, strict=True):
        expected = known[output.name].shape
        actual = tuple(int(dim) if hasattr(dim, "value") else None for dim in got.shape)
        if actual != expected:
            raise UserError(
                f"output {shown(output.name)!r}: TVM gives it the shape {actual}, ONNX {expected}; "
                "this is a fault of the importer: please report the model's operators"
            )
