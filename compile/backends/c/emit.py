"""Write a network's steps as a C project."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.accuracy import INT8_STEPS
from netship.compile.backends.c import drawing, placement
from netship.compile.backends.c.ports import dims
from netship.compile.backends.c.project import Project
from netship.compile.backends.c.reserved import (
    FILE_SCOPE,
    LOCAL_NAMES,
    MATH_NAMES,
    OWN_NAMES,
)
from netship.compile.backends.c.scratch import Offsets, project_pixels, scratch
from netship.compile.backends.c.steps import (
    FusedBlock,
    FusedBlocks,
    Generated,
    Step,
    direct,
)
from netship.compile.ir.graph import Tensor
from netship.compile.ir.operators import Addition, Convolution, GlobalAverage, Table
from netship.compile.ir.pointwise import FUNCTIONS, Pointwise
from netship.compile.kernels import cortex_m
from netship.compile.kernels.cortex_m import pack
from netship.targets import templates
from netship.targets.escapes import C_RESERVED, C_TYPES, c_float, ending

_HERE = Path(__file__).parent
_KERNELS = Path(cortex_m.__file__).parent
# What files are called whose templates have another name.
_FILES = {
    "network.h": "{name}.h",
    "network.c": "{name}.c",
    "weights.c": "{name}_weights.c",
    "main.c": "example/main.c",
    "memory.h": "{name}_memory.h",
    "memory.ld": "{name}_memory.ld",
    "memory.sct": "{name}_memory.sct",
}
# What templates take from the project.
_TAKEN = ["version", "core", "outputs", "exact", "extras", "steps", "floating"]
_PART = re.compile(r"^// (\w+)\n.*?^// end\n", re.MULTILINE | re.DOTALL)
_FLOAT_MAX = float(np.finfo(np.float32).max)


class Constants(NamedTuple):
    """What lies in flash besides code.

    Attributes:
        nbytes: weights, biases and, of int8, ratios of scales.
        crc: CRC-32 over them, which the self-test demands.
        largest: the layer with the most weights, and their bytes.
        weights_in: the memory that they lie in; empty where the linker decides.
    """

    nbytes: int
    crc: int
    largest: tuple[str, int]
    weights_in: str = ""


def emit(project: Project, folder: Path) -> Constants:
    """Write the C project into ``folder``, all but the self-test's answer (see `emit_golden`)."""
    data = _Data(project)
    layers = [_layer(project, step, data) for step in project.steps]
    weights, constants = np.concatenate(data.weights), np.concatenate(data.constants)
    found = _sizes(data, weights, constants)
    where = placement.weights_in(
        found.nbytes, found.largest, project.regions, project.graph.quantised
    )
    found = found._replace(weights_in=where)
    addresses = [
        str(layer.get(key, ""))
        for layer in layers
        for key in ("input", "other", "output", "scratch", "arguments")
    ]
    name, kind = project.name, "float32" if project.floating else "int8"
    inputs = project.inputs
    values = {
        "name": name,
        "NAME": name.upper(),
        **{each: getattr(project, each) for each in _TAKEN},
        "detects": "detect" in project.extras,
        "layout": data.layout,
        "wide": int(data.wide),
        "inputs": inputs,
        "source": inputs[0].tensor,
        "float_inputs": [each for each in inputs if each.c_type == "float"],
        "arena": project.plan,
        "kind": kind,
        "value": "float" if project.floating else "int8_t",
        "constant": "float" if project.floating else "nn_scale",
        "constants_name": "bias" if project.floating else "scales",
        "layers": layers,
        "steps_off": INT8_STEPS,
        "spaces": project.spaces,
        "used": [
            space
            for space in project.spaces
            if any(
                re.search(rf"\b{space.base}\b", text)
                for text in (*(each.elsewhere for each in inputs), *addresses)
            )
        ],
        "regions": {each.name: each for each in project.regions},
        "memory_of": lambda buffer: project.space(buffer.offset).memory,
        "weights_in": where,
        "flash_bytes": found.nbytes,
        "libm": _libm(layers),
        "functions": any(_generated(project)),
        "bodies": "".join(each.get("expression", "") for each in layers),
        "arrays": data.arrays,
        "array_types": C_TYPES,
        "weights_bytes": weights.nbytes,
        "constants_bytes": constants.nbytes,
        "weights": _texts(weights),
        "constants": _texts(constants),
        "parts": data.parts,
        **drawing.geometry(project.plan, [each.name for each in project.steps]),
    }
    (folder / "example").mkdir(exist_ok=True)
    unwanted = {"golden.h", *([] if project.core.cpu else ["toolchain.cmake"])}
    if not project.regions:
        unwanted |= {"memory.h", "memory.ld", "memory.sct"}
    for template in {path.stem for path in _HERE.glob("*.jinja")} - unwanted:
        file = _FILES.get(template, template).format(name=name)
        _write(folder / file, template, values)
    plain = kind == "int8" and data.layout == pack.PLAIN
    for header, source in (
        ("kernels", "kernels"),
        (kind, "portable" if plain else kind),
    ):
        text = _kernels(source, without_fpu=kind == "int8" and not project.core.fpu)
        (folder / f"{name}_{header}.h").write_text(text, encoding="utf-8")
    return found


