"""Boxes and masks against the reference's and against labels, and what is drawn of them.

Longer than 450 lines: boxes, labels and masks are judged with the same made answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from netship.bundle import boxes, photos
from netship.bundle.decode import NO_CLASS
from netship.bundle.detections import Detections
from netship.bundle.manifest import Preprocessing
from netship.runtime_demo import coco, drawing, masks
from netship.targets.errors import UserError


def found(*rows: tuple[float, ...], points: int = 0) -> Detections:
    """Rows of x1, y1, x2, y2, score, class."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.float32),
        table[:, 5].astype(np.int32),
        np.zeros((len(table), points, 2), np.float32),
    )


CAT = (10, 10, 30, 30, 0.9, 0)
DOG = (50, 50, 90, 70, 0.8, 1)
NAN = float("nan")


def test_the_same_boxes_match() -> None:
    both = boxes.match(found(CAT, DOG), found(DOG, CAT))
    assert both.same and both.matched == 2
    assert both.to_json() == {
        "matched": 2,
        "missing": 0,
        "extra": 0,
        "invalid": 0,
        "mean_iou": 1.0,
        "least_iou": 1.0,
        "max_score_difference": 0.0,
    }
    assert both.text() == (
        "2 of 2 boxes matched, 0 missing, 0 extra; IoU mean 1.0000, least 1.0000; scores at most 0.0e+00 apart"
    )


@pytest.mark.parametrize(
    ("ours", "reference", "counts"),
    [
        ([], [], (0, 0, 0)),
        ([], [CAT], (0, 1, 0)),
        ([CAT], [], (0, 0, 1)),
        ([CAT], [(*CAT[:5], 1)], (0, 1, 1)),  # another class
        ([(10, 10, 30, 20, 0.9, 0)], [CAT], (1, 0, 0)),  # IoU 0.5
        ([(10, 10, 30, 19, 0.9, 0)], [CAT], (0, 1, 1)),  # IoU 0.45
        ([CAT, CAT], [CAT], (1, 0, 1)),  # one partner each
        ([(5, 5, 5, 9, 0.5, 0)], [(5, 5, 5, 9, 0.5, 0)], (1, 0, 0)),  # no area
        ([(5, 5, 5, 9, 0.5, 0)], [(5, 5, 5, 9.001, 0.5, 0)], (1, 0, 0)),
        ([(5, 5, 5, 9, 0.5, 0)], [(5, 5, 5, 10, 0.5, 0)], (0, 1, 1)),
        ([(0, 0, 0.9, 0.9, 0.5, 0)], [(0.2, 0, 0.9, 0.3, 0.5, 0)], (0, 1, 1)),
        ([(30, 30, 10, 10, 0.9, 0)], [CAT], (0, 1, 1)),  # turned round
        ([(10, 10, 30, 30, NAN, 0)], [CAT], (0, 1, 1)),
        ([CAT], [(10, NAN, 30, 30, 0.9, 0)], (0, 1, 1)),
    ],
)
def test_what_is_missing_and_extra(
    ours: list[Any], reference: list[Any], counts: tuple[int, int, int]
) -> None:
    both = boxes.match(found(*ours), found(*reference))
    assert (both.matched, both.missing, both.extra) == counts
    json.dumps(both.to_json(), allow_nan=False)


def test_the_best_score_chooses_first() -> None:
    near, far = (10, 10, 30, 26, 0.5, 0), (10, 10, 30, 28, 0.6, 0)
    both = boxes.match(found(near, far), found(CAT))
    assert both.ious.tolist() == [pytest.approx(0.9)]
    assert both.score_differences.tolist() == [pytest.approx(0.3)]


def test_what_is_not_finite_is_counted_and_said() -> None:
    both = boxes.match(found(CAT, (0, 0, 1, 1, NAN, 0)), found(CAT))
    assert both.invalid == 1 and both.text().endswith("; 1 not finite")


