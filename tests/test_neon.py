"""int8 operators for 64-bit ARM under QEMU: the integers of compile.ir.evaluate, by the instructions that a build names."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run
from integer_operators import (
    addition,
    clamped,
    convolution,
    only,
    per_tensor,
    quantised_tensor,
)
from integers import Graph as Writer
from integers import graph_of, oddities, quantised, residuals, several_rows
from numpy.typing import NDArray
from relay_worker import relay_worker

from netship.bundle.store import open_bundle
from netship.compile import passes
from netship.compile.ir import evaluate, onnx_form
from netship.compile.ir.graph import Array, Graph, Operator, Quantisation, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Convolution
from netship.compile.kernels.neon import pack
from netship.devices.sessions.emulated import find_qemu
from netship.targets.presets import Target, resolve
from netship.targets.toolchain import llvm_tool, run_zig

Integers = NDArray[np.int8]

PADS = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 3)]
CPUS = ["cortex-a53", "cortex-a72", "cortex-a76"]
# Allocates memory that ends at a page without access, and reads an operator's input into it.
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
static void *room(size_t count) {
  const size_t page = 4096, whole = (count + page - 1) / page * page;
  char *data = mmap(0, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED || mprotect(data + whole, page, PROT_NONE)) exit(3);
  return data + whole - count;
}
static void *taken(size_t count) {
  char *data = room(count);
  if (fread(data, 1, count, stdin) != count) exit(3);
  return data;
}
"""


def quantisation(random: np.random.Generator) -> Quantisation:
    return per_tensor(float(random.uniform(0.01, 0.1)), int(random.integers(-128, 128)))


def seeded(
    random: np.random.Generator,
    size: tuple[int, int, int],
    outputs: int = 0,
    kernel: tuple[int, int] = (1, 1),
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    extreme: bool = False,
    sums: int = 0,
) -> Convolution:
    """A convolution with seeded weights.

    Args:
        size: height, width and channels of its input.
        outputs: its channels; 0 for a depthwise convolution.
        extreme: weights of −128 and 127 only, of which two products may not fit 16 bits.
        sums: steps of the output that its largest sums are about.
    """
    height, width, channels = size
    filters = outputs or channels
    shape = (filters, channels if outputs else 1, *kernel)
    ends = [-128, 127]
    weights = (
        random.choice(ends, shape) if extreme else random.integers(-127, 128, shape)
    )
    source, to = quantisation(random), quantisation(random)
    spread = (sums or 150) / (127 * 128 * np.sqrt(np.prod(shape[1:])))
    scales = random.uniform(0.5, 1, filters) * spread
    return convolution(
        "convolution",
        quantised_tensor("x", (1, channels, height, width), source),
        weights.astype(np.int8),
        random.integers(-5000, 5000, filters),
        scales * to.scale[0] / source.scale[0],
        to,
        group=1 if outputs else channels,
        strides=strides,
        pads=pads,
    )


def operators() -> list[Operator]:
    random = np.random.default_rng(5)
    convolutions = (
        # Pixels and channels that fill vectors and that do not, one pixel.
        seeded(random, (5, 5, 16), 24),
        seeded(random, (7, 7, 24), 40),
        seeded(random, (3, 17, 8), 13),
        seeded(random, (1, 1, 64), 35),
        seeded(random, (1, 1, 1280), 8, extreme=True),
        seeded(random, (9, 11, 30), 17),
        seeded(random, (20, 20, 32), 8, extreme=True),
        seeded(random, (6, 6, 40), 16, sums=1 << 20),
        seeded(random, (9, 9, 3), 16, (3, 3), (2, 2), PADS[2]),
        seeded(random, (8, 5, 7), 9, (3, 2), (1, 2), PADS[3]),
        seeded(random, (1, 1, 4), 5, (3, 3), (1, 1), PADS[1]),
        seeded(random, (9, 9, 16), kernel=(3, 3), pads=PADS[1]),
        seeded(random, (10, 9, 24), 0, (3, 3), (2, 2), PADS[2]),
        seeded(random, (10, 9, 16), 0, (3, 3), (1, 3), PADS[1]),
        seeded(random, (7, 8, 35), 0, (3, 3), (1, 1), PADS[3], extreme=True),
        seeded(random, (6, 6, 8), 0, (5, 5), (2, 1), (2, 2, 2, 2)),
        seeded(random, (1, 1, 3), 0, (3, 3), (1, 1), PADS[1]),
        seeded(random, (4, 500, 48), 0, (3, 3), (1, 2), PADS[1]),
        seeded(random, (5, 5, 16), 0, (3, 3), sums=1 << 20),
    )
    made: list[Operator] = []
    for each in convolutions:
        low, high = sorted(int(end) for end in random.integers(-128, 128, 2))
        made += [each, clamped(each, low, high)]
    for shape in ((1, 16, 5, 5), (1, 7, 3, 3), (1, 5, 1, 1)):
        # Of int8 and of uint8 in the model.
        for offset in (0, 128):
            first, second, output = (
                quantised_tensor(name, shape, quantisation(random)) for name in "xzy"
            )
            add = addition(first, second, output).with_attributes(offset=offset)
            made += [add, clamped(add, -20, 90)]
    for shape in ((1, 24, 7, 7), (1, 3, 1, 1), (1, 11, 20, 21)):
        source = quantised_tensor("x", shape, quantisation(random))
        output = quantised_tensor("y", (*shape[:2], 1, 1), quantisation(random))
        made.append(make("GlobalAveragePool", "mean", [source], [output]))
    return made


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


