"""int8's rounding: ONNX Runtime's, bit by bit, in numpy and in what is compiled for CPUs with and without FMA."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from relay_worker import relay_worker

from compile.ir import evaluate
from compile.ir.graph import (
    Add,
    AveragePool,
    Convolution,
    Network,
    Quantisation,
    Tensor,
)
from targets.errors import UserError

CPUS = ["x86-64-v2", "x86-64-v3"]
ONNX_TYPES = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8}


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


def tensor(name: str, shape: Any, offset: int, random: np.random.Generator) -> Tensor:
    scale = np.float32(random.uniform(0.02, 0.3))
    zero = int(random.integers(-128, 128))
    return Tensor(name, shape, Quantisation(float(scale), zero, offset))


def additions(offset: int, count: int) -> Iterator[Add]:
    """Additions of seeded scales and zero points over 256×256 values."""
    random = np.random.default_rng(offset)
    for _ in range(count):
        a, b, c = (tensor(name, (256, 256, 1), offset, random) for name in "abc")
        yield Add("sum", a, b, c)


def every_pair() -> dict[str, evaluate.Integers]:
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    return {"a": a[..., np.newaxis], "b": b[..., np.newaxis]}


def onnx_runtime(
    operator: str, kinds: dict[str, Any], dtype: Any, **options: Any
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


def stored(tensors: dict[str, Tensor], dtype: Any) -> dict[str, Any]:
    """Scales and zero points as ONNX Runtime takes them."""
    values: dict[str, Any] = {}
    for name, each in tensors.items():
        facts = each.quantisation
        values[f"{name}_scale"] = np.asarray(facts.scale, np.float32)
        values[f"{name}_zero"] = np.asarray(facts.zero + facts.offset, dtype)
    return values


@pytest.mark.parametrize("dtype", ONNX_TYPES)
def test_additions_of_every_pair_are_onnx_runtimes(dtype: Any) -> None:
    offset = 128 if dtype == np.uint8 else 0
    kinds = {"a": 1, "a_scale": 0, "a_zero": 0, "b": 1, "b_scale": 0, "b_zero": 0}
    session = onnx_runtime("QLinearAdd", {**kinds, "c_scale": 0, "c_zero": 0}, dtype)
    values = every_pair()
    given = {name: (x + offset).astype(dtype).ravel() for name, x in values.items()}
    for add in additions(offset, 60):
        facts = stored({"a": add.input, "b": add.other, "c": add.output}, dtype)
        (theirs,) = session.run(None, given | facts)
        ours = evaluate.apply(add, values).ravel() + offset
        assert (ours == theirs).all(), add


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("pixels", [1, 5, 7])
def test_average_pools_are_onnx_runtimes(dtype: Any, pixels: int) -> None:
    offset = 128 if dtype == np.uint8 else 0
    kinds = {"x": 4, "x_scale": 0, "x_zero": 0, "y_scale": 0, "y_zero": 0}
    session = onnx_runtime("QLinearGlobalAveragePool", kinds, dtype, channels_last=1)
    random = np.random.default_rng(pixels)
    for _ in range(60):
        x = tensor("x", (pixels, pixels, 512), offset, random)
        y = tensor("y", (1, 1, 512), offset, random)
        values = random.integers(-128, 128, x.shape)
        given = {"x": (values + offset).astype(dtype)[np.newaxis]}
        (theirs,) = session.run(None, given | stored({"x": x, "y": y}, dtype))
        ours = evaluate.apply(AveragePool("mean", x, y), {"x": values})
        assert (ours + offset == theirs[0]).all()


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
    from targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from compile.relay.ops import requantise

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
@pytest.mark.parametrize("stored_offset", [0, 128])
def test_compiled_additions_are_those_of_numpy(
    worker: ProcessPoolExecutor, cpu: str, stored_offset: int
) -> None:
    values = every_pair()
    data = [(values[n] + 128).astype(np.uint8)[np.newaxis] for n in "ab"]
    for add in additions(stored_offset, 3):
        add = replace(add, low=-100, high=127)
        a, b, fixed = evaluate.addition(add)
        arguments = (a, b), fixed, 128 - stored_offset, 28, 255
        ours = worker.submit(compiled, "add", cpu, data, *arguments).result()[0]
        assert (ours.astype(int) - 128 == evaluate.apply(add, values)).all()


def quantised_image(
    scale: float, zero: int, cpu: str, image: NDArray[np.float32]
) -> Any:
    """In the worker: the network's input, 128 lower than its uint8, as compiled for ``cpu``."""
    from targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from compile.relay import integer

    x = tvm.relay.var("x", shape=image.shape, dtype="float32")
    made = integer._quantise(x, Quantisation(scale, zero, 128))
    target = f"llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu={cpu}"
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.relay.build(tvm.IRModule.from_expr(made), tvm.target.Target(target))
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(x=image)
    return executor.get_output(0).numpy().astype(int) - 128


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("scale", [2 / 255, 1 / 127.5, 0.1, 0.018658])
def test_compiled_images_are_quantised_by_division(
    worker: ProcessPoolExecutor, cpu: str, scale: float
) -> None:
    scale = float(np.float32(scale))
    halves = (np.arange(-300, 300) + 0.5).astype(np.float32) * np.float32(scale)
    near = [np.nextafter(halves, np.float32(side)) for side in (-np.inf, np.inf)]
    image = np.concatenate([halves, *near]).reshape(1, 3, 20, 30)
    ours = worker.submit(quantised_image, scale, 5, cpu, image).result()
    source = Tensor("x", (20, 30, 3), Quantisation(scale, 5, 128))
    expected = evaluate.quantise(Network(source, source, ()), image)
    assert (ours[0].transpose(1, 2, 0) == expected).all()
    inverse = np.rint(image * np.float32(1 / scale)) + 5
    assert (np.clip(inverse, -128, 127)[0].transpose(1, 2, 0) != expected).any()


def test_a_sum_that_does_not_fit_32_bits_is_refused_by_name() -> None:
    inputs = 100_000
    convolution = Convolution(
        "wide",
        Tensor("a", (1, 1, inputs)),
        Tensor("b", (1, 1, 1)),
        np.full((1, 1, 1, inputs), 127, np.int8),
        np.array([-5], np.int32),
        np.ones(1),
    )
    bias, largest = evaluate.biases(convolution)
    assert (*bias, *largest) == (-5, 5 + 128 * 127 * inputs)
    # As uint8 the same input is up to 255, and the bias makes up for 128 of them.
    with pytest.raises(UserError, match="'wide': its sums reach 4,864,100,005, which"):
        evaluate.biases(convolution, 128)