def test_thousands_of_boxes_match_and_are_drawn_up_to_a_number() -> None:
    random = np.random.Generator(np.random.PCG64(3))
    corners = random.uniform(0, 200, (3000, 2))
    table = np.column_stack([corners, corners + 9, random.random((3000, 1)), random.integers(0, 3, 3000)])  # fmt: skip
    many = found(*table.tolist())
    both = boxes.match(many, many)
    assert both.same and both.matched == 3000
    size = (220, 220)
    best = np.argsort(-many.scores, kind="stable")[: drawing.MOST_BOXES]
    few = Detections(
        many.boxes[best], many.scores[best], many.classes[best], many.points[best]
    )
    image = Image.new("RGB", size)
    drawn = drawing.with_boxes(image, many, [], size)
    assert drawn.tobytes() == drawing.with_boxes(image, few, [], size).tobytes()


def test_no_box_is_an_answer() -> None:
    assert boxes.match(found(), found()).text() == "no box in either answer"


def test_matches_add_up() -> None:
    both = boxes.total(
        [boxes.match(found(CAT), found(CAT, DOG)), boxes.match(found(DOG), found())]
    )
    assert (both.matched, both.missing, both.extra) == (1, 1, 1)


# Labels


def labels(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "val/a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20]},
            {"image_id": 7, "category_id": 5, "bbox": [50, 50, 40, 20]},
        ],
        "categories": [{"id": 1, "name": "Cat"}, {"id": 5, "name": "dog"}],
        **changes,
    }  # fmt: skip


def written(folder: Path, content: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_categories_are_found_by_name_or_by_order(tmp_path: Path) -> None:
    path = written(tmp_path, labels())
    assert coco.read(path, [], 2).categories == [1, 5]
    assert coco.read(path, [], 3, background=0).categories == [None, 1, 5]
    assert coco.read(path, ["bird", "dog", "cat"], 3).categories == [None, 5, 1]
    with pytest.raises(UserError, match=r"none of its categories \(Cat, dog\)"):
        coco.read(path, ["car", "bus"], 2)
    with pytest.raises(UserError, match="2 categories, but the network has 3 classes"):
        coco.read(path, [], 3)


SIZED = {"id": 7, "file_name": "a", "width": 60, "height": 40}
ROW = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "no list 'images'"),
        ({"images": []}, "no list 'annotations'"),
        (labels(images=[3]), r"images\[0\]: is not an object"),
        (labels(images=[{"id": "7", "file_name": "a"}]), r"images\[0\] \(id 7\): id is 7, not"),
        (labels(images=[{"id": 7}]), r"images\[0\] \(id 7\): file_name is None"),
        (labels(images=[{"id": 1, "file_name": "./a"}, {"id": 2, "file_name": "a"}]), r"images\[1\] \(id 2\): 'a' is there twice"),
        (labels(images=[{"id": True, "file_name": "a"}]), "id is True, not an integer"),
        (labels(images=[{"id": 7, "file_name": "a", "width": "9"}]), "width is 9, not a number of pixels"),
        (labels(images=[{"id": 7, "file_name": "a", "height": True}]), "height is True, not"),
        (labels(images=[SIZED], annotations=[ROW | {"id": 5, "bbox": [60, 2, 3, 4]}]), r"annotations\[0\] \(id 5\): bbox is \[60, 2, 3, 4\], outside its image of 60×40"),
        (labels(annotations=[ROW | {"id": 5, "bbox": [0.1, 0.2, 0.3, 0.4]}]), r"\(id 5\): bbox is .*, in shares of the image; give pixels"),
        (labels(annotations=[ROW | {"id": 5, "bbox": [1, 2, 0, 4]}]), r"\(id 5\): bbox is .* must be above 0; correct or remove"),
        (labels(annotations=[ROW | {"bbox": [1, 2, True, 4]}]), r"bbox is \[1, 2, True, 4\], not \[x, y"),
        (labels(annotations=[ROW | {"iscrowd": True}]), "iscrowd is True, not 0 or 1"),
        (labels(annotations=[ROW | {"category_id": True}]), "category_id is True, not an integer"),
        (labels(categories=[{"id": 1, "name": 4}]), r"categories\[0\] \(id 1\): name is 4"),
        (labels(annotations=[ROW, ROW | {"image_id": 8}]), r"annotations\[1\]: image_id 8 is not"),
        (labels(annotations=[ROW | {"category_id": 2}]), "category_id 2 is not"),
        (labels(annotations=[ROW | {"bbox": [1, 2, 3]}]), r"bbox is \[1, 2, 3\], not"),
        (labels(annotations=[ROW | {"bbox": [1, 2, -3, 4]}]), "bbox is"),
        (labels(annotations=[ROW | {"bbox": [1, 2, "3", 4]}]), "bbox is"),
        (labels(annotations=[ROW | {"bbox": [1, 2, NAN, 4]}]), "bbox is"),
        (labels(annotations=[ROW | {"bbox": [1, 2, 10**400, 4]}]), "bbox is"),
        (labels(annotations=[ROW | {"bbox": [1, 2, 3, float("inf")]}]), "bbox is"),
        (labels(annotations=[{"bbox": "\x1b[31m"}]), "image_id is None"),
    ],
)  # fmt: skip
def test_broken_labels_are_refused_in_one_line(
    tmp_path: Path, content: Any, says: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=says) as error:
        coco.read(path, [], 2)
    assert "\n" not in str(error.value) and "instances.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not JSON") as error:
        coco.read(path, [], 2)
    assert len(str(error.value)) < 400
    with pytest.raises(UserError, match="No such file"):
        coco.read(tmp_path / "nowhere.json", [], 2)


