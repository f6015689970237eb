"""Microcontrollers: the generated C gives the integers it should, on every core, in the memory planned."""

from __future__ import annotations

import re
import subprocess
from itertools import combinations, product
from pathlib import Path

import integers
import numpy as np
import onnx
import pytest
from conftest import run
from integers import chain, graph_of, oddities, patterns, project, quantised, residuals
from onnx import TensorProto, helper, numpy_helper

from bundle.store import Bundle, open_bundle
from compile import passes
from compile.backends.c import emit, support
from compile.backends.c.arrange import arrange
from compile.backends.c.build import PASSES
from compile.frontend import family
from compile.ir import evaluate
from compile.ir.graph import Graph
from compile.program.planner import inplace_distance
from devices.microcontroller.boards import BOARDS
from devices.microcontroller.firmware import run_firmware
from devices.microcontroller.host import run_on_host
from devices.microcontroller.session import (
    FirmwareSession,
    interface_of,
    open_firmware,
    to_input,
)
from devices.sessions.opening import check_served
from targets.errors import UserError
from targets.presets import this_cpu
from targets.toolchain import run_zig, zig_path

CPUS = sorted(BOARDS)
INT8 = ["residuals", "oddities", "chain"]
FLOAT = [f"float-{name}" for name in INT8]
NAMES = INT8 + FLOAT


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    folder = tmp_path_factory.mktemp("quantised")
    return {
        "residuals": quantised(residuals(), folder),
        "oddities": quantised(oddities(), folder, unsigned=True),
        "chain": quantised(chain(), folder),
        "float-chain": chain(),
        "float-residuals": residuals(),
        "float-oddities": oddities(),
    }


