"""The cost of one of AutoScheduler's candidates for aarch64 without a board: counts by QEMU, cycles by llvm-mca."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from netship.meter.counting import (
    Block,
    CountingError,
    count,
    find_qemu,
    run,
)
from netship.meter.counts import Counts, cost_of
from netship.meter.cycles import Costs, core
from netship.meter.memory import hierarchy
from netship.targets.toolchain import compile_once, run_zig

RUNNER = Path(__file__).with_name("runner.c")
# Static: no libraries of the board's are needed, and a start takes a hundredth of a second.
_LINK = ("-target", "aarch64-linux-musl", "-static", "-s")
_SECONDS = 60.0


class CandidateMeter:
    """Measures kernels, each an object file with a function ``default_function``.

    A kernel that crashes, does not end, or needs what the CPU lacks is a CountingError.

    Args:
        cpu: a key of `cycles.CORES`.
    """

    def __init__(self, cpu: str) -> None:
        self._cpu = core(cpu).qemu
        self._memory = hierarchy(cpu)
        self._costs = Costs(cpu)
        self._runner = _runner_object()

    def measure(self, kernel: Path, shapes: Sequence[tuple[int, ...]]) -> Counts:
        """Cost of one run on seeded float32 tensors, the last of them the output, with warm caches."""
        return self.cost(self.count(kernel, shapes))

    def count(
        self,
        kernel: Path,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[str] | None = None,
    ) -> list[Block]:
        """Only the counting; several threads may count at the same time.

        Args:
            dtypes: of the tensors, float32 or float16; all float32 where None.
        """
        with tempfile.TemporaryDirectory(prefix="netship-meter-") as scratch:
            program = self._link(kernel, Path(scratch))
            blocks, _ = count(
                [str(program), "0", "-", *_words(shapes, dtypes)],
                cpu=self._cpu,
                caches=self._memory.caches,
                seconds=_SECONDS,
            )
        return blocks

    def cost(self, blocks: list[Block]) -> Counts:
        """The cost of counted blocks; cycles not rounded."""
        return cost_of(blocks, self._costs, self._memory)

    def run(self, kernel: Path, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The output for given inputs of float32 or float16; the last of ``arrays`` has the output's shape and type."""
        with tempfile.TemporaryDirectory(prefix="netship-meter-") as scratch:
            program, data = self._link(kernel, Path(scratch)), Path(scratch, "data")
            data.write_bytes(b"".join(array.tobytes() for array in arrays[:-1]))
            tensors = _words([x.shape for x in arrays], [x.dtype.name for x in arrays])
            words = [str(program), "0", str(data), *tensors]
            result = run([find_qemu(), "-cpu", self._cpu, *words], {}, _SECONDS)
            if result.returncode:
                raise CountingError(f"{kernel}: exit code {result.returncode}")
            output = data.read_bytes()[-arrays[-1].nbytes :]
        return np.frombuffer(output, arrays[-1].dtype).reshape(arrays[-1].shape)

    def _link(self, kernel: Path, folder: Path) -> Path:
        program = folder / "program"
        run_zig("cc", program, *_LINK, self._runner, kernel)
        return program

    def close(self) -> None:
        self._costs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _words(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str] | None = None
) -> list[str]:
    return [
        "x".join(map(str, shape)) + ("h" if dtype == "float16" else "")
        for shape, dtype in zip(
            shapes, dtypes or ["float32"] * len(shapes), strict=True
        )
    ]


def _runner_object() -> Path:
    target = ("-target", "aarch64-linux-musl")
    return compile_once(RUNNER, "meter-runner.o", *target, "-O2", "-c")
