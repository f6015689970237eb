"""TVM in a process of its own, for tests that compile beside tests that load the runtime alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[Any]


class _Worker(ProcessPoolExecutor):
    """Hands on TVM's exceptions as text: to unpickle one is to load TVM."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        return super().submit(_without_tvm, function, *arguments, **named)


def _without_tvm(function: Any, *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except Exception as error:
        if type(error).__module__.startswith("tvm"):
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


@contextmanager
def relay_worker() -> Iterator[ProcessPoolExecutor]:
    """One spawned process, to be given :func:`through_relay`."""
    # Set where this process has loaded the runtime alone, which cannot compile.
    runtime_only = os.environ.pop("TVM_USE_RUNTIME_LIB", None)
    try:
        with _Worker(1, get_context("spawn")) as pool:
            pool.submit(os.getpid).result()
            yield pool
    finally:
        if runtime_only is not None:
            os.environ["TVM_USE_RUNTIME_LIB"] = runtime_only


def through_relay(
    model: bytes, inputs: list[Array], rewrite: bool = True, optimise: bool = True
) -> list[list[Array]]:
    """Import and compile once, answer each input.

    Args:
        rewrite: False imports the model as it is.
        optimise: False compiles four times as fast, where only the import is of interest.
    """
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.compile.frontend.fold import opset
    from netship.compile.ir import onnx_form
    from netship.compile.relay.importer import to_relay

    proto = onnx.load_model_from_string(model)
    name = proto.graph.input[0].name
    if rewrite:
        module = to_relay(onnx_form.read(proto))
    else:
        module, _ = tvm.relay.frontend.from_onnx(
            proto, {name: inputs[0].shape}, opset=opset(proto), freeze_params=True
        )
    target = "llvm -keys=cpu" if optimise else "llvm -keys=cpu -opt-level=0"
    with tvm.transform.PassContext(opt_level=3 if optimise else 1):
        built = tvm.relay.build(module, tvm.target.Target(target))
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    answers = []
    for x in inputs:
        executor.set_input(name, x)
        executor.run()
        count = executor.get_num_outputs()
        answers.append([executor.get_output(k).numpy() for k in range(count)])
    return answers


def through_product(model: bytes, x: Array) -> tuple[list[Array], list[Array], bool]:
    """The answers of a build for this machine and of ONNX Runtime, and whether the build's own check takes them.

    Raises:
        UserError: as a build does.
    """
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.bundle.accuracy import compare
    from netship.bundle.manifest import ModelIdentity
    from netship.compile import passes
    from netship.compile.backends import engine
    from netship.compile.backends.dump import Dump
    from netship.compile.frontend import gate
    from netship.compile.frontend.reference import Reference
    from netship.compile.relay.convert import to_relay
    from netship.targets.presets import native

    identity = ModelIdentity(name="case.onnx", sha256="0" * 64)
    network = gate.check(onnx.load_model_from_string(model), identity)
    graph, reference = passes.read(network.proto, ()), Reference(network)
    expected = reference.run(x)
    job = engine.EngineJob("case.onnx", graph, native(), (), Path("model.so"), None)
    lowered = engine._lower(job, to_relay(graph, job.target), Dump(None))
    executor = graph_executor.GraphModule(lowered.factory["default"](tvm.cpu()))
    executor.set_input(network.inputs[0].name, x)
    executor.run()
    got = [executor.get_output(k).numpy() for k in range(len(expected))]
    checked = compare(got, expected, reference.tolerances([x], expected))
    return got, list(expected), checked.passed


def through_onnxruntime(model: bytes, inputs: list[Array]) -> list[list[Array]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return [list(session.run(None, {name: x})) for x in inputs]


def worst_difference(got: list[Array], expected: list[Array]) -> float:
    """The largest difference of any output, over that output's range; shapes and types must agree."""
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in expected]
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
        for a, b in zip(got, expected, strict=True)
    )
