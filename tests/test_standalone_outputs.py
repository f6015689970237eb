"""Standalone libraries of networks with several outputs: files, callers in C and Python, faults, boards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from conftest import succeed
from integers import quantised, residuals
from onnx import TensorProto, helper
from ports import check, network, seeded, verified

from netship.bundle.golden import read_golden
from netship.bundle.store import open_bundle
from netship.devices.sessions.standalone import open_standalone
from netship.targets.toolchain import run_zig

pytestmark = pytest.mark.slow

FLOAT = TensorProto.FLOAT


def floats() -> onnx.ModelProto:
    """A head that another one reads, the same in another shape, and the input in another shape."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["boxes"]),
        helper.make_node("Flatten", ["boxes"], ["rows"]),
        helper.make_node("Sigmoid", ["boxes"], ["scores"]),
        helper.make_node("Flatten", ["x"], ["given"]),
    ]
    outputs = {
        "boxes": (FLOAT, [1, 4, 7, 7]),
        "rows": (FLOAT, [1, 196]),
        "scores": (FLOAT, [1, 4, 7, 7]),
        "given": (FLOAT, [1, 147]),
    }
    image = {"x": (FLOAT, [1, 3, 7, 7])}
    return network(nodes, image, outputs, {"w": seeded(4, 3, 3, 3)})


def types() -> onnx.ModelProto:
    """An output of each type; odd numbers of bytes before elements of 8."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["scores"], pads=[1] * 4),
        helper.make_node("ArgMax", ["scores"], ["place"], axis=1, keepdims=0),
        helper.make_node("Greater", ["scores", "half"], ["truth"]),
        helper.make_node("Cast", ["truth"], ["mask"], to=TensorProto.UINT8),
        helper.make_node("Cast", ["place"], ["first"], to=TensorProto.INT32),
        helper.make_node("Neg", ["first"], ["less"]),
        helper.make_node("Cast", ["less"], ["signed"], to=TensorProto.INT8),
    ]
    outputs = {
        "truth": (TensorProto.BOOL, [1, 3, 5, 3]),
        "place": (TensorProto.INT64, [1, 5, 3]),
        "mask": (TensorProto.UINT8, [1, 3, 5, 3]),
        "scores": (FLOAT, [1, 3, 5, 3]),
        "signed": (TensorProto.INT8, [1, 5, 3]),
        "less": (TensorProto.INT32, [1, 5, 3]),
    }
    weights = {"w": seeded(3, 3, 3, 3), "half": np.float32(0.25)}
    return network(nodes, {"x": (FLOAT, [1, 3, 5, 3])}, outputs, weights)


def int8(folder: Path) -> onnx.ModelProto:
    """A QDQ network with a classifier's scores, and a feature map in float32 and as it is stored."""
    model = residuals()
    features = helper.make_tensor_value_info("b.add", FLOAT, [1, 12, 9, 9])
    model.graph.output.append(features)
    model = quantised(model, folder)
    [source] = [each for each in model.graph.node if each.output[0] == "b.add"]
    stored = (source.input[0], TensorProto.INT8, [1, 12, 9, 9])
    model.graph.output.append(helper.make_tensor_value_info(*stored))
    return model


class Built(NamedTuple):
    """A library named ``net``, the model, and what the library is made of."""

    library: Path
    model: Path
    dump: Path


C_TYPES = {
    "floats": ["float"] * 4,
    "types": ["uint8_t", "int64_t", "uint8_t", "float", "int8_t", "int32_t"],
    "int8": ["float", "float", "int8_t"],
}