def _kernels(source: str, *, without_fpu: bool) -> str:
    """A header as a project has it: without the lines from // on, which are for who reads this project."""
    text = (_KERNELS / f"{source}.h").read_text(encoding="utf-8")
    if without_fpu:
        own = (_KERNELS / "portable.h").read_text(encoding="utf-8")
        parts = {part[1]: part[0] for part in _PART.finditer(own)}
        text = _PART.sub(lambda part: parts[part[1]], text)
    return re.sub(r"(?m)^//[^\n]*\n", "", text)


def _sizes(data: _Data, weights: NDArray[Any], constants: NDArray[Any]) -> Constants:
    every = [weights, constants, *data.arrays.values()]
    crc = 0
    for each in every:
        crc = zlib.crc32(each.tobytes(), crc)
    ends = [begin for _, begin, _ in data.parts[1:]] + [weights.size]
    sizes = [
        ((end - begin) * weights.itemsize, name)
        for (name, begin, _), end in zip(data.parts, ends, strict=False)
    ]
    nbytes, largest = max(sizes, default=(0, ""))
    return Constants(sum(each.nbytes for each in every), crc, (largest, nbytes))


def _generated(project: Project) -> list[Generated]:
    return [each for each in project.steps if isinstance(each, Generated)]


def emit_golden(
    project: Project,
    folder: Path,
    constants: Constants,
    expected: Sequence[NDArray[Any]],
    tolerances: Sequence[NDArray[Any]],
) -> None:
    """Write what the self-test demands.

    Args:
        expected: the outputs for `test_pattern`, as they are stored, flat.
        tolerances: how far each element may be from it; of an exact project they are not written.
    """
    values = {
        "name": project.name,
        "crc": constants.crc,
        "floating": project.floating,
        "exact": project.exact,
        "outputs": [
            {"port": port, "expected": answer.tolist(), "tolerance": tolerance.tolist()}
            for port, answer, tolerance in zip(
                project.outputs, expected, tolerances, strict=True
            )
        ],
    }
    _write(folder / "golden.h", "golden.h", values)


