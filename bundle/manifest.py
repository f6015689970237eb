"""manifest.json: everything that a build records of itself.

Longer than 450 lines: the schema is in one place.
"""

from __future__ import annotations

from itertools import accumulate
from math import isclose, prod
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from targets.errors import UserError
from targets.presets import Target

FORMAT_VERSION: Final = 2
MAX_MANIFEST_BYTES: Final = 4 << 20
_FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127


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


# Of an input or output; the gate's limit for any tensor of a network.
MAX_TENSOR_BYTES = 1 << 29
# Pixels of a photograph's short side; the long one may have eight times as many.
MAX_RESIZE = 4096


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Tensor(_Model):
    """A named tensor; ``layout`` is NCHW or NHWC for the input image and empty for outputs."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: Literal["float32"] = "float32"
    layout: Literal["NCHW", "NHWC", ""] = ""

    @model_validator(mode="after")
    def _of_sensible_size(self) -> Tensor:
        if self.nbytes > MAX_TENSOR_BYTES:
            raise ValueError(
                f"shape takes {self.nbytes} bytes, over {MAX_TENSOR_BYTES}"
            )
        return self

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)

    @property
    def channels(self) -> int:
        """Of an image; as ``size``, only where there is a layout."""
        return self.shape[1 if self.layout == "NCHW" else 3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        first = 2 if self.layout == "NCHW" else 1
        return self.shape[first], self.shape[first + 1]


class Preprocessing(_Model):
    """How a photograph becomes the input tensor.

    The short side is resized to ``resize`` pixels with ``interpolation``, the centre ``crop`` (height,
    width) is cut out, and each channel value v (0 to 255) becomes ``(v * scale - mean) / std``.
    """

    resize: Dimension
    crop: tuple[Dimension, Dimension]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    scale: FiniteFloat
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]

    def normalised(self, value: float) -> tuple[float, ...]:
        """What a channel value becomes: one number, or one a channel."""
        return tuple(
            (value * self.scale - mean) / std
            for mean, std in zip(self.mean, self.std, strict=True)
        )

    def formula(self) -> str:
        """What a channel value v becomes, in numbers, such as ``(v / 255 − 0.5) / 0.25``."""
        inverse = 1 / self.scale
        rounded = float(f"{inverse:.6g}")
        text = f"v × {self.scale:.6g}"
        if isclose(rounded, inverse, rel_tol=1e-9):
            text = f"v / {rounded:g}" if rounded != 1 else "v"
        if any(self.mean):
            text += f" − {_per_channel(self.mean)}"
        if any(value != 1 for value in self.std):
            text = f"({text})" if any(self.mean) else text
            text += f" / {_per_channel(self.std)}"
        return text

    def geometry(self) -> str:
        """What is resized to what, such as ``resize 256, crop 224×224, bilinear``."""
        height, width = self.crop
        return f"resize {self.resize}, crop {height}×{width}, {self.interpolation}"

    @model_validator(mode="after")
    def _sensible(self) -> Preprocessing:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                "mean and std need one value, or one a channel (three), each"
            )
        if self.scale == 0 or 0 in self.std:
            raise ValueError("scale and std must not be 0")
        extremes = (*self.normalised(0.0), *self.normalised(255.0))
        if not all(abs(extreme) <= _FLOAT32_MAX for extreme in extremes):
            raise ValueError("scale, mean and std lead beyond float32")
        if self.resize < max(self.crop):
            raise ValueError(
                f"resize {self.resize} is smaller than crop {max(self.crop)}"
            )
        most = max(MAX_RESIZE, 2 * max(self.crop))
        if self.resize > most:
            raise ValueError(f"resize {self.resize} is more than {most} pixels")
        return self


def _per_channel(values: tuple[float, ...]) -> str:
    """One number where all are the same, else all of them in brackets."""
    texts = [f"{value:.6g}" for value in dict.fromkeys(values)]
    if len(texts) == 1 and not texts[0].startswith("-"):
        return texts[0]
    return f"({', '.join(f'{value:.6g}' for value in values)})"


class ModelIdentity(_Model):
    """Which ONNX file was built: ``sha256`` is that of the file as it lies on disk."""

    name: FileName
    sha256: Sha256
    external_data: dict[str, Sha256] = {}


class TargetIdentity(_Model):
    """What the library was compiled for (see targets/presets.py)."""

    name: str
    tvm: str
    machine: str
    features: tuple[str, ...] = ()
    qemu_cpu: str = ""

    @classmethod
    def of(cls, target: Target) -> TargetIdentity:
        """The part of a target that a bundle records."""
        return cls(
            name=target.name,
            tvm=target.tvm,
            machine=target.machine,
            features=tuple(sorted(target.features)),
            qemu_cpu=target.qemu_cpu,
        )


class Group(_Model):
    """One fused group of operators, one kernel in the library.

    Attributes:
        layer: its name in the ONNX graph.
        task: AutoScheduler's workload key, where a tuning record gave the schedule.
        symbol: of the C function that the kernel calls, where it does.
    """

    name: str
    layer: str = ""
    task: str = ""
    symbol: str = ""
    operators: tuple[str, ...]
    output_shape: tuple[int, ...]
    macs: int


class Records(_Model):
    """The tuning records a build used: ``covered`` of ``tasks`` found in ``file``.

    ``refused`` names those that do not fit the task they are for, for a person.
    """

    file: FileName
    measured: str
    tasks: int
    covered: int
    refused: tuple[str, ...] = ()


class PlannedBuffer(_Model):
    """A tensor's place in the arena, and the steps between which it lives."""

    name: str
    nbytes: int
    offset: int
    first: int
    last: int


