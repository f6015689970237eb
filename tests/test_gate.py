"""What the gate lets through, and the one line it refuses everything else with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bundle.manifest import ModelIdentity
from compile.frontend.gate import check, load
from compile.frontend.model_file import MAX_MODEL_BYTES
from targets.errors import UserError

ESCAPE = "\x1b[31mred\nline\x00" + "n" * 1_000_000
IDENTITY = ModelIdentity(name="model", sha256="0" * 64)


def small(
    nodes: list[onnx.NodeProto] | None = None,
    constants: dict[str, Any] | None = None,
    shape: list[Any] | None = None,
    dtype: int = TensorProto.FLOAT,
    opset: int = 13,
    output: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``; a 1×1 convolution unless ``nodes`` says otherwise."""
    if nodes is None:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="stem")]
        constants = {"w": graphs.image((2, 3, 1, 1)), **(constants or {})}
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(
                "x", dtype, [1, 3, 6, 4] if shape is None else shape
            )
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [
            numpy_helper.from_array(np.asarray(v), name)
            for name, v in (constants or {}).items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


def node(
    op: str, inputs: list[str], outputs: list[str], name: str = "n", **more: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=name, **more)


def with_external(
    folder: Path,
    location: str,
    length: int | None = 24,
    offset: int = 0,
    data: bytes = bytes(24),
) -> onnx.ModelProto:
    """The small model, its weights declared to lie in ``location``; w.bin holds ``data``."""
    (folder / "w.bin").write_bytes(data)
    model = small()
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)}
    if length is not None:
        entries["length"] = str(length)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def linked(folder: Path) -> onnx.ModelProto:
    model = with_external(folder, "link.bin")
    (folder / "link.bin").symlink_to(folder / "w.bin")
    return model


def many_inputs() -> onnx.ModelProto:
    model = small([node("Add", ["x", "z"], ["y"])])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    return model