def options_for(target: Target) -> list[str]:
    """In the worker: the compiler's options."""
    from netship.compile.relay import neon_kernels

    return neon_kernels.options(target)


def lowered(network: Graph, target: Target, file: Path) -> str:
    """In the worker: the network's functions as an object file; the instructions that they multiply by."""
    from netship.compile.relay import convert

    converted = convert.to_relay(network, target)
    assert converted.source is not None
    converted.source.compile(file)
    return converted.instruction


def dot_product(network: Graph, words: str) -> tuple[bool, bool]:
    """In the worker: whether a target has these operators, and whether SDOT."""
    from netship.compile.relay import convert

    converted = convert.to_relay(network, resolve(words))
    return converted.source is not None, "SDOT" in converted.instruction


def transpositions(network: Graph, target: Target) -> int:
    """In the worker: how many operators of the network's Relay change the order of axes."""
    from netship.compile.relay import convert

    return str(convert.to_relay(network, target).module).count("transpose(")


def channels_last(values: Array) -> Array:
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1))


def compiled(
    worker: ProcessPoolExecutor, body: str, kernels: int, cpu: str, folder: Path
) -> Path:
    # Static: it needs no library of a board.
    target = replace(resolve(f"arm-{cpu}"), linker="aarch64-linux-musl")
    source, program = folder / "program.c", folder / "program"
    source.write_text(f'#define MOST_KERNEL {kernels}\n#include "kernels.h"\n{body}')
    options = worker.submit(options_for, target).result()
    triple = ("-target", target.linker)
    run_zig("cc", program, *triple, "-O2", "-static", *options, source)
    return program


def answers(
    worker: ProcessPoolExecutor, operators: list[Operator], cpu: str, folder: Path
) -> Iterator[tuple[Integers, Integers]]:
    """Of each operator: the output of the C, run in uneven parts as by threads, and that of numpy."""
    random = np.random.default_rng(3)
    functions, calls, given, expected = [], [], [], []
    for number, operator in enumerate(operators):
        kernel = pack.kernel(operator, dot=cpu == "cortex-a76")
        assert kernel is not None
        values = {
            # A quarter of them −128.
            tensor.name: random.integers(-214, 128, tensor.shape)
            .clip(-128)
            .astype(np.int8)
            for tensor in operator.activations
        }
        expected.append(
            channels_last(evaluate.apply(operator, values)[operator.output.name])
        )
        read = [*map(channels_last, values.values()), kernel.parameters]
        given += [each.tobytes() for each in read]
        arguments = "".join(f"const int8_t *{n}, " for n in "ab"[: len(values)])
        functions.append(
            f"static void f{number}(int first, int last, {arguments}const int8_t *parameters, int8_t *y) "
            f"{{ {kernel.call} }}"
        )
        declared = "".join(
            f"void *i{index} = taken({each.size});" for index, each in enumerate(read)
        )
        passed = "".join(f"i{index}, " for index in range(len(read)))
        part, size = kernel.units // 3, operator.output.nbytes
        calls.append(
            f"{{ {declared} int8_t *y = room({size}); "
            f"f{number}({part}, {kernel.units}, {passed}y); f{number}(0, {part}, {passed}y); "
            f"fwrite(y, 1, {size}, stdout); }}"
        )
    body = "\n".join([MAIN, *functions, "int main(void) {", *calls, "return 0; }"])
    program = compiled(worker, body, 5, cpu, folder)
    result = subprocess.run(
        [find_qemu(), "-cpu", cpu, program],
        input=b"".join(given),
        capture_output=True,
        check=True,
    )
    got, at = np.frombuffer(result.stdout, np.int8), 0
    for each in expected:
        yield got[at : at + each.size].reshape(each.shape), each
        at += each.size
    assert at == got.size


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_every_operator_gives_its_integers_in_whatever_parts(
    worker: ProcessPoolExecutor, cpu: str, tmp_path: Path
) -> None:
    wanted = operators()
    for number, (ours, numpy) in enumerate(answers(worker, wanted, cpu, tmp_path)):
        assert (ours == numpy).all(), (number, wanted[number])