def test_without_pycocotools_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        coco.require()


def test_precision_is_cocos(tmp_path: Path) -> None:
    a, b = Path("photos/a.jpg"), Path("photos/b.jpg")
    known = coco.read(written(tmp_path, labels()), ["cat", "dog"], 2).of_photographs(
        [a, b]
    )
    half = (50, 50, 90, 62, 0.8, 1)  # IoU 0.6: right at 0.5, 0.55 and 0.6 of ten
    right = coco.precision(known, [(a, found(CAT, DOG))])
    assert np.allclose(np.array(right, float), 1)
    mixed = coco.precision(known, [(a, found(CAT, half)), (Path("c.jpg"), found(CAT))])
    assert np.allclose(np.array(mixed, float), (1, (1 + 0.3) / 2))
    assert coco.precision(known, [(a, found())]) == (0.0, 0.0)
    assert coco.precision(known, [(b, found(CAT))]) == (None, None)
    odd = (10, 10, 30, 30, NAN, 0)
    assert coco.precision(known, [(a, found(odd))]) == (0.0, 0.0)
    assert coco.precision(known, []) == (None, None)


def test_photographs_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path,
) -> None:
    names = ("one/a.jpg", "two/a.jpg", "deep/er/b.jpg")
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    rows = [{"image_id": 0, "category_id": 1, "bbox": [10, 10, 20, 20]}]
    path = written(tmp_path, labels(images=images, annotations=rows))
    read = coco.read(path, ["cat", "dog"], 2)
    one, two, b = tmp_path / "one/a.jpg", tmp_path / "two/a.jpg", tmp_path / "b.jpg"
    known = read.of_photographs([two, one, b])
    assert {each: k.number for each, k in known.photographs.items()} == {
        two: 1,
        one: 0,
        b: 2,
    }
    assert coco.precision(known, [(one, found(CAT)), (two, found())]) == pytest.approx(
        (1, 1)
    )
    assert coco.precision(known, [(one, found()), (two, found(CAT))]) == (0, 0)
    # Which of the two it is cannot be known.
    other = read.of_photographs([one, tmp_path / "a.jpg"])
    assert list(other.photographs) == [one]
    plain = coco.read(written(tmp_path, labels()), [], 2)
    with pytest.raises(UserError, match=r"'val/a.jpg' can be .*one/a.jpg or .*two/a.jpg; name it there with its folder"):  # fmt: skip
        plain.of_photographs([one, two])


