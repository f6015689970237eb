"""The fits of a photograph, against Pillow's own steps; the presets' numbers; and where a photograph's pixels lie."""

from __future__ import annotations

import re
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from netship.bundle import photos
from netship.bundle.manifest import Fit, Interpolation, Preprocessing, Tensor
from netship.compile.frontend import family
from netship.compile.frontend.preprocessing import (
    Overrides,
    parse_option,
    resolve_preprocessing,
)
from netship.targets.errors import UserError

Resampling = Image.Resampling
FILTERS = {
    "bilinear": Resampling.BILINEAR,
    "bicubic": Resampling.BICUBIC,
    "nearest": Resampling.NEAREST,
    "area": Resampling.BOX,
    "lanczos": Resampling.LANCZOS,
}
SIZES = [(61, 40), (40, 61), (48, 32), (7, 5), (1, 1), (800, 10), (10, 800)]
IMAGE = Tensor(name="x", shape=(1, 3, 32, 48), layout="NCHW")


def noise(size: tuple[int, int], channels: int = 3) -> Image.Image:
    random = np.random.Generator(np.random.PCG64(7))
    shape = (size[1], size[0], channels)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))


def raw(**changes: Any) -> Preprocessing:
    """Pixels as they are, of a network that takes 32×48 of them."""
    usual = {"resize": (32, 48), "crop": (32, 48), "scale": 1, "mean": (0,)}
    return Preprocessing.model_validate({**usual, "std": (1,), **changes})


def pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """What reaches the network, as rows of pixels."""
    found = photos.to_tensor(photos.Photo(image, ()), preprocessing, IMAGE)
    values: NDArray[np.float32] = found[0].transpose(1, 2, 0)
    return values


