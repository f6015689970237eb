"""A standalone library as an embedded engineer meets it: files, symbols, callers, faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from conftest import run, succeed
from integers import Graph as Writer
from integers import quantised, residuals

from netship.bundle.store import open_bundle
from netship.targets.toolchain import run_zig

Build = Callable[..., Path]
SMALL = "mobilenetv2-0.35-96"
STANDALONE = ("--format", "standalone", "--name", "small")

pytestmark = pytest.mark.slow

STRICT = ("-Wall", "-Wextra", "-Werror", "-O1", "-g")


def shell(
    command: list[object], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def must(command: list[object], folder: Path, **environment: str) -> str:
    result = shell(command, folder, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(compiler: str, output: Path, *words: object) -> None:
    """By gcc, ``zig cc`` or ``zig c++``."""
    if compiler == "gcc":
        must([tool("gcc"), *words, "-o", output], output.parent)
    else:
        run_zig(compiler.split()[1], output, *map(str, words))


def tool(name: str) -> str:
    """A program of the machine's; its absence is a skip, which CI does not allow."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def small(built: Build) -> Path:
    return built(SMALL, "native", *STANDALONE)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small CNN for x86-64-v2, which valgrind and sanitizers run, and what it is made of."""
    folder = tmp_path_factory.mktemp("portable")
    model = folder / "cnn.onnx"
    onnx.save(graphs.torchscript_cnn(17), model)
    options = ("--target", "x86-64-v2", "--format", "standalone", "--name", "cnn")
    output, dump = folder / "cnn", folder / "dump"
    succeed(
        "compile.build", "--model", model, *options, "--output", output, "--dump", dump
    )
    return output, dump


def test_the_folder_is_what_an_engineer_links_against(small: Path) -> None:
    files = {path.name for path in small.iterdir()}
    assert files == {
        "libsmall.so",
        "libsmall.a",
        "small.h",
        "small.py",
        "small_image.h",
        "example.c",
        "LICENSES",
        "README.md",
        "manifest.json",
        "golden",
    }
    manifest = open_bundle(small).manifest
    assert (manifest.format, manifest.library) == ("standalone", "libsmall.so")
    assert manifest.lowering.memory is not None
    assert manifest.lowering.memory.arena_bytes >= manifest.lowering.memory.lower_bound
    size, weights = (
        manifest.measured["library_bytes"],
        manifest.measured["weight_bytes"],
    )
    assert size <= 1.03 * weights
    machine = manifest.target.machine
    assert f"`cc` is a compiler for {machine}:" in (small / "README.md").read_text()


def test_only_the_prefix_is_visible_and_only_libc_is_wanted(small: Path) -> None:
    symbols = [
        line.split()
        for line in must([tool("nm"), "-D", "libsmall.so"], small).splitlines()
    ]
    defined = [words[-1] for words in symbols if words[-2] != "U"]
    wanted = [words[-1] for words in symbols if words[-2] == "U"]
    assert len(defined) == 12
    assert all(name.startswith("small_") for name in defined)
    assert all("@GLIBC_" in name for name in wanted)
    in_archive = must(
        [tool("nm"), "--defined-only", "--extern-only", "libsmall.a"], small
    )
    names = [line.split()[-1] for line in in_archive.splitlines() if " T " in line]
    assert sorted(names) == sorted(defined)


@pytest.mark.parametrize("compiler", ["gcc", "zig cc", "zig c++"])
@pytest.mark.parametrize("library", ["shared", "static"])
def test_the_example_builds_and_is_right(
    small: Path, tmp_path: Path, compiler: str, library: str
) -> None:
    flags = [*STRICT, f"-I{small}", "-lpthread", "-lm"]
    if compiler == "zig c++":
        # The header must be C++; the example itself is C.
        (tmp_path / "use.cc").write_text(
            '#include "small.h"\nint main() { return small_self_test(); }\n'
        )
        source: Path = tmp_path / "use.cc"
    else:
        flags.append("-std=c99")
        source = small / "example.c"
    shared = library == "shared"
    linked = [f"-L{small}", "-lsmall"] if shared else [small / "libsmall.a"]
    example = tmp_path / "example"
    build(compiler, example, source, *linked, *flags)
    said = must([example, "golden/0.input.bin"], small, LD_LIBRARY_PATH=".")
    if compiler != "zig c++":
        assert "self-test: no error" in said
        assert "class " in said


def test_check_and_run_take_it_like_any_bundle(
    small: Path, free_photos: list[Path]
) -> None:
    options = ("--model", SMALL, "--images", *free_photos, "--repeat", 5, "--json")
    for threads in (1, 2):
        result = json.loads(
            succeed("runtime_demo.check", small, *options, "--threads", threads)
        )
        assert result["passed"]
        assert result["max_abs_error"] <= 1e-4
        assert result["top1_agreement"] == 1.0
        assert result["origin"] == "measured"
    assert "chelsea.png" in succeed(
        "runtime_demo.run", small, "--image", free_photos[2]
    )


def test_a_server_is_refused_with_what_to_do(small: Path) -> None:
    result = run("runtime_demo.check", small, "--rpc", "local")
    assert result.returncode == 2
    assert "needs no RPC server" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("target", ["arm-cortex-a72", "arm-cortex-a7"])
def test_it_is_right_on_emulated_boards(
    built: Build, free_photos: list[Path], target: str
) -> None:
    bundle = built(SMALL, target, *STANDALONE)
    options = (
        "--board",
        "emulated",
        "--model",
        SMALL,
        "--images",
        *free_photos,
        "--json",
    )
    result = json.loads(succeed("runtime_demo.check", bundle, *options))
    assert result["passed"]
    assert result["max_abs_error"] <= 1e-4
    assert (result["origin"], result["latency_ms"]) == ("emulated", None)


def test_32_bit_arm_passes_floats_in_registers(built: Build) -> None:
    bundle = built(SMALL, "arm-cortex-a7", *STANDALONE)
    attributes = must([tool("readelf"), "-A", "libsmall.so"], bundle)
    assert "Tag_ABI_VFP_args: VFP registers" in attributes


def test_two_models_live_in_one_program(
    small: Path, portable: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "both.c").write_text(
        '#include "small.h"\n#include "cnn.h"\n'
        "int main(void) { return small_self_test() + 100 * cnn_self_test(); }\n"
    )
    folders = [small, portable[0]]
    options = [word for folder in folders for word in ("-I", folder)]
    archives = [small / "libsmall.a", portable[0] / "libcnn.a"]
    both = tmp_path / "both"
    build("zig cc", both, *STRICT, tmp_path / "both.c", *options, *archives, "-lm")
    must([both], tmp_path)


PYTHON = """
import numpy, {name} as library
library.self_test()
given = numpy.fromfile("golden/0.input.bin", "<f4")
expected = numpy.fromfile("golden/0.output0.bin", "<f4")
with library.Network(1) as one, library.Network(2) as two:
    for network in (one, two, one):
        assert abs(numpy.array(network.run(given)) - expected).max() < 1e-4