def test_what_has_no_partner_in_the_labels_is_said(tmp_path: Path) -> None:
    read = coco.read(written(tmp_path, labels()), [], 2)
    assert read.of_photographs([Path("a.jpg"), Path("b.jpg")]).notes == ()
    more, fewer = read.of_photographs([Path("c.jpg"), Path("a.jpg"), Path("d.jpg")]).notes  # fmt: skip
    assert "has no labels of 2 of 3 images, the first c.jpg: their boxes" in more
    assert "1 of its 2 images are not given, the first b.jpg: their labels" in fewer
    with pytest.raises(UserError, match="has none of the 1 image"):
        read.of_photographs([Path("c.jpg")])


def test_a_box_that_ends_outside_its_image_is_said(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}]
    rows = [ROW | {"bbox": [40, 0, 20.5, 9]}, ROW | {"id": 31, "bbox": [50, 0, 20, 9]}]
    path = written(tmp_path, labels(images=images, annotations=rows))
    (note,) = coco.read(path, [], 2).notes
    assert "1 annotation end outside their image, the first annotations[1] (id 31)" in note  # fmt: skip


def test_categories_that_are_no_class_are_said(tmp_path: Path) -> None:
    path = written(tmp_path, labels())
    assert coco.read(path, ["dog", "cat"], 2).notes == ()
    (note,) = coco.read(path, ["cat", "cow"], 2).notes
    assert note.endswith("1 annotation of categories that are no class of the network, the first 'dog': not in the mAP")  # fmt: skip