def test_every_fit_and_interpolation_is_known_here() -> None:
    assert set(get_args(Interpolation)) == set(FILTERS)
    assert set(get_args(Fit)) == {"crop", "stretch", "letterbox"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_stretch_is_pillow_s_resize(size: tuple[int, int], interpolation: str) -> None:
    image = noise(size)
    found = pixels(image, raw(fit="stretch", interpolation=interpolation))
    expected = image.resize((48, 32), FILTERS[interpolation])
    assert np.array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("size", SIZES)
def test_stretch_beyond_the_input_is_cropped(size: tuple[int, int]) -> None:
    image = noise(size)
    found = pixels(image, raw(fit="stretch", resize=(37, 56)))
    resized = image.resize((56, 37), Resampling.BILINEAR)
    expected = resized.crop((4, 2, 4 + 48, 2 + 32))
    assert np.array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_letterbox_is_resized_and_pasted(
    size: tuple[int, int], interpolation: str
) -> None:
    """As Ultralytics' LetterBox: round(side × r), half of the rest before, the odd pixel behind."""
    image = noise(size)
    found = pixels(image, raw(fit="letterbox", pad=114, interpolation=interpolation))
    ratio = min(48 / size[0], 32 / size[1])
    width, height = (max(1, round(side * ratio)) for side in size)
    expected = Image.new("RGB", (48, 32), (114, 114, 114))
    left, top = round((48 - width) / 2 - 0.1), round((32 - height) / 2 - 0.1)
    expected.paste(image.resize((width, height), FILTERS[interpolation]), (left, top))
    assert np.array_equal(found, np.asarray(expected))


def test_a_grey_letterbox_is_padded() -> None:
    tensor = Tensor(name="x", shape=(1, 1, 32, 48), layout="NCHW")
    photo = photos.Photo(Image.new("L", (32, 32), 7), ())
    found = photos.to_tensor(photo, raw(fit="letterbox", pad=200), tensor)[0, 0]
    assert (found[:, 8:40] == 7).all()
    assert (found[:, :8] == 200).all() and (found[:, 40:] == 200).all()


@pytest.mark.parametrize("fit", get_args(Fit))
def test_bgr_turns_the_channels_and_not_their_means(fit: str) -> None:
    image, resize = noise((61, 40)), 50 if fit == "crop" else (32, 48)
    plain = pixels(image, raw(fit=fit, resize=resize))
    turned = pixels(
        image,
        raw(fit=fit, resize=resize, channel_order="BGR", mean=(1, 2, 3), std=[1] * 3),
    )
    assert np.array_equal(turned, plain[:, :, ::-1] - np.array([1, 2, 3], np.float32))


PLACED = [
    raw(resize=60),
    raw(fit="stretch"),
    raw(fit="stretch", resize=(40, 55)),
    raw(fit="letterbox"),
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PLACED),
    st.tuples(st.integers(1, 8000), st.integers(1, 8000)),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_box_goes_into_the_input_and_back(
    preprocessing: Preprocessing, size: tuple[int, int], shares: tuple[float, ...]
) -> None:
    place = photos.placement(size, preprocessing)
    box = np.array([shares]) * np.array(size * 2)
    scale, offset = np.array(place[:2] * 2), np.array(place[2:] * 2)
    back = place.to_photograph(box * scale + offset, size)
    assert back.dtype == np.float32 and back.shape == (1, 4)
    assert np.allclose(back, box, atol=max(size) * 1e-6)
    far = place.to_photograph(np.array([[-1e9, -1e9, 1e9, 1e9]]), size)
    assert far.tolist() == [[0, 0, *size]]


@pytest.mark.parametrize("preprocessing", PLACED, ids=lambda p: p.geometry())
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (96, 64), (400, 100)])
def test_a_square_in_the_photograph_lies_where_placement_says(
    preprocessing: Preprocessing, size: tuple[int, int]
) -> None:
    width, height = size
    image = Image.new("RGB", size)
    box = (width // 2 - 20, height // 2 - 30, width // 2 + 25, height // 2 + 20)
    image.paste((255, 255, 255), box)
    found = pixels(image, preprocessing)[:, :, 0] / 255
    place = photos.placement(size, preprocessing)
    for axis, (scale, offset) in enumerate(zip(place[:2], place[2:], strict=True)):
        lit = found.max(axis=axis).sum()
        low, high = (box[k] * scale + offset for k in (axis, axis + 2))
        inside = min(high, found.shape[1 - axis]) - max(low, 0)
        assert abs(lit - inside) < 1.5
        first = float(np.argmax(found.max(axis=axis) > 0.4))
        assert abs(first - max(low, 0)) <= 1


def test_boxes_of_no_rows_and_nan() -> None:
    place = photos.placement((300, 200), raw(fit="letterbox"))
    assert place.to_photograph(np.zeros((0, 4), np.float32), (300, 200)).shape == (0, 4)
    assert np.isnan(place.to_photograph(np.full((1, 4), np.nan), (300, 200))).all()


# What options become


def resolved(
    options: dict[str, Any], own: Preprocessing | None = None, tensor: Tensor = IMAGE
) -> Preprocessing:
    found, _ = resolve_preprocessing(Overrides.model_validate(options), own, [tensor])
    assert found is not None
    return found


NET = Tensor(name="x", shape=(1, 3, 224, 224), layout="NCHW")


@pytest.mark.parametrize(
    ("preset", "darkest", "brightest", "geometry"),
    [
        # (0 − 0.485) / 0.229 = −2.1179, (1 − 0.485) / 0.229 = 2.2489
        ("torchvision", -2.1179, 2.2489, "resize 256, crop 224×224, bilinear"),
        ("keras-mobilenet", -1, 1, "stretch to 224×224, nearest"),
        ("keras-resnet", -103.939, 151.061, "stretch to 224×224, nearest, BGR"),
        ("tflite", -1, 1, "stretch to 224×224, bilinear"),
        ("yolo", 0, 1, "letterbox 224×224, pad 114, bilinear"),
        ("none", 0, 255, "stretch to 224×224, bilinear"),
    ],
)
def test_a_preset_is_what_its_framework_does(
    preset: str, darkest: float, brightest: float, geometry: str
) -> None:
    found = resolved({"preprocessing": preset}, tensor=NET)
    assert found.geometry() == geometry
    assert not found.assumed
    assert np.allclose(found.normalised(0.0)[0], darkest, atol=1e-4)
    assert np.allclose(found.normalised(255.0)[0], brightest, atol=1e-4)


def test_an_option_changes_a_part_of_a_preset() -> None:
    options = {"preprocessing": "yolo", "pad": "0", "interpolation": "area"}
    found, note = resolve_preprocessing(Overrides.model_validate(options), None, [NET])
    assert found is not None
    assert (found.pad, found.interpolation, found.scale) == (0, "area", 1 / 255)
    assert note == (
        "preprocessing yolo: v / 255; letterbox 224×224, pad 0, area; interpolation, pad as given"
    )
    turned = resolved({"preprocessing": "torchvision", "fit": "stretch"}, tensor=NET)
    assert turned.geometry() == "stretch to 256×256, crop 224×224, bilinear"


def test_a_preset_on_the_command_line_replaces_the_file_s_options() -> None:
    file = Overrides.model_validate(
        {"scale": 1, "mean": 9, "layout": "NCHW", "task": "raw"}
    )
    both = Overrides(preprocessing="tflite").with_defaults(file)
    assert both == Overrides(preprocessing="tflite", layout="NCHW", task="raw")
    assert Overrides(pad=3).with_defaults(Overrides(preprocessing="yolo")) == Overrides(
        preprocessing="yolo", pad=3
    )


@pytest.mark.parametrize(
    ("options", "geometry"),
    [
        ({"resize": "32,48"}, "stretch to 32×48, bilinear"),
        ({"resize": "40x60"}, "stretch to 40×60, crop 32×48, bilinear"),
        ({"fit": "stretch", "crop_fraction": "0.8"}, "stretch to 40×60, crop 32×48, bilinear"),
        ({"crop_fraction": "0.875"}, "resize 54, crop 32×48, bilinear"),
        ({"fit": "letterbox", "pad": 9}, "letterbox 32×48, pad 9, bilinear"),
        ({"channel_order": "bgr", "resize": 64}, "resize 64, crop 32×48, bilinear, BGR"),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_geometry(options: dict[str, Any], geometry: str) -> None:
    found = resolved(options)
    assert found.geometry() == geometry
    assert found.assumed


def test_a_scale_is_neutral_with_a_network_s_own_preprocessing_too() -> None:
    found = resolved({"scale": "1/255"}, family.preprocessing(32, 48))
    assert (found.scale, found.mean, found.std) == (1 / 255, (0,), (1,))
    assert not found.assumed


BYTES = Tensor(name="x", shape=(1, 32, 48, 3), layout="NHWC", dtype="uint8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resize": "32,48", "fit": "letterbox"}, "--resize: not .* with --fit letterbox"),
        ({"resize": "32,48", "fit": "crop"}, "--resize 32,48: --fit crop takes one number"),
        ({"resize": 64, "fit": "stretch"}, "--resize 64: --fit stretch takes H,W"),
        ({"resize": 64, "crop_fraction": 0.9}, "--crop-fraction: .* with --resize"),
        ({"crop_fraction": 0.9, "fit": "letterbox"}, "--crop-fraction: not"),
        ({"crop_fraction": 0.001}, "more than 4096"),
        ({"resize": "16,48"}, "resize 16 is smaller than crop 32"),
        ({"pad": 9}, "--pad: --fit crop pads nothing"),
        ({"preprocessing": "torchvision", "std": "0"}, "std must not be 0"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_exclude_each_other(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        resolved(options)
    assert "\n" not in str(error.value)


def test_a_network_that_takes_bytes_scales_them_itself() -> None:
    with pytest.raises(UserError, match="takes pixels as uint8"):
        resolved({"preprocessing": "torchvision"}, tensor=BYTES)
    found = resolved({"preprocessing": "none"}, tensor=BYTES)
    assert found.geometry() == "stretch to 32×48, bilinear"
    signed = BYTES.model_copy(update={"dtype": "int8"})
    assert resolved({"preprocessing": "none"}, tensor=signed).mean == (128.0,)


def test_grey_has_no_channel_order() -> None:
    grey = Tensor(name="x", shape=(1, 1, 32, 48), layout="NCHW")
    with pytest.raises(UserError, match="--channel-order BGR: .* 1 channel"):
        resolved({"channel_order": "bgr"}, tensor=grey)
    with pytest.raises(
        UserError, match="3 means, but the model's input has 1 channel;"
    ):
        resolved({"preprocessing": "keras-resnet"}, tensor=grey)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("pad", text) for text in ("-1", "256", "1.5", "x", "", "nan")],
        *[("crop_fraction", text) for text in ("0", "1.1", "nan", "-1", "1/0")],
        *[("resize", text) for text in ("1,2,3", ",", "0,4", "-3,4", "1e3", "99999999999")],
        *[("fit", text) for text in ("Stretch", "", "pad")],
        *[("channel_order", text) for text in ("rgba", "brg", "")],
        *[("preprocessing", text) for text in ("keras", "", "YOLO")],
        ("interpolation", "box"),
    ],
)  # fmt: skip
def test_hostile_values_are_refused_in_one_line(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))) as error:
        parse_option(name, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": "crop"},
        {"fit": "stretch", "resize": 32},
        {"fit": "letterbox", "resize": (64, 64)},
        {"fit": "stretch", "resize": (5000, 48)},
        {"fit": "stretch", "pad": 256},
        {"fit": "stretch", "resize": (32, 48, 64)},
        {"fit": "stretch", "channel_order": "GBR"},
    ],
    ids=str,
)
def test_a_manifest_s_hostile_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="."):
        raw(**changes)


def test_an_old_manifest_s_preprocessing_is_a_crop() -> None:
    old = '{"resize": 256, "crop": [224, 224], "scale": 1, "mean": [0], "std": [1]}'
    found = Preprocessing.model_validate_json(old)
    assert (found.fit, found.channel_order, found.assumed) == ("crop", "RGB", False)
    again = Preprocessing.model_validate_json(raw(fit="stretch").model_dump_json())
    assert again == raw(fit="stretch")
