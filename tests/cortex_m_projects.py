"""Small networks as C projects, int8 and float32, for every Cortex-M."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from integers import (
    branches,
    chain,
    extremes,
    graph_of,
    oddities,
    project,
    quantised,
    residuals,
)

from netship.bundle.store import Bundle
from netship.compile import passes
from netship.compile.backends.c.arrange import Arranged, arrange
from netship.compile.backends.c.build import PASSES, written
from netship.compile.backends.c.steps import fuse
from netship.compile.ir import evaluate
from netship.compile.ir.graph import Graph
from netship.targets.progress import Progress

# Others are in test_cortex_m_cores.py.
CPUS = ["cortex-m33", "cortex-m4", "cortex-m55", "cortex-m7"]
INT8 = ["residuals", "oddities", "chain", "extremes", "branches"]
FLOAT = [f"float-{name}" for name in INT8[:3]]
NAMES = INT8 + FLOAT


def small_networks(folder: Path) -> dict[str, onnx.ModelProto]:
    """The networks of NAMES; ``folder`` is for the quantiser's files."""
    return {
        "residuals": quantised(residuals(), folder),
        "oddities": quantised(oddities(), folder, unsigned=True),
        "chain": quantised(chain(), folder),
        "branches": quantised(branches(), folder),
        "extremes": extremes(quantised(residuals(), folder)),
        "float-chain": chain(),
        "float-residuals": residuals(),
        "float-oddities": oddities(),
    }


def planned(graph: Graph) -> Arranged:
    """The steps of a graph for C, and their memory."""
    steps = written(fuse(graph), graph.opset, Progress(quiet=True))
    return arrange(graph, steps, widened=graph.quantised)


class Projects(dict[tuple[str, str], Bundle]):
    """C projects by (name of the network, CPU), each built when it is first asked for."""

    def __init__(self, networks: dict[str, onnx.ModelProto], folder: Path) -> None:
        super().__init__()
        self._networks, self._folder = networks, folder

    def __missing__(self, key: tuple[str, str]) -> Bundle:
        name, cpu = key
        self[key] = project(self._networks[name], self._folder / f"{name}-{cpu}", cpu)
        return self[key]


def graph_for_c(proto: onnx.ModelProto) -> Graph:
    """As the C kernels take it."""
    return passes.run(PASSES, graph_of(proto))


def expected_output(graph: Graph, image: np.ndarray) -> np.ndarray:
    """The output's integers by compile.ir.evaluate, of which other tests show that they are ONNX Runtime's."""
    height, width, channels = graph.inputs[0].image
    pixels = image.reshape(1, height, width, channels).transpose(0, 3, 1, 2)
    return evaluate.run(graph, pixels)[0].ravel()
