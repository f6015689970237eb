"""A network without records of its own: schedules of neighbours, fitted to it, and when they are used."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
from more_networks import _Wide

from netship.bundle.store import open_bundle
from netship.compile import driver
from netship.compile.backends.request import BuildRequest
from netship.compile.relay import neighbours
from netship.compile.relay.neighbours import Loops, Stages, Vectors, vectors_of
from netship.records.lookup import Record
from netship.targets.presets import resolve
from netship.targets.progress import Progress

NEON = Vectors(4, 32)
TILED = ((1, 1, 1), (7, 1, 2), (2, 2, 7), (12, 1, 16), (1,), (1,), (16,))


@pytest.mark.parametrize(
    "extents",
    [
        (1, 10, 10, 288, 1, 1, 48),
        (1, 1, 1, 19, 1, 1, 1280),
        (1, 13, 17, 24, 3, 3, 7),
        (1, 1, 1, 1, 1, 1, 1),
    ],
)
def test_splits_divide_the_extents(extents: tuple[int, ...]) -> None:
    _, lengths = neighbours._lengths(TILED, extents, NEON)
    assert all(
        extent % prod(each) == 0 for extent, each in zip(extents, lengths, strict=True)
    )
    assert neighbours._lengths(TILED, extents, NEON)[1] == lengths


def test_a_vector_has_a_power_of_two_where_the_channels_have_one() -> None:
    # 24 numbers would divide 288 as well, and be nearer to none of the record's lengths; LLVM keeps no array of them.
    for channels in (24, 48, 144, 288, 320):
        _, lengths = neighbours._lengths(TILED, (1, 14, 14, channels, 1, 1, 64), NEON)
        vector = lengths[3][-1]
        assert vector & (vector - 1) == 0 and vector >= 8


def test_sums_stay_within_the_registers() -> None:
    for lanes in ("x86-64-v3", "znver4", "arm-cortex-a72"):
        vectors = vectors_of(resolve(lanes))
        _, lengths = neighbours._lengths(TILED, (1, 56, 56, 64, 1, 1, 64), vectors)
        inner = prod(each[-1] for each in lengths[:4])
        assert inner <= vectors.lanes * vectors.registers


def _record(steps: list[list[Any]]) -> Record:
    key = json.dumps(
        ["h", [1, 14, 14, 64], [1, 1, 64, 384], [1, 1, 1, 384], [1, 14, 14, 384]]
    )
    line = {"i": [[key, "llvm"], [[], steps]], "r": [[1e-3], 0, 0.1, 1], "v": "v0.6"}
    return Record(key, 1e-3, 0, 1.0, json.dumps(line))


SPLITS = [
    ["SP", 3, axis, extent, list(lengths), 1]
    for axis, extent, lengths in zip(
        (0, 4, 8, 12, 16, 18, 20), (1, 14, 14, 384, 1, 1, 64), TILED, strict=True
    )
]
STEPS = [
    ["CI", 5],
    *SPLITS,
    ["FSP", 6, 0, 1, 2],
    ["CA", 3, 6, 7],
    ["CI", 1],
    ["PR", 3, 0, "auto_unroll_max_step$16"],
]
LOOPS = Loops((1, 14, 14, 384, 1, 1, 64), 1)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        # Four operators behind the convolution in place of two; another input before it.
        (Stages(2, True, 4, (6, 7, 8), 9), ["CI 8", "CI 7", "CI 6", "SP 4", "FSP 9"]),
        # None: the sums get a stage of their own.
        (Stages(1, True, 3, (), 3), ["CHW 3", "SP 3", "FSP 4"]),
    ],
)
def test_steps_follow_the_stages_of_another_kernel(
    stages: Stages, expected: list[str]
) -> None:
    lengths = [list(each) for each in TILED]
    steps = neighbours._moved(_record(STEPS), LOOPS, stages, lengths)
    assert steps is not None
    seen = list(dict.fromkeys(f"{kind} {stage}" for kind, stage, *_ in steps))
    assert seen[: len(expected)] == expected
    # A split that follows another one finds it where it is now.
    (follows,) = (step for step in steps if step[0] == "FSP")
    assert steps[follows[3]][0] == "SP"


def test_a_padding_is_stored_where_the_record_had_none() -> None:
    lengths = [list(each) for each in TILED]
    padded = Stages(1, False, 3, (5,), 6)
    steps = neighbours._moved(_record(STEPS), LOOPS, padded, lengths)
    assert steps is not None and ["CR", 1] in steps and ["CI", 1] not in steps


@pytest.mark.parametrize(
    "steps", [[], [["SP", 3, 0, 1, [0, 1, 1], 1]] * 7, [["SP"]], [[]], [None], ["SP"]]
)
def test_a_log_may_hold_anything(steps: list[Any]) -> None:
    assert neighbours._of_log((_record(steps),)) == ()
    assert len(neighbours._of_log((_record(STEPS),))) == 1


def _mobile(path: Path) -> Path:
    """Odd sizes: prime rows and channels, 5×5, HardSwish, a residual, one pixel at the end."""
    net = _Wide(37)
    net.activated("HardSwish", 13, 3, 2)
    net.inverted("HardSwish", 26, 13, 5, 1, squeeze=True)
    net.inverted("Relu", 26, 24, 3, 2)
    net.inverted("Relu6", 72, 24, 3, 1)
    onnx.save(net.finish(7), path)
    return path


def _dense(path: Path) -> Path:
    """Convolutions of 3×3, some of which TVM would compute by Winograd's algorithm, and one of four groups."""
    net = _Wide(16)
    for channels in (16, 68, 68):
        net.convolve(channels, 3)
    net.convolve(68, 3, groups=4)
    onnx.save(net.finish(7), path)
    return path


def _built(model: Path, output: Path) -> Any:
    request = BuildRequest(str(model), resolve("native"), output=output)
    with Progress() as progress:
        driver.build(request, progress)
    return open_bundle(output).manifest.lowering


@pytest.mark.slow
def test_odd_shapes_take_fitted_records_and_dense_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    model = _mobile(tmp_path / "mobile.onnx")
    lowering = _built(model, tmp_path / "mobile")
    records = lowering.records
    assert lowering.layout == "NHWC" and records.covered < records.tasks
    assert records.fitted and 0 <= records.gain < 1
    assert f"fitted records of neighbours {records.fitted} more" in lowering.reason
    lowering = _built(_dense(tmp_path / "dense.onnx"), tmp_path / "dense")
    assert lowering.layout == "NCHW" and lowering.records.covered == 0
