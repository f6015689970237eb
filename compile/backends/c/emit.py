"""Write a network's steps as a C project."""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.accuracy import TOLERANCE
from compile.backends.c import drawing, steps
from compile.backends.c.arrange import ALIGNMENT, Arranged
from compile.backends.c.steps import FusedBlock, FusedBlocks, Offsets, Step
from compile.ir.graph import Graph, Tensor
from compile.ir.operators import (
    Addition,
    Convolution,
    GlobalAverage,
    Limited,
    Table,
)
from compile.ir.pointwise import FUNCTIONS, Pointwise
from compile.kernels import cortex_m
from compile.kernels.cortex_m import pack
from compile.program.planner import Plan
from targets import templates
from targets.escapes import C_RESERVED

_HERE = Path(__file__).parent
_KERNELS = Path(cortex_m.__file__).parent
# What the templates call theirs, by themselves and after the network's name.
_OWN_NAMES = ("overlap", "golden_output", "nn_table")
_FILE_SCOPE = ("weights", "bias", "scales", "run", "self_test")
# What functions of one value and the run function use, and <math.h>.
_LOCAL_NAMES = (
    *(
        "x",
        "i",
        "from",
        "to",
        "count",
        "input",
        "output",
        "arena",
        "base",
        "byte",
        "crc",
    ),
    *("expf", "fabsf", "sqrtf", "tanhf"),
)
_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Project:
    """A network ready to be written: what it is called and says of itself, its steps and their memory."""

    name: str
    version: str
    cpu: str
    graph: Graph
    arranged: Arranged

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.arranged.steps

    @property
    def plan(self) -> Plan:
        return self.arranged.plan

    @property
    def floating(self) -> bool:
        """Whether it works on float32, not on int8."""
        return not self.graph.quantised

    @property
    def input(self) -> Tensor:
        return self.graph.inputs[0]

    @property
    def output(self) -> Tensor:
        return self.graph.outputs[0]


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
        "floating": project.floating,
        "expected": _texts(expected),
        "tolerance": TOLERANCE * float(np.ptp(expected.astype(np.float64))),
    }
    (folder / "golden.h").write_text(
        _render("golden.h.jinja", values), encoding="utf-8"
    )


def test_pattern(graph: Graph) -> NDArray[Any]:
    """The input of the generated self-test: the top byte of Knuth's multiplicative hash of the index.

    As int8, or as float32 from −1 to 1.
    """
    hashes = np.arange(graph.inputs[0].size, dtype=np.uint32) * np.uint32(2654435761)
    pattern = (hashes >> np.uint32(24)).astype(np.uint8).view(np.int8)
    return pattern if graph.quantised else pattern.astype(np.float32) / 128


class _Data:
    """The two arrays in flash, weights and what belongs to the sums; who begins where."""

    def __init__(self, project: Project) -> None:
        self.floating = project.floating
        self.layout = pack.MVE if project.cpu == "cortex-m55" else pack.SMLAD
        kinds = (np.float32, np.float32) if self.floating else (np.int8, pack.SCALE)
        self.weights: list[NDArray[Any]] = [np.zeros(0, kinds[0])]
        self.constants: list[NDArray[Any]] = [np.zeros(0, kinds[1])]
        self.parts: list[tuple[str, int, int]] = []
        self.names = {*C_RESERVED, *_OWN_NAMES, *_LOCAL_NAMES}
        self.names |= {f"{project.name}_{name}" for name in _FILE_SCOPE}
        for header in _KERNELS.glob("*.h"):
            self.names.update(re.findall(r"\bnn_\w+", header.read_text()))

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
    if isinstance(step, FusedBlock | FusedBlocks):
        blocks = (step,) if isinstance(step, FusedBlock) else (step.first, step.second)
        index = project.steps.index(step)
        fused |= {
            "kind": "blocks",
            "blocks": [
                _block(block, offsets, data)
                for block, offsets in zip(blocks, steps.offsets(step), strict=True)
            ],
            "scratch": project.plan.scratch[index] // step.output.itemsize,
            "scratch_bytes": steps.scratch(step).nbytes,
        }
    elif isinstance(step.operator, Addition):
        fused |= {
            "kind": "add",
            "addition": _addition(step.operator, data),
            "other": _place(project, step.operator.other),
        }
    elif isinstance(step.operator, GlobalAverage):
        fused |= {"kind": "average", "average": _average(step.operator, data)}
    elif isinstance(step.operator, Table):
        fused |= {"kind": "table", "table": _table(step.operator, data)}
    elif isinstance(step.operator, Pointwise):
        fused |= {"kind": "pointwise", "function": _function(step.operator, data)}
    fused |= {"count": step.output.size}
    return fused


def _block(block: FusedBlock, offsets: Offsets, data: _Data) -> dict[str, Any]:
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
    name = data.name(convolution.label)
    weights: NDArray[Any]
    constants: NDArray[Any]
    if data.floating:
        weights, constants = pack.floats(convolution), pack.biases(convolution.bias)
    else:
        weights = pack.integers(convolution, data.layout)
        constants = pack.scales(convolution.requantisation)
    offsets = data.add(name, weights, constants)
    return {
        "name": name,
        "title": convolution.label,
        "weights": offsets[0],
        "constants": offsets[1],
        "depth": convolution.depth
        if convolution.depthwise
        else pack.padded_depth(convolution),
        "source": convolution.input,
        "output": convolution.output,
        "kernel": convolution.kernel,
        "strides": convolution.strides,
        "pads": convolution.pads,
        "direct": int(steps.direct(convolution)),
        **_limits(convolution),
        "limited": int(convolution.limited),
        "macs": convolution.macs,
    }