@pytest.fixture(scope="module", params=list(C_TYPES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(kind)
    model = {"floats": floats, "types": types}.get(kind)
    return build(model() if model else int8(folder), folder)


def build(model: onnx.ModelProto, folder: Path, *options: object) -> Built:
    made = Built(folder / "library", folder / "model.onnx", folder / "dump")
    onnx.save(model, made.model)
    words = ("--model", made.model, "--output", made.library, "--dump", made.dump)
    succeed(
        "compile.build", *words, "--format", "standalone", "--name", "net", *options
    )
    return made


def test_the_header_names_every_output(kind: str, built: Built) -> None:
    header = (built.library / "net.h").read_text()
    kinds = C_TYPES[kind]
    pointers = ", ".join(f"{each} *output{i}" for i, each in enumerate(kinds))
    assert f"int net_run(net_t *, const float *input, {pointers});" in header
    assert f"#define NET_OUTPUTS {len(kinds)}\n" in header
    outputs = open_bundle(built.library).manifest.outputs
    for index, (output, c_type) in enumerate(zip(outputs, kinds, strict=True)):
        dims = "x".join(map(str, output.shape))
        macro = f"#define NET_OUTPUT{index}"
        comment = f"/* {dims} {output.dtype} */"
        assert f"{macro}_ELEMENTS {output.elements} {comment}\n" in header
        assert f'{macro}_NAME "{output.name}"\n' in header
        assert f"{macro}_TYPE {c_type}\n" in header
    page = (built.library / "README.md").read_text()
    assert f"output 1 ({outputs[1].name}): " in page


def test_check_and_verify_compare_every_output(kind: str, built: Built) -> None:
    result = check(built.library, "--model", built.model)
    assert result["max_abs_error"] <= (0 if kind == "int8" else 1e-6)
    assert "PASS" in verified(built.library)
    bundle = open_bundle(built.library)
    with open_standalone(bundle, threads=2) as session:
        session.self_test()
        for given, expected, tolerances in read_golden(bundle):
            outputs = session.run(*given)
            for ours, theirs, near in zip(outputs, expected, tolerances, strict=True):
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                assert (abs(ours.astype(float) - theirs) <= near).all()


def compiled(folder: Path, *words: object) -> Path:
    strict = ("-Wall", "-Wextra", "-Wconversion", "-Werror", "-std=gnu11")
    run_zig("cc", folder / "program", *strict, *map(str, words), "-lpthread", "-lm")
    return folder / "program"


def test_the_example_prints_every_output(built: Built, tmp_path: Path) -> None:
    library, bundle = built.library, open_bundle(built.library)
    example = compiled(
        tmp_path, library / "example.c", "-I", library, library / "libnet.a"
    )
    command = [example, library / "golden/1.input.bin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, tested, *lines = said.splitlines()
    assert tested == "self-test: no error"
    golden = read_golden(bundle)[1]
    pairs = zip(bundle.manifest.outputs, golden.outputs, lines, strict=True)
    for output, expected, line in pairs:
        name, *numbers = line.split()
        assert name == f"{output.name}:"
        found = np.array(numbers, float)
        np.testing.assert_allclose(found, expected.ravel()[:16], atol=1e-4)


PYTHON = """
import json, sys, net
net.self_test()
with net.Network(2) as network:
    outputs = network.run(open("golden/0.input.bin", "rb").read())
assert type(outputs) is tuple
json.dump([[output.typecode, *output] for output in outputs], sys.stdout)
"""


def test_the_python_module_returns_a_tuple(kind: str, built: Built) -> None:
    codes = {"float": "f", "int64_t": "q", "int32_t": "i", "int8_t": "b"}
    command = [sys.executable, "-c", PYTHON]
    said = subprocess.run(command, cwd=built.library, stdout=-1, check=True).stdout
    golden = read_golden(open_bundle(built.library))[0]
    found = zip(json.loads(said), C_TYPES[kind], golden.outputs, strict=True)
    for (code, *values), c_type, expected in found:
        assert code == codes.get(c_type, "B")
        np.testing.assert_allclose(values, expected.ravel(), atol=1e-5)


CALLS = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "net.h"
enum { BYTES = 1 << 14 };
static void *room(void) { return aligned_alloc(64, BYTES); }
static void say(int code) { puts(net_error_text(code)); }
int main(void) {
  net_t *net = net_create(1);
  float *input = room();
  void *outputs[NET_OUTPUTS], *others[NET_OUTPUTS];
  for (int i = 0; i < NET_INPUT_ELEMENTS; i++) input[i] = (float)(i % 7) - 3;
  for (int i = 0; i < NET_OUTPUTS; i++) outputs[i] = room(), others[i] = room();
  say(net_run(net, input, ARGUMENTS(outputs)));
  for (int i = 0; i < NET_OUTPUTS; i++) {
    void *right = others[i];
    others[i] = NULL;
    say(net_run(net, input, ARGUMENTS(others)));
    others[i] = (char *)input + 64;
    say(net_run(net, input, ARGUMENTS(others)));
    others[i] = others[(i + 1) % NET_OUTPUTS];
    say(net_run(net, input, ARGUMENTS(others)));
    others[i] = right;
  }
  /* Not aligned for kernels, all the same the caller's. */
  for (int i = 0; i < NET_OUTPUTS; i++) others[i] = (char *)others[i] + 8;
  say(net_run(net, (float *)memmove((char *)input + 4, input, BYTES - 64), ARGUMENTS(others)));
  int same = 1;
  COMPARE
  puts(same ? "same" : "different");
  net_destroy(net);
  return 0;
}
"""


def test_bad_pointers_are_refused_for_every_output(
    kind: str, built: Built, tmp_path: Path
) -> None:
    kinds = C_TYPES[kind]
    words = [f"({each} *)p[{i}]" for i, each in enumerate(kinds)]
    compare = [
        f"same &= !memcmp(outputs[{i}], others[{i}], NET_OUTPUT{i}_ELEMENTS * sizeof(NET_OUTPUT{i}_TYPE));"
        for i in range(len(kinds))
    ]
    source = CALLS.replace("COMPARE", "\n  ".join(compare))
    (tmp_path / "calls.c").write_text(
        f"#define ARGUMENTS(p) {', '.join(words)}{source}"
    )
    library = built.library
    program = compiled(
        tmp_path, tmp_path / "calls.c", "-I", library, library / "libnet.a"
    )
    said = subprocess.run([program], stdout=-1, text=True, check=True).stdout
    overlap = "an output overlaps an input or another output"
    bad = ["a pointer is NULL", overlap, overlap] * len(kinds)
    assert said.splitlines() == ["no error", *bad, "no error", "same"]


def test_the_self_test_compares_every_output(
    kind: str, built: Built, tmp_path: Path
) -> None:
    (tmp_path / "test.c").write_text(
        '#include "net.h"\nint main(void) { return net_self_test(); }\n'
    )
    dump, kernels = built.dump, sorted(built.dump.glob("kernels*.o"))
    text = (dump / "library.c").read_text()
    codes = []
    for number in (None, *range(len(C_TYPES[kind]))):
        # Its first element; of None nothing.
        first = rf"( expected{number}\[\d+\] = {{\s+)[^,]+"
        spoiled, count = re.subn(first, r"\g<1>99", text)
        assert count == (number is not None)
        (tmp_path / "library.c").write_text(spoiled)
        words = ["-I", dump, "-I", built.library, f"-Wa,-I,{dump}"]
        sources = [dump / "runtime.c", dump / "weights.S", *kernels]
        program = compiled(
            tmp_path, tmp_path / "test.c", tmp_path / "library.c", *sources, *words
        )
        codes.append(subprocess.run([program], check=False).returncode)
    mismatch = 13
    assert codes == [0] + [mismatch] * len(C_TYPES[kind])


@pytest.mark.parametrize("make", [floats, types])
def test_it_is_right_on_an_emulated_board(make: Any, tmp_path: Path) -> None:
    made = build(make(), tmp_path, "--target", "arm-cortex-a72")
    result = check(made.library, "--model", made.model, "--board", "emulated")
    assert result["max_abs_error"] <= 1e-6
    assert result["origin"] == "emulated"


def test_int8_is_right_on_an_emulated_board(tmp_path: Path) -> None:
    made = build(int8(tmp_path), tmp_path, "--target", "arm-cortex-a72")
    result = check(made.library, "--model", made.model, "--board", "emulated")
    assert result["vs_quantised"]["steps"] == 0
