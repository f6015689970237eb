"""bfloat16 on x86: what is rounded, the kernel beside numpy, what stays in float32, what is refused, whole builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import run
from gated import IDENTITY
from onnx import numpy_helper
from relay_worker import relay_worker

from netship.bundle import golden
from netship.bundle.store import open_bundle
from netship.compile import passes
from netship.compile.backends.request import BuildRequest
from netship.compile.driver import build
from netship.compile.frontend.gate import check
from netship.compile.frontend.model import Model
from netship.compile.passes.bfloat16 import KIND, rounded, weight_bytes
from netship.compile.quantize import bfloat16, simulation
from netship.runtime_demo.comparison import reference_for
from netship.targets.errors import UserError
from netship.targets.presets import PRESETS, resolve, this_cpu
from netship.targets.progress import Progress

ZEN4 = resolve("znver4")
RUNS_HERE = ZEN4.features <= this_cpu().features
# Input and output channels, height and width, kernel, stride, padding, dilation.
CONVOLUTIONS = (
    *((16, 48, (7, 14), 1, 1, 0, 1), (8, 24, (5, 3), 1, 1, 0, 1)),
    *((64, 32, (13, 13), 3, 2, 1, 1), (24, 16, (9, 37), 3, 1, 2, 2)),
    *((40, 8, (1, 1), 1, 1, 0, 1), (16, 16, (8, 30), 5, 3, 2, 1)),
)


def test_numbers_are_rounded_as_bfloat16_is() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = bits[(np.abs(bits) >= np.finfo(np.float32).tiny) | np.isnan(bits)]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded(values), expected)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-40], np.float32)
    assert rounded(special).tolist() == [0.0, 0.0, np.inf, -np.inf, 0.0]


def _kernel(case: Any, runs: bool) -> tuple[float, str]:
    """How far a convolution is from numpy's, of the sum of its magnitudes, where it runs; its assembly."""
    from netship.targets import engine

    tvm = engine.compiler()
    from tvm import relay
    from tvm.contrib import graph_executor

    from netship.compile.relay import module_passes
    from netship.compile.relay.ops import conv2d_bfloat16

    inputs, outputs, size, kernel, stride, pad, dilation = case
    random = np.random.default_rng(0)
    shape = (outputs, inputs, kernel, kernel)
    weights = random.standard_normal(shape, dtype=np.float32)
    x = random.standard_normal((1, inputs, *size), dtype=np.float32)
    data = relay.var("x", shape=x.shape, dtype="float32")
    made = conv2d_bfloat16.convolution(
        data,
        weights,
        "layer",
        strides=(stride, stride),
        padding=(pad,) * 4,
        dilation=(dilation, dilation),
    )
    shift = np.arange(outputs, dtype=np.float32)
    body = relay.clip(relay.nn.bias_add(made, relay.const(shift)), -9.0, 9.0)
    module = tvm.IRModule.from_expr(relay.Function([data], body))
    folded = module_passes.run(module_passes.FOLD, module)
    module = module_passes.run(module_passes.CHANNELS_LAST, folded)
    with tvm.transform.PassContext(opt_level=3):
        factory = relay.build(module, tvm.target.Target(ZEN4.tvm))
    assembly = str(factory.get_lib().get_source("asm"))
    if not runs:
        return 0.0, assembly
    network = graph_executor.GraphModule(factory["default"](tvm.cpu()))
    network.set_input("x", x)
    network.run()
    answer = network.get_output(0).numpy()

    def convolved(x: Any, w: Any) -> Any:
        padded = np.pad(x[0], ((0, 0), (pad, pad), (pad, pad))).astype(np.float64)
        reach = dilation * (kernel - 1) + 1
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, (reach, reach), axis=(1, 2)
        )
        taken = windows[:, ::stride, ::stride, ::dilation, ::dilation]
        return np.einsum("cyxhw,nchw->nyx", taken, w.astype(np.float64))

    exact = convolved(rounded(x), rounded(weights)) + shift[:, None, None]
    sizes = convolved(np.abs(x), np.abs(weights)) + shift[:, None, None]
    return float((np.abs(answer[0] - exact.clip(-9, 9)) / sizes).max()), assembly


def test_convolutions_are_those_of_rounded_numbers() -> None:
    """Also where channels, width and rows are no multiples of a tile; the CPU's instructions are used."""
    with relay_worker() as pool:
        for case in CONVOLUTIONS:
            error, assembly = pool.submit(_kernel, case, RUNS_HERE).result()
            assert "vdpbf16ps" in assembly and "vcvtneps2bf16" in assembly, case
            assert "netship_bfloat16" not in assembly, case
            assert error < 1e-6, case


