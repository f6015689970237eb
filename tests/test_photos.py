"""Photographs as people have them, checked by the values that reach the network."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from netship.bundle import photos
from netship.bundle.manifest import Preprocessing, Tensor
from netship.targets.errors import UserError

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112  # EXIF 2.32, table 4: "Image orientation"

RAW = Preprocessing(resize=256, crop=(224, 224), scale=1, mean=(0,), std=(1,))
NCHW = Tensor(name="x", shape=(1, 3, 224, 224), layout="NCHW")
NHWC = Tensor(name="x", shape=(1, 224, 224, 3), layout="NHWC")


def decoded(path: Path, channels: int = 3) -> Pixels:
    return np.asarray(photos.read(path, channels).image)


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    random = np.random.Generator(np.random.PCG64(5))
    return random.integers(0, 256, (height, width, channels), dtype=np.uint8)


# How the camera stored an upright image, by the EXIF orientation that it noted.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True})]
)
def test_a_turned_photograph_is_put_upright(
    tmp_path: Path, orientation: int, suffix: str, options: dict[str, Any]
) -> None:
    upright = noise(5, 7)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"photo.{suffix}"
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, **options)
    assert np.array_equal(decoded(path), upright)


def test_a_turned_jpeg_is_put_upright(tmp_path: Path) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = (200, 40, 40)  # the top left corner
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = np.ascontiguousarray(STORED[6](upright))
    Image.fromarray(stored).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    found = decoded(tmp_path / "photo.jpg").astype(int)
    assert found.shape == upright.shape
    assert np.abs(found[4:12, 4:12] - (200, 40, 40)).max() <= 3
    assert found[20:].max() <= 3 and found[:, 20:].max() <= 3


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 155), (100, 100, 100)),
    ],
)
def test_cmyk_is_what_the_ink_looks_like(
    tmp_path: Path, ink: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "photo.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "photo.jpg").astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 51), (224, 224, 224)),  # 0.2 · 100 + 0.8 · 255
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 128, (0, 0, 0)),  # 128 / 257 rounds down, 129 / 257 up
        ("I;16", 129, (1, 1, 1)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_a_png_of_any_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: Any, expected: tuple[int, ...]
) -> None:
    Image.new(mode, (3, 2), colour).save(tmp_path / "photo.png")
    found = decoded(tmp_path / "photo.png")
    assert found.shape == (2, 3, 3)
    assert (found == expected).all()


def test_a_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "photo.png", transparency=0)
    found = decoded(tmp_path / "photo.png")
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_sixteen_bits_a_channel_are_scaled(tmp_path: Path) -> None:
    """Pillow cannot write such a PNG, so here is one by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 0, 128 * 257, 65535)
    (tmp_path / "photo.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert decoded(tmp_path / "photo.png").tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("name", ["photo.tiff", "photo.pgm"])
def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path: Path, name: str) -> None:
    """Scaled by 65,535, not by the largest value in it."""
    values = np.array([[0, 10 * 257, 100 * 257]], np.uint16)
    if name.endswith(".pgm"):
        data = b"P5 3 1 65535\n" + values.astype(">u2").tobytes()
        (tmp_path / name).write_bytes(data)
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert decoded(tmp_path / name)[0, :, 0].tolist() == [0, 10, 100]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_has_the_scale_that_fits(tmp_path: Path, top: float) -> None:
    values = np.array([[0, 0.2, 1]], np.float32) * np.float32(top)
    Image.fromarray(values).save(tmp_path / "photo.tiff")
    assert decoded(tmp_path / "photo.tiff")[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp"])
def test_of_an_animation_the_first_frame_is_taken_and_said(
    tmp_path: Path, name: str
) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    photo = photos.read(tmp_path / name)
    assert (np.asarray(photo.image) == (255, 0, 0)).all()
    assert photo.notes == (f"{name}: animated; its first frame was taken",)


def test_only_the_first_frame_of_an_animation_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("L", (4, 4), value) for value in range(50)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:])
    seeks = []
    seek = GifImageFile._seek

    def counted(image: GifImageFile, frame: int, *more: Any) -> None:
        seeks.append(frame)
        seek(image, frame, *more)

    monkeypatch.setattr(GifImageFile, "_seek", counted)
    photos.read(tmp_path / "long.gif")
    assert max(seeks) <= 1


