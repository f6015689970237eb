"""Long chains of elementwise operators and of views build with work that grows with their length."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnx
import pytest
from relay_worker import relay_worker, through_onnxruntime, through_product

from netship.compile.frontend.canonical.rules import canonical
from netship.compile.frontend.canonical.views import join

_SECONDS = 60
_X = np.random.default_rng(4).uniform(-1, 1, (1, 3, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def limited() -> Iterator[ProcessPoolExecutor]:
    """A process that the operating system ends when all the builds together take too long."""
    with relay_worker() as pool:
        limits = (_SECONDS, _SECONDS)
        pool.submit(resource.setrlimit, resource.RLIMIT_CPU, limits).result()
        yield pool


def chain(link: str, length: int = 40, end: str = "y = Identity(v{n})") -> bytes:
    """A network of ``length`` times ``link``, which reads ``v{i}`` and makes ``v{j}``."""
    links = [link.format(i=i, j=i + 1) for i in range(length)]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18]>
        agraph (float[1,3,4,4] v0) => (float[1,3,4,4] y)
        <float half = {{0.5}}, float small = {{0.01}}, int64[1] zero = {{0}}, int64[2] flat = {{1,48}}, int64[4] image = {{1,3,4,4}},
         int64[8] pads = {{0,0,1,1,0,0,1,1}}, int64[2] first = {{0,0}}, int64[2] last = {{4,4}}, int64[2] axes = {{2,3}},
         int64[5] parts = {{1,3,2,2,4}}> {{
          {" ".join(links)} {end.format(n=length)}
        }}"""
    )
    return bytes(proto.SerializeToString())


def padded(mode: str) -> str:
    pad = f'p{{i}} = Pad <mode = "{mode}"> (v{{i}}, pads)'
    return (
        f"{pad} s{{i}} = Slice(p{{i}}, first, last, axes) v{{j}} = Add(v{{i}}, s{{i}})"
    )


SHUFFLED = (
    "f{i} = Reshape(v{i}, parts) t{i} = Transpose <perm = [0,2,1,3,4]> (f{i}) "
    "r{i} = Reshape(t{i}, image) v{j} = Add(v{i}, r{i})"
)


@pytest.mark.parametrize(
    "network",
    [
        chain("s{i} = Sigmoid(v{i}) v{j} = Mul(v{i}, s{i})"),
        chain("v{j} = Mish(v{i})"),
        chain("v{j} = Tanh(v{i})"),
        chain("v{j} = LeakyRelu(v{i})"),
        # TVM cannot compile two of its own in one kernel.
        chain("t{i} = Trilu<upper = 0>(v{i}) v{j} = Sigmoid(t{i})", 3),
        # TVM's rules for sums need a round for each.
        chain("h{i} = Mul(v{i}, half) v{j} = Add(h{i}, h{i})"),
        chain("v{j} = Add(v{i}, small)"),
        chain(
            "b{i} = Less(v{i}, half) n{i} = Neg(v{i}) v{j} = Where(b{i}, v{i}, n{i})",
            20,
        ),
        chain(padded("reflect"), 6),
        chain(SHUFFLED, 10),
    ],
    ids=[
        "silu",
        "mish",
        "tanh",
        "leaky",
        "trilu",
        "doubled",
        "sums",
        "where",
        "pad",
        "shuffle",
    ],
)
def test_a_chain_is_built(limited: ProcessPoolExecutor, network: bytes) -> None:
    got, expected, passed = limited.submit(through_product, network, _X).result()
    assert got[0].shape == expected[0].shape
    assert passed


VIEWS = [
    ("f{i} = Reshape(v{i}, flat) v{j} = Reshape(f{i}, image)", ["Identity"]),
    (
        "f{i} = Flatten(v{i}) u{i} = Unsqueeze(f{i}, zero) v{j} = Reshape(u{i}, image)",
        ["Identity"],
    ),
    (
        "u{i} = Unsqueeze(v{i}, zero) s{i} = Squeeze(u{i}, zero) v{j} = Identity(s{i})",
        ["Identity"],
    ),
    ("v{j} = Transpose <perm = [0,1,3,2]> (v{i})", ["Identity"]),
    ("v{j} = Transpose <perm = [0,3,1,2]> (v{i})", ["Transpose", "Reshape"]),
]


@pytest.mark.parametrize("link, left", VIEWS)
def test_views_of_views_are_one(link: str, left: list[str]) -> None:
    proto = onnx.load_model_from_string(chain(link, end="y = Reshape(v{n}, image)"))
    made = canonical(proto)
    assert [node.op_type for node in made.graph.node] == left
    data = made.SerializeToString()
    (got,), (expected,) = (
        through_onnxruntime(each, [_X])[0] for each in (data, proto.SerializeToString())
    )
    np.testing.assert_array_equal(got, expected)


