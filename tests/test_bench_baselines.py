"""Other runtimes in the emulated system: pinned, on a described board, converted, and right."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import networks
import pytest
from onnx import helper

from netship.bench import measurement
from netship.bench.baselines import runtimes, tflite
from netship.bench.baselines.tflite_pixels import same_pixels
from netship.compile import mobilenet
from netship.compile.frontend import family
from netship.meter import board_files
from netship.meter.counting import Part, find_qemu, merged
from netship.meter.counts import Counts
from netship.meter.memory import hierarchy
from netship.targets.errors import UserError
from netship.targets.progress import Progress


def test_every_runtime_is_pinned_by_a_hash_and_no_registry_is_named() -> None:
    text = runtimes.LOCK.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line)
    assert "://" not in text
    assert {each.package for each in runtimes.BASELINES.values()} < {
        line.split("==")[0] for line in lines
    }
    assert set(runtimes.DEFAULT) < set(runtimes.BASELINES)
    for half, name in (("ncnn-default", "ncnn"), ("mnn-half", "mnn")):
        runtime = runtimes.find(half)
        assert runtimes.version(runtime) == runtimes.version(runtimes.find(name))
        # A row that ran in half precision says so, and none does unasked.
        assert "half precision" in runtime.title and half not in runtimes.DEFAULT


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(UserError, match="--runtimes tvm: unknown; known: litert, ncnn"):
        runtimes.find("tvm")


@pytest.mark.parametrize(
    ("cpu", "part", "dot"),
    [
        ("cortex-a53", "0xd03", False),
        ("cortex-a72", "0xd08", False),
        ("cortex-a76", "0xd0b", True),
    ],
)
def test_the_emulated_process_sees_the_board(
    tmp_path: Path, cpu: str, part: str, dot: bool
) -> None:
    system = tmp_path / "system"
    (system / "usr").mkdir(parents=True)
    (system / "proc").mkdir()
    root = board_files.root(system, cpu, tmp_path / "boards")
    cpuinfo = (root / "proc" / "cpuinfo").read_text()
    assert f"CPU part\t: {part}\n" in cpuinfo
    assert ("asimddp" in cpuinfo.split()) is dot
    assert (root / "usr").resolve() == system / "usr"
    folder = root / "sys/devices/system/cpu"
    assert (folder / "possible").read_text() == "0\n"
    midr = (folder / "cpu0/regs/identification/midr_el1").read_text()
    assert f"{int(midr, 16) >> 4 & 0xFFF:#x}" == part
    for number, cache in enumerate(hierarchy(cpu).caches):
        index = folder / f"cpu0/cache/index{number}"
        assert (index / "size").read_text() == f"{cache.bytes >> 10}K\n"
    assert board_files.root(system, cpu, tmp_path / "boards") == root
    assert len(list((tmp_path / "boards").iterdir())) == 1


def test_a_cpu_without_a_board_is_refused() -> None:
    with pytest.raises(UserError, match="cortex-a9: no board with it is described"):
        board_files.board("cortex-a9")


def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in words
        said = "WARNING: slow\nERROR: No matching distribution found for mnn==3.6.1\n"
        return subprocess.CompletedProcess(words, 1, "", said)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match="No matching distribution") as refusal:
        runtimes.fetch(lambda stage: None)
    assert "baselines-arm64.lock" in str(refusal.value) and "\n" not in str(
        refusal.value
    )
    assert [p.name for p in (tmp_path / "netship").iterdir()] == ["baselines.lock"]


class _AnyNumber:
    """Stands for the schema's numbers where a conversion ends before it needs them."""

    def __getattr__(self, name: str) -> Any:
        return _AnyNumber()

    def __call__(self, *_: object) -> Any:
        return _AnyNumber()

    def __int__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "said"),
    [
        (
            "Selu",
            1,
            {},
            "'n' (Selu): the conversion to .tflite does not know",
        ),
        ("MaxPool", 1, {"kernel_shape": [2, 2], "ceil_mode": 1}, "ceil_mode=1"),
        ("AveragePool", 1, {"kernel_shape": [3, 3], "pads": [0, 0, 2, 2]}, "padding"),
        ("Conv", 2, {}, "weights that are computed"),
    ],
)
def test_what_the_tflite_conversion_does_not_know_names_the_node(
    operator: str, inputs: int, attributes: dict[str, Any], said: str
) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"] * inputs, ["y"], "n", **attributes)],
        "tiny",
        [value("image", 1, [1, 3, 8, 8])],
        [value("y", 1, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    with pytest.raises(UserError, match=re.escape(said)):
        tflite.convert(proto, _AnyNumber())  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rounding", "sizes", "same"),
    [
        ("asymmetric", "floor", [(5, 10), (4, 12)], "asymmetric"),
        ("half_pixel", "round_prefer_floor", [(5, 10), (4, 8)], "asymmetric"),
        ("half_pixel", "round_prefer_floor", [(6, 4)], "half_pixel"),
        ("align_corners", "round_prefer_ceil", [(5, 9)], "align_corners"),
        ("half_pixel", "floor", [(5, 10)], ""),
        ("asymmetric", "floor", [(5, 10), (4, 4)], "asymmetric"),
        ("tf_crop_and_resize", "floor", [(5, 10)], ""),
    ],
)
def test_a_nearest_resize_takes_the_same_pixels_or_is_refused(
    place: str, rounding: str, sizes: list[tuple[int, int]], same: str
) -> None:
    assert same_pixels(place, rounding, sizes) == same


def test_runtimes_convert_a_network_answer_right_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_qemu()
        runtimes.fetch(lambda stage: None)
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"not run: {error}")
    # LLVM's models, which take the longest of it, are tested elsewhere.
    monkeypatch.setattr(measurement, "cost", _only_instructions)
    small = family.build(0.35, 96)
    residual = networks.resnet18_like(64)
    int8 = networks.quantised(small, tmp_path)
    gated = networks.quantised(networks.gated(), tmp_path)
    for proto, runtime, cpu in (
        (small, "mnn", "cortex-a72"),
        (residual, "litert", "cortex-a72"),
        (int8, "litert", "cortex-a76"),
        (gated, "litert", "cortex-a76"),
        (int8, "ncnn", "cortex-a76"),
        (int8, "mnn", "cortex-a76"),
    ):
        case = measurement.case_of(proto, runtime)
        macs = sum(layer.macs for layer in mobilenet.count(proto)) or 1
        progress = Progress(quiet=True)
        row = measurement.measure(case, runtimes.find(runtime), cpu, progress)
        assert row.counts is not None, (runtime, row.refused)
        # Of weights that mean nothing the best classes are close, and MNN and ncnn round in their own ways.
        assert row.same_top1 or proto is int8
        # Sixteen in an instruction is SDOT's.
        assert macs / 16 < row.counts.instructions < 3 * macs


def _only_instructions(parts: list[Part], _cpu: str, _board: str) -> Counts:
    blocks = merged(parts)
    assert any(sum(block.misses) for block in blocks)
    return Counts(sum(b.instructions * b.executions for b in blocks), 0, 0)
