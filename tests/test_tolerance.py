"""How far an answer may be from the reference: what rounding explains, element by element."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import succeed
from integers import Graph as Writer
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from netship.bundle.accuracy import Array, compare
from netship.bundle.golden import Check, signed_inputs
from netship.bundle.manifest import ModelIdentity, Preprocessing, Tensor
from netship.compile.backends.verify import verify
from netship.compile.frontend import sources
from netship.compile.frontend import tolerance as tolerances
from netship.compile.frontend.gate import check
from netship.compile.frontend.reference import Reference
from netship.compile.frontend.tolerance import tolerance
from netship.targets.errors import UserError


def scores_beside_boxes() -> onnx.ModelProto:
    """Scores from 0 to 1 beside boxes in pixels: the range of the output is the boxes'."""
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8)
    scores = w.node("Sigmoid", "scores", [w.convolution("a", x, 8, 4, 1, clip=False)])
    boxes = w.convolution("b", x, 8, 4, 1, clip=False)
    size = w.constant("size", np.full((1, 4, 1, 1), 1e6, np.float32))
    boxes = w.node("Mul", "boxes", [boxes, size])
    w.node("Concat", "found", [scores, boxes], axis=1)
    return w.finish((1, 8, 8, 8))


def test_a_scalar_output_is_compared() -> None:
    answer, near = np.array(2.0, np.float32), np.array(2.0 + 1e-6, np.float32)
    allowed = tolerance(answer, [near])
    assert allowed.shape == () and allowed > 0
    assert compare([near], [answer], [allowed]).passed
    assert not compare([answer + np.float32(0.1)], [answer], [allowed]).passed


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    onnx.save(scores_beside_boxes(), tmp_path / "m.onnx")
    source = sources.find(str(tmp_path / "m.onnx"), {}, None, lambda stage: None)
    return Reference(source.model)


def an_image(seed: int) -> Array:
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)