def function_model(bodies: dict[str, list[str]], call: str) -> onnx.ModelProto:
    """Functions of one domain; each body is a chain of calls, ``Relu`` being ONNX's own."""
    model = small([node(call, ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    for name, calls in bodies.items():
        values = ["a", *[f"t{k}" for k in range(1, len(calls))], "b"]
        chain = [
            helper.make_node(
                op, [values[k]], [values[k + 1]], domain="" if op == "Relu" else "own"
            )
            for k, op in enumerate(calls)
        ]
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid("own", 1)]
        model.functions.append(
            helper.make_function("own", name, ["a"], ["b"], chain, opsets)
        )
    return model


def branching() -> onnx.ModelProto:
    branch = helper.make_graph(
        [node("Identity", ["x"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", 1, None)],
    )
    choice = node(
        "If", ["flag"], ["y"], "choose", then_branch=branch, else_branch=branch
    )
    return small([choice], {"flag": np.array(True)})


def quantised() -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return small(nodes)


def constant(value: Any) -> onnx.NodeProto:
    return node(
        "Constant", [], ["c"], value=numpy_helper.from_array(np.asarray(value), "v")
    )


def wrong_size() -> onnx.ModelProto:
    model = small()
    model.graph.initializer[0].raw_data = bytes(20)
    return model


SIZES = np.array([1, 3, 100_000, 100_000], np.int64)
MODELS: dict[str, tuple[onnx.ModelProto, str]] = {
    "opset 5": (small(opset=5), "opset 5 .*7 to 22"),
    "opset 99": (small(opset=99), "opset 99 .*7 to 22"),
    "no opset": (onnx.ModelProto(ir_version=8), "no graph or no opset"),
    "no nodes": (small([]), "no nodes"),
    "an unknown operator": (
        small([node("Frobnicate", ["x"], ["y"], "odd")]),
        r"node 'odd' \(Frobnicate\): is not an operator",
    ),
    "an operator of a later opset": (
        small([node("Mish", ["x"], ["y"])]),
        r"\(Mish\): is not an operator",
    ),
    "a foreign domain": (
        small([node("FusedConv", ["x"], ["y"], "fused", domain="com.microsoft")]),
        r"node 'fused' \(FusedConv\).*com.microsoft",
    ),
    "control flow": (branching(), r"node 'choose' \(If\): control flow"),
    "a function that calls itself": (
        function_model({"f": ["g"], "g": ["f"]}, "f"),
        "calls itself",
    ),
    "functions that explode": (
        function_model(
            {f"f{k}": [f"f{k + 1}"] * 2 if k < 40 else ["Relu"] for k in range(41)},
            "f0",
        ),
        "expand to 1099511627776 nodes",
    ),
    "a cycle": (
        small(
            [
                node("Add", ["x", "b"], ["a"], "one"),
                node("Relu", ["a"], ["b"], "two"),
                node("Relu", ["b"], ["y"]),
            ]
        ),
        r"form a cycle \(node 'one'.* → node 'two'|form a cycle \(node 'two'.* → node 'one'",
    ),
    "nodes out of order": (
        small([node("Relu", ["a"], ["y"], "late"), node("Relu", ["x"], ["a"])]),
        r"node 'late' \(Relu\): reads 'a' before it is made",
    ),
    "a tensor nobody makes": (
        small([node("Add", ["x", "ghost"], ["y"])]),
        "'ghost', which nothing makes",
    ),
    "a name made twice": (
        small([node("Relu", ["x"], ["y"], "a"), node("Relu", ["x"], ["y"], "b")]),
        "not a valid ONNX model",
    ),
    "a wrong attribute": (
        small([node("Relu", ["x"], ["y"], nonsense=3)]),
        "not a valid ONNX model.*nonsense",
    ),
    "shapes that contradict each other": (
        small([node("MatMul", ["x", "m"], ["y"])], {"m": graphs.image((5, 2))}),
        "not a valid ONNX model",
    ),
    "NaN weights": (
        small(constants={"w": np.full((2, 3, 1, 1), np.nan, np.float32)}),
        "weights 'w' hold NaN",
    ),
    "infinite weights": (
        small(constants={"w": np.full((2, 3, 1, 1), np.inf, np.float32)}),
        "weights 'w' hold infinite",
    ),
    "NaN in a Constant node": (
        small([constant(np.float32(np.nan)), node("Mul", ["x", "c"], ["y"])]),
        "weights 'c' hold NaN",
    ),
    "weights of a wrong size": (
        wrong_size(),
        "not a valid ONNX model",
    ),
    "a dynamic channel count": (
        small(shape=["n", "channels", 6, 4]),
        r"symbolic dimensions \[n, channels, 6, 4\]; give --input-shape x:1,3,224,224",
    ),
    "no shape at all": (
        small(shape=[None] * 4),
        "symbolic dimensions .*--input-shape x:",
    ),
    "rank 2": (
        small([node("Relu", ["x"], ["y"])], shape=[1, 12]),
        "rank 2.*need rank 4",
    ),
    "rank 5": (small([node("Relu", ["x"], ["y"])], shape=[1, 3, 2, 2, 2]), "rank 5"),
    "a batch of 8": (small(shape=[8, 3, 6, 4]), "batch 8, need 1"),
    "an empty image": (small(shape=[1, 3, 0, 4]), "empty dimension"),
    "two inputs": (many_inputs(), "2 inputs .'x', 'z'., need one image"),
    "no input": (
        small(
            [constant(np.ones((1, 2), np.float32)), node("Relu", ["c"], ["y"])],
            {"x": np.float32(0)},
        ),
        "0 inputs",
    ),
    "a float16 input": (
        small(
            [node("Relu", ["x"], ["y"])],
            dtype=TensorProto.FLOAT16,
            output=TensorProto.FLOAT16,
        ),
        r"input 'x' is float16; convert to float32 .*model.float\(\)",
    ),
    "a double input": (
        small(
            [node("Relu", ["x"], ["y"])],
            dtype=TensorProto.DOUBLE,
            output=TensorProto.DOUBLE,
        ),
        "input 'x' is double; convert",
    ),
    "an integer input": (
        small([node("Relu", ["x"], ["y"])], dtype=TensorProto.UINT8, opset=14),
        "is uint8, need float32",
    ),
    "float16 inside": (
        small(
            [
                node("Cast", ["x"], ["h"], "half", to=TensorProto.FLOAT16),
                node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
            ]
        ),
        r"node 'half' \(Cast\).*is float16; convert",
    ),
    "an integer output": (
        small([node("ArgMax", ["x"], ["y"], axis=1)], output=TensorProto.INT64),
        "output 'y' is int64, need float32",
    ),
    "an output without the input": (
        small([constant(np.ones((1, 2), np.float32)), node("Relu", ["c"], ["y"])]),
        "'y' does not depend on the input",
    ),
    "a size known only when it runs": (
        small(
            [node("NonZero", ["x"], ["i"], "where"), node("Cast", ["i"], ["y"], to=1)]
        ),
        "no static shape",
    ),
    "an Expand of 120 GB": (
        small(
            [node("Expand", ["x", "s"], ["y"], "bomb")],
            {"s": SIZES},
            shape=[1, 3, 1, 1],
        ),
        r"node 'bomb' \(Expand\).*120000000000 bytes",
    ),
    "a ConstantOfShape of 120 GB": (
        small(
            [
                node("ConstantOfShape", ["s"], ["c"], "bomb"),
                node("Add", ["x", "c"], ["y"]),
            ],
            {"s": SIZES},
            shape=[1, 3, 1, 1],
        ),
        r"node 'bomb' \(ConstantOfShape\).*120000000000 bytes",
    ),
    "a Resize of 120 GB": (
        small(
            [node("Resize", ["x", "", "", "s"], ["y"], "bomb")],
            {"s": SIZES},
            shape=[1, 3, 1, 1],
        ),
        r"node 'bomb' \(Resize\).*120000000000 bytes",
    ),
    "a Concat that doubles 40 times": (
        small(
            [
                *(
                    node("Concat", [f"c{k}"] * 2, [f"c{k + 1}"], f"twice{k}", axis=0)
                    for k in range(40)
                ),
                node("Reshape", ["x", "c40"], ["y"]),
            ],
            {"c0": np.ones(1, np.int64)},
        ),
        r"node 'twice26' \(Concat\).*1073741824 bytes",
    ),
    "a quantised model": (
        quantised(),
        r"quantised by 1 DynamicQuantizeLinear nodes: int8 is built",
    ),
    "a name of a terminal's commands": (
        small([node(ESCAPE, ["x"], ["y"], ESCAPE)]),
        "is not an operator",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    model, message = MODELS[name]
    path = tmp_path / "user model.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, message)


def refused(path: Path, message: str, **options: Any) -> None:
    """The gate refuses ``path`` in one short, printable line that starts with its name."""
    with pytest.raises(UserError, match=message) as error:
        load(path, **options)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 500


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"# a read-me, renamed\nto model.onnx\n", "not an ONNX model"),
    "random": (
        np.random.Generator(np.random.PCG64(1)).bytes(4096),
        "not an ONNX model",
    ),
    "truncated": (small().SerializeToString()[:-20], "not an ONNX model"),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not an ONNX model"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, message)


def test_a_path_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.onnx", "No such file")
    refused(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")


def test_a_file_of_3_gb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from compile.frontend.gate import load; from targets.errors import UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000\n"
        "assert 'tvm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert f"{3 << 30} bytes is more than the {MAX_MODEL_BYTES} allowed" in done.stdout


EXTERNAL: dict[str, tuple[Callable[[Path], onnx.ModelProto], str]] = {
    "outside by ..": (
        lambda folder: with_external(folder, "../w.bin"),
        "not a plain file name",
    ),
    "outside by /": (
        lambda folder: with_external(folder, "/etc/passwd"),
        "not a plain file name",
    ),
    "in a sub-folder": (
        lambda folder: with_external(folder, "a/w.bin"),
        "not a plain file name",
    ),
    "the folder itself": (
        lambda folder: with_external(folder, "."),
        "not a plain file name",
    ),
    "without a name": (
        lambda folder: with_external(folder, ""),
        "not a plain file name",
    ),
    "a NUL in the name": (
        lambda folder: with_external(folder, "w\0.bin"),
        "not a plain file name",
    ),
    "a link": (linked, "'link.bin': is a link"),
    "missing": (
        lambda folder: with_external(folder, "other.bin"),
        "'other.bin': cannot be read",
    ),
    "beyond the file's end": (
        lambda folder: with_external(folder, "w.bin", offset=4),
        "beyond the file's 24",
    ),
    "before its start": (
        lambda folder: with_external(folder, "w.bin", offset=-4),
        "beyond the file's 24",
    ),
    "of another size": (
        lambda folder: with_external(folder, "w.bin", length=20),
        "20 bytes .* for a tensor of 24",
    ),
    "at an offset that is no number": (
        lambda folder: with_external(folder, "w.bin", offset="x"),  # type: ignore[arg-type]
        "no sensible type, offset or length",
    ),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_are_refused(name: str, tmp_path: Path) -> None:
    make, message = EXTERNAL[name]
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(make(folder).SerializeToString())
    refused(path, message)


def test_external_data_are_capped_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(with_external(tmp_path, "w.bin").SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 << 30)
    refused(path, f"'w.bin': {3 << 30} bytes is more than")


def test_external_data_come_in_with_their_hash(tmp_path: Path) -> None:
    values = graphs.image((2, 3, 1, 1)).tobytes()
    model = with_external(
        tmp_path, "w.bin", length=None, offset=8, data=bytes(8) + values
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = load(path)
    assert loaded.identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256((tmp_path / "w.bin").read_bytes()).hexdigest()
    assert loaded.identity.external_data == {"w.bin": digest}
    assert loaded.proto.graph.initializer[0].raw_data == values


def test_a_symbolic_batch_becomes_1_and_is_said(tmp_path: Path) -> None:
    model = check(small(shape=["N", 3, 6, 4]), IDENTITY)
    assert model.input.shape == (1, 3, 6, 4)
    assert model.outputs[0].shape == (1, 2, 6, 4)
    assert model.notes == ("input 'x': symbolic batch N made 1",)
    assert check(small(), IDENTITY).notes == ()


def test_input_shape_fills_symbolic_dimensions_alone() -> None:
    model = check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 3, 8, 6)})
    assert model.input.shape == (1, 3, 8, 6)
    assert model.notes == ()
    with pytest.raises(
        UserError, match=r"x:1,4,8,6 contradicts the input's \[N, 3, h, w\]"
    ):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 4, 8, 6)})
    with pytest.raises(UserError, match="x:1,3 contradicts"):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 3)})
    with pytest.raises(UserError, match="batch 2, need 1"):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (2, 3, 8, 6)})
    with pytest.raises(UserError, match="names 'image', but the input is 'x'"):
        check(small(), IDENTITY, {"image": (1, 3, 6, 4)})


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ([1, 3, 6, 4], "NCHW"),
        ([1, 6, 4, 3], "NHWC"),
        ([1, 1, 6, 6], "NCHW"),
        ([1, 6, 6, 1], "NHWC"),
        ([1, 3, 6, 3], "NCHW"),
        ([1, 4, 6, 6], "NCHW"),
    ],
)
def test_the_layout_is_where_1_or_3_channels_stand(
    shape: list[int], layout: str
) -> None:
    model = small([node("Relu", ["x"], ["y"])], shape=shape)
    assert check(model, IDENTITY).input.layout == layout
    assert check(model, IDENTITY, layout="NHWC").input.layout == "NHWC"


