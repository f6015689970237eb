"""A C project on the microcontroller board that it was built for, emulated by QEMU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Firmware, FirmwareTensor, Tensor
from netship.bundle.store import Bundle
from netship.devices.microcontroller.boards import BOARDS
from netship.devices.microcontroller.figures import Figures, Part
from netship.devices.microcontroller.firmware import (
    Image,
    Run,
    compile_firmware,
    run_firmware,
)
from netship.devices.microcontroller.host import run_on_host
from netship.devices.sessions.session import Origin, Outputs, Session, check_inputs
from netship.targets.errors import UserError

_SECONDS = 600.0


def to_input(tensors: Sequence[NDArray[Any]], bundle: Bundle) -> bytes:
    """The inputs of an inference as the C takes them one after the other, of rank 4 with their channels last."""
    wanted = bundle.manifest.inputs
    check_inputs(tensors, wanted)
    ports = zip(tensors, interface_of(bundle).inputs, wanted, strict=True)
    return b"".join(stored_input(*each).tobytes() for each in ports)


def stored_input(
    tensor: NDArray[Any], interface: FirmwareTensor, wanted: Tensor
) -> NDArray[Any]:
    """An input as the C takes it; of rank 4 with its channels last."""
    values: NDArray[Any] = tensor
    if wanted.dtype != "float32":
        # The kernels store uint8 as int8 with a zero point 128 lower.
        shift = -128 if (interface.dtype, wanted.dtype) == ("int8", "uint8") else 0
        values = (tensor.astype(np.int64) + shift).astype(interface.dtype)
    elif interface.quantised is not None:
        steps = np.rint(tensor / np.float32(interface.quantised.scale))
        zero = interface.quantised.zero
        values = np.clip(steps + zero, -128, 127).astype(np.int8)
    # As outputs, also what is data.
    if values.ndim == 4 and wanted.layout != "NHWC":
        values = values.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(values, interface.dtype)


def from_outputs(outputs: list[NDArray[Any]], bundle: Bundle) -> Outputs:
    """The C's outputs in the manifest's shapes and types."""
    return [
        _in_order(_as_wanted(output, port, tensor), tensor.shape)
        for output, port, tensor in zip(
            outputs, interface_of(bundle).outputs, bundle.manifest.outputs, strict=True
        )
    ]


def _as_wanted(
    output: NDArray[Any], port: FirmwareTensor, wanted: Tensor
) -> NDArray[Any]:
    if wanted.dtype == "float32":
        real = output.astype(np.float32)
        if port.quantised is not None:
            real = (real - port.quantised.zero) * np.float32(port.quantised.scale)
        return real
    shift = 128 if (port.dtype, wanted.dtype) == ("int8", "uint8") else 0
    return (output.astype(np.int64) + shift).astype(wanted.dtype)


def _in_order(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if len(shape) == 4:
        batch, channels, height, width = shape
        values = values.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
    # Of a scalar ascontiguousarray would make a vector.
    return np.ascontiguousarray(values).reshape(shape)


def interface_of(bundle: Bundle) -> Firmware:
    """Raises: UserError when the bundle is no C project."""
    if bundle.manifest.firmware is None:
        raise UserError(
            f"{bundle.path}: is no C project for a microcontroller; build with --target cortex-m7"
        )
    return bundle.manifest.firmware


def check_options(bundle: Bundle, cpu: str | None, threads: int | None) -> None:
    """Refuse options that a C project has no use for."""
    if cpu is not None:
        raise UserError(
            f"--cpu: {bundle.path} is for one microcontroller; leave it out"
        )
    if threads not in (None, 1):
        raise UserError("--threads: a microcontroller has one; leave it out")


def open_firmware(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    threads: int | None = None,
) -> FirmwareSession:
    """Compile the project for its board; each run starts the board anew."""
    check_options(bundle, cpu, threads)
    interface = interface_of(bundle)
    board = BOARDS.get(interface.cpu)
    if board is None:
        raise UserError(
            f"{bundle.path}: no board with a {interface.cpu}; there are {', '.join(BOARDS)}"
        )
    on_progress(f"compiling for {board.title}")
    folder = tempfile.TemporaryDirectory(prefix="netship-")
    try:
        image = compile_firmware(
            bundle.path, bundle.manifest.name, interface, board, Path(folder.name)
        )
        return FirmwareSession(bundle, image, folder)
    except BaseException:
        folder.cleanup()
        raise


class FirmwareSession(Session):
    """A `Session` for which every run starts the emulated board anew.

    Attributes:
        image: the linked program.
    """

    origin = Origin.EMULATED
    threads = 1

    def __init__(
        self, bundle: Bundle, image: Image, folder: tempfile.TemporaryDirectory[str]
    ) -> None:
        self._bundle, self.image, self._folder = bundle, image, folder
        self._interface = interface_of(bundle)
        self._runs: list[tuple[bytes, Run]] = []

    def run(self, *tensors: NDArray[Any]) -> Outputs:
        """As `Session.run`; the first one is preceded by the project's self-test."""
        inputs = to_input(tensors, self._bundle)
        run = self._start(self.image, inputs, probe=not self._runs)
        if run.self_test:
            raise UserError(
                f"{self._bundle.path}: {self._bundle.manifest.name}_self_test returned "
                f"{run.self_test}; build it again, and report the model if it stays so"
            )
        self._runs.append((inputs, run))
        return from_outputs(run.outputs[0], self._bundle)

    def time(self, tensors: Sequence[NDArray[Any]], repeat: int) -> list[float]:
        """Raises: UserError always, as the emulator's times say nothing of the board."""
        raise UserError(
            "--repeat: an emulated microcontroller has no times; leave it out, instructions are counted"
        )

    def figures(self) -> Figures:
        """Memory and instructions of the first input that was run, by step and part; and the largest difference
        between all outputs and those of the same C on this machine.
        """
        if not self._runs:
            raise ValueError("no input was run")
        manifest, interface = self._bundle.manifest, self._interface
        inputs, plain = self._runs[0]
        everything = [each for each, _ in self._runs]
        board = [outputs for _, run in self._runs for outputs in run.outputs]
        host = run_on_host(self._bundle.path, manifest.name, interface, everything)
        with tempfile.TemporaryDirectory(prefix="netship-") as folder:
            traced = compile_firmware(
                self._bundle.path,
                manifest.name,
                interface,
                self.image.board,
                Path(folder),
                traced=True,
            )
            parts = self._start(traced, inputs).parts
        assert parts is not None
        image = self.image
        return Figures(
            board=image.board.title,
            interface=interface,
            stack_bytes=plain.stack,
            static_bytes=image.static,
            code_bytes=image.code,
            weights_bytes=image.weights,
            instructions=round(plain.instructions[0]),
            max_error=max(
                float(np.abs(ours.astype(np.float64) - theirs).max())
                for each in zip(board, host, strict=True)
                for ours, theirs in zip(*each, strict=True)
            ),
            parts=tuple(
                Part(group.layer, group.macs, float(row.sum()), *map(float, row[:3]))
                for group, row in zip(manifest.lowering.groups, parts, strict=True)
            ),
        )

    def close(self) -> None:
        self._folder.cleanup()

    def _start(self, image: Image, inputs: bytes, *, probe: bool = False) -> Run:
        folder = Path(self._folder.name)
        return run_firmware(
            image, self._interface, [inputs], folder, _SECONDS, probe=probe
        )
