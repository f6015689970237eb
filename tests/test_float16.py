"""float16 arithmetic: what it takes and refuses, every operator under emulation, and what the guard leaves in float32."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import run
from gated import IDENTITY
from onnx import helper, numpy_helper
from relay_worker import relay_worker

from netship.bundle import golden
from netship.bundle.manifest import Float16
from netship.bundle.store import open_bundle
from netship.compile import passes
from netship.compile.backends.request import BuildRequest
from netship.compile.driver import build
from netship.compile.frontend import sources
from netship.compile.frontend.gate import check
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.passes.half import LONGEST_SUM
from netship.compile.quantize import float16, simulation
from netship.compile.quantize.reduced import Reduced
from netship.compile.sixteen_bits import tuned_graph
from netship.records import lookup
from netship.runtime_demo.comparison import reference_for
from netship.targets.errors import UserError
from netship.targets.presets import PRESETS, resolve
from netship.targets.progress import Progress
from netship.tuning.tasks import extract

A76 = ("--target", "arm-cortex-a76", "--precision", "float16")


def network(body: str, **constants: Any) -> Model:
    """A network from ``x`` [1, 4, 8, 8] to ``y`` and, in range, ``other`` [1, 4, 8, 8]."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] other) {{
          {body} other = Abs(x) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in constants.items()
    )
    return check(proto, IDENTITY)


def weights(scale: float = 1, inputs: int = 4, outputs: int = 4) -> Any:
    random = np.random.default_rng(0)
    return scale * random.standard_normal((outputs, inputs, 1, 1)) / inputs


def guarded(model: Model) -> tuple[Reduced[Float16], dict[str, str]]:
    """The float16 network, and the reason of each operator in float32; nothing of it is infinite in ONNX Runtime."""
    images = golden.of_all(golden.signed_inputs, model.inputs, None)
    half = float16.prepare(model, images, 0, (), passes.no_dump)
    for answer in (
        simulation.Probe(half.graph, ["y", "other"], model).run(images[0]).values()
    ):
        assert np.isfinite(answer).all()
    return half, {each.tensor: each.reason for each in half.facts.float32}


def test_a_network_in_range_is_float16_with_float32_ports() -> None:
    model = network("a = Conv(x, w) b = Relu(a) y = Add(b, x)", w=weights())
    half, kept = guarded(model)
    assert not kept
    assert {each.dtype for each in half.graph.inputs + half.graph.outputs} == {
        "float32"
    }
    stored = {each.dtype for o in half.graph.operators for each in o.inputs if each}
    assert stored == {"float32", "float16"}
    kinds = [each.kind for each in half.graph.operators]
    assert kinds == ["Cast", "Conv", "Relu", "Add", "Cast", "Abs", "Cast"]
    assert float16.graph_of(model, half.facts) == half.graph


@pytest.mark.parametrize(
    "body, constants, kept, reason",
    [
        ("a = Conv(x, w) y = Relu(a)", {"w": weights(1e5)}, "a", "values of"),
        ("a = Conv(x, w) y = Relu(a)", {"w": weights(1e-7)}, "a", "'a' has values"),
        ("a = Mul(x, c) b = Neg(a) y = Mul(b, d)", {"c": 1e6, "d": 1e-6}, "b", "'a'"),
        ("a = Exp(x) b = Mul(a, c) y = Neg(b)", {"c": 1e4}, "y", "'b' has values"),
        ("a = Pow(x, c) y = Relu(a)", {"c": 9.0}, "y", "'a' has values of"),
        ("a = Add(x, c) b = Div(x, a) y = Neg(b)", {"c": 1e-9}, "a", "values of 1e-09"),
        ("a = Mul(x, c) y = Reciprocal(a)", {"c": 1e-3}, "a", "'a' has values of"),
        ("a = Mul(x, c) y = Add(a, x)", {"c": 1e-6}, "a", "values of"),
    ],
)
def test_what_overflows_or_vanishes_stays_in_float32(
    body: str, constants: dict[str, Any], kept: str, reason: str
) -> None:
    _, found = guarded(network(body, **constants))
    assert reason in found[kept]


def test_partial_sums_that_overflow_stay_in_float32() -> None:
    """The products cancel: the sums are small, the partial ones are not."""
    plus = np.full((4, 4, 1, 1), 3e4)
    plus[:, 2:] *= -1
    body = (
        "a = ReduceMean<axes = [1]>(x) b = Concat<axis = 1>(a, a, a, a) y = Conv(b, w)"
    )
    _, found = guarded(network(body, w=plus))
    assert "partial sums" in found["y"]


