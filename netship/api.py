"""What ``import netship`` offers: build, open, check, tune and estimate, as the commands do them, without their output.

A path is text or a `Path`. ``on_progress`` is called with one line of text for each stage and each note, such as
``print``. What a user can correct raises `Error`, whose text says what, where and what to do.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from netship import arguments
from netship.bundle import decode, inputs
from netship.bundle.detections import Detections
from netship.bundle.store import Bundle, open_bundle
from netship.bundle.task import Task
from netship.compile import build as build_command
from netship.compile.backends.request import Format
from netship.compile.precision import search as precision_search
from netship.devices.sessions.session import Session
from netship.meter import __main__ as meter_command
from netship.meter.firmware import Inference
from netship.meter.operators import Metered
from netship.runtime_demo import check as check_command
from netship.runtime_demo.findings import Geometry
from netship.runtime_demo.options import add_device_options, open_session
from netship.runtime_demo.result import Answer, CheckResult, answers
from netship.targets import VERSION
from netship.targets.errors import UserError, refusal
from netship.targets.escapes import counted, shown
from netship.targets.progress import Progress
from netship.tuning import apart
from netship.tuning import tune as tune_command
from netship.tuning.tune import Tuned

__version__ = VERSION
Error = UserError
OnProgress = Callable[[str], None]
AnyPath = str | Path


class BuildOptions(TypedDict, total=False):
    """The options of ``netship build`` that have a default; their names and meanings are the same."""

    name: str
    threads: int
    input_shapes: Mapping[str, Sequence[int]]
    golden: AnyPath | Sequence[AnyPath]
    dump: AnyPath
    arena_limit: int | str
    flash_limit: int | str
    package: str | Sequence[str]
    memory: str
    part: str
    calibration: AnyPath | Sequence[AnyPath]
    input_type: Literal["uint8"]
    keep_float: str | Sequence[str]
    max_loss: float
    accept_loss: bool
    strict_int8: bool
    records: AnyPath | Sequence[AnyPath]
    require_tuned: bool


class DeviceOptions(TypedDict, total=False):
    """Where a build runs, as the options of ``netship run``; without any of them in this process."""

    ssh: str
    rpc: str
    tracker: str
    key: str
    board: Literal["emulated"]
    cpu: str
    threads: int
    priority: int
    wait: int


class TuneOptions(TypedDict, total=False):
    """The options of ``netship tune`` that have a default; their names and meanings are the same."""

    hours: float
    measure: Literal["here", "meter"]
    rpc: str | Sequence[str]
    ssh: str | Sequence[str]
    tracker: str
    key: str
    threads: int
    output: AnyPath
    warm: AnyPath | Sequence[AnyPath]
    tasks: str
    jobs: int
    precision: Literal["float32", "float16"]
    calibration: AnyPath | Sequence[AnyPath]


class EstimateOptions(TypedDict, total=False):
    """The options of ``netship meter``: the first two for a Cortex-A core, the others for a Cortex-M core."""

    board: str
    threads: Literal[1, 2, 4]
    part: str
    code: Literal["flash", "tcm"]
    weights: Literal["flash", "tcm", "external"]


class InputError(Error, ValueError):
    """An array is not what the network takes."""


@dataclass
class Network:
    """A build that is loaded on a device. Not thread-safe; close it, or use it in ``with``.

    A photograph is a file's path. A .npy or .npz file of the inputs may stand for it; boxes and maps are then in
    pixels of the input.

    Attributes:
        bundle: the build: its path and its manifest, with the shapes and types of the inputs and the outputs.
        session: the device, which also times and profiles.
    """

    bundle: Bundle
    session: Session
    _closed: bool = field(default=False, init=False, repr=False)

    def read(self, path: AnyPath) -> tuple[NDArray[Any], ...]:
        """The inputs in a file: of a photograph, by the build's preprocessing, of a .npy or an .npz file; batch 1.

        Raises:
            Error: no such file, or one that cannot become the inputs.
        """
        return self._read(path).tensors

    def run(self, *tensors: NDArray[Any]) -> list[NDArray[Any]]:
        """One inference.

        Args:
            tensors: of the shapes and types of ``bundle.manifest.inputs``.

        Returns:
            Every output, of the shapes and types of ``bundle.manifest.outputs``.

        Raises:
            InputError: another number, shape or type; also a ValueError.
            Error: NaN or infinity in it, the network is closed, or the device fails.
        """
        if self._closed:
            raise Error(f"{self.bundle.path}: the network is closed; open it again")
        wanted = self.bundle.manifest.inputs
        if len(tensors) != len(wanted):
            names = ", ".join(repr(shown(each.name)) for each in wanted)
            raise InputError(
                f"run: {counted(len(tensors), 'array')}, not {len(wanted)}; give one for each of {names}"
            )
        for given, port in zip(tensors, wanted, strict=True):
            found, todo = type(given).__name__, "make it a numpy array"
            if isinstance(given, np.ndarray):
                found, todo = f"{given.dtype} {list(given.shape)}", "reshape it"
                if given.dtype == port.dtype and given.shape == port.shape:
                    continue
                if given.dtype != port.dtype:
                    todo = "convert it with astype"
            raise InputError(
                f"run: input is {found}, not {port.dtype} {list(port.shape)} as {shown(port.name)!r}; {todo}"
            )
        return self.session.run(*tensors)

    def classify(self, photo: AnyPath) -> tuple[Answer, ...]:
        """The five best classes of a photograph, the best first.

        Raises:
            Error: the network is no classifier; as `read` and `run`.
        """
        self._expect("classify")
        output = self.run(*self.read(photo))[0]
        probabilities = self.bundle.manifest.probabilities
        return answers(output, probabilities, self.bundle.labels())

    def detect(self, photo: AnyPath) -> Detections:
        """The boxes found in a photograph, in its pixels, the best first.

        Raises:
            Error: the network is no detector; as `read` and `run`.
        """
        task, read = self._expect("detect"), self._read(photo)
        geometry = Geometry.of(self.bundle.manifest, read.size)
        return geometry.boxes(task, self.run(*read.tensors))

    def segment(self, photo: AnyPath) -> NDArray[np.int32]:
        """The class of each of a photograph's pixels: int32 [height, width], −1 where the network did not see it.

        Raises:
            Error: the network does not segment; as `read` and `run`.
        """
        task, read = self._expect("segment"), self._read(photo)
        at = Geometry.of(self.bundle.manifest, read.size)
        classes = decode.segment(task, self.run(*read.tensors))
        return decode.map_on_photograph(classes, at.network[::-1], at.place, at.size)

    def _read(self, path: AnyPath) -> inputs.Read:
        manifest = self.bundle.manifest
        file = arguments.path("photo", path)
        return inputs.read(file, manifest.inputs, manifest.preprocessing)

    def _expect(self, kind: str) -> Task:
        """The network's task; an Error where it is of another kind."""
        manifest = self.bundle.manifest
        task = manifest.task or Task(kind=manifest.kind)
        if task.kind != kind or (kind == "classify" and not manifest.scores_classes):
            use = "run" if task.kind in ("raw", kind) else task.kind
            raise Error(
                f"{self.bundle.path}: cannot {kind}, its task is {task.kind}; use {use}"
            )
        return task

    def close(self) -> None:
        """Free the device; the second time does nothing."""
        self._closed = True
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build(
    model: AnyPath,
    target: str = "native",
    *,
    output: AnyPath | None = None,
    format: Format | None = None,
    quantize: Literal["int8"] | None = None,
    precision: Literal["float32", "float16", "bfloat16", "auto"] = "float32",
    preprocessing: Mapping[str, object] | str | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[BuildOptions],
) -> Bundle:
    """Compile a network and compare it with ONNX Runtime; nothing half-made is left behind.

    Args:
        model: an .onnx or .tflite file, or the name of a network that ``netship build --model`` takes.
        target: a name of ``netship targets``, or a TVM target string.
        output: the folder of the build; ``out/MODEL-TARGET`` where None. A build that is there is replaced.
        format: "bundle", "standalone" or "c"; the target's where None.
        quantize: needs ``calibration``, the paths of at least 16 photographs.
        precision: of a float network's arithmetic; float16 and bfloat16 for targets that have them; "auto" chooses for each layer, and needs
            ``max_loss`` and ``calibration``.
        preprocessing: as the keys of a model.toml, such as ``{"scale": "1/255"}``, or the name of a preset.

    Returns:
        The build; ``manifest.measured["verification"]`` has its errors, in the output's own unit.

    Raises:
        Error: anything that the user can correct.
    """
    arguments.check_known("build", options, _known(build, BuildOptions), pixels=True)
    given = {
        **options,
        "model": arguments.path("model", model),
        "target": target,
        "output": output,
        "format": format,
        "quantize": quantize,
        "precision": precision,
    }
    shapes = arguments.mapping("input_shapes", given.pop("input_shapes", {}))
    given["input_shape"] = [
        f"{name}:{','.join(map(str, arguments.several(shape)))}"
        for name, shape in shapes.items()
    ]
    parsed = arguments.arguments(build_command.parser(), given)
    vars(parsed).update(dict(arguments.overrides(preprocessing or {})))
    request = build_command.request(parsed)
    with _Reported(on_progress) as progress:
        return precision_search.build(request, progress)


