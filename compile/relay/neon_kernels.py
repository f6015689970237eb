"""Integer operators for 64-bit ARM: the C functions that Relay's operators call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from netship.compile import passes
from netship.compile.ir.graph import NHWC, Graph, Operator, Tensor
from netship.compile.ir.operators import Convolution, Multiplication, Quantise, Table
from netship.compile.ir.pooling import MaxPool
from netship.compile.kernels.neon import pack
from netship.compile.passes.layout import channels_last
from netship.compile.passes.storage import store_as_int8, store_as_uint8
from netship.compile.relay import generic
from netship.compile.relay.integer_kernels import IntegerKernels
from netship.compile.relay.ops.neon import call
from netship.targets import engine
from netship.targets.presets import Target
from netship.targets.toolchain import compile_object

tvm = engine.compiler()
from tvm import relay

HEADER = Path(pack.__file__).with_name("kernels.h")
# No contraction: a product is rounded before its sum, as ONNX Runtime rounds. No calls of memcpy in the place of loops.
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_OPTIONS = ("-std=c11", *_WARNINGS, "-ffp-contract=off", "-fno-builtin")


def _moved(x: Any, by: int, dtype: str) -> Any:
    return relay.cast(relay.cast(x, "int32") + relay.const(by, "int32"), dtype)


class Source(NamedTuple):
    """C functions that a network calls; they include ``HEADER``."""

    text: str
    target: Target

    def compile(self, output: Path, *extra: str) -> None:
        """As an object file, or with ``-S`` as assembly."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "int8.c")
            file.write_text(self.text)
            compile_object(file, output, self.target, *options(self.target), *extra)


class NeonKernels:
    """Operators as calls of C functions, int8 with channels last; attributes as those of `IntegerKernels`."""

    passes: tuple[passes.Pass, ...] = (store_as_int8, channels_last)

    def __init__(self, target: Target) -> None:
        self._target = target
        self._dot = has_dot_product(target)
        self._plain = IntegerKernels(target)
        self.instruction = f"int8: {'SDOT' if self._dot else 'SMULL, SMLAL and SADALP'}"
        # The C functions, each distinct one once: its symbol by its kind and body.
        self._symbols: dict[tuple[str, str], str] = {}
        self._largest_kernel = 1

    def lower(self, operator: Operator, inputs: list[Any]) -> Any | None:
        """int8 NHWC of int8 NHWC; None where there is no kernel for the operator."""
        kernel = pack.kernel(operator, self._dot)
        tensors = (*operator.activations, operator.output)
        if kernel is None or any(_images(each) > 1 for each in tensors):
            return self._without_kernel(operator, inputs)
        if isinstance(operator, Convolution):
            self._largest_kernel = max(self._largest_kernel, operator.kernel[0])
        key = kernel.kind, kernel.call
        number = sum(kind == kernel.kind for kind, _ in self._symbols)
        symbol = self._symbols.setdefault(key, f"netship_{kernel.kind}_{number}")
        shape = (1, *operator.output.image)
        name = "" if isinstance(operator, Quantise) else operator.label
        made = call(kernel, symbol, inputs, shape, name)
        output = operator.output
        return made if output.layout == NHWC else relay.reshape(made, output.shape)

    def _without_kernel(self, operator: Operator, inputs: list[Any]) -> Any | None:
        """TVM's own code: with channels last where it has that; a convolution of integers in uint8 with channels first."""
        if (last := _channels_last(operator, inputs)) is not None:
            return last
        if not operator.output.quantisation or not isinstance(operator, Convolution):
            return None
        alone = Graph(operator.activations, operator.outputs, (operator,))
        (as_uint8,) = store_as_uint8(alone).operators
        sources = [
            _moved(relay.transpose(x, (0, 3, 1, 2)), 128, "uint8") for x in inputs
        ]
        made = self._plain.lower(as_uint8, sources)
        if made is None:
            return None
        return relay.transpose(_moved(made, -128, "int8"), (0, 2, 3, 1))

    @property
    def source(self) -> Source:
        """The functions of the operators lowered so far."""
        functions = [
            pack.definition(kind, call, symbol)
            for (kind, call), symbol in self._symbols.items()
        ]
        most = f"#define MOST_KERNEL {self._largest_kernel}"
        text = "\n".join([most, f'#include "{HEADER.name}"', "", *functions, ""])
        return Source(text, self._target)


def _images(tensor: Tensor) -> int:
    """How many images; the kernels in C take one."""
    return tensor.shape[0] if len(tensor.shape) == 4 else 1


def _channels_last(operator: Operator, inputs: list[Any]) -> Any | None:
    """An operator on stored values of images that lie with channels last; None of others."""
    tensors = (*operator.activations, operator.output)
    whole = isinstance(operator, Table) or len(inputs) == len(operator.inputs)
    if not whole or not operator.output.quantisation:
        return None
    if any(each.layout != NHWC for each in tensors):
        return None
    match operator:
        case Table() | Multiplication():
            # Element by element, whatever the order of axes.
            return generic.lower(operator, inputs, 0)[0]
        case MaxPool() if len(operator.outputs) == 1:
            (top, bottom), (left, right) = operator.pads
            return relay.nn.max_pool2d(
                inputs[0],
                pool_size=operator.kernel,
                strides=operator.strides,
                dilation=operator.dilations,
                padding=(top, left, bottom, right),
                layout="NHWC",
            )
    if operator.kind == "Concat":
        return relay.concatenate(inputs, (0, 3, 1, 2)[operator.attributes["axis"] % 4])
    return None


def has_dot_product(target: Target) -> bool:
    """Whether a CPU has SDOT."""
    with tvm.target.Target(target.tvm):
        return bool(tvm.target.codegen.target_has_features("dotprod"))


def options(target: Target) -> list[str]:
    """Options of the compiler besides the target's triple."""
    # Orders for in-order cores need more registers than there are; of Cortex-A72's all have the instructions.
    cpu = "cortex_a72" + ("+dotprod" if has_dot_product(target) else "")
    return [f"-mcpu={cpu}", f"-I{HEADER.parent}", *_OPTIONS]
