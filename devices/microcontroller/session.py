"""A C project on the microcontroller board that it was built for, emulated by QEMU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Firmware, Quantised
from bundle.store import Bundle
from devices.microcontroller.boards import BOARDS
from devices.microcontroller.figures import Figures, Part
from devices.microcontroller.firmware import Image, Run, compile_firmware, run_firmware
from devices.microcontroller.host import run_on_host
from devices.sessions.session import Origin, Session, check_input
from targets.errors import UserError

_SECONDS = 600.0


def to_input(tensor: NDArray[np.float32], bundle: Bundle) -> NDArray[Any]:
    """The input tensor as the C takes it, an image with its channels last, flat."""
    interface = interface_of(bundle)
    check_input(tensor, bundle.manifest.input)
    values: NDArray[Any] = tensor
    quantised = interface.input.quantised
    if quantised is not None:
        steps = np.rint(tensor / np.float32(quantised.scale))
        values = np.clip(steps + quantised.zero, -128, 127).astype(np.int8)
    if bundle.manifest.input.layout == "NCHW":
        values = values.transpose(0, 2, 3, 1)
    return values.ravel()


def from_outputs(
    outputs: list[NDArray[Any]], bundle: Bundle
) -> list[NDArray[np.float32]]:
    """The C's outputs in the manifest's shapes."""
    return [
        _real(output, each.quantised, tensor.shape)
        for output, each, tensor in zip(
            outputs, interface_of(bundle).outputs, bundle.manifest.outputs, strict=True
        )
    ]


def _real(
    output: NDArray[Any], quantised: Quantised | None, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    real = output.astype(np.float32)
    if quantised is not None:
        real = (real - quantised.zero) * np.float32(quantised.scale)
    if len(shape) == 4:
        batch, channels, height, width = shape
        real = real.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
    # Of a scalar ascontiguousarray would make a vector.
    return np.ascontiguousarray(real).reshape(shape)


def interface_of(bundle: Bundle) -> Firmware:
    """Raises: UserError when the bundle is no C project."""
    if bundle.manifest.firmware is None:
        raise UserError(
            f"{bundle.path}: is no C project for a microcontroller; build with --target cortex-m7"
        )
    return bundle.manifest.firmware


def open_firmware(
    bundle: Bundle,
    cpu: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    threads: int | None = None,
) -> FirmwareSession:
    """Compile the project for its board; each run starts the board anew."""
    if cpu is not None:
        raise UserError(
            f"--cpu: {bundle.path} is for one microcontroller; leave it out"
        )
    if threads not in (None, 1):
        raise UserError("--threads: a microcontroller has one; leave it out")
    interface = interface_of(bundle)
    board = BOARDS.get(interface.cpu)
    if board is None:
        raise UserError(
            f"{bundle.path}: no board with a {interface.cpu}; there are {', '.join(BOARDS)}"
        )
    on_progress(f"compiling for {board.machine} ({board.cpu})")
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
        self._runs: list[tuple[NDArray[Any], Run]] = []

    def run(self, tensor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """As `Session.run`; the first one is preceded by the project's self-test."""
        inputs = to_input(tensor, self._bundle)[np.newaxis]
        run = self._start(self.image, inputs, probe=not self._runs)
        if run.self_test:
            raise UserError(
                f"{self._bundle.path}: {self._bundle.manifest.name}_self_test returned "
                f"{run.self_test}; build it again, and report the model if it stays so"
            )
        self._runs.append((inputs, run))
        return from_outputs(run.outputs[0], self._bundle)

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
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
        everything = np.concatenate([each for each, _ in self._runs])
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
            board=f"{image.board.machine} ({image.board.cpu})",
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

    def _start(self, image: Image, inputs: NDArray[Any], *, probe: bool = False) -> Run:
        folder = Path(self._folder.name)
        return run_firmware(
            image, self._interface, inputs, folder, _SECONDS, probe=probe
        )
