"""manifest.json: everything that a build records of itself.

Longer than 450 lines: the schema is in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import isclose, prod
from typing import Annotated, Any, Final, Literal

from pydantic import (
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from netship.bundle.fields import Dimension, FileName, RelativePath, Section, Sha256
from netship.bundle.task import Kind, Task, scores_classes
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.presets import Target

FORMAT_VERSION: Final = 4
MAX_MANIFEST_BYTES: Final = 4 << 20
_FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127


# Of an input or output; the gate's limit for any tensor of a network.
MAX_TENSOR_BYTES = 1 << 29
# Pixels of a photograph's short side; the long one may have eight times as many.
MAX_RESIZE = 4096


Interpolation = Literal["bilinear", "bicubic", "nearest", "area", "lanczos"]
Fit = Literal["crop", "stretch", "letterbox"]
ChannelOrder = Literal["RGB", "BGR"]
Byte = Annotated[int, Field(ge=0, le=255)]
Dtype = Literal["float32", "int64", "int32", "int8", "uint8", "bool"]
_ITEM_BYTES: Final = {"float32": 4, "int64": 8, "int32": 4}


class Quantised(Section):
    """Real value = (q − zero) × scale, q int8 or uint8."""

    scale: Annotated[FiniteFloat, Field(gt=0)]
    zero: Annotated[int, Field(ge=-128, le=255)]


class Tensor(Section):
    """A named tensor.

    Attributes:
        layout: the order of the axes of an input of rank 4, empty where none is known, and of outputs.
        quantised: what the stored values of an int8 or uint8 input mean to the network; None: themselves.
        choices: of an input of indices: how many there are to choose from; 0 where that is not known.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: Dtype = "float32"
    layout: Literal["NCHW", "NHWC", ""] = ""
    quantised: Quantised | None = None
    choices: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _of_sensible_size(self) -> Tensor:
        if self.nbytes > MAX_TENSOR_BYTES:
            raise ValueError(
                f"shape takes {self.nbytes} bytes, over {MAX_TENSOR_BYTES}"
            )
        if self.layout and len(self.shape) != 4:
            raise ValueError(
                f"{self.layout} with {len(self.shape)} dimensions is not an image"
            )
        return self

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return _ITEM_BYTES.get(self.dtype, 1) * self.elements

    @property
    def is_image(self) -> bool:
        """Whether photographs fit it: 1 or 3 channels. All else is data, for arrays."""
        return bool(self.layout) and self.channels in (1, 3)

    @property
    def channels(self) -> int:
        """Of an image; as ``size``, only where there is a layout."""
        return self.shape[1 if self.layout == "NCHW" else 3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        first = 2 if self.layout == "NCHW" else 1
        return self.shape[first], self.shape[first + 1]


def image_of(inputs: Iterable[Tensor]) -> Tensor | None:
    """The input that photographs become; None where all are data."""
    return next((each for each in inputs if each.is_image), None)


class Scaling(Section):
    """What a network makes itself of a byte v of its image: ``(v * scale - mean) / std``, with one mean and std or one a channel.

    Attributes:
        layout: of the image in the model's own file.
    """

    layout: Literal["NCHW", "NHWC"]
    scale: FiniteFloat
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]


