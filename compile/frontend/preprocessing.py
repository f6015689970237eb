"""How photographs become a model's input: the user's word, a TOML beside the model, or the model's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from bundle.manifest import Dimension, Preprocessing, Tensor
from targets.errors import UserError

Layout = Literal["NCHW", "NHWC"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


class Stated(BaseModel):
    """What was stated of a model's preprocessing; None where nothing was.

    The names are those of the command line's options and of the TOML's keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout | None = None
    resize: Dimension | None = None
    crop: Annotated[tuple[Dimension, ...], BeforeValidator(_as_tuple)] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    scale: float | None = None
    mean: Annotated[tuple[float, ...], BeforeValidator(_as_tuple)] | None = None
    std: Annotated[tuple[float, ...], BeforeValidator(_as_tuple)] | None = None
    labels: Path | None = None

    def over(self, other: Stated) -> Stated:
        """This, with what it leaves out taken from ``other``."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


def beside(model: Path) -> Stated:
    """What ``model.toml`` beside ``model.onnx`` says; nothing where there is none.

    Raises:
        UserError: not TOML, an unknown key, a value of the wrong kind.
    """
    if not model.name:
        return Stated()
    path = model.with_suffix(".toml")
    if not path.is_file():
        return Stated()
    try:
        stated = Stated.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = ", ".join(Stated.model_fields)
        raise UserError(
            f"{path}: {place}: {first['msg']}; known keys: {known}"
        ) from None
    if stated.labels is not None:
        return stated.model_copy(update={"labels": path.parent / stated.labels})
    return stated


def settle(
    stated: Stated, own: Preprocessing | None, tensor: Tensor
) -> tuple[Preprocessing, bool]:
    """The preprocessing of a model with this input tensor, and whether the values were assumed.

    Args:
        stated: the user's word.
        own: what the built-in or Model Zoo network says of itself; None for a user's model, which
            is then assumed to take MobileNetV2's: ``v / 127.5 − 1``, short side 8/7 of the crop.

    Raises:
        UserError: the statement contradicts itself or the input tensor.
    """
    height, width = tensor.size
    base = own or Preprocessing(
        resize=round(max(height, width) * 256 / 224),
        crop=(height, width),
        scale=1 / 127.5,
        mean=(1.0,),
        std=(1.0,),
    )
    crop = stated.crop or (height, width)
    if (crop[0], crop[-1]) != (height, width):
        shape = "×".join(map(str, crop))
        raise UserError(
            f"crop {shape}: the model's input is {height}×{width}; leave --crop out"
        )
    values = base.model_dump()
    values |= stated.model_dump(exclude_none=True, exclude={"layout", "crop", "labels"})
    if stated.mean is not None and stated.std is None:
        values["std"] = (1.0,) * len(stated.mean)
    if stated.std is not None and stated.mean is None:
        values["mean"] = (0.0,) * len(stated.std)
    try:
        settled = Preprocessing.model_validate(values | {"crop": (height, width)})
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix(
            "Value error, "
        )
        raise UserError(
            f"preprocessing: {message}; see --mean, --std, --scale and --resize"
        ) from None
    if len(settled.mean) not in (1, tensor.channels):
        raise UserError(
            f"preprocessing: {len(settled.mean)} means, but the model's input has {tensor.channels} "
            "channel(s); give --mean and --std one value each"
        )
    assumed = own is None and (stated.scale, stated.mean, stated.std) == (
        None,
        None,
        None,
    )
    return settled, assumed


def read_labels(path: Path, classes: int) -> list[str]:
    """Class names, one a line.

    Raises:
        UserError: unreadable, or not ``classes`` lines.
    """
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: labels must be UTF-8 text, one a line") from None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --labels takes a text file, one name a line"
        ) from None
    if len(names) != classes:
        raise UserError(
            f"{path}: {len(names)} labels, but the model has {classes} classes"
        )
    return names
