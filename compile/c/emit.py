"""Write a network's steps as a C project."""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from compile.c import drawing, requantise, steps
from compile.c import plan as planning
from compile.c.graph import Add, AveragePool, Convolution, Network, Tensor
from compile.c.plan import Arena
from compile.c.steps import Block, Step
from targets.errors import UserError

_HERE = Path(__file__).parent
# The kernels hold sizes in int16 and rows of a depthwise convolution in an array of 7.
_LARGEST = 32767
_LARGEST_KERNEL = 7
# How kernels.h wants the weights (NN_LAYOUT there).
_SMLAD, _MVE = 1, 2


@dataclass(frozen=True)
class Project:
    """A network ready to be written: what it is called and says of itself, its steps, its memory."""

    name: str
    version: str
    cpu: str
    network: Network
    steps: tuple[Step, ...]
    arena: Arena


def prepare(network: Network, name: str, version: str, cpu: str) -> Project:
    """Fuse and plan.

    Raises:
        UserError: a layer is larger than the kernels take (named).
    """
    fused = steps.fuse(network)
    for operator in network.operators:
        _check_size(operator)
    return Project(name, version, cpu, network, fused, planning.plan(network, fused))


@dataclass(frozen=True)
class Constants:
    """What lies in flash besides code.

    Attributes:
        nbytes: weights, biases and multipliers.
        crc: CRC-32 over them, which the self-test demands.
    """

    nbytes: int
    crc: int


def emit(project: Project, folder: Path) -> Constants:
    """Write the C project into ``folder``, all but the self-test's answer (see `emit_golden`)."""
    data = _Data(_MVE if project.cpu == "cortex-m55" else _SMLAD)
    layers = [_layers(project, step, data) for step in project.steps]
    values = _values(project, layers, data)
    for template, file in (
        ("network.h", f"{project.name}.h"),
        ("network.c", f"{project.name}.c"),
        ("weights.c", f"{project.name}_weights.c"),
        ("main.c", "example/main.c"),
        ("Makefile", "Makefile"),
        ("CMakeLists.txt", "CMakeLists.txt"),
        ("README.md", "README.md"),
        ("memory.svg", "memory.svg"),
    ):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_render(f"{template}.jinja", values), encoding="utf-8")
    shutil.copy(_HERE / "kernels.h", folder / f"{project.name}_kernels.h")
    constants = np.array(data.constants, "<i4").tobytes()
    crc = zlib.crc32(constants, zlib.crc32(data.weights))
    return Constants(len(data.weights) + len(constants), crc)


def emit_golden(
    project: Project, folder: Path, constants: Constants, expected: NDArray[np.int8]
) -> None:
    """Write what the self-test demands: ``expected``, int8, is the output for `test_pattern`."""
    values = {
        "name": project.name,
        "crc": constants.crc,
        "expected": expected.tolist(),
    }
    (folder / "golden.h").write_text(
        _render("golden.h.jinja", values), encoding="utf-8"
    )


def test_pattern(size: int) -> NDArray[np.int8]:
    """The input of the generated self-test: the top byte of Knuth's multiplicative hash of the index."""
    hashes = np.arange(size, dtype=np.uint32) * np.uint32(2654435761)
    return (hashes >> np.uint32(24)).astype(np.uint8).view(np.int8)


class _Data:
    """The two arrays in flash: weights, and biases with their multipliers; who begins where."""

    def __init__(self, layout: int) -> None:
        self.layout = layout
        self.weights = bytearray()
        self.constants: list[int] = []
        self.parts: list[tuple[str, int, int]] = []
        self.names: set[str] = set()

    def name(self, text: str) -> str:
        """A C identifier of its own for a layer."""
        plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower() or "layer"
        if not plain[0].isalpha():
            plain = f"layer_{plain}"
        unique, number = plain, 2
        while unique in self.names:
            unique, number = f"{plain}_{number}", number + 1
        self.names.add(unique)
        return unique

    def add(
        self, name: str, weights: NDArray[np.int8], constants: NDArray[np.int32]
    ) -> tuple[int, int]:
        offsets = len(self.weights), len(self.constants)
        self.parts.append((name, *offsets))
        self.weights += weights.tobytes()
        self.weights += bytes(-len(self.weights) % 4)
        self.constants += constants.tolist()
        return offsets


def _layers(project: Project, step: Step, data: _Data) -> dict[str, Any]:
    """A step as the template wants it."""
    fused: dict[str, Any] = {
        "title": step.name,
        "name": data.name(f"{step.name}_step"),
        "step": step,
        "input": _place(project, step.inputs[0]),
        "output": _place(project, step.output),
    }
    if isinstance(step, Block):
        named = {
            part: getattr(step, part)
            for part in ("expand", "depthwise", "project", "residual")
        }
        need = steps.scratch(step)
        fused |= {
            "kind": "block",
            "convolutions": [
                _convolution(named[part], data)
                for part in ("expand", "depthwise", "project")
                if named[part] is not None
            ],
            "residual": _addition(step.residual, step.inputs[0], data),
            "scratch": project.arena.scratch[project.steps.index(step)],
            "scratch_bytes": need.nbytes,
            "row": need.ring,
            "sum": need.ring + need.row,
            "patch": need.ring + need.row + need.sum,
        }
        by_part = iter(fused["convolutions"])
        fused["parts"] = {
            part: next(by_part)["name"] if named[part] is not None else None
            for part in ("expand", "depthwise", "project")
        }
    elif isinstance(step.operator, Add):
        fused |= {
            "kind": "add",
            "addition": _addition(step.operator, step.operator.input, data),
            "other": _place(project, step.operator.other),
            "count": step.output.nbytes,
        }
    else:
        fused |= {"kind": "average", "average": _average(step.operator, data)}
    return fused


