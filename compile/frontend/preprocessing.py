"""How photographs become the input: from the options, a TOML file next to the model, or the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from netship.bundle.fields import Dimension
from netship.bundle.manifest import (
    Byte,
    ChannelOrder,
    Fit,
    Interpolation,
    Preprocessing,
    Tensor,
    image_of,
)
from netship.bundle.task import Kind, Task
from netship.compile.frontend import family
from netship.compile.frontend.detectors import preset_of
from netship.compile.frontend.pixels import PIXELS, PRESETS, Preset
from netship.compile.frontend.toml_file import read_toml
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.files import read_text

Layout = Literal["NCHW", "NHWC", "data"]
"""The order of an image's axes; or that the input is no image."""
_NOT_OF_PIXELS = {"layout", "labels", "task", "decode"}


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


def _whole(value: Any) -> Any:
    # Python's booleans are numbers, TOML's are not.
    if value is True or value is False:
        raise ValueError(f"{str(value).lower()} is not a whole number")
    return value


def _sizes(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(value.replace("x", ",").split(","))
    return (value,) if isinstance(value, int) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


_Side = Annotated[Dimension, BeforeValidator(_whole)]
_Sizes = Annotated[tuple[_Side, ...], Field(min_length=1, max_length=2)]


class Overrides(BaseModel):
    """What the user states of a model's preprocessing; None for what is left out.

    The names are those of the command line's options and of the TOML's keys, with "_" for "-"; both take the same text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout | None = None
    preprocessing: Preset | None = None
    resize: Annotated[_Sizes, BeforeValidator(_sizes)] | None = None
    crop: Annotated[_Sizes, BeforeValidator(_sizes)] | None = None
    crop_fraction: (
        Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None
    ) = None
    interpolation: Interpolation | None = None
    fit: Fit | None = None
    pad: Annotated[Byte, BeforeValidator(_whole)] | None = None
    channel_order: Annotated[ChannelOrder, BeforeValidator(_upper)] | None = None
    scale: Annotated[float, BeforeValidator(_number)] | None = None
    mean: Annotated[tuple[float, ...], BeforeValidator(_numbers)] | None = None
    std: Annotated[tuple[float, ...], BeforeValidator(_numbers)] | None = None
    labels: Path | None = None
    task: Kind | None = None
    decode: str | None = None
    # By name: the TOML file that states a value.
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    def with_defaults(self, other: Overrides) -> Overrides:
        """These, with missing values taken from ``other``; a preset replaces all the preprocessing that ``other`` has."""
        if self.preprocessing is not None:
            other = Overrides(**other.model_dump(include=_NOT_OF_PIXELS))
        own = self.model_dump(exclude_none=True)
        found = other.model_copy(update=own)
        found._files = {
            name: path for name, path in other._files.items() if name not in own
        }
        return found


def parse_option(name: str, text: object) -> Any:
    """The value of the command line's option ``--name``, from text or as a model.toml has it.

    Raises:
        ValueError: the text is not one of its values.
    """
    try:
        return getattr(Overrides.model_validate({name: text}), name)
    except ValidationError as error:
        raise ValueError(f"{text!r}: {_message(error)}") from None


def _message(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def _option(name: str) -> str:
    return name.replace("_", "-")


def load_sidecar(model: Path) -> Overrides:
    """What ``model.toml`` next to ``model.onnx`` states; nothing where there is none."""
    path = model.with_suffix(".toml") if model.name else model
    if not path.is_file():
        return Overrides()
    stated = read_toml(path, str(path), "shorten or correct it", "docs/models.md")
    try:
        overrides = Overrides.model_validate(
            {key.replace("-", "_"): value for key, value in stated.items()}
        )
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        known = ", ".join(map(_option, Overrides.model_fields))
        raise UserError(
            f"{path}: {_option(place)}: {_message(error)}; known keys: {known}"
        ) from None
    nearby: dict[str, object] = {}
    if overrides.labels is not None:
        nearby["labels"] = path.parent / overrides.labels
    if (overrides.decode or "").endswith(".toml"):
        nearby["decode"] = str(path.parent / str(overrides.decode))
    found = overrides.model_copy(update=nearby)
    found._files = dict.fromkeys(found.model_dump(exclude_none=True), path)
    return found


def resolve_preprocessing(
    overrides: Overrides, own: Preprocessing | None, tensors: Sequence[Tensor]
) -> tuple[Preprocessing | None, str]:
    """The preprocessing of a model with these inputs, and a note that says what it became; None where it is data.

    An error names the values that a TOML file states.

    Args:
        overrides: what the user states.
        own: what the built-in or Model Zoo network says of itself, of which the overrides replace a part.
            None for a user's model: with none of scale, mean and std it is assumed to take MobileNetV2's
            ``v / 127.5 − 1``. A preset replaces both, and the other overrides a part of the preset. With a scale
            and neither, mean is 0 and std is 1. A detector and a segmentation see all of the photograph, stretched,
            where nothing says how it becomes the input's size.

    Returns:
        The note is empty where the network has its own preprocessing and nothing is overridden.

    Raises:
        UserError: the overrides contradict each other or the input tensor, or mean or std is given
            without the scale that says what they are relative to.
    """
    given = overrides.model_dump(exclude_none=True, exclude=_NOT_OF_PIXELS)
    decode = overrides.decode
    preset = preset_of(decode) if decode is not None else ""
    try:
        return _resolve(overrides, given, preset, own, tensors)
    except UserError as error:
        stated = [name for name in overrides._files if name in given]
        if not stated:
            raise
        names = " and ".join(map(_option, stated))
        raise UserError(
            f"{error}; {names} as {overrides._files[stated[0]]} says"
        ) from None


def _resolve(
    overrides: Overrides,
    given: dict[str, Any],
    decoder: str,
    own: Preprocessing | None,
    tensors: Sequence[Tensor],
) -> tuple[Preprocessing | None, str]:
    tensor = image_of(tensors)
    named = given.keys() & {"preprocessing", *_VALUES}
    plain = own is None and tensor is not None and tensor.dtype == "float32"
    unused = ""
    if decoder in PRESETS and plain and not named:
        # A decoder of known networks says how these see photographs.
        given["preprocessing"] = decoder
    elif decoder in PRESETS and plain and "preprocessing" not in named:
        options = " and ".join(f"--{name}" for name in _VALUES if name in named)
        unused = (
            f"; the preprocessing of --decode {overrides.decode} is not taken, because of {options}: "
            f"--preprocessing {decoder} takes it"
        )
    if tensor is None:
        shapes = ", ".join(f"{list(each.shape)}" for each in tensors)
        what = f"the input {shapes} is data, not an image"
        files = f".npy files of {tensors[0].dtype}"
        if len(tensors) > 1:
            what = f"the inputs {shapes} are data, none is an image"
            files = ".npz files with an array for each"
        if given:
            names = ", --".join(map(_option, given))
            raise UserError(f"--{names}: {what}; leave it out")
        return None, f"{what}: run and check take {files}"
    height, width = tensor.size
    raw = tensor.dtype != "float32" and tensor.quantised is None
    if raw:
        # The network takes pixels as they are stored, and scales them itself.
        mean = 0.0 if tensor.dtype == "uint8" else 128.0
        own = family.preprocessing(height, width).model_copy(
            update={**PIXELS, "mean": (mean,)}
        )
    crop = given.get("crop", (height, width))
    if (crop[0], crop[-1]) != (height, width):
        shape = "×".join(map(str, crop))
        raise UserError(
            f"crop {shape}: the model's input is {height}×{width}; leave --crop out"
        )
    preset = dict(PRESETS.get(given.get("preprocessing", ""), {}))
    if raw and preset:
        if given["preprocessing"] != "none":
            raise UserError(
                f"--preprocessing {given['preprocessing']}: the input takes pixels as {tensor.dtype}; give "
                "--preprocessing none, --fit or --channel-order"
            )
        preset["mean"] = (mean,)
    stated = preset | given
    missing = [name for name in _VALUES if name not in stated]
    values = (own or family.preprocessing(height, width)).model_dump()
    zero = 0 in given.get("std", ())
    if own is None and 0 < len(missing) < 3 and "scale" in missing and not zero:
        names = " and ".join(f"--{name}" for name in ("mean", "std") if name in given)
        raise UserError(
            f"preprocessing: {names} without --scale; add --scale 1/255 where pixels are 0 to 1 in "
            "training, or --scale 1 where they are 0 to 255"
        )
    neutral = "scale" in stated and (own is None or missing == ["mean", "std"])
    if neutral:
        values |= {"mean": (0.0,), "std": (1.0,)}
    dense = overrides.decode is not None or overrides.task in ("detect", "segment")
    whole = dense and values["fit"] == "crop" and not stated.keys() & _GEOMETRY
    if whole:
        values["fit"] = "stretch"
    values |= _geometry(values, stated, given, (height, width))
    kept = {"scale", "mean", "std", "interpolation", "pad", "channel_order"}
    values |= {name: value for name, value in stated.items() if name in kept}
    values["assumed"] = own is None and len(missing) == len(_VALUES)
    channels = max(len(values["mean"]), len(values["std"]))
    for name in ("mean", "std"):
        if len(values[name]) == 1:
            values[name] *= channels
    try:
        resolved = Preprocessing.model_validate(values)
    except ValidationError as error:
        place = [str(part) for part in error.errors()[0]["loc"][:1]]
        text = ": ".join([*place, _message(error)])
        see = "--resize" if "resize" in text else "--mean, --std and --scale"
        raise UserError(f"preprocessing: {text}; see {see}") from None
    if len(resolved.mean) not in (1, tensor.channels):
        raise UserError(
            f"preprocessing: {counted(len(resolved.mean), 'mean')}, but the model's input has "
            f"{counted(tensor.channels, 'channel')}; give --mean and --std one value each"
        )
    if resolved.channel_order == "BGR" and tensor.channels == 1:
        raise UserError(
            "--channel-order BGR: the model's input has 1 channel; leave it out"
        )
    has_own = own is not None and not preset
    note = _note(resolved, given, missing if neutral or not own else [], has_own)
    if tensor.dtype != "float32" and not given:
        how = "quantised" if tensor.quantised else "as it takes pixels"
        note = f"preprocessing: {resolved.formula()}; the input is {tensor.dtype}, {how}; {resolved.geometry()}"
    if whole and has_own:
        note += f"{'; ' if note else 'preprocessing: '}{resolved.geometry()}"
    if whole:
        note += " (a detector and a segmentation see all of the photograph; --fit crop cuts its centre out)"
    return resolved, note + unused


_VALUES = ("scale", "mean", "std")
_GEOMETRY = {"fit", "resize", "crop", "crop_fraction"}


def _geometry(
    values: dict[str, Any],
    stated: dict[str, Any],
    given: dict[str, Any],
    size: tuple[int, int],
) -> dict[str, Any]:
    """``fit``, ``resize`` and ``crop`` of an input of this (height, width).

    Args:
        values: what holds where nothing is stated.
        stated: the options and the preset; ``given``: the options alone.

    Raises:
        UserError: options that exclude each other.
    """
    resize, fraction = given.get("resize", ()), stated.get("crop_fraction")
    fit = stated.get("fit", values["fit"])
    if "fit" not in given and len(resize) == 2:
        fit = "stretch"
    asked = [name for name in ("resize", "crop_fraction") if name in given]
    if len(asked) == 2 or (fit == "letterbox" and asked):
        with_what = "--resize" if len(asked) == 2 else "--fit letterbox"
        raise UserError(
            f"--{_option(asked[-1])}: not together with {with_what}; leave one of them out"
        )
    if "pad" in given and fit != "letterbox":
        raise UserError(f"--pad: --fit {fit} pads nothing; add --fit letterbox")
    if resize and len(resize) != (1 if fit == "crop" else 2):
        wanted = "one number, the short side" if fit == "crop" else "H,W"
        raise UserError(
            f"--resize {','.join(map(str, resize))}: --fit {fit} takes {wanted}; change one of them"
        )
    found: Any = size
    if resize:
        found = resize if fit == "stretch" else resize[0]
    elif fit != "letterbox" and fraction is not None:
        # timm and torchvision round down: int(299 / 0.875) is 341.
        sides = tuple(int(side / fraction) for side in size)
        found = sides if fit == "stretch" else max(sides)
    elif fit == "crop":
        usual = family.preprocessing(*size).resize
        found = values["resize"] if values["fit"] == "crop" else usual
    return {"fit": fit, "resize": found, "crop": size}


def _note(
    resolved: Preprocessing, given: dict[str, Any], missing: list[str], has_own: bool
) -> str:
    formula, geometry = resolved.formula(), resolved.geometry()
    if missing and len(missing) < 3:
        neutral = " and ".join({"mean": "0", "std": "1"}[name] for name in missing)
        formula += f", {' and '.join(missing)} not given: {neutral}"
    names = ", ".join(_option(name) for name in given if name != "preprocessing")
    preset = given.get("preprocessing", "")
    if has_own:
        rest = f"{names} as given, the rest is the network's own"
        return f"preprocessing: {formula}; {geometry}; {rest}" if given else ""
    if resolved.assumed:
        return (
            f"preprocessing assumed, as MobileNetV2's: {formula}; {geometry}; "
            "see --scale, --mean, --std"
        )
    if preset:
        rest = f"; {names} as given" if names else ""
        return f"preprocessing {preset}: {formula}; {geometry}{rest}"
    return f"preprocessing: {formula}; {geometry}"


def _classes(shape: tuple[int, ...]) -> int:
    if len(shape) != 4:
        return prod(shape[-1:])
    return shape[1] if prod(shape[2:]) == 1 else min(shape[1], shape[-1])


def read_labels(
    path: Path | None, outputs: Sequence[Tensor], task: Task | None = None
) -> list[str]:
    """Class names, one a line of the file; none without one.

    Raises:
        UserError: the task has another number of classes; or without one no output has that many: scores
            [1, classes], rows [1, n, classes], or maps, the smaller of the axes next to height and width.
    """
    if path is None:
        return []
    try:
        names = read_text(path).splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: labels must be UTF-8 text, one a line") from None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --labels takes a text file, one name a line"
        ) from None
    classes = [_classes(x.shape) for x in outputs]
    if task and task.detector:
        classes = [task.detector.classes]
    elif task and task.kind == "segment":
        axis = task.class_axis
        # A map does not say how many classes there are.
        classes = [len(names) if axis is None else outputs[0].shape[axis]]
    if len(names) not in classes:
        raise UserError(
            f"{path}: {counted(len(names), 'label')}, but the model has "
            f"{' or '.join(counted(each, 'class') for each in classes)}"
        )
    return names