class Preprocessing(Section):
    """How a photograph becomes the input tensor, before an int8 or uint8 one is quantised.

    The photograph is resized with ``interpolation`` ("area" is the mean of the pixels under one) and becomes
    ``crop`` (height, width) by ``fit``; each channel value v (0 to 255) then becomes ``(v * scale - mean) / std``.

    Attributes:
        resize: the short side for the fit "crop", (height, width) for the others.
        fit: "crop" cuts out the centre; "stretch" does too, of a photograph whose sides have become ``resize``;
            "letterbox" keeps the whole photograph and its aspect, and fills the rest with ``pad``.
        channel_order: of the input's channels, and so of ``mean`` and ``std``.
        assumed: nobody has stated scale, mean and std; they are a guess.
        inside: of a network that takes bytes on request, the scaling that it does itself.
    """

    resize: Dimension | tuple[Dimension, Dimension]
    crop: tuple[Dimension, Dimension]
    interpolation: Interpolation = "bilinear"
    fit: Fit = "crop"
    pad: Byte = 0
    channel_order: ChannelOrder = "RGB"
    scale: FiniteFloat
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    assumed: bool = False
    inside: Scaling | None = None

    def normalised(self, value: float) -> tuple[float, ...]:
        """What a channel value becomes: one number, or one a channel."""
        return tuple(
            (value * self.scale - mean) / std
            for mean, std in zip(self.mean, self.std, strict=True)
        )

    def formula(self) -> str:
        """What a channel value v becomes, in numbers, such as ``(v / 255 − 0.5) / 0.25``; inside the network too."""
        if self.inside:
            own = self.inside.model_dump(exclude={"layout"})
            return f"v, in the network {self.model_copy(update={**own, 'inside': None}).formula()}"
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
        size = "×".join(map(str, self.crop))
        if isinstance(self.resize, int):
            text = f"resize {self.resize}, crop {size}"
        elif self.fit == "letterbox":
            text = f"letterbox {size}, pad {self.pad}"
        else:
            text = f"stretch to {'×'.join(map(str, self.resize))}"
            text += f", crop {size}" if self.resize != self.crop else ""
        order = ", BGR" if self.channel_order == "BGR" else ""
        return f"{text}, {self.interpolation}{order}"

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
        if isinstance(self.resize, int) != (self.fit == "crop"):
            raise ValueError(f"resize has a wrong number of sides for {self.fit}")
        if isinstance(self.resize, int):
            sides = [(self.resize, max(self.crop))]
        else:
            sides = list(zip(self.resize, self.crop, strict=True))
        if self.fit == "letterbox" and self.resize != self.crop:
            raise ValueError("a letterbox has the size of the crop")
        most = max(MAX_RESIZE, 2 * max(self.crop))
        for resize, crop in sides:
            if resize < crop:
                raise ValueError(f"resize {resize} is smaller than crop {crop}")
            if resize > most:
                raise ValueError(f"resize {resize} is more than {most} pixels")
        return self


def _per_channel(values: tuple[float, ...]) -> str:
    """One number where all are the same, else all of them in brackets."""
    texts = [f"{value:.6g}" for value in dict.fromkeys(values)]
    if len(texts) == 1 and not texts[0].startswith("-"):
        return texts[0]
    return f"({', '.join(f'{value:.6g}' for value in values)})"


class ModelIdentity(Section):
    """Which ONNX file was built: ``sha256`` is that of the file as it lies on disk."""

    name: FileName
    sha256: Sha256
    external_data: dict[str, Sha256] = Field(default_factory=dict)


class TargetIdentity(Section):
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


class Group(Section):
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
    macs: Annotated[int, Field(ge=0, lt=1 << 60)]


class Records(Section):
    """The tuning records a build used: ``covered`` of ``tasks`` found in ``file``, ``fitted`` by a neighbour's record.

    ``gain`` is the share of the tasks' time that records of their own may save, estimated. ``refused`` names those that
    do not fit the task they are for, for a person.
    """

    file: FileName
    measured: str
    tasks: int
    covered: int
    fitted: int = 0
    gain: FiniteFloat = 0.0
    refused: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether each task has a record of its own."""
        return self.covered == self.tasks


class PlannedBuffer(Section):
    """A tensor's place in the arena, and the steps between which it lives."""

    name: str
    nbytes: int
    offset: int
    first: int
    last: int


class MemoryPlan(Section):
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


class Lowering(Section):
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

    def groups_of(self, kernels: Iterable[str]) -> list[Group | None]:
        """The group of each kernel, of names in the order they run: layers of one shape share a kernel, and its name."""
        left: dict[str, list[Group]] = {}
        for group in self.groups:
            left.setdefault(group.name, []).append(group)
        found = (left.get(name.removeprefix("tvmgen_default_")) for name in kernels)
        return [
            each.pop(0) if each and len(each) > 1 else each[0] if each else None
            for each in found
        ]


class CalibrationImage(Section):
    """A photograph by which the ranges of activations were calibrated."""

    name: FileName
    sha256: Sha256


