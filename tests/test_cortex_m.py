"""Microcontrollers: the generated C gives the numbers it should, on every core, in the memory planned."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
from cortex_m_projects import (
    CPUS,
    FLOAT,
    INT8,
    NAMES,
    Projects,
    expected_output,
    graph_for_c,
    planned,
)
from integers import Graph as Writer
from integers import patterns
from onnx import TensorProto, helper, numpy_helper
from reference_answers import seeded

from netship.bundle.manifest import parse
from netship.bundle.store import Bundle
from netship.compile.backends.c.arrange import arrange
from netship.compile.backends.c.build import written
from netship.compile.backends.c.steps import fuse
from netship.compile.frontend import family
from netship.compile.program.planner import inplace_distance
from netship.devices.microcontroller import firmware
from netship.devices.microcontroller.boards import BOARDS
from netship.devices.microcontroller.firmware import run_firmware
from netship.devices.microcontroller.host import run_on_host
from netship.devices.microcontroller.session import (
    FirmwareSession,
    interface_of,
    open_firmware,
    to_input,
)
from netship.targets.errors import UserError
from netship.targets.presets import this_cpu
from netship.targets.progress import Progress


def _inputs(bundle: Bundle, proto: onnx.ModelProto) -> np.ndarray:
    """Two patterns; in int8 also noise over the whole range, and its ends."""
    dtype = interface_of(bundle).inputs[0].dtype
    inputs = [np.frombuffer(to_input([x], bundle), dtype) for x in patterns(proto, 2)]
    if dtype == "float32":
        return np.array(inputs)
    size = interface_of(bundle).inputs[0].nbytes
    noise = np.random.default_rng(1).integers(-128, 128, (3, size), dtype=np.int8)
    ends = np.array([[-128], [127]], np.int8).repeat(size, 1)
    return np.concatenate([inputs, noise, ends])


def stored(inputs: np.ndarray) -> list[bytes]:
    return [each.tobytes() for each in inputs]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", INT8)
def test_the_c_on_this_machine_gives_the_integers_of_the_formulas(
    networks: dict[str, onnx.ModelProto],
    projects: Projects,
    name: str,
    cpu: str,
) -> None:
    bundle, graph = projects[name, cpu], graph_for_c(networks[name])
    inputs = _inputs(bundle, networks[name])
    outputs = run_on_host(bundle.path, "small", interface_of(bundle), stored(inputs))
    for image, (output,) in zip(inputs, outputs, strict=True):
        assert (output == expected_output(graph, image)).all()


@pytest.mark.parametrize("name", FLOAT)
def test_float32_on_this_machine_is_near_onnx_runtime(
    networks: dict[str, onnx.ModelProto],
    projects: Projects,
    name: str,
) -> None:
    import onnxruntime

    bundle, proto = projects[name, "cortex-m7"], networks[name]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = _inputs(bundle, proto)
    outputs = run_on_host(bundle.path, "small", interface_of(bundle), stored(inputs))
    for x, (output,) in zip(patterns(proto, 2), outputs, strict=True):
        expected = session.run(None, {"image": x})[0].ravel()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", NAMES)
def test_a_board_gives_what_this_machine_gives(
    networks: dict[str, onnx.ModelProto],
    projects: Projects,
    name: str,
    cpu: str,
    tmp_path: Path,
) -> None:
    """Bit by bit: in float32 too, both with the fused multiply-add that this machine has."""
    bundle = projects[name, cpu]
    inputs = _inputs(bundle, networks[name])
    expected = np.array(
        run_on_host(bundle.path, "small", interface_of(bundle), stored(inputs))
    )
    with open_firmware(bundle) as session:
        run = run_firmware(
            session.image, interface_of(bundle), stored(inputs), tmp_path, 60
        )
    if interface_of(bundle).inputs[0].dtype == "int8" or "fma" in this_cpu().features:
        np.testing.assert_array_equal(np.array(run.outputs), expected)
    np.testing.assert_allclose(np.array(run.outputs), expected, rtol=0, atol=1e-5)
    assert run.self_test == 0
    assert 0 < run.stack < 2048


@pytest.mark.parametrize("name", ["residuals", "float-residuals"])
def test_an_input_that_is_not_finite_is_refused(projects: Projects, name: str) -> None:
    bundle = projects[name, "cortex-m7"]
    image = np.zeros(bundle.manifest.inputs[0].shape, np.float32)
    image[0, 0, 0, 1] = np.inf
    with pytest.raises(UserError, match="'image': has NaN or infinity; give finite"):
        to_input([image], bundle)


def test_figures_say_where_memory_and_instructions_go(
    networks: dict[str, onnx.ModelProto], projects: Projects
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


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("arena_bytes",), 0, "greater than 0"),
        (("input_offsets", 0), -8, "greater than or equal to 0"),
        (("input_offsets", 0), 1 << 20, "input does not lie in the arena"),
        (("steps",), 0, "greater than 0"),
        (("inputs", 0, "nbytes"), 4, "have other sizes"),
        (("outputs", 0, "nbytes"), 1 << 20, "have other sizes"),
        (("outputs",), [], "at least 1 item"),
    ],
)
def test_memory_that_cannot_be_is_refused(
    projects: Projects, path: tuple[str | int, ...], value: object, words: str
) -> None:
    manifest = json.loads(projects["residuals", "cortex-m7"].manifest.to_json())
    place = manifest["firmware"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match=words):
        parse(json.dumps(manifest).encode(), "manifest.json")


@pytest.mark.parametrize("cpu", CPUS)
def test_instructions_are_counted_beyond_the_timers_range(
    projects: Projects, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer of 8 bits begins anew many times in one inference; an interrupt counts that."""
    bundle = projects["float-chain", cpu]
    image = np.zeros(bundle.manifest.inputs[0].shape, np.float32)

    def instructions() -> float:
        with open_firmware(bundle) as session:
            assert isinstance(session, FirmwareSession)
            session.run(image)
            return session.figures().instructions

    whole, plain = instructions(), firmware.definitions
    monkeypatch.setattr(
        firmware, "definitions", lambda *given: [*plain(*given), "-DTICKS=0xFF"]
    )
    assert whole > 10 * 256 * BOARDS[cpu].instructions_per_tick
    assert instructions() == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_live_is_overwritten_and_the_expanded_tensor_never_lies_whole(
    networks: dict[str, onnx.ModelProto], name: str
) -> None:
    arranged = planned(graph_for_c(networks[name]))
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