def _average(pool: GlobalAverage, data: _Data) -> dict[str, Any]:
    name = data.name(f"{pool.label}_mean")
    kind: dict[str, Any] = {}
    if not data.floating:
        constants = pack.scales(pool.requantisation)
        _, offset = data.add(name, np.zeros(0, np.int8), constants)
        kind = {"constants": offset}
    return kind | {"name": name, "source": pool.input, "output": pool.output}


def _table(table: Table, data: _Data) -> int:
    """Where in the weights the table begins."""
    name = data.name(f"{table.label}_table")
    begin, _ = data.add(name, table.values, np.zeros(0, pack.SCALE))
    return begin


def _function(operator: Pointwise, data: _Data) -> dict[str, str]:
    """A function of its own in C: its name and what it gives of a float x."""
    numbers = {name: _c_limit(each) for name, each in operator.parameters.items()}
    expression = FUNCTIONS[operator.kind].c.format(**numbers)
    return {"name": data.name(operator.label), "expression": expression}


def _addition(add: Addition | None, data: _Data) -> dict[str, Any] | None:
    if add is None:
        return None
    kind = {} if data.floating else {"constants": add.requantisation}
    return kind | {
        "name": data.name(f"{add.label}_sum"),
        "title": add.label,
        **_limits(add),
    }


def _limits(operator: Limited) -> dict[str, Any]:
    """What the output is limited to, real numbers and stored values."""
    if operator.output.quantisation is None:
        return {"limits": operator.limits}
    low, high = operator.stored_limits
    return {"low": low, "high": high}


def _place(project: Project, tensor: Tensor) -> str:
    """A tensor's address in the generated function."""
    owner = project.arranged.owner(tensor)
    if owner == project.arranged.owner(project.output):
        return "output"
    if owner == project.arranged.owner(project.input):
        return "input"
    return f"base + {project.plan.offsets[owner] // tensor.itemsize}"


def _values(
    project: Project,
    layers: Sequence[dict[str, Any]],
    data: _Data,
) -> dict[str, Any]:
    plan, floating = project.plan, project.floating
    return {
        "name": project.name,
        "version": project.version,
        "cpu": project.cpu,
        "layout": data.layout,
        "source": project.input,
        "output": project.output,
        "arena": plan,
        "alignment": ALIGNMENT,
        "steps": project.steps,
        "floating": floating,
        "kind": "float32" if floating else "int8",
        "value": "float" if floating else "int8_t",
        "constant": "float" if floating else "nn_scale",
        "constants_name": "bias" if floating else "scales",
        "input_offset": plan.offsets[project.arranged.owner(project.input)],
        "layers": layers,
        "libm": _libm(layers),
        "weights_bytes": sum(part.nbytes for part in data.weights),
        "constants_bytes": sum(part.nbytes for part in data.constants),
        "weights": _texts(np.concatenate(data.weights)),
        "constants": _texts(np.concatenate(data.constants)),
        "parts": data.parts,
        "macs": sum(step.macs for step in project.steps),
        **drawing.geometry(plan, len(project.steps)),
    }


def _render(template: str, values: dict[str, Any]) -> str:
    environment = templates.code_environment(_HERE)
    filters: dict[str, Callable[..., str]] = {
        "dims": lambda shape: "x".join(map(str, shape)),
        "number": "{:,}".format,
        "c_double": lambda value: repr(float(value)),
        "c_float": _c_float,
        "c_limit": _c_limit,
    }
    environment.filters |= filters
    return environment.get_template(template).render(values)


def _texts(values: NDArray[Any]) -> list[str]:
    """C constants, exact."""
    if values.dtype == np.float32:
        return [_c_float(value) for value in values.tolist()]
    if values.dtype == pack.SCALE:
        return [f"{{{bias}, {_c_float(ratio)}}}" for bias, ratio in values.tolist()]
    return list(map(str, values.tolist()))


def _c_float(value: float) -> str:
    """A C constant of type float, exact: hexadecimal, without zeros that say nothing."""
    digits, exponent = max(min(value, _FLOAT_MAX), -_FLOAT_MAX).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"


def _libm(layers: Sequence[dict[str, Any]]) -> str:
    """The functions of the mathematical library that steps call, for a sentence; empty where there are none."""
    expressions = (
        each["function"]["expression"] for each in layers if "function" in each
    )
    names = sorted(
        {name for each in expressions for name in re.findall(r"(\w+f)\(", each)}
    )
    return f", and of libm {', '.join(names)}" if names else ""


def _c_limit(value: float) -> str:
    """A C constant of type float in decimals, infinity as the largest that there is."""
    return f"{np.float32(np.clip(value, -_FLOAT_MAX, _FLOAT_MAX))!s}f"
