"""Write a program as C, compile it with its kernels and weights, and make the library of it."""

from __future__ import annotations

import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import MemoryPlan
from netship.bundle.manifest import Tensor as Port
from netship.bundle.task import Detector, Task
from netship.compile.backends import companions
from netship.compile.backends.detector import emit as detector
from netship.compile.backends.dump import writing
from netship.compile.backends.image import emit as images
from netship.compile.backends.image.emit import Image
from netship.compile.backends.segmentation import emit as segmentation
from netship.compile.program.planner import Plan, aligned, plan
from netship.compile.program.program import Program, Tensor
from netship.compile.program.verifier import verify
from netship.targets import templates
from netship.targets.errors import UserError
from netship.targets.escapes import C_TYPES, c_float
from netship.targets.presets import Target
from netship.targets.toolchain import archive, compile_object, hide_symbols, link_shared

_HERE = Path(__file__).parent
_ALIGNMENT = 64
_EXPORTED = re.findall(
    r"\w+",
    "version workspace_bytes memory_bytes create create_in last_error error_text run destroy self_test",
)
# Of a tensor in the header; a truth is 0 or 1.
_C_TYPES = {**C_TYPES, "bool": "uint8_t"}
# Type codes of Python's module array.
_ARRAY_TYPES = {"float32": "f", "int32": "i", "int64": "q", "int8": "b"}
# DLDataType codes (dlpack.h): signed integer, unsigned integer, float.
_DTYPES = {
    **{f"float{bits}": (2, bits) for bits in (16, 32, 64)},
    **{f"int{bits}": (0, bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (1, bits) for bits in (8, 16, 32, 64)},
    "bool": (1, 1),
}


class Answer(NamedTuple):
    """An output of the model by name, the reference's elements of it, and the tolerance of each."""

    name: str
    expected: tuple[float | int, ...]
    tolerance: tuple[float, ...]


@dataclass(frozen=True)
class Input:
    """An input as the templates have it.

    Attributes:
        number: what tells it from others; empty where it is the only one.
        staging: where in the arena it lies while the caller's memory is not aligned.
        low, high: between these lies what a formula makes of it for the self-test (see library.c.jinja).
        test_offset: where the self-test has it, in bytes.
    """

    number: str
    tensor: Tensor
    staging: int
    low: float
    high: float
    test_offset: int

    @property
    def name(self) -> str:
        return f"input{self.number}"

    @property
    def macro(self) -> str:
        return f"INPUT{self.number}"


@dataclass(frozen=True)
class Output:
    """An output as the templates have it.

    Attributes:
        number: what tells it from others; empty where it is the only one.
        staging: where in the arena it lies while the caller's memory is not aligned.
        test_offset: where the self-test has it, in bytes from its first input.
        source: the C buffer that it is a copy of; empty where a kernel writes it.
    """

    number: str
    tensor: Tensor
    answer: Answer
    staging: int
    test_offset: int
    source: str

    @property
    def name(self) -> str:
        return f"output{self.number}"

    @property
    def macro(self) -> str:
        return f"OUTPUT{self.number}"


@dataclass(frozen=True)
class Standalone:
    """What a library is called, what it says of itself, and its self-test.

    Attributes:
        ranges: of each input the least and the largest value in the test.
        answers: the reference's outputs for it.
        image: the input that photographs become; None where all are data.
        labels: of classes; empty where there are none.
        detector: of a detector; ``segmentation``: of a segmenting network; with the input's height and width.
    """

    name: str
    model: str
    version: str
    ranges: tuple[tuple[float, float], ...]
    answers: tuple[Answer, ...]
    image: Image | None = None
    labels: Sequence[str] = ()
    detector: Detector | None = None
    segmentation: Task | None = None
    input_size: tuple[int, int] = (0, 0)


def self_test_input(low: float, high: float, tensor: Port) -> NDArray[Any]:
    """The input that library.c.jinja's ``test_input`` makes, of the input's shape and type."""
    indices = np.arange(tensor.elements, dtype=np.uint32)
    hashes = (indices * np.uint32(2654435761)) >> np.uint32(16)
    values = low + (high - low) * (hashes / 65535.0)
    return values.astype(tensor.dtype).reshape(tensor.shape)


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
        UserError: there is nothing to compute, or a tool failed.
    """
    if not program.calls:
        raise UserError(
            f"{wanted.model}: its output is its input; there is nothing to build"
        )
    layout = _lay_out(program)
    values = _values(wanted, program, layout, target)
    with tempfile.TemporaryDirectory() as scratch:
        parts = Path(scratch) / "parts"
        sources = _write_sources(parts, values, layout.weights)
        exported = [f"{wanted.name}_{function}" for function in _EXPORTED]
        for kind, functions in _write_companions(parts, wanted, program):
            header, code = companions.files(wanted.name, kind)
            shutil.copy(parts / header, folder)
            sources.append(parts / code)
            exported += [f"{wanted.name}_{function}" for function in functions]
        if dump is not None:
            with writing(dump):
                for part in (*sorted(parts.iterdir()), *kernels):
                    shutil.copy(part, dump)
        objects = [source.with_suffix(".o") for source in sources]
        for source, output in zip(sources, objects, strict=True):
            compile_object(source, output, target, "-std=gnu11", f"-I{parts}")
        whole = parts / "whole.o"
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


def _output_ports(wanted: Standalone, program: Program) -> list[companions.Port]:
    tensors = [program.tensors[index] for index in program.outputs]
    return [
        companions.Port(answer.name, tensor.shape, tensor.dtype)
        for answer, tensor in zip(wanted.answers, tensors, strict=True)
    ]


def _write_companions(
    folder: Path, wanted: Standalone, program: Program
) -> Iterator[tuple[str, list[str]]]:
    """The kinds and functions of what comes before and after the network."""
    where, size = (folder, wanted.name, wanted.version), wanted.input_size
    ports = _output_ports(wanted, program)
    if wanted.detector:
        detector.write(*where, wanted.detector, size, ports)
        yield "detect", ["detect"]
    if wanted.segmentation:
        segmentation.write(*where, wanted.segmentation, size, ports[0])
        yield "segment", ["segment", "class_at"]
    if wanted.image:
        images.write(*where, wanted.image)
        yield "image", ["image", "place"]
    if wanted.labels:
        images.write_labels(*where, wanted.labels)
        yield "labels", ["label"]


@dataclass(frozen=True)
class _Layout:
    """Where every tensor lies: nn_place (runtime.h) and offset of each, by its index in the program."""

    places: dict[int, tuple[str, int]]
    plan: Plan
    weights: bytes


def _lay_out(program: Program) -> _Layout:
    weights = bytearray()
    places: dict[int, tuple[str, int]] = {}
    for index, tensor in enumerate(program.tensors):
        if tensor.weights is not None:
            weights += bytes(-len(weights) % _ALIGNMENT)
            places[index] = ("NN_WEIGHTS", len(weights))
            weights += tensor.weights
    planned = plan(program, _ALIGNMENT)
    verify(program, planned)
    places |= {each: ("NN_ARENA", at) for each, at in planned.offsets.items()}
    # The first of the outputs that share memory is written, and none that is the input.
    for number, output in reversed([*enumerate(program.outputs)]):
        places[program.storage(output)] = ("NN_OUTPUT", number)
    for number, source in enumerate(program.inputs):
        places[program.storage(source)] = ("NN_INPUT", number)
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
    used = sorted(layout.places)
    numbers = {index: number for number, index in enumerate(used)}
    inputs, test_bytes = _inputs(wanted, program, layout)
    outputs, test_bytes = _outputs(wanted, program, layout, test_bytes)
    sides = [(0, 0)] * 2
    if wanted.segmentation:
        port = _output_ports(wanted, program)[0]
        sides = segmentation.map_sides(wanted.segmentation, port)
    return {
        **vars(wanted),
        "features": sorted(target.features),
        "map_lines": sides[0][0],
        "map_columns": sides[1][0],
        "machine": target.machine,
        "program": program,
        "places": layout.places,
        "tensors": [
            (*layout.places[index], *_DTYPES[tensor.dtype], tensor.shape)
            for index, tensor in ((each, program.tensors[each]) for each in used)
        ],
        "calls": [
            (call, [numbers[argument] for argument in call.arguments])
            for call in program.calls
        ],
        "kernels": sorted({call.kernel for call in program.calls}),
        "inputs": inputs,
        "outputs": outputs,
        "all_float32": _all_float32(program),
        "test_bytes": test_bytes,
        "arena_bytes": layout.plan.nbytes,
        "outer_bytes": program.outer_bytes,
        "inner_bytes": program.inner_bytes,
        "weight_bytes": len(layout.weights),
        "weight_crc": zlib.crc32(layout.weights),
    }


def _inputs(
    wanted: Standalone, program: Program, layout: _Layout
) -> tuple[list[Input], int]:
    """The inputs, and the bytes of the self-test's inputs together."""
    end, inputs = 0, []
    for number, index in enumerate(program.inputs):
        tensor = program.tensors[index]
        begin = aligned(end, 4 if _all_float32(program) else 8)
        end = begin + tensor.nbytes
        inputs.append(
            Input(
                str(number) if len(program.inputs) > 1 else "",
                tensor,
                layout.plan.offsets[program.storage(index)],
                *wanted.ranges[number],
                test_offset=begin,
            )
        )
    return inputs, end


def _outputs(
    wanted: Standalone, program: Program, layout: _Layout, end: int
) -> tuple[list[Output], int]:
    """The outputs, and the bytes of the self-test's inputs and outputs together, the inputs' being ``end``."""
    outputs = []
    for number, index in enumerate(program.outputs):
        tensor, storage = program.tensors[index], program.storage(index)
        place, at = layout.places[storage]
        made = (place, at) == ("NN_OUTPUT", number)
        begin = aligned(end, 4 if _all_float32(program) else 8)
        end = begin + tensor.nbytes
        outputs.append(
            Output(
                number=str(number) if len(program.outputs) > 1 else "",
                tensor=tensor,
                answer=wanted.answers[number],
                staging=layout.plan.offsets[storage],
                test_offset=begin,
                source="" if made else f"{place[3:].lower()}s[{at}]",
            )
        )
    return outputs, end


def _all_float32(program: Program) -> bool:
    ports = (*program.inputs, *program.outputs)
    return all(program.tensors[port].dtype == "float32" for port in ports)


def _render(template: str, values: dict[str, Any]) -> str:
    environment = templates.code_environment(_HERE)
    environment.filters |= {
        "c_float": c_float,
        "c_double": float.hex,
        "c_number": _c_number,
        "c_type": _c_type,
        "array_type": _array_type,
        "dims": lambda shape: "x".join(map(str, shape)),
    }
    return environment.get_template(template).render(values)


def _c_number(number: float) -> str:
    return c_float(number) if isinstance(number, float) else str(int(number))


def _c_type(tensor: Tensor) -> str:
    return _C_TYPES[tensor.dtype]


def _array_type(tensor: Tensor) -> str:
    return _ARRAY_TYPES.get(tensor.dtype, "B")