def test_a_table_is_no_labels_of_a_detector(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("file,class_index\na.jpg,1\n")
    with pytest.raises(UserError, match=r"labels.csv: not JSON \(a .csv file\); of a detector --labels takes boxes, a JSON file as COCO's"):  # fmt: skip
        coco.read(path, [], 2)


def test_each_photograph_has_its_own_mask(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("a.png", "two/a.png"):
        (tmp_path / name).touch()
    one, two = Path("one/a.jpg"), Path("two/a.jpg")
    assert masks.of_photographs(tmp_path, [one, two]) == {
        one: tmp_path / "a.png",
        two: tmp_path / "two/a.png",
    }
    with pytest.raises(UserError, match=r"a.png: can be the mask of one/a.jpg or three/a.jpg; give each its own .* such as .*one/a.png"):  # fmt: skip
        masks.of_photographs(tmp_path, [one, Path("three/a.jpg")])


def test_masks_of_no_photograph_are_said(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a", "one/a", "one/b", "other/c", "d"):
        (tmp_path / f"{name}.png").touch()
    files = masks.of_photographs(tmp_path, [Path("one/a.jpg"), Path("e.jpg")])
    said = masks.without_photograph(tmp_path, files)
    assert said == (f"{tmp_path}: 3 masks are of no image given, the first a.png: not compared",)  # fmt: skip
    # A photograph next to its mask is none.
    inside = [tmp_path / f"{name}.png" for name in ("a", "d")]
    files = masks.of_photographs(tmp_path / "one", inside)
    (tmp_path / "one/d.png").touch()
    said = masks.without_photograph(tmp_path / "one", files)
    assert said == (f"{tmp_path / 'one'}: 1 mask is of no image given, the first b.png: not compared",)  # fmt: skip
    assert masks.without_photograph(tmp_path / "other", {Path("c.jpg"): tmp_path / "other/c.png"}) == ()  # fmt: skip


# Masks


def test_masks_agree_by_pixel_and_by_class() -> None:
    ours = np.array([[0, 0, 1], [1, 1, 2]])
    reference = np.array([[0, 0, 1], [1, 0, 255]])
    plain = masks.agree(ours, reference)
    assert (plain.same, plain.pixels) == (4, 6)
    without = masks.agree(ours, reference, masks.VOID)
    assert without.pixels == 5
    assert without.mean_iou == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert without.text() == "80.00% of pixels, mIoU 0.6667"
    both = masks.total([without, masks.agree(ours, ours)])
    assert (both.same, both.pixels) == (10, 11)
    assert both.mean_iou == pytest.approx((4 / 5 + 5 / 6 + 1) / 3)
    assert both.classes() == "1: 0.8333, 0: 0.8000, 2: 1.0000"
    named = both.classes(["ground", "a bird\x1b[2J"])
    assert (
        named == "a bird\N{REPLACEMENT CHARACTER}[2J: 0.8333, ground: 0.8000, 2: 1.0000"
    )
    assert both.to_json()["iou"] == {
        "1": pytest.approx(5 / 6),
        "0": pytest.approx(4 / 5),
        "2": 1.0,
    }
    many = np.arange(9).reshape(3, 3)
    assert masks.agree(many, many).classes().endswith("5: 1.0000 and 3 more")


def test_nearly_all_pixels_are_not_all() -> None:
    ours = np.zeros((1000, 1000), int)
    assert masks.agree(ours, ours).text() == "100% of pixels, mIoU 1"
    reference = ours.copy()
    reference[0, 0] = 1
    text = masks.agree(ours, reference).text()
    assert text == "99.99% of pixels, mIoU 0.5000"


def test_numbers_that_are_no_classes_take_no_memory() -> None:
    odd = np.array([[2**31 - 1, 2**30], [-5, 1]], np.int32)
    both = masks.agree(odd, odd)
    assert (both.same, both.pixels, both.mean_iou) == (3, 3, 1)
    assert len(both.unions) < 1 << 17
    drawing.with_mask(Image.new("RGB", (2, 2)), odd)


def test_without_a_pixel_nothing_is_claimed() -> None:
    void = np.full((2, 2), masks.VOID)
    nothing = masks.agree(np.zeros((2, 2), int), void, masks.VOID)
    assert nothing.to_json() == {
        "pixel_agreement": None,
        "mean_iou": None,
        "iou": {},
        "without_class": 0,
        "reference_without_class": 0,
    }
    assert nothing.text() == "no pixel to compare"


@pytest.mark.parametrize(
    ("fit", "resize", "expected"),
    [
        ("stretch", (4, 4), [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]),
        ("letterbox", (4, 4), [[1, 1, 1, 2, 2, 2]] * 2),
        ("crop", 4, [[-1, -1, 1, 2, -1, -1], [-1, -1, 3, 4, -1, -1]]),
    ],
)
def test_a_mask_lies_on_the_photograph_as_the_photograph_in_the_input(
    fit: Any, resize: Any, expected: list[list[int]]
) -> None:
    how = Preprocessing(fit=fit, resize=resize, crop=(4, 4), scale=1, mean=(0,), std=(1,))  # fmt: skip
    size = (60, 20)
    mask = np.array([[1, 2], [3, 4]], np.uint8)
    place = photos.placement(size, how)
    found = masks.on_photograph(mask, place, (4, 4), size, (6, 2))
    assert found.tolist() == expected
    whole = masks.on_photograph(mask, place, (4, 4), size, size)
    assert whole.shape == (20, 60) and whole[-1, 31] == expected[-1][3]


def test_what_the_network_did_not_see_does_not_count() -> None:
    seen = masks.agree(np.array([[-1, 2]]), np.array([[1, 2]]), masks.VOID)
    assert (seen.same, seen.pixels) == (1, 1)


def test_a_pixel_without_a_class_is_wrong_unless_both_have_none() -> None:
    none = NO_CLASS
    ours, reference = np.array([[none, none, 1, 1]]), np.array([[none, 1, none, 1]])
    both = masks.agree(ours, reference)
    assert (both.same, both.pixels, both.without) == (1, 3, (2, 2, 1))
    assert both.all == 4 and both.by_class == {1: pytest.approx(1 / 3)}
    assert both.unanswered() == "; without a class, such as of NaN: 2 pixels of ours, 2 of the reference's"  # fmt: skip
    whole = masks.total([both, both])
    assert whole.without == (4, 4, 2)
    assert whole.to_json()["reference_without_class"] == 4
    # By a given mask a network that says nothing is not right.
    known = masks.agree(ours, np.array([[masks.VOID, 1, 1, 1]]), masks.VOID)
    assert (known.same, known.pixels, known.void) == (2, 3, 1)
    nothing = masks.agree(ours[:, :1], ours[:, :1])
    assert nothing.text() == "no pixel to compare"
    assert not masks.agree(reference[:, 3:], ours[:, 3:]).unanswered()


def test_a_given_mask_is_read_and_another_refused(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    for mode in ("L", "P"):
        Image.fromarray(values).save(tmp_path / "a.png")
        if mode == "P":
            image = Image.frombytes("P", (2, 2), values.tobytes())
            image.putpalette([0] * 768)
            image.save(tmp_path / "a.png")
        assert masks.read(tmp_path / "a.png", (2, 2)).tolist() == values.tolist()
    with pytest.raises(UserError, match="has 2×2 pixels, its image 3×2"):
        masks.read(tmp_path / "a.png", (3, 2))
    with pytest.raises(UserError, match="no such mask"):
        masks.read(tmp_path / "b.png", (2, 2))
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png")
    with pytest.raises(UserError, match="RGB has no class numbers"):
        masks.read(tmp_path / "c.png", (2, 2))
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(UserError, match="not a PNG"):
        masks.read(tmp_path / "d.png", (2, 2))


# Drawings


def test_a_box_is_drawn_where_it_is_also_in_a_smaller_copy() -> None:
    photograph = Image.new("RGB", (800, 400))
    box = found((100, 200, 400, 300, 0.9, 0))
    for image in (photograph, drawing.fitted(photograph, 400)):
        marked = np.asarray(drawing.with_boxes(image, box, ["cat"], (800, 400)))
        half = image.width // 400
        colour = (43, 255, 38)
        assert tuple(marked[125 * half, 50 * half]) == colour
        assert tuple(marked[150 * half, 100 * half]) == colour
        assert tuple(marked[125 * half, 100 * half]) == (0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (8000, 100), (100, 8000), (3, 500)])
@pytest.mark.parametrize("boxed", [True, False])
def test_any_photograph_can_be_drawn_into(size: tuple[int, int], boxed: bool) -> None:
    width, height = size
    rows = [(0, 0, width, height, 0.5, 3), (NAN, 0, 1, 1, 0.9, 0), (2, 2, 1, 1, NAN, 300)]  # fmt: skip
    named = ["\x1b[31m" + "é" * 300, "", "<b>", "\u202eabc"]
    image = Image.new("RGB", size)
    marked = drawing.with_boxes(image, found(*rows if boxed else (), points=5), named, size)  # fmt: skip
    assert marked.size == size
    mask = np.full(size[::-1], 300)
    assert drawing.with_mask(image, mask).size == size
    assert max(drawing.fitted(image, 480).size) == 480


def test_classes_have_pascal_voc_s_colours() -> None:
    """VOCdevkit: background, aeroplane, bicycle, bird, boat and potted plant."""
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [drawing.class_colour(k) for k in range(5)] == known
    assert drawing.class_colour(16) == (0, 64, 0)
    mask = np.array([[0, 1], [-1, 257]])
    marked = np.asarray(drawing.with_mask(Image.new("RGB", (2, 2), "white"), mask))
    assert marked[0].tolist() == [[127] * 3, [191, 127, 127]]
    assert marked[1].tolist() == [[255] * 3, [191, 127, 127]]
