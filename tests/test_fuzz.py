"""A few random networks through every road; `tests/fuzz_graphs.py` runs more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from fuzz_graphs import FAULTS, ROADS, Worker, random_graph, run

pytestmark = pytest.mark.slow

_COUNT = 12


def test_a_graph_is_the_same_for_the_same_numbers() -> None:
    one, again, other = (random_graph(0, index) for index in (4, 4, 5))
    assert one == again != other
    onnx.checker.check_model(one, full_check=True)


def test_random_networks_are_right_or_refused(tmp_path: Path) -> None:
    faults = {}
    for found in run([(0, index) for index in range(_COUNT)], list(ROADS), tmp_path):
        for road in ROADS:
            if found[road]["verdict"] in FAULTS:
                faults[found["index"], road] = found[road]["why"]
    assert faults == {}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def text(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {body}')


_NARROW = "agraph (float[1,6,5,3] x) => (float{shape} y) {{ {nodes} }}"


@pytest.mark.parametrize(
    "shape, nodes",
    [
        ("[1,90]", "f = Flatten(x) y = Sigmoid(f)"),
        ("[1,3,6,5]", "t = Transpose <perm = [0,3,1,2]> (x) y = Relu(t)"),
        ("[1,6,5,3]", "y = Sigmoid(x)"),
    ],
)
def test_c_takes_an_input_with_channels_last(
    shape: str, nodes: str, worker: Worker
) -> None:
    verdict, why = worker.verdict(text(_NARROW.format(shape=shape, nodes=nodes)), "c")
    assert verdict == "right", why


_CHAIN = """agraph (float[1,3,6,5] x) => (float[1,3,6,5] y)
<int64[8] pads = {0,0,1,1,0,0,1,1}, int64[2] first = {0,0}, int64[2] last = {6,5}, int64[2] axes = {2,3},
 float[3,1,1] w = {0.1,0.2,0.3}, float[3,3,1,1] c = {1,2,3,-1,2,-3,3,2,1}> {
  v0 = Conv(x, c)
  LINKS
  y = Conv(end, c)
}"""


_MIRRORED = """p{i} = Pad <mode = "reflect"> (v{i}, pads)
  s{i} = Slice(p{i}, first, last, axes) v{j} = Add(v{i}, s{i})"""


def links(link: str, count: int) -> str:
    """A chain from ``v0`` to ``end``."""
    written = [link.format(i=i, j=i + 1) for i in range(count)]
    return " ".join(written).replace(f"v{count} =", "end =")


@pytest.mark.parametrize(
    "graph, roads",
    [
        (  # A convolution of one axis behind a view.
            """agraph (float[1,1,6,5] x) => (float[1,2,30] y)
            <float[2,1,1] w = {1.5, -0.5}> {
              s = Constant <value = int64[3] {1, 1, 30}> ()
              r = Reshape(x, s)
              y = Conv(r, w)
            }""",
            ("c", "int8", "c-int8"),
        ),
        (  # A bias of two dimensions.
            """agraph (float[1,3,2,1] x) => (float[1,2] y)
            <float[6,2] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[1,2] b = {1,2}> {
              f = Flatten(x)
              y = Gemm(f, w, b)
            }""",
            ("c", "int8", "c-int8"),
        ),
        (  # Channels of an image that are no multiple of four.
            """agraph (float[1,5,6,3] x) => (float[1,4,6,3] y)
            <float[4,5,1,1] w = {1,2,3,4,5,6,7,8,9,10,-1,-2,-3,-4,-5,-6,-7,-8,-9,-10}> {
              y = Conv(x, w)
            }""",
            ("native", "int8"),
        ),
        (  # The same where something is dilated.
            """agraph (float[1,3,6,6] x) => (float[1,2,6,2] y)
            <float[2,3,1,3] w = {1,2,3,4,5,6,7,8,9,-1,-2,-3,-4,-5,-6,-7,-8,-9}> {
              y = Conv <dilations = [1,2]> (x, w)
            }""",
            ("int8",),
        ),
        (  # Names that C's programs and <math.h> have.
            """agraph (float[1,3,6,5] x) => (float[1,3,1,1] y)
            <float[3,3,1,1] w = {1,2,3,4,5,6,7,8,9}> {
              main = Conv(x, w)
              y1 = Conv(main, w)
              logf = Conv(y1, w)
              y = GlobalAveragePool(logf)
            }""",
            ("c", "c-int8"),
        ),
        (  # A change of rank that TVM's layout of the convolution cannot follow.
            """agraph (float[1,5,7,3] x) => (float[1,5,1] y)
            <float[5,1,1,1] w = {1,2,3,4,5}> {
              c = Conv <group = 5> (x, w)
              m = ReduceMin <axes = [3], keepdims = 0> (c)
              y = GlobalAveragePool(m)
            }""",
            ("native",),
        ),
        (  # The same where the channels' axis goes.
            """agraph (float[1,3,6,5] x) => (float[1,6,1] y)
            <float[1,3,1,1] w = {1,2,3}> {
              a = Constant <value = int64[1] {1}> ()
              c = Conv(x, w)
              s = Squeeze(c, a)
              y = GlobalAveragePool(s)
            }""",
            ("native",),
        ),
        (  # The same where another convolution reads what is left.
            """agraph (float[1,3,6,5] x) => (float[1,10,5] y)
            <float[1,3,1,1] w = {1,2,3}, float[10,6,1] v = {VALUES}> {
              a = Constant <value = int64[1] {1}> ()
              c = Conv(x, w)
              s = Squeeze(c, a)
              e = Selu(s)
              y = Conv(e, v)
            }""".replace("VALUES", ",".join(map(str, range(60)))),
            ("native",),
        ),
        (  # What is read for a maximum, written, and read again: TVM's C takes it for the same value.
            """agraph (float[1,3,1,1] x) => (float[1,3,1,1] y) {
              m = GlobalMaxPool(x)
              y = Selu(m)
            }""",
            ("c",),
        ),
        (  # A float operator that reads one tensor twice.
            """agraph (float[1,3,6,5] x) => (float[1,3,6,5] y) {
              s = Sub(x, x)
              y = Softmax <axis = 1> (s)
            }""",
            ("int8", "c-int8"),
        ),
        (  # Two outputs that are views of one tensor.
            """agraph (float[1,3,2,2] x) => (float[1,5] y, float[1,1,5] z)
            <float[12,5] w = {VALUES}> {
              f = Flatten(x)
              y = MatMul(f, w)
              a = Constant <value = int64[3] {1,1,5}> ()
              z = Reshape(y, a)
            }""".replace("VALUES", ",".join(map(str, range(60)))),
            ("native", "int8", "c", "c-int8"),
        ),
        (  # A maximum over three axes.
            """agraph (float[1,3,6,5] x) => (float[1,1,1,1,1] y) {
              a = Constant <value = int64[1] {1}> ()
              u = Unsqueeze(x, a)
              y = GlobalMaxPool(u)
            }""",
            ("native", "int8"),
        ),
        (  # A table's constant of more axes than the values.
            """agraph (float[1,3,6,5] x) => (float[1,1,3,6,5] y)
            <float[1,1,1,1,1] w = {0.7}> {
              a = Constant <value = int64[1] {1}> ()
              s = Sigmoid(x)
              u = Unsqueeze(s, a)
              y = Add(u, w)
            }""",
            ("int8",),
        ),
        (  # Windows and rows of infinities alone.
            """agraph (float[1,2,6,6] x) => (float[1,2,5,5] y, float[1,2,6,6] p, float[1,2,6,1] m, float[1,2,1,1] g,
              float[1,2,5,5] a, float[1,2,5,5] i, float[1,2,6,1] s, float[1,2,6,1] t, float[1,2,5,5] d)
            <float[1] z = {0}, float[1] h = {0.5}> {
              b = Relu(x)
              l = Log(b)
              q = MaxPool <kernel_shape = [2,2]> (l)
              y = Mul(q, h)
              p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (l)
              m = ReduceMax <axes = [3]> (l)
              g = GlobalMaxPool(l)
              a = AveragePool <kernel_shape = [2,2]> (l)
              o, j = MaxPool <kernel_shape = [2,2]> (l)
              i = Cast <to = 1> (j)
              s = ReduceLogSumExp <axes = [3]> (l)
              n = Neg(l)
              t = ReduceLogSumExp <axes = [3]> (n)
              d = LpPool <kernel_shape = [2,2]> (l)
            }""",
            ("native", "c"),
        ),
        (  # The same tensor twice.
            """agraph (float[1,3,6,5] x) => (float[1,6,6,5] y) {
              r = Sigmoid(x)
              y = Concat <axis = 1> (r, r)
            }""",
            ("native", "int8"),
        ),
        (  # One class, behind integers: x - max is a fused multiply-add there, whose rounding stays.
            """agraph (float[1,3,6,5] x) => (float[1,1,6,5] y)
            <float[1,3,1,1] w = {1.3,2.1,3.7}> {
              c = Conv(x, w)
              y = LogSoftmax <axis = 1> (c)
            }""",
            ("int8", "c-int8"),
        ),
        (  # What cancels in the reference, and not in a fused multiply-add.
            """agraph (float[1,3,6,5] x) => (float[1,3,6,5] y)
            <float[1] w = {0.3}> {
              m = Mul(x, w)
              n = Neg(m)
              y = Add(m, n)
            }""",
            ("native", "c"),
        ),
        (  # A tensor that is nearly constant has no histogram.
            """agraph (float[1,3,6,5] x) => (float[1,2,6,5] y)
            <float[2,3,1,1] w = {1,2,3,-1,-2,-3}, float[1] far = {17}> {
              a = Add(x, far)
              s = Sigmoid(a)
              y = Conv(s, w)
            }""",
            ("int8",),
        ),
        (  # Windows in the padding alone.
            """agraph (float[1,28,28,1] x) => (float[1,28,10,1] y) {
              y = MaxPool <ceil_mode = 1, dilations = [2,2], kernel_shape = [1,2], pads = [0,1,0,1],
                strides = [3,3]> (x)
            }""",
            ("c",),
        ),
        (  # Views in other places than the end, and of images as outputs: C keeps channels last.
            """agraph (float[1,4,6,5] x) => (float[1,3] y, float[1,120] f, float[1,2,6,5] z, float[1,120] r)
            <float[4,1,3,3] d = {KERNEL}, float[120,3] w = {VALUES}, float[2,4,1,1] v = {1,2,3,4,-1,2,-3,4}> {
              a = Conv <group = 4, pads = [1,1,1,1]> (x, d)
              f = Flatten(a)
              y = Gemm(f, w)
              s = Constant <value = int64[4] {1,4,6,5}> ()
              t = Constant <value = int64[4] {1,4,5,6}> ()
              b = Reshape(a, t)
              e = Sigmoid(b)
              c = Reshape(e, s)
              z = Conv(c, v)
              g = Flatten(c)
              r = Relu(g)
            }""".replace("KERNEL", ",".join(str(n % 7 - 3) for n in range(36))).replace(
                "VALUES", ",".join(str(n % 11 - 5) for n in range(360))
            ),
            ("native", "c", "int8", "c-int8"),
        ),
        (_CHAIN.replace("LINKS", links("v{j} = PRelu(v{i}, w)", 20)), ("c",)),
        (_CHAIN.replace("LINKS", links("v{j} = LeakyRelu(v{i})", 24)), ("int8",)),
        (  # Pads whose indices TVM writes into each other: a minute for four.
            _CHAIN.replace("LINKS", links(_MIRRORED, 6)),
            ("native", "c", "int8"),
        ),
    ],
)
def test_what_random_networks_found(
    graph: str, roads: tuple[str, ...], worker: Worker
) -> None:
    found = {road: worker.verdict(text(graph), road) for road in roads}
    assert {road: each for road, each in found.items() if each[0] in FAULTS} == {}
    assert "zig failed" not in str(found) and "quantiser refuses" not in str(found)
