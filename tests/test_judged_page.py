"""Boxes and masks in the table, the JSON and the page of a check.

Longer than 450 lines: table, JSON and page show one result, and each test reads all three.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_results import LABELS, Page, a_result, an_input, manifest, written
from conftest import run
from PIL import Image
from refusals import labelled_bundle

from netship.bundle.accuracy import Worst
from netship.bundle.detections import Detections
from netship.bundle.golden import Check
from netship.bundle.manifest import (
    Golden,
    Manifest,
    Preprocessing,
    TargetIdentity,
    Tensor,
)
from netship.bundle.photos import Placement
from netship.bundle.store import Bundle
from netship.bundle.task import Task
from netship.devices.sessions.session import Origin
from netship.runtime_demo import coco, compare, comparison, drawing, findings
from netship.runtime_demo import run as run_command
from netship.runtime_demo.check import _given, _table
from netship.runtime_demo.coco import Precision
from netship.runtime_demo.columns import column
from netship.runtime_demo.findings import Boxes, Geometry, Given, Masks, Photograph
from netship.runtime_demo.result import CheckResult, InputResult
from netship.runtime_demo.side_by_side import Comparison
from netship.targets.errors import UserError

WHERE = Geometry((200, 160), (100, 80), Placement(0.5, 0.5, 0, 0))


def boxes(*rows: tuple[float, ...]) -> Detections:
    table = np.array(rows, np.float32).reshape(-1, 6)
    points = np.full((len(table), 1, 2), 20, np.float32)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int32), points)


ASH, CEDAR = (40, 40, 140, 120, 0.9, 0), (10, 10, 180, 90, 0.7, 2)


def an_image(folder: Path, name: str, found: Boxes | Masks, **more: Any) -> InputResult:
    Image.new("RGB", (200, 160), "gray").save(folder / name)
    plain = an_input(folder / name, **more)
    return replace(plain, ours=(), reference=(), swap=None, found=found)


def result(folder: Path, inputs: list[InputResult], **changes: Any) -> CheckResult:
    found = [(item.path, item.found) for item in inputs if item.found]
    return a_result(
        folder, inputs, findings=findings.summary(found, findings.Given()), **changes
    )


@pytest.fixture
def boxed(tmp_path: Path) -> CheckResult:
    size = (200, 160)
    same = Boxes.of(size, boxes(ASH, CEDAR), boxes(ASH, CEDAR))
    other = Boxes.of(size, boxes(ASH), boxes(ASH, CEDAR))
    inputs = [an_image(tmp_path, "a.png", same), an_image(tmp_path, "b.png", other)]
    return result(tmp_path, inputs)


def test_boxes_are_in_the_table_and_the_json(boxed: CheckResult) -> None:
    text = _table(boxed)
    assert (
        "boxes      3 of 4 boxes matched, 1 missing, 0 extra; IoU mean 1.0000" in text
    )
    assert text.splitlines()[1].startswith("b.png                  1 of 2 boxes")
    verdict = text.splitlines()[-1]
    assert verdict.startswith("verdict    PASSED; boxes: 1 missing, 0 extra, 2 images")
    said = json.loads(json.dumps(boxed.to_json(), allow_nan=False))
    assert said["boxes"]["missing"] == 1
    assert said["results"][1]["boxes"]["matched"] == 1
    assert said["results"][1]["reference_boxes"] == 2


def test_both_answers_are_drawn_next_to_each_other(
    boxed: CheckResult, tmp_path: Path
) -> None:
    page = written(boxed, tmp_path)
    assert page.photographs() == 4
    assert "Boxes matched 3 of 4" in page.text
    assert "1 of the reference’s 4 boxes is missing, 0 are extra: rounding" in page.text
    assert "same answer" in page.text and "not the same answer" in page.text
    # What differs comes first.
    assert page.text.index("b.png") < page.text.index("a.png")
    assert "script" not in page.tags


def test_boxes_and_labels_with_markup_do_no_harm(tmp_path: Path) -> None:
    assert "<script>" in LABELS[2]
    named = boxes((0, 0, 9, 9, float("nan"), 2), CEDAR)
    item = an_image(tmp_path, "<b>.png", Boxes.of((200, 160), named, named))
    page = written(result(tmp_path, [item]), tmp_path)
    assert "b" not in page.tags and "1 not finite" in page.text


def test_masks_are_in_the_table_the_json_and_the_page(tmp_path: Path) -> None:
    ours, reference = np.zeros((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    ours[:4] = 3
    reference[:3] = 3
    Image.fromarray(np.full((160, 200), 3, np.uint8)).save(tmp_path / "m.png")
    found = Masks.of(WHERE, (ours, reference), tmp_path / "m.png")  # fmt: skip
    item = an_image(tmp_path, "a.png", found)
    whole = result(tmp_path, [item])
    text = _table(whole)
    assert "masks      same class in 87.50% of pixels, mIoU 0.7750" in text
    assert "right by --masks: 50.00% of pixels, mIoU 0.2500; the reference 37.50%" in text  # fmt: skip
    said = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert f"IoU by class: {LABELS[3]}: 0.5000, {LABELS[0]}: 0.0000" in text
    assert "not counted" not in text and said["given_void"] == 0
    assert said["masks"] == {
        "pixel_agreement": 0.875,
        "mean_iou": 0.775,
        "iou": {"0": 0.8, "3": 0.75},
        "without_class": 0,
        "reference_without_class": 0,
    }
    assert said["given_masks"]["ours"]["pixel_agreement"] == 0.5
    page = written(whole, tmp_path)
    assert page.photographs() == 2
    assert (
        "Same class 87.50% of pixels, mIoU 0.7750" in page.text
        and f"by class: {LABELS[3]}: 0.5000, {LABELS[0]}: 0.0000" in page.text
        and "mIoU by --masks 0.2500" in page.text
        and "Pixels of the same class 70 of 80" in page.text
    )


def test_two_detectors_are_compared_by_their_boxes(
    boxed: CheckResult, tmp_path: Path
) -> None:
    """Equal numbers are not equal boxes: another threshold finds others."""
    size = (200, 160)
    none = boxes()
    numbers = np.arange(8, dtype=np.float32)
    first, second = (replace(each, output=numbers) for each in boxed.inputs)
    boxed = replace(boxed, inputs=(first, second))
    fewer = replace(first, found=Boxes.of(size, boxes(ASH), none))
    empty = replace(second, found=Boxes.of(size, none, none))
    other = replace(boxed, inputs=(fewer, empty))
    (tmp_path / "model.so").write_bytes(b"x")
    columns = [column(name, each.bundle, each) for name, each in (("a", boxed), ("b", other))]  # fmt: skip
    whole = Comparison(columns)
    said = compare.table(whole)
    counts = "boxes: 1 in both (mean IoU 1.0000), 2 only in A, 0 only in B"
    assert f"largest difference 0, least cosine 1.000000, {counts}" in said
    compare.write_page(whole, tmp_path / "page.html")
    assert counts in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    (pair,) = json.loads(json.dumps(whole.to_json(), allow_nan=False))["pairs"]
    assert (pair["boxes"]["missing"], pair["masks"]) == (2, None)


@pytest.mark.parametrize("passed", [True, False])
def test_of_class_numbers_it_is_counted_how_many_differ(
    tmp_path: Path, passed: bool
) -> None:
    ours, reference = np.zeros((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    ours[0] = 7
    item = an_image(tmp_path, "a.png", Masks.of(WHERE, (ours, reference), None))
    apart = np.abs(ours.astype(float) - reference).ravel()
    worst = Worst(0, (0, 0), 7.0, 0.0, 1.0 if passed else 7.0)
    item = replace(
        item, errors=apart, accuracy=item.accuracy._replace(max_abs_error=7.0, worst=worst)
    )  # fmt: skip
    classes = Tensor(name="map", shape=(1, 8, 10), dtype="int64")
    mapped = manifest(task=Task(kind="segment"), outputs=(classes,))
    whole = result(tmp_path, [item], bundle=Bundle(tmp_path, mapped))
    why = "explains each" if passed else "does not explain all"
    said = f"10 of 80 class numbers differ; rounding {why}"
    text, page = _table(whole), written(whole, tmp_path).text
    assert f"error      {said}\n" in text and "max-abs" not in text
    assert said in page and "Class numbers that differ 10 of 80" in page
    assert "Largest error" not in page
    assert whole.to_json()["other_classes"] == 10
    assert result(tmp_path, [item]).to_json()["other_classes"] is None
    golden = replace(item, name="golden input 0", path=None, found=None)
    whole = replace(whole, inputs=(golden,), compared="golden inputs")
    assert _table(whole).startswith("golden input 0         10 class numbers differ\n")
    page = written(whole, tmp_path).text
    assert "golden input 0 10" in page and "Largest error" not in page


def test_what_of_a_mask_is_void_is_said(tmp_path: Path) -> None:
    both = (np.full((8, 10), 3, np.uint8),) * 2
    mask = np.full((160, 200), 3, np.uint8)
    mask[:40] = 255
    known = []
    for name in ("part", "all"):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
        found = Masks.of(WHERE, both, tmp_path / f"{name}.png", 21)
        known.append(result(tmp_path, [an_image(tmp_path, "a.png", found)]))
        mask[:] = 255
    part, void = map(_table, known)
    assert "           not counted: 25.0% of pixels are void (255)\n" in part
    assert known[0].to_json()["given_void"] == 0.25
    assert "25.0% of pixels are void (255)" in written(known[0], tmp_path).text
    assert "not counted: 100.0% of pixels are void (255)\n" in void
    assert "no pixel to compare" in void and "IoU by class" not in void
    with pytest.raises(UserError, match=r"part.png: has class 3, the network has 3 classes; give numbers from 0 to 2"):  # fmt: skip
        Masks.of(WHERE, both, tmp_path / "part.png", 3)


def test_what_of_a_segmentation_is_nan_is_said(tmp_path: Path) -> None:
    """By run, and by check in the table, the JSON and the page; a photograph keeps its colours there."""
    task = Task(kind="segment", class_axis=1)
    scores = np.zeros((1, 3, 2, 4), np.float32)
    scores[0, 1] = 1
    broken = scores.copy()
    broken[0, 0, 0, :3] = np.nan
    known = manifest(
        task=task, outputs=(Tensor(name="y", shape=scores.shape),), labels=None
    )
    read = run_command._reader(Bundle(tmp_path, known))
    answer = read([broken], None)
    top = {"class_index": 1, "label": "", "probability": 0.625}
    assert answer["top"] == [top] and answer["without_class"] == 0.375
    table = run_command._table(
        {
            "images": [{"name": "a", **answer}],
            "saved": None,
            "latency_ms": None,
            "device": "d",
        }
    )
    assert "\n   37.5%  without a class: output 'y' has NaN in 3 pixels\n" in table
    assert read([scores], None)["without_class"] == 0
    assert read([np.full_like(scores, np.nan)], None)["top"] == []

    for ours, reference, says, same in (
        (broken, scores, "62.50% of pixels, mIoU 0.6250; without a class, such as of NaN: 3 pixels of ours, 0 of the reference's", 0.625),
        (broken, broken, "100% of pixels, mIoU 1; without a class, such as of NaN: 3 pixels of ours, 3 of", 1),
        (np.full_like(scores, np.nan),) * 2 + ("no pixel to compare; without a class, such as of NaN: 8 pixels of ours, 8 of", None),
    ):  # fmt: skip
        found = findings.find(known, Photograph(None, None), [ours], [reference], Given())  # fmt: skip
        assert isinstance(found, Masks)
        whole = result(tmp_path, [an_image(tmp_path, "a.png", found)])
        assert f"masks      same class in {says}" in _table(whole)
        said = json.loads(json.dumps(whole.to_json(), allow_nan=False))["masks"]
        assert said["pixel_agreement"] == same and said["without_class"] >= 3
        assert says.split("; ")[1] in written(whole, tmp_path).text


def test_precision_is_in_the_table_the_json_and_the_page(
    boxed: CheckResult, tmp_path: Path
) -> None:
    pair = (Precision(0.5124, 0.31), Precision(0.5131, 0.3))
    known = replace(boxed, findings=boxed.findings._replace(precision=pair))
    assert (
        "labels     mAP@0.5 0.512, mAP@0.5:0.95 0.310; the reference mAP@0.5 0.513"
        in _table(known)
    )
    assert known.to_json()["precision"]["reference"]["at_50"] == 0.5131
    assert "mAP@0.5 0.512" in written(known, tmp_path).text


# From outputs to findings

DETECTOR = Task.model_validate(
    {
        "kind": "detect",
        "detector": {
            "decoder": "test",
            "levels": [
                {
                    "columns": 3,
                    "boxes": {"output": 0, "cell": 4},
                    "scores": {"output": 1, "cell": 2},
                }
            ],
            "box": "corners",
            "classes": 2,
        },
    }
)
ROWS = np.array([[[0, 0, 4, 4], [2, 2, 8, 8], [1, 1, 3, 3]]], np.float32)
SCORES = np.array([[[0.9, 0.1], [0.1, 0.6], [0.2, 0.3]]], np.float32)


def detector() -> Any:
    outputs = (Tensor(name="b", shape=(1, 3, 4)), Tensor(name="s", shape=(1, 3, 2)))
    entry = Golden(inputs=("golden/in",), outputs=("golden/out",) * 2, tolerances=("golden/near",) * 2)  # fmt: skip
    stretched = Preprocessing(
        fit="stretch", resize=(8, 8), crop=(8, 8), scale=1, mean=(0,), std=(1,)
    )
    return manifest(
        task=DETECTOR, outputs=outputs, golden=(entry,), preprocessing=stretched
    )


def test_outputs_become_boxes_of_the_photograph() -> None:
    photograph = Photograph(Path("a.png"), (80, 40))
    both = [ROWS, SCORES]
    found = findings.find(detector(), photograph, both, both, Given())
    assert isinstance(found, Boxes) and found.same and found.ranked is None
    assert found.ours.boxes.tolist() == [[0, 0, 40, 20], [20, 10, 80, 40]]
    fewer = SCORES * np.float32(0.8)
    found = findings.find(detector(), photograph, [ROWS, fewer], both, Given())
    assert isinstance(found, Boxes)
    assert (found.match.matched, found.match.missing) == (1, 1)
    golden = findings.find(detector(), Photograph(None, None), both, both, Given())
    assert isinstance(golden, Boxes) and golden.size == (8, 8)


def test_with_labels_boxes_of_low_scores_count_too() -> None:
    image = coco.LabelledImage(1, None)
    box = {"bbox": [90.0, 0.0, 5.0, 5.0], "place": "annotations[0] (id 3)"}
    path = Path("a.png")
    labels = coco.Labels(Path("l.json"), {"a.png": image}, {}, [1, 2], {path: image})
    photograph, both = Photograph(path, (80, 40)), [ROWS, SCORES]
    found = findings.find(detector(), photograph, both, both, Given(labels))
    assert isinstance(found, Boxes) and found.ranked is not None
    assert [len(each.scores) for each in found.ranked] == [3, 3]
    assert len(found.ours.scores) == 2
    # The photograph's size is known only now.
    outside = Given(labels._replace(annotations={1: [box]}))
    with pytest.raises(UserError, match=r"l.json: annotations\[0\] \(id 3\): bbox is .*, outside its image of 80×40"):  # fmt: skip
        findings.find(detector(), photograph, both, both, outside)
    other = {path: image._replace(size=(40.0, 80.0))}
    sized = Given(labels._replace(photographs=other))
    with pytest.raises(UserError, match="l.json: image id 1: is 40×80, but a.png has 80×40 pixels; give"):  # fmt: skip
        findings.find(detector(), photograph, both, both, sized)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0])
def test_an_output_of_nan_or_without_boxes_is_judged(wrong: float) -> None:
    broken = [ROWS, np.full_like(SCORES, wrong)]
    photograph = Photograph(Path("a.png"), (1, 1))
    found = findings.find(detector(), photograph, broken, [ROWS, SCORES], Given())
    assert isinstance(found, Boxes)
    assert found.match.missing >= (2 if not wrong > 0 else 0)
    assert found.text()


@pytest.mark.filterwarnings("error")
def test_run_prints_json_of_any_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    for known, outputs, name in (
        (detector(), [ROWS, np.where(SCORES > 0.8, np.inf, SCORES)], "boxes"),
        (manifest(), [np.full((1, 5), np.nan, np.float32)], "top"),
    ):
        seen = {"name": "a", **run_command._reader(Bundle(tmp_path, known))(outputs, (80, 40))}  # fmt: skip
        answer = {"images": [seen], "saved": None, "latency_ms": None, "device": "d"}
        monkeypatch.setattr(run_command, "_run", lambda *_, answer=answer: answer)
        for words in (["--json"], []):
            assert run_command.main(["out", *words]) == 0
            printed = capsys.readouterr().out
            if words:
                said = json.loads(printed, parse_constant=pytest.fail)
                (first, *_) = said["images"][0][name]
                assert first.get("score") is first.get("probability") is None


def test_a_map_of_classes_becomes_a_mask(tmp_path: Path) -> None:
    shape = (1, 8, 8)
    segmenting = manifest(
        task=Task(kind="segment"),
        outputs=(Tensor(name="map", shape=shape, dtype="int32"),),
    )
    ours = np.zeros(shape, np.int32)
    Image.new("L", (80, 80)).save(tmp_path / "a.png")
    files = [Path("photos/a.jpg"), Path("a.jpg")]
    given = Given(None, dict.fromkeys(files, tmp_path / "a.png"))
    photograph = Photograph(Path("photos/a.jpg"), (80, 80))
    found = findings.find(segmenting, photograph, [ours], [ours], given)
    assert isinstance(found, Masks) and found.same and found.given
    assert found.given[0].share == 1
    with pytest.raises(UserError, match="a.png: has 80×80 pixels, its image 81×80"):
        findings.find(segmenting, Photograph(Path("a.jpg"), (81, 80)), [ours], [ours], given)  # fmt: skip


@pytest.mark.parametrize("task", [None, Task(kind="classify"), Task(kind="raw")])
def test_what_looks_like_scores_of_classes_need_not_be(
    tmp_path: Path, task: Task | None
) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    bundle = Bundle(tmp_path, manifest(task=task, labels=None))
    row = np.arange(5, dtype=np.float32)[np.newaxis]
    check = Check([row], [row], [np.ones_like(row)])
    found = comparison._result(bundle, comparison.Input("a", None, (row,)), [row], check, Given())  # fmt: skip
    classifies = task is None or task.kind == "classify"
    assert bool(found.ours) == bool(found.reference) == classifies


def test_rows_of_a_detector_are_no_classes(tmp_path: Path) -> None:
    """Of several outputs [1, 64, 1] is the first stride's scores; alone it may be classes."""
    outputs = (
        Tensor(name="cls_8", shape=(1, 64, 1)),
        Tensor(name="b", shape=(1, 64, 4)),
    )
    entry = Golden(inputs=("golden/in",), outputs=("golden/out",) * 2, tolerances=("golden/near",) * 2)  # fmt: skip
    rows = manifest(outputs=outputs, golden=(entry,), labels=None)
    assert rows.kind == "raw"
    with pytest.raises(
        UserError,
        match=r"'cls_8' is 1×64×1, not one score a class, and there is 1 other; use check",
    ):
        run_command._reader(Bundle(tmp_path, rows))
    assert manifest(outputs=outputs[:1], labels=None).kind == "classify"


