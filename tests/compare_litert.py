"""The ONNX made of .tflite files in ONNX Runtime, next to LiteRT: ``python tests/compare_litert.py FILE … [--inputs 100]``.

For an environment with the package ai-edge-litert, which the project does not need. LiteRT runs twice: as it does by
default (XNNPACK), and with its reference kernels, whose roundings differ from each other, too. Of a quantised output the figures are steps of its scale.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from netship.compile.frontend.tflite.convert import convert
from netship.targets.onnx_runtime import Session

Array = NDArray[Any]
_OURS, _XNNPACK, _REFERENCE = "ours", "XNNPACK", "reference"


def stored_input(details: Any, number: int) -> Array:
    """Noise over all that the input can store; every second time in patches of 8 by 8, as photographs have."""
    random = np.random.default_rng(number)
    shape, dtype = tuple(details["shape"]), np.dtype(details["dtype"])
    if dtype.kind == "f":
        return random.uniform(-1, 1, shape).astype(dtype)
    info = np.iinfo(dtype)
    if number % 2 == 0 or len(shape) != 4:
        return random.integers(info.min, info.max + 1, shape).astype(dtype)
    small = (1, -(-shape[1] // 8), -(-shape[2] // 8), shape[3])
    coarse = random.integers(info.min, info.max + 1, small).repeat(8, 1).repeat(8, 2)
    noise = random.integers(-9, 10, shape)
    whole = coarse[:, : shape[1], : shape[2]] + noise
    return np.asarray(np.clip(whole, info.min, info.max), dtype)


def cropped(details: Any, number: int, photos: list[Path]) -> Array:
    """A seeded part of a photograph, as stored values of an image's input."""
    random = np.random.default_rng(number)
    _, height, width, _ = details["shape"]
    with Image.open(photos[number % len(photos)]) as photo:
        side = random.uniform(0.4, 1) * min(photo.size)
        left, top = (random.uniform(0, each - side) for each in photo.size)
        part = photo.convert("RGB").resize(
            (width, height), box=(left, top, left + side, top + side)
        )
    lowest = np.iinfo(details["dtype"]).min
    return (np.asarray(part, np.int16)[None] + lowest).astype(details["dtype"])


def real(values: Array, details: Any) -> Array:
    scale, zero = details["quantization"]
    if values.dtype.itemsize > 1:
        return values.astype(np.float32)
    steps = values.astype(np.float32) - np.float32(zero)
    return np.asarray(steps * np.float32(scale), np.float32)


class LiteRT:
    """A .tflite file in LiteRT, with its own kernels."""

    def __init__(self, path: Path, kernels: str) -> None:
        litert: Any = importlib.import_module("ai_edge_litert.interpreter")
        kinds = litert.OpResolverType
        self._interpreter = litert.Interpreter(
            model_path=str(path),
            experimental_op_resolver_type=kinds.BUILTIN_REF
            if kernels == _REFERENCE
            else kinds.AUTO,
        )
        self._interpreter.allocate_tensors()
        (self.input,) = self._interpreter.get_input_details()
        self.output = self._interpreter.get_output_details()[0]

    def answer(self, stored: Array) -> Array:
        """Stored values of the first output."""
        self._interpreter.set_tensor(self.input["index"], stored)
        self._interpreter.invoke()
        found: Array = self._interpreter.get_tensor(self.output["index"])
        return found.astype(np.float64)


def compare(path: Path, inputs: int, photos: list[Path]) -> Iterator[str]:
    """A line of the table for each two of the three."""
    litert = {each: LiteRT(path, each) for each in (_XNNPACK, _REFERENCE)}
    source, output = litert[_XNNPACK].input, litert[_XNNPACK].output
    proto = convert(path.read_bytes())
    session = Session(proto.SerializeToString(), path.name)
    given: list[Array] = []
    answers = defaultdict[str, list[Array]](list)
    for number in range(inputs):
        stored = (
            cropped(source, number, photos) if photos else stored_input(source, number)
        )
        feed = {proto.graph.input[0].name: real(stored, source)}
        ours = session.run([proto.graph.output[0].name], feed)[0]
        if output["quantization"][0]:
            scale, zero = output["quantization"]
            ours = np.rint(ours / np.float32(scale)) + zero
        given.append(real(stored, source))
        answers[_OURS].append(ours.astype(np.float64))
        for name, other in litert.items():
            answers[name].append(other.answer(stored))
    for first, second in (
        (_OURS, _XNNPACK),
        (_OURS, _REFERENCE),
        (_XNNPACK, _REFERENCE),
    ):
        a, b = np.array(answers[first]), np.array(answers[second])
        distance = np.abs(a - b)
        rows = [x.reshape(inputs, -1).argmax(1) for x in (a, b)]
        differ = rows[0] != rows[1]
        best = np.sort(b.reshape(inputs, -1))
        apart = (best[:, -1] - best[:, -2])[differ].max(initial=0)
        largest = f"{distance.max():.0f}"
        if output["dtype"] == np.float32:
            largest = f"{distance.max():.1e} of {np.ptp(b):.2g}"
        if a[0].size == given[0].size:
            scale, zero = (
                output["quantization"] if output["quantization"][0] else (1, 0)
            )
            mean = [
                np.square((each - zero) * scale - np.array(given).reshape(each.shape))
                for each in (a, b)
            ]
            errors = [each.reshape(inputs, -1).mean(1) for each in mean]
            moved = np.abs(errors[0] - errors[1]) / errors[1]
            largest += f" (reconstruction error {100 * moved.max():.2g} % apart)"
        yield (
            f"| {path.stem} | {first}, {second} | {largest} | {100 * (distance > 0).mean():.2f} % "
            f"| {(~differ).sum()} of {inputs} | {apart:.3g} | {len(set(rows[1]))} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--images", type=Path, help="photographs, in place of noise")
    options = parser.parse_args()
    photos = sorted(options.images.glob("*.jpg")) if options.images else []
    print(
        "| network | of | largest difference | values that differ | same best "
        "| two best apart where it differs | classes |"
    )
    print("|---|---|---|---|---|---|---|")
    for file in options.files:
        for line in compare(file, options.inputs, photos):
            print(line, flush=True)
