"""The emulated arm64 system that the other runtimes run in, on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from netship.bench.baselines import runtimes
from netship.bench.baselines.runtimes import Baseline, Progress
from netship.devices import sysroot
from netship.devices.sessions.emulated import check_cpu, find_qemu
from netship.meter import board_files, counting
from netship.meter.counts import Command
from netship.meter.cycles import core
from netship.targets.errors import UserError
from netship.targets.files import cache_folder
from netship.targets.toolchain import compile_once

_RUN = Path(__file__).with_name("run_baseline.py")
_MARK = Path(__file__).with_name("mark.c")
# The longest run: a large network's conversion.
_TIMEOUT_SECONDS = 1800.0


class Emulated(NamedTuple):
    """An arm64 system with Python and the runtimes, on one of QEMU's CPUs."""

    cpu: str
    qemu: str
    root: Path
    site: Path

    def command(self, arguments: Sequence[str]) -> Command:
        environment = {
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        # -S: no site-packages of this machine, whose files the emulated process can see.
        python = (str((self.root / "usr/bin/python3.11").resolve()), "-S")
        return Command(self.root, (*python, *arguments), environment)

    def run(self, command: Command, folder: Path) -> str:
        """Run to the end in ``folder``; returns what it printed."""
        words = [self.qemu, "-cpu", self.cpu, "-L", str(command.root)]
        words += command.arguments
        done = counting.run(words, command.environment, _TIMEOUT_SECONDS, folder)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(said[-1] if said else f"exit code {done.returncode}")
        return done.stdout


def prepare(cpu: str, on_progress: Progress, board: str = "") -> Emulated:
    """The arm64 system of a board with ``cpu``, with every runtime; fetched the first time."""
    board_files.board(cpu)
    qemu = find_qemu()
    emulated = core(cpu).qemu
    check_cpu(qemu, emulated)
    system = sysroot.prepare(on_progress)
    site = runtimes.fetch(on_progress)
    root = board_files.root(system, cpu, cache_folder() / "boards", board)
    return Emulated(emulated, qemu, root, site)


def inference(
    machine: Emulated,
    runtime: Baseline,
    model: Path,
    tensor: Path,
    output: Path,
    threads: int = 1,
) -> Command:
    """The program that loads ``model``, runs it on ``tensor`` and writes ``output``.

    Its second inference is marked as the one to count.

    Args:
        model: as ``converters.convert`` made it.
        tensor: a .npy file of the ONNX input; output: a .npy file of the first output.
    """
    options = ("-target", "aarch64-linux-gnu.2.28", "-O2", "-shared", "-fPIC")
    marks = compile_once(_MARK, "baseline-marks.so", *options)
    files = [str(path.resolve()) for path in (model, tensor, output, marks)]
    return machine.command([str(_RUN), runtime.name, str(threads), *files])
