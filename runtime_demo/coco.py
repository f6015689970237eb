"""The mean average precision of boxes by labels in COCO's JSON, counted by pycocotools."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from netship.bundle.detections import Detections
from netship.targets.errors import UserError
from netship.targets.escapes import counted, listed, shown
from netship.targets.files import read_text

_MOST_BYTES = 64 << 20
_FAR = 1e9
"""Pixels that no photograph has; NaN and infinity are not below it."""


class Labels(NamedTuple):
    """Labels of photographs.

    Attributes:
        images: the numbers of the photographs by their files' names.
        annotations: COCO's, with ``area`` and ``iscrowd``.
        categories: the category of each class of the network, None where the labels do not have it.
    """

    path: Path
    images: Mapping[str, int]
    annotations: Sequence[dict[str, Any]]
    categories: Sequence[int | None]


class Precision(NamedTuple):
    """Mean average precision at IoU 0.5, and over IoU 0.5 to 0.95; None where the photographs have no label."""

    at_50: float | None
    at_50_95: float | None

    def text(self) -> str:
        """Such as ``mAP@0.5 0.512, mAP@0.5:0.95 0.310``."""
        if self.at_50 is None or self.at_50_95 is None:
            return "no label to compare with"
        return f"mAP@0.5 {self.at_50:.3f}, mAP@0.5:0.95 {self.at_50_95:.3f}"


def require() -> None:
    """Refuse early where pycocotools is missing."""
    try:
        import_module("pycocotools.cocoeval")
    except ImportError:
        raise UserError(
            "--labels: needs pycocotools, which counts as COCO does; install it with `pip install pycocotools`"
        ) from None


def read(
    path: Path, names: Sequence[str], classes: int, background: int | None = None
) -> Labels:
    """Read a JSON with ``images``, ``annotations`` and ``categories``.

    Args:
        names: of the network's classes. Categories are found by them; without names the classes but the
            ``background`` are the categories in the order of their ids.
        classes: how many the network has.

    Raises:
        UserError: it is no such JSON, a row of it is broken, or its categories are not the classes.
    """
    try:
        content = json.loads(read_text(path, _MOST_BYTES))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --labels takes a JSON file as COCO's instances_val2017.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON ({shown(error, 120)}); --labels takes labels as COCO has them"
        ) from None
    rows = {
        key: _rows(path, content, key)
        for key in ("images", "annotations", "categories")
    }
    images: dict[str, int] = {}
    for index, row in enumerate(rows["images"]):
        name = PurePosixPath(_text(path, "images", index, row, "file_name")).name
        if name in images:
            raise _broken(path, "images", index, f"{shown(name)!r} is there twice")
        images[name] = _integer(path, "images", index, row, "id")
    categories: dict[int, str] = {}
    for index, row in enumerate(rows["categories"]):
        number = _integer(path, "categories", index, row, "id")
        if number in categories:
            raise _broken(path, "categories", index, f"id {number} is there twice")
        categories[number] = _text(path, "categories", index, row, "name")
    known = set(images.values())
    if len(known) < len(images):
        raise UserError(f"{path}: two images have one id; give each its own")
    annotations = [
        _annotation(path, index, row, known, categories)
        for index, row in enumerate(rows["annotations"])
    ]
    return Labels(
        path,
        images,
        annotations,
        _by_class(path, categories, names, classes, background),
    )


def _rows(path: Path, content: Any, key: str) -> list[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(
            f"{path}: no list {key!r}; labels need images, annotations and categories as COCO has them"
        )
    for index, row in enumerate(found):
        if not isinstance(row, dict):
            raise _broken(path, key, index, "is not an object")
    return found


def _broken(path: Path, key: str, index: int, what: str) -> UserError:
    return UserError(f"{path}: {key}[{index}]: {what}; correct or remove it")


def _integer(path: Path, key: str, index: int, row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, int) or abs(value) >= 1 << 62:
        raise _broken(path, key, index, f"{name} is {shown(value, 40)}, not an integer")
    return value


def _text(path: Path, key: str, index: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _broken(path, key, index, f"{name} is {shown(value, 40)}, not text")
    return value


def _annotation(
    path: Path,
    index: int,
    row: dict[str, Any],
    images: set[int],
    categories: Mapping[int, str],
) -> dict[str, Any]:
    image = _integer(path, "annotations", index, row, "image_id")
    category = _integer(path, "annotations", index, row, "category_id")
    for name, value, allowed in (
        ("image_id", image, images),
        ("category_id", category, categories),
    ):
        if value not in allowed:
            raise _broken(path, "annotations", index, f"{name} {value} is not in it")
    box = row.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, int | float) and abs(v) < _FAR for v in box)
        or min(box[2:]) < 0
    ):
        what = f"bbox is {shown(box, 60)}, not [x, y, width, height]"
        raise _broken(path, "annotations", index, what)
    crowd = row.get("iscrowd") or 0
    if crowd not in (0, 1):
        what = f"iscrowd is {shown(crowd, 40)}, not 0 or 1"
        raise _broken(path, "annotations", index, what)
    return {
        "id": index + 1,
        "image_id": image,
        "category_id": category,
        "bbox": [float(value) for value in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(crowd),
    }


def _by_class(
    path: Path,
    categories: Mapping[int, str],
    names: Sequence[str],
    classes: int,
    background: int | None,
) -> Sequence[int | None]:
    if not names:
        objects = [number for number in range(classes) if number != background]
        if len(objects) != len(categories):
            raise UserError(
                f"{path}: {len(categories)} categories, but the network has {counted(len(objects), 'class')}; build it with "
                "--labels NAMES.txt, by which they are found"
            )
        in_order = dict(zip(objects, sorted(categories), strict=True))
        return [in_order.get(number) for number in range(classes)]
    ids = {name.strip().casefold(): number for number, name in categories.items()}
    if len(ids) < len(categories):
        raise UserError(f"{path}: two categories have one name; give each its own")
    found = [ids.get(name.strip().casefold()) for name in names]
    if all(number is None for number in found):
        theirs = listed([shown(name, 20) for name in categories.values()], 3)
        ours = listed([shown(name, 20) for name in names], 3)
        raise UserError(
            f"{path}: none of its categories ({theirs}) is a class of the network ({ours}); give its own labels"
        )
    return found


def precision(labels: Labels, found: Mapping[str, Detections]) -> Precision:
    """COCO's mean average precision of the boxes found in photographs, by file name; of the classes in the labels.

    Raises:
        UserError: no photograph is in the labels.
    """
    shared = {name: labels.images[name] for name in found if name in labels.images}
    if not shared:
        raise UserError(
            f"{labels.path}: has none of the {counted(len(found), 'image')}; give the labels of these images"
        )
    results = []
    for name, number in shared.items():
        each = found[name]
        for box, score, kind in zip(each.boxes, each.scores, each.classes, strict=True):
            category = labels.categories[kind]
            x1, y1, x2, y2 = map(float, box)
            if category is None or not all(map(isfinite, (x1, y1, x2, y2, score))):
                continue
            row = {"image_id": number, "category_id": category, "score": float(score)}
            results.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    return _evaluate(labels, sorted(shared.values()), results)


def _evaluate(
    labels: Labels, images: list[int], results: list[dict[str, Any]]
) -> Precision:
    require()
    coco, evaluation = (
        import_module("pycocotools.coco").COCO,
        import_module("pycocotools.cocoeval").COCOeval,
    )
    known = sorted({number for number in labels.categories if number is not None})
    dataset = {
        "images": [{"id": number} for number in labels.images.values()],
        "categories": [{"id": number} for number in known],
    }
    # pycocotools prints what it does.
    with redirect_stdout(io.StringIO()):
        sides = []
        for rows in (labels.annotations, results):
            side = coco()
            side.dataset = dataset | {"annotations": _numbered(rows)}
            side.createIndex()
            sides.append(side)
        judge = evaluation(*sides, "bbox")
        judge.params.imgIds, judge.params.catIds = images, known
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    mean, at_50 = (float(value) for value in judge.stats[:2])
    return Precision(None if at_50 < 0 else at_50, None if mean < 0 else mean)


def _numbered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row, "id": number}
        for number, row in enumerate(rows, 1)
    ]
