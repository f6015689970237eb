"""ONNX Runtime's sessions: made in one place, their refusals one line, at the load and at the run."""

from __future__ import annotations

import ast
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT, run
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from test_layers import MODULES

from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend import gate
from netship.compile.frontend.reference import Reference
from netship.compile.quantize.calibrate import quantise
from netship.targets import onnx_runtime
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session
from netship.targets.progress import Progress

X = np.ones((1, 3, 8, 8), np.float32)


def network(
    operator: str, *shapes: tuple[int, ...], group: int | None = None
) -> onnx.ModelProto:
    """One operator on [1, 3, 8, 8], its other inputs of ``shapes``."""
    weights = [
        numpy_helper.from_array(np.ones(shape, np.float32), f"w{i}")
        for i, shape in enumerate(shapes)
    ]
    attributes: dict[str, Any] = {} if group is None else {"group": group}
    inputs = ["x", *(w.name for w in weights)]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], "layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, ir_version=8, opset_imports=opset)


WRONG = {
    "channel count": (network("Conv", (4, 5, 3, 3)), "kernel channels: 5"),
    "group": (network("Conv", (4, 3, 3, 3), group=2), "group: 2"),
    "output channels": (network("Conv", (4, 1, 3, 3), group=3), "not divisible"),
    "bias": (network("Conv", (4, 3, 3, 3), (7,)), "bias must be"),
    "normalisation": (
        network("BatchNormalization", *[(5,)] * 4),
        "Invalid input scale",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_only_a_run_finds_is_one_line(what: str) -> None:
    proto, said = WRONG[what]
    model = gate.check(proto, ModelIdentity(name="one.onnx", sha256="0" * 64))
    attempts = (
        lambda: Reference(model).run(X),
        lambda: Reference(model).time([X], 1),
        lambda: quantise(model, [[X]], False, Progress(quiet=True)),
    )
    for attempt in attempts:
        with pytest.raises(UserError, match=said) as refusal:
            attempt()
        message = str(refusal.value)
        assert message.startswith("one.onnx: ONNX Runtime cannot run it (")
        assert "\n" not in message and "onnxruntime_src" not in message


def test_an_output_of_another_shape_than_inferred_is_named_with_both() -> None:
    proto = network("Conv", (4, 3, 3, 3))
    model = gate.check(proto, ModelIdentity(name="one.onnx", sha256="0" * 64))
    (output,) = model.outputs
    height = output.shape[2]
    wider = output.model_copy(update={"shape": (1, 4, height, output.shape[3] + 1)})
    both = (
        rf"^one.onnx: output 'y' has the shape {re.escape(str(list(output.shape)))} in onnxruntime .* and "
        rf"{re.escape(str(list(wider.shape)))} by ONNX's rules"
    )
    with pytest.raises(UserError, match=both):
        Reference(replace(model, outputs=(wider,))).run(X)


def test_a_model_that_does_not_load_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^m: ONNX Runtime refuses it \(.+\); export"):
        Session(network("NoSuchOperator").SerializeToString(), "m")


def test_a_build_for_another_size_than_the_graphs_own_is_refused(
    tmp_path: Path,
) -> None:
    """As PyTorch exports ``x.view(1, 192)``: the size stands in the graph, beside a symbolic one."""
    proto = network("Flatten")
    proto.graph.node[0].CopyFrom(helper.make_node("Reshape", ["x", "shape"], ["y"]))
    shape = np.array([1, 192], np.int64)
    proto.graph.initializer.append(numpy_helper.from_array(shape, "shape"))
    for dimension in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "size"
    onnx.save(proto, tmp_path / "sized.onnx")
    options = ("--model", tmp_path / "sized.onnx", "--output", tmp_path / "built")
    result = run("compile.build", *options, "--input-shape", "x:1,3,12,12")
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: sized.onnx: ") and "--input-shape" in last
    assert not (tmp_path / "built").exists()


def quantised() -> onnx.ModelProto:
    """A sum of int8 activations."""
    constants = {"scale": np.float32(0.1), "zero": np.int8(-7)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *constants], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *constants], ["d"]),
        helper.make_node("Add", ["d", "d"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", *constants], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", *constants], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, X.shape)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, ir_version=8, opset_imports=opset)


def test_the_optimised_graph_is_written_in_onnx_s_own_operators(tmp_path: Path) -> None:
    path = tmp_path / "optimised.onnx"
    data = network("Conv", (4, 3, 3, 3)).SerializeToString()
    Session(data, "m", optimisation="basic", optimised=path)
    written = onnx.load(path)
    assert [node.op_type for node in written.graph.node] == ["Conv"]


def test_int8_activations_are_computed_in_integers(tmp_path: Path) -> None:
    path = tmp_path / "optimised.onnx"
    Session(quantised().SerializeToString(), "m", optimised=path)
    made = [node.op_type for node in onnx.load(path).graph.node]
    assert "QLinearAdd" in made


def test_no_other_module_makes_sessions() -> None:
    # The emulated Python of the baselines has nothing of the project.
    allowed = {"targets.onnx_runtime_server", "bench.baselines.run_baseline"}
    for name, path in MODULES.items():
        if name not in allowed:
            named = {
                node.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute)
            }
            assert "InferenceSession" not in named, path.relative_to(ROOT)