class _Data:
    """The two arrays in flash, weights and what belongs to the sums; who begins where."""

    def __init__(self, project: Project) -> None:
        self.floating = project.floating
        self.layout = pack.layout_of(project.cpu)
        self.wide = False
        kinds = (np.float32, np.float32) if self.floating else (np.int8, pack.SCALE)
        self.weights: list[NDArray[Any]] = [np.zeros(0, kinds[0])]
        self.constants: list[NDArray[Any]] = [np.zeros(0, kinds[1])]
        self.parts: list[tuple[str, int, int]] = []
        # What generated functions read besides: an array of each type.
        self.arrays: dict[str, NDArray[Any]] = {}
        self.names = {"main", *C_RESERVED, *OWN_NAMES, *LOCAL_NAMES}
        self.names |= {f"{name}{of}" for name in MATH_NAMES for of in ("", "f", "l")}
        self.names |= {f"{project.name}_{name}" for name in FILE_SCOPE}
        self.names |= {each.island.name for each in _generated(project)}
        for space in project.spaces:
            self.names |= {space.pointer, space.base}
        for port in (*project.inputs, *project.outputs):
            self.names |= {port.name, f"golden_{port.name}"}
            self.names |= {f"{project.name}_{port.name}_is_finite"}
        self.names |= {f"{project.name}_{name}" for name in C_TYPES}
        self.names |= {f"nn_{what}_{x}" for what in ("max", "min") for x in C_TYPES}
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
        self,
        name: str,
        weights: NDArray[Any] | None = None,
        constants: NDArray[Any] | None = None,
    ) -> dict[str, int]:
        """Where in the two arrays what is added begins."""
        begin = {
            "weights": sum(part.size for part in self.weights),
            "constants": sum(part.size for part in self.constants),
        }
        self.parts.append((name, begin["weights"], begin["constants"]))
        if weights is not None:
            self.weights.append(np.pad(weights, (0, -weights.size % 4)))
        if constants is not None:
            self.constants.append(constants)
        return begin

    def array(self, values: NDArray[Any]) -> tuple[str, int]:
        """The type of the array that gets ``values``, and where in it they begin."""
        dtype = values.dtype.name
        before = self.arrays.get(dtype, np.zeros(0, values.dtype))
        self.arrays[dtype] = np.concatenate([before, values.ravel()])
        return dtype, before.size


def _layer(project: Project, step: Step, data: _Data) -> dict[str, Any]:
    """A step as network.c.jinja wants it."""
    if isinstance(step, Generated):
        return _call(project, step, data)
    layer: dict[str, Any] = {
        "step": step,
        "input": _place(project, step.inputs[0]),
        "output": _place(project, step.output),
    }
    if isinstance(step, FusedBlock | FusedBlocks):
        own = scratch(step)
        begin = project.plan.scratch[project.steps.index(step)]
        space = project.space(begin)
        begin = (begin - space.begin) // step.output.itemsize
        return layer | {
            "kind": "blocks",
            "spare": int(project.arranged.spare(step)),
            "blocks": [
                _block(block, offsets, data)
                for block, offsets in zip(step.blocks, own.offsets, strict=True)
            ],
            "scratch": f"{space.base} + {begin}" if own.nbytes else space.base,
        }
    (operator,) = step.parts
    layer["operator"] = operator
    if isinstance(operator, Addition):
        layer["name"] = data.name(f"{operator.label}_sum")
        return layer | {"kind": "add", "other": _place(project, operator.other)}
    if isinstance(operator, GlobalAverage):
        layer |= {"kind": "average", "name": data.name(f"{operator.label}_mean")}
        if data.floating:
            return layer
        constants = pack.scales(operator.requantisation)
        return layer | data.add(layer["name"], constants=constants)
    if isinstance(operator, Table):
        name = data.name(f"{operator.label}_table")
        layer |= {"kind": "table", "raw": operator.input.dtype == "uint8"}
        # nn_table takes bytes from 128 on for negative numbers.
        values = np.roll(operator.values, 128 if layer["raw"] else 0)
        return layer | data.add(name, values)
    assert isinstance(operator, Pointwise)
    numbers = {name: _c_limit(each) for name, each in operator.parameters.items()}
    return layer | {
        "kind": "pointwise",
        "name": data.name(operator.label),
        "expression": FUNCTIONS[operator.kind].c.format(**numbers),
    }


def _call(project: Project, step: Generated, data: _Data) -> dict[str, Any]:
    assert step.function is not None
    begin = project.plan.scratch[project.steps.index(step)]
    arguments = [_place(project, each) for each in step.inputs]
    for values in step.function.constants:
        dtype, place = data.array(values)
        arguments.append(f"{project.name}_{dtype} + {place}")
    arguments += [_place(project, each) for each in step.outputs]
    space = project.space(begin)
    arguments.append(f"(uint8_t *){space.pointer} + {begin - space.begin}")
    return {
        "step": step,
        "kind": "generated",
        "name": step.island.name,
        "arguments": arguments,
        "expression": step.function.text,
    }


