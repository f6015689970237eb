"""The C project as its user has it: compilers, build systems, pointers, the self-test, the text itself."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from cortex_m_projects import (
    CPUS,
    NAMES,
    Projects,
    expected_output,
    graph_for_c,
)
from integers import Graph, project, tensors

from netship.compile.backends.c import ports
from netship.devices.microcontroller.session import interface_of
from netship.targets.escapes import C_TYPES, c_float
from netship.targets.toolchain import run_zig, zig_path

PROBE = """
#include "small.h"
#include <stdio.h>
#include <string.h>
static union { char bytes[SMALL_ARENA_BYTES + 64]; uint64_t aligned; } arena;
static VALUE output[SMALL_OUTPUT_SIZE], input[SMALL_INPUT_SIZE], copy[SMALL_INPUT_SIZE];
int main(void) {
  memset(input, 3, sizeof input);
  memcpy(copy, input, sizeof input);
  char *a = arena.bytes;
  printf("%d %d %d %d %d %d", small_run(NULL, output, a), small_run(input, NULL, a),
         small_run(input, output, NULL), small_run(input, output, a + 1),
         small_run(input, (VALUE *)a, a),
         small_run((VALUE *)(a + SMALL_INPUT_OFFSET + 8), output, a));
  printf(" %d %d %d", small_run(input, output, a), memcmp(input, copy, sizeof input),
         small_self_test(output, a));
  return 0;
}
"""


@pytest.mark.parametrize("name", NAMES)
def test_wrong_pointers_get_codes_and_an_input_outside_is_only_read(
    projects: Projects, name: str, tmp_path: Path
) -> None:
    """Codes of the header, under gcc's sanitizers, without a warning."""
    bundle = projects[name, "cortex-m7"]
    value = f"-DVALUE={C_TYPES[interface_of(bundle).inputs[0].dtype]}"
    (tmp_path / "probe.c").write_text(PROBE)
    assert _compile_and_run(bundle.path, tmp_path, value) == "1 1 1 2 3 3 0 0 0"


