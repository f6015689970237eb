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
from numpy.typing import NDArray

from bundle.accuracy import TOLERANCE
from compile.backends.c import drawing
from compile.ir.graph import Add, AveragePool, Convolution, Network, Tensor
from compile.kernels import cortex_m
from compile.kernels.cortex_m import requantise
from compile.passes import steps
from compile.passes.steps import Block, Chain, Offsets, Step
from compile.program import plan as planning
from compile.program.plan import Arena
from targets import templates
from targets.errors import UserError

_HERE = Path(__file__).parent
_KERNELS = Path(cortex_m.__file__).parent
# The kernels hold sizes in int16 and rows of a depthwise convolution in an array of 7.
_LARGEST = 32767
_LARGEST_KERNEL = 7
# How int8.h wants the weights (NN_LAYOUT there).
_SMLAD, _MVE = 1, 2
_FLOAT_MAX = float(np.finfo(np.float32).max)


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
    for operator in network.operators:
        _check_size(operator)
    fused, arena = planning.arrange(network, steps.fuse(network))
    return Project(name, version, cpu, network, fused, arena)


@dataclass(frozen=True)
class Constants:
    """What lies in flash besides code.

    Attributes:
        nbytes: weights, biases and, of int8, ratios of scales.
        crc: CRC-32 over them, which the self-test demands.
    """

    nbytes: int
    crc: int


def emit(project: Project, folder: Path) -> Constants:
    """Write the C project into ``folder``, all but the self-test's answer (see `emit_golden`)."""
    data = _Data(project)
    layers = [_layers(project, step, data) for step in project.steps]
    values = _values(project, layers, data)
    for template, file in (
        ("network.h", f"{project.name}.h"),
        ("network.c", f"{project.name}.c"),
        ("weights.c", f"{project.name}_weights.c"),
        ("main.c", "example/main.c"),
        ("Makefile", "Makefile"),
        ("CMakeLists.txt", "CMakeLists.txt"),
        ("toolchain.cmake", "toolchain.cmake"),
        ("README.md", "README.md"),
        ("memory.svg", "memory.svg"),
    ):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_render(f"{template}.jinja", values), encoding="utf-8")
    shutil.copy(_KERNELS / "kernels.h", folder / f"{project.name}_kernels.h")
    kind = values["kind"]
    shutil.copy(_KERNELS / f"{kind}.h", folder / f"{project.name}_{kind}.h")
    weights, constants = (
        np.concatenate(arrays).tobytes() for arrays in (data.weights, data.constants)
    )
    crc = zlib.crc32(constants, zlib.crc32(weights))
    return Constants(len(weights) + len(constants), crc)


def emit_golden(
    project: Project, folder: Path, constants: Constants, expected: NDArray[Any]
) -> None:
    """Write what the self-test demands: ``expected``, int8 or float32, is the output for `test_pattern`."""
    values = {
        "name": project.name,
        "crc": constants.crc,
        "floating": project.network.floating,
        "expected": _texts(expected),
        "tolerance": TOLERANCE * float(np.ptp(expected.astype(np.float64))),
    }
    (folder / "golden.h").write_text(
        _render("golden.h.jinja", values), encoding="utf-8"
    )


def test_pattern(network: Network) -> NDArray[Any]:
    """The input of the generated self-test: the top byte of Knuth's multiplicative hash of the index.

    As int8, or as float32 from −1 to 1.
    """
    hashes = np.arange(network.input.size, dtype=np.uint32) * np.uint32(2654435761)
    pattern = (hashes >> np.uint32(24)).astype(np.uint8).view(np.int8)
    return pattern.astype(np.float32) / 128 if network.floating else pattern


class _Data:
    """The two arrays in flash, weights and what belongs to the sums; who begins where."""

    def __init__(self, project: Project) -> None:
        self.floating = project.network.floating
        self.layout = _MVE if project.cpu == "cortex-m55" else _SMLAD
        kinds = (
            (np.float32, np.float32) if self.floating else (np.int8, requantise.SCALE)
        )
        self.weights: list[NDArray[Any]] = [np.zeros(0, kinds[0])]
        self.constants: list[NDArray[Any]] = [np.zeros(0, kinds[1])]
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
        self, name: str, weights: NDArray[Any], constants: NDArray[Any]
    ) -> tuple[int, int]:
        """Where in the two arrays what is added begins."""
        offsets = (
            sum(part.size for part in self.weights),
            sum(part.size for part in self.constants),
        )
        self.parts.append((name, *offsets))
        self.weights.append(np.pad(weights, (0, -weights.size % 4)))
        self.constants.append(constants)
        return offsets


def _layers(project: Project, step: Step, data: _Data) -> dict[str, Any]:
    """A step as the template wants it."""
    fused: dict[str, Any] = {
        "title": step.name,
        "step": step,
        "input": _place(project, step.inputs[0]),
        "output": _place(project, step.output),
    }
    if isinstance(step, Block | Chain):
        blocks = (step,) if isinstance(step, Block) else (step.first, step.second)
        index = project.steps.index(step)
        fused |= {
            "kind": "blocks",
            "blocks": [
                _block(block, offsets, data)
                for block, offsets in zip(blocks, steps.offsets(step), strict=True)
            ],
            "scratch": project.arena.scratch[index] // step.output.itemsize,
            "scratch_bytes": steps.scratch(step).nbytes,
        }
    elif isinstance(step.operator, Add):
        fused |= {
            "kind": "add",
            "addition": _addition(step.operator, data),
            "other": _place(project, step.operator.other),
            "count": step.output.size,
        }
    else:
        fused |= {"kind": "average", "average": _average(step.operator, data)}
    return fused


