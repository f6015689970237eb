"""Write a program as C, compile it with its kernels and weights, and make the library of it."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.accuracy import TOLERANCE
from bundle.manifest import MemoryPlan
from compile.program.planner import Plan, plan
from compile.program.program import Program
from compile.program.verifier import verify
from targets import templates
from targets.errors import UserError
from targets.presets import Target
from targets.toolchain import archive, compile_object, hide_symbols, link_shared

_HERE = Path(__file__).parent
_ALIGNMENT = 64
_EXPORTED = (
    "version",
    "workspace_bytes",
    "memory_bytes",
    "create",
    "create_in",
    "last_error",
    "error_text",
    "run",
    "destroy",
    "self_test",
)
# DLDataType codes (dlpack.h): signed integer, unsigned integer, float.
_DTYPES = {
    "float32": (2, 32),
    "int32": (0, 32),
    "int64": (0, 64),
    "int8": (0, 8),
    "uint8": (1, 8),
    "bool": (1, 1),
}


@dataclass(frozen=True)
class SelfTest:
    """What ``NAME_self_test`` runs: an input made by a formula between ``low`` and ``high``
    (see library.c.jinja), and the reference's output for it."""

    low: float
    high: float
    expected: tuple[float, ...]


def self_test_input(
    low: float, high: float, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The input that library.c.jinja's ``test_input`` makes, float32 of ``shape``."""
    indices = np.arange(prod(shape), dtype=np.uint32)
    hashes = (indices * np.uint32(2654435761)) >> np.uint32(16)
    return (low + (high - low) * (hashes / 65535.0)).astype(np.float32).reshape(shape)


@dataclass(frozen=True)
class Standalone:
    """What a library is called, and what it says of itself."""

    name: str
    model: str
    version: str
    self_test: SelfTest


def emit(
    folder: Path,
    wanted: Standalone,
    program: Program,
    kernels: Sequence[Path],
    target: Target,
    dump: Path | None,
) -> MemoryPlan:
    """Write the library, its header, an example and a page into ``folder``.

    Args:
        kernels: the object files of the compiled kernels.
        dump: where all that the library is made of is left, if anywhere.

    Raises:
        UserError: the network has not one input and one output, or a tool failed.
    """
    if len(program.inputs) != 1 or len(program.outputs) != 1:
        raise UserError(
            f"{wanted.model}: has {len(program.inputs)} inputs and {len(program.outputs)} outputs; "
            "a standalone library takes one of each: use --format bundle"
        )
    if program.storage(program.inputs[0]) == program.storage(program.outputs[0]):
        raise UserError(
            f"{wanted.model}: its output is its input; there is nothing to build"
        )
    layout = _lay_out(program)
    values = _values(wanted, program, layout, target)
    with tempfile.TemporaryDirectory() as scratch:
        parts = Path(scratch) / "parts"
        sources = _write_sources(parts, values, layout.weights)
        if dump is not None:
            shutil.copytree(parts, dump, dirs_exist_ok=True)
            for kernel in kernels:
                shutil.copy(kernel, dump)
        objects = [source.with_suffix(".o") for source in sources]
        for source, output in zip(sources, objects, strict=True):
            compile_object(source, output, target, "-std=gnu11", f"-I{parts}")
        whole = parts / "whole.o"
        exported = [f"{wanted.name}_{function}" for function in _EXPORTED]
        hide_symbols([*objects, *kernels], whole, exported)
        link_shared([whole], folder / f"lib{wanted.name}.so", target)
        archive([whole], folder / f"lib{wanted.name}.a")
    for template, file in (
        ("library.h.jinja", f"{wanted.name}.h"),
        ("wrapper.py.jinja", f"{wanted.name}.py"),
        ("example.c.jinja", "example.c"),
        ("README.md.jinja", "README.md"),
    ):
        (folder / file).write_text(_render(template, values), encoding="utf-8")
    return layout.plan.describe(program)


@dataclass(frozen=True)
class _Layout:
    """Where every tensor lies: (in the weights, offset) of each, by its index in the program."""

    places: dict[int, tuple[bool, int]]
    plan: Plan
    weights: bytes


def _lay_out(program: Program) -> _Layout:
    weights = bytearray()
    places: dict[int, tuple[bool, int]] = {}
    for index, tensor in enumerate(program.tensors):
        if tensor.weights is not None:
            weights += bytes(-len(weights) % _ALIGNMENT)
            places[index] = (True, len(weights))
            weights += tensor.weights
    planned = plan(program, _ALIGNMENT)
    verify(program, planned)
    places |= {index: (False, offset) for index, offset in planned.offsets.items()}
    places |= {alias: places[program.storage(alias)] for alias in program.aliases}
    return _Layout(places, planned, bytes(weights))


def _write_sources(folder: Path, values: dict[str, Any], weights: bytes) -> list[Path]:
    """Write all but the kernels that the library is made of; what of it is to be compiled."""
    folder.mkdir()
    (folder / "weights.bin").write_bytes(weights)
    for name in ("library.h", "library.c", "weights.S"):
        text = _render(f"{name}.jinja", values)
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("runtime.h", "runtime.c"):
        shutil.copy(_HERE / name, folder)
    return [folder / name for name in ("library.c", "weights.S", "runtime.c")]


def _values(
    wanted: Standalone, program: Program, layout: _Layout, target: Target
) -> dict[str, Any]:
    """What the templates are filled with."""
    ports = {
        program.storage(program.inputs[0]): "NN_INPUT",
        program.storage(program.outputs[0]): "NN_OUTPUT",
    }

    def place(index: int) -> tuple[str, int]:
        constant, offset = layout.places[index]
        port = ports.get(program.storage(index))
        return (port, 0) if port else ("NN_WEIGHTS" if constant else "NN_ARENA", offset)

    def shown(index: int) -> str:
        kind, offset = place(index)
        return f" at {offset}" if kind == "NN_ARENA" else ""

    used = sorted(layout.places)
    numbers = {index: number for number, index in enumerate(used)}
    tensors = [
        {
            "shape": program.tensors[index].shape,
            "dtype": _DTYPES[program.tensors[index].dtype],
            "place": place(index)[0],
            "offset": place(index)[1],
        }
        for index in used
    ]
    calls = [
        {
            "kernel": call.kernel,
            "layer": call.layer,
            "operators": " + ".join(
                name.removeprefix("nn.") for name in call.operators
            ),
            "arguments": [numbers[argument] for argument in call.arguments],
            "input": program.tensors[call.inputs[0]],
            "output": program.tensors[call.outputs[0]],
            "input_place": shown(call.inputs[0]),
            "output_place": shown(call.outputs[0]),
        }
        for call in program.calls
    ]
    return {
        "wanted": wanted,
        "features": sorted(target.features),
        "tensors": tensors,
        "calls": calls,
        "kernels": sorted({call.kernel for call in program.calls}),
        "input": _port(program, layout, program.inputs[0]),
        "output": _port(program, layout, program.outputs[0]),
        "arena_bytes": layout.plan.nbytes,
        "outer_bytes": program.outer_bytes,
        "inner_bytes": program.inner_bytes,
        "weight_bytes": len(layout.weights),
        "weight_crc": zlib.crc32(layout.weights),
        "tolerance": TOLERANCE,
    }


def _port(program: Program, layout: _Layout, index: int) -> dict[str, Any]:
    """The input or output: float32, with the place in the arena where an unaligned one is copied."""
    tensor = program.tensors[index]
    staging = layout.places[index][1]
    return {
        "shape": tensor.shape,
        "nbytes": tensor.nbytes,
        "elements": tensor.nbytes // 4,
        "staging": staging,
    }


def _render(template: str, values: dict[str, Any]) -> str:
    environment = templates.code_environment(_HERE)
    environment.filters |= {
        "c_float": lambda value: f"{float.hex(value)}f",
        "c_double": lambda value: float.hex(value),
        "dims": _dims,
    }
    return environment.get_template(template).render(values)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