@pytest.fixture(scope="module")
def projects(
    networks: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("projects")
    return {
        (name, cpu): project(proto, folder / f"{name}-{cpu}", cpu)
        for name, proto in networks.items()
        for cpu in CPUS
    }


def _inputs(bundle: Bundle, proto: onnx.ModelProto) -> np.ndarray:
    """Two patterns; in int8 also noise over the whole range, and its ends."""
    inputs = [to_input(x, bundle) for x in patterns(proto, 2)]
    if interface_of(bundle).dtype == "float32":
        return np.array(inputs)
    size = interface_of(bundle).input_bytes
    noise = np.random.default_rng(1).integers(-128, 128, (3, size), dtype=np.int8)
    ends = np.array([[-128], [127]], np.int8).repeat(size, 1)
    return np.concatenate([inputs, noise, ends])


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", INT8)
def test_the_c_on_this_machine_gives_the_integers_of_the_formulas(
    networks: dict[str, onnx.ModelProto],
    projects: dict[tuple[str, str], Bundle],
    name: str,
    cpu: str,
) -> None:
    bundle, graph = projects[name, cpu], _graph(networks[name])
    inputs = _inputs(bundle, networks[name])
    outputs = run_on_host(bundle.path, "small", interface_of(bundle), inputs)
    for image, output in zip(inputs, outputs, strict=True):
        assert (output == _expected(graph, image)).all()


def _graph(proto: onnx.ModelProto) -> Graph:
    """As the C kernels take it."""
    return passes.run(PASSES, graph_of(proto))


def _expected(graph: Graph, image: np.ndarray) -> np.ndarray:
    """The output's integers by compile.ir.evaluate, of which other tests show that they are ONNX Runtime's."""
    height, width, channels = graph.inputs[0].image
    pixels = image.reshape(1, height, width, channels).transpose(0, 3, 1, 2)
    return evaluate.run(graph, pixels)[0].ravel()


@pytest.mark.parametrize("name", FLOAT)
def test_float32_on_this_machine_is_near_onnx_runtime(
    networks: dict[str, onnx.ModelProto],
    projects: dict[tuple[str, str], Bundle],
    name: str,
) -> None:
    import onnxruntime

    bundle, proto = projects[name, "cortex-m7"], networks[name]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = _inputs(bundle, proto)
    outputs = run_on_host(bundle.path, "small", interface_of(bundle), inputs)
    for x, output in zip(patterns(proto, 2), outputs, strict=True):
        expected = session.run(None, {"image": x})[0].ravel()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", NAMES)
def test_a_board_gives_what_this_machine_gives(
    networks: dict[str, onnx.ModelProto],
    projects: dict[tuple[str, str], Bundle],
    name: str,
    cpu: str,
    tmp_path: Path,
) -> None:
    """Bit by bit: in float32 too, both with the fused multiply-add that this machine has."""
    bundle = projects[name, cpu]
    inputs = _inputs(bundle, networks[name])
    expected = run_on_host(bundle.path, "small", interface_of(bundle), inputs)
    with open_firmware(bundle) as session:
        run = run_firmware(session.image, interface_of(bundle), inputs, tmp_path, 60)
    if interface_of(bundle).dtype == "int8" or "fma" in this_cpu().features:
        np.testing.assert_array_equal(run.outputs, expected)
    np.testing.assert_allclose(run.outputs, expected, rtol=0, atol=1e-5)
    assert run.self_test == 0
    assert 0 < run.stack < 2048


def test_figures_say_where_memory_and_instructions_go(
    networks: dict[str, onnx.ModelProto], projects: dict[tuple[str, str], Bundle]
) -> None:
    bundle = projects["residuals", "cortex-m7"]
    with open_firmware(bundle) as session:
        assert isinstance(session, FirmwareSession)
        session.run(patterns(networks["residuals"], 1)[0])
        figures = session.figures()
    interface = interface_of(bundle)
    assert figures.max_error == 0
    assert figures.static_bytes == 0
    assert figures.ram_bytes == interface.arena_bytes + 5 + figures.stack_bytes
    assert figures.flash_bytes > figures.code_bytes > 1000
    counted = sum(part.instructions for part in figures.parts)
    assert counted == pytest.approx(figures.instructions, rel=0.1)
    assert [part.name for part in figures.parts][:3] == [
        "a.project",
        "b.add",
        "c.project",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_live_is_overwritten_and_the_expanded_tensor_never_lies_whole(
    networks: dict[str, onnx.ModelProto], name: str
) -> None:
    arranged = arrange(_graph(networks[name]))
    arena, calls = arranged.plan, arranged.program.calls
    for one, other in combinations(arena.buffers, 2):
        if one.first > other.last or other.first > one.last:
            continue
        if one.end <= other.offset or other.end <= one.offset:
            continue
        output, source = (
            (one, other) if one.inplace_of == other.tensor else (other, one)
        )
        assert output.inplace_of == source.tensor is not None
        pairs = calls[output.first].inplace
        assert pairs is not None
        assert output.offset + inplace_distance(pairs) <= source.offset
    assert arena.lower_bound <= arena.nbytes < 1.2 * arena.lower_bound
    whole = {buffer.name for buffer in arena.buffers}
    if name.endswith("residuals"):
        assert "b.expand" not in whole
    if name.endswith("chain"):
        assert "a.project" not in whole


@pytest.mark.parametrize(
    ("width", "size", "most"),
    [
        # The image is 27,648 bytes; nothing but a ring of rows comes on top.
        (0.35, 96, 31_000),
        # Paper, Table 3: 400 KB in 16 bits, 112 × 112 × 16. Here with the image.
        (1.0, 224, 112 * 112 * 16),
    ],
)
def test_the_family_fits_the_paper_s_memory(width: float, size: int, most: int) -> None:
    arena = arrange(_graph(_with_scales(family.build(width, size)))).plan
    assert arena.nbytes == arena.lower_bound < most


def test_an_arena_limit_says_what_is_missing_and_where(
    networks: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"limit 1,000 bytes.* too many; the peak is '\w"
    ):
        project(networks["residuals"], tmp_path / "c", limit=1000)


def _with_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """A QDQ graph of the same shapes with scales that mean nothing, without a calibration."""
    weights = {w.name: w for w in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    scale = numpy_helper.from_array(np.array(0.02, np.float32), "unit")
    zero = numpy_helper.from_array(np.array(0, np.int8), "none")
    kept = [scale, zero]

    def pair(name: str) -> str:
        nodes.append(
            helper.make_node("QuantizeLinear", [name, "unit", "none"], [f"{name}.q"])
        )
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", "unit", "none"], [f"{name}.dq"]
            )
        )
        return f"{name}.dq"

    renamed = {"input": pair("input")}
    for node in model.graph.node:
        inputs = [renamed.get(name, name) for name in node.input]
        if node.op_type in ("Conv", "Gemm"):
            shape = list(weights[node.input[1]].dims)
            stored = np.ones(shape, np.int8)
            kept.append(numpy_helper.from_array(stored, f"{node.name}.w"))
            nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [f"{node.name}.w", "unit", "none"],
                    [f"{node.name}.wdq"],
                )
            )
            inputs = [inputs[0], f"{node.name}.wdq"]
        elif node.op_type == "Clip":
            kept += [weights[name] for name in node.input[1:] if name]
        copy = helper.make_node(node.op_type, inputs, node.output, node.name)
        copy.attribute.extend(node.attribute)
        nodes.append(copy)
        follows = [n for n in model.graph.node if node.output[0] in n.input]
        if not (len(follows) == 1 and follows[0].op_type == "Clip"):
            renamed[node.output[0]] = pair(node.output[0])
    last = renamed[model.graph.output[0].name]
    output = helper.make_tensor_value_info(last, TensorProto.FLOAT, (1, 1000))
    made = helper.make_graph(nodes, "g", model.graph.input, [output], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)])


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
    projects: dict[tuple[str, str], Bundle], name: str, tmp_path: Path
) -> None:
    """Codes of the header, under gcc's sanitizers, without a warning."""
    bundle = projects[name, "cortex-m7"]
    value = f"-DVALUE={interface_of(bundle).c_type}"
    (tmp_path / "probe.c").write_text(PROBE)
    assert _compile_and_run(bundle.path, tmp_path, value) == "1 1 1 2 3 3 0 0 0"


