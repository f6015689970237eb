"""From image files to the input tensor that a manifest describes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from netship.bundle.golden import normalise
from netship.bundle.manifest import Preprocessing, Tensor
from netship.targets.errors import UserError

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"]
)
# By content, whatever the name: Pillow would start Ghostscript for an EPS file called .png.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a decompression bomb has billions."""

# Of images wider or taller than this ratio only the middle can reach the crop: the rest is cut off
# before resizing, because the whole resized image might not fit into memory.
LONGEST_RATIO = 8

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


class Photo(NamedTuple):
    """One image file, decoded upright in RGB (or grey), with what was done to it, a line each."""

    image: Image.Image
    notes: tuple[str, ...]


def find(
    paths: Sequence[Path],
    suffixes: frozenset[str] = SUFFIXES,
    kind: str = "image",
    otherwise: frozenset[str] = frozenset(),
) -> list[Path]:
    """The files of one kind that the paths name: files as they are, folders by suffix, sorted.

    A folder that has none itself gives those of its folders, such as one a class; where these have none either, its
    files of the suffixes ``otherwise``.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path}: no such file or folder; give an {kind} or a folder of {kind}s"
            )
        if path.is_dir():
            inside = _of_kind(path, suffixes)
            if not inside:
                folders = sorted(p for p in path.iterdir() if p.is_dir())
                inside = [p for each in folders for p in _of_kind(each, suffixes)]
            inside = inside or _of_kind(path, otherwise)
            if not inside:
                raise UserError(
                    f"{path}: no {kind}s in it ({', '.join(sorted(suffixes))})"
                )
            found += inside
        else:
            found.append(path)
    return found


def _of_kind(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)


def read(path: Path, channels: int = 3) -> Photo:
    """Decode one image: EXIF rotation applied, CMYK, palette and grey converted, 16 bits scaled to 8.

    Transparency is laid over white. Of an animation the first frame is taken, and a note says so.

    Args:
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: not an image, truncated, or more than ``MAX_PIXELS``; or a network takes another
            number of channels.
    """
    if channels not in (1, 3):
        raise UserError(
            f"{path}: the network's input has {channels} channels, which no photograph has"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an image (JPEG, PNG, …)")
    notes = []
    try:
        with warnings.catch_warnings():
            # Pillow warns of faults that it can read in spite of; bombs are checked below.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    size = f"{opened.width}×{opened.height}"
                    raise UserError(
                        f"{path}: {size} is over {MAX_PIXELS:,} pixels; make it smaller"
                    )
                # n_frames would read every frame.
                if getattr(opened, "is_animated", False):
                    notes.append(f"{path.name}: animated; its first frame was taken")
                opened.load()
                upright = ImageOps.exif_transpose(opened)
                image = _eight_bit(upright, "RGB" if channels == 3 else "L")
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: over {MAX_PIXELS:,} pixels; make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: not an image that Pillow can read; convert it to JPEG or PNG"
        ) from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (decoders raise errors of any class on hostile input)
        raise UserError(f"{path}: damaged image ({error}); replace it") from None
    return Photo(image, tuple(notes))


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = _white(image.mode, float(values.max(initial=0)))
        image = Image.fromarray(
            np.rint(values.clip(0, top) * np.float32(255 / top)).astype(np.uint8)
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _white(mode: str, largest: float) -> float:
    """The value of white: 65,535 in 16 bits, which Pillow also reads as 32-bit integers (PGM);
    1 in floating point; where a value is larger, the next usual one that is not, or the largest value."""
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)
    return next((white for white in usual if largest <= white), largest)


class Placement(NamedTuple):
    """Where a photograph lies in the input: input_pixel = photograph_pixel × scale + offset, of pixels' edges.

    The offsets ``left`` and ``top`` are pixels of the input, negative where the photograph is cut off.
    """

    scale_x: float
    scale_y: float
    left: float
    top: float

    def to_photograph(
        self, boxes: NDArray[np.floating], size: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Boxes [N, 4] (x1, y1, x2, y2) of the input in pixels of the photograph, clipped to its (width, height)."""
        offset, scale = np.array([self.left, self.top] * 2), np.array(self[:2] * 2)
        found = (boxes.astype(np.float64) - offset) / scale
        inside: NDArray[np.float64] = np.clip(found, 0, np.array(size * 2))
        return inside.astype(np.float32)


class _Steps(NamedTuple):
    """The part of the photograph that is resized (left, top, right, bottom), the (width, height) that it gets,
    and where its corner then lies in the input: (x, y), negative where it is cut off."""

    part: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]


def placement(size: tuple[int, int], preprocessing: Preprocessing) -> Placement:
    """Where `to_tensor` puts a photograph of this (width, height)."""
    part, resized, corner = _steps(size, preprocessing)
    scale_x = resized[0] / (part[2] - part[0])
    scale_y = resized[1] / (part[3] - part[1])
    left, top = corner[0] - part[0] * scale_x, corner[1] - part[1] * scale_y
    return Placement(scale_x, scale_y, left, top)


def _steps(size: tuple[int, int], preprocessing: Preprocessing) -> _Steps:
    wanted = preprocessing.crop[::-1]
    part = (0, 0, *size)
    if preprocessing.fit == "letterbox":
        ratio = min(want / side for want, side in zip(wanted, size, strict=True))
        resized = [max(1, round(side * ratio)) for side in size]
    elif isinstance(preprocessing.resize, tuple):
        resized = list(preprocessing.resize[::-1])
    else:
        longest = min(size) * LONGEST_RATIO
        left, top = (max(0, (side - longest) // 2) for side in size)
        part = (left, top, size[0] - left, size[1] - top)
        kept = size[0] - 2 * left, size[1] - 2 * top
        resized = [side * preprocessing.resize // min(kept) for side in kept]
    x, y = (int((want - side) / 2) for want, side in zip(wanted, resized, strict=True))
    return _Steps(part, (resized[0], resized[1]), (x, y))


def to_tensor(
    photo: Photo, preprocessing: Preprocessing, tensor: Tensor
) -> NDArray[Any]:
    """The photograph resized and fitted, the values scaled: ``tensor.shape``, in its type."""
    part, resized, (x, y) = _steps(photo.image.size, preprocessing)
    height, width = preprocessing.crop
    image = photo.image
    if part != (0, 0, *image.size):
        image = image.crop(part)
    image = image.resize(resized, _RESAMPLING[preprocessing.interpolation])
    if preprocessing.fit == "letterbox":
        grey = Image.new("L", (width, height), preprocessing.pad)
        boxed = grey.convert(image.mode)
        boxed.paste(image, (x, y))
        image = boxed
    else:
        image = image.crop((-x, -y, width - x, height - y))
    pixels = np.asarray(image, dtype=np.float64).reshape(height, width, -1)
    if preprocessing.channel_order == "BGR":
        pixels = pixels[:, :, ::-1]
    return normalise(pixels.transpose(2, 0, 1), preprocessing, tensor)
