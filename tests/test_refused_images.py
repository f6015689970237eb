"""An image, a model or a table of labels that does not fit the bundle is refused in one line."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import CHECK, RUN, VALID, Place, expect, labelled_bundle, spoilt


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_bundle(tmp_path_factory.mktemp("valid"))


def png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


IMAGES = {
    "truncated.jpg": "truncated.jpg|damaged image|replace it",
    "truncated.png": "truncated.png|damaged image|replace it",
    "bomb.png": "bomb.png|100,000,000 pixels|make it smaller",
    "large.png": "large.png|12000×10000|100,000,000 pixels|make it smaller",
    "text.jpg": "text.jpg|not an image|convert it to JPEG or PNG",
    "empty.jpg": "empty.jpg|not an image",
    "nowhere.jpg": "nowhere.jpg|no such file|give an image",
    "folder": "folder|no images in it (.bmp, ",
    "folder.jpg": "folder.jpg|no images in it (.bmp, ",
}


@pytest.mark.parametrize("name", IMAGES)
def test_refuses_an_image(place: Place, bundle: Path, name: str) -> None:
    here = place.here
    image = Image.effect_noise((64, 64), 50)
    for kind in ("jpg", "png"):
        image.save(here / f"truncated.{kind}")
        os.truncate(here / f"truncated.{kind}", 600)
    (here / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (here / "large.png").write_bytes(png_header(12_000, 10_000))
    (here / "text.jpg").write_text("This is no photograph.")
    (here / "empty.jpg").touch()
    (here / "folder").mkdir()
    (here / "folder.jpg").mkdir()
    expect(place.refused(RUN, bundle, "--image", name), IMAGES[name])


def test_one_broken_image_of_a_folder_is_skipped(place: Place, bundle: Path) -> None:
    (place.here / "photos").mkdir()
    Image.effect_noise((64, 64), 50).save(place.here / "photos" / "whole.png")
    (place.here / "photos" / "text.jpg").write_text("This is no photograph.")
    with place.start(RUN, bundle, "--image", "photos") as process:
        out, err = process.communicate()
    assert process.returncode == 0
    assert "skipped photos/text.jpg: not an image" in err and "whole.png" in out
    (place.here / "photos" / "whole.png").write_text("Nor is this.")
    line = place.refused(RUN, bundle, "--image", "photos")
    expect(line, "whole.png: not an image")


def test_refuses_to_run_nothing(place: Place, bundle: Path) -> None:
    expect(place.refused(RUN, bundle), "needs the input |give --image FILE")


def test_refuses_images_without_the_model(place: Place, bundle: Path) -> None:
    line = place.refused(CHECK, bundle, "--images", ".")
    expect(line, "--images needs --model")


def test_refuses_a_model_other_than_the_bundle_s(place: Place, bundle: Path) -> None:
    (place.here / "other.onnx").write_bytes(spoilt(lambda g: None, channels=5))
    line = place.refused(CHECK, bundle, "--model", "other.onnx")
    expect(line, "other.onnx|SHA-256|give that model, or build again")
    # Not of --input-shape, which was not given.
    wider = spoilt(lambda g: None, shape=(1, 3, 12, 12))
    (place.here / "wider.onnx").write_bytes(wider)
    line = place.refused(CHECK, bundle, "--model", "wider.onnx")
    expect(line, "wider.onnx|SHA-256|give that model, or build again")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("name,class\nphoto.png,1\n", "'class_index'|file and class_index"),
        ("file,class_index\nphoto.png,cat\n", "cat|whole number"),
    ],
    ids=["columns", "numbers"],
)
def test_refuses_a_table_of_labels(
    place: Place, bundle: Path, table: str, words: str
) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    Image.new("RGB", (20, 20)).save(place.here / "photo.png")
    (place.here / "labels.csv").write_text(table)
    line = place.refused(
        CHECK, bundle, "--model", "model.onnx", "--images", "photo.png"
    )
    expect(line, "labels.csv|" + words)


def test_there_are_many_cases_of_images() -> None:
    assert len(IMAGES) >= 9


@pytest.mark.parametrize(
    ("images", "save", "words"),
    [
        ("photo.png", "marked.txt", "--save marked.txt|.jpg or .png"),
        ("photo.png", "no/marked.jpg", "no: no such folder|--save"),
        (".", "marked.jpg", "--save marked.jpg|one image, not 2"),
        ("photo.png", "photo.png", "--save photo.png|the image itself|another name"),
        ("x.npy", "marked.jpg", "x.npy|no photograph"),
    ],
)
def test_refuses_to_save_a_picture(
    place: Place, bundle: Path, images: str, save: str, words: str
) -> None:
    for name in ("photo.png", "other.png"):
        Image.new("RGB", (20, 20)).save(place.here / name)
    np.save(place.here / "x.npy", np.zeros((1, 3, 16, 16), np.float32))
    expect(place.refused(RUN, bundle, "--image", images, "--save", save), words)