def test_weights_damaged_in_flash_fail_the_self_test(
    projects: dict[tuple[str, str], Bundle], tmp_path: Path
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


def _compile_and_run(folder: Path, scratch: Path, value: str) -> str:
    program = scratch / "probe"
    sources = [scratch / "probe.c", folder / "small.c", folder / "small_weights.c"]
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
    projects: dict[tuple[str, str], Bundle], tmp_path: Path
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
    projects: dict[tuple[str, str], Bundle], tmp_path: Path
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


@pytest.mark.parametrize("cpu", CPUS)
def test_clang_takes_it_without_a_warning_for_every_core(
    projects: dict[tuple[str, str], Bundle], cpu: str, tmp_path: Path
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
    projects: dict[tuple[str, str], Bundle],
) -> None:
    """Golden files; weights vary with ONNX Runtime's calibration, so numbers are left out."""
    folder = projects["residuals", "cortex-m7"].path
    for name in ("small.h", "small.c"):
        ours = re.sub(r"(?<![\w.])-?\d[\w.+-]*", "#", (folder / name).read_text())
        golden = Path(__file__).parent / "golden" / f"cortex_m_{name}"
        assert ours == golden.read_text()


def _with_softmax() -> onnx.ModelProto:
    g = integers.Graph(3, 8)
    x = g.convolution("stem", "image", 3, 8, 3)
    x = g.node("Softmax", "gate", [x], axis=1)
    g.convolution("last", x, 8, 8)
    return g.finish((1, 8, 6, 6))


def test_an_operator_without_a_c_lowering_is_named(tmp_path: Path) -> None:
    for proto in (quantised(_with_softmax(), tmp_path), _with_softmax()):
        with pytest.raises(
            UserError,
            match=r"node 'gate' \(Softmax\).* no C lowering; these have: Conv",
        ):
            support.check(_graph(proto))


def test_operators_that_are_not_quantised_are_named(tmp_path: Path) -> None:
    proto = quantised(residuals(), tmp_path)
    for maker, reader in (("b.add", "c.expand"), ("c.project", "head")):
        (node,) = (n for n in proto.graph.node if n.name == reader)
        node.input[0] = next(n.output[0] for n in proto.graph.node if n.name == maker)
    with pytest.raises(UserError, match=r"'b.add' .*works on float32, and so do 'c.ex"):
        support.check(_graph(proto))


def test_float32_for_a_core_without_an_fpu_is_refused_in_one_line(
    projects: dict[tuple[str, str], Bundle],
) -> None:
    source = projects["float-residuals", "cortex-m4"].path / "small.c"
    options = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=soft", "-fsyntax-only"]
    made = subprocess.run(
        ["arm-none-eabi-gcc", *options, source],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in made.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "needs a core with an FPU" in errors[0] and "--quantize int8" in errors[0]


def test_a_network_too_large_for_the_board_says_by_how_much(
    projects: dict[tuple[str, str], Bundle],
) -> None:
    bundle = projects["residuals", "cortex-m55"]
    firmware = interface_of(bundle).model_copy(update={"arena_bytes": 1 << 20})
    manifest = bundle.manifest.model_copy(update={"firmware": firmware})
    with pytest.raises(
        UserError, match=r"mps3-an547: .* bytes, [\d,]+ more than its RAM; the peak is"
    ):
        open_firmware(Bundle(bundle.path, manifest))


def test_missing_tools_give_the_line_that_installs_them(
    projects: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt install gcc-arm-none-eabi"):
        open_firmware(open_bundle(projects["residuals", "cortex-m7"].path))


def test_the_pattern_of_the_self_test_is_the_generated_one(
    networks: dict[str, onnx.ModelProto], projects: dict[tuple[str, str], Bundle]
) -> None:
    graph = _graph(networks["residuals"])
    pattern = emit.test_pattern(graph)
    expected = _expected(graph, pattern)
    text = (projects["residuals", "cortex-m7"].path / "golden.h").read_text()
    stored = re.search(r"golden_output\[\d+\] = \{([^}]*)\}", text)
    assert stored is not None
    assert [int(v) for v in re.findall(r"-?\d+", stored[1])] == expected.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "cortex-m7", "--format", "standalone"], "takes C source; leave"),
        (["--target", "x86-64-v3", "--format", "c"], "such as --target cortex-m7"),
        (
            ["--target", "x86-64-v3", "--arena-limit", "72KB"],
            "--arena-limit: is for micro",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(
    options: list[str], said: str, tmp_path: Path
) -> None:
    model = ["--model", "mobilenetv2-0.1-32", "--output", tmp_path / "out"]
    result = run("compile.build", *model, *options)
    assert result.returncode == 2
    assert re.search(said, result.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_c_source_is_not_sent_to_a_server(
    projects: dict[tuple[str, str], Bundle],
) -> None:
    with pytest.raises(UserError, match="is C source for a microcontroller; leave"):
        check_served(projects["residuals", "cortex-m7"])
