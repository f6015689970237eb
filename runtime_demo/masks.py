"""Maps of one class a pixel against the reference's, and against given ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from netship.bundle.decode import MOST_CLASSES, NO_CLASS, map_on_photograph
from netship.bundle.photos import MAX_PIXELS, Placement
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import counted, shown

Mask = NDArray[np.integer]
VOID = 255
"""What a given mask has where no class is known, as Pascal VOC has it; such pixels do not count."""
_MOST_NAMED = 6


class Agreement(NamedTuple):
    """Of two maps, counts of pixels.

    Attributes:
        same, pixels: those of one class in both, and all.
        intersections, unions: of each class [classes].
        void, unseen: pixels that do not count: void in the reference, and outside what the network saw.
        without: pixels that ours gives no class, the reference, and both. Those of both do not count, those of one of
            them are wrong.
    """

    same: int
    pixels: int
    intersections: NDArray[np.int64]
    unions: NDArray[np.int64]
    void: int = 0
    unseen: int = 0
    without: tuple[int, int, int] = (0, 0, 0)

    @property
    def all(self) -> int:
        """Pixels, with those that do not count."""
        return self.pixels + self.void + self.unseen + self.without[2]

    def left_out(self) -> str:
        """The pixels that do not count, such as ``not counted: 5.1% of pixels are void (255)``; empty without any."""
        parts = (
            (self.void, f"are void ({VOID})"),
            (self.unseen, "are outside what the network sees"),
        )
        said = [
            f"{count / self.all:.1%} of pixels {what}" for count, what in parts if count
        ]
        return f"not counted: {', '.join(said)}" if said else ""

    @property
    def share(self) -> float | None:
        """Of the pixels with the same class; None without pixels."""
        return self.same / self.pixels if self.pixels else None

    @property
    def mean_iou(self) -> float | None:
        """The mean of intersection ÷ union of the classes that one of the two has."""
        found = self.by_class.values()
        return fmean(found) if found else None

    @property
    def by_class(self) -> dict[int, float]:
        """Intersection ÷ union of each class that one of the two has, the largest union first."""
        order = np.argsort(-self.unions, kind="stable").tolist()
        return {
            each: float(self.intersections[each] / self.unions[each])
            for each in order
            if self.unions[each]
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "pixel_agreement": self.share,
            "mean_iou": self.mean_iou,
            "iou": {str(number): iou for number, iou in self.by_class.items()},
            "without_class": self.without[0],
            "reference_without_class": self.without[1],
        }

    def classes(self, names: Sequence[str] = ()) -> str:
        """The IoU of the largest classes, such as ``0: 0.9558, bird: 0.8180``; a number is a class without a name."""
        found = list(self.by_class.items())
        said = [
            f"{shown(names[number], 30) if number < len(names) else number}: {iou:.4f}"
            for number, iou in found[:_MOST_NAMED]
        ]
        more = len(found) - len(said)
        return ", ".join(said) + (f" and {more} more" if more else "")

    def text(self) -> str:
        """Such as ``99.98% of pixels, mIoU 0.9991``; 100% and 1 are of all pixels, not rounded up."""
        text = "no pixel to compare"
        if self.share is not None and self.same == self.pixels:
            text = "100% of pixels, mIoU 1"
        elif self.share is not None:
            share, iou = min(self.share, 0.9999), min(self.mean_iou or 0, 0.9999)
            text = f"{share:.2%} of pixels, mIoU {iou:.4f}"
        return text

    def unanswered(self) -> str:
        """The pixels that a network gives no class, as the end of a line; empty without any."""
        ours, reference, _ = self.without
        if not ours and not reference:
            return ""
        return f"; without a class, such as of NaN: {counted(ours, 'pixel')} of ours, {reference:,} of the reference's"


def agree(ours: Mask, reference: Mask, void: int | None = None) -> Agreement:
    """Compare two maps [height, width] of class numbers from 0.

    Where one is negative, or the reference has ``void``, nothing counts; but `NO_CLASS` in one of them is wrong.
    """
    unknown = np.zeros(ours.shape, bool) if void is None else reference == void
    # Of a mask that the user gives, every number but the void is a class.
    without = [(each == NO_CLASS) & ~unknown for each in (ours, reference)]
    neither = without[0] & without[1]
    unseen = ((ours < 0) & ~without[0]) | ((reference < 0) & ~without[1])
    unseen &= ~unknown
    kept = ~(unknown | unseen | neither)
    own, given = ours[kept].astype(np.int64), reference[kept].astype(np.int64)
    same = own[own == given]
    # Larger numbers are no classes, and would need memory for all below them.
    numbers = [np.minimum(each[each >= 0], MOST_CLASSES) for each in (same, own, given)]
    classes = int(max(each.max(initial=-1) for each in numbers)) + 1
    both, first, second = (np.bincount(each, minlength=classes) for each in numbers)
    return Agreement(
        len(same),
        len(own),
        both,
        first + second - both,
        int(unknown.sum()),
        int(unseen.sum()),
        (int(without[0].sum()), int(without[1].sum()), int(neither.sum())),
    )


def total(agreements: Sequence[Agreement]) -> Agreement:
    """All photographs as one: pixels are added up before any share is taken."""
    classes = max(len(each.unions) for each in agreements)

    def added(counts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        padded = [np.pad(each, (0, classes - len(each))) for each in counts]
        summed: NDArray[np.int64] = np.sum(padded, axis=0)
        return summed

    return Agreement(
        sum(each.same for each in agreements),
        sum(each.pixels for each in agreements),
        added([each.intersections for each in agreements]),
        added([each.unions for each in agreements]),
        sum(each.void for each in agreements),
        sum(each.unseen for each in agreements),
        (
            sum(each.without[0] for each in agreements),
            sum(each.without[1] for each in agreements),
            sum(each.without[2] for each in agreements),
        ),
    )


def on_photograph(
    mask: Mask,
    place: Placement,
    network: tuple[int, int],
    size: tuple[int, int],
    wanted: tuple[int, int],
) -> Mask:
    """The class of each pixel of a copy of a photograph, −1 where the network did not see it.

    Args:
        mask: [height, width] over the whole input of the network, of any size.
        network: (width, height) of the input; ``size`` of the photograph; ``wanted`` of the result, a smaller or
            larger copy of the photograph.
    """
    across, down = (side / want for side, want in zip(size, wanted, strict=True))
    scaled = Placement(place.scale_x * across, place.scale_y * down, *place[2:])
    return map_on_photograph(mask.astype(np.int32), network[::-1], scaled, wanted)


def of_photographs(folder: Path, files: Sequence[Path]) -> dict[Path, Path]:
    """The file of the mask of each photograph: of its name, in a folder that is called as its own, or in ``folder`` itself.

    Raises:
        UserError: two photographs have one mask.
    """
    found: dict[Path, Path] = {}
    for path in files:
        place = folder / Path(os.path.abspath(path)).parent.name / f"{path.stem}.png"
        found[path] = place if place.is_file() else folder / f"{path.stem}.png"
    owners: dict[Path, Path] = {}
    for path, mask in found.items():
        other = owners.setdefault(mask, path)
        if os.path.abspath(other) != os.path.abspath(path):
            raise UserError(
                f"{mask}: can be the mask of {other} or {path}; give each its own in a folder called as the photograph's, "
                f"such as {folder / Path(os.path.abspath(other)).parent.name / mask.name}, or rename the photographs"
            )
    return found


def without_photograph(folder: Path, found: Mapping[Path, Path]) -> tuple[str, ...]:
    """A note of the masks in a folder that are of no photograph.

    Args:
        found: as `of_photographs` gives it.
    """
    known = {path.resolve() for pair in found.items() for path in pair}
    names = {Path(os.path.abspath(path)).parent.name for path in found}
    left = [
        path
        for place in (folder, *(folder / name for name in sorted(names)))
        for path in sorted(place.glob("*.png"))
        if path.resolve() not in known
    ]
    if not left:
        return ()
    first = shown(left[0].relative_to(folder))
    what = f"{counted(len(left), 'mask')} {'is' if len(left) == 1 else 'are'}"
    return (f"{folder}: {what} of no image given, the first {first}: not compared",)


def read(path: Path, size: tuple[int, int], classes: int | None = None) -> Mask:
    """A given mask: a PNG, grey or with a palette, whose values are class numbers.

    Args:
        size: (width, height) that it must have.
        classes: how many the network has, where that is known.

    Raises:
        UserError: it is missing, no such PNG, of another size, or has a number that is no class.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such mask; --masks takes a folder with a PNG for each image, by its name"
        )
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16"):
                raise UserError(
                    f"{path}: {image.mode} has no class numbers; save it grey or with a palette"
                )
            if image.size != size or image.width * image.height > MAX_PIXELS:
                found, wanted = (
                    "×".join(map(str, each)) for each in (image.size, size)
                )
                raise UserError(
                    f"{path}: has {found} pixels, its image {wanted}; give a mask of the image's size"
                )
            values = np.asarray(image).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (decoders raise errors of any class on hostile input)
        raise UserError(
            f"{path}: not a PNG that Pillow can read ({shown(first_line(error), 160)}); save it as PNG"
        ) from None
    if classes is not None:
        wrong = values[(values != VOID) & (values >= classes)]
        if len(wrong):
            raise UserError(
                f"{path}: has class {wrong.min()}, the network has {classes} classes; give numbers from 0 to "
                f"{classes - 1}, and {VOID} where no class is known"
            )
    return values
