"""Relay operators of our own: how one is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te
from tvm.relay.transform.infer_layout_utils import InferCorrectLayoutOutput


class _Described(NamedTuple):
    """What the compiler must know of an operator of ours; the defaults are those of TVM's operators."""

    macs: Callable[[Any], int] = lambda call: 0
    layers: int = 1
    symbol: Callable[[Any], str] = lambda call: ""


_OPERATORS: dict[str, _Described] = {}


def described(call: Any) -> _Described:
    """What is known of the operator of a call."""
    return _OPERATORS.get(call.op.name, _Described())


def register(
    name: str,
    description: str,
    arguments: Sequence[str],
    relation: Callable[[Any, Any], Any],
    pattern: int,
    **facts: Any,
) -> Any:
    """An operator of tensors, without a schedule yet.

    Args:
        relation: the result's type, of the arguments' types and the attributes.
        pattern: one of ``relay.op.OpPattern``: what it is fused with.
        facts: ``macs``, a call's multiply-adds; ``layers`` of the network that the operator stands for; ``symbol``, of
            the C function that a call is of.
    """
    _OPERATORS[name] = _Described(**facts)
    relay.op.op.register(name, description)
    operator = relay.op.get(name)
    operator.set_num_inputs(len(arguments))
    for argument in arguments:
        operator.add_argument(argument, "Tensor", "")
    operator.set_attrs_type_key("DictAttrs")
    operator.add_type_rel(name.replace(".", "_"), relation)
    operator.set_support_level(1)
    operator.set_attr("TOpPattern", pattern)
    operator.set_attr("TOpIsStateful", False)
    return operator


def _as_written(_: Any, outputs: Any, target: Any) -> Any:
    return te.create_schedule([output.op for output in outputs])


def use(
    operator: Any,
    compute: Callable[..., Any],
    schedule: Callable[..., Any] = _as_written,
) -> None:
    """On every target, ``compute`` and ``schedule``; without one, the loops as they are written."""

    def strategy(_: Any, inputs: Any, output_type: Any, target: Any) -> Any:
        chosen = relay.op.OpStrategy()
        chosen.add_implementation(compute, schedule, name=operator.name)
        return chosen

    operator.set_attr("FTVMStrategy", tvm.target.generic_func(strategy))


def call(name: str, arguments: Sequence[Any], **attributes: Any) -> Any:
    """A call of an operator of ours."""
    attrs = tvm.ir.make_node("DictAttrs", **attributes)
    return relay.Call(relay.op.get(name), list(arguments), attrs)


def layouts(attrs: Any, new: Any, old: Any, types: Any) -> Any:
    """Whatever layout the first input has, for ``FInferCorrectLayout``; of what is no image none is made up."""
    found = [*(new or ()), *old]
    default = "NCHW" if len(types[0].shape) == 4 else "__undef__"
    layout = next((each for each in found if each), tvm.tir.layout(default))
    return InferCorrectLayoutOutput([layout] * len(old), [layout], attrs)


def named(made: Any, layer: str) -> Any:
    """A call that stands for a layer, by its node's name in the ONNX graph."""
    span = relay.Span(relay.SourceName(layer), 0, 0, 0, 0)
    return relay.Call(made.op, made.args, made.attrs, made.type_args, span)
