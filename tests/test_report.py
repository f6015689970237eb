"""The report of a check: one page that says all of it and needs no other file.

Longer than 450 lines: each part of the page is looked at.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_results import LABELS, a_result, an_input, manifest, written
from PIL import Image

from netship.bundle.accuracy import Accuracy, Worst
from netship.bundle.manifest import (
    CalibrationImage,
    Firmware,
    FirmwareTensor,
    Float16,
    Judging,
    LayerLoss,
    ModelIdentity,
    Preprocessing,
    Quantisation,
    Quantised,
    QuantisedWay,
    Tensor,
)
from netship.bundle.store import Bundle
from netship.compile import build
from netship.compile.build import _table as build_table
from netship.devices.microcontroller.figures import Figures, Part
from netship.devices.sessions.session import OperatorTime, Origin
from netship.runtime_demo.check import _table as check_table
from netship.runtime_demo.report import GALLERY_LIMIT
from netship.runtime_demo.result import Latency


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    Image.new("RGB", (1200, 800), "green").save(tmp_path / "tree.png")
    return tmp_path / "tree.png"


def test_a_passed_check_shows_photographs_answers_times_and_the_build(
    tree: Path, tmp_path: Path
) -> None:
    inputs = [an_input(tree, expected=0), an_input(tree, 1, 1, name="second.png")]
    page = written(a_result(tmp_path, inputs), tmp_path)
    assert page.photographs() == 2
    for words in (
        "Passed All 2 images",
        "tree.png same answer",
        "this bundle ash 87.3 % onnxruntime 9 ash 65.1 %",
        "second.png",
        "Right by labels.csv 1 of 1",
        "12.60 ms",
        "25.20 ms",
        "0.50 × of its median",
        "conv2d + add fused_conv 1 × 5 × 1 × 1 2.00 400.0 80.0 % 5.0",
        "not in the manifest fused_other 1 × 5 – 100.0 20.0 % –",
        "ab" * 32,
        "llvm -mcpu=znver4",
        "Engine 0.19",
        "NHWC: tuning records cover all 7 tasks",
        "7 of 7 tasks, znver4.json on a Zen core",
        "1 fused group, 1 of them with multiply-adds, 2.0 M in all",
        "model.so 4.56 MB, the model’s weights not recorded, workspace 1.23 MB",
        "3 unless told otherwise, 2 in this check",
        "2 inputs against the reference: largest error 3.0 × 10⁻⁷ of the range emulated",
        "measured on a build machine",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert page.tags.count("svg") == 4, "the verdict's sign and three charts"
    assert "Failed" not in page.text and "another answer" not in page.text


def test_a_failed_check_says_so_first_and_marks_the_input(
    tree: Path, tmp_path: Path
) -> None:
    inputs = [an_input(tree), an_input(tree, relative=3e-2, name="bad.png")]
    page = written(a_result(tmp_path, inputs), tmp_path)
    assert "Failed 1 of 2 images" in page.text
    assert "Passed" not in page.text
    assert "bad.png error too large" in page.text
    assert page.text.index("bad.png") < page.text.index("tree.png")


def test_another_answer_stands_out_with_the_references_gap(
    tree: Path, tmp_path: Path
) -> None:
    inputs = [an_input(tree), an_input(tree, 3, 4, expected=1, name="odd.png")]
    page = written(a_result(tmp_path, inputs), tmp_path)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "1 of 2 has another best class" in text
    assert (
        "odd.png another answer this bundle dogwood 87.3 % onnxruntime 9 elm 65.1 %"
        in text
    )
    assert "first and second are 4.5 × 10⁻⁵ apart" in text
    assert "near enough to a tie for rounding to decide" in text
    assert "labels.csv has birch" in text
    assert ("class", "photo bad") in page.attributes
    assert text.index("odd.png") < text.index("tree.png")


def test_nothing_is_loaded_and_nothing_untrusted_is_markup(
    tree: Path, tmp_path: Path
) -> None:
    evil = "<img src=x onerror=alert(1)>\"'.png"
    bundle = Bundle(
        tmp_path,
        manifest(engine=evil, measured={"built_on": evil, "seconds": evil}),
    )
    result = a_result(
        tmp_path, [an_input(tree, 2, 2, name=evil)], bundle=bundle, reference=evil
    )
    page = written(result, tmp_path)
    assert page.text.count(evil) >= 4
    assert LABELS[2] in page.text
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("https?:|url\\(|@import", html)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith("data:")


def test_no_invisible_character_changes_how_the_page_is_read(
    tree: Path, tmp_path: Path
) -> None:
    name = "a\x1b[31m\u202egnp.\u2066\x00\x9b"
    times = (OperatorTime("tvmgen_default_" + name, (1, 5), 1e-4),)
    result = a_result(tmp_path, [an_input(tree, name=name)], operators=times)
    written(result, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("a\ufffd[31m\ufffdgnp.\ufffd\ufffd\ufffd") >= 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", page)


@pytest.mark.parametrize(
    "measured",
    [
        {},
        {"library_bytes": "large", "verification": None, "not_verified_because": 1},
        {"library_bytes": 10**400, "verification": {"relative_error": 10**400}},
        {"seconds": None, "verification": {"relative_error": [1], "origin": {}}},
    ],
)
def test_whatever_a_manifest_says_was_measured_gives_a_page(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    bundle = Bundle(tmp_path, manifest(measured=measured))
    page = written(a_result(tmp_path, [an_input(None)], bundle=bundle), tmp_path)
    assert "model.so not recorded" in page.text


def test_golden_inputs_on_an_emulated_board_read_well_without_photographs_and_times(
    tmp_path: Path,
) -> None:
    result = a_result(
        tmp_path,
        [an_input(None)],
        compared="golden inputs",
        origin=Origin.EMULATED,
        latency=None,
        reference_latency=None,
        operators=(),
    )
    page = written(result, tmp_path)
    assert page.photographs() == 0
    text = page.text
    assert "The one golden input: every output" in text
    assert "golden input 0 ash, 87.3 % ash, 65.1 %" in text
    assert text.count("say nothing about a real one") == 2
    assert "measured on host" not in text.split("A figure’s origin")[0]
    assert " ms" not in text


def test_no_classifier_shows_errors_alone(tree: Path, tmp_path: Path) -> None:
    item = replace(an_input(tree), ours=(), reference=())
    page = written(a_result(tmp_path, [item]), tmp_path)
    assert "within the tolerance" in page.text
    assert "Same best" not in page.text


def test_a_photograph_that_is_gone_leaves_a_placeholder(
    tree: Path, tmp_path: Path
) -> None:
    inputs = [an_input(tree), an_input(tmp_path / "gone.jpg")]
    page = written(a_result(tmp_path, inputs), tmp_path)
    assert page.photographs() == 1
    assert "this photograph can no longer be read gone.jpg" in page.text


def test_a_photograph_stands_upright_and_small(tmp_path: Path) -> None:
    lying = Image.new("RGB", (1200, 800), "green")
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    page = written(a_result(tmp_path, [an_input(tmp_path / "lying.jpg")]), tmp_path)
    [uri] = [v for _, v in page.attributes if v.startswith("data:image")]
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert shown.size == (160, 240)


def test_of_many_inputs_the_page_shows_a_stated_number(
    tree: Path, tmp_path: Path
) -> None:
    inputs = [an_input(tree, name=f"{i}.png") for i in range(1000)]
    inputs[997] = an_input(tree, 1, 2, name="differs.png")
    inputs[998] = an_input(tree, relative=1.0, name="far.png")
    page = written(a_result(tmp_path, inputs), tmp_path)
    assert page.photographs() == GALLERY_LIMIT
    assert f"Shown are {GALLERY_LIMIT} of 1000" in page.text
    assert f"{1000 - GALLERY_LIMIT} more are left out" in page.text
    order = [page.text.index(name) for name in ("differs.png", "far.png", " 0.png")]
    assert order == sorted(order)
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_infinite_errors_are_said(tmp_path: Path) -> None:
    item = replace(
        an_input(None),
        accuracy=Accuracy(np.inf, np.inf, np.inf, 0.0),
        errors=np.array([np.nan, np.inf, 1e-6]),
    )
    page = written(a_result(tmp_path, [item]), tmp_path)
    assert "Failed" in page.text
    assert "The largest error is infinite of the reference’s range" in page.text
    assert "2 are infinite or not a number" in page.text


def test_the_error_in_the_page_is_in_units_of_the_tolerance(tmp_path: Path) -> None:
    for relative, share, verdict in ((1e-4, "0.5", "Passed"), (4e-4, "2", "Failed")):
        page = written(
            a_result(tmp_path, [an_input(None, relative=relative)]), tmp_path
        )
        stated = f"farthest off is at {share} of its tolerance."
        assert stated in page.text and verdict in page.text


def test_an_int8_network_s_page_says_what_it_loses_against_float32(
    tree: Path, tmp_path: Path
) -> None:
    image = CalibrationImage(name="a.png", sha256="0" * 64)
    quantised = Quantisation(method="min-max", images=(image,), output_steps=(0.1,))
    same = replace(
        an_input(tree, expected=0),
        accuracy=Accuracy(0.0, 0.0, 0.0, 1.0, Worst(0, (0, 0), 1.0, 1.0, 0.0)),
        errors=np.zeros(5),
        vs_float=Accuracy(0.3, 0.1, 0.01, 0.987),
        float_top1=0,
    )
    items = [same, replace(same, name="second.png", float_top1=3)]
    known = Bundle(tmp_path, manifest(quantisation=quantised))
    text = written(a_result(tmp_path, items, bundle=known), tmp_path).text
    for words in (
        "trees.onnx in int8 on znver4",
        "exactly the reference’s, which is the int8 network in ONNX Runtime",
        "Against float32 50 % same best class as the network that was quantised; cosine at least 0.9870",
        "Same best class as float32 50.0 %",
        "Cosine similarity with float32 0.9870",
        "Computes in int8",
        "Right ash",
    ):
        assert words in text
    # No class was taken for another.
    assert "Taken for" not in text
    # There is no error to draw.
    assert "Errors of the first output" not in text


def test_a_microcontroller_has_memory_and_steps_instead_of_times(
    tmp_path: Path,
) -> None:
    name = "a/very/long/layer/name/" * 8 + "<b>conv</b>"
    firmware = Firmware(
        cpu="cortex-m7",
        inputs=(
            FirmwareTensor(
                dtype="int8", nbytes=192, quantised=Quantised(scale=0.5, zero=-3)
            ),
        ),
        outputs=(FirmwareTensor(dtype="float32", nbytes=20),),
        exact=True,
        arena_bytes=1_192,
        input_offsets=(0,),
        peak="a bias;model/stem",
        steps=1,
        weights_bytes=30_000,
    )
    figures = Figures(
        board="mps2-an500 (cortex-m7)",
        interface=firmware,
        stack_bytes=300,
        static_bytes=8,
        code_bytes=4_000,
        weights_bytes=30_000,
        instructions=4_800_000,
        max_error=0.0,
        parts=(
            Part(
                "a bias of this layer;model/stem", 1_500_000, 3_600_000.0, 0.0, 0.0, 0.0
            ),
            Part(name, 500_000, 1_200_000.0, 700_000.0, 400_000.0, 100_000.0),
        ),
    )
    (tmp_path / "memory.svg").write_text(
        '<svg viewBox="0 0 2170 540"><script>alert(1)</script></svg>'
    )
    files = manifest().files | {"memory.svg": "0" * 64, "m.c": "0" * 64}
    bundle = Bundle(
        tmp_path, manifest(format="c", library="m.c", files=files, firmware=firmware)
    )
    result = a_result(
        tmp_path,
        [an_input(None)],
        bundle=bundle,
        origin=Origin.EMULATED,
        latency=None,
        reference_latency=None,
        operators=(),
        figures=figures,
    )
    page = written(result, tmp_path)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "RAM 1,520 bytes: arena, outputs, static data and stack emulated",
        "1,520 bytes: arena 1,192 bytes with the input in it, outputs 20 bytes, static data 8 bytes, stack 300 bytes",
        "Flash 34,000 bytes: code, tables and weights",
        "Instructions 4.80 M of one inference counted by QEMU",
        "10.0 ms at 480 MHz, if an instruction takes one cycle",
        "Input of the model",
        "Input in C int8, 192 bytes, real value = (q + 3) × 0.5, channels last",
        "float32, 20 bytes",
        "1 model/stem 1,500,000 3,600,000 75.0 % – – – 0.42",
        "500,000 1,200,000 25.0 % 700,000 400,000 100,000 0.42",
        "All steps 2,000,000 4,800,000",
        "weights 30,000 bytes, arena 1,192 bytes",
        "The same C on the host the same bits",
        "largest step model/stem",
    ):
        assert words in text
    assert "No known part is large enough" not in text
    # The drawing keeps its size, and scrolls where the page is narrower.
    assert ("style", "min-width: 2170px") in page.attributes
    for words in ("model.so", "Latency", "Time by kernel"):
        assert words not in text
    assert "script" not in page.tags and "b" not in page.tags
    assert sum(v.startswith("data:image/svg+xml") for _, v in page.attributes) == 1


def test_a_passed_check_says_where_no_known_part_has_room(tmp_path: Path) -> None:
    """The emulated board has more memory than any part, so the answers are right all the same."""
    tensor = FirmwareTensor(dtype="float32", nbytes=20)
    firmware = Firmware(
        cpu="cortex-m7",
        inputs=(tensor.model_copy(update={"nbytes": 768}),),
        outputs=(tensor,),
        exact=False,
        arena_bytes=1_192,
        input_offsets=(0,),
        peak="stem",
        steps=1,
        weights_bytes=8_929_872,
    )
    part = Part("stem", 1_500_000, 3_600_000.0, 0.0, 0.0, 0.0)
    sizes = (300, 8, 4_000, 8_929_872, 3_600_000)
    figures = Figures("an500 (cortex-m7)", firmware, *sizes, 0.0, (part,))
    files = manifest().files | {"m.c": "0" * 64}
    known = manifest(format="c", library="m.c", files=files, firmware=firmware)
    result = a_result(
        tmp_path,
        [an_input(None)],
        bundle=Bundle(tmp_path, known),
        origin=Origin.EMULATED,
        latency=None,
        reference_latency=None,
        operators=(),
        figures=figures,
    )
    said = "the weights take 8,929,872 bytes, 6,832,720 more than the flash of any"
    text = written(result, tmp_path).text
    assert f"No known part is large enough: {said} cortex-m7" in text
    table = check_table(result)
    assert f"\nwarning    {said}" in table
    assert "host       the same C on this machine gives the same bits" in table
    [line] = result.to_json()["warnings"]
    assert line.startswith(said)


def test_layers_that_share_a_kernel_keep_their_own_names() -> None:
    lowering = manifest().lowering
    (one,) = lowering.groups
    layers = ("stem", "head", "last")
    names = ("fused_conv", "fused_conv", "fused_other")
    groups = tuple(
        one.model_copy(update={"layer": layer, "name": name})
        for layer, name in zip(layers, names, strict=True)
    )
    kernels = [*(f"tvmgen_default_{name}" for name in names), "fused_unknown"]
    found = lowering.model_copy(update={"groups": groups}).groups_of(kernels)
    assert [each and each.layer for each in found] == [*layers, None]


def test_the_loss_of_int8_and_float16_says_of_how_many_images(tmp_path: Path) -> None:
    loss: dict[str, Any] = {"cosine": 1.0, "top1_agreement": 1.0, "images": 1}
    image = CalibrationImage(name="a.jpg", sha256="0" * 64)
    int8 = Quantisation(method="min-max", images=(image,), output_steps=(0.1,))
    half = Float16(images=0, seeded=1, float32=(), float32_sums=())
    known = manifest(quantisation=int8, measured={"int8": loss})
    [(_, said)] = build._int8(known)
    assert "against float32 on 1 image: top-1 100%, cosine 1.0000" in said
    loss |= {"images": 2, "worst_layer": "conv", "worst_decibels": 60}
    [(_, said)] = build._float16(manifest(float16=half, measured={"float16": loss}))
    assert said.startswith("against float32 on 2 inputs, simulated: top-1 100%, ")


def test_the_ways_that_int8_was_tried_in_are_on_the_page(
    tree: Path, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"images": 16, "ties": 0, "cosine": 0.9, "decibels": 7}
    plain |= {"method": "min-max", "bias_correction": False, "kept": (), "same": 9}
    ours = plain | {"bias_correction": True, "kept": ("stem<b>",), "same": 15}
    judging = Judging(
        ways=(QuantisedWay(**plain), QuantisedWay(**ours)),
        taken=1,
        layers=(LayerLoss(layer="stem<b>", fall_decibels=12.5, multiply_adds=0.03),),
    )
    facts = Quantisation(judging=judging, kept_float=("stem<b>",), output_steps=(0.1,))
    loss = {"cosine": 1.0, "top1_agreement": 1.0, "images": 16}
    times = {"seconds": 1.0, "peak_memory_bytes": 1, "library_bytes": 1}
    known = manifest(quantisation=facts, measured=times | {"int8": loss})
    bundle = Bundle(tmp_path, known)
    page = written(a_result(tmp_path, [an_input(tree)], bundle=bundle), tmp_path)
    for words in (
        "judged against float32 on 16 images that did not calibrate it",
        "ONNX Runtime’s own quantiser, min-max 9 of 16 0.9000 7.0 dB",
        "min-max; in float32 stem<b> (built) 15 of 16",
        "stem<b> 12.5 dB 3.0 %",
    ):
        assert words in page.text
    assert "b" not in page.tags
    known = manifest(
        quantisation=facts.model_copy(update={"method": "min-max"}),
        measured={"int8": loss},
    )
    [(_, said)] = build._int8(known)
    assert (
        "on 16 images that did not calibrate: best class on 15, cosine 0.9000" in said
    )
    assert said.endswith("; kept in float32: stem<b>") or "float32: stem<b>;" in said


def test_of_many_outputs_the_page_says_how_many_it_leaves_out(tmp_path: Path) -> None:
    outputs = tuple(Tensor(name=f"head{i}", shape=(1, 4)) for i in range(12))
    result = a_result(tmp_path, [an_input(None)])
    many = manifest().model_copy(update={"outputs": outputs})
    result = replace(result, bundle=Bundle(tmp_path, many))
    text = written(result, tmp_path).text
    assert "head7: float32 1 × 4 and 4 more" in text and "head8" not in text


@pytest.mark.parametrize("assumed", [True, False])
def test_an_assumed_preprocessing_is_said_with_every_verdict(
    tree: Path, tmp_path: Path, assumed: bool
) -> None:
    settings = Preprocessing(
        resize=8, crop=(8, 8), scale=1, mean=(0,), std=(1,), assumed=assumed
    )
    times = {"seconds": 1.0, "peak_memory_bytes": 1, "library_bytes": 1}
    sizes = {"weight_bytes": 1, "verification": None, "not_verified_because": "x"}
    known = manifest(preprocessing=settings, measured=times | sizes)
    bundle = Bundle(tmp_path, known)
    result = a_result(tmp_path, [an_input(tree)], bundle=bundle)
    verdict = check_table(result).splitlines()[-1]
    checked = next(x for x in build_table(bundle, "m").splitlines() if "NOT comp" in x)
    page = written(result, tmp_path).text
    for words in (verdict, checked):
        assert ("preprocessing assumed, not given" in words) == assumed
    assert ("The preprocessing is assumed, not given: v. " in page) == assumed
    assert result.to_json()["preprocessing_assumed"] is assumed


def test_weights_are_not_said_to_be_in_a_library_that_is_smaller(
    tmp_path: Path,
) -> None:
    """The build counts the network's constants, of which the compiler folds some."""
    sizes = {"library_bytes": 2_480_000, "weight_bytes": 2_490_000}
    others = {"seconds": 1.0, "peak_memory_bytes": 1, "not_verified_because": "x"}
    known = manifest(measured=sizes | others | {"verification": None})
    table = build_table(Bundle(tmp_path, known), "m")
    assert "size     model.so 2.48 MB; the network's weights take 2.49 MB\n" in table


