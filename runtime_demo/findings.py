"""What a detector or a segmenting network found in a photograph, ours and the reference's answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image

from netship.bundle import boxes, decode, photos
from netship.bundle.boxes import Match
from netship.bundle.detections import Detections, on_photograph
from netship.bundle.manifest import Manifest
from netship.bundle.photos import Placement
from netship.bundle.store import Bundle
from netship.bundle.task import Task
from netship.runtime_demo import coco, drawing, masks
from netship.runtime_demo.coco import Labels, Precision
from netship.runtime_demo.masks import Agreement, Mask
from netship.targets.errors import UserError

Outputs = Sequence[NDArray[Any]]

# COCO counts the 100 best boxes of a photograph, also those of low scores.
_RANKED_SCORE, _RANKED_BOXES = 0.01, 100


class Geometry(NamedTuple):
    """Sizes (width, height) of a photograph and of the network's input, and where the one lies in the other."""

    size: tuple[int, int]
    network: tuple[int, int]
    place: Placement

    @classmethod
    def of(cls, manifest: Manifest, size: tuple[int, int] | None) -> Geometry:
        """Of a photograph of this size; of the input itself where there is none."""
        height, width = (manifest.image or manifest.inputs[0]).size
        if size is None or manifest.preprocessing is None:
            return cls((width, height), (width, height), Placement(1, 1, 0, 0))
        place = photos.placement(size, manifest.preprocessing)
        return cls(size, (width, height), place)

    def boxes(self, task: Task, outputs: Outputs) -> Detections:
        """The boxes that outputs mean, in pixels of the photograph."""
        found = decode.decode(task, outputs, self.network[::-1])
        return on_photograph(found, self.place, self.size)


class Boxes(NamedTuple):
    """Boxes of a photograph of ``size`` (width, height) by both networks.

    Attributes:
        ranked: of both, boxes of low scores too, by which precision is counted; None where there are no labels.
    """

    size: tuple[int, int]
    ours: Detections
    reference: Detections
    match: Match
    ranked: tuple[Detections, Detections] | None = None

    @classmethod
    def of(
        cls, size: tuple[int, int], ours: Detections, reference: Detections
    ) -> Boxes:
        return cls(size, ours, reference, boxes.match(ours, reference))

    @property
    def same(self) -> bool:
        return self.match.same

    def text(self) -> str:
        return self.match.text()

    def to_json(self) -> dict[str, Any]:
        return {
            "boxes": self.match.to_json(),
            "ours_boxes": len(self.ours.scores),
            "reference_boxes": len(self.reference.scores),
        }

    def draw(
        self, image: Image.Image, names: Sequence[str]
    ) -> tuple[Image.Image, Image.Image]:
        """Both answers in a copy of the photograph."""
        return (
            drawing.with_boxes(image, self.ours, names, self.size),
            drawing.with_boxes(image, self.reference, names, self.size),
        )


class Masks(NamedTuple):
    """Classes of pixels by both networks [height, width], over the whole input of the network.

    Attributes:
        given: of both against the given mask of the photograph.
    """

    geometry: Geometry
    ours: Mask
    reference: Mask
    agreement: Agreement
    given: tuple[Agreement, Agreement] | None = None

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        both: tuple[Mask, Mask],
        path: Path | None = None,
        classes: int | None = None,
    ) -> Masks:
        """Compare both with each other, and with the mask of the photograph where there is a ``path``.

        Raises:
            UserError: as `masks.read`.
        """
        agreement = masks.agree(*both)
        if path is None:
            return cls(geometry, *both, agreement)
        size = geometry.size
        known = masks.read(path, size, classes)
        ours, reference = (
            masks.agree(
                masks.on_photograph(each, geometry.place, geometry.network, size, size),
                known,
                masks.VOID,
            )
            for each in both
        )
        return cls(geometry, *both, agreement, (ours, reference))

    @property
    def same(self) -> bool:
        return self.agreement.same == self.agreement.pixels

    def text(self) -> str:
        return f"same class in {self.agreement.text()}{self.agreement.unanswered()}"

    def to_json(self) -> dict[str, Any]:
        given = None
        if self.given:
            given = {
                "ours": self.given[0].to_json(),
                "reference": self.given[1].to_json(),
            }
        return {"mask": self.agreement.to_json(), "given_mask": given}

    def draw(
        self, image: Image.Image, names: Sequence[str]
    ) -> tuple[Image.Image, Image.Image]:
        """Both answers over a copy of the photograph."""
        del names
        return (
            _covered(image, self.geometry, self.ours),
            _covered(image, self.geometry, self.reference),
        )


class Given(NamedTuple):
    """What the user knows of the photographs.

    Attributes:
        labels: of boxes.
        masks: the file of the mask of each; ``classes``: how many these can have, None where it is not known.
        notes: what a person should know of them, a line each.
    """

    labels: Labels | None = None
    masks: Mapping[Path, Path] = {}
    classes: int | None = None
    notes: tuple[str, ...] = ()


class Photograph(NamedTuple):
    """An input's file and the (width, height) of the photograph; None where it is an array or golden data."""

    path: Path | None
    size: tuple[int, int] | None


def segment(task: Task, outputs: Outputs) -> Mask:
    """The class of each pixel [height, width], also where one of the sides is 1."""
    found = decode.segment(task, outputs)
    return found if found.ndim == 2 else found.reshape(1, -1)


