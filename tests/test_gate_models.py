"""Models and files that the gate refuses, each with the one line that it gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from gated import constant, node, refused, small
from onnx import TensorProto, helper

from netship.compile.frontend.gate import load
from netship.compile.frontend.model_file import MAX_MODEL_BYTES
from netship.targets.errors import UserError

ESCAPE = "\x1b[31mred\nline\x00" + "n" * 1_000_000


def many_inputs() -> onnx.ModelProto:
    model = small([node("Add", ["x", "z"], ["y"])])
    for name in ("z", *map(str, range(63))):
        extra = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        model.graph.input.append(extra)
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


def wrong_size() -> onnx.ModelProto:
    model = small()
    model.graph.initializer[0].raw_data = bytes(20)
    return model


SIZES = np.array([1, 3, 100_000, 100_000], np.int64)
MODELS: dict[str, tuple[onnx.ModelProto, str]] = {
    "opset 5": (small(opset=5), "opset 5 .*7 to 28"),
    "opset 99": (small(opset=99), "opset 99 .*7 to 28"),
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
    "rank 0": (small([node("Relu", ["x"], ["y"])], shape=[]), "rank 0.*need 1 to 4"),
    "rank 5": (
        small([node("Relu", ["x"], ["y"])], shape=[1, 3, 2, 2, 2]),
        "rank 5.*need 1 to 4",
    ),
    "a batch of 8 rows": (
        small([node("Relu", ["x"], ["y"])], shape=[8, 3]),
        "batch 8, need 1",
    ),
    "a symbolic row": (
        small([node("Relu", ["x"], ["y"])], shape=["n"]),
        r"symbolic dimensions \[n\]; give --input-shape x:1 ",
    ),
    "a batch of 8": (small(shape=[8, 3, 6, 4]), "batch 8, need 1"),
    "an empty image": (small(shape=[1, 3, 0, 4]), "empty dimension"),
    "many inputs": (many_inputs(), "65 inputs, more than the 64 allowed"),
    "no input": (
        small(
            [constant(np.ones((1, 2), np.float32)), node("Relu", ["c"], ["y"])],
            {"x": np.float32(0)},
        ),
        "0 inputs",
    ),
    "an integer input": (
        small([node("Relu", ["x"], ["y"])], dtype=TensorProto.INT32, opset=14),
        "is int32, need float32",
    ),
    "an output of 16 bits": (
        small(
            [node("Cast", ["x"], ["y"], to=TensorProto.INT16)], output=TensorProto.INT16
        ),
        "output 'y' is int16, need float32",
    ),
    "an output without the input": (
        small([constant(np.ones((1, 2), np.float32)), node("Relu", ["c"], ["y"])]),
        "'y' does not depend on the input",
    ),
    "a size known only when it runs": (
        small(
            [node("NonZero", ["x"], ["i"], "where"), node("Cast", ["i"], ["y"], to=1)]
        ),
        "no static shape; its size depends on the input: end the network before it",
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
        r"quantised dynamically, by 1 DynamicQuantizeLinear nodes .*quantize_static",
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
        "from netship.compile.frontend.gate import load; from netship.targets.errors import UserError\n"
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.h5", "Keras.*onnx"),
        ("net.keras", "Keras.*onnx"),
        ("net.pt", r"PyTorch.*torch\.onnx\.export"),
        ("NET.PTH", r"PyTorch.*torch\.onnx\.export"),
        ("net.pb", "TensorFlow.*tf2onnx"),
        ("net.tflite", "no TFLite.*TFL3"),
        ("net.mlmodel", "Core ML.*export"),
    ],
)
def test_another_tools_format_gets_its_own_line(
    tmp_path: Path, name: str, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=words) as refused:
        load(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / f"other-{name}")


def test_a_folder_of_tensorflow_gets_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    with pytest.raises(UserError, match="--saved-model"):
        load(tmp_path)


def test_an_onnx_file_of_another_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pb"
    path.write_bytes(small().SerializeToString())
    assert load(path).identity.name == "model.pb"