def _block(block: FusedBlock, offsets: Offsets, data: _Data) -> dict[str, Any]:
    name, residual = data.name(f"{block.name}_step"), block.residual
    pixels = {"expand": block.pixels, "project": project_pixels(block)}
    parts = {
        part: _convolution(convolution, pixels.get(part, 0), data)
        for part in ("expand", "depthwise", "project")
        if (convolution := getattr(block, part)) is not None
    }
    if residual is not None:
        parts["residual"] = {
            "name": data.name(f"{residual.label}_sum"),
            "operator": residual,
        }
    size = block.output.itemsize
    return {
        "name": name,
        "parts": parts,
        "input_second": int(residual is not None and residual.input != block.inputs[0]),
        "offsets": {part: at // size for part, at in offsets._asdict().items()},
    }


def _convolution(convolution: Convolution, pixels: int, data: _Data) -> dict[str, Any]:
    name, wide = data.name(convolution.label), 0
    weights: NDArray[Any]
    constants: NDArray[Any]
    if data.floating:
        weights, constants = pack.floats(convolution), pack.biases(convolution.bias)
    else:
        weights = pack.integers(convolution, data.layout)
        constants = pack.convolution_scales(convolution, data.layout)
        wide = int(data.layout == pack.SMLAD and pack.wide(convolution))
        data.wide |= bool(wide) and not convolution.depthwise
    return {
        "name": name,
        "operator": convolution,
        "depth": convolution.depth
        if convolution.depthwise
        else pack.padded_depth(convolution),
        "direct": int(direct(convolution)),
        "pixels": min(pixels, 4),
        "wide": wide,
        **data.add(name, weights, constants),
    }


def _place(project: Project, tensor: Tensor) -> str:
    """A tensor's address in the generated function."""
    owner = project.arranged.owner(tensor)
    for port in project.outputs:
        if owner == project.arranged.owner(port.tensor):
            return port.name
    for source in project.inputs:
        if owner == project.arranged.owner(source.tensor):
            return source.name
    begin = project.plan.offsets[owner]
    space = project.space(begin)
    begin -= space.begin
    if tensor.dtype != project.dtype:
        return f"({C_TYPES[tensor.dtype]} *)((uint8_t *){space.pointer} + {begin})"
    return f"{space.base} + {begin // tensor.itemsize}"


def _write(path: Path, template: str, values: dict[str, Any]) -> None:
    environment = templates.code_environment(_HERE)
    filters: dict[str, Callable[..., Any]] = {
        "dims": lambda shape: "x".join(map(str, shape)),
        "number": "{:,}".format,
        "c_double": lambda value: repr(float(value)),
        "c_float": c_float,
        "c_limit": _c_limit,
        "shape": dims,
        "texts": _texts,
        "ending": ending,
    }
    environment.filters |= filters
    text = environment.get_template(f"{template}.jinja").render(values)
    path.write_text(text, encoding="utf-8")


def _texts(values: NDArray[Any]) -> list[str]:
    """C constants, exact."""
    if values.dtype == np.float32:
        return [c_float(value) for value in values.tolist()]
    if values.dtype == np.float64:
        return [c_float(value, "") for value in values.tolist()]
    if values.dtype == pack.SCALE:
        return [f"{{{bias}, {c_float(ratio)}}}" for bias, ratio in values.tolist()]
    return list(map(str, values.astype(np.int64).tolist()))


def _libm(layers: Sequence[dict[str, Any]]) -> str:
    """The functions of the mathematical library that steps call, for a sentence; empty where there are none."""
    expressions = " ".join(each.get("expression", "") for each in layers)
    names = sorted(set(re.findall(r"(\w+f)\(", expressions)))
    return f", and of libm {', '.join(names)}" if names else ""


def _c_limit(value: float) -> str:
    """A C constant of type float in decimals, infinity as the largest that there is."""
    return f"{np.float32(np.clip(value, -_FLOAT_MAX, _FLOAT_MAX))!s}f"