class QuantisedWay(Section):
    """A way to quantise a network, judged against float32 on images that did not calibrate it.

    Attributes:
        bias_correction: biases take back what the rounding of weights moves; False of ONNX Runtime's quantiser as it is.
        kept: the layers in float32.
        cosine, decibels: the least of an output, all images together; signal to noise.
        same: of a classifier, on how many images the best class is float32's.
        ties: of these, on how many it is another one that float32 has as good.
    """

    method: Literal["min-max", "percentile", "entropy"]
    bias_correction: bool
    kept: tuple[str, ...]
    cosine: FiniteFloat
    decibels: FiniteFloat
    images: int = Field(ge=1)
    same: int | None = Field(ge=0)
    ties: int = Field(ge=0)


class LayerLoss(Section):
    """By how many dB the signal to noise falls in a layer of int8, and the layer's share of the multiply-adds."""

    layer: str
    fall_decibels: FiniteFloat
    multiply_adds: FiniteFloat


class Judging(Section):
    """What was tried where int8 lost too much.

    Attributes:
        taken: which of the ways.
        layers: by the usual way, those that lose most.
    """

    ways: tuple[QuantisedWay, ...] = Field(min_length=1)
    taken: int = Field(ge=0)
    layers: tuple[LayerLoss, ...]


class Quantisation(Section):
    """How an int8 bundle's network was quantised.

    Attributes:
        model: the QDQ graph next to the bundle's files, which stays on the host; "" where the given
            model is the QDQ graph.
        sha256: of that file.
        method: how the ranges of activations were chosen; "given" for a model that was QDQ already.
        images, skipped: the calibration images, and the number of files that could not be read.
        keep_float: the nodes that were left in float32 on request.
        kept_float: the layers that were left in float32 because too much would be lost.
        judging: what was tried, where the usual way lost too much.
        accepted_loss: what it loses, where that was accepted on request.
        output_steps: the real value of one int8 step of each output, or how far a step before it moves a float32 one.
    """

    model: Literal["reference/quantised.onnx", ""] = ""
    sha256: Sha256 | None = None
    method: Literal["min-max", "percentile", "entropy", "given"] = "given"
    images: tuple[CalibrationImage, ...] = ()
    skipped: int = 0
    keep_float: tuple[str, ...] = ()
    kept_float: tuple[str, ...] = ()
    judging: Judging | None = None
    accepted_loss: str = ""
    output_steps: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]


class InFloat32(Section):
    """An operator of a float16 network that computes in float32.

    Attributes:
        tensor: its first output.
    """

    tensor: str
    node: str
    kind: str
    reason: str


class Float16(Section):
    """What of a network in float16 stays in float32, and by how many inputs that was found.

    Attributes:
        images, seeded: photographs or arrays of the user's, and inputs that the build made.
        float32_sums: the convolutions of float16 that add in float32.
    """

    images: int = Field(ge=0)
    seeded: int = Field(ge=0)
    float32: tuple[InFloat32, ...]
    float32_sums: tuple[str, ...]


class BFloat16(Section):
    """What of a network in bfloat16 stays in float32, and by how many inputs that was found.

    Attributes:
        images, seeded: photographs or arrays of the user's, and inputs that the build made.
        float32: of convolutions and fully connected layers; every other operator computes in float32.
    """

    images: int = Field(ge=0)
    seeded: int = Field(ge=0)
    float32: tuple[InFloat32, ...]


Numbers = Literal["int8", "float16", "float32"]
"""What a layer computes in, of those that --precision auto chooses from."""


class LayerPrecision(Section):
    """A layer of a network of mixed precision.

    Attributes:
        costs, losses: by what it could compute in: its share of an inference's cost, and what the network loses where
            it alone does so.
    """

    layer: str
    numbers: Numbers
    costs: dict[Numbers, FiniteFloat]
    losses: dict[Numbers, FiniteFloat]


class TradeoffPoint(Section):
    """A choice that was measured.

    Attributes:
        cost: of an inference, by the search's model, or metered.
        layers: how many compute in what.
    """

    cost: FiniteFloat
    loss: FiniteFloat
    layers: dict[Numbers, int]


