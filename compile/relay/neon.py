"""An integer network for 64-bit ARM: Relay, and the C that it calls. Only the engine's process imports this."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bundle.manifest import Tensor as Output
from compile.ir.graph import Add, Convolution, Network
from compile.kernels.neon import pack
from compile.kernels.neon.pack import Kernel
from compile.relay.integer import dequantised
from compile.relay.ops.neon import call
from targets import engine
from targets.presets import Target
from targets.toolchain import compile_object

tvm = engine.compiler()
from tvm import relay

HEADER = Path(pack.__file__).with_name("kernels.h")
# No contraction: a product is rounded before its sum, as ONNX Runtime rounds. No calls of memcpy in the place of loops.
_OPTIONS = (
    "-std=c11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-builtin",
)


class Native(NamedTuple):
    """A network whose operators are calls of C functions.

    Attributes:
        module: Relay, from float32 NCHW to float32.
        source: the functions, which include ``HEADER``.
        instruction: what they multiply by, for a person.
    """

    module: Any
    source: str
    instruction: str


def serves(target: Target) -> bool:
    """Whether ``target`` has these operators: 64-bit ARM."""
    return target.machine == "aarch64"


def has_dot_product(target: Target) -> bool:
    """Whether a CPU has SDOT."""
    with tvm.target.Target(target.tvm):
        return bool(tvm.target.codegen.target_has_features("dotprod"))


def lower(network: Network, output: Output, target: Target) -> Native:
    """The network in Relay from float32 NCHW to float32 of ``output.shape``; its integers are compile.ir.evaluate's.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    functions = _Functions()
    dot = has_dot_product(target)
    height, width, channels = network.input.shape
    image = relay.var(
        network.input.name, shape=(1, channels, height, width), dtype="float32"
    )
    values = {
        network.input.name: functions.call(
            pack.quantise(network.input), [image], network.input.shape, ""
        )
    }
    for operator in network.operators:
        inputs = [values[operator.input.name]]
        if isinstance(operator, Add):
            inputs.append(values[operator.other.name])
        values[operator.output.name] = functions.call(
            pack.kernel(operator, dot), inputs, operator.output.shape, operator.name
        )
    last = relay.transpose(values[network.output.name], (0, 3, 1, 2))
    kernels = [
        each.kernel[0] for each in network.operators if isinstance(each, Convolution)
    ]
    return Native(
        dequantised(last, network.output.quantisation, output),
        functions.source(max(kernels, default=1)),
        f"int8: {'SDOT' if dot else 'SMULL, SMLAL and SADALP'}",
    )


def compile_source(source: str, output: Path, target: Target, *extra: str) -> None:
    """The functions of ``lower`` as an object file, or with ``-S`` as assembly.

    Raises:
        UserError: the compiler failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "int8.c")
        file.write_text(source)
        compile_object(file, output, target, *options(target), *extra)


def options(target: Target) -> list[str]:
    """What the compiler must be told beside the target's triple."""
    # Orders for in-order cores need more registers than there are; of Cortex-A72's all have the instructions.
    cpu = "cortex_a72" + ("+dotprod" if has_dot_product(target) else "")
    return [f"-mcpu={cpu}", f"-I{HEADER.parent}", *_OPTIONS]


class _Functions:
    """The C functions of a network, each distinct one once."""

    def __init__(self) -> None:
        self._symbols: dict[tuple[str, str], str] = {}

    def call(
        self, kernel: Kernel, inputs: list[Any], shape: tuple[int, ...], name: str
    ) -> Any:
        key = kernel.kind, kernel.call
        number = sum(kind == kernel.kind for kind, _ in self._symbols)
        symbol = self._symbols.setdefault(key, f"netship_{kernel.kind}_{number}")
        return call(kernel, symbol, inputs, (1, *shape), name)

    def source(self, largest_kernel: int) -> str:
        lines = [
            f"#define MOST_KERNEL {largest_kernel}",
            f'#include "{HEADER.name}"',
            "",
        ]
        for (kind, body), symbol in self._symbols.items():
            inputs = {
                "addition": "const int8_t *a, const int8_t *b",
                "quantise": "const float *a",
            }.get(kind, "const int8_t *a")
            signature = (
                f"int first, int last, {inputs}, const int8_t *parameters, int8_t *y"
            )
            declared = (
                f'__attribute__((visibility("hidden"))) void {symbol}({signature})'
            )
            lines += [f"{declared};", f"void {symbol}({signature}) {{ {body} }}"]
        return "\n".join(lines) + "\n"
