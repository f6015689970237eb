"""The gain of tuning: the network's kernels, built without records and with them, measured in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from netship.bundle.executor_graph import parse
from netship.compile.ir.graph import Graph
from netship.records.lookup import RecordLog
from netship.targets.errors import UserError
from netship.targets.presets import resolve

if TYPE_CHECKING:
    from netship.tuning.measure import Measurer

_BUILD_SECONDS = 900.0


class Gain(NamedTuple):
    """Sums over the network's kernels, layout changes and fused pairs included, each measured in isolation.

    Attributes:
        untuned: seconds, as built without records.
        tuned: seconds, as built with the log's records first.
        used: whether the build takes the records: it does if they, and those of neighbours, serve every convolution.
    """

    untuned: float
    tuned: float
    used: bool

    def __str__(self) -> str:
        if not self.used:
            return f"untuned {self.untuned * 1e3:.3f} ms; some tasks have no records, so a build does not use them yet"
        return (
            f"untuned {self.untuned * 1e3:.3f} ms, tuned {self.tuned * 1e3:.3f} ms, "
            f"{self.untuned / self.tuned:.2f} × as quick: sums of the kernels of a build, each in isolation"
        )


def compare(
    graph: Graph, target: str, logs: Sequence[RecordLog], measurer: Measurer
) -> Gain:
    """Build the network twice, kernel by kernel, and measure them.

    Args:
        graph: of float32 operators.
        logs: as a build would find them, the new one first.

    Raises:
        UserError: a build fails, or a kernel does.
    """
    from netship.tuning import workers

    with (
        TemporaryDirectory(prefix="netship-gain-") as folder,
        closing(workers.Pool(1, _BUILD_SECONDS)) as pool,
    ):
        arguments: list[tuple[Any, ...]] = [
            (graph, target, each, folder) for each in ([], logs)
        ]
        built = pool.map(compile_kernels, arguments, workers.BUILD_FAILED)
        for each in built:
            if isinstance(each, workers.Failure):
                raise UserError(f"no comparison with an untuned build: {each.message}")
        (_, untuned), (used, tuned) = built
        return Gain(_sum(untuned, measurer), _sum(tuned, measurer), used)


def _sum(kernels: Sequence[tuple[str, int]], measurer: Measurer) -> float:
    from netship.tuning.measure import Kernel
    from netship.tuning.workers import Failure

    measured = measurer.measure([Kernel.of(path) for path, _ in kernels])
    total = 0.0
    for (_, count), each in zip(kernels, measured, strict=True):
        if isinstance(each, Failure):
            raise UserError(f"no comparison with an untuned build: {each.message}")
        total += count * fmean(each)
    return total


def compile_kernels(
    graph: Graph, target: str, logs: Sequence[RecordLog], folder: str
) -> tuple[bool, list[tuple[str, int]]]:
    """In a worker: the object file of each kernel of a build, and how often an inference runs it.

    Returns:
        Whether records are used, and the kernels.
    """
    from netship.compile.relay.convert import to_relay
    from netship.compile.relay.lower import lower
    from netship.tuning import workers

    preset = resolve(target)
    lowered = lower(to_relay(graph, preset), preset, logs)
    kernels = []
    names = parse(lowered.factory.get_graph_json()).kernels
    for name, count in Counter(names).items():
        metadata = lowered.factory.function_metadata[name]
        (function,) = metadata.tir_primfuncs.values()
        path = Path(folder, f"{len(list(Path(folder).iterdir()))}.o")
        workers.compile_function(function, preset.tvm, path)
        kernels.append((str(path), count))
    return lowered.description.layout == "NHWC", kernels