class Precision(Section):
    """What --precision auto chose, and among what.

    Attributes:
        max_loss: that was asked for: the mean over the images of the largest error of an output, of its float32 range.
        images: by which losses were measured.
        unit: of the costs.
        simulated_loss: of what was chosen, by ONNX Runtime.
        curve: what was measured, from the fastest to float32.
    """

    max_loss: FiniteFloat
    images: int = Field(gt=0)
    unit: Literal["cycles", "weighted multiply-adds"]
    cost: FiniteFloat
    simulated_loss: FiniteFloat
    layers: tuple[LayerPrecision, ...]
    curve: tuple[TradeoffPoint, ...]

    @property
    def pareto(self) -> tuple[TradeoffPoint, ...]:
        """Of the curve those points to which no other is preferable in both."""
        found: list[TradeoffPoint] = []
        for each in sorted(self.curve, key=lambda point: (point.cost, point.loss)):
            if not found or each.loss < found[-1].loss:
                found.append(each)
        return tuple(found)


class FirmwareTensor(Section):
    """An input or output of a C project; an image's channels lie last.

    Attributes:
        quantised: what the stored integers mean; None where they mean themselves.
    """

    dtype: Dtype
    nbytes: int = Field(gt=0)
    quantised: Quantised | None = None


class FirmwareArena(Section):
    """The part of a C project's arena that lies in one memory.

    Attributes:
        begin, nbytes: of the arena; the parts lie one after the other.
        size: of the memory.
        moved: bytes that an inference reads and writes there.
        cycles: that they make the core wait, estimated.
    """

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=24)]
    begin: int = Field(ge=0)
    nbytes: int = Field(gt=0)
    size: int = Field(gt=0)
    moved: int = Field(ge=0)
    cycles: int = Field(ge=0)


class Firmware(Section):
    """What a program must know of a microcontroller's C project; the header says the same.

    Attributes:
        cpu: as ``-mcpu`` names it.
        exact: every device gives the same bits: no float operator lies between integers.
        arena_bytes: with the inputs in it, at ``input_offsets``.
        peak: the step that needs the most.
        steps: their number; the manifest's groups name them.
        weights_bytes: in flash, with biases and multipliers.
        arenas: where the arena is split over several memories, its parts.
        weights_in: the memory of the weights; empty where the build was not told of memories.
    """

    cpu: str
    inputs: Annotated[tuple[FirmwareTensor, ...], Field(min_length=1)]
    outputs: tuple[FirmwareTensor, ...] = Field(min_length=1)
    exact: bool
    arena_bytes: int = Field(gt=0)
    input_offsets: tuple[Annotated[int, Field(ge=0)], ...]
    peak: str
    steps: int = Field(gt=0)
    weights_bytes: int = Field(ge=0)
    arenas: tuple[FirmwareArena, ...] = ()
    weights_in: Annotated[str, Field(pattern="^[a-z0-9_]*$", max_length=24)] = ""

    @model_validator(mode="after")
    def _inputs_lie_in_the_arena(self) -> Firmware:
        if len(self.input_offsets) != len(self.inputs):
            raise ValueError("inputs and input_offsets differ in number")
        for begin, each in zip(self.input_offsets, self.inputs, strict=True):
            if begin + each.nbytes > self.arena_bytes:
                raise ValueError("an input does not lie in the arena")
        for arena in self.arenas:
            if arena.begin % 8 or arena.begin + arena.nbytes > self.arena_bytes:
                raise ValueError("a part of the arena does not lie in it")
        return self

    @property
    def placed(self) -> str:
        """What lies in which memory, for a person; empty where the build was not told of memories."""
        parts = [
            f"{each.name} {each.nbytes:,} of {each.size:,} bytes"
            + (f" ({each.cycles:,} cycles of waiting, estimated)" * (each.cycles > 0))
            for each in self.arenas
        ]
        parts += [f"weights in {self.weights_in}"] if self.weights_in else []
        return ", ".join(parts)

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


class Golden(Section):
    """The files of the inputs of one inference, of the reference's outputs for it, and of how far each of their elements may be off."""

    inputs: tuple[RelativePath, ...]
    outputs: tuple[RelativePath, ...]
    tolerances: tuple[RelativePath, ...]

    @property
    def paths(self) -> tuple[RelativePath, ...]:
        return *self.inputs, *self.outputs, *self.tolerances


_IS_SOURCE = {"bundle": False, "standalone": False, "c": True}


