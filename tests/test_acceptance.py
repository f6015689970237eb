"""The main job as its user does it: the trained network, and its twin with seeded weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run, succeed

from netship.bundle.store import elf_machine, open_bundle
from netship.targets.presets import this_cpu

Build = Callable[..., Path]
TWIN = "mobilenetv2-1.0-224"
SMALL = "mobilenetv2-0.35-96"
SEEDED_TOLERANCE = 1e-4

pytestmark = pytest.mark.slow


def check(bundle: Path, *options: object) -> dict[str, Any]:
    """The JSON of a check that passes."""
    result: dict[str, Any] = json.loads(
        succeed("runtime_demo.check", bundle, "--json", *options)
    )
    return result


def expect_agreement(result: dict[str, Any], images: int, tolerance: float) -> None:
    assert result["passed"] is True
    assert result["images"] == images
    assert result["max_abs_error"] <= tolerance
    assert result["top1_agreement"] == 1.0


@pytest.fixture(scope="module")
def real(built: Build, real_model: Path, real_labels: Path) -> Path:
    return built(real_model, "native", "--labels", real_labels)


@pytest.fixture(scope="module")
def real_a72(built: Build, real_model: Path) -> Path:
    return built(real_model, "arm-cortex-a72")


def test_the_trained_network_in_int8_is_onnx_runtimes_and_near_float32(
    built: Build, real_model: Path, real_photos: Path
) -> None:
    half = sorted(real_photos.glob("*.jpg"))[::2]
    bundle = built(
        *(real_model, "native", "--quantize", "int8", "--calibration"), *half
    )
    result = check(bundle, "--model", real_model, "--images", real_photos)
    assert result["passed"] is True
    assert result["images"] == 16
    assert result["vs_quantised"]["steps"] <= 2
    assert result["top1_agreement"] == 1.0
    assert result["vs_float"]["top1_agreement"] >= 15 / 16
    assert result["vs_float"]["cosine"] >= 0.99
    manifest = open_bundle(bundle).manifest
    assert manifest.lowering.float_operators == 0
    assert (bundle / "model.so").stat().st_size <= 4.6e6


def test_the_trained_network_is_right_on_this_machine(
    real: Path, real_model: Path, real_photos: Path
) -> None:
    result = check(real, "--model", real_model, "--images", real_photos, "--repeat", 5)
    expect_agreement(result, 16, 5e-5)
    assert (result["labelled_right"], result["labelled"]) == (7, 8)
    assert result["top5_agreement"] == 1.0
    assert result["origin"] == "measured"
    for key in ("latency_ms", "reference_latency_ms"):
        assert result[key]["minimum"] <= result[key]["median"] <= result[key]["p99"]


def test_its_twin_is_right_on_this_machine(
    built: Build, free_photos: list[Path]
) -> None:
    result = check(
        built(TWIN), "--model", TWIN, "--images", *free_photos, "--repeat", 5
    )
    expect_agreement(result, 5, SEEDED_TOLERANCE)
    classes = {image["ours"][0]["class_index"] for image in result["results"]}
    assert len(classes) > 1, "different photographs must give different answers"


def test_the_trained_network_is_right_over_rpc(
    real: Path, real_model: Path, real_photos: Path
) -> None:
    options = (
        "--model",
        real_model,
        "--images",
        real_photos,
        "--rpc",
        "local",
        "--repeat",
        5,
    )
    result = check(real, *options)
    expect_agreement(result, 16, 5e-5)
    assert (result["labelled_right"], result["labelled"]) == (7, 8)


def test_its_twin_is_right_over_rpc(built: Build, free_photos: list[Path]) -> None:
    options = (
        "--model",
        TWIN,
        "--images",
        *free_photos,
        "--rpc",
        "local",
        "--repeat",
        5,
    )
    expect_agreement(check(built(TWIN), *options), 5, SEEDED_TOLERANCE)


def test_the_trained_network_is_right_on_an_emulated_cortex_a72(
    real_a72: Path, real_model: Path, real_photos: Path
) -> None:
    assert elf_machine(real_a72 / "model.so") == "aarch64"
    photos = [real_photos / name for name in ("bird.jpg", "cat.jpg", "parrot.jpg")]
    result = check(
        real_a72, "--board", "emulated", "--model", real_model, "--images", *photos
    )
    expect_agreement(result, 3, 1e-4)
    assert result["origin"] == "emulated"
    assert result["latency_ms"] is None
    assert result["reference_latency_ms"] is None


@pytest.fixture(scope="module")
def small_a72(built: Build) -> Path:
    return built(SMALL, "arm-cortex-a72")


def test_its_twin_is_right_on_an_emulated_cortex_a72(
    small_a72: Path, free_photos: list[Path]
) -> None:
    assert elf_machine(small_a72 / "model.so") == "aarch64"
    options = ("--board", "emulated", "--model", SMALL, "--images", *free_photos)
    result = check(small_a72, *options)
    expect_agreement(result, 5, SEEDED_TOLERANCE)
    assert (result["origin"], result["latency_ms"]) == ("emulated", None)


def test_what_cannot_run_here_is_verified_on_an_emulated_board(small_a72: Path) -> None:
    verification = open_bundle(small_a72).manifest.measured["verification"]
    assert verification["origin"] == "emulated"
    assert verification["relative_error"] <= 1e-4


def test_an_arm_bundle_is_refused_here_with_the_way_out(small_a72: Path) -> None:
    if os.uname().machine == "aarch64":
        small_a72 = small_a72.parent / "missing"
    result = run("runtime_demo.check", small_a72)
    assert result.returncode == 2
    assert "--board emulated" in result.stderr or "not a bundle" in result.stderr


def test_float32_c_for_a_microcontroller_is_onnx_runtimes_and_small(
    built: Build, free_photos: list[Path]
) -> None:
    """Far below onnx2c's code, which takes 89.2 million instructions and 999 KB."""
    project = built(SMALL, "cortex-m7", "--name", "mnv2")
    result = check(project, "--model", SMALL, "--images", *free_photos)
    expect_agreement(result, 5, SEEDED_TOLERANCE)
    assert result["instructions"] < 20e6
    assert result["ram_bytes"] < 130_000
    assert (result["max_error_lsb"], result["origin"]) == (None, "emulated")
    assert result["max_error_host"] <= SEEDED_TOLERANCE