@pytest.mark.parametrize("name", INT8)
def test_widened_inputs_take_no_larger_arena(
    networks: dict[str, onnx.ModelProto], name: str
) -> None:
    """As many pixels as there is room for: four, or fewer around the peak, where rows not yet made serve."""
    arranged = planned(graph_for_c(networks[name]))
    graph = graph_for_c(networks[name])
    steps = written(fuse(graph), graph.opset, Progress(quiet=True))
    assert arranged.plan.nbytes <= arrange(graph, steps).plan.nbytes
    blocks = [block for step in arranged.steps for block in getattr(step, "blocks", ())]
    assert max(block.pixels for block in blocks) == 4
    if name == "branches":
        (second,) = (each for each in blocks if each.name == "second")
        assert second.pixels < 4
        assert arranged.spare(second)


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
    arena = planned(graph_for_c(_with_scales(family.build(width, size)))).plan
    assert arena.nbytes == arena.lower_bound < most


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


def test_layers_of_one_pixel_need_their_input_and_their_output() -> None:
    """A fully connected layer writes no output over an input that a later one reads."""
    w = Writer(3, 8)
    flat = w.node("Flatten", "flat", ["image"])
    for name, inputs, outputs in (("first", 192, 16), ("last", 16, 5)):
        weights = w.constant(f"{name}.w", seeded((outputs, inputs)))
        flat = w.node("Gemm", name, [flat, weights], transB=1)
    arena = planned(graph_for_c(w.finish((1, 5)))).plan
    assert arena.nbytes == arena.lower_bound == 4 * (192 + 16)