def find(
    manifest: Manifest,
    photograph: Photograph,
    ours: Outputs,
    reference: Outputs,
    given: Given,
) -> Boxes | Masks | None:
    """What both networks found; None where the task is neither detection nor segmentation.

    Raises:
        UserError: as `masks.read` and `Labels.check_size`.
    """
    task = manifest.task
    judged = task is not None and task.kind in ("detect", "segment")
    if task is None or not judged or manifest.image is None:
        return None
    geometry = Geometry.of(manifest, photograph.size)
    if task.kind == "segment":
        both = segment(task, ours), segment(task, reference)
        mask = given.masks.get(photograph.path) if photograph.path else None
        return Masks.of(geometry, both, mask, given.classes)
    pair = geometry.boxes(task, ours), geometry.boxes(task, reference)
    found = Boxes.of(geometry.size, *pair)
    if not given.labels or not task.detector:
        return found
    if photograph.path and photograph.size:
        given.labels.check_size(photograph.path, photograph.size)
    detector = task.detector
    low = {
        "score_threshold": min(detector.score_threshold, _RANKED_SCORE),
        "most": max(detector.most, _RANKED_BOXES),
    }
    ranked = task.model_copy(update={"detector": detector.model_copy(update=low)})
    pair = geometry.boxes(ranked, ours), geometry.boxes(ranked, reference)
    return found._replace(ranked=pair)


def marked(
    bundle: Bundle, photograph: Photograph, outputs: Outputs, title: str
) -> Image.Image:
    """A copy of the photograph with what one network found: boxes, a mask, or the ``title`` of a class.

    Raises:
        UserError: there is no photograph, or the task has nothing to draw.
    """
    if photograph.path is None or photograph.size is None:
        raise UserError(
            f"--save: {photograph.path} is no photograph; give an image, or leave it out"
        )
    task = bundle.manifest.task
    image = photos.read(photograph.path).image
    geometry = Geometry.of(bundle.manifest, photograph.size)
    if task is not None and task.kind == "detect":
        found = geometry.boxes(task, outputs)
        return drawing.with_boxes(image, found, bundle.labels(), image.size)
    if task is not None and task.kind == "segment":
        return _covered(image, geometry, segment(task, outputs))
    return drawing.with_title(image, title)


def _covered(image: Image.Image, geometry: Geometry, mask: Mask) -> Image.Image:
    placed = masks.on_photograph(
        mask, geometry.place, geometry.network, geometry.size, image.size
    )
    return drawing.with_mask(image, placed)


class Findings(NamedTuple):
    """Of all photographs of a check; None where the network does not answer so, or nothing was given.

    Attributes:
        precision: of our boxes and of the reference's, by given labels.
        given: of our masks and of the reference's, against given ones.
    """

    boxes: Match | None = None
    precision: tuple[Precision, Precision] | None = None
    masks: Agreement | None = None
    given: tuple[Agreement, Agreement] | None = None

    def lines(self, names: Sequence[str]) -> list[str]:
        """For the table; ``names`` are those of the classes."""
        rows = []
        if self.boxes:
            rows.append(f"boxes      {self.boxes.text()}")
        if self.precision:
            ours, reference = (each.text() for each in self.precision)
            rows.append(f"labels     {ours}; the reference {reference}")
        if self.masks:
            rows.append(
                f"masks      same class in {self.masks.text()}{self.masks.unanswered()}"
            )
        if self.given:
            ours, reference = (each.text() for each in self.given)
            rows.append(
                f"           right by --masks: {ours}; the reference {reference}"
            )
            if self.given[0].pixels:
                rows.append(f"           IoU by class: {self.given[0].classes(names)}")
            if left := self.given[0].left_out():
                rows.append(f"           {left}")
        return rows

    def to_json(self) -> dict[str, Any]:
        def both(pair: Any, values: Any) -> dict[str, Any] | None:
            names = ("ours", "reference")
            return dict(zip(names, map(values, pair), strict=True)) if pair else None

        return {
            "boxes": self.boxes.to_json() if self.boxes else None,
            "precision": both(self.precision, lambda each: each._asdict()),
            "masks": self.masks.to_json() if self.masks else None,
            "given_masks": both(self.given, lambda each: each.to_json()),
            "given_void": self.given[0].void / self.given[0].all
            if self.given and self.given[0].all
            else None,
        }


def summary(
    found: Sequence[tuple[Path | None, Boxes | Masks]], given: Given
) -> Findings:
    """All photographs, each with its file, as one."""
    box = [each for _, each in found if isinstance(each, Boxes)]
    mask = [each for _, each in found if isinstance(each, Masks)]
    judged = [each.given for each in mask if each.given]
    precision = None
    if given.labels:
        ranked = [
            (path, each.ranked)
            for path, each in found
            if path and isinstance(each, Boxes) and each.ranked
        ]
        precision = (
            coco.precision(given.labels, [(path, pair[0]) for path, pair in ranked]),
            coco.precision(given.labels, [(path, pair[1]) for path, pair in ranked]),
        )
    return Findings(
        boxes.total([each.match for each in box]) if box else None,
        precision,
        masks.total([each.agreement for each in mask]) if mask else None,
        (
            masks.total([pair[0] for pair in judged]),
            masks.total([pair[1] for pair in judged]),
        )
        if judged
        else None,
    )
