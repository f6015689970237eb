"""Integers are rounded as ONNX Runtime rounds them: in numpy, and in code compiled for CPUs with and without FMA."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
from integer_operators import (
    addition,
    clamped,
    convolution,
    only,
    per_tensor,
    quantised_tensor,
)
from numpy.typing import NDArray
from onnx import TensorProto, helper
from relay_worker import relay_worker

from netship.compile.ir import evaluate
from netship.compile.ir.graph import Array, Operator, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Addition, Convolution
from netship.compile.passes.storage import store_as_int8, store_as_uint8
from netship.targets.errors import UserError
from netship.targets.presets import resolve

CPUS = ["x86-64-v2", "x86-64-v3"]
ONNX_TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


def tensor(
    name: str, shape: tuple[int, ...], dtype: str, random: np.random.Generator
) -> Tensor:
    scale = float(np.float32(random.uniform(0.02, 0.3)))
    zero = int(random.integers(0, 256)) + np.iinfo(dtype).min
    return quantised_tensor(name, shape, per_tensor(scale, zero), dtype)


def additions(dtype: str, count: int) -> Iterator[Addition]:
    """Additions of seeded scales and zero points over 256×256 values."""
    random = np.random.default_rng(np.iinfo(dtype).max)
    for _ in range(count):
        a, b, c = (tensor(name, (1, 1, 256, 256), dtype, random) for name in "abc")
        yield addition(a, b, c)


def every_pair(dtype: str) -> dict[str, Array]:
    """Two tensors [1, 1, 256, 256] that hold each pair of stored values once."""
    info = np.iinfo(dtype)
    values = np.arange(info.min, info.max + 1).astype(dtype)
    a, b = np.meshgrid(values, values)
    return {"a": a[np.newaxis, np.newaxis], "b": b[np.newaxis, np.newaxis]}


def moved(values: Array, dtype: str) -> Array:
    """8-bit values in another 8-bit type: its lowest for the lowest."""
    shift = np.iinfo(dtype).min - np.iinfo(values.dtype).min
    return (values.astype(int) + shift).astype(dtype)


def answers(operator: Operator, values: dict[str, Array]) -> Iterator[Array]:
    """The output as the model stores it, computed in its own type and in each type that backends store."""
    yield evaluate.apply(operator, values)[operator.output.name]
    for store in (store_as_int8, store_as_uint8):
        graph = store(only(operator))
        inputs = (moved(values[each.name], each.dtype) for each in graph.inputs)
        (made,) = evaluate.run(graph, *inputs)
        yield moved(made, operator.output.dtype)


def onnx_runtime(
    operator: str, kinds: dict[str, Any], dtype: str, **options: Any
) -> Any:
    """A session of one of ONNX Runtime's own quantised operators; ``kinds`` are its inputs and their ranks."""
    integer = ONNX_TYPES[dtype]
    node = helper.make_node(
        operator, list(kinds), ["y"], domain="com.microsoft", **options
    )
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT if name.endswith("scale") else integer,
            [None] * rank,
        )
        for name, rank in kinds.items()
    ]
    output = helper.make_tensor_value_info("y", integer, None)
    graph = helper.make_graph([node], "one", inputs, [output])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def scales_and_zeros(tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    """Scales and zero points as ONNX Runtime takes them."""
    values: dict[str, Any] = {}
    for each in tensors:
        values[f"{each.name}_scale"] = np.asarray(each.scale, np.float32)
        values[f"{each.name}_zero"] = np.asarray(each.zero, each.dtype)
    return values


@pytest.mark.parametrize("dtype", ONNX_TYPES)
def test_additions_of_every_pair_are_onnx_runtimes(dtype: str) -> None:
    kinds = {"a": 1, "a_scale": 0, "a_zero": 0, "b": 1, "b_scale": 0, "b_zero": 0}
    session = onnx_runtime("QLinearAdd", {**kinds, "c_scale": 0, "c_zero": 0}, dtype)
    values = every_pair(dtype)
    given = {name: x.ravel() for name, x in values.items()}
    for add in additions(dtype, 60):
        facts = scales_and_zeros((add.input, add.other, add.output))
        (theirs,) = session.run(None, given | facts)
        for ours in answers(add, values):
            assert (ours.ravel() == theirs).all(), add


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("pixels", [1, 5, 7])
def test_average_pools_are_onnx_runtimes(dtype: str, pixels: int) -> None:
    kinds = {"x": 4, "x_scale": 0, "x_zero": 0, "y_scale": 0, "y_zero": 0}
    session = onnx_runtime("QLinearGlobalAveragePool", kinds, dtype, channels_last=1)
    random = np.random.default_rng(pixels)
    for _ in range(60):
        x = tensor("x", (1, 512, pixels, pixels), dtype, random)
        y = tensor("y", (1, 512, 1, 1), dtype, random)
        values = moved(random.integers(-128, 128, x.shape).astype(np.int8), dtype)
        given = {"x": values.transpose(0, 2, 3, 1)}
        (theirs,) = session.run(None, given | scales_and_zeros((x, y)))
        mean = make("GlobalAveragePool", "mean", [x], [y])
        for ours in answers(mean, {"x": values}):
            assert (ours.ravel() == theirs.ravel()).all(), mean


def sums_and_ratios() -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """[1, 32, 64, 64] of every magnitude, and ratios of which some put many sums on a half."""
    random = np.random.default_rng(1)
    magnitudes = 2 ** random.uniform(0, 31, (1, 32, 64, 64))
    signs = random.choice([-1, 1], magnitudes.shape)
    sums = np.clip(signs * magnitudes, -(2**31) + 200, 2**31 - 200).astype(np.int32)
    ratios = 2 ** random.uniform(-24, 0, 32)
    ratios[::2] = 0.5 ** np.arange(1, 17)
    return sums, ratios.astype(np.float32)


def compiled(call: str, cpu: str, data: list[Any], *arguments: Any) -> Any:
    """In the worker: ``compile.relay.ops.requantise.CALL`` of tensors ``data``, compiled for ``cpu`` and run."""
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.compile.relay.ops import requantise

    tensors = [
        tvm.relay.var(f"x{i}", shape=each.shape, dtype=str(each.dtype))
        for i, each in enumerate(data)
    ]
    module = tvm.IRModule.from_expr(getattr(requantise, call)(*tensors, *arguments))
    target = f"llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu={cpu}"
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.relay.build(module, tvm.target.Target(target))
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(**{f"x{i}": each for i, each in enumerate(data)})
    return executor.get_output(0).numpy()


@pytest.mark.parametrize("cpu", CPUS)
def test_compiled_sums_are_requantised_as_in_numpy(
    worker: ProcessPoolExecutor, cpu: str
) -> None:
    sums, ratios = sums_and_ratios()
    bias = np.arange(-16, 16).astype(np.int32) * 7
    arguments = bias, ratios, 200, 3, 255
    ours = worker.submit(compiled, "requantise", cpu, [sums], *arguments).result()
    products = (sums + bias.reshape(-1, 1, 1)).astype(np.float32) * ratios.reshape(
        -1, 1, 1
    )
    assert (products % 1 == 0.5).sum() > 100
    assert (ours == np.clip(np.rint(products) + 200, 3, 255)).all()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("dtype", ONNX_TYPES)
def test_compiled_additions_are_those_of_numpy(
    worker: ProcessPoolExecutor, cpu: str, dtype: str
) -> None:
    values = every_pair(dtype)
    data = [moved(values[n], "uint8") for n in "ab"]
    lowest = np.iinfo(dtype).min
    for add in additions(dtype, 3):
        add = clamped(add, lowest + 28, lowest + 255)
        (stored,) = store_as_uint8(only(add)).operators
        assert isinstance(stored, Addition)
        assert stored.stored_limits == (28, 255)
        a, b, fixed, offset = stored.requantisation
        arguments = (a, b), fixed, -offset, 28, 255
        ours = worker.submit(compiled, "add", cpu, data, *arguments).result()
        assert (moved(ours, dtype) == evaluate.apply(add, values)["c"]).all()


def quantised_image(operator: Operator, cpu: str, image: NDArray[np.float32]) -> Any:
    """In the worker: the network's input as compiled for ``cpu``."""
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.compile.relay.integer_kernels import IntegerKernels

    x = tvm.relay.var("x", shape=image.shape, dtype="float32")
    made = IntegerKernels(resolve(cpu)).lower(operator, [x])
    target = f"llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu={cpu}"
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.relay.build(tvm.IRModule.from_expr(made), tvm.target.Target(target))
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(x=image)
    return executor.get_output(0).numpy()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("scale", [2 / 255, 1 / 127.5, 0.1, 0.018658])
def test_compiled_images_are_quantised_by_division(
    worker: ProcessPoolExecutor, cpu: str, scale: float
) -> None:
    scale = float(np.float32(scale))
    halves = (np.arange(-300, 300) + 0.5).astype(np.float32) * np.float32(scale)
    near = [np.nextafter(halves, np.float32(side)) for side in (-np.inf, np.inf)]
    image = np.concatenate([halves, *near]).reshape(1, 3, 20, 30)
    x = Tensor("x", image.shape)
    y = quantised_tensor("y", image.shape, per_tensor(scale, 133), "uint8")
    operator = make("QuantizeLinear", "", [x], [y])
    ours = worker.submit(quantised_image, operator, cpu, image).result()
    expected = evaluate.apply(operator, {"x": image})["y"]
    assert ours.dtype == expected.dtype
    assert (ours == expected).all()
    inverse = np.rint(image * np.float32(1 / scale)) + 133
    assert (np.clip(inverse, 0, 255) != expected).any()


def test_a_sum_that_does_not_fit_32_bits_is_refused_by_name() -> None:
    inputs = 100_000
    source = quantised_tensor("a", (1, inputs, 1, 1))
    weights = np.full((1, inputs, 1, 1), 127, np.int8)
    wide = convolution("wide", source, weights, [-5])
    bias, _, largest = wide.requantisation
    assert (*bias, *largest) == (-5, 5 + 128 * 127 * inputs)
    # As uint8 the same input is up to 255, and the bias makes up for 128 of them.
    (stored,) = store_as_uint8(only(wide)).operators
    assert isinstance(stored, Convolution)
    with pytest.raises(UserError, match="'wide': its sums reach 4,864,100,005, which"):
        _ = stored.requantisation
