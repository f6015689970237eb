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
from netship.runtime_demo import file_names
from netship.targets.errors import UserError
from netship.targets.escapes import counted, listed, shown
from netship.targets.files import read_text

_MOST_BYTES = 64 << 20
_WANTED = (
    "of a detector --labels takes boxes, a JSON file as COCO's instances_val2017.json"
)
_FAR = 1e9
"""Pixels that no photograph has; NaN and infinity are not below it."""


class LabelledImage(NamedTuple):
    """An image as the labels have it: its id, and (width, height) where they say it."""

    number: int
    size: tuple[float, float] | None


class Labels(NamedTuple):
    """Labels of photographs.

    Attributes:
        images: by ``file_name``, which may have folders.
        annotations: by their image's id, COCO's, with ``area`` and ``iscrowd``, and ``place``: which one it is, for errors.
        categories: the category of each class of the network, None where the labels do not have it.
        photographs: which of the images each photograph is.
        notes: what a person should know of them, a line each.
    """

    path: Path
    images: Mapping[str, LabelledImage]
    annotations: Mapping[int, Sequence[dict[str, Any]]]
    categories: Sequence[int | None]
    photographs: Mapping[Path, LabelledImage] = {}
    notes: tuple[str, ...] = ()

    def of_photographs(self, files: Sequence[Path]) -> Labels:
        """These, knowing which image each photograph is; a note says which photographs and images have no partner.

        Raises:
            UserError: no photograph is in the labels, or two are one image.
        """
        names = file_names.entries(files, self.images, str(self.path))
        if not names:
            raise UserError(
                f"{self.path}: has none of the {counted(len(files), 'image')}; give the labels of these images"
            )
        notes = list(self.notes)
        if missing := [each for each in files if each not in names]:
            notes.append(
                f"{self.path}: has no labels of {len(missing):,} of {counted(len(files), 'image')}, the first "
                f"{shown(missing[0].name)}: their boxes are not in the mAP"
            )
        given = set(names.values())
        if left := [each for each in self.images if each not in given]:
            notes.append(
                f"{self.path}: {len(left):,} of its {counted(len(self.images), 'image')} are not given, the first "
                f"{shown(left[0])}: their labels are not in the mAP"
            )
        photographs = {path: self.images[name] for path, name in names.items()}
        return self._replace(photographs=photographs, notes=tuple(notes))

    def check_size(self, photograph: Path, size: tuple[int, int]) -> None:
        """Compare the labels of a photograph with its (width, height).

        Raises:
            UserError: they are of another size, or a box lies outside.
        """
        image = self.photographs.get(photograph)
        if image is None:
            return
        if image.size not in (None, size):
            theirs, own = (
                "×".join(f"{side:g}" for side in each)
                for each in (image.size, size)
                if each
            )
            raise UserError(
                f"{self.path}: image id {image.number}: is {theirs}, but {photograph} has {own} pixels; give the photograph "
                "that was labelled, or correct width, height and boxes"
            )
        for row in self.annotations.get(image.number, ()):
            if _outside(row["bbox"], size):
                raise _outlying(self.path, row["place"], row["bbox"], size)


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
        raise UserError(f"{path}: {error.strerror}; {_WANTED}") from None
    except (ValueError, RecursionError) as error:
        table = path.suffix.lower() in (".csv", ".txt", ".xml", ".yaml")
        why = f"a {path.suffix} file" if table else shown(error, 120)
        raise UserError(f"{path}: not JSON ({why}); {_WANTED}") from None
    tables = {
        key: _rows(path, content, key)
        for key in ("images", "annotations", "categories")
    }
    images: dict[str, LabelledImage] = {}
    for row in tables["images"]:
        name = str(PurePosixPath(row.text("file_name")))
        if name in images:
            raise row.broken(f"{shown(name)!r} is there twice")
        images[name] = LabelledImage(row.integer("id"), row.size())
    categories: dict[int, str] = {}
    for row in tables["categories"]:
        number = row.integer("id")
        if number in categories:
            raise row.broken("another one has this id")
        categories[number] = row.text("name")
    sizes = {each.number: each.size for each in images.values()}
    if len(sizes) < len(images):
        raise UserError(f"{path}: two images have one id; give each its own")
    annotations = [_annotation(row, sizes, categories) for row in tables["annotations"]]
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    by_class = _by_class(path, categories, names, classes, background)
    strange = [each for each in annotations if each["category_id"] not in by_class]
    notes = _beyond(path, annotations, sizes)
    if strange:
        first = shown(categories[strange[0]["category_id"]], 40)
        what = counted(len(strange), "annotation")
        note = f"{path}: {what} of categories that are no class of the network, the first {first!r}: not in the mAP"
        notes = (*notes, note)
    return Labels(path, images, by_image, by_class, notes=notes)