def test_int8_c_for_a_microcontroller_is_onnx_runtimes_bit_by_bit(
    built: Build, free_photos: list[Path]
) -> None:
    photos = ("--calibration", *free_photos)
    project = built(SMALL, "cortex-m7", "--quantize", "int8", *photos)
    result = check(project, "--model", SMALL, "--images", *free_photos)
    assert result["passed"] is True
    if any("vnni" in feature for feature in this_cpu().features):
        assert result["vs_quantised"]["steps"] == 0
    assert result["max_error_lsb"] == 0
    assert result["instructions"] < 19e6
    assert result["ram_bytes"] < 33_000


def test_a_bundle_without_its_model_checks_its_golden_data(built: Build) -> None:
    result = check(built(SMALL), "--repeat", 2)
    assert (result["compared"], result["images"]) == ("golden inputs", 2)
    assert result["reference_latency_ms"] is None


def test_run_names_the_classes_and_the_time(real: Path, real_photos: Path) -> None:
    shown = succeed("runtime_demo.run", real, "--image", real_photos / "parrot.jpg")
    assert "97." in shown
    assert "macaw" in shown
    assert "measured on host" in shown


def test_run_of_the_twin_says_what_it_has_no_labels_for(
    built: Build, free_photos: list[Path]
) -> None:
    shown = succeed("runtime_demo.run", built(SMALL), "--image", free_photos[2])
    assert shown.startswith("chelsea.png")
    assert shown.count("class ") == 5


def test_the_network_is_fused_whole_and_its_layout_explained(built: Build) -> None:
    manifest = open_bundle(built(TWIN)).manifest
    assert manifest.lowering.operators == {"nn.conv2d": 52, "nn.dense": 1}
    heavy = [group for group in manifest.lowering.groups if group.macs]
    # Where records chose NHWC, the stem and the first expansions run together with their depthwise convolutions.
    pairs = sum("netship.conv2d_depthwise" in group.operators for group in heavy)
    assert pairs == (7 if manifest.lowering.layout == "NHWC" else 0)
    assert len(heavy) + pairs == 53
    # Table 4 of the paper: 300 M multiply-adds; 300,774,272 counted from the graph.
    assert sum(group.macs for group in heavy) == 300_774_272
    assert not any(
        "batch_norm" in name for g in manifest.lowering.groups for name in g.operators
    )
    records = manifest.lowering.records
    # For every target that has records, convolutions without one take a neighbour's.
    covered = records is not None
    assert manifest.lowering.layout == ("NHWC" if covered else "NCHW")
    assert manifest.lowering.reason


def test_the_library_is_little_more_than_its_weights(built: Build) -> None:
    measured = open_bundle(built(TWIN)).manifest.measured
    # With the biases that batch normalisation folds into, and the two bounds of ReLU6.
    assert measured["weight_bytes"] == 4 * (3_487_816 + 2)
    assert measured["library_bytes"] <= 1.15 * measured["weight_bytes"]
    assert measured["peak_memory_bytes"] < 2e9