@pytest.mark.parametrize("name", ["marked.jpg", "marked.png"])
def test_what_one_network_found_is_saved(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (400, 200), "white").save(tmp_path / "a.png")
    photograph = Photograph(tmp_path / "a.png", (400, 200))
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    segmenting = manifest(
        task=Task(kind="segment"),
        outputs=(Tensor(name="map", shape=(1, 8, 8), dtype="int32"),),
    )
    pictures = [
        findings.marked(Bundle(tmp_path, known), photograph, outputs, "ash 90%")
        for known, outputs in (
            (manifest(), [SCORES]),
            (detector(), [ROWS, SCORES]),
            (segmenting, [np.ones((1, 8, 8), np.int32)]),
        )
    ]
    for picture in pictures:
        drawing.save(picture, tmp_path / name, "--save")
        saved = Image.open(tmp_path / name)
        assert saved.size == (400, 200)
        assert np.asarray(saved).std() > 0
    with pytest.raises(UserError, match="--save: .*x.npy is no photograph"):
        findings.marked(Bundle(tmp_path, manifest()), Photograph(Path("x.npy"), None), [], "")  # fmt: skip


@pytest.mark.parametrize("machine", ["aarch64", "arm"])
def test_an_emulated_board_s_time_is_estimated_by_the_meter(
    tmp_path: Path, machine: str
) -> None:
    own = TargetIdentity(name="board", tvm="llvm", machine=machine)
    timeless = a_result(
        tmp_path,
        [an_input(None)],
        bundle=Bundle(tmp_path, manifest(target=own)),
        origin=Origin.EMULATED,
        latency=None,
        reference_latency=None,
        operators=(),
    )
    text, page = _table(timeless), written(timeless, tmp_path).text
    assert ("; python -m meter estimates it)" in text) == (machine == "aarch64")
    assert page.count("python -m meter estimates them") == 2 * (machine == "aarch64")


