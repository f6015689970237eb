"""Float32 operators into Relay, by TVM's ONNX importer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import onnx
from onnx import helper, numpy_helper

from netship.compile.frontend.names import node_label
from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.onnx_form import write
from netship.targets.engine import compiler
from netship.targets.errors import UserError, reason
from netship.targets.escapes import listed, shown

# Known to the importer, but not built: their answer changes with every run, or TVM cannot schedule them.
_NOT_BUILT = {
    *("Bernoulli", "Hardmax", "Multinomial"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
}


def to_relay(
    graph: Graph, own: Callable[[Operator, list[Any]], list[Any] | None] | None = None
) -> Any:
    """A float32 network as a Relay module: static, its weights constants.

    Each operator is imported alone. Of a whole graph TVM's importer folds and types at each node all that lies before it,
    which takes minutes for a thousand nodes.

    Args:
        own: makes the outputs of operators of ours from their inputs, and None of others.

    Raises:
        UserError: an operator that TVM does not know, a form it cannot import, or one to which it gives another
            shape than ONNX does; the node is named.
    """
    tvm = compiler()
    relay = tvm.relay
    # Operators of ours have kinds in lower case.
    of_onnx = [each for each in graph.operators if not each.kind.islower()]
    _check_known(of_onnx, graph.opset)
    arguments = [relay.var(x.name, shape=x.shape, dtype=x.dtype) for x in graph.inputs]
    values = dict(zip([x.name for x in graph.inputs], arguments, strict=True))
    constants: dict[Any, Any] = {}
    for each in graph.operators:
        inputs = [values[x.name] for x in each.activations]
        outputs = own(each, inputs) if own else None
        if outputs is None:
            outputs = operator(each, inputs, graph.opset, constants)
        values |= zip([x.name for x in each.outputs], outputs, strict=True)
    results = [values[x.name] for x in graph.outputs]
    body = results[0] if len(results) == 1 else relay.Tuple(results)
    module = tvm.IRModule.from_expr(relay.Function(arguments, body))
    return relay.transform.InferType()(module)


def operator(
    operator: Operator,
    inputs: list[Any],
    opset: int,
    constants: dict[Any, Any] | None = None,
) -> list[Any]:
    """The outputs of one operator as Relay expressions.

    Args:
        inputs: expressions, one for each of ``operator.activations``.
        constants: those of the operators before, by their values; of two that are equal the library then has one.

    Raises:
        UserError: as `to_relay`.
    """
    tvm = compiler()
    _check_known([operator], opset)
    if _drops_fractions(operator):
        # TVM's SimplifyExpr takes clip, cast to the clip's range and cast back for the clip alone: fractions would stay.
        inputs = [tvm.relay.trunc(each) for each in inputs]
    if operator.kind == "Round":
        return [_to_even(inputs[0], operator.input.dtype)]
    # One may be read twice.
    given = dict(zip(operator.activations, inputs, strict=True))
    alone = Graph(tuple(given), operator.outputs, (operator,), opset)
    label = node_label(_node(operator))
    function = _import(_with_axes_as_attributes(write(alone)), opset, label)
    _compare_shapes(function, operator.outputs, label)
    bound = dict(zip(function.params, given.values(), strict=True))
    body = _with_shared(function.body, {} if constants is None else constants)
    body = tvm.relay.bind(body, bound)
    if len(operator.outputs) == 1:
        return [body]
    return [
        tvm.relay.TupleGetItem(body, index) for index in range(len(operator.outputs))
    ]


def _to_even(x: Any, dtype: str) -> Any:
    """Round: the importer rounds x - 0.5 first, another number where x is large or next to -0.5; of infinity it has NaN."""
    relay = compiler().relay
    half, two = relay.const(0.5, dtype), relay.const(2.0, dtype)
    low = relay.floor(x)
    fraction = x - low
    is_odd = relay.greater(low - relay.floor(low * half) * two, half)
    reaches = relay.greater_equal(fraction, half), relay.greater(fraction, half)
    return low + relay.cast(relay.where(is_odd, *reaches), dtype)


def _drops_fractions(operator: Operator) -> bool:
    if operator.kind != "Cast":
        return False
    source, to = operator.input.dtype, operator.output.dtype
    return source.startswith("float") and to.startswith(("int", "uint"))


def _with_shared(body: Any, constants: dict[Any, Any]) -> Any:
    relay = compiler().relay

    class Sharing(relay.ExprMutator):  # type: ignore[misc, name-defined]
        def visit_constant(self, const: Any) -> Any:
            value = const.data.numpy()
            key = value.dtype.str, value.shape, blake2b(value.tobytes()).digest()
            return constants.setdefault(key, const)

    return Sharing().visit(body)


def _check_known(operators: Sequence[Operator], opset: int) -> None:
    known = _frontend()._get_convert_map(opset)
    unknown = [
        each for each in operators if each.kind not in known or each.kind in _NOT_BUILT
    ]
    if unknown:
        named = listed([node_label(_node(each)) for each in unknown], 3)
        raise UserError(
            f"{named}: not an operator that TVM 0.19 can build; replace it before exporting"
        )


def _node(operator: Operator) -> onnx.NodeProto:
    """What names the operator in an error."""
    outputs = [each.name for each in operator.outputs]
    return helper.make_node(operator.kind, [], outputs, operator.name)


@cache
def _frontend() -> Any:
    compiler()
    from tvm.relay.frontend import onnx as frontend

    # It makes its table of operators anew three times for each import.
    frontend._get_convert_map = cache(frontend._get_convert_map)
    return frontend


def _with_axes_as_attributes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Of axes given as an input the importer takes the first alone, or dies: not always valid ONNX, for the importer only."""
    constants = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
    return proto


def _import(proto: onnx.ModelProto, opset: int, label: str) -> Any:
    """The one node of a graph as a typed function."""
    shapes = {
        each.name: tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim)
        for each in proto.graph.input
    }
    try:
        with warnings.catch_warnings():
            # The importer runs onnx.checker, which rightly objects to for_relay's reductions.
            warnings.simplefilter("ignore")
            module, _ = _frontend().from_onnx(
                proto, shapes, opset=opset, freeze_params=True
            )
        return compiler().relay.transform.InferType()(module)["main"]
    except Exception as error:
        why = shown(reason(error), 120)
        raise UserError(
            f"{label}: TVM cannot import it ({why}); replace it before exporting"
        ) from error


def _compare_shapes(function: Any, outputs: Sequence[Tensor], label: str) -> None:
    made = function.checked_type.ret_type
    types = list(getattr(made, "fields", [made]))
    for output, got in zip(outputs, types, strict=True):
        actual = tuple(int(dim) if hasattr(dim, "value") else None for dim in got.shape)
        if actual != output.shape:
            raise UserError(
                f"{label}: TVM gives {shown(output.name)!r} the shape {actual}, ONNX {output.shape}; "
                "this is a fault of the importer: please report the model's operators"
            )
