"""A build finds its records, says what they cover, and survives those that are wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run
from onnx import TensorProto, helper, numpy_helper
from relay_worker import relay_worker
from tuning_worker import AXIS_77

from netship.bundle.manifest import Manifest
from netship.bundle.store import open_bundle
from netship.compile import driver
from netship.compile.backends.bundle import BundleBackend
from netship.compile.backends.request import BuildRequest
from netship.devices.sessions.opening import open_here
from netship.records.lookup import read
from netship.targets.child import EndedAbruptly
from netship.targets.errors import UserError
from netship.targets.presets import native
from netship.targets.progress import Progress
from netship.tuning import refine

pytestmark = pytest.mark.slow

# Splits the convolution's first axis into parts of nothing.
BY_ZERO = ["SP", 3, 0, 1, [0], 1]


def network(path: Path, width: int = 8) -> Path:
    """Two convolutions that differ in nothing but their sizes, and a classifier; ``width`` changes every task."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        values = random.uniform(-0.3, 0.3, shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    def conv(x: str, y: str, w: str) -> onnx.NodeProto:
        return helper.make_node("Conv", [x, w], [y], pads=[1, 1, 1, 1], name=y)

    nodes = [
        conv("image", "c1", "w1"),
        helper.make_node("Relu", ["c1"], ["r1"]),
        conv("r1", "c2", "w2"),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5])],
        [
            weight("w1", width, 3, 3, 3),
            weight("w2", 2 * width, width, 3, 3),
            weight("w3", 5, 2 * width),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def unlike_images(path: Path) -> Path:
    """What no image classifier has: convolutions of one channel, dense layers before a convolution with a bias."""
    random = np.random.default_rng(0)
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def weight(*shape: int) -> str:
        values = random.uniform(-0.3, 0.3, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{len(weights)}"))
        return weights[-1].name

    def whole(*numbers: int) -> str:
        weights.append(numpy_helper.from_array(np.array(numbers), f"w{len(weights)}"))
        return weights[-1].name

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    one = node("Conv", "image", weight(1, 1, 3, 3), weight(1), pads=[1] * 4)
    one = node("Conv", node("Relu", one), weight(1, 1, 1, 1), group=1)
    one = node("Reshape", one, whole(1, 1, 256))
    one = node("Conv", one, weight(1, 1, 3), pads=[1, 1])
    x = node("Conv", node("Reshape", one, whole(1, 1, 16, 16)), weight(8, 1, 3, 3))
    squeezed = node("Flatten", node("GlobalAveragePool", x))
    gate = node("Relu", node("Gemm", squeezed, weight(1, 8), weight(1), transB=1))
    gate = node("Gemm", gate, weight(1, 1), weight(1), transB=1)
    gate = node("Gemm", gate, weight(8, 1), weight(8), transB=1)
    scale = node("Reshape", node("Sigmoid", gate), whole(1, 8, 1, 1))
    x = node("Conv", node("Mul", x, scale), weight(4, 8, 3, 3), weight(4))
    nodes.append(helper.make_node("GlobalMaxPool", [x], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "unlike",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4, 1, 1])],
        weights,
    )
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def lowered_by_a_faulty_engine(model: str, records: Path) -> list[tuple[str, str]]:
    """The layout and its reason where TVM fails at its tuning tasks, and where it fails with every schedule."""
    from netship.compile.ir import onnx_form
    from netship.compile.relay import lower
    from netship.compile.relay.convert import Converted
    from netship.compile.relay.importer import to_relay

    network = Converted(to_relay(onnx_form.read(onnx.load(model))))
    compiled = lower._compile
    told: list[tuple[str, str]] = []

    def no_tasks(*_: object) -> None:
        layout = "OIHW"
        assert layout == "HWIO"

    def no_schedules(module: object, plan: Any, *rest: Any) -> Any:
        if plan.choices:
            raise ValueError("TVM's words\nInternalError: Check failed: rank == 4\n")
        return compiled(module, plan, *rest)

    for name, fault in (("kernels", no_tasks), ("_compile", no_schedules)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower, name, fault)
            made = lower.lower(network, native(), [read(records)]).description
            told.append((made.layout, made.reason))
    return told


def refusal_of_tasks(model: str) -> str:
    """What is said where TVM fails at a network's tasks."""
    from netship.compile.frontend import gate
    from netship.compile.ir import onnx_form
    from netship.compile.relay import tasks
    from netship.tuning.tasks import extract

    def no_tasks(*_: object) -> None:
        raise ValueError("no such layout")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "tuning_tasks", no_tasks)
        with pytest.raises(UserError) as refused:
            extract("net", onnx_form.read(gate.load(Path(model)).proto), native())
    return str(refused.value)