def test_weights_damaged_in_flash_fail_the_self_test(
    projects: Projects, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in projects["residuals", "cortex-m7"].path.glob("*.[ch]"):
        (folder / path.name).write_text(path.read_text())
    weights = folder / "small_weights.c"
    text = weights.read_text()
    start = text.index("= {") + 3
    first = re.compile(r"-?\d+").search(text, start)
    assert first is not None
    changed = str(int(first[0]) // 2 + 1)
    weights.write_text(text[: first.start()] + changed + text[first.end() :])
    (tmp_path / "probe.c").write_text(PROBE)
    assert _compile_and_run(folder, tmp_path, "-DVALUE=int8_t").endswith(" 4")


def test_each_element_of_a_float_self_test_has_its_own_tolerance(
    projects: Projects, tmp_path: Path
) -> None:
    """A score beside −1e9, NaN and infinity: none hides another."""
    (tmp_path / "answer.c").write_text(
        '#include "small.h"\n#include <stdio.h>\n'
        "static union { char bytes[SMALL_ARENA_BYTES]; uint64_t aligned; } arena;\n"
        "static float output[SMALL_OUTPUT_SIZE];\n"
        'int main(void) { printf("%d", small_self_test(output, &arena)); return 0; }\n'
    )
    folder = tmp_path / "project"
    folder.mkdir()
    for path in projects["float-residuals", "cortex-m7"].path.glob("*.[ch]"):
        (folder / path.name).write_text(path.read_text())
    golden = (folder / "golden.h").read_text()
    values = re.search(r"golden_output\[\d+\] = \{\s*([^,]*), ([^,]*),", golden)
    assert values is not None
    for number, moved, code in (
        (1, f"{values[1]} + 0.9e-5f", "0"),
        (1, f"{values[1]} - 2e-5f", "5"),
        (2, f"{values[2]} + 2e-5f", "5"),
        (2, "-1e9f", "5"),
        *((1, c_float(bad), "5") for bad in (np.nan, np.inf, -np.inf)),
    ):
        changed = golden[: values.start(number)] + moved + golden[values.end(number) :]
        (folder / "golden.h").write_text(changed)
        assert _compile_and_run(folder, tmp_path, "-O1", "answer.c") == code


def test_a_float_project_s_header_finds_what_is_not_finite(
    projects: Projects, tmp_path: Path
) -> None:
    values = [np.nan, np.inf, -np.inf, -np.nan, 3.4e38, -1e-45, 0.0]
    cases = "".join(
        f"  input[SMALL_INPUT_SIZE - 1] = {c_float(value)};\n"
        '  printf("%d", small_input_is_finite(input));\n'
        for value in values
    )
    (tmp_path / "probe.c").write_text(
        '#include "small.h"\n#include <stdio.h>\n'
        "static float input[SMALL_INPUT_SIZE];\n"
        f"int main(void) {{\n{cases}  return 0;\n}}\n"
    )
    folder = projects["float-residuals", "cortex-m7"].path
    said = [_compile_and_run(folder, tmp_path, o) for o in ("-O1", "-ffast-math")]
    assert said == ["0000111"] * 2
    assert (
        "finite"
        not in (projects["residuals", "cortex-m7"].path / "small.h").read_text()
    )


def _compile_and_run(
    folder: Path, scratch: Path, value: str, source: str = "probe.c"
) -> str:
    program = scratch / "probe"
    sources = [scratch / source, folder / "small.c", folder / "small_weights.c"]
    options = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command: list[str | Path] = [
        "gcc",
        *options,
        *sanitizers,
        value,
        f"-I{folder}",
        "-o",
        program,
        *sources,
    ]
    subprocess.run(command, check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_project_s_own_makefile_builds_for_board_and_host(
    projects: Projects, tmp_path: Path
) -> None:
    for cpu in CPUS:
        folder = tmp_path / cpu
        subprocess.run(["cp", "-r", projects["oddities", cpu].path, folder], check=True)
        made = subprocess.run(
            ["make", "-s", "-C", folder, "all", "host"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (made.returncode, made.stderr) == (0, "")
        subprocess.run([folder / "example-host"], check=True)


def test_cmake_builds_the_library_alone_and_inside_a_project_of_one_s_own(
    projects: Projects, tmp_path: Path
) -> None:
    folder = projects["float-residuals", "cortex-m4"].path
    cross = [f"-DCMAKE_TOOLCHAIN_FILE={folder / 'toolchain.cmake'}"]
    host = _cmake(folder, tmp_path / "host")
    subprocess.run([host / "small_example"], check=True)
    assert (_cmake(folder, tmp_path / "board", *cross) / "libsmall.a").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(mine C)\n"
        f"add_subdirectory({folder} small)\nadd_library(app OBJECT {folder}/example/main.c)\n"
        "target_link_libraries(app small)\n"
    )
    made = _cmake(mine, tmp_path / "app", *cross)
    archive = made / "small" / "libsmall.a"
    assert "small_run" in _said("arm-none-eabi-nm", archive)
    assert "VFP registers" in _said("arm-none-eabi-readelf", "-A", archive)


def _cmake(source: Path, build: Path, *options: str) -> Path:
    """Configured and built without a warning."""
    flags = ["-DCMAKE_C_FLAGS_RELEASE=-Werror", "-DCMAKE_BUILD_TYPE=Release"]
    _said("cmake", "-S", source, "-B", build, *flags, *options)
    _said("cmake", "--build", build)
    return build


def _said(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_readme_names_the_functions_of_libm_as_the_header_does(
    tmp_path: Path,
) -> None:
    g = Graph(3, 8)
    x = g.convolution("stem", "image", 3, 8, 3, 2, (1, 1, 1, 1))
    g.classifier(g.node("Sigmoid", "gate", [x]), 8, 5)
    made = project(g.finish((1, 5)), tmp_path / "c").path
    said = "nothing of libc but {0}memcpy{0} and {0}memset{0}, and of libm expf"
    assert said.format("") in (made / "small.h").read_text()
    assert said.format("`") in (made / "README.md").read_text()


@pytest.mark.parametrize("cpu", CPUS)
def test_clang_takes_it_without_a_warning_for_every_core(
    projects: Projects, cpu: str, tmp_path: Path
) -> None:
    """And leaves nothing to libc but what the page promises."""
    own = zig_path().parent / "lib" / "include"
    options = [
        *("--target=arm-none-eabihf", f"-mcpu={cpu}", "-mfloat-abi=hard"),
        *("-isystem", str(own), "-isystem", "/usr/include/newlib", "-std=c99"),
        *("-Wall", "-Wextra", "-Wconversion", "-Werror", "-c"),
    ]
    made = tmp_path / "small.o"
    for name, level in product(("residuals", "float-residuals"), ("-O0", "-O3")):
        source = projects[name, cpu].path / "small.c"
        run_zig("clang", made, *options, level, source)
        wanted = set(re.findall(r" U (\w+)", _said("arm-none-eabi-nm", made)))
        assert all(re.search("^small_|mem(cpy|set|clr)", each) for each in wanted)


def test_the_generated_c_is_the_one_a_person_read(
    projects: Projects,
) -> None:
    """Golden files; weights vary with ONNX Runtime's calibration, so numbers are left out."""
    folder = projects["residuals", "cortex-m7"].path
    for name in ("small.h", "small.c"):
        ours = re.sub(r"(?<![\w.])-?\d[\w.+-]*", "#", (folder / name).read_text())
        golden = Path(__file__).parent / "golden" / f"cortex_m_{name}"
        assert ours == golden.read_text()


def test_the_pattern_of_the_self_test_is_the_generated_one(
    networks: dict[str, onnx.ModelProto], projects: Projects
) -> None:
    graph = graph_for_c(networks["residuals"])
    (pattern,) = ports.test_patterns(graph, [tensors(networks["residuals"])[0]])
    expected = expected_output(graph, pattern)
    text = (projects["residuals", "cortex-m7"].path / "golden.h").read_text()
    stored = re.search(r"golden_output\[\d+\] = \{([^}]*)\}", text)
    assert stored is not None
    assert [int(v) for v in re.findall(r"-?\d+", stored[1])] == expected.tolist()