@pytest.mark.parametrize("channels, width", [(3, 21), (1, 8), (5, 3)])
def test_an_image_is_quantised_as_numpy_does(
    worker: ProcessPoolExecutor, channels: int, width: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(2)
    shape = (1, channels, 6, width)
    tensor = quantised_tensor("quantised", shape, per_tensor(0.0187, -14))
    operator = make("QuantizeLinear", "", [Tensor("image", shape)], [tensor])
    kernel = pack.kernel(operator, dot=False)
    assert kernel is not None
    image = random.normal(0, 2, shape).astype(np.float32)
    # Halves, and what is far outside.
    image.ravel()[:6] = np.float32(0.0187) * np.array([0.5, 1.5, -0.5, 2.5, 9e8, -9e8])
    body = f"""{MAIN}
static void f(int first, int last, const float *a, const int8_t *parameters, int8_t *y) {{ {kernel.call} }}
int main(void) {{
  void *x = taken({image.nbytes}), *p = taken({kernel.parameters.size});
  int8_t *y = room({tensor.nbytes});
  f(2, 6, x, p, y), f(0, 2, x, p, y);
  fwrite(y, 1, {tensor.nbytes}, stdout);
  return 0;
}}"""
    program = compiled(worker, body, 1, "cortex-a72", tmp_path)
    result = subprocess.run(
        [find_qemu(), "-cpu", "cortex-a72", program],
        input=image.tobytes() + kernel.parameters.tobytes(),
        capture_output=True,
        check=True,
    )
    expected = channels_last(evaluate.apply(operator, {"image": image})["quantised"])
    got = np.frombuffer(result.stdout, np.int8).reshape(expected.shape)
    assert (got == expected).all()


@pytest.mark.parametrize("cpu", CPUS)
def test_the_instructions_are_those_that_the_cpu_has(
    worker: ProcessPoolExecutor, cpu: str, tmp_path: Path
) -> None:
    target = resolve(f"arm-{cpu}")
    network = passes.run(
        passes.INTEGERS, onnx_form.read(quantised(residuals(), tmp_path))
    )
    file = tmp_path / "native.o"
    instruction = worker.submit(lowered, network, target, file).result()
    shown = subprocess.run(
        [llvm_tool("llvm-objdump"), "-d", "--mattr=+dotprod", file],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = set(re.findall(r"\b(sdot|smull2?|smlal2?|sadalp)\b", shown))
    dot = cpu == "cortex-a76"
    assert instruction == ("int8: SDOT" if dot else "int8: SMULL, SMLAL and SADALP")
    assert ("sdot" in used) == dot
    assert dot or {"smull", "smlal", "sadalp"} <= used
    # Nothing of C's library, which a kernel would share with others.
    undefined = subprocess.run(
        [llvm_tool("llvm-nm"), "--undefined-only", file],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert undefined.split() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "cpu, signed, network",
    [
        ("cortex-a72", False, oddities),
        ("cortex-a76", True, residuals),
        ("cortex-a76", True, several_rows),
    ],
)
def test_a_network_is_built_and_answers_with_its_integers(
    cpu: str, signed: bool, network: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    onnx.save(
        quantised(network(), tmp_path, unsigned=not signed), tmp_path / "given.onnx"
    )
    options = ("--model", tmp_path / "given.onnx", "--output", tmp_path / "bundle")
    seen = ("--dump", tmp_path / "seen", "--json")
    result = run("compile.build", "--target", f"arm-{cpu}", *options, *seen)
    assert result.returncode == 0, result.stderr
    built = json.loads(result.stdout)
    assert built["verification"]["max_abs_error"] == 0
    assert built["verification"]["origin"] == "emulated"
    lowering = open_bundle(tmp_path / "bundle").manifest.lowering
    assert lowering.layout == "NHWC"
    assert lowering.reason.startswith("int8: SDOT" if signed else "int8: SMULL")
    assert any(g.symbol.startswith("netship_convolution") for g in lowering.groups)
    assert (tmp_path / "seen" / "kernels.h").exists()
    assembly = (tmp_path / "seen" / "native.s").read_text()
    assert all(f"\n{g.symbol}:" in assembly for g in lowering.groups if g.symbol)


def test_a_cpu_of_the_users_own_gets_the_instructions_it_has(
    worker: ProcessPoolExecutor,
) -> None:
    network = only(seeded(np.random.default_rng(0), (1, 1, 4), 8))
    for words, dot in (
        ("-mcpu=neoverse-n1", True),
        ("", False),
        ("-mattr=+dotprod", True),
    ):
        target = f"llvm -mtriple=aarch64-linux-gnu {words}".strip()
        assert worker.submit(dot_product, network, target).result() == (True, dot)
    assert not worker.submit(dot_product, network, "arm-cortex-a7").result()[0]


def test_pools_concatenations_tables_and_products_keep_channels_last(
    worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    w = Writer(3, 16)
    x = w.convolution("stem", "image", 3, 8)
    pooled = w.node("MaxPool", "pooled", [x], kernel_shape=[2, 2], strides=[2, 2])
    left = w.convolution("left", pooled, 8, 8)
    right = w.convolution("right", pooled, 8, 8)
    gated = w.node("Mul", "gated", [left, w.node("Sigmoid", "gate", [right])])
    both = w.node("Concat", "both", [gated, right], axis=1)
    w.classifier(w.convolution("last", both, 16, 8), 8, 5)
    proto = quantised(w.finish((1, 5)), tmp_path)
    network, target = graph_of(proto), resolve("arm-cortex-a76")
    # Only the image comes in another order.
    assert worker.submit(transpositions, network, target).result() <= 1