def naive_records(model: str) -> list[str]:
    """A record of each task: the schedule that AutoScheduler's search begins with."""
    from netship.targets.engine import compiler

    compiler()
    from tvm import auto_scheduler

    from netship.compile.ir import onnx_form
    from netship.compile.relay.convert import to_relay
    from netship.compile.relay.tasks import tuning_tasks

    network = to_relay(onnx_form.read(onnx.load(model)), native())
    tasks, _ = tuning_tasks(network, native())
    lines = []
    for task in tasks:
        state = task.compute_dag.get_init_state()
        result = auto_scheduler.MeasureResult([1e-3], 0, "", 0.1, 1.7e9)
        pair = auto_scheduler.MeasureInput(task, state), result
        lines.append(str(auto_scheduler.measure_record.dump_record_to_string(*pair)))
    return lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("tuned") / "small.onnx")


@pytest.fixture(scope="module")
def lines(model: Path) -> list[str]:
    with relay_worker() as worker:
        return worker.submit(naive_records, str(model)).result()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The working folder: its tuned/ is where records are found."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def log(path: Path, lines: list[str]) -> Path:
    target = native()
    header = {
        "target": target.tvm,
        "preset": target.name,
        "origin": "measured on host",
        "measured": "measured on host: a test",
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([f"# {json.dumps(header)}", *map(str.strip, lines), ""]))
    return path


def build(model: Path, output: Path, *records: Path, require: bool = False) -> Manifest:
    request = BuildRequest(
        model=str(model),
        target=native(),
        output=output,
        records=records,
        require_tuned=require,
    )
    with Progress() as progress:
        driver.build(request, progress)
    return open_bundle(output).manifest


def test_a_users_records_are_found_and_each_kernel_says_its_task(
    model: Path, lines: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder / "tuned" / "mine.json", lines)
    manifest = build(model, folder / "bundle", require=True)
    lowering = manifest.lowering
    assert lowering.layout == "NHWC" and lowering.records
    assert (lowering.records.file, lowering.records.refused) == ("mine.json", ())
    keys = {json.loads(line)["i"][0][0] for line in lines}
    served = {group.task for group in lowering.groups if group.macs}
    assert len(served) == 3 and served <= keys
    assert (
        "tuning records: tuned/mine.json, measured on host" in capsys.readouterr().err
    )
    with open_here(open_bundle(folder / "bundle")) as session:
        times = session.profile([np.zeros((1, 3, 16, 16), np.float32)])
    assert len(times) == len(lowering.groups)


@pytest.mark.parametrize(
    "step", [AXIS_77, BY_ZERO], ids=["cannot be applied", "cannot be compiled"]
)
def test_a_schedule_that_does_not_fit_is_named_and_the_next_best_serves(
    step: list[object],
    model: Path,
    lines: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = json.loads(lines[0])
    broken["i"][1][1] = [step]
    broken["r"][0] = [1e-9]
    log(folder / "tuned" / "mine.json", [json.dumps(broken), *lines])
    manifest = build(model, folder / "bundle")
    assert manifest.lowering.layout == "NHWC" and manifest.lowering.records
    (refused,) = manifest.lowering.records.refused
    assert refused.startswith("mine.json: record 1 of task ")
    assert refused in capsys.readouterr().err


def test_a_task_whose_records_all_misfit_counts_as_not_covered(
    model: Path, lines: list[str], folder: Path
) -> None:
    broken = json.loads(lines[0])
    broken["i"][1][1] = [AXIS_77]
    log(folder / "tuned" / "mine.json", [json.dumps(broken), *lines[1:]])
    manifest = build(model, folder / "bundle")
    records = manifest.lowering.records
    assert records and records.covered == records.tasks - 1 == 3
    # The task takes a neighbour's.
    assert manifest.lowering.layout == "NHWC" and records.fitted == 1
    assert manifest.lowering.reason.startswith("tuning records cover 3 of 4 tasks, ")
    with pytest.raises(UserError, match="cover 3 of 4 tasks"):
        build(model, folder / "other", require=True)


def test_records_that_give_wrong_answers_are_named_and_left_out(
    model: Path,
    lines: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest: Callable[..., object] = BundleBackend.verify

    def doubting(backend: object, path: Path, *rest: object) -> object:
        if open_bundle(path).manifest.lowering.layout == "NHWC":
            raise UserError("the compiled model is wrong")
        return honest(backend, path, *rest)

    monkeypatch.setattr(BundleBackend, "verify", doubting)
    log(folder / "tuned" / "mine.json", lines)
    assert build(model, folder / "bundle").lowering.layout == "NCHW"
    said = capsys.readouterr().err
    assert "with the records of mine.json: the compiled model is wrong" in said
    with pytest.raises(UserError, match="is wrong"):
        build(model, folder / "other", require=True)


def test_one_channel_and_dense_layers_before_convolutions_take_records(
    folder: Path,
) -> None:
    model = unlike_images(folder / "unlike.onnx")
    with relay_worker() as worker:
        lines = worker.submit(naive_records, str(model)).result()
    log(folder / "tuned" / "mine.json", lines)
    lowering = build(model, folder / "bundle", require=True).lowering
    assert lowering.layout == "NHWC"


def test_a_network_without_tasks_is_built_without_records(
    lines: list[str], folder: Path
) -> None:
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["y"])],
        "pointwise",
        [helper.make_tensor_value_info("image", kind, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, [1, 3, 8, 8])],
    )
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.save(model, folder / "relu.onnx")
    log(folder / "tuned" / "mine.json", lines)
    lowering = build(folder / "relu.onnx", folder / "bundle").lowering
    assert lowering.layout == "NCHW"
    assert lowering.reason == "it has no operator that can be tuned"