class MemoryPlan(_Model):
    """The arena of a standalone library.

    Attributes:
        lower_bound: bytes live at once at the worst step.
        outer_workspace_bytes, inner_workspace_bytes: what kernels need in addition, once and for each thread.
    """

    arena_bytes: int
    lower_bound: int
    outer_workspace_bytes: int
    inner_workspace_bytes: int
    buffers: tuple[PlannedBuffer, ...]


class Lowering(_Model):
    """How the network was lowered.

    Attributes:
        layout: of the activations inside; the input keeps its own.
        operators: how many operators with multiply-adds the network had, by Relay's name.
        groups: the fused groups, in the order they run.
        workspace_bytes: memory for activations, as planned.
        memory: the plan of a standalone library's arena.
        float_operators, float_shares: how many of an int8 network compute in float32, and of its multiply-adds and elements.
    """

    layout: Literal["NCHW", "NHWC"]
    reason: str
    records: Records | None = None
    operators: dict[str, int]
    groups: tuple[Group, ...]
    workspace_bytes: int
    memory: MemoryPlan | None = None
    float_operators: int | None = None
    float_shares: tuple[FiniteFloat, FiniteFloat] = (0.0, 0.0)


class CalibrationImage(_Model):
    """A photograph by which the ranges of activations were calibrated."""

    name: FileName
    sha256: Sha256


class Quantisation(_Model):
    """How an int8 bundle's network was quantised.

    Attributes:
        model: the QDQ graph next to the bundle's files, which stays on the host; "" where the given
            model is the QDQ graph.
        sha256: of that file.
        method: how the ranges of activations were chosen; "given" for a model that was QDQ already.
        images, skipped: the calibration images, and the number of files that could not be read.
        keep_float: the nodes that were left in float32 on request.
        accepted_loss: what it loses, where that was accepted on request.
        output_steps: the real value of one int8 step of each output, or how far a step before it moves a float32 one.
    """

    model: Literal["reference/quantised.onnx", ""] = ""
    sha256: Sha256 | None = None
    method: Literal["min-max", "percentile", "entropy", "given"] = "given"
    images: tuple[CalibrationImage, ...] = ()
    skipped: int = 0
    keep_float: tuple[str, ...] = ()
    accepted_loss: str = ""
    output_steps: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]


class Quantised(_Model):
    """Real value = (q − zero) × scale, q int8."""

    scale: FiniteFloat
    zero: Annotated[int, Field(ge=-128, le=127)]


class FirmwareTensor(_Model):
    """An input or output of a C project; an image's channels lie last.

    Attributes:
        quantised: what the stored integers mean; None where they mean themselves.
    """

    dtype: Literal["int8", "uint8", "int32", "int64", "bool", "float32"]
    nbytes: int = Field(gt=0)
    quantised: Quantised | None = None