print(library.version())
"""


def test_the_python_wrapper_runs_two_networks(small: Path) -> None:
    said = must([sys.executable, "-c", PYTHON.format(name="small")], small)
    assert said.startswith("small: mobilenetv2-0.35-96 (SHA-256 ")


REFUSED = """
import numpy, small
given = numpy.fromfile("golden/0.input.bin", "<f4")
with small.Network(1) as network:
    kept = list(network.run(given))
    for bad in (numpy.nan, numpy.inf, -numpy.inf):
        for place in (0, given.size // 2, given.size - 1):
            spoiled = given.copy()
            spoiled[place] = bad
            try:
                network.run(spoiled)
            except small.Error as error:
                assert str(error) == "the input has NaN or infinity"
            else:
                raise AssertionError(bad)
    assert list(network.run(given)) == kept
"""


def test_an_input_that_is_not_finite_is_refused(small: Path) -> None:
    must([sys.executable, "-c", REFUSED], small)
    assert "with NaN or infinity is refused" in (small / "small.h").read_text()


def test_outputs_that_are_infinite_masked_and_ordinary_are_tested_apart(
    tmp_path: Path,
) -> None:
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8)
    x = w.node("Flatten", "flat", [w.node("GlobalAveragePool", "mean", [x])])
    none = w.node("Log", "none", [w.node("Sub", "zero", [x, x])])
    mask = w.constant("mask", np.arange(8)[np.newaxis] % 3 == 0)
    low = w.constant("low", np.asarray(-1e9, np.float32))
    masked = w.node("Where", "masked", [mask, x, low])
    w.node("Concat", "scores", [x, none, masked], axis=1)
    onnx.save(w.finish((1, 24)), tmp_path / "m.onnx")
    options = ("--model", tmp_path / "m.onnx", "--output", tmp_path / "library")
    succeed("compile.build", *options, *STANDALONE)
    test = "import small; small.self_test()"
    must([sys.executable, "-c", test], tmp_path / "library")
    checked = json.loads(succeed("runtime_demo.check", tmp_path / "library", "--json"))
    assert checked["passed"] and checked["of_tolerance"] <= 1


def test_a_flipped_bit_in_the_weights_fails_the_self_test(
    portable: tuple[Path, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "cnn"
    shutil.copytree(portable[0], damaged)
    library = bytearray((damaged / "libcnn.so").read_bytes())
    weights = (portable[1] / "weights.bin").read_bytes()
    library[library.index(weights) + len(weights) // 2] ^= 1
    (damaged / "libcnn.so").write_bytes(library)
    result = shell([sys.executable, "-c", "import cnn; cnn.self_test()"], damaged)
    assert "weights" in result.stderr.splitlines()[-1]
    assert result.returncode == 1
    check = run("runtime_demo.check", damaged)
    assert check.returncode == 2
    assert "SHA-256" in check.stderr


LEAKS = """
#include <stdio.h>
#include <stdlib.h>
#include "cnn.h"
int main(void) {
  float *input = calloc(CNN_INPUT_ELEMENTS, sizeof *input);
  float *output = calloc(CNN_OUTPUT_ELEMENTS, sizeof *output);
  if (cnn_self_test() != 0) return 1;
  for (int i = 0; i < ROUNDS; i++) {
    cnn_t *network = cnn_create(1 + i % 2);
    if (network == NULL) return 2;
    int code = cnn_run(network, input, output);
    if (code != 0) return 3;
    cnn_destroy(network);
  }
  free(output);
  free(input);
  return 0;
}
"""


def test_valgrind_finds_no_leak_in_a_thousand_rounds(
    portable: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "leaks.c").write_text(LEAKS)
    program = tmp_path / "leaks"
    linked = ["-I", portable[0], portable[0] / "libcnn.a", "-lpthread", "-lm"]
    must(
        [tool("gcc"), "-g", "-DROUNDS=1000", "leaks.c", *linked, "-o", program],
        tmp_path,
    )
    options = ["--leak-check=full", "--error-exitcode=9", "--quiet"]
    must([tool("valgrind"), *options, program], tmp_path)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_generated_code_passes_the_sanitizers(
    portable: tuple[Path, Path], tmp_path: Path, sanitizer: str
) -> None:
    output, dump = portable
    (tmp_path / "leaks.c").write_text(LEAKS)
    program = tmp_path / "leaks"
    flags = [
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-std=gnu11",
        "-DROUNDS=20",
    ]
    sources = [
        "leaks.c",
        dump / "library.c",
        dump / "runtime.c",
        dump / "weights.S",
        dump / "kernels0.o",
    ]
    linked = ["-I", output, "-I", dump, "-Wa,-I," + str(dump), "-lpthread", "-lm"]
    must([tool("gcc"), *STRICT, *flags, *sources, *linked, "-o", program], tmp_path)
    must([program], tmp_path)


@pytest.mark.parametrize("compiler", ["gcc", "zig cc"])
def test_the_generated_code_has_no_warning(
    portable: tuple[Path, Path], tmp_path: Path, compiler: str
) -> None:
    dump = portable[1]
    flags = [*STRICT, "-Wconversion", "-Wpedantic", "-std=gnu11", "-c"]
    for source in ("library.c", "runtime.c"):
        build(compiler, tmp_path / "x.o", *flags, dump / source, f"-I{dump}")


def test_the_trained_network_is_right_as_a_library(
    built: Build, real_model: Path, real_photos: Path
) -> None:
    bundle = built(
        real_model, "native", "--format", "standalone", "--name", "mobilenetv2"
    )
    options = ("--model", real_model, "--images", real_photos, "--repeat", 5, "--json")
    result = json.loads(succeed("runtime_demo.check", bundle, *options))
    assert (result["images"], result["top1_agreement"]) == (16, 1.0)
    assert result["max_abs_error"] <= 5e-5
    measured = open_bundle(bundle).manifest.measured
    assert measured["library_bytes"] <= 1.03 * measured["weight_bytes"]


@pytest.fixture(scope="module")
def int8(
    tmp_path_factory: pytest.TempPathFactory, free_photos: list[Path]
) -> tuple[Path, str]:
    """``small`` in int8, calibrated on too few photographs, and what the build said."""
    library = tmp_path_factory.mktemp("int8") / "library"
    options = ("--model", SMALL, "--output", library, *STANDALONE)
    calibration = ("--quantize", "int8", "--calibration", *free_photos)
    result = run("compile.build", *options, *calibration)
    assert result.returncode == 0, result.stderr
    return library, result.stdout + result.stderr


def test_int8_is_a_library_too(
    int8: tuple[Path, str], small: Path, free_photos: list[Path]
) -> None:
    library, said = int8
    assert f"only {len(free_photos)} images; with fewer than 8" in said
    check = "runtime_demo.check", library, "--model", SMALL, "--repeat", 1
    told = run(*check, "--images", free_photos[0])
    assert "some of these images calibrated the network" in told.stderr
    checked = json.loads(succeed(*check, "--images", *free_photos, "--json"))
    assert checked["vs_quantised"]["steps"] == 0
    ours, floating = (open_bundle(path).manifest.lowering for path in (library, small))
    assert ours.float_operators == 0
    assert ours.memory
    assert floating.memory
    assert ours.memory.arena_bytes <= floating.memory.arena_bytes / 3
    wanted = must([tool("nm"), "-D", "--undefined-only", "libsmall.so"], library)
    assert all("@GLIBC_" in line for line in wanted.splitlines())
    must([sys.executable, "-c", "import small; small.self_test()"], library)


@pytest.mark.parametrize("target", ["arm-cortex-a72", "arm-cortex-a7"])
def test_int8_is_right_on_an_emulated_board(target: str, tmp_path: Path) -> None:
    model, library = tmp_path / "int8.onnx", tmp_path / "library"
    onnx.save(quantised(residuals(), tmp_path), model)
    options = ("--model", model, "--target", target, "--output", library)
    succeed("compile.build", *options, *STANDALONE)
    board = ("--model", model, "--board", "emulated", "--json")
    checked = json.loads(succeed("runtime_demo.check", library, *board))
    assert checked["vs_quantised"]["steps"] == 0
