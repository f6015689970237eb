"""What ``import netship`` offers: build, open, check, tune and estimate, as the commands do them, without their output.

A path is text or a `Path`. ``on_progress`` is called with one line of text for each stage and each note, such as
``print``. What a user can correct raises `Error`, whose text says what, where and what to do.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

from numpy.typing import NDArray

from netship.bundle import inputs
from netship.bundle.store import Bundle, open_bundle
from netship.compile import driver
from netship.compile.backends.request import BuildRequest, Format
from netship.compile.frontend.preprocessing import Overrides, parse_option
from netship.devices.sessions.session import Session
from netship.meter.operators import Metered, measure_bundle
from netship.runtime_demo import check as check_command
from netship.runtime_demo.options import add_device_options, open_session
from netship.runtime_demo.result import Answer, CheckResult, answers
from netship.targets import VERSION
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.targets.progress import Progress
from netship.tuning import tune as tune_command
from netship.tuning.tune import Tuned

__version__ = VERSION
Error = UserError
OnProgress = Callable[[str], None]


class BuildOptions(TypedDict, total=False):
    """The options of ``netship build`` that have a default; their names and meanings are the same."""

    name: str
    threads: int
    input_shapes: dict[str, tuple[int, ...]]
    golden: tuple[Path, ...]
    dump: Path
    arena_limit: int
    flash_limit: int
    calibration: tuple[Path, ...]
    keep_float: tuple[str, ...]
    accept_loss: bool
    strict_int8: bool
    records: tuple[Path, ...]
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
    rpc: list[str]
    ssh: list[str]
    tracker: str
    key: str
    threads: int
    output: Path
    warm: list[Path]
    tasks: str
    jobs: int


@dataclass(frozen=True)
class Network:
    """A build that is loaded on a device. Not thread-safe; close it, or use it in ``with``.

    Attributes:
        bundle: the build: its path and its manifest, with the shapes and types of the inputs and the outputs.
        session: the device, which also times and profiles.
    """

    bundle: Bundle
    session: Session

    def read(self, path: str | Path) -> tuple[NDArray[Any], ...]:
        """The inputs in a file: of a photograph, by the build's preprocessing, of a .npy or an .npz file; batch 1.

        Raises:
            Error: no such file, or one that cannot become the inputs.
        """
        manifest = self.bundle.manifest
        return inputs.read(Path(path), manifest.inputs, manifest.preprocessing).tensors

    def run(self, *tensors: NDArray[Any]) -> list[NDArray[Any]]:
        """One inference.

        Args:
            tensors: of the shapes and types of ``bundle.manifest.inputs``; floats are taken as float32.

        Returns:
            Every output, of the shapes and types of ``bundle.manifest.outputs``.

        Raises:
            ValueError: another shape or type.
            Error: NaN or infinity in it, or the device fails.
        """
        return self.session.run(*tensors)

    def classify(self, path: str | Path) -> tuple[Answer, ...]:
        """The five best classes of a photograph, the best first; none where the network is no classifier.

        Raises:
            Error: as `read` and `run`.
        """
        manifest = self.bundle.manifest
        output = self.run(*self.read(path))[0]
        return answers(output, manifest.probabilities, self.bundle.labels())

    def close(self) -> None:
        """Free the device; the second time does nothing."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build(
    model: str | Path,
    target: str = "native",
    *,
    output: str | Path | None = None,
    format: Format | None = None,
    quantize: Literal["int8"] | None = None,
    precision: Literal["float32", "float16"] = "float32",
    preprocessing: Mapping[str, object] | None = None,
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
        precision: of a float network's arithmetic; float16 for targets that have it.
        preprocessing: as the keys of a model.toml, such as ``{"scale": "1/255"}``.

    Returns:
        The build; ``manifest.measured["verification"]`` has its errors, in the output's own unit.

    Raises:
        Error: anything that the user can correct.
    """
    where = resolve(target)
    request = BuildRequest(
        model=str(model),
        target=where,
        output=None if output is None else Path(output),
        format=format or where.format,
        overrides=_overrides(preprocessing or {}),
        quantize=quantize is not None,
        float16=precision == "float16",
        **options,
    )
    with _Reported(on_progress) as progress:
        return driver.build(request, progress)


def open(
    bundle: str | Path | Bundle,
    *,
    on_progress: OnProgress | None = None,
    **device: Unpack[DeviceOptions],
) -> Network:
    """Verify a build and load it on a device.

    Raises:
        Error: no build, a changed one, or the device cannot take it.
    """
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    parser = ArgumentParser()
    add_device_options(parser)
    with _Reported(on_progress) as progress:
        found = open_bundle(path)
        arguments = _arguments(parser, ["--", str(path)], device)
        return Network(found, open_session(found, arguments, progress, most=1))


def check(
    bundle: str | Path | Bundle,
    *,
    model: str | Path | None = None,
    images: Sequence[str | Path] = (),
    input: Mapping[str, str | Path] | None = None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
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
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    given = {
        **device,
        "model": None if model is None else str(model),
        "images": [Path(image) for image in images],
        "input": [(name, Path(file)) for name, file in (input or {}).items()],
        "labels": None if labels is None else Path(labels),
        "masks": None if masks is None else Path(masks),
        "repeat": repeat,
    }
    with _Reported(on_progress) as progress:
        arguments = _arguments(check_command.parser(), ["--", str(path)], given)
        return check_command.check(arguments, progress)


def tune(
    model: str | Path,
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
    given = {**options, "target": target, "trials": trials}
    words = ["--model", str(model)]
    arguments = _arguments(tune_command.parser(), words, given)
    with _Reported(on_progress) as progress:
        return tune_command.tune(arguments, progress, quiet=True)


def estimate(
    bundle: str | Path | Bundle, cpu: str, *, on_progress: OnProgress | None = None
) -> Metered:
    """Estimate an inference of a build on a core, operator by operator, under QEMU.

    Args:
        bundle: a bundle or a standalone library for the core.
        cpu: a core that ``netship meter --cpu`` takes, such as cortex-a72.

    Returns:
        Instructions, which are exact, and estimated cycles; they sum up those of ``operators``.

    Raises:
        Error: another target, an unknown core, or QEMU is missing.
    """
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    return measure_bundle(path, cpu, on_progress or (lambda line: None))


class _Reported(Progress):
    """Calls back instead of printing."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        super().__init__(quiet=True)
        self._on_progress = on_progress or (lambda line: None)

    def stage(self, text: str) -> None:
        self._on_progress(text)

    def note(self, text: str) -> None:
        self._on_progress(text)


def _arguments(
    parser: ArgumentParser, words: Sequence[str], given: Mapping[str, object]
) -> Namespace:
    """A command's options: its defaults, and what is given."""
    arguments = parser.parse_args(words)
    if unknown := given.keys() - vars(arguments).keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    vars(arguments).update(given)
    return arguments


def _overrides(given: Mapping[str, object]) -> Overrides:
    parsed = {}
    for name, value in given.items():
        try:
            parsed[name] = parse_option(name, value)
        except ValueError as error:
            raise Error(f"preprocessing {name!r}: {error}") from None
    return Overrides(**parsed)
