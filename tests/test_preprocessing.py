"""What the options, a model.toml and a network's own preprocessing become together, and what the build says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from conftest import run

from netship.bundle.manifest import Preprocessing, Tensor
from netship.bundle.store import open_bundle
from netship.compile.frontend import zoo
from netship.compile.frontend.preprocessing import (
    Overrides,
    load_sidecar,
    parse_option,
    resolve_preprocessing,
)
from netship.targets.errors import UserError

IMAGE = Tensor(name="image", shape=(1, 3, 224, 224), layout="NCHW")
GEOMETRY = "resize 256, crop 224×224, bilinear"
THREE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def numbers(preprocessing: Preprocessing | None) -> tuple[Any, ...]:
    assert preprocessing is not None
    return preprocessing.scale, preprocessing.mean, preprocessing.std


@pytest.mark.parametrize(
    ("given", "expected", "says"),
    [
        (
            {},
            (1 / 127.5, (1,), (1,)),
            f"preprocessing assumed, as MobileNetV2's: v / 127.5 − 1; {GEOMETRY}; see --scale, --mean, --std",
        ),
        (
            {"scale": "1/255"},
            (1 / 255, (0,), (1,)),
            f"preprocessing: v / 255, mean and std not given: 0 and 1; {GEOMETRY}",
        ),
        (
            {"scale": "1/255", "mean": "0.485,0.456,0.406"},
            (1 / 255, THREE[0], (1, 1, 1)),
            f"preprocessing: v / 255 − (0.485, 0.456, 0.406), std not given: 1; {GEOMETRY}",
        ),
        (
            {"scale": "1", "std": 255},
            (1, (0,), (255,)),
            f"preprocessing: v / 255, mean not given: 0; {GEOMETRY}",
        ),
        (
            {"scale": 1, "mean": 127.5, "std": 127.5, "resize": 300},
            (1, (127.5,), (127.5,)),
            "preprocessing: (v − 127.5) / 127.5; resize 300, crop 224×224, bilinear",
        ),
        (
            {"scale": 1 / 255, "mean": 0.5, "std": THREE[1]},
            (1 / 255, (0.5, 0.5, 0.5), THREE[1]),
            f"preprocessing: (v / 255 − 0.5) / (0.229, 0.224, 0.225); {GEOMETRY}",
        ),
        (
            {"scale": 0.0078, "interpolation": "bicubic"},
            (0.0078, (0,), (1,)),
            "preprocessing: v × 0.0078, mean and std not given: 0 and 1; resize 256, crop 224×224, bicubic",
        ),
        (
            {"resize": 300},
            (1 / 127.5, (1,), (1,)),
            "preprocessing assumed, as MobileNetV2's: v / 127.5 − 1; resize 300, crop 224×224, bilinear; see --scale, --mean, --std",
        ),
    ],
    ids=str,
)
def test_of_a_user_s_model_the_note_has_the_whole_formula(
    given: dict[str, Any], expected: tuple[Any, ...], says: str
) -> None:
    resolved, note = resolve_preprocessing(
        Overrides.model_validate(given), None, [IMAGE]
    )
    assert numbers(resolved) == expected
    assert note == says


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"mean": 0.5}, "--mean without --scale"),
        ({"std": 0.5}, "--std without --scale"),
        ({"mean": 127.5, "std": 127.5}, "--mean and --std without --scale"),
    ],
)
def test_a_mean_or_std_needs_the_scale_that_it_is_relative_to(
    given: dict[str, float], names: str
) -> None:
    with pytest.raises(UserError, match=f"{names}; add --scale 1/255.*--scale 1 "):
        resolve_preprocessing(Overrides.model_validate(given), None, [IMAGE])


@pytest.mark.parametrize(
    ("given", "expected", "says"),
    [
        ({}, (1 / 255, *THREE), ""),
        (
            {"scale": "1/127.5"},
            (1 / 127.5, (0,), (1,)),
            f"preprocessing: v / 127.5, mean and std not given: 0 and 1; {GEOMETRY}; scale as given, the rest is the network's own",
        ),
        (
            {"mean": 0},
            (1 / 255, (0, 0, 0), THREE[1]),
            f"preprocessing: v / 255 / (0.229, 0.224, 0.225); {GEOMETRY}; mean as given, the rest is the network's own",
        ),
        (
            {"std": 1, "resize": 240},
            (1 / 255, THREE[0], (1, 1, 1)),
            "preprocessing: v / 255 − (0.485, 0.456, 0.406); resize 240, crop 224×224, bilinear; resize, std as given, the rest is the network's own",
        ),
    ],
    ids=str,
)
def test_of_a_network_s_own_preprocessing_a_part_is_replaced(
    given: dict[str, Any], expected: tuple[Any, ...], says: str
) -> None:
    own = zoo.MODELS["mobilenetv2-12"].preprocessing
    resolved, note = resolve_preprocessing(
        Overrides.model_validate(given), own, [IMAGE]
    )
    assert numbers(resolved) == expected
    assert note == says


def test_a_decoder_s_preprocessing_that_is_not_taken_is_said() -> None:
    def note(**given: Any) -> str:
        overrides = Overrides.model_validate({"decode": "yunet", **given})
        return resolve_preprocessing(overrides, None, [IMAGE])[1]

    said = "; the preprocessing of --decode yunet is not taken, because of --scale and --std: --preprocessing yunet takes it"
    assert note(scale="1/255", std=2).endswith(said)
    for taken in ({}, {"preprocessing": "yunet", "scale": 1}, {"decode": "ssd"}):
        assert "not taken" not in note(**taken)


@pytest.mark.parametrize(
    ("given", "fit"),
    [
        ({}, "crop"),
        ({"task": "classify"}, "crop"),
        ({"task": "segment"}, "stretch"),
        ({"task": "detect", "scale": 1}, "stretch"),
        ({"decode": "ssd"}, "stretch"),
        ({"decode": "yolo"}, "letterbox"),
        ({"task": "segment", "fit": "crop"}, "crop"),
        ({"task": "segment", "resize": 256}, "crop"),
        ({"task": "segment", "crop_fraction": 0.875}, "crop"),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [None, zoo.MODELS["mobilenetv2-12"].preprocessing])
def test_a_detector_and_a_segmentation_see_all_of_the_photograph(
    own: Preprocessing | None, given: dict[str, Any], fit: str
) -> None:
    if own is not None and given.get("decode") == "yolo":
        fit = "stretch"  # The preset of a decoder is for models that say nothing.
    overrides = Overrides.model_validate(given)
    resolved, note = resolve_preprocessing(overrides, own, [IMAGE])
    assert resolved is not None and resolved.fit == fit
    assert ("see all of the photograph" in note) == (fit == "stretch")
    assert ("stretch to 224×224" in note) == (fit == "stretch")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scale": 1, "mean": "1,2"}, "channel .three., each; see --mean, --std and"),
        ({"resize": 5000}, "resize 5000 is more than 4096 pixels; see --resize$"),
        ({"std": 0}, "scale and std must not be 0; see --mean, --std and --scale$"),
        ({"scale": 1, "mean": "nan"}, "preprocessing: mean: .*finite number; see --me"),
    ],
    ids=str,
)
def test_a_refusal_names_what_to_change(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve_preprocessing(Overrides.model_validate(given), None, [IMAGE])


def test_a_refusal_names_the_toml_that_states_a_value(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text("mean = [1, 2]\nscale = 1\nstd = 0.5\n")
    stated = load_sidecar(tmp_path / "model.onnx")
    both = Overrides.model_validate({"scale": "1/255"}).with_defaults(stated)
    with pytest.raises(UserError, match="; mean and std as /.*/model.toml says$"):
        resolve_preprocessing(both, None, [IMAGE])
    preset = Overrides(preprocessing="yolo", pad=3, fit="stretch").with_defaults(stated)
    with pytest.raises(UserError, match="add --fit letterbox$"):
        resolve_preprocessing(preset, None, [IMAGE])


TEXTS = {
    "scale": ["1/255", "0.0078", "1e-3", "1/0", "x", ""],
    "mean": ["0.5", "1/2,1/4,0", "0.5,", "a"],
    "std": ["0.25", "0.229,0.224,0.225", "1/0"],
    "resize": ["256", "0", "1.5", "x"],
    "crop": ["224", "224,192", "224x192", "0", "x"],
    "interpolation": ["bicubic", "cubic"],
    "layout": ["NHWC", "nhwc"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts]
)
def test_the_toml_and_the_command_line_take_the_same_text(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "model.toml").write_text(f'{name} = "{text}"\n')
    try:
        expected = parse_option(name, text)
    except ValueError:
        with pytest.raises(UserError, match=f"model.toml: {name}"):
            load_sidecar(tmp_path / "model.onnx")
        return
    assert getattr(load_sidecar(tmp_path / "model.onnx"), name) == expected


def test_the_toml_takes_numbers_and_text(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(
        'scale = "1/255"\nmean = [0.5, "1/4", 0]\nstd = 0.25\ncrop = [224, 192]\n'
    )
    found = load_sidecar(tmp_path / "model.onnx")
    assert found.scale == 1 / 255
    assert found.mean == (0.5, 0.25, 0.0)
    assert (found.std, found.crop) == ((0.25,), (224, 192))


@pytest.mark.parametrize("value", ["true", "1979-05-27", '["1/0"]', "{}"])
def test_a_toml_scale_that_is_no_number_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(f"scale = {value}\n")
    with pytest.raises(UserError, match="model.toml: scale"):
        load_sidecar(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["pad = true", "resize = true", "crop = [false, 5]"])
def test_true_and_false_are_no_numbers_of_a_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(UserError, match=f"model.toml: {text.split()[0]}.*: (true|false) is not a whole number"):  # fmt: skip
        load_sidecar(tmp_path / "model.onnx")


def test_a_broken_toml_says_its_line_and_the_page(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text("scale = 1\nmean = [0\n")
    says = r"model.toml: not TOML: .* \(at the end of line 2\); correct this line, see docs/models.md$"
    with pytest.raises(UserError, match=says):
        load_sidecar(tmp_path / "model.onnx")
    (tmp_path / "model.toml").write_bytes(b"scale = 1\nlayout = '\xff'\n")
    with pytest.raises(UserError, match="not TOML: line 2 is not UTF-8; save it as"):
        load_sidecar(tmp_path / "model.onnx")


def test_a_toml_may_name_a_decoder_s_file_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text('task = "detect"\ndecode = "mine.toml"\n')
    (tmp_path / "mine.toml").write_text('preset = "yunet"\n')
    resolved, note = resolve_preprocessing(load_sidecar(tmp_path / "model.onnx"), None, [IMAGE])  # fmt: skip
    assert resolved and resolved.channel_order == "BGR"
    assert note.startswith("preprocessing yunet:")


@pytest.mark.slow
def test_a_build_says_what_an_option_and_the_toml_became(tmp_path: Path) -> None:
    onnx.save(graphs.torchscript_cnn(17), tmp_path / "mine.onnx")
    (tmp_path / "mine.toml").write_text('std = "0.5"\nresize = 40\n')
    output = tmp_path / "bundle"
    options = ("--model", tmp_path / "mine.onnx", "--output", output)
    result = run("compile.build", *options, "--scale", "1/255")
    assert result.returncode == 0, result.stderr
    note = "preprocessing: v / 255 / 0.5, mean not given: 0; resize 40, crop 20×16, bilinear"
    assert result.stderr.count(note) == 1
    kept = open_bundle(output).manifest.preprocessing
    assert kept is not None
    assert np.allclose(kept.normalised(255.0), 2.0)