def test_known_classes_say_what_they_were_taken_for(tree: Path, tmp_path: Path) -> None:
    inputs = [an_input(tree, ours, ours, expected=known) for ours, known in ((0, 0), (1, 0), (1, 0), (3, 0), (3, 3))]  # fmt: skip
    result = a_result(tmp_path, inputs)
    ash, elm = result.confusion()
    assert (ash.right, ash.size, ash.taken) == (1, 4, ((1, 2), (3, 1)))
    assert (elm.expected, elm.right, elm.size, elm.taken) == (3, 1, 1, ())
    said = f"confused   {LABELS[0]}: 1 of 4 right, taken for {LABELS[1]} (2), {LABELS[3]} (1)"
    assert said in check_table(result).splitlines()
    text = written(result, tmp_path).text
    assert f"{LABELS[0]} 1 of 4 {LABELS[1]} (2), {LABELS[3]} (1)" in text
    assert result.to_json()["confusion"][0]["taken"] == {1: 2, 3: 1}


@pytest.mark.parametrize(
    ("name", "seeded"), [("trees.onnx", False), ("mobilenetv2-0.35-96", True)]
)
def test_seeded_weights_are_said_with_the_verdict(
    tree: Path, tmp_path: Path, name: str, seeded: bool
) -> None:
    identity = ModelIdentity(name=name, sha256="0" * 64)
    bundle = Bundle(tmp_path, manifest(model=identity))
    result = a_result(tmp_path, [an_input(tree)], bundle=bundle)
    verdict = check_table(result).splitlines()[-1]
    assert verdict.endswith("; seeded weights: its answers mean nothing") == seeded
    page = written(result, tmp_path).text
    assert (
        "weights are seeded, not trained. Its answers mean nothing" in page
    ) == seeded
    assert result.to_json()["seeded_weights"] is seeded


def test_skipped_files_are_counted_beside_the_verdict(
    tree: Path, tmp_path: Path
) -> None:
    result = a_result(tmp_path, [an_input(tree)], skipped=2)
    assert "1 image (2 files skipped)" in check_table(result)
    assert result.to_json()["skipped"] == 2
    assert "(2 that could not be read skipped)" in written(result, tmp_path).text


def test_a_small_network_s_times_are_not_zero(tmp_path: Path) -> None:
    tiny = Latency.of([5.9123e-7])
    result = replace(
        a_result(tmp_path, [an_input(None, 0)]), latency=tiny, reference_latency=tiny
    )
    said = check_table(result)
    assert "median 0.000591 ms, minimum 0.000591 ms, 1 inference, 2 threads" in said
    assert result.to_json()["latency_ms"]["median"] == 0.0005912
    many = replace(result, latency=Latency.of([5.9123e-7] * 20))
    said = check_table(many)
    assert "median 0.000591 ms, p90 0.000591 ms, p99 0.000591 ms, minimum" in said
    html = written(result, tmp_path).text
    assert "0.000591 ms" in html and "0.00 ms" not in html