class _Row(NamedTuple):
    """A row of one of the lists, and where it is."""

    path: Path
    key: str
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        own = self.values.get("id")
        named = f" (id {shown(own, 40)})" if isinstance(own, int | str) else ""
        return f"{self.key}[{self.number}]{named}"

    def broken(self, what: str) -> UserError:
        return UserError(f"{self.path}: {self.place}: {what}; correct or remove it")

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >> 62:
            raise self.broken(f"{name} is {shown(value, 40)}, not an integer")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.broken(f"{name} is {shown(value, 40)}, not text")
        return value

    def size(self) -> tuple[float, float] | None:
        """Width and height; None where one is left out."""
        sides = [self.values.get(name) for name in ("width", "height")]
        for name, side in zip(("width", "height"), sides, strict=True):
            if side is not None and not (_is_number(side) and 0 < side < _FAR):
                raise self.broken(
                    f"{name} is {shown(side, 40)}, not a number of pixels"
                )
        width, height = sides
        return None if width is None or height is None else (width, height)


def _is_number(value: Any) -> bool:
    """Whether it is one; Python's booleans are integers, JSON's are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(path: Path, content: Any, key: str) -> list[_Row]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(
            f"{path}: no list {key!r}; labels need images, annotations and categories as COCO has them"
        )
    for index, row in enumerate(found):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}: {key}[{index}]: is not an object; correct or remove it"
            )
    return [_Row(path, key, index, row) for index, row in enumerate(found)]


def _annotation(
    row: _Row,
    sizes: Mapping[int, tuple[float, float] | None],
    categories: Mapping[int, str],
) -> dict[str, Any]:
    image, category = row.integer("image_id"), row.integer("category_id")
    for name, value, allowed in (
        ("image_id", image, sizes),
        ("category_id", category, categories),
    ):
        if value not in allowed:
            raise row.broken(f"{name} {value} is not in it")
    box, size = row.values.get("bbox"), sizes[image]
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(_is_number(v) and abs(v) < _FAR for v in box)
    ):
        raise row.broken(f"bbox is {shown(box, 60)}, not [x, y, width, height]")
    if min(box[2:]) <= 0:
        raise row.broken(
            f"bbox is {shown(box, 60)}: its width and height must be above 0"
        )
    if max(box) <= 1 and min(box) >= 0 and size != (1, 1):
        raise UserError(
            f"{row.path}: {row.place}: bbox is {shown(box, 60)}, in shares of the image; give pixels, as COCO does"
        )
    if size and _outside(box, size):
        raise _outlying(row.path, row.place, box, size)
    crowd = row.values.get("iscrowd")
    if crowd is not None and (not _is_number(crowd) or crowd not in (0, 1)):
        raise row.broken(f"iscrowd is {shown(crowd, 40)}, not 0 or 1")
    return {
        "id": row.number + 1,
        "image_id": image,
        "category_id": category,
        "bbox": [float(value) for value in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(crowd or 0),
        "place": row.place,
    }


def _outside(box: Sequence[float], size: tuple[float, float]) -> bool:
    x, y, width, height = box
    return x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0


def _outlying(
    path: Path, place: str, box: Sequence[float], size: tuple[float, float]
) -> UserError:
    values = ", ".join(f"{value:g}" for value in box)
    return UserError(
        f"{path}: {place}: bbox is [{values}], outside its image of {size[0]:g}×{size[1]:g} pixels; correct or remove it"
    )


def _beyond(
    path: Path,
    annotations: Sequence[dict[str, Any]],
    sizes: Mapping[int, tuple[float, float] | None],
) -> tuple[str, ...]:
    """A note of boxes that lie in part outside, by more than rounding."""
    found = []
    for row in annotations:
        (x, y, width, height), size = row["bbox"], sizes[row["image_id"]]
        if size and (
            min(x, y) < -1 or x + width > size[0] + 1 or y + height > size[1] + 1
        ):
            found.append(row["place"])
    what = counted(len(found), "annotation")
    note = (
        f"{path}: {what} end outside their image, the first {found[0] if found else ''}: taken as they are; "
        "bbox is x, y, width, height"
    )
    return (note,) if found else ()


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


def precision(labels: Labels, found: Sequence[tuple[Path, Detections]]) -> Precision:
    """COCO's mean average precision of the boxes found in photographs, of those and of the classes in the labels."""
    shared = {
        labels.photographs[path].number: boxes
        for path, boxes in found
        if path in labels.photographs
    }
    results = []
    for number, each in shared.items():
        for box, score, kind in zip(each.boxes, each.scores, each.classes, strict=True):
            category = labels.categories[kind]
            x1, y1, x2, y2 = map(float, box)
            if category is None or not all(map(isfinite, (x1, y1, x2, y2, score))):
                continue
            row = {"image_id": number, "category_id": category, "score": float(score)}
            results.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    return _evaluate(labels, sorted(shared), results)


def _evaluate(
    labels: Labels, images: list[int], results: list[dict[str, Any]]
) -> Precision:
    require()
    coco, evaluation = (
        import_module("pycocotools.coco").COCO,
        import_module("pycocotools.cocoeval").COCOeval,
    )
    known = sorted({number for number in labels.categories if number is not None})
    labelled = [row for number in images for row in labels.annotations.get(number, ())]
    dataset = {
        "images": [{"id": each.number} for each in labels.images.values()],
        "categories": [{"id": number} for number in known],
    }
    # pycocotools prints what it does.
    with redirect_stdout(io.StringIO()):
        sides = []
        for rows in (labelled, results):
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
