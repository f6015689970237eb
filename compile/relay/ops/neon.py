"""Relay's side of compile.kernels.neon: an operator is a call of a C function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netship.compile.kernels.neon.pack import KINDS, Kernel
from netship.compile.relay.ops import registration
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te, tir

_PREFIX = "netship.int8_"


def call(
    kernel: Kernel, symbol: str, inputs: Sequence[Any], shape: Sequence[int], name: str
) -> Any:
    """An operator in Relay, from ``inputs`` to int8 of ``shape``.

    Args:
        symbol: the C function's.
        name: its node's in the ONNX graph.
    """
    made = registration.call(
        _PREFIX + kernel.kind,
        [*inputs, relay.const(kernel.parameters)],
        symbol=symbol,
        units=kernel.units,
        tasks=kernel.tasks,
        macs=kernel.macs,
        shape=list(shape),
    )
    return registration.named(made, name)


def _relation(_: Any, attrs: Any) -> Any:
    return relay.TensorType([int(size) for size in attrs["shape"]], "int8")


def _compute(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    units, tasks = int(attrs["units"]), int(attrs["tasks"])

    def body(sources: Any, outputs: Any) -> Any:
        builder = tir.ir_builder.create()
        pointers = [source.access_ptr("r") for source in sources]
        pointers.append(outputs[0].access_ptr("w"))
        with builder.for_range(0, tasks, kind="parallel") as task:
            part = [tir.floordiv(each * units, tasks) for each in (task, task + 1)]
            builder.emit(tir.call_extern("int32", attrs["symbol"], *part, *pointers))
        return builder.get()

    return [te.extern(output_type.shape, inputs, body, dtype="int8", name="int8")]


for _kind in KINDS:
    _operator = registration.register(
        _PREFIX + _kind,
        "An integer operator in C for 64-bit ARM.",
        (*(("a", "b") if _kind == "addition" else ("data",)), "parameters"),
        _relation,
        relay.op.OpPattern.OPAQUE,
        macs=lambda call: int(call.attrs["macs"]),
        symbol=lambda call: str(call.attrs["symbol"]),
    )
    registration.use(_operator, _compute)