def open(
    bundle: AnyPath | Bundle,
    *,
    on_progress: OnProgress | None = None,
    **device: Unpack[DeviceOptions],
) -> Network:
    """Verify a build and load it on a device.

    Raises:
        Error: no build, a changed one, or the device cannot take it.
    """
    arguments.check_known("open", device, _known(open, DeviceOptions))
    parser = ArgumentParser(add_help=False)
    add_device_options(parser)
    parsed = arguments.arguments(parser, {**device, "bundle": _place(bundle)})
    with _Reported(on_progress) as progress:
        found = open_bundle(parsed.bundle)
        return Network(found, open_session(found, parsed, progress, most=1))


def check(
    bundle: AnyPath | Bundle,
    *,
    model: AnyPath | None = None,
    images: AnyPath | Sequence[AnyPath] = (),
    input: Mapping[str, AnyPath] | None = None,
    labels: AnyPath | None = None,
    masks: AnyPath | None = None,
    repeat: int | None = None,
    on_progress: OnProgress | None = None,
    **device: Unpack[DeviceOptions],
) -> CheckResult:
    """Compare a build with ONNX Runtime, and time both.

    Args:
        model: what it was built from; where None only the build's golden data are compared.
        images: photographs, .npy or .npz files, or folders of them; they need ``model``.
        input: .npy files of inputs that are the same for each image, by name.
        labels, masks: what is known of the images, as ``netship check`` takes it.
        repeat: inferences to time; where None 50, on an emulated board none.

    Returns:
        What was found; ``passed`` is the verdict. Errors are in the output's own unit, latencies in milliseconds.

    Raises:
        Error: no build, another model, or the device cannot take it.
    """
    arguments.check_known("check", device, _known(check, DeviceOptions))
    given = {
        **device,
        "bundle": _place(bundle),
        "model": model,
        "images": images,
        "labels": labels,
        "masks": masks,
        "repeat": repeat,
    }
    parsed = arguments.arguments(check_command.parser(), given)
    parsed.input = [
        (name, arguments.path(f"input {name!r}", file))
        for name, file in arguments.mapping("input", input or {}).items()
    ]
    with _Reported(on_progress) as progress:
        return check_command.check(parsed, progress)


