"""How photographs become the input: from the options, a TOML file next to the model, or the model's own."""

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


class Overrides(BaseModel):
    """What the user states of a model's preprocessing; None for what is left out.

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

    def with_defaults(self, other: Overrides) -> Overrides:
        """This, with what it leaves out taken from ``other``."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


def load_sidecar(model: Path) -> Overrides:
    """What ``model.toml`` next to ``model.onnx`` states; nothing where there is none.

    Raises:
        UserError: not TOML, an unknown key, a value of the wrong kind.
    """
    if not model.name:
        return Overrides()
    path = model.with_suffix(".toml")
    if not path.is_file():
        return Overrides()
    try:
        overrides = Overrides.model_validate(
            tomllib.loads(path.read_text(encoding="utf-8"))
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = ", ".join(Overrides.model_fields)
        raise UserError(
            f"{path}: {place}: {first['msg']}; known keys: {known}"
        ) from None
    if overrides.labels is not None:
        return overrides.model_copy(update={"labels": path.parent / overrides.labels})
    return overrides


def resolve_preprocessing(
    overrides: Overrides, own: Preprocessing | None, tensor: Tensor
) -> tuple[Preprocessing, bool]:
    """The preprocessing of a model with this input tensor, and whether the values were assumed.

    Args:
        overrides: what the user states.
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
    crop = overrides.crop or (height, width)
    if (crop[0], crop[-1]) != (height, width):
        shape = "×".join(map(str, crop))
        raise UserError(
            f"crop {shape}: the model's input is {height}×{width}; leave --crop out"
        )
    values = base.model_dump()
    values |= overrides.model_dump(
        exclude_none=True, exclude={"layout", "crop", "labels"}
    )
    if overrides.mean is not None and overrides.std is None:
        values["std"] = (1.0,) * len(overrides.mean)
    if overrides.std is not None and overrides.mean is None:
        values["mean"] = (0.0,) * len(overrides.std)
    try:
        resolved = Preprocessing.model_validate(values | {"crop": (height, width)})
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix(
            "Value error, "
        )
        raise UserError(
            f"preprocessing: {message}; see --mean, --std, --scale and --resize"
        ) from None
    if len(resolved.mean) not in (1, tensor.channels):
        raise UserError(
            f"preprocessing: {len(resolved.mean)} means, but the model's input has {tensor.channels} "
            "channel(s); give --mean and --std one value each"
        )
    assumed = own is None and (overrides.scale, overrides.mean, overrides.std) == (
        None,
        None,
        None,
    )
    return resolved, assumed


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
