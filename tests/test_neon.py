"""int8 operators for 64-bit ARM under QEMU: what compile.ir.evaluate answers, bit by bit, by the instructions that are said."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run
from integers import oddities, quantised, residuals
from numpy.typing import NDArray
from relay_worker import relay_worker

from bundle.manifest import Tensor as Output
from bundle.store import open_bundle
from compile.ir import evaluate, graph
from compile.ir.graph import (
    Add,
    AveragePool,
    Convolution,
    Network,
    Operator,
    Quantisation,
    Tensor,
)
from compile.kernels.neon import pack
from devices.sessions.emulated import find_qemu
from targets.presets import Target, resolve
from targets.toolchain import llvm_tool, run_zig

Integers = NDArray[np.int8]

PADS = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 3)]
CPUS = ["cortex-a53", "cortex-a72", "cortex-a76"]
# Beside the kernels: memory that ends where a page begins that nobody may touch, and what a test gives an operator in it.
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
    return Quantisation(
        float(random.uniform(0.01, 0.1)),
        int(random.integers(-128, 128)),
        int(random.choice([0, 128])),
    )


def convolution(
    random: np.random.Generator,
    size: tuple[int, int, int],
    outputs: int = 0,
    kernel: tuple[int, int] = (1, 1),
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    lowest: int = -127,
    sums: int = 0,
) -> Convolution:
    """Depthwise without ``outputs``; its largest sums about ``sums`` steps."""
    channels = size[2]
    shape = (outputs, *kernel, channels) if outputs else (*kernel, channels)
    weights = random.integers(lowest, 128, shape).astype(np.int8)
    height, width = (
        (size[a] + pads[a] + pads[a + 2] - kernel[a]) // strides[a] + 1 for a in (0, 1)
    )
    source, to = quantisation(random), quantisation(random)
    depth = kernel[0] * kernel[1] * (channels if outputs else 1)
    spread = (sums or 150) / (127 * 128 * np.sqrt(depth))
    scales = random.uniform(0.5, 1, outputs or channels) * spread
    low, high = sorted(int(each) for each in random.integers(-128, 128, 2))
    if not random.integers(2):
        low, high = -128, 127
    return Convolution(
        "convolution",
        Tensor("x", size, source),
        Tensor("y", (height, width, outputs or channels), to),
        weights,
        random.integers(-5000, 5000, outputs or channels),
        scales * to.scale / source.scale,
        not outputs,
        strides,
        pads,
        low,
        high,
    )


def operators() -> list[Operator]:
    random = np.random.default_rng(5)
    made: list[Operator] = [
        # Every number of pixels and of channels beside whole vectors, both clamps' ways, one pixel.
        convolution(random, (5, 5, 16), 24),
        convolution(random, (7, 7, 24), 40),
        convolution(random, (3, 17, 8), 13),
        convolution(random, (1, 1, 64), 35),
        convolution(random, (1, 1, 1280), 8, lowest=-128),
        convolution(random, (9, 11, 30), 17),
        convolution(random, (20, 20, 32), 8, lowest=-128),
        convolution(random, (6, 6, 40), 16, sums=1 << 20),
        convolution(random, (9, 9, 3), 16, (3, 3), (2, 2), PADS[2]),
        convolution(random, (8, 5, 7), 9, (3, 2), (1, 2), PADS[3]),
        convolution(random, (1, 1, 4), 5, (3, 3), (1, 1), PADS[1]),
        convolution(random, (9, 9, 16), kernel=(3, 3), pads=PADS[1]),
        convolution(random, (10, 9, 24), 0, (3, 3), (2, 2), PADS[2]),
        convolution(random, (10, 9, 16), 0, (3, 3), (1, 3), PADS[1]),
        convolution(random, (7, 8, 35), 0, (3, 3), (1, 1), PADS[3], lowest=-128),
        convolution(random, (6, 6, 8), 0, (5, 5), (2, 1), (2, 2, 2, 2)),
        convolution(random, (1, 1, 3), 0, (3, 3), (1, 1), PADS[1]),
        convolution(random, (4, 500, 48), 0, (3, 3), (1, 2), PADS[1]),
        convolution(random, (5, 5, 16), 0, (3, 3), sums=1 << 20),
    ]
    for shape in ((5, 5, 16), (3, 3, 7), (1, 1, 5)):
        first, second, output = (
            Tensor(name, shape, quantisation(random)) for name in "xzy"
        )
        made.append(Add("sum", first, second, output))
        made.append(Add("sum", first, second, output, -20, 90))
    for shape in ((7, 7, 24), (1, 1, 3), (20, 21, 11)):
        source = Tensor("x", shape, quantisation(random))
        output = Tensor("y", (1, 1, shape[2]), quantisation(random))
        made.append(AveragePool("mean", source, output))
    return made


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


def options_for(target: Target) -> list[str]:
    """In the worker: what the compiler is told."""
    from compile.relay import neon

    return neon.options(target)


def lowered(integers: Network, output: Output, target: Target, file: Path) -> str:
    """In the worker: the network's functions as an object file; by which instructions they multiply."""
    from compile.relay import neon

    native = neon.lower(integers, output, target)
    neon.compile_source(native.source, file, target)
    return native.instruction


