"""What the sections of a manifest are made of: values that are checked as they are read."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _plain_relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or ".." in parts
    ):
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


def _encodable(name: str) -> str:
    """A file's name without the bytes that are no UTF-8, which Python keeps as halves of characters."""
    return name.encode("utf-8", errors="replace").decode()


FileName = Annotated[str, AfterValidator(_encodable)]
RelativePath = Annotated[str, AfterValidator(_plain_relative)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Dimension = Annotated[int, Field(gt=0, lt=1 << 24)]


class Section(BaseModel):
    """A part of a manifest: it cannot be changed, and nothing may be in it that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