class Manifest(Section):
    """Everything a host, a device or a person needs to know of a bundle.

    Attributes:
        format: "bundle" needs TVM's runtime on the device, "standalone" is a C library of its own,
            "c" is C source for a microcontroller.
        name: the prefix of a standalone library's functions.
        library: the compiled model, or the C source of it.
        preprocessing: of the input that is an image, None where all are data.
        task: what the outputs are for; None where nothing says it: classes, if they look so.
        firmware: of C source, None otherwise.
        quantisation: of an int8 network, None otherwise.
        float16: of a network in float16, None otherwise.
        precision: where the build chose what each layer computes in, None otherwise.
    """

    format_version: Literal[4] = FORMAT_VERSION
    format: Literal["bundle", "standalone", "c"] = "bundle"
    name: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)] = (
        "model"
    )
    library: RelativePath = "model.so"
    model: ModelIdentity
    target: TargetIdentity
    engine: str
    threads: Annotated[int, Field(gt=0, le=1024)]
    inputs: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    outputs: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    probabilities: bool
    preprocessing: Preprocessing | None
    labels: RelativePath | None = None
    task: Task | None = None
    lowering: Lowering
    firmware: Firmware | None = None
    quantisation: Quantisation | None = None
    float16: Float16 | None = None
    bfloat16: BFloat16 | None = None
    precision: Precision | None = None
    golden: Annotated[tuple[Golden, ...], Field(min_length=1)]
    files: dict[RelativePath, Sha256]
    measured: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_source(self) -> bool:
        """Whether the library is source, not machine code for Linux."""
        return _IS_SOURCE[self.format]

    @property
    def numbers(self) -> Numbers | Literal["bfloat16"]:
        """What the network computes in."""
        if self.quantisation:
            return "int8"
        if self.bfloat16:
            return "bfloat16"
        return "float16" if self.float16 else "float32"

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
        if any(len(entry.inputs) != len(self.inputs) for entry in self.golden):
            raise ValueError("golden data and inputs differ in number")
        facts = [
            self.measured.get(x) or {}
            for x in ("verification", "int8", "float16", "bfloat16")
        ]
        if not all(isinstance(each, dict) for each in facts):
            raise ValueError("a verdict or a loss of measured is no object")
        self._check_image()
        self._check_firmware()
        if self.task:
            if self.task.detector and self.image is None:
                raise ValueError("a detector has no image")
            self.task.check([output.shape for output in self.outputs])
        return self

    def _check_firmware(self) -> None:
        if self.firmware is None:
            return
        ports = (*self.firmware.inputs, *self.firmware.outputs)
        found = [each.nbytes / _ITEM_BYTES.get(each.dtype, 1) for each in ports]
        if found != [each.elements for each in (*self.inputs, *self.outputs)]:
            raise ValueError("the firmware's inputs and outputs have other sizes")
        if len(self.lowering.groups) != self.firmware.steps:
            raise ValueError("the firmware's steps and groups differ in number")

    @property
    def image(self) -> Tensor | None:
        """The input that photographs become; None where all are data."""
        return image_of(self.inputs)

    @property
    def scores_classes(self) -> bool:
        """Whether the first output is one score a class."""
        first = self.outputs[0]
        return scores_classes(first.shape, first.dtype, len(self.outputs))

    @property
    def kind(self) -> Kind:
        """What the outputs are for: what the task says, or what they look like."""
        if self.task:
            return self.task.kind
        return "classify" if self.scores_classes else "raw"

    def _check_image(self) -> None:
        if len({each.name for each in self.inputs}) != len(self.inputs):
            raise ValueError("two inputs have one name")
        images = [each for each in self.inputs if each.is_image]
        if len(images) != (self.preprocessing is not None):
            raise ValueError("one image has preprocessing, data has none")
        if self.preprocessing is None:
            return
        (image,) = images
        if image.dtype not in ("float32", "int8", "uint8"):
            raise ValueError(f"the image is {image.dtype}")
        crop, size = self.preprocessing.crop, image.size
        if crop != size:
            raise ValueError(f"crop {crop} is not the input's size {size}")
        if len(self.preprocessing.mean) not in (1, image.channels):
            raise ValueError(
                f"{counted(len(self.preprocessing.mean), 'mean')} for {counted(image.channels, 'channel')}"
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