def test_neighbours_that_cause_most_of_the_error_stay_in_float32() -> None:
    """At 3000 a float16 has steps of two; both operators must be in float32 for it to help."""
    body = """a = Conv(x, w) b = Relu(a) d = Add(b, offset) e = Sub(d, offset) f = Conv(e, w)
        i = Relu(f) j = Conv(i, w) y = Add(j, x)"""
    half, found = guarded(network(body, w=weights(), offset=3000.0))
    assert found.keys() == {"d", "e"}
    assert "error of" in found["d"]
    assert half.measured["cosine"] > 0.9999


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_that_overflow_are_guarded(seed: int) -> None:
    """Layers of any size of weights, with exponentials and powers between: nothing is infinite that was not."""
    random = np.random.default_rng(seed)
    lines, constants, at = [], dict[str, Any](), "x"
    for index in range(8):
        kind = random.choice(["Conv", "Conv", "Mul", "Exp", "Pow", "Sum", "Clip"])
        made = f"t{index}"
        if kind == "Conv":
            constants[f"w{index}"] = weights(10.0 ** random.integers(-6, 6))
            lines.append(f"{made} = Conv({at}, w{index})")
        elif kind == "Mul":
            constants[f"c{index}"] = 10.0 ** random.integers(-9, 6)
            lines.append(f"{made} = Mul({at}, c{index})")
        elif kind == "Sum":
            lines.append(f"{made} = Add({at}, {at})")
        elif kind == "Pow":
            constants[f"c{index}"] = 2.0
            lines.append(f"{made} = Pow({at}, c{index})")
        elif kind == "Exp":
            constants |= {f"l{index}": -20.0, f"h{index}": 20.0}
            lines.append(f"b{index} = Clip({at}, l{index}, h{index})")
            lines.append(f"{made} = Exp(b{index})")
        else:
            constants |= {f"l{index}": -100.0, f"h{index}": 100.0}
            lines.append(f"{made} = Clip({at}, l{index}, h{index})")
        at = made
    lines.append(f"last = Clip({at}, l, h) y = Add(last, x)")
    model = network(" ".join(lines), **constants, l=-6.0, h=6.0)
    half, _ = guarded(model)
    assert half.measured["cosine"] > 0.999


def test_a_tensor_that_is_infinite_all_the_same_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(float16, "_kept", lambda graph, ranges: {})
    with pytest.raises(UserError, match=r"tensor 'a' is infinite or NaN in float16"):
        guarded(network("a = Mul(x, c) y = Mul(a, d)", c=1e6, d=1e-6))


def test_nodes_stay_in_float32_on_request() -> None:
    model = network("a = Conv(x, w) y = Relu(a)", w=weights())
    images = golden.of_all(golden.signed_inputs, model.inputs, None)
    half = float16.prepare(model, images, 0, ["a"], passes.no_dump)
    assert [each.reason for each in half.facts.float32] == ["--keep-float"]
    with pytest.raises(UserError, match="--keep-float 'z': no operator"):
        float16.prepare(model, images, 0, ["z"], passes.no_dump)


def test_tolerances_are_those_of_float16() -> None:
    """The network in float16 passes; a wrong weight in a hundred does not."""
    model = network(
        "a = Conv(x, w) b = Relu(a) y = Conv(b, v)", w=weights(4), v=weights(4)
    )
    half, _ = guarded(model)
    reference = float16.Float16Reference(model, half.graph)
    (image, _) = golden.of_all(golden.signed_inputs, model.inputs, None)
    expected = reference.check(*image)
    answer = simulation.Probe(half.graph, ["y"], model).run(image)["y"]
    off = np.abs(answer - expected.outputs[0]) / expected.tolerances[0]
    assert 0 < off.max() < 1
    changed = network(
        "a = Conv(x, w) b = Relu(a) y = Conv(b, v)", w=weights(4), v=weights(4.2)
    )
    wrong, _ = Reference(changed).run(*image)
    off = np.abs(wrong - expected.outputs[0]) / expected.tolerances[0]
    assert off.max() > 1


def refused(**options: Any) -> str:
    request = BuildRequest("mobilenetv2-0.35-96", **options, precision="float16")
    with pytest.raises(UserError) as error:
        build(request, Progress(quiet=True))
    return str(error.value)


def test_cpus_without_float16_are_refused() -> None:
    having = set()
    for target in PRESETS:
        if target.has_float16:
            having.add(target.name)
        else:
            said = refused(target=target, format=target.format)
            assert f"{target.name} has no float16 arithmetic" in said
    arm = {f"arm-cortex-{core}" for core in ("a55", "a76", "a78")}
    assert having == arm | {"neoverse-n1"}
    raw = resolve("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72")
    assert "no float16 arithmetic" in refused(target=raw)
    assert resolve("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76").has_float16