def dot_product(words: str) -> tuple[bool, bool]:
    """In the worker: whether a target has these operators, and whether SDOT."""
    from compile.relay import neon

    target = resolve(words)
    return neon.serves(target), neon.has_dot_product(target)


def compiled(
    worker: ProcessPoolExecutor, body: str, kernels: int, cpu: str, folder: Path
) -> Path:
    # Static: it needs nothing of a board's.
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
    """Of each operator: what the C answers, run in uneven parts as threads would, and what numpy does."""
    random = np.random.default_rng(3)
    functions, calls, given, expected = [], [], [], []
    for number, operator in enumerate(operators):
        kernel = pack.kernel(operator, dot=cpu == "cortex-a76")
        names = ["input", "other"] if isinstance(operator, Add) else ["input"]
        tensors = [getattr(operator, name) for name in names]
        inputs = [
            random.integers(-128, 128, tensor.shape).astype(np.int8)
            for tensor in tensors
        ]
        values = {
            tensor.name: each.astype(np.int64)
            for tensor, each in zip(tensors, inputs, strict=True)
        }
        expected.append(evaluate.apply(operator, values).astype(np.int8))
        given += [each.tobytes() for each in (*inputs, kernel.parameters)]
        arguments = "".join(f"const int8_t *{n}, " for n in "ab"[: len(inputs)])
        functions.append(
            f"static void f{number}(int first, int last, {arguments}const int8_t *parameters, int8_t *y) "
            f"{{ {kernel.call} }}"
        )
        read = "".join(
            f"void *i{index} = taken({each.size});"
            for index, each in enumerate((*inputs, kernel.parameters))
        )
        passed = "".join(f"i{index}, " for index in range(len(inputs) + 1))
        part, size = kernel.units // 3, operator.output.nbytes
        calls.append(
            f"{{ {read} int8_t *y = room({size}); "
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
    tensor = Tensor("image", (6, width, channels), Quantisation(0.0187, -14))
    kernel = pack.quantise(tensor)
    image = random.normal(0, 2, (1, channels, 6, width)).astype(np.float32)
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
    got = np.frombuffer(result.stdout, np.int8).reshape(tensor.shape)
    whole = Network(tensor, tensor, ())
    assert (got == evaluate.quantise(whole, image)).all()


@pytest.mark.parametrize("cpu", CPUS)
def test_the_instructions_are_those_that_the_cpu_has(
    worker: ProcessPoolExecutor, cpu: str, tmp_path: Path
) -> None:
    target = resolve(f"arm-{cpu}")
    integers = graph.read(quantised(residuals(), tmp_path))
    output = Output(name="scores", shape=(1, 5))
    file = tmp_path / "native.o"
    instruction = worker.submit(lowered, integers, output, target, file).result()
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
@pytest.mark.parametrize("cpu, signed", [("cortex-a72", False), ("cortex-a76", True)])
def test_a_network_is_built_and_answers_with_its_integers(
    cpu: str, signed: bool, tmp_path: Path
) -> None:
    made = residuals() if signed else oddities()
    onnx.save(quantised(made, tmp_path, unsigned=not signed), tmp_path / "given.onnx")
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
    for words, dot in (
        ("-mcpu=neoverse-n1", True),
        ("", False),
        ("-mattr=+dotprod", True),
    ):
        target = f"llvm -mtriple=aarch64-linux-gnu {words}".strip()
        assert worker.submit(dot_product, target).result() == (True, dot)
    assert not worker.submit(dot_product, "arm-cortex-a7").result()[0]