def test_where_the_photograph_is_saved_is_said() -> None:
    answer: dict[str, Any] = {"images": [], "saved": "marked.jpg", "latency_ms": None, "device": "emulated"}  # fmt: skip
    assert "saved: marked.jpg" in run_command._table(answer)
    assert "saved" not in run_command._table(answer | {"saved": None})


def test_a_check_in_a_process_judges_boxes(tmp_path: Path) -> None:
    """A network of five numbers, of which four are a box and one its score."""
    bundle = labelled_bundle(tmp_path)
    path = bundle / "manifest.json"
    values = {"output": 0, "cell": 5}
    level = {"columns": 1, "boxes": values, "scores": {**values, "first": 4}}
    detector = {"decoder": "test", "levels": [level], "box": "corners", "classes": 1, "activation": "sigmoid", "score_threshold": 0}  # fmt: skip
    task = {"kind": "detect", "detector": detector}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": task}))
    done = run("runtime_demo.check", bundle, "--json", "--repeat", 1)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["passed"] and said["top1_agreement"] is None
    assert said["boxes"]["missing"] == said["boxes"]["extra"] == 0
    assert len(said["results"]) == 2 and "ours_boxes" in said["results"][0]


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"labels": None, "masks": None, **given})


@pytest.mark.parametrize(
    ("known", "given", "says"),
    [
        (manifest(), {"masks": Path("m")}, "does not segment, its task is classify"),
        (detector(), {"masks": Path("m")}, "does not segment, its task is detect"),
        (manifest(task=Task(kind="segment")), {"masks": Path("none")}, "no such folder"),
        (manifest(task=Task(kind="segment")), {"labels": Path("l")}, "its task is segment"),
        (manifest(task=Task(kind="raw")), {"labels": Path("l")}, "its task is raw"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_task_is_refused(
    tmp_path: Path, known: Manifest, given: dict[str, Path], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        _given(Bundle(tmp_path, known), [], options(**given))
    assert "\n" not in str(error.value)


def test_a_mask_has_the_classes_of_the_scores_or_of_the_names(tmp_path: Path) -> None:
    """A map of classes does not say how many there are; its names do."""
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    scores = (Tensor(name="y", shape=(1, 21, 8, 8)),)
    for known, classes in (
        (manifest(task=Task(kind="segment", class_axis=1), outputs=scores), 21),
        (manifest(task=Task(kind="segment")), len(LABELS)),
        (manifest(task=Task(kind="segment"), labels=None), None),
    ):
        given = _given(Bundle(tmp_path, known), [Path("a.jpg")], options(masks=tmp_path))  # fmt: skip
        assert given.masks == {Path("a.jpg"): tmp_path / "a.png"}
        assert given.classes == classes


def test_of_int8_boxes_are_compared_with_the_float32_network_too(
    boxed: CheckResult,
) -> None:
    one = replace(boxed.inputs[1], vs_float=boxed.inputs[1].accuracy)
    known = replace(boxed, inputs=(replace(one, float_found=one.found),))
    line = next(x for x in _table(known).splitlines() if x.startswith("float32"))
    assert line == (
        "float32    cosine 0.9990, 1 of 2 boxes matched, 1 missing, 0 extra; IoU mean 1.0000, least 1.0000; "
        "scores at most 0.0e+00 apart; against the network that was quantised"
    )
    said = known.to_json()["vs_float"]
    assert said["top1_agreement"] is None and said["boxes"]["missing"] == 1


def test_a_failed_check_says_that_boxes_match(tmp_path: Path) -> None:
    found = Boxes.of((200, 160), boxes(ASH), boxes(ASH))
    item = an_image(tmp_path, "a.png", found, relative=1.0)
    failed = result(tmp_path, [item])
    assert not failed.passed
    assert "than the tolerance; all boxes match" in _table(failed).splitlines()[-1]