class Firmware(_Model):
    """What a program must know of a microcontroller's C project; the header says the same.

    Attributes:
        cpu: as ``-mcpu`` names it.
        exact: every device gives the same bits: no float operator lies between integers.
        arena_bytes: with the input in it, at ``input_offset``.
        peak: the step that needs the most.
        steps: their number; the manifest's groups name them.
        weights_bytes: in flash, with biases and multipliers.
    """

    cpu: str
    input: FirmwareTensor
    outputs: tuple[FirmwareTensor, ...] = Field(min_length=1)
    exact: bool
    arena_bytes: int
    input_offset: int
    peak: str
    steps: int
    weights_bytes: int

    @property
    def output_bytes(self) -> int:
        """Of all outputs, each aligned to 8 bytes where there are several."""
        return self.output_offsets[-1]

    @property
    def output_offsets(self) -> tuple[int, ...]:
        """Where each output begins in memory that has them all; last their bytes."""
        *before, last = self.outputs
        begins = accumulate((-(-each.nbytes // 8) * 8 for each in before), initial=0)
        offsets = tuple(begins)
        return *offsets, offsets[-1] + last.nbytes


class Golden(_Model):
    """The files of one input, of the reference's outputs for it, and of how far each of their elements may be off."""

    input: RelativePath
    outputs: tuple[RelativePath, ...]
    tolerances: tuple[RelativePath, ...]

    @property
    def paths(self) -> tuple[RelativePath, ...]:
        return self.input, *self.outputs, *self.tolerances


_IS_SOURCE = {"bundle": False, "standalone": False, "c": True}


class Manifest(_Model):
    """Everything a host, a device or a person needs to know of a bundle.

    Attributes:
        format: "bundle" needs TVM's runtime on the device, "standalone" is a C library of its own,
            "c" is C source for a microcontroller.
        name: the prefix of a standalone library's functions.
        library: the compiled model, or the C source of it.
        firmware: of C source, None otherwise.
        quantisation: of an int8 network, None otherwise.
    """

    format_version: Literal[2] = FORMAT_VERSION
    format: Literal["bundle", "standalone", "c"] = "bundle"
    name: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)] = (
        "model"
    )
    library: RelativePath = "model.so"
    model: ModelIdentity
    target: TargetIdentity
    engine: str
    threads: Annotated[int, Field(gt=0, le=1024)]
    input: Tensor
    outputs: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    probabilities: bool
    preprocessing: Preprocessing
    labels: RelativePath | None = None
    lowering: Lowering
    firmware: Firmware | None = None
    quantisation: Quantisation | None = None
    golden: Annotated[tuple[Golden, ...], Field(min_length=1)]
    files: dict[RelativePath, Sha256]
    measured: dict[str, Any] = {}

    @property
    def is_source(self) -> bool:
        """Whether the library is source, not machine code for Linux."""
        return _IS_SOURCE[self.format]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        named = [path for entry in self.golden for path in entry.paths]
        named += [self.labels] if self.labels else []
        for path in [self.library, *named]:
            if path not in self.files:
                raise ValueError(f"{path} is named but has no hash")
        counts = [len(each) for e in self.golden for each in (e.outputs, e.tolerances)]
        counts += [len(self.quantisation.output_steps)] if self.quantisation else []
        if any(count != len(self.outputs) for count in counts):
            raise ValueError("golden data, output_steps and outputs differ in number")
        self._check_input()
        return self

    def _check_input(self) -> None:
        if len(self.input.shape) != 4 or not self.input.layout:
            raise ValueError("the input is not an image [1, C, H, W] or [1, H, W, C]")
        crop, size = self.preprocessing.crop, self.input.size
        if crop != size:
            raise ValueError(f"crop {crop} is not the input's size {size}")
        if len(self.preprocessing.mean) not in (1, self.input.channels):
            raise ValueError(
                f"{len(self.preprocessing.mean)} means for {self.input.channels} channels"
            )

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def parse(text: bytes, where: str) -> Manifest:
    """Read an untrusted manifest.

    Args:
        where: the file's name, for the error.

    Raises:
        UserError: not JSON, of a newer format, or not consistent in itself.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{where}: more than {MAX_MANIFEST_BYTES} bytes is no manifest; build the bundle again"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if place == "format_version":
            version = f"format version {first['input']!r}, this program reads {FORMAT_VERSION}"
            raise UserError(
                f"{where}: {version}; build the bundle again with this version"
            ) from None
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(
            f"{where}: not a valid manifest ({what}); build the bundle again"
        ) from None