def test_options_that_contradict_float16_are_refused() -> None:
    a76 = resolve("arm-cortex-a76")
    assert "--quantize: " in refused(target=a76, quantize=True)
    assert "--strict-int8: " in refused(target=a76, strict_int8=True)
    log = lookup.SHIPPED / "arm-cortex-a76.json"
    assert "its records are of float32" in refused(target=a76, records=(log,))


def pair_and_long_sum() -> onnx.ModelProto:
    """A pair that a tuned build fuses, a sum of more products than float16 adds, a classifier."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 3, 52, 60] image) => (float[1, 5] scores) {
          a = Conv(image, w1, b1) b = Clip(a, low, high)
          c = Conv<group = 96, pads = [1, 1, 1, 1], strides = [4, 4]>(b, w2, b2)
          d = Clip(c, low, high) e = Conv(d, w3) f = Relu(e) g = Conv(f, w4, b4)
          h = GlobalAveragePool(g) i = Flatten(h) scores = Gemm<transB = 1>(i, w5) }"""
    )
    shapes = {
        "w1": (96, 3, 1, 1),
        "b1": (96,),
        "w2": (96, 1, 3, 3),
        "b2": (96,),
        "w3": (400, 96, 1, 1),
        "w4": (16, 400, 1, 1),
        "b4": (16,),
        "w5": (5, 16),
    }
    random = np.random.default_rng(0)
    values = {
        name: random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in {**values, "low": 0.0, "high": 6.0}.items()
    )
    return proto


def naive_records(model: str) -> list[str]:
    """A record in float16 of each task: the schedule that AutoScheduler's search begins with."""
    from netship.targets.engine import compiler

    compiler()
    from tvm import auto_scheduler

    target = resolve("arm-cortex-a76")
    source = sources.find(model, {}, None, lambda stage: None)
    request = BuildRequest(model, target, precision="float16", accept_loss=True)
    graph = tuned_graph(request, source, Progress(quiet=True))
    lines = []
    for task in extract(model, graph, target):
        assert task.numbers == "float16"
        state = task.search.compute_dag.get_init_state()
        result = auto_scheduler.MeasureResult([1e-3], 0, "", 0.1, 1.7e9)
        pair = auto_scheduler.MeasureInput(task.search, state), result
        lines.append(str(auto_scheduler.measure_record.dump_record_to_string(*pair)))
    return lines


@pytest.mark.slow
def test_a_build_with_records_of_float16(tmp_path: Path) -> None:
    """Channels last, with a fused pair; it answers as ONNX Runtime does. float32 takes none of these records."""
    model, log = tmp_path / "net.onnx", tmp_path / "tuned" / "half.json"
    onnx.save(pair_and_long_sum(), model)
    with relay_worker() as worker:
        lines = worker.submit(naive_records, str(model)).result()
    target = resolve("arm-cortex-a76")
    header = {
        "target": target.tvm,
        "preset": target.name,
        "numbers": "float16",
        "measured": "estimated: a test",
    }
    log.parent.mkdir()
    log.write_text("\n".join([f"# {json.dumps(header)}", *map(str.strip, lines), ""]))
    request = BuildRequest(str(model), target, tmp_path / "bundle", require_tuned=True)
    with pytest.raises(UserError, match=r"half.json: its records are of float16"):
        build(replace(request, records=(log,)), Progress(quiet=True))
    half = replace(request, precision="float16", accept_loss=True)
    manifest = build(half, Progress(quiet=True)).manifest
    assert manifest.lowering.layout == "NHWC"
    assert manifest.lowering.records and manifest.lowering.records.file == "half.json"
    assert manifest.lowering.reason.startswith("float16: tuning records cover all")
    groups = manifest.lowering.groups
    # Parts of a long sum are not fused again once weights lie as the records want them.
    assert all(each.task for each in groups if "nn.conv2d" in each.operators)
    pairs = [g for g in groups if "netship.conv2d_depthwise" in g.operators]
    assert len(pairs) == 1 and manifest.float16
    assert len(manifest.float16.float32_sums) == 1
    assert 1e-5 < manifest.measured["verification"]["relative_error"] < 1e-2