def test_other_formats_are_refused_whatever_their_name(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for an EPS file."""
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png: not an image .* JPEG or PNG"):
        photos.read(tmp_path / "photo.png")


def test_an_image_that_does_not_move_has_no_note(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.gif")
    assert photos.read(tmp_path / "photo.gif").notes == ()


def test_one_channel_is_the_luminance(tmp_path: Path) -> None:
    """ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""
    image = Image.new("RGB", (3, 1))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    image.save(tmp_path / "photo.png")
    assert decoded(tmp_path / "photo.png", channels=1).tolist() == [[76, 150, 29]]


def test_a_network_of_four_channels_takes_no_photograph(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="4 channels"):
        photos.read(tmp_path / "photo.png", channels=4)


# To the tensor


def tensor_of(image: Image.Image, preprocessing: Preprocessing, tensor: Tensor) -> Any:
    return photos.to_tensor(photos.Photo(image, ()), preprocessing, tensor)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (1000, 130)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("tensor", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_the_recipe_is_the_usual_one_to_the_bit(
    size: tuple[int, int], interpolation: Any, tensor: Tensor
) -> None:
    """Short side to 256, centre 224, scale, mean and std: written here once more with Pillow alone."""
    width, height = size
    image = Image.fromarray(noise(height, width))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocessing = Preprocessing(
        resize=256,
        crop=(224, 224),
        interpolation=interpolation,
        scale=1 / 255,
        mean=mean,
        std=std,
    )
    scaled = (width * 256 // min(size), height * 256 // min(size))
    resized = image.resize(scaled, Image.Resampling[interpolation.upper()])
    left, top = (scaled[0] - 224) // 2, (scaled[1] - 224) // 2
    pixels = np.asarray(resized)[top : top + 224, left : left + 224].astype(np.float64)
    expected = ((pixels * (1 / 255) - mean) / std).astype(np.float32)
    if tensor is NCHW:
        expected = expected.transpose(2, 0, 1)
    found = tensor_of(image, preprocessing, tensor)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert np.array_equal(found, expected[np.newaxis])


def test_a_grey_network_gets_one_channel() -> None:
    tensor = Tensor(name="x", shape=(1, 1, 224, 224), layout="NCHW")
    found = tensor_of(Image.new("L", (300, 300), 7), RAW, tensor)
    assert found.shape == tensor.shape and (found == 7).all()


def test_a_crop_need_not_be_square() -> None:
    tensor = Tensor(name="x", shape=(1, 3, 100, 200), layout="NCHW")
    preprocessing = RAW.model_copy(update={"crop": (100, 200), "resize": 200})
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[50:150] = 9  # the crop, exactly
    found = tensor_of(Image.fromarray(pixels), preprocessing, tensor)
    assert found.shape == tensor.shape and (found == 9).all()


@pytest.mark.parametrize("tensor", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_one_pixel_fills_the_tensor(tensor: Tensor) -> None:
    found = tensor_of(Image.new("RGB", (1, 1), (1, 2, 3)), RAW, tensor)
    planes = found[0] if tensor is NCHW else found[0].transpose(2, 0, 1)
    assert [np.unique(plane).tolist() for plane in planes] == [[1], [2], [3]]


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (60_000, 2), (2, 60_000)])
def test_of_a_strip_the_middle_is_seen_and_little_memory_taken(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole strip with its short side at 256 would have up to two thousand million pixels."""
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(ramp if height < width else ramp[:, None], (height, width))
    image = Image.fromarray(np.stack([pixels] * 3, axis=-1))
    made: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, to: tuple[int, int], *rest: Any) -> Image.Image:
        made.append(to[0] * to[1])
        return resize(self, to, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    found = tensor_of(image, RAW, NCHW)
    assert found.shape == NCHW.shape
    assert np.abs(found - 127).max() <= 1
    assert len(made) == 1 and made[0] <= 8 * 256 * 256


# Damaged


def small_images() -> dict[str, bytes]:
    image = Image.fromarray(noise(12, 16))
    files = {}
    for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        data = io.BytesIO()
        image.save(data, kind)
        files[kind] = data.getvalue()
    return files


SMALL = small_images()


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(sorted(SMALL)),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10**6),
)
def test_a_damaged_image_is_read_or_refused(
    tmp_path: Path, kind: str, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(SMALL[kind])
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "photo"
    path.write_bytes(data[: cut % (2 * len(data))])
    try:
        image = photos.read(path).image
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert image.mode == "RGB"


# Which files


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "labels.csv", "c.webp"):
        (tmp_path / name).touch()
    alone = tmp_path / "notes.txt"
    found = photos.find([alone, tmp_path])
    assert [path.name for path in found] == ["notes.txt", "a.png", "b.JPG", "c.webp"]
