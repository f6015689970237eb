"""A network without records of its own: schedules of neighbours, fitted to it, and when they are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from more_networks import _Wide
from relay_worker import relay_worker

from netship.bundle.store import open_bundle
from netship.compile import driver
from netship.compile.backends.request import BuildRequest
from netship.compile.relay import neighbours
from netship.compile.relay.neighbours import Loops, Stages
from netship.compile.relay.tiles import vectors_of
from netship.records.lookup import SHIPPED, Record, find
from netship.targets.presets import resolve
from netship.targets.progress import Progress

TILED = ((1, 1, 1), (7, 1, 2), (2, 2, 7), (12, 1, 16), (1,), (1,), (16,))


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
    """Odd sizes: prime rows, prime channels once, 5×5, HardSwish, a residual, one pixel at the end."""
    net = _Wide(37)
    net.activated("HardSwish", 16, 3, 2)
    net.inverted("HardSwish", 48, 13, 5, 1, squeeze=True)
    net.inverted("Relu", 48, 32, 3, 2)
    net.inverted("Relu6", 192, 32, 3, 1)
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


def _pointwise(path: Path, expanded: int, channels: int) -> Path:
    """An inverted residual of the given numbers of channels, and a classifier."""
    net = _Wide(32)
    net.activated("Relu6", channels, 3, 2)
    net.inverted("Relu6", expanded, channels, 3, 1)
    onnx.save(net.finish(8), path)
    return path


def _plan(model: str, name: str) -> tuple[str, str]:
    """Layout and reason of a model for a target, with the shipped records; nothing is compiled."""
    from netship.targets.engine import compiler

    tvm = compiler()

    from netship.compile.ir import onnx_form
    from netship.compile.relay import module_passes
    from netship.compile.relay.convert import to_relay
    from netship.compile.relay.plan import make_plan
    from netship.compile.relay.tasks import kernels

    target = resolve(name)
    network = to_relay(onnx_form.read(onnx.load(model)), target)
    passes = (*module_passes.FOLD, *module_passes.CHANNELS_LAST)
    module = module_passes.run(passes, network.module)
    logs, _ = find(target, folders=[SHIPPED])
    known = kernels(module, tvm.target.Target(target.tvm))
    plan = make_plan(known, logs, vectors_of(target))
    return plan.layout, plan.reason


def _lanes(numbers: str, channels: int) -> float:
    """Lanes taken for each that computes, in the schedule fitted to a convolution on Cortex-A76."""
    from netship.targets.engine import compiler

    compiler()
    from tvm import auto_scheduler, te, topi

    shapes = [1, 14, 14, 64], [1, 1, 64, channels], [1, 14, 14, channels]
    image, weights = (te.placeholder(each, numbers) for each in shapes[:2])
    sums = topi.nn.conv2d_nhwc(image, weights, 1, 0, 1, numbers)
    dag = auto_scheduler.ComputeDAG([image, weights, sums])
    target = resolve("arm-cortex-a76")
    logs, _ = find(target, folders=[SHIPPED], numbers=numbers)
    key = json.dumps(["h", *shapes])
    return next(neighbours.fitting(key, dag, logs, vectors_of(target))).lanes


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


@pytest.mark.slow
def test_channels_that_leave_vectors_empty_take_no_fitted_records(
    tmp_path: Path, worker: ProcessPoolExecutor
) -> None:
    odd = _pointwise(tmp_path / "odd.onnx", 44, 12)
    whole = _pointwise(tmp_path / "whole.onnx", 96, 16)
    layout, why = worker.submit(_plan, str(odd), "znver4").result()
    assert layout == "NCHW" and "of the lanes of vectors would compute" in why
    # Four lanes divide 44 and 12, sixteen do not.
    for model, target in ((odd, "arm-cortex-a72"), (whole, "znver4")):
        layout, _ = worker.submit(_plan, str(model), target).result()
        assert layout == "NHWC"


@pytest.mark.slow
def test_a_vector_of_float16_has_twice_as_many_lanes(
    worker: ProcessPoolExecutor,
) -> None:
    taken = {
        (numbers, channels): worker.submit(_lanes, numbers, channels).result()
        for numbers in ("float32", "float16")
        for channels in (4, 8)
    }
    assert taken["float32", 4] == taken["float32", 8] == taken["float16", 8] == 1
    assert taken["float16", 4] == 2
