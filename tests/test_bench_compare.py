"""Our bundle beside other runtimes: what counts, what does not, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench import compare, comparison, measurement
from bench.baselines import converters, emulated, runtimes
from bench.baselines.runtimes import Baseline
from bundle.golden import seeded_inputs
from bundle.manifest import ModelIdentity
from bundle.store import sha256_of
from compile.frontend import gate
from compile.frontend.reference import Reference
from meter.counting import Block
from meter.counts import Command, Counts
from targets.errors import UserError
from targets.progress import Progress

MILLIONS = {
    "netship": (90, 60, 10),
    "litert": (120, 70, 20),
    "ncnn": (100, 60, 40),
    "onnxruntime": (180, 140, 10),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A 1×1 convolution and a pooling: [1, 3, 4, 4] → [1, 3]."""
    weight = np.arange(9, dtype=np.float32).reshape(3, 3, 1, 1) - 4
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("image", TensorProto.FLOAT, [1, 3, 4, 4])],
        [value("flat", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = tmp_path / "tiny.onnx"
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    return path


Runs = list[tuple[str, str]]
Answer = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@pytest.fixture
def answers() -> dict[str, Answer]:
    """What a runtime makes of the right answer; a test changes it to be wrong."""
    return {}


@pytest.fixture
def runs(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Answer], model: Path
) -> Runs:
    """Runtimes that are none: right answers, made-up counts. The runs that were asked for."""
    done: Runs = []
    wanted = measurement.read_case(model).expected

    def prepare(cpu: str, _on_progress: object) -> SimpleNamespace:
        return SimpleNamespace(cpu=cpu)

    def inference(
        _machine: object,
        runtime: Baseline,
        file: Path,
        _tensor: Path,
        output: Path,
    ) -> Command:
        return Command(Path("/"), (runtime.name, str(file), str(output)), {})

    def count_program(command: Command, cpu: str) -> list[Block]:
        name, _, output = command.arguments
        done.append((name, cpu))
        change = answers.get(name)
        np.save(output, change(wanted) if change else wanted)
        return [Block(4096, name.encode(), 1)]

    def cost(blocks: list[Block], _cpu: str) -> Counts:
        instructions, core, memory = MILLIONS[blocks[0].code.decode()]
        return Counts(instructions * 1_000_000, core * 1e6, memory * 1e6)

    def ours(*_: object) -> measurement.Row:
        counts = cost([Block(0, b"netship", 1)], "")
        return measurement.Row("netship", "this project", "", counts, 1e-6, True)

    monkeypatch.setattr(emulated, "prepare", prepare)
    monkeypatch.setattr(converters, "convert", lambda *_: Path("model"))
    monkeypatch.setattr(emulated, "inference", inference)
    monkeypatch.setattr(measurement, "count_program", count_program)
    monkeypatch.setattr(measurement, "cost", cost)
    monkeypatch.setattr(comparison, "_ours", ours)
    return done


OPTIONS = ["--cpu", "cortex-a72", "--runtimes", "ncnn", "onnxruntime", "litert"]


def test_the_table_has_the_best_first_and_the_ratio_to_it(
    model: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--model", str(model), *OPTIONS]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert "tiny.onnx on cortex-a72, one thread" in title and "estimated" in title
    assert [line.split("  ")[0] for line in lines] == [
        "this project",
        "LiteRT (XNNPACK)",
        "ncnn",
        "ONNX Runtime",
    ]
    assert lines[0].split()[-6:] == ["90.0", "60.0", "10.0", "70.0", "1.00", "1.0e-06"]
    assert lines[3].split()[-6:-1] == ["180.0", "140.0", "10.0", "150.0", "2.14"]
    assert runs == [(name, "cortex-a72") for name in OPTIONS[3:]]


def test_the_json_labels_every_figure_estimated(
    model: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--model", str(model), *OPTIONS, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["cpu"], shown["threads"]) == ("cortex-a72", 1)
    assert shown["origin"] == "estimated" and shown["meter"]
    for row in shown["runtimes"]:
        assert row["origin"] == "estimated"
        instructions, core, memory = MILLIONS[row["runtime"]]
        assert row["instructions"] == instructions * 1_000_000
        assert (row["core_cycles"], row["memory_cycles"]) == (core * 1e6, memory * 1e6)
        assert row["ratio"] == pytest.approx((core + memory) / 70, abs=1e-4)


def test_a_second_run_counts_nothing_again(model: Path, runs: Runs) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    compare.main(words)
    assert len(runs) == 3
    compare.main([*words, "--cpu", "cortex-a76"])
    assert len(runs) == 6


@pytest.mark.parametrize("change", ["counter_version", "runtimes.version"])
def test_another_counter_or_runtime_counts_anew(
    model: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    monkeypatch.setattr(f"bench.measurement.{change}", lambda *_: "another")
    compare.main(words)
    assert len(runs) == 6


@pytest.mark.parametrize("what", ["run", "system", "input", "QEMU"])
def test_what_else_the_counts_depend_on_counts_anew(
    model: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    source = tmp_path / "run.py"
    source.write_text("")
    monkeypatch.setattr(runtimes, "SOURCES", (source,))
    compare.main(words)
    if what == "run":
        source.write_text("changed")
    elif what == "system":
        monkeypatch.setattr("devices.sysroot.sysroot_path", lambda: Path("other"))
    elif what == "input":
        other = seeded_inputs
        monkeypatch.setattr(
            measurement, "seeded_inputs", lambda *_: [2 * x for x in other(*_)]
        )
        monkeypatch.setattr(measurement, "_compare", lambda *_: (0.0, True))
    else:
        monkeypatch.setattr("meter.counting.qemu_version", lambda: "QEMU 9")
    compare.main(words)
    assert len(runs) == 6


def test_a_file_of_ones_own_counts_anew_with_another_model(
    model: Path, runs: Runs, tmp_path: Path
) -> None:
    file = tmp_path / "own.tflite"
    file.write_bytes(b"one")
    options = ["--cpu", "cortex-a72", "--runtimes", "litert", "--tflite", str(file)]
    compare.main(["--model", str(model), *options])
    proto = onnx.load(model)
    proto.graph.node[1].op_type = "GlobalMaxPool"
    onnx.save(proto, tmp_path / "other.onnx")
    compare.main(["--model", str(tmp_path / "other.onnx"), *options])
    assert len(runs) == 2


def test_a_kept_answer_is_judged_anew(
    model: Path,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By another version of ONNX Runtime, say."""
    words = ["--model", str(model), *OPTIONS]
    assert compare.main(words) == 0
    run = Reference.run
    monkeypatch.setattr(Reference, "run", lambda *_: [2 * y for y in run(*_)])
    assert compare.main(words) == 1
    assert capsys.readouterr().out.count("of the range: not counted") == 3
    assert len(runs) == 3


def test_a_damaged_result_is_counted_anew(
    model: Path, runs: Runs, tmp_path: Path
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    kept = sorted((tmp_path / "cache" / "netship" / "compare").glob("*.gz"))
    assert len(kept) == 3
    kept[0].write_bytes(b"")
    kept[1].write_bytes(kept[1].read_bytes()[:40])
    assert compare.main(words) == 0
    assert len(runs) == 5


def _other_class(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return y[:, ::-1]


def test_figures_of_a_wrong_answer_do_not_count(
    model: Path,
    runs: Runs,
    answers: dict[str, Answer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers["litert"] = lambda y: y * np.float32(1.01)
    answers["ncnn"] = lambda y: y[:, :2]
    answers["onnxruntime"] = lambda y: y * np.float32(np.nan)
    assert compare.main(["--model", str(model), *OPTIONS]) == 1
    shown = capsys.readouterr().out
    assert "LiteRT (XNNPACK) 2.3.0: its answer is" in shown
    assert "of the range: not counted" in shown
    assert "its output has 2 values, not 3 finite" in shown
    assert "ONNX Runtime 1.32.0: its output has 3 values, not 3 finite ones" in shown
    # Nor is a wrong answer kept.
    answers.clear()
    assert compare.main(["--model", str(model), *OPTIONS]) == 0


def test_a_runtime_that_cannot_be_converted_is_a_line_and_the_rest_goes_on(
    model: Path,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def convert(_machine: object, runtime: Baseline, *_: object) -> Path:
        if runtime.name == "ncnn":
            raise UserError("its converter made no model.ncnn.param: unknown operator")
        return Path("model")

    monkeypatch.setattr(converters, "convert", convert)
    assert compare.main(["--model", str(model), *OPTIONS]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("ncnn 1.0.20261020: its converter made no")
    assert len(runs) == 2


def test_a_file_of_ones_own_for_litert_is_judged_by_its_best_class(
    model: Path,
    tmp_path: Path,
    runs: Runs,
    answers: dict[str, Answer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "own.tflite"
    file.write_bytes(b"one")
    words = ["--model", str(model), *OPTIONS, "--tflite", str(file), "--json"]

    def with_background(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([np.full((1, 1), 99, np.float32), y * 3], axis=1)

    answers["litert"] = with_background
    assert compare.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["runtimes"]
    [litert] = [row for row in rows if row["runtime"] == "litert"]
    assert litert["same_top1"] and litert["max_abs_error"] is None
    file.write_bytes(b"another")
    answers["litert"] = _other_class
    assert compare.main(words) == 1
    assert "another best class" in capsys.readouterr().out


def test_the_report_is_one_page_with_every_label(
    model: Path, runs: Runs, tmp_path: Path, answers: dict[str, Answer]
) -> None:
    answers["ncnn"] = lambda y: y[:, :2]
    path = tmp_path / "compare.html"
    compare.main(["--model", str(model), *OPTIONS, "--report", str(path), "--json"])
    page = path.read_text()
    assert "estimated" in page and "no time here was measured" in page
    assert "its output has 2 values" in page
    assert page.count('class="bar"') == 3 and "<script" not in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cpu", "cortex-a9"], "cortex-a9"),
        (
            ["--cpu", "cortex-a72", "--runtimes", "tflite"],
            "tflite: unknown; known: litert",
        ),
        (
            ["--cpu", "cortex-a72", "--model", "none.onnx"],
            r"none\.onnx: cannot be read",
        ),
        (["--cpu", "cortex-a72", "--report", "/none/page.html"], "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    model: Path, options: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        compare.main(["--model", str(model), *options])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"bad\.onnx: not an ONNX model"):
        measurement.read_case(path)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2, 3, 4, 4], "has batch 2, need 1"),
        ([1, 3], "has rank 2"),
        ([1, 3, "h", 4], "has symbolic dimensions"),
    ],
)
def test_an_input_that_is_no_single_image_is_refused(
    model: Path, shape: list[Any], said: str
) -> None:
    proto = onnx.load(model)
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    proto.graph.input[0].CopyFrom(value)
    with pytest.raises(UserError, match=said):
        measurement.case_of(proto, "tiny.onnx")


def _damage(proto: onnx.ModelProto, how: str) -> None:
    if how == "old":
        proto.opset_import[0].version = 6
    elif how == "new":
        proto.opset_import[0].version = 23
    elif how == "infinite":
        weight = np.full((3, 3, 1, 1), np.inf, np.float32)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    elif how == "domain":
        proto.graph.node[0].domain = "com.example"
    else:
        outside = proto.graph.initializer[0]
        outside.ClearField("raw_data")
        outside.data_location = TensorProto.EXTERNAL
        entry = outside.external_data.add()
        entry.key, entry.value = "location", "../weights.bin"


@pytest.mark.parametrize(
    "how", ["old", "new", "infinite", "domain", "outside its folder"]
)
def test_a_model_is_refused_as_in_a_build(
    model: Path, runs: Runs, tmp_path: Path, how: str
) -> None:
    proto = onnx.load(model)
    _damage(proto, how)
    path = tmp_path / "hostile" / "tiny.onnx"
    path.parent.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(36))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError) as built:
        gate.load(path)
    with pytest.raises(UserError) as compared:
        compare.main(["--model", str(path), *OPTIONS])
    assert str(compared.value) == str(built.value)
    assert runs == []


def test_the_reference_has_a_builds_settings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a QDQ graph they are not ONNX Runtime's own: see targets/onnx_runtime.py."""
    made: list[tuple[int, str]] = []
    session = onnxruntime.InferenceSession

    def spy(data: bytes, options: Any = None, **words: Any) -> Any:
        key = "session.qdqisint8allowed"
        made.append(
            (options.intra_op_num_threads, options.get_session_config_entry(key))
        )
        return session(data, options, **words)

    path = tmp_path / "int8.onnx"
    onnx.save(networks.quantised(onnx.load(model), tmp_path), path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    case = measurement.read_case(path)
    (built,) = Reference(gate.load(path)).run(case.tensor)
    assert case.quantised and made == [(1, "1")] * 2
    np.testing.assert_array_equal(case.expected, built)


def test_without_qemu_every_runtime_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise UserError("no QEMU for aarch64; install it")

    monkeypatch.setattr(emulated, "prepare", missing)
    case = measurement.read_case(model)
    row = measurement.measure(
        case, runtimes.find("ncnn"), "cortex-a72", Progress(quiet=True)
    )
    assert row.counts is None and row.refused.startswith("no QEMU")


@pytest.fixture
def bundle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A bundle of the model that is none, and how often it was counted."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    identity = ModelIdentity(name="tiny.onnx", sha256=sha256_of(model))
    verification = {"verification": {"max_abs_error": 2e-6}}
    manifest = SimpleNamespace(model=identity, measured=verification, quantisation=None)
    found = SimpleNamespace(path=folder, manifest=manifest, counted=0)

    def count_bundle(*_: object) -> Counts:
        found.counted += 1
        return Counts(90_000_000, 60_000_000, 10_000_000)

    monkeypatch.setattr(comparison, "open_bundle", lambda path: found)
    monkeypatch.setattr(comparison, "count_bundle", count_bundle)
    return found


def test_our_bundle_is_counted_once(
    model: Path, bundle: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--bundle", str(bundle.path), "--json"]
    for _ in range(2):
        compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
        [row] = json.loads(capsys.readouterr().out)["runtimes"]
        assert (row["runtime"], row["core_cycles"]) == ("netship", 60_000_000)
        assert row["max_abs_error"] == 2e-6
    assert bundle.counted == 1
    (bundle.path / "manifest.json").write_text("{ }")
    compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
    assert bundle.counted == 2


def test_a_bundle_of_another_model_is_refused(
    model: Path, bundle: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.manifest.model = ModelIdentity(name="tiny.onnx", sha256="0" * 64)
    words = ["--model", str(model), "--bundle", str(bundle.path)]
    assert compare.main([*words, "--cpu", "cortex-a72", "--runtimes"]) == 1
    assert "is of another model, tiny.onnx" in capsys.readouterr().out


def test_our_bundle_is_counted_anew_by_another_verifier_or_system(
    model: Path,
    bundle: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    words = ["--model", str(model), "--bundle", str(bundle.path), "--json"]

    def run() -> int:
        compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
        return int(bundle.counted)

    assert [run(), run()] == [1, 1]
    monkeypatch.setattr("devices.board.programs.SOURCES", tmp_path / "none")
    assert [run(), run()] == [2, 2]
    monkeypatch.setattr("devices.sysroot.sysroot_path", lambda: Path("other"))
    assert run() == 3


def test_nothing_of_ours_is_built_where_it_could_not_be_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without QEMU a build cannot verify either, and its bundle would be kept."""

    def never(*_: object) -> None:
        raise AssertionError("built")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("compile.driver.build", never)
    words = ["--model", str(model), "--cpu", "cortex-a72", "--runtimes"]
    assert compare.main(words) == 1
    assert "this project: no qemu-aarch64" in capsys.readouterr().out
