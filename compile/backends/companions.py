"""C beside a network's own, such as a detector's decoder: a header and a source of each kind, from templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from netship.targets import templates
from netship.targets.escapes import C_TYPES


@dataclass(frozen=True)
class Port:
    """An output as the network's C function writes it.

    Attributes:
        shape: the manifest's.
        channels_last: [1, channels, height, width] lies as height, width, channels.
        scale, zero: what stored integers mean: (q − zero) × scale.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    scale: float = 1.0
    zero: int = 0

    @property
    def c_type(self) -> str:
        return C_TYPES[self.dtype]


def files(name: str, kind: str) -> tuple[str, str]:
    """The header and the source of a kind: "image", "labels", "detect" or "segment"."""
    return f"{name}_{kind}.h", f"{name}_{kind}.c"


def write(
    folder: Path,
    name: str,
    kind: str,
    source: Path,
    values: Mapping[str, object],
    **filters: Callable[..., str],
) -> None:
    """Write ``NAME_kind.h`` and ``NAME_kind.c`` into ``folder``.

    Args:
        name: the prefix of what they declare.
        source: the folder of ``kind.h.jinja`` and ``kind.c.jinja``.
        filters: of the templates, beside those of `templates.code_environment`.
    """
    environment = templates.code_environment(source)
    environment.filters |= filters
    for file, end in zip(files(name, kind), ("h", "c"), strict=True):
        template = environment.get_template(f"{kind}.{end}.jinja")
        text = template.render(values, name=name, NAME=name.upper())
        (folder / file).write_text(text, encoding="utf-8")