def in_doubles(proto: onnx.ModelProto, image: Array) -> Array:
    """The network in float64, rounded once at the end: another right answer."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for tensor in wide.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(
                numpy_helper.from_array(values.astype(np.float64), tensor.name)
            )
    for each in (*wide.graph.input, *wide.graph.output):
        each.type.tensor_type.elem_type = TensorProto.DOUBLE
    del wide.graph.value_info[:]
    (found,) = ReferenceEvaluator(wide).run(None, {"image": image.astype(np.float64)})
    return np.asarray(found).astype(np.float32)


def test_another_order_of_the_sums_is_within_the_tolerance(
    reference: Reference,
) -> None:
    proto = scores_beside_boxes()
    for seed in range(5):
        image = an_image(seed)
        expected = reference.run(image)
        near = reference.tolerances([image], expected)
        assert (near[0] == reference.tolerances([image], expected)[0]).all()
        other = in_doubles(proto, image)
        assert (other != expected[0]).any()
        assert compare([other], expected, near).passed


def test_a_wrong_score_is_seen_beside_boxes_of_a_million(reference: Reference) -> None:
    image = an_image(0)
    expected = reference.run(image)
    near = reference.tolerances([image], expected)
    ours = expected[0].copy()
    ours[0, 2, 1, 1] += 1e-3
    assert compare([ours], expected).relative_error < 1e-9
    result = compare([ours], expected, near)
    assert not result.passed
    assert result.worst is not None and result.worst.place == (0, 2, 1, 1)


def test_a_constant_may_be_a_rounding_off() -> None:
    answer = np.full((1, 10), 0.1, np.float32)
    (near,) = (tolerance(answer, [answer, answer]),)
    assert compare([answer + np.float32(1e-7)], [answer], [near]).passed
    assert not compare([answer + np.float32(1e-4)], [answer], [near]).passed


def test_what_is_infinite_has_no_tolerance() -> None:
    answer = np.array([[-np.inf, np.nan, 1]], np.float32)
    assert tolerance(answer, [answer]).tolist()[0][:2] == [0, 0]


def test_a_tolerance_is_finite_beside_the_largest_values() -> None:
    answer = np.array([[3e38, -3e38, 1]], np.float32)
    near = tolerance(answer, [answer * np.float32(1.1), answer])
    assert np.isfinite(near).all() and (near > 0).all()


def test_inputs_of_a_build_have_both_signs_zeros_and_extremes() -> None:
    image = Tensor(name="x", shape=(1, 3, 8, 8), layout="NCHW")
    positive = Preprocessing(
        resize=8, crop=(8, 8), scale=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
    )
    noise, stripes = signed_inputs(image, positive)
    assert noise.min() < 0 < noise.max() and noise.dtype == np.float32
    assert {0, 1, -1} < set(stripes.ravel().tolist())


@pytest.mark.slow
def test_a_build_refuses_what_the_range_of_the_output_hides(tmp_path: Path) -> None:
    """The verdict of a build on a library whose reference says something else of one score."""
    onnx.save(scores_beside_boxes(), tmp_path / "m.onnx")
    options = ("--model", tmp_path / "m.onnx", "--target", "native")
    succeed("compile.build", *options, "--output", tmp_path / "built")
    source = sources.find(str(tmp_path / "m.onnx"), {}, None, lambda stage: None)
    reference = Reference(source.model)
    image = an_image(1)
    expected = reference.run(image)
    near = reference.tolerances([image], expected)
    right = Check([image], expected, near)
    folder = tmp_path / "built"
    verify(folder, [right], False, lambda stage: None)
    changed = expected[0].copy()
    changed[0, 3, 0, 5] += 1e-3
    with pytest.raises(UserError, match=r"'found' has .* at \[0, 3, 0, 5\] instead"):
        verify(
            folder, [right, Check([image], [changed], near)], False, lambda stage: None
        )
    changed[0, 3, 0, 5] = np.nan
    with pytest.raises(UserError, match="the network itself makes NaN of an input"):
        verify(folder, [Check([image], [changed], near)], False, lambda stage: None)


@pytest.mark.parametrize("kind", ["Sigmoid", "Softplus", "Elu"])
def test_functions_near_their_limit_are_off_by_a_rounding_of_1(
    kind: str, tmp_path: Path
) -> None:
    """A class that is never there has scores of 1e-11, which ONNX Runtime says are 0."""
    w = Writer(3, 8)
    weights = w.constant("w", np.full((4, 3, 1, 1), 0.01, np.float32))
    logits = w.node("Conv", "logits", ["image", weights])
    size = 1e-7 if kind == "Elu" else 25
    far = w.constant("far", np.array(size, np.float32))
    x = w.node("Sub", "shifted", [w.node("Mul", "small", [logits, far]), far])
    w.node(kind, "found", [x])
    onnx.save(w.finish((1, 4, 8, 8)), tmp_path / "m.onnx")
    source = sources.find(str(tmp_path / "m.onnx"), {}, None, lambda stage: None)
    check = Reference(source.model).check(an_image(3))
    exact = in_doubles(source.model.proto, an_image(3))
    assert compare([exact], check.outputs, check.tolerances).passed
    assert not compare([exact + np.float32(1e-5)], *check[1:]).passed


def test_an_integer_is_exact_where_rounding_does_not_change_it() -> None:
    answer = np.array([[3, 7, -2]], np.int64)
    moved = [np.array([[3, 7, -2]]), np.array([[3, 9, -2]]), np.array([[3, 6, -2]])]
    found = tolerance(answer, moved)
    assert found.dtype == np.float32 and found.tolist() == [[0, 2, 0]]
    truth = np.array([True, False])
    assert tolerance(truth, [truth, ~truth]).tolist() == [1, 1]
    assert tolerance(truth, [truth, truth]).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["Sub", "Add", "LogSoftmax", "Log"])
def test_what_cancels_may_be_off_by_a_rounding_of_its_operands(
    kind: str, tmp_path: Path
) -> None:
    """Where the reference says 0 whatever the disturbance, as of the class that is always the best."""
    w = Writer(3, 8)
    weights = w.constant("w", np.full((4, 3, 1, 1), 0.01, np.float32))
    first = w.constant("first", np.array([300, 0, 0, 0], np.float32))
    logits = w.node("Conv", "logits", ["image", weights, first])
    if kind == "LogSoftmax":
        w.node(kind, "found", [logits], axis=1)
    elif kind == "Log":
        w.node(kind, "found", [w.node("Softmax", "s", [logits], axis=1)])
    else:
        best = w.node("ReduceMax", "best", [logits], axes=[1], keepdims=1)
        best = w.node("Neg", "less", [best]) if kind == "Add" else best
        w.node(kind, "found", [logits, best])
    onnx.save(w.finish((1, 4, 8, 8)), tmp_path / "m.onnx")
    source = sources.find(str(tmp_path / "m.onnx"), {}, None, lambda stage: None)
    check = Reference(source.model).check(an_image(3))
    answer, near = check.outputs[0][:, :1], check.tolerances[0][:, :1]
    assert not answer.any()
    size = 1 if kind == "Log" else 300
    off = np.full_like(answer, size * 2.0**-24)
    assert compare([off], [answer], [near]).passed
    assert not compare([64 * off], [answer], [near]).passed


def judged(text: str) -> tuple[Check, onnx.ModelProto]:
    """What the network must answer to an image of [1, 3, 8, 8]."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 21]> agraph (float[1,3,8,8] image) => (float[] y)
        <float[3] scale = {{1.3,-0.7,2.1}}, float[3] bias = {{0.1,0.2,-0.3}}, float many = {{30}}, float third = {{0.3}},
         float less = {{-0.3}}, int64[1] last = {{3}}, int64[4] whole = {{1,3,8,8}}, float[8] ones = {{1,1,1,1,1,1,1,1}}>
        {{ {text} }}"""
    )
    for number, each in enumerate(proto.graph.node):
        each.name = f"node {number}"
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto = onnx.shape_inference.infer_shapes(proto)
    model = check(proto, ModelIdentity(name="m", sha256="0" * 64), layout="NCHW")
    return Reference(model).check(an_image(3)), proto


EQUAL = "g = GlobalMaxPool(image) e = Mul(g, many)"
BIAS = np.array([0.1, 0.2, -0.3], np.float32).reshape(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"{EQUAL} y = InstanceNormalization(e, scale, bias)", BIAS),
        (
            f"{EQUAL} f = Expand(e, whole) y = InstanceNormalization(f, scale, bias)",
            BIAS,
        ),
        (f"{EQUAL} y = GroupNormalization <num_groups = 3> (e, scale, bias)", BIAS),
        (
            f"{EQUAL} f = Expand(e, whole) y = LayerNormalization <axis = 3> (f, ones, ones)",
            np.float32(1),
        ),
    ],
    ids=["one", "equal", "group", "layer"],
)
def test_a_group_of_equal_values_is_normalised_to_the_bias(
    text: str, right: Array
) -> None:
    """ONNX Runtime's x·a + (b − mean·a) is b but for the rounding of x·a, where a is 300."""
    found = judged(text)[0]
    exact = np.broadcast_to(right, found.outputs[0].shape)
    # As far off as the rounding of values up to 30 makes it: times 300.
    off = exact + np.float32(30 * 300 * 2.0**-24)
    for answer in (exact, off):
        assert compare([answer], found.outputs, found.tolerances).passed
    for wrong in (exact + np.float32(0.1), 0 * exact):
        assert not compare([wrong], found.outputs, found.tolerances).passed