def test_transpositions_of_different_orders_are_one() -> None:
    body = "t = Transpose <perm = [2,1,3,0]> (v0) v1 = Transpose <perm = [0,3,1,2]> (t)"
    network = chain(body, 1, "r = Tanh(v1) y = Reshape(r, image)")
    made = canonical(onnx.load_model_from_string(network))
    assert [node.op_type for node in made.graph.node] == [
        "Transpose",
        "Tanh",
        "Reshape",
    ]
    (got,), (expected,) = (
        through_onnxruntime(each, [_X])[0]
        for each in (made.SerializeToString(), network)
    )
    np.testing.assert_array_equal(got, expected)


def test_a_view_that_is_read_stays() -> None:
    body = "f = Flatten(v0) v1 = Reshape(f, image) r = Tanh(f) s = Reshape(r, image)"
    proto = onnx.load_model_from_string(chain(body, 1, "y = Add(v1, s)"))
    kinds = [node.op_type for node in canonical(proto).graph.node]
    assert kinds == ["Flatten", "Identity", "Tanh", "Reshape", "Add"]


def test_a_single_view_is_left_as_it_is() -> None:
    network = chain("f = Flatten(v0) t = Tanh(f)", 1, "y = Reshape(t, image)")
    proto = canonical(onnx.load_model_from_string(network))
    assert join(proto) is proto


def _stored(network: bytes) -> tuple[int, bool]:
    """Values that are stored, and whether it is the same module."""
    from netship.compile.ir import onnx_form
    from netship.compile.relay import importer, shared_values
    from netship.compile.relay.expressions import calls

    module = importer.to_relay(onnx_form.read(onnx.load_model_from_string(network)))
    made = shared_values.store(module)
    names = [each.op.name for each in calls(made["main"])]
    return names.count("netship.stored"), made is module


def test_values_are_stored_where_their_copies_are_many(
    limited: ProcessPoolExecutor,
) -> None:
    silu = "s{i} = Sigmoid(v{i}) v{j} = Mul(v{i}, s{i})"
    assert limited.submit(_stored, chain(silu, 8)).result() == (0, True)
    assert limited.submit(_stored, chain("v{j} = Relu(v{i})", 100)).result() == (
        0,
        True,
    )
    # 2**9 products and 2**9 sigmoids are in each kernel.
    assert limited.submit(_stored, chain(silu, 40)).result() == (4, False)


@pytest.mark.parametrize(
    ("link", "length", "stored"),
    [
        (padded("reflect"), 8, 3),
        (padded("edge"), 4, 1),
        (padded("constant"), 4, 0),
        (SHUFFLED, 20, 9),
        (
            "d{i} = SpaceToDepth <blocksize = 2> (v{i}) v{j} = Reshape(d{i}, image)",
            20,
            6,
        ),
        ("b{i} = IsInf(v{i}) v{j} = Where(b{i}, half, v{i})", 20, 9),
        (
            "f{i} = Unsqueeze(v{i}, zero) r{i} = Relu(f{i}) v{j} = Squeeze(r{i}, zero)",
            20,
            0,
        ),
    ],
    ids=["reflect", "edge", "constant", "shuffle", "blocks", "isinf", "rank"],
)
def test_values_are_stored_where_their_indices_are_many(
    limited: ProcessPoolExecutor, link: str, length: int, stored: int
) -> None:
    """An operator that computes an index from several, or several times, writes one into the next."""
    network = chain(link, length, "y = Reshape(v{n}, image)")
    assert limited.submit(_stored, network).result() == (stored, not stored)


def _kernels(network: bytes) -> int:
    """Kernels that sum, found as a build with tuning records finds them."""
    from netship.compile.ir import onnx_form
    from netship.compile.relay import importer, module_passes, tasks
    from netship.targets.engine import compiler

    module = importer.to_relay(onnx_form.read(onnx.load_model_from_string(network)))
    passes = (*module_passes.FOLD, *module_passes.CHANNELS_LAST)
    target = compiler().target.Target("llvm -keys=cpu")
    return len(tasks.kernels(module_passes.run(passes, module), target))


def test_stored_values_stay_stored_where_records_are_looked_for(
    limited: ProcessPoolExecutor,
) -> None:
    """TVM fuses twice there, and `annotation.stop_fusion` is gone the second time."""
    network = chain("v{j} = LeakyRelu(v{i})", 24)
    assert limited.submit(_kernels, network).result() == 0