def test_initializers_among_the_inputs_are_weights() -> None:
    model = small()
    model.ir_version = 3
    model.graph.input.append(
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 1, 1])
    )
    checked = check(model, IDENTITY)
    assert checked.input.name == "x"
    assert [each.name for each in checked.proto.graph.input] == ["x"]


def ending(*nodes: onnx.NodeProto, opset: int = 13, **constants: Any) -> bool:
    flat = node("Flatten", ["x"], ["f"])
    model = small([flat, *nodes], constants, shape=[1, 3, 1, 2], opset=opset)
    return check(model, IDENTITY).probabilities


def test_probabilities_are_what_a_softmax_over_the_classes_gives() -> None:
    softmax = node("Softmax", ["f"], ["s"], axis=1)
    assert ending(node("Softmax", ["f"], ["y"]))
    assert ending(node("Softmax", ["f"], ["y"]), opset=11)
    assert ending(softmax, node("Identity", ["s"], ["y"]))
    assert ending(
        softmax, node("Reshape", ["s", "to"], ["y"]), to=np.array([1, 6, 1], np.int64)
    )
    assert not ending(node("Relu", ["f"], ["y"]))
    assert not ending(softmax, node("Relu", ["s"], ["y"]))
    assert not ending(node("Softmax", ["f"], ["y"], axis=0))
    assert not ending(node("LogSoftmax", ["f"], ["y"]))


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = small(shape=["N", 3, 6, 4])
    before = model.SerializeToString(deterministic=True)
    check(model, IDENTITY)
    assert model.SerializeToString(deterministic=True) == before


VALID = small(
    [
        node("Conv", ["x", "w"], ["c"], "stem"),
        node("Shape", ["c"], ["s"]),
        node("Reshape", ["c", "s"], ["r"]),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Softmax", ["f"], ["y"]),
    ],
    {"w": graphs.image((2, 3, 1, 1))},
    shape=["N", 3, 6, 4],
).SerializeToString()
QUICK = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def passes_or_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    try:
        load(path)
    except UserError as error:
        assert str(error).isprintable()


@QUICK
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load(path)


@QUICK
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
@example(0, VALID[0])
def test_a_changed_byte_passes_or_is_refused(
    tmp_path: Path, at: int, byte: int
) -> None:
    passes_or_is_refused(tmp_path, VALID[:at] + bytes([byte]) + VALID[at + 1 :])


@QUICK
@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_model_passes_or_is_refused(tmp_path: Path, length: int) -> None:
    passes_or_is_refused(tmp_path, VALID[:length])