def _convolution(convolution: Convolution, data: _Data) -> dict[str, Any]:
    name = data.name(convolution.name)
    constants = requantise.of_convolution(convolution)
    weights = _packed(convolution, data.layout)
    offsets = data.add(name, weights, constants.interleaved)
    source, output = convolution.input, convolution.output
    return {
        "name": name,
        "title": convolution.name,
        "weights": offsets[0],
        "constants": offsets[1],
        "shift": constants.shift,
        "depth": convolution.depth
        if convolution.depthwise
        else steps.padded_depth(convolution),
        "source": source,
        "output": output,
        "kernel": convolution.kernel,
        "strides": convolution.strides,
        "pads": convolution.pads,
        "direct": int(steps.direct(convolution)),
        "low": convolution.low,
        "high": convolution.high,
        "macs": convolution.macs,
    }


def _packed(convolution: Convolution, layout: int) -> NDArray[np.int8]:
    """The weights in the order of kernels.h (see NN_LAYOUT there), flat."""
    weights = convolution.weights
    if convolution.depthwise:
        flat = weights.reshape(-1, weights.shape[2])
        together = 4 if layout == _SMLAD else 8
        flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % together)))
        # [tap, channel] → [channels together, tap, channel].
        grouped = flat.reshape(flat.shape[0], -1, together).transpose(1, 0, 2)
        if layout == _SMLAD:
            return grouped[:, :, [0, 2, 1, 3]].astype("<i2").ravel().view(np.int8)
        return grouped.ravel()
    flat = weights.reshape(weights.shape[0], -1)
    channels, width = (2, 4) if layout == _SMLAD else (4, 16)
    rows, depth = -flat.shape[0] % channels, -flat.shape[1] % width
    flat = np.pad(flat, ((0, rows), (0, depth)))
    # [channel, depth] → [channels together, word or vector, channel, byte].
    tiled = flat.reshape(-1, channels, flat.shape[1] // width, width)
    return tiled.transpose(0, 2, 1, 3).ravel()


def _average(pool: AveragePool, data: _Data) -> dict[str, Any]:
    name = data.name(f"{pool.name}_mean")
    constants = requantise.of_average(pool)
    offsets = data.add(name, np.zeros(0, np.int8), constants.interleaved)
    return {
        "name": name,
        "constants": offsets[1],
        "shift": constants.shift,
        "source": pool.input,
        "output": pool.output,
    }


def _addition(add: Add | None, first: Tensor, data: _Data) -> dict[str, Any] | None:
    if add is None:
        return None
    return {
        "name": data.name(f"{add.name}_sum"),
        "title": add.name,
        "constants": requantise.of_addition(add, first.name),
        "low": add.low,
        "high": add.high,
    }


def _place(project: Project, tensor: Tensor) -> str:
    """A tensor's address in the generated function."""
    if tensor.name == project.network.output.name:
        return "output"
    if tensor.name == project.network.input.name:
        return "input"
    return f"base + {project.arena.offset(tensor.name)}"


def _values(
    project: Project,
    layers: Sequence[dict[str, Any]],
    data: _Data,
) -> dict[str, Any]:
    network, arena = project.network, project.arena
    return {
        "name": project.name,
        "version": project.version,
        "cpu": project.cpu,
        "layout": data.layout,
        "network": network,
        "arena": arena,
        "steps": project.steps,
        "input_offset": arena.offset(network.input.name),
        "layers": layers,
        "weights": np.frombuffer(bytes(data.weights), np.int8).tolist(),
        "constants": data.constants,
        "parts": data.parts,
        "macs": sum(step.macs for step in project.steps),
        **drawing.geometry(arena, project.steps),
    }


def _render(template: str, values: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=False,  # C, not HTML; names are C identifiers, other text goes through a filter
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "comment": _comment,
        "dims": lambda shape: "x".join(map(str, shape)),
        "number": "{:,}".format,
        "c_double": lambda value: repr(float(value)),
    }
    return environment.get_template(template).render(values)


def _comment(text: str) -> str:
    """Text that can end neither the comment nor the table cell it stands in."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("|", "/")


def _check_size(operator: Convolution | Add | AveragePool) -> None:
    shapes = (*operator.input.shape, *operator.output.shape)
    largest = max(shapes)
    if isinstance(operator, Convolution):
        largest = max(largest, steps.padded_depth(operator))
        rows = max(*operator.kernel, *operator.strides, *operator.pads)
        if rows > (_LARGEST_KERNEL if operator.depthwise else 127):
            raise UserError(
                f"node {operator.name!r}: kernel, stride or padding of {rows}; the C kernels take "
                f"{_LARGEST_KERNEL} for a depthwise convolution, 127 for others"
            )
    if largest > _LARGEST:
        raise UserError(
            f"node {operator.name!r}: a size of {largest:,}; the C kernels take up to {_LARGEST:,}"
        )
