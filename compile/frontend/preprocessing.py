"""How photographs become the input: from the options, a TOML file next to the model, or the model's own."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from bundle.fields import Dimension
from bundle.manifest import Preprocessing, Tensor, image_of
from compile.frontend import family
from targets.errors import UserError

Layout = Literal["NCHW", "NHWC", "data"]
"""The order of an image's axes; or that the input is no image."""


def _number(value: Any) -> Any:
    """A number, or text of one such as 0.0078 or 1/127.5."""
    if not isinstance(value, bool | str):
        return value
    try:
        above, slash, below = str(value).partition("/")
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{value!r} is not a number such as 0.0078 or 1/127.5"
        ) from None


def _numbers(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(map(_number, parts if isinstance(parts, list | tuple) else [parts]))


def _sizes(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(value.replace("x", ",").split(","))
    return (value,) if isinstance(value, int) else value


class Overrides(BaseModel):
    """What the user states of a model's preprocessing; None for what is left out.

    The names are those of the command line's options and of the TOML's keys, and both take the same text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout | None = None
    resize: Dimension | None = None
    crop: Annotated[tuple[Dimension, ...], BeforeValidator(_sizes)] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    scale: Annotated[float, BeforeValidator(_number)] | None = None
    mean: Annotated[tuple[float, ...], BeforeValidator(_numbers)] | None = None
    std: Annotated[tuple[float, ...], BeforeValidator(_numbers)] | None = None
    labels: Path | None = None

    def with_defaults(self, other: Overrides) -> Overrides:
        """These, with missing values taken from ``other``."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


def parse_option(name: str, text: str) -> Any:
    """The value of the command line's option ``--name``.

    Raises:
        ValueError: the text is not one of its values.
    """
    try:
        return getattr(Overrides.model_validate({name: text}), name)
    except ValidationError as error:
        raise ValueError(f"{text!r}: {_message(error)}") from None


def _message(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def load_sidecar(model: Path) -> Overrides:
    """What ``model.toml`` next to ``model.onnx`` states; nothing where there is none."""
    path = model.with_suffix(".toml") if model.name else model
    if not path.is_file():
        return Overrides()
    try:
        overrides = Overrides.model_validate(
            tomllib.loads(path.read_text(encoding="utf-8"))
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        known = ", ".join(Overrides.model_fields)
        raise UserError(
            f"{path}: {place}: {_message(error)}; known keys: {known}"
        ) from None
    if overrides.labels is not None:
        return overrides.model_copy(update={"labels": path.parent / overrides.labels})
    return overrides


def resolve_preprocessing(
    overrides: Overrides, own: Preprocessing | None, tensors: Sequence[Tensor]
) -> tuple[Preprocessing | None, str]:
    """The preprocessing of a model with these inputs, and a note that says what it became; None where it is data.

    Args:
        overrides: what the user states.
        own: what the built-in or Model Zoo network says of itself, of which the overrides replace a part.
            None for a user's model: with none of scale, mean and std it is assumed to take MobileNetV2's
            ``v / 127.5 − 1``; with a scale, mean is 0 and std is 1 where they are left out.

    Returns:
        The note is empty where the network has its own preprocessing and nothing is overridden.

    Raises:
        UserError: the overrides contradict each other or the input tensor, or mean or std is given
            without the scale that says what they are relative to.
    """
    given = overrides.model_dump(exclude_none=True, exclude={"layout", "labels"})
    tensor = image_of(tensors)
    if tensor is None:
        shapes = ", ".join(f"{list(each.shape)}" for each in tensors)
        what = f"the input {shapes} is data, not an image"
        files = f".npy files of {tensors[0].dtype}"
        if len(tensors) > 1:
            what = f"the inputs {shapes} are data, none is an image"
            files = ".npz files with an array for each"
        if given:
            raise UserError(f"--{', --'.join(given)}: {what}; leave it out")
        return None, f"{what}: run and check take {files}"
    height, width = tensor.size
    if tensor.dtype != "float32" and tensor.quantised is None:
        # The network takes pixels as they are stored, and scales them itself.
        mean = 0.0 if tensor.dtype == "uint8" else 128.0
        raw = {"scale": 1.0, "mean": (mean,), "std": (1.0,)}
        own = family.preprocessing(height, width).model_copy(update=raw)
    crop = given.get("crop", (height, width))
    if (crop[0], crop[-1]) != (height, width):
        shape = "×".join(map(str, crop))
        raise UserError(
            f"crop {shape}: the model's input is {height}×{width}; leave --crop out"
        )
    missing = [name for name in ("scale", "mean", "std") if name not in given]
    values = (own or family.preprocessing(height, width)).model_dump()
    if own is None and 0 < len(missing) < 3:
        if "scale" in missing:
            names = " and ".join(
                f"--{name}" for name in ("mean", "std") if name in given
            )
            raise UserError(
                f"preprocessing: {names} without --scale; add --scale 1/255 where pixels are 0 to 1 in "
                "training, or --scale 1 where they are 0 to 255"
            )
        values |= {"mean": (0.0,), "std": (1.0,)}
    values |= given | {"crop": (height, width)}
    channels = max(len(values["mean"]), len(values["std"]))
    for name in ("mean", "std"):
        if len(values[name]) == 1:
            values[name] *= channels
    try:
        resolved = Preprocessing.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"preprocessing: {_message(error)}; see --mean, --std, --scale and --resize"
        ) from None
    if len(resolved.mean) not in (1, tensor.channels):
        raise UserError(
            f"preprocessing: {len(resolved.mean)} means, but the model's input has {tensor.channels} "
            "channel(s); give --mean and --std one value each"
        )
    note = _note(resolved, list(given), missing, own is not None)
    if tensor.dtype != "float32" and not given:
        how = "quantised" if tensor.quantised else "as it takes pixels"
        note = f"preprocessing: {resolved.formula()}; the input is {tensor.dtype}, {how}; {resolved.geometry()}"
    return resolved, note


def _note(
    resolved: Preprocessing, given: list[str], missing: list[str], has_own: bool
) -> str:
    formula, geometry = resolved.formula(), resolved.geometry()
    if has_own:
        rest = f"{', '.join(given)} as given, the rest is the network's own"
        return f"preprocessing: {formula}; {geometry}; {rest}" if given else ""
    if len(missing) == 3:
        return (
            f"preprocessing assumed, as MobileNetV2's: {formula}; {geometry}; "
            "see --scale, --mean, --std"
        )
    if missing:
        neutral = " and ".join({"mean": "0", "std": "1"}[name] for name in missing)
        formula += f", {' and '.join(missing)} not given: {neutral}"
    return f"preprocessing: {formula}; {geometry}"


def _classes(shape: tuple[int, ...]) -> int:
    if len(shape) != 4:
        return prod(shape[-1:])
    return shape[1] if prod(shape[2:]) == 1 else min(shape[1], shape[-1])


def read_labels(path: Path | None, outputs: Sequence[Tensor]) -> list[str]:
    """Class names, one a line of the file; none without one.

    Raises:
        UserError: no output has that many classes: scores [1, classes], rows [1, n, classes], or
            maps, the smaller of the axes next to height and width.
    """
    if path is None:
        return []
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: labels must be UTF-8 text, one a line") from None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --labels takes a text file, one name a line"
        ) from None
    classes = [_classes(x.shape) for x in outputs]
    if len(names) not in classes:
        raise UserError(
            f"{path}: {len(names)} labels, but the model has "
            f"{' or '.join(map(str, classes))} classes"
        )
    return names