def every_kind() -> onnx.ModelProto:
    """An output of each kind of operator in float16, and of some that stay in float32."""
    kinds = {
        "abs": "Abs(a)",
        "add": "Add(a, c)",
        "clip": "Clip(a, low, high)",
        "concat": "Concat<axis = 1>(a, image)",
        "conv": "Conv<group = 8, pads = [1, 1, 1, 1], strides = [2, 2]>(a, depthwise)",
        "depth": "DepthToSpace<blocksize = 2>(a)",
        "expand": "Expand(a, five)",
        "flatten": "Flatten(a)",
        "identity": "Identity(a)",
        "leaky": "LeakyRelu(a)",
        "max": "Max(a, c)",
        "pool": "MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)",
        "min": "Min(a, image)",
        "mul": "Mul(a, image)",
        "neg": "Neg(a)",
        "prelu": "PRelu(a, c)",
        "pad": "Pad(a, pads)",
        "relu": "Relu(a)",
        "reshape": "Reshape(a, rows)",
        "slice": "Slice(a, one, two, one)",
        "sub": "Sub(a, image)",
        "tile": "Tile(a, twice)",
        "transpose": "Transpose<perm = [0, 2, 3, 1]>(a)",
        "unsqueeze": "Unsqueeze(a, one)",
        "sigmoid": "Sigmoid(a)",
        "softmax": "Softmax<axis = 1>(a)",
        "mean": "AveragePool<kernel_shape = [2, 2]>(a)",
        "swish": "HardSwish(a)",
        "resize": 'Resize<mode = "linear">(a, , scales)',
    }
    nodes = " ".join(f"{name} = {call}" for name, call in kinds.items())
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 8, 8, 8] image) => ({", ".join(f"float {name}" for name in kinds)}) {{
          a = Conv(image, pointwise) {nodes} }}"""
    )
    random = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "c": random.standard_normal((8, 1, 1)),
        "depthwise": random.standard_normal((8, 1, 3, 3)) / 3,
        "pointwise": random.standard_normal((8, 8, 1, 1)) / 3,
        "low": np.array(-0.5),
        "high": np.array(1e30),
        "scales": np.array([1, 1, 2, 2]),
    }
    integers = {
        "five": [1, 1, 8, 8, 8],
        "one": [1],
        "pads": [0, 0, 1, 1, 0, 0, 1, 1],
        "rows": [1, 64, 8],
        "twice": [1, 1, 2, 1],
        "two": [6],
    }
    proto.graph.initializer.extend(
        [
            *(
                numpy_helper.from_array(value.astype(np.float32), name)
                for name, value in constants.items()
            ),
            *(
                numpy_helper.from_array(np.array(value), name)
                for name, value in integers.items()
            ),
        ]
    )
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return proto


def long_sums() -> onnx.ModelProto:
    """Convolutions of more products than float16 adds, with and without a kernel of 3×3, and a classifier."""
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 8, 6, 6] image) => (float[1, 10] scores, float[1, 6, 6, 6] maps) {
          a = Conv(image, w1) b = Relu(a) c = Conv(b, w2, b2)
          maps = Conv<pads = [1, 1, 1, 1]>(b, w3) d = Relu(c) e = GlobalAveragePool(b)
          f = Flatten(e) scores = Gemm<transB = 1>(f, w4, b4) }"""
    )
    shapes = {
        "w1": (520, 8, 1, 1),
        "w2": (16, 520, 1, 1),
        "b2": (16,),
        "w3": (6, 520, 3, 3),
        "w4": (10, 520),
        "b4": (10,),
    }
    for name, shape in shapes.items():
        value = random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        proto.graph.initializer.append(
            numpy_helper.from_array(value.astype(np.float32), name)
        )
    proto.graph.output.append(helper.make_tensor_value_info("d", 1, (1, 16, 6, 6)))
    return proto


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "standalone"])
def test_every_operator_and_long_sums_in_float16(kind: str, tmp_path: Path) -> None:
    proto = every_kind() if kind == "bundle" else long_sums()
    onnx.save(proto, tmp_path / "all.onnx")
    options = ("--model", tmp_path / "all.onnx", "--format", kind, "--json")
    done = run(
        "compile.build",
        *A76,
        *options,
        "--dump",
        tmp_path / "dump",
        "--output",
        tmp_path / "b",
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["verification"]["origin"] == "emulated"
    assert 1e-5 < said["verification"]["relative_error"] < 2e-2
    bundle = open_bundle(tmp_path / "b")
    model = str(tmp_path / "all.onnx")
    references = reference_for(bundle, model, 1, Progress(quiet=True))
    assert isinstance(references.exact, float16.Float16Reference)
    facts = bundle.manifest.float16
    assert isinstance(facts, Float16)
    assert facts.images == 0 < facts.seeded
    if kind == "standalone":
        assert len(facts.float32_sums) == 3
        assert 520 > LONGEST_SUM
        assert {each.kind for each in facts.float32} == {"GlobalAveragePool"}
    else:
        functions = {"Sigmoid", "Softmax", "AveragePool", "HardSwish", "MatMul"}
        # A linear Resize is two products of matrices.
        assert {each.kind for each in facts.float32} == functions
        assembly = (tmp_path / "dump" / "model.s").read_text()
        assert re.search(r"fmla\s+v\d+\.8h", assembly)
