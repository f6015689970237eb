"""A script for the emulated Python: one runtime, one model, one input, two inferences.

``run_baseline.py RUNTIME THREADS MODEL INPUT.npy OUTPUT.npy MARKS.so``: the first inference warms up, the second
is counted, between the calls of MARKS.so (mark.c); its first output is written.
It imports nothing of the project, which the emulated system does not have.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Infer = Callable[[Array], Array]
# ncnn's switches to 16 bits (its Option class); a network in float32 has them off.
_NCNN_16_BITS = (
    "use_fp16_packed",
    "use_fp16_storage",
    "use_fp16_arithmetic",
    "use_bf16_storage",
)


def main() -> None:
    runtime, threads, model, source, result, library = sys.argv[1:]
    tensor = np.load(source)
    infer = _RUNTIMES[runtime](model, tensor, int(threads))
    infer(tensor)
    marks = ctypes.CDLL(library)
    marks.begin()
    output = infer(tensor)
    marks.end()
    np.save(result, np.asarray(output))


def _onnxruntime(model: str, _tensor: Array, threads: int) -> Infer:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    output = session.get_outputs()[0].name
    return lambda x: session.run([output], {name: x})[0]


def _litert(model: str, tensor: Array, threads: int) -> Infer:
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(
        model, num_threads=threads
    )
    interpreter.allocate_tensors()
    into, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    # The input is NHWC and quantised before the inference, as users of LiteRT have it.
    given = tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor
    if into["dtype"] != np.float32:
        scale, zero = into["quantization"]
        limits = np.iinfo(into["dtype"])
        given = np.rint(given / scale + zero).clip(limits.min, limits.max)
    given = np.ascontiguousarray(given, into["dtype"])

    def infer(_: Array) -> Array:
        interpreter.set_tensor(into["index"], given)
        interpreter.invoke()
        y = np.asarray(interpreter.get_tensor(out["index"]))
        if out["dtype"] != np.float32:
            scale, zero = out["quantization"]
            y = (y.astype(np.float32) - zero) * np.float32(scale)
        return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y

    return infer


def _ncnn(model: str, _tensor: Array, threads: int, half: bool = False) -> Infer:
    ncnn = importlib.import_module("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = threads
    for switch in () if half else _NCNN_16_BITS:
        setattr(net.opt, switch, False)
    with tempfile.TemporaryFile() as said:
        # ncnn names the layer that it does not know on the standard error stream alone.
        stream = os.dup(2)
        os.dup2(said.fileno(), 2)
        failed = net.load_param(f"{model}.param") or net.load_model(f"{model}.bin")
        os.dup2(stream, 2)
        said.seek(0)
        reason = said.readline().decode().strip()
    if failed:
        sys.exit(f"it cannot load what its converter made: {reason}")
    into, out = net.input_names()[0], net.output_names()[0]

    def infer(x: Array) -> Array:
        with net.create_extractor() as extractor:
            extractor.input(into, ncnn.Mat(x[0]))
            return np.array(extractor.extract(out)[1])[np.newaxis]

    return infer


def _mnn(model: str, tensor: Array, threads: int, precision: str = "normal") -> Infer:
    nn, expr = (importlib.import_module(f"MNN.{name}") for name in ("nn", "expr"))
    manager = nn.create_runtime_manager(
        ({"backend": "CPU", "numThread": threads, "precision": precision},)
    )
    net = nn.load_module_from_file(model, [], [], runtime_manager=manager)
    given = expr.const(tensor, tensor.shape, expr.NCHW)

    def infer(_: Array) -> Array:
        # read() gives a view of memory that is freed with the variable.
        output = expr.convert(net.forward([given])[0], expr.NCHW)
        return np.array(output.read())

    return infer


def _openvino(model: str, _tensor: Array, threads: int) -> Infer:
    openvino = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = (
        openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    )
    return lambda x: next(iter(request.infer([x]).values()))


_RUNTIMES: dict[str, Callable[[str, Array, int], Infer]] = {
    "litert": _litert,
    "mnn": _mnn,
    "mnn-half": partial(_mnn, precision="low"),
    "ncnn": _ncnn,
    "ncnn-default": partial(_ncnn, half=True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

if __name__ == "__main__":
    main()