def test_outputs_come_in_the_order_asked_for() -> None:
    proto = network("Relu")
    proto.graph.node.append(helper.make_node("Neg", ["y"], ["z"]))
    proto.graph.output.append(
        helper.make_tensor_value_info("z", TensorProto.FLOAT, X.shape)
    )
    found: list[NDArray[np.float32]] = Session(proto.SerializeToString(), "m").run(
        ["z", "y"], {"x": X}
    )
    assert [each.flat[0] for each in found] == [-1.0, 1.0]


def test_a_quantised_softmax_is_compared_with_the_real_numbers(tmp_path: Path) -> None:
    # uint8 → float32 → Softmax → uint8 → float32.
    scales = {"a": (0.02, 128), "b": (1 / 255, 0)}
    constants, nodes = [], []
    for name, (scale, zero) in scales.items():
        for part, value in (("s", np.float32(scale)), ("z", np.uint8(zero))):
            constants.append(numpy_helper.from_array(np.array(value), name + part))
    for kind, source, made, by in (
        ("QuantizeLinear", "x", "xq", "a"),
        ("DequantizeLinear", "xq", "xf", "a"),
        ("Softmax", "xf", "p", ""),
        ("QuantizeLinear", "p", "pq", "b"),
        ("DequantizeLinear", "pq", "y", "b"),
    ):
        inputs = [source, *((f"{by}s", f"{by}z") if by else ())]
        node = helper.make_node(kind, inputs, [made], made)
        if not by:
            node.attribute.append(helper.make_attribute("axis", 1))
        nodes.append(node)
    shape = [1, 3, 16, 16]
    graph = helper.make_graph(
        nodes,
        "softmax",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    opset = [helper.make_opsetid("", 13)]
    path = tmp_path / "softmax.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    image = np.random.default_rng(3).uniform(-2, 2, shape).astype(np.float32)
    powers = np.exp(np.rint(image / np.float32(0.02)) * 0.02)
    exact = powers / powers.sum(axis=1, keepdims=True)
    model = gate.load(path)
    by_default = Session(model.proto.SerializeToString(), "softmax")
    exactly, coarsely = (
        np.abs(each - exact).max() * 255
        for each in (
            Reference(model).run(image)[0],
            by_default.run(["y"], {"x": image})[0],
        )
    )
    assert exactly <= 0.5 + 1e-3
    # The reason for it; where this fails after an update, the difference can go.
    assert coarsely > 0.6


def crashing() -> onnx.ModelProto:
    """Valid ONNX at which ONNX Runtime 1.32 ends by SIGSEGV, unless its optimisations are fewer."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 2, 0, 3]),
        helper.make_node("Less", ["turned", "turned"], ["less"]),
        helper.make_node("Cast", ["less"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["number", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "crash",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((8, 2), np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, ir_version=8, opset_imports=opset)


def test_a_crash_leads_to_fewer_optimisations() -> None:
    other = Session(network("Relu").SerializeToString(), "other")
    session = Session(crashing().SerializeToString(), "m")
    assert session.version.endswith(" with optimisations: basic")
    (found,) = session.run(["y"], {"x": X})
    np.testing.assert_array_equal(found, np.zeros((3, 8, 1, 2), np.float32))
    # The session that ended with it is made again.
    assert other.run(["y"], {"x": X})[0].flat[0] == 1
    assert other.version == session.version.partition(" with")[0]


def test_a_crash_with_and_without_optimisations_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_runtime, "_FEWER", {})
    with pytest.raises(UserError, match=r"^m: ONNX Runtime crashes on it \(SIGSEGV\)"):
        Session(crashing().SerializeToString(), "m")


def test_a_crash_while_it_runs_leads_to_fewer_optimisations() -> None:
    session = Session(network("Relu").SerializeToString(), "m")
    session._server._process.send_signal(signal.SIGSEGV)
    assert session.run(["y"], {"x": X})[0].flat[0] == 1
    assert session.version.endswith(" with optimisations: basic")
    with pytest.raises(UserError, match="^m: ONNX Runtime cannot run it"):
        session.run(["y"], {"x": X[0]})


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"was killed \(SIGKILL\), as Linux does when memory is short"),
        (signal.SIGTERM, r"was ended by another program \(SIGTERM\); run the"),
    ],
)
def test_what_is_ended_from_outside_has_not_crashed(
    number: signal.Signals, said: str
) -> None:
    session = Session(network("Relu").SerializeToString(), "m")
    session._server._process.send_signal(number)
    session._server._process.wait()
    with pytest.raises(UserError, match=f"^ONNX Runtime's process {said}"):
        session.run(["y"], {"x": X})
    assert session.run(["y"], {"x": X})[0].flat[0] == 1
    assert "optimisations" not in session.version


def test_onnx_runtime_that_cannot_start_has_not_crashed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(onnx_runtime, "_running", [])
    with pytest.raises(UserError, match="^ONNX Runtime's process ended .exit code 1"):
        Session(network("Relu").SerializeToString(), "m")