def _block(block: Block, offsets: Offsets, data: _Data) -> dict[str, Any]:
    name = data.name(f"{block.name}_step")
    parts = ("expand", "depthwise", "project")
    made = {
        part: _convolution(getattr(block, part), data)
        for part in parts
        if getattr(block, part) is not None
    }
    size = block.output.itemsize
    return {
        "name": name,
        "convolutions": list(made.values()),
        "parts": {part: made[part]["name"] if part in made else None for part in parts},
        "residual": _addition(block.residual, data),
        "input_second": int(
            block.residual is not None and block.residual.input != block.inputs[0]
        ),
        "offsets": {part: at // size for part, at in vars(offsets).items()},
    }


def _convolution(convolution: Convolution, data: _Data) -> dict[str, Any]:
    name = data.name(convolution.name)
    weights: NDArray[Any]
    constants: NDArray[Any]
    if data.floating:
        weights, constants = _packed_floats(convolution), _padded(convolution.bias)
    else:
        weights = _packed(convolution, data.layout)
        constants = requantise.of_convolution(convolution)
    offsets = data.add(name, weights, constants)
    return {
        "name": name,
        "title": convolution.name,
        "weights": offsets[0],
        "constants": offsets[1],
        "depth": convolution.depth
        if convolution.depthwise
        else steps.padded_depth(convolution),
        "source": convolution.input,
        "output": convolution.output,
        "kernel": convolution.kernel,
        "strides": convolution.strides,
        "pads": convolution.pads,
        "direct": int(steps.direct(convolution)),
        "low": convolution.low,
        "high": convolution.high,
        "limits": convolution.limits,
        "limited": int(np.isfinite(convolution.limits).any()),
        "macs": convolution.macs,
    }


def _packed(convolution: Convolution, layout: int) -> NDArray[np.int8]:
    """The weights in the order of int8.h (see NN_LAYOUT there), flat."""
    weights = convolution.weights
    if convolution.depthwise:
        together = 4 if layout == _SMLAD else 8
        grouped = _by_tap(weights, together)
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


def _packed_floats(convolution: Convolution) -> NDArray[np.float32]:
    """The weights in the order of float32.h, flat."""
    weights = convolution.weights
    if convolution.depthwise:
        return _by_tap(weights, 4).ravel()
    flat = weights.reshape(weights.shape[0], -1)
    flat = np.pad(flat, ((0, -flat.shape[0] % 4), (0, -flat.shape[1] % 4)))
    # [channel, depth] → [channels together, depth, channel].
    return flat.reshape(-1, 4, flat.shape[1]).transpose(0, 2, 1).ravel()


def _by_tap(weights: NDArray[Any], together: int) -> NDArray[Any]:
    """Of a depthwise convolution: [channels together, tap, channel]."""
    flat = weights.reshape(-1, weights.shape[2])
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % together)))
    return flat.reshape(flat.shape[0], -1, together).transpose(1, 0, 2)


def _padded(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.pad(bias.astype(np.float32), (0, -bias.size % 4))


def _average(pool: AveragePool, data: _Data) -> dict[str, Any]:
    name = data.name(f"{pool.name}_mean")
    kind: dict[str, Any] = {}
    if not data.floating:
        constants = requantise.of_average(pool)
        _, offset = data.add(name, np.zeros(0, np.int8), constants)
        kind = {"constants": offset}
    return kind | {"name": name, "source": pool.input, "output": pool.output}


def _addition(add: Add | None, data: _Data) -> dict[str, Any] | None:
    if add is None:
        return None
    kind = {} if data.floating else {"constants": requantise.of_addition(add)}
    return kind | {
        "name": data.name(f"{add.name}_sum"),
        "title": add.name,
        "low": add.low,
        "high": add.high,
        "limits": add.limits,
    }


def _place(project: Project, tensor: Tensor) -> str:
    """A tensor's address in the generated function."""
    if tensor.name == project.network.output.name:
        return "output"
    if tensor.name == project.network.input.name:
        return "input"
    return f"base + {project.arena.offset(tensor.name) // tensor.itemsize}"


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
        "floating": network.floating,
        "kind": "float32" if network.floating else "int8",
        "value": "float" if network.floating else "int8_t",
        "constant": "float" if network.floating else "nn_scale",
        "constants_name": "bias" if network.floating else "scales",
        "input_offset": arena.offset(network.input.name),
        "layers": layers,
        "weights_bytes": sum(part.nbytes for part in data.weights),
        "constants_bytes": sum(part.nbytes for part in data.constants),
        "weights": _texts(np.concatenate(data.weights)),
        "constants": _texts(np.concatenate(data.constants)),
        "parts": data.parts,
        "macs": sum(step.macs for step in project.steps),
        **drawing.geometry(arena, project.steps),
    }


def _render(template: str, values: dict[str, Any]) -> str:
    environment = templates.code_environment(_HERE)
    environment.filters |= {
        "comment": _comment,
        "dims": lambda shape: "x".join(map(str, shape)),
        "number": "{:,}".format,
        "c_double": lambda value: repr(float(value)),
        "c_float": _c_float,
        "c_limit": lambda value: (
            f"{np.float32(np.clip(value, -_FLOAT_MAX, _FLOAT_MAX))!s}f"
        ),
    }
    return environment.get_template(template).render(values)


def _texts(values: NDArray[Any]) -> list[str]:
    """C constants, exact."""
    if values.dtype == np.float32:
        return [_c_float(value) for value in values.tolist()]
    if values.dtype == requantise.SCALE:
        return [f"{{{bias}, {_c_float(ratio)}}}" for bias, ratio in values.tolist()]
    return list(map(str, values.tolist()))


def _c_float(value: float) -> str:
    """A C constant of type float, exact: hexadecimal, without zeros that say nothing."""
    digits, exponent = max(min(value, _FLOAT_MAX), -_FLOAT_MAX).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"


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