def network(body: str, **constants: Any) -> Model:
    """A network from ``x`` [1, 8, 9, 9] to ``y``."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 8, 9, 9] x) => (float[1, 16, 9, 9] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in constants.items():
        value = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        tensor = numpy_helper.from_array(value.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    return check(proto, IDENTITY)


MIXED = """a = Conv(x, w) b = Relu(a) c = Conv<group = 24, pads = [1, 1, 1, 1]>(b, d)
    e = Conv(c, v) f = Conv(e, u) y = Conv(f, t)"""
SHAPES = {
    "w": (24, 8, 1, 1),
    "d": (24, 1, 3, 3),
    "v": (12, 24, 1, 1),
    "u": (8, 12, 1, 1),
    "t": (16, 8, 1, 1),
}


def test_convolutions_of_whole_vectors_are_in_bfloat16() -> None:
    model = network(MIXED, **SHAPES)
    images = golden.of_all(golden.signed_inputs, model.inputs, None)
    found = bfloat16.prepare(model, images, 0, ["y"], passes.no_dump)
    reasons = {each.tensor: each.reason for each in found.facts.float32}
    assert reasons == {
        "c": "its channels are in groups",
        "e": "24 and 12 channels, not multiples of 8",
        "f": "12 and 8 channels, not multiples of 8",
        "y": "--keep-float",
    }
    assert [x.output.name for x in found.graph.operators if x.kind == KIND] == ["a"]
    assert {each.dtype for each in found.graph.tensors.values()} == {"float32"}
    again = bfloat16.graph_of(model, found.facts)
    assert weight_bytes(again) == weight_bytes(found.graph) == 4 * 920 - 2 * 192
    with pytest.raises(UserError, match="--keep-float 'z': no operator"):
        bfloat16.prepare(model, images, 0, ["z"], passes.no_dump)
    everything = [each.name or each.output.name for each in found.graph.operators]
    with pytest.raises(UserError, match="nothing of it can be computed in bfloat16"):
        bfloat16.prepare(model, images, 0, everything, passes.no_dump)


def test_tolerances_are_those_of_bfloat16() -> None:
    """The network as ONNX Runtime rounds it passes; weights that are 30% off do not."""
    body = "a = Conv(x, w) b = Relu(a) y = Conv(b, v)"
    shapes = {"w": (16, 8, 1, 1), "v": (16, 16, 1, 1)}
    model = network(body, **shapes)
    (image, _) = golden.of_all(golden.signed_inputs, model.inputs, None)
    found = bfloat16.prepare(model, [image], 0, (), passes.no_dump)
    expected = bfloat16.BFloat16Reference(model, found.graph).check(*image)
    answer = simulation.Probe(found.graph, ["y"], model).run(image)["y"]
    off = np.abs(answer - expected.outputs[0]) / expected.tolerances[0]
    assert 0 < off.max() < 1
    off = np.abs(1.3 * answer - expected.outputs[0]) / expected.tolerances[0]
    assert off.max() > 1


def refused(**options: Any) -> str:
    request = BuildRequest("mobilenetv2-0.35-96", **options, precision="bfloat16")
    with pytest.raises(UserError) as error:
        build(request, Progress(quiet=True))
    return str(error.value)


def test_cpus_without_bfloat16_and_options_that_contradict_it_are_refused() -> None:
    having = {each.name for each in PRESETS if each.has_bfloat16}
    assert having == {"znver4", "sapphirerapids"}
    for target in PRESETS:
        if target.name not in having:
            said = refused(target=target, format=target.format)
            assert f"{target.name} has no bfloat16 arithmetic" in said
    assert "--quantize: " in refused(target=ZEN4, quantize=True)
    assert "--strict-int8: " in refused(target=ZEN4, strict_int8=True)


@pytest.mark.parametrize("kind", ["bundle", "standalone"])
def test_a_build_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """It is compared where this CPU runs it; a check takes the tolerances of bfloat16 again."""
    model = network(MIXED, **SHAPES)
    path = tmp_path / "mixed.onnx"
    onnx.save(model.proto, path)
    options = ("--target", "znver4", "--precision", "bfloat16", "--format", kind)
    output = tmp_path / "out"
    done = run(
        "compile.build",
        *("--model", path, "--output", output, *options),
        *([] if RUNS_HERE else ["--accept-uncompared"]),
    )
    assert done.returncode == 0, done.stderr
    assert "layers in float32: c (its channels are in groups), e (24 and" in done.stdout
    bundle = open_bundle(output)
    manifest = bundle.manifest
    assert manifest.numbers == "bfloat16" and manifest.float16 is None
    assert manifest.lowering.layout == "NHWC"
    assert manifest.lowering.operators["netship.conv2d_bfloat16"] == 2
    assert manifest.bfloat16 and [x.tensor for x in manifest.bfloat16.float32] == [
        "c",
        "e",
        "f",
    ]
    assert manifest.measured["bfloat16"]["cosine"] > 0.999
    assert bool(manifest.measured["verification"]) == RUNS_HERE
    reference, *_ = reference_for(bundle, str(path), 1, Progress(quiet=True))
    assert isinstance(reference, bfloat16.BFloat16Reference)
