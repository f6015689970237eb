"""A value that lies in memory: what reads it does not compute it again, whenever TVM fuses.

`annotation.stop_fusion` is gone where TVM fuses again, which it does once weights lie as tuning records want them.
"""

from __future__ import annotations

from typing import Any

from netship.compile.relay.ops import registration
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, topi
from tvm.relay.op import op as registry

OPERATOR = "netship.stored"


def stored(value: Any) -> Any:
    """The value itself. What is elementwise and reads it alone is in one kernel with it."""
    return registration.call(OPERATOR, [value])


_operator = registration.register(
    OPERATOR,
    "Its input, which is in memory.",
    ["value"],
    lambda types, attrs: types[0],
    # As a convolution's: nothing before it is in its kernel.
    relay.op.OpPattern.OUT_ELEMWISE_FUSABLE,
)
_operator.set_attr("FInferCorrectLayout", registration.layouts)
registry.register_compute(OPERATOR, lambda attrs, inputs, _: [topi.identity(inputs[0])])
registry.register_injective_schedule(OPERATOR)