def test_what_tvm_cannot_do_with_records_is_built_without_them(
    model: Path, lines: list[str], folder: Path
) -> None:
    records = log(folder / "mine.json", lines)
    with relay_worker() as worker:
        told = worker.submit(lowered_by_a_faulty_engine, str(model), records).result()
        said = worker.submit(refusal_of_tasks, str(model)).result()
    assert "TVM cannot find what to tune in it (ValueError: no such layout)" in said
    (no_tasks, without_words), (no_schedules, words) = told
    assert no_tasks == no_schedules == "NCHW"
    # An exception without words is not quoted as "AssertionError" and nothing else.
    assert "AssertionError at test_tuned_builds.py:" in without_words
    assert 'assert layout == "HWIO"' in without_words
    assert "(InternalError: Check failed: rank == 4)" in words


def test_an_engine_that_crashes_with_records_builds_without_them(
    model: Path,
    lines: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest: Callable[..., object] = BundleBackend.build

    def crashing(backend: object, job: object, logs: object, *rest: object) -> object:
        if logs:
            raise EndedAbruptly("the engine's process ended abruptly (SIGSEGV)")
        return honest(backend, job, logs, *rest)

    monkeypatch.setattr(BundleBackend, "build", crashing)
    log(folder / "tuned" / "mine.json", lines)
    assert build(model, folder / "bundle").lowering.layout == "NCHW"
    assert "with tuning records: the engine's process" in capsys.readouterr().err
    with pytest.raises(EndedAbruptly):
        build(model, folder / "other", require=True)


def test_require_tuned_refuses_and_says_how_many_are_covered(
    model: Path, lines: list[str], tmp_path: Path
) -> None:
    some = log(tmp_path / "some.json", lines[:1])
    output = tmp_path / "bundle"
    options = ("--model", model, "--output", output, "--records", some)
    result = run("compile.build", *options, "--require-tuned")
    assert result.returncode == 2
    assert f"tuning records cover 1 of {len(lines)} tasks" in result.stderr
    assert not output.exists()


def test_refining_keeps_records_that_fit_and_a_build_finds_them(
    model: Path, lines: list[str], folder: Path
) -> None:
    broken = [json.loads(line) for line in lines]
    for each in broken:
        each["i"][1][1] = [AXIS_77]
        each["r"][0] = [2e-3]
    source = folder / "log.json"
    # As TVM's own tools write it, without a header.
    source.write_text("\n".join([*map(str.strip, lines), *map(json.dumps, broken)]))
    output = folder / "tuned" / "refined.json"
    output.parent.mkdir()
    options = ["--model", str(model), "--records", str(source), "--top", "2"]
    assert refine.main([*options, "--output", str(output), "--rounds", "2"]) == 0
    assert set(read(output).lines) == set(map(str.strip, lines))
    manifest = build(model, folder / "bundle", require=True)
    assert manifest.lowering.records
    assert manifest.lowering.records.file == "refined.json"


def test_refining_refuses_a_log_of_another_network(
    model: Path, lines: list[str], folder: Path
) -> None:
    log(folder / "tuned" / "mine.json", lines)
    with relay_worker() as worker:
        other = network(folder / "other.onnx", width=12)
        foreign = worker.submit(naive_records, str(other)).result()
    source = log(folder / "foreign.json", foreign)
    output = folder / "refined.json"
    options = ["--model", str(model), "--records", str(source), "--top", "2"]
    with pytest.raises(UserError, match="foreign.json: no record of a task of"):
        refine.main([*options, "--output", str(output)])
    assert not output.exists()
