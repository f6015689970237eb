"""ONNX → each runtime's own file, made by its own converter in the emulated system; LiteRT's by ``tflite``."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from netship.bench.baselines import int8_forms, tflite
from netship.bench.baselines.emulated import Emulated
from netship.bench.baselines.int8_graph import is_quantised
from netship.bench.baselines.runtimes import SOURCES, Baseline, Progress, pnnx
from netship.targets.errors import UserError
from netship.targets.files import cache_folder, cache_key, make_once

if TYPE_CHECKING:
    import onnx


def convert(
    machine: Emulated, runtime: Baseline, model: onnx.ModelProto, on_progress: Progress
) -> Path:
    """The file that the runtime loads, made of an ONNX graph with a static input, and kept."""
    key = cache_key(
        hashlib.sha256(model.SerializeToString(deterministic=True)).digest(),
        (machine.cpu, str(machine.root)),
        packages=("flatbuffers", "numpy", "onnx"),
        files=SOURCES,
    )
    name, converter = _CONVERTERS[runtime.package]
    path = cache_folder() / "baseline-models" / f"{runtime.package}-{key}"
    path.parent.mkdir(exist_ok=True)

    def make(folder: Path) -> None:
        folder.mkdir()
        on_progress(f"converting for {runtime.title}")
        converter(machine, folder, model)

    waiting = "waiting for another process that converts a network"
    return make_once(path, make, lambda: on_progress(waiting)) / name


Converter = Callable[[Emulated, Path, "onnx.ModelProto"], None]


def _to_openvino(_machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    model = int8_forms.for_openvino(model) if is_quantised(model) else model
    _write(model, folder)


def _to_mnn(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    # Its command line installs packages without asking; the extension module does not.
    call = "import _tools, sys; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
    files = ["--modelFile", "model.onnx", "--MNNModel", "model.mnn"]
    if is_quantised(model):
        model, parameters = int8_forms.for_mnn(int8_forms.read(model))
        (folder / "int8.json").write_text(parameters)
        files += ["--compressionParamsFile", "int8.json"]
    _write(model, folder)
    words = ["-c", call, "-f", "ONNX", *files, "--bizCode", "netship"]
    said = machine.run(machine.command(words), folder)
    _must_exist(folder / "model.mnn", said)


def _to_ncnn(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    network = int8_forms.read(model) if is_quantised(model) else None
    if network:
        model = int8_forms.with_relu(network)
    _write(model, folder)
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    shape = ",".join(str(d.dim_value) for d in dimensions)
    program = str(pnnx(machine.site))
    words = (program, "model.onnx", f"inputshape=[{shape}]", "fp16=0")
    said = machine.run(machine.command([])._replace(arguments=words), folder)
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    for path in (param, weights):
        _must_exist(path, said)
    if network:
        given = param.read_text(), weights.read_bytes()
        text, data = int8_forms.for_ncnn(network, *given)
        param.write_text(text)
        weights.write_bytes(data)


def _to_tflite(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    schema = _module(machine.site / "ai_edge_litert" / "schema_py_generated.py")
    (folder / "model.tflite").write_bytes(tflite.convert(model, schema))


_CONVERTERS: dict[str, tuple[str, Converter]] = {
    "ai-edge-litert": ("model.tflite", _to_tflite),
    "mnn": ("model.mnn", _to_mnn),
    "ncnn": ("model.ncnn", _to_ncnn),
    "onnxruntime": ("model.onnx", lambda _, folder, model: _write(model, folder)),
    "openvino": ("model.onnx", _to_openvino),
}
CHANNELS_FIRST = frozenset(["ai-edge-litert", "ncnn"])
"""The packages whose conversions take a network as ``plain.plain`` writes it."""


def _write(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _must_exist(path: Path, said: str) -> None:
    if not path.is_file():
        lines = said.strip().splitlines() or ["no reason given"]
        raise UserError(f"its converter made no {path.name}: {lines[-1]}")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
