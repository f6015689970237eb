"""The operator graph into Relay: kernels of ours where the target has them, TVM's importer for everything else."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from netship.compile import passes
from netship.compile.ir.graph import NHWC, Graph, Operator, Tensor
from netship.compile.ir.operators import Convolution, float_shares, islands
from netship.compile.passes.bfloat16 import KIND
from netship.compile.passes.views import dequantise_before_views
from netship.compile.relay import generic, importer
from netship.compile.relay.integer_kernels import IntegerKernels
from netship.compile.relay.neon_kernels import NeonKernels, Source
from netship.compile.relay.ops import conv2d_bfloat16
from netship.targets import engine
from netship.targets.presets import Target

tvm = engine.compiler()
from tvm import relay


class Converted(NamedTuple):
    """A network in Relay.

    Attributes:
        module: with its constants inside; its inputs and outputs as the model has them.
        instruction: what integer kernels multiply by; empty where there are none.
        source: the C that it calls.
        islands: the operators that compute in float32 within an integer network, for a person.
        float_shares: of multiply-adds and of elements, see compile.ir.operators.
        half: it computes in float16.
        bfloat16: it has convolutions of bfloat16, which need channels last.
    """

    module: Any
    instruction: str = ""
    source: Source | None = None
    islands: tuple[str, ...] = ()
    float_shares: tuple[float, float] = (0.0, 0.0)
    half: bool = False
    bfloat16: bool = False


def to_relay(
    graph: Graph, target: Target, dump: passes.Dump = passes.no_dump
) -> Converted:
    """The network for ``target``; the integers of a quantised one are those of compile.ir.evaluate, bit by bit.

    Raises:
        UserError: an operator that TVM does not know, or a sum that does not fit 32 bits.
    """
    half = any(each.dtype == "float16" for each in graph.tensors.values())
    if any(each.kind == KIND for each in graph.operators):
        return Converted(importer.to_relay(graph, _in_bfloat16), bfloat16=True)
    if not graph.quantised:
        return Converted(importer.to_relay(graph), half=half)
    kernels: IntegerKernels | NeonKernels = (
        NeonKernels(target) if target.machine == "aarch64" else IntegerKernels(target)
    )
    # Inputs and outputs stay as the model has them, whatever the kernels store.
    ports = {each.name: each.dtype for each in (*graph.inputs, *graph.outputs)}
    graph = passes.run((*kernels.passes, dequantise_before_views), graph, dump)
    arguments = [
        relay.var(each.name, shape=each.shape, dtype=ports[each.name])
        for each in graph.inputs
    ]
    values: dict[str, Any] = {
        each.name: _laid_out(each, _stored_as(x, ports[each.name], each.dtype))
        for each, x in zip(graph.inputs, arguments, strict=True)
    }
    for operator in graph.operators:
        inputs = [values[each.name] for each in operator.activations]
        made = kernels.lower(operator, inputs)
        if made is not None:
            values[operator.output.name] = made
            continue
        if operator.attributes.get("order") == NHWC:
            # A view of the memory as it lies.
            outputs = [relay.reshape(inputs[0], operator.output.shape)]
        else:
            pairs = zip(operator.activations, inputs, strict=True)
            inputs = [_in_order(each, x) for each, x in pairs]
            outputs = generic.lower(operator, inputs, graph.opset)
        for tensor, output in zip(operator.outputs, outputs, strict=True):
            values[tensor.name] = _laid_out(tensor, output)
    outputs = [
        _stored_as(_in_order(each, values[each.name]), each.dtype, ports[each.name])
        for each in graph.outputs
    ]
    body = outputs[0] if len(outputs) == 1 else relay.Tuple(outputs)
    module = tvm.IRModule.from_expr(relay.Function(arguments, body))
    return Converted(
        relay.transform.InferType()(module),
        kernels.instruction,
        kernels.source,
        tuple(each.label for each in islands(graph)),
        float_shares(graph),
        half=half,
    )


def _in_bfloat16(operator: Operator, inputs: list[Any]) -> list[Any] | None:
    """A convolution of bfloat16; None of every other operator."""
    if operator.kind != KIND or not isinstance(operator, Convolution):
        return None
    weights = operator.constant(1)
    assert weights is not None
    made = conv2d_bfloat16.convolution(
        inputs[0],
        weights,
        operator.label,
        strides=operator.strides,
        dilation=operator.dilations,
        padding=operator.pads,
    )
    return [relay.nn.bias_add(made, relay.const(operator.bias.astype(np.float32)))]


def _stored_as(x: Any, dtype: str, wanted: str) -> Any:
    """Quantised values of int8 as uint8, or the other way round: their zero point moves with them."""
    if dtype == wanted:
        return x
    shift = relay.const(128 if wanted == "uint8" else -128, "int32")
    return relay.cast(relay.cast(x, "int32") + shift, wanted)


def _in_order(tensor: Tensor, x: Any) -> Any:
    """``x`` with its axes as ``tensor.shape`` has them, which kernels in C keep otherwise."""
    return relay.transpose(x, (0, 3, 1, 2)) if tensor.layout == NHWC else x


def _laid_out(tensor: Tensor, x: Any) -> Any:
    return relay.transpose(x, (0, 2, 3, 1)) if tensor.layout == NHWC else x
