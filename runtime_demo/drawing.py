"""Photographs with boxes, points and masks drawn into them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from functools import cache
from math import sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from netship.bundle.detections import Detections
from netship.targets.escapes import shown
from netship.targets.files import write_whole

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MOST_BOXES = 100
"""Boxes drawn into one photograph, those of the best scores: more would hide it."""
_BRIGHT_LUMA = 140


def fitted(image: Image.Image, longest: int) -> Image.Image:
    """A copy in RGB whose longer side has ``longest`` pixels."""
    ratio = longest / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


def with_boxes(
    image: Image.Image,
    found: Detections,
    names: Sequence[str],
    size: tuple[int, int],
) -> Image.Image:
    """A copy with the boxes, labels, scores and points of the `MOST_BOXES` best.

    Args:
        names: of the classes; a class without one is shown by its number.
        size: (width, height) of the photograph that the boxes are of.
    """
    marked = image.convert("RGB")
    draw = ImageDraw.Draw(marked)
    scale = np.array(marked.size) / size
    line, font = max(2, max(marked.size) // 200), _font(marked)
    usable = np.isfinite(found.scores) & np.isfinite(found.boxes).all(axis=1)
    order = [i for i in np.argsort(-found.scores, kind="stable") if usable[i]]
    # The best last, so that no other hides it.
    for index in order[:MOST_BOXES][::-1]:
        number = int(found.classes[index])
        colour = _box_colour(number)
        x1, y1, x2, y2 = np.rint(found.boxes[index] * np.tile(scale, 2)).tolist()
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        for x, y in found.points[index] * scale:
            if np.isfinite((x, y)).all():
                draw.circle((float(x), float(y)), line, fill=colour)
        name = names[number] if 0 <= number < len(names) else ""
        text = f"{shown(name, 32) or f'class {number}'} {found.scores[index]:.0%}"
        _label(draw, (x1, y1), text, font, colour)
    return marked


def with_title(image: Image.Image, text: str) -> Image.Image:
    """A copy with a line of text in its upper left corner."""
    marked = image.convert("RGB")
    _label(ImageDraw.Draw(marked), (0, 0), shown(text, 60), _font(marked), (0, 0, 0))
    return marked


def save(image: Image.Image, path: Path, option: str) -> None:
    """Write a JPEG or, of a name that ends with .png, a PNG, whole or not at all."""
    buffer = io.BytesIO()
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    image.save(buffer, kind, quality=90)
    write_whole(path, buffer.getvalue(), option)


def _font(image: Image.Image) -> Font:
    """22 pixels high in a picture of 640, 55 in one of 4000; in a strip a quarter of its short side."""
    size = min(0.87 * sqrt(max(image.size)), min(image.size) / 4)
    return ImageFont.load_default(max(11, int(size)))


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font: Font,
    colour: tuple[int, int, int],
) -> None:
    """Text on a ground of ``colour`` above a corner, inside the picture."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    left = max(0, min(corner[0], draw.im.size[0] - width - 6))
    top = corner[1] - height - 4 if corner[1] >= height + 4 else corner[1]
    draw.rectangle((left, top, left + width + 6, top + height + 4), fill=colour)
    draw.text((left + 3, top + 1), text, fill=_ink(colour), font=font)


def with_mask(image: Image.Image, mask: NDArray[np.integer]) -> Image.Image:
    """A copy half covered by the colours of the classes [height, width] of its size; not where a class is negative."""
    plain = np.asarray(image.convert("RGB"))
    palette = np.array([class_colour(number) for number in range(256)], np.uint8)
    covered = (plain // 2 + palette[mask % 256] // 2).astype(np.uint8)
    return Image.fromarray(np.where((mask < 0)[:, :, None], plain, covered))


@cache
def class_colour(number: int) -> tuple[int, int, int]:
    """Pascal VOC's colour of a class (VOCdevkit, VOClabelcolormap.m): class 0 is black, near numbers differ."""
    red = green = blue = 0
    rest = number % 256
    for bit in range(7, -1, -1):
        red |= (rest & 1) << bit
        green |= (rest >> 1 & 1) << bit
        blue |= (rest >> 2 & 1) << bit
        rest >>= 3
    return red, green, blue


@cache
def _box_colour(number: int) -> tuple[int, int, int]:
    """A bright colour; the golden ratio keeps the hues of near numbers apart."""
    red, green, blue = hsv_to_rgb((0.33 + number * 0.618034) % 1, 0.85, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return "black" if luma > _BRIGHT_LUMA else "white"