def test_a_normalisation_of_different_values_is_as_near_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "y = InstanceNormalization(image, scale, bias)"
    found, proto = judged(text)
    (exact,) = ReferenceEvaluator(proto).run(None, {"image": an_image(3)})
    assert compare([np.asarray(exact)], found.outputs, found.tolerances).passed
    monkeypatch.setattr(tolerances, "written_out", lambda proto, rounding: proto)
    before = judged(text)[0].tolerances[0]
    np.testing.assert_array_less(found.tolerances[0], before * 2)


NEGATIVE = "m = Mul(image, third) n = Neg(m) c = Concat <axis = 3> (m, n)"


@pytest.mark.parametrize(
    "text",
    [
        f"{NEGATIVE} y = ReduceSum(c, last)",
        f"{NEGATIVE} y = ReduceMean(c, last)",
        f"{NEGATIVE} y = AveragePool <kernel_shape = [1, 16]> (c)",
        "m = Mul(image, third) n = Mul(image, less) y = Add(m, n)",
    ],
    ids=["sum", "mean", "pool", "add"],
)
def test_a_sum_that_is_0_in_the_reference_may_be_its_rounding(text: str) -> None:
    """The order of a sum decides whether what cancels does so exactly."""
    found = judged(text)[0]
    off = np.full_like(found.outputs[0], 2.0**-26)
    assert np.abs(found.outputs[0]).max() <= 2.0**-26
    assert compare([off], found.outputs, found.tolerances).passed
    assert not compare([off * 2**12], found.outputs, found.tolerances).passed


def test_weights_that_cancel_do_not_when_they_are_disturbed() -> None:
    """Of w·x - w·x a fused multiply-add leaves the rounding of the product: no channel may be exact."""
    text = """c = Concat <axis = 1> (image, image) s = Mul(scale, many) r = Reshape(s, column) n = Neg(r)
        z = Mul(r, nothing) w = Concat <axis = 1> (r, z, z, n, z, z) y = Conv(c, w)"""
    text = text.replace("column", "three").replace("nothing", "zero")
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> agraph (float[1,3,8,8] image) => (float[1,3,8,8] y)
        <float[3] scale = {{1.3,-0.7,2.1}}, float many = {{0.9}}, int64[4] three = {{3,1,1,1}}, float zero = {{0}}>
        {{ {text} }}"""
    )
    model = check(proto, ModelIdentity(name="m", sha256="0" * 64), layout="NCHW")
    found = Reference(model).check(an_image(3))
    factors = np.array([1.3, 0.7, 2.1], np.float32).reshape(1, 3, 1, 1)
    size = factors * np.abs(an_image(3)[:, :1])
    off = (size * 2.0**-24).astype(np.float32)
    assert not found.outputs[0].any()
    assert compare([off], found.outputs, found.tolerances).passed
    assert not compare([2**14 * off], found.outputs, found.tolerances).passed