def tune(
    model: AnyPath,
    target: str = "native",
    *,
    trials: int = 4000,
    on_progress: OnProgress | None = None,
    **options: Unpack[TuneOptions],
) -> Tuned:
    """Search for faster kernels; builds that find the log use its records.

    The same call continues a search that was interrupted.

    Args:
        trials: in all, those already in the log included.
        options: ``output`` is the log, by default ``tuned/TARGET-ORIGIN.json`` in the working folder.

    Returns:
        The log, its page, the gain and each task; times in seconds.

    Raises:
        Error: the target has nothing to tune, a board fails, or the log belongs to something else.
    """
    arguments.check_known("tune", options, _known(tune, TuneOptions))
    given = {**options, "model": model, "target": target, "trials": trials}
    parsed = arguments.arguments(tune_command.parser(), given)
    with _Reported(on_progress) as progress:
        return apart.run(tune_command.tune, parsed, progress)


def estimate(
    bundle: AnyPath | Bundle,
    cpu: str,
    *,
    on_progress: OnProgress | None = None,
    **options: Unpack[EstimateOptions],
) -> Metered | Inference:
    """Estimate an inference of a build on a core, operator by operator, under QEMU.

    Args:
        bundle: a bundle or a standalone library for a Cortex-A core, or a C project for a Cortex-M core.
        cpu: a core that ``netship meter --cpu`` takes, such as cortex-a72 or cortex-m4.
        options: ``board`` is the one whose memory a Cortex-A core has, such as rk3588; by default a Raspberry Pi.
            ``part`` is the microcontroller whose flash and caches count, such as stm32l4r5; without it memory
            never waits. ``code`` and ``weights`` say where they lie in the part, by default in flash.

    Returns:
        ``instructions``, which are exact, and estimated ``cycles``. Of a Cortex-A core they sum up those of
        ``operators`` (`Metered`), of a Cortex-M core those of ``steps`` (`Inference`).

    Raises:
        Error: another target, an unknown core, or QEMU is missing.
    """
    arguments.check_known("estimate", options, _known(estimate, EstimateOptions))
    given = {**options, "bundle": _place(bundle), "cpu": cpu}
    parsed = arguments.arguments(meter_command.parser(), given)
    with _Reported(on_progress) as progress:
        return meter_command.measure(parsed, progress.stage)


class _Reported(Progress):
    """Calls back instead of printing; of what the user can correct it makes an `Error`, as the commands do."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        super().__init__(quiet=True)
        self._on_progress = on_progress or (lambda line: None)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        error = rest[0]
        if isinstance(error, OSError | MemoryError) and (text := refusal(error)):
            raise Error(text) from error

    def stage(self, text: str) -> None:
        self._on_progress(text)

    def note(self, text: str) -> None:
        self._on_progress(text)


def _place(bundle: AnyPath | Bundle) -> AnyPath:
    return bundle.path if isinstance(bundle, Bundle) else bundle


def _known(function: Callable[..., object], more: type) -> set[str]:
    """The names of a function's options."""
    names = function.__annotations__.keys() | more.__annotations__.keys()
    return names - {"return", "options", "device"}
