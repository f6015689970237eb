"""What the documentation says of the code is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT, succeed
from integers import Graph as Writer
from integers import graph_of, quantised
from onnx import helper
from relay_worker import relay_worker

from netship.compile import passes
from netship.compile.backends.c.build import PASSES
from netship.compile.backends.c.steps import Generated, Single, fuse
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    GlobalAverage,
    Table,
    View,
)
from netship.compile.ir.operators import islands as floats_of
from netship.compile.ir.pointwise import FUNCTIONS, Pointwise
from netship.compile.kernels.neon import pack
from netship.compile.passes.layout import channels_last
from netship.compile.passes.storage import store_as_int8
from netship.targets.presets import resolve

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FLOORS = [
    "targets",
    "bundle",
    "devices",
    "records",
    "compile",
    "meter",
    "tuning",
    "bench",
    "runtime_demo",
    "netship",
]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first line has ``heading``."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_architecture_page_names_every_folder_and_no_other() -> None:
    named = [row[0].strip("`") for row in rows("architecture.md", "| folder |")]
    there = {
        path.parent.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }
    assert set(named) == there and len(named) == len(there)
    # From top to bottom, as imports go.
    floors = [name for name in named if "/" not in name]
    assert floors == FLOORS[::-1]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_links_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(rf"`((?:{'|'.join(FLOORS)}|tests|docs)/[\w./*-]*)`", text)
    missing = [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    links = (link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link)
    missing += [link for link in links if not (page.parent / link).exists()]
    modules = re.findall(rf"python -m ((?:{'|'.join(FLOORS)})[\w.]*)", text)
    missing += [module for module in modules if find_spec(module.rstrip(".")) is None]
    assert missing == []


VERBS = {"netship", "runtime_demo.board", "tuning.records", "bench", "meter"}


@cache
def help_of(*command: str) -> str:
    return succeed(*command, "--help")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_of_the_commands_that_a_page_gives_exist(page: Path) -> None:
    fenced = r"^```\w*\n(.*?)^```"
    blocks = re.findall(fenced, page.read_text(), re.DOTALL | re.MULTILINE)
    text = "".join(blocks).replace("\\\n", " ")
    ours = rf"python -m ((?:{'|'.join(FLOORS)})[\w.]*)([^#|;&\n]*)"
    missing = []
    for module, rest in re.findall(ours, text):
        words = rest.split()
        verb = words[:1] if module in VERBS and words[0].isalpha() else []
        known = re.findall(r"--[a-z-]+", help_of(module, *verb))
        options = [word for word in words if word.startswith("--")]
        missing += [(module, *verb, word) for word in options if word not in known]
    assert missing == []


# docs/operators.md

NEON_PASSES = (store_as_int8, channels_last)

Network = Callable[[Writer, str], str]


def node(kind: str, **attributes: object) -> Network:
    return lambda w, x: w.node(kind, "it", [x], **attributes)


def convolution(**attributes: object) -> Network:
    def write(w: Writer, x: str) -> str:
        group = int(str(attributes.get("group", 1)))
        weights = w.random.normal(size=(8, 8 // group, 3, 3)).astype(np.float32)
        return w.node(
            "Conv", "it", [x, w.constant("it.w", weights)], pads=[1] * 4, **attributes
        )

    return write


def constant(kind: str, shape: tuple[int, ...]) -> Network:
    def write(w: Writer, x: str) -> str:
        values = w.random.normal(size=shape).astype(np.float32)
        return w.node(kind, "it", [x, w.constant("it.c", values)])

    return write


def gemm(w: Writer, x: str) -> str:
    flat = w.node("Flatten", "flat", [w.node("GlobalAveragePool", "pool", [x])])
    return constant("Gemm", (8, 5))(w, flat)


def rows_times_matrix(w: Writer, x: str) -> str:
    shape = w.constant("it.rows", np.array([1, 64, 8], np.int64))
    made = constant("MatMul", (8, 8))(w, w.node("Reshape", "rows", [x, shape]))
    shape = w.constant("it.image", np.array([1, 8, 8, 8], np.int64))
    return w.node("Reshape", "image again", [made, shape])


def pooled(network: Network) -> Network:
    return lambda w, x: network(w, w.node("GlobalAveragePool", "pool", [x]))


def flat(network: Network) -> Network:
    return lambda w, x: network(
        w, w.node("Flatten", "flat", [w.node("GlobalAveragePool", "pool", [x])])
    )


def both(kind: str) -> Network:
    def write(w: Writer, x: str) -> str:
        other = w.convolution("other", "image", 3, 8, 1, clip=False)
        return w.node(
            kind, "it", [x, other], **({"axis": 1} if kind == "Concat" else {})
        )

    return write


def reshape(w: Writer, x: str) -> str:
    shape = w.constant("it.shape", np.array([1, 32, 4, 4], np.int64))
    return w.node("Reshape", "it", [x, shape])


def gated(kind: str) -> Network:
    def write(w: Writer, x: str) -> str:
        return w.node(kind, "it", [x, w.node("GlobalAveragePool", "pool", [x])])

    return write


def split(w: Writer, x: str) -> str:
    sizes = w.constant("it.sizes", np.array([5, 3], np.int64))
    w.nodes.append(helper.make_node("Split", [x, sizes], ["a", "b"], "it", axis=1))
    a = w.convolution("a.next", "a", 5, 4, 1, clip=False)
    return w.node("Add", "sum", [a, w.convolution("b.next", "b", 3, 4, 1, clip=False)])


def with_integers(kind: str, *values: list[int], **attributes: object) -> Network:
    def write(w: Writer, x: str) -> str:
        names = [
            w.constant(f"it.{index}", np.array(each, np.int64))
            for index, each in enumerate(values)
        ]
        return w.node(kind, "it", [x, *names], **attributes)

    return write


def resize(mode: str) -> Network:
    def write(w: Writer, x: str) -> str:
        sizes = w.constant("it.sizes", np.array([1, 8, 12, 16], np.int64))
        return w.node("Resize", "it", [x, "", "", sizes], mode=mode)

    return write


def function(kind: str) -> Network:
    """One of FUNCTIONS, its parameters not the default ones."""

    def write(w: Writer, x: str) -> str:
        parameters = {k: 1.5 * v for k, v in FUNCTIONS[kind].parameters.items()}
        if kind == "Clip":
            bounds = [
                w.constant(f"{x}.{v}", np.array(v, np.float32)) for v in (-0.4, 0.7)
            ]
            return w.node(kind, f"{kind} of {x}", [x, *bounds])
        if kind == "Sqrt":
            x = w.node("Abs", f"{x}.positive", [x])
        return w.node(kind, f"{kind} of {x}", [x], **parameters)

    return write


def silu(w: Writer, x: str) -> str:
    return w.node("Mul", "it", [x, w.node("Sigmoid", "gate", [x])])


NETWORKS: dict[str, list[Network]] = {
    "Conv, one group or depthwise": [convolution(), convolution(group=8)],
    "Conv, other groups": [convolution(group=2)],
    "Conv, dilated": [convolution(dilations=[2, 2])],
    "Gemm": [gemm],
    "MatMul of rows and a constant matrix": [rows_times_matrix],
    "Add, one shape": [both("Add")],
    "GlobalAveragePool": [node("GlobalAveragePool")],
    "ReduceMean over height and width": [node("ReduceMean", axes=[2, 3])],
    "Flatten of one pixel": [pooled(node("Flatten"))],
    "Flatten of an image before a Gemm": [node("Flatten")],
    "Reshape of channels into rows and columns": [reshape],
    "Relu, Clip behind a Conv": [node("Relu")],
    **{kind: [function(kind)] for kind in FUNCTIONS if kind not in ("Relu", "Clip")},
    "SiLU (x × Sigmoid(x))": [silu],
    "Mul, one shape": [both("Mul")],
    "Mul, Add with a constant": [
        constant("Mul", (1, 1, 8, 8)),
        constant("Add", (1, 8, 8, 8)),
    ],
    "Mul, Add with a number a channel, after a Conv": [
        constant("Mul", (1, 8, 1, 1)),
        constant("Add", (1, 8, 1, 1)),
    ],
    "Mul, Add, broadcast": [gated("Mul"), gated("Add")],
    "AveragePool": [
        node("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    ],
    "MaxPool": [node("MaxPool", kernel_shape=[2, 2])],
    "GlobalMaxPool": [node("GlobalMaxPool")],
    "Concat": [both("Concat")],
    "Max, Min of two tensors": [both("Max"), both("Min")],
    "ReduceMax, ReduceMin": [node("ReduceMax", axes=[3]), node("ReduceMin", axes=[1])],
    "Split": [split],
    "Slice, Pad, Gather": [
        with_integers("Slice", [1], [7], [1], [2]),
        with_integers("Pad", [0, 0, 1, 2, 0, 0, 0, 1], mode="reflect"),
        with_integers("Gather", [5, 2, 2], axis=1),
    ],
    "Pad with zeros, before a Conv": [with_integers("Pad", [0, 0, 1, 2, 0, 0, 0, 1])],
    "Transpose": [node("Transpose", perm=[0, 3, 1, 2])],
    "DepthToSpace, SpaceToDepth": [
        node("DepthToSpace", blocksize=2),
        node("SpaceToDepth", blocksize=2),
    ],
    "Expand, Tile": [
        pooled(with_integers("Expand", [1, 8, 4, 4])),
        with_integers("Tile", [1, 1, 2, 1]),
    ],
    "Resize, nearest": [resize("nearest")],
    "Resize, linear": [resize("linear")],
    "Softmax": [node("Softmax", axis=1), flat(node("Softmax", axis=1))],
}


def finished(w: Writer) -> onnx.ModelProto:
    proto = w.finish(())
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    # The newest in which the quantiser does not write HardSwish as the operators that it consists of.
    proto.opset_import[0].version = 14
    return proto


def model(network: Network) -> onnx.ModelProto:
    """The operator between two layers: the second one has its output quantised."""
    w = Writer(3, 8)
    made = network(w, w.convolution("stem", "image", 3, 8, 1, clip=False))
    inferred = onnx.shape_inference.infer_shapes(finished(w)).graph.output[0]
    channels = inferred.type.tensor_type.shape.dim[1].dim_value
    if len(inferred.type.tensor_type.shape.dim) == 4:
        w.convolution("next", made, channels, 4, 1, clip=False)
    else:
        weights = w.random.normal(size=(channels, 4)).astype(np.float32)
        w.node("Gemm", "next", [made, w.constant("next.w", weights)])
    return finished(w)


def islands(models: list[bytes], target: str) -> list[tuple[str, ...]]:
    """In a process that may compile: of each network what computes in float32 among integers."""
    from netship.compile.relay.convert import to_relay

    protos = [onnx.load_model_from_string(each) for each in models]
    graphs = (
        graph_of(each)
        if any(node.op_type == "QuantizeLinear" for node in each.graph.node)
        else onnx_form.read(each)
        for each in protos
    )
    return [to_relay(each, resolve(target)).islands for each in graphs]


def of_relay(graph: Graph, floats: tuple[str, ...], arm: bool) -> str:
    if floats:
        return "float32"
    lowered = passes.run(NEON_PASSES, graph) if arm else graph
    found = [each for each in lowered.operators if each.label == "it"]
    if not found or found[0].kind == "table":
        return (
            "table" if any(each.kind == "table" for each in graph.operators) else "free"
        )
    it = found[0]
    if isinstance(it, View):
        return "free" if it.in_place or not arm else "TVM"
    if isinstance(it, Addition) and not it.elementwise:
        return "TVM"
    of_x86 = isinstance(it, Addition | Convolution | GlobalAverage)
    return "kernel" if (pack.kernel(it, dot=True) if arm else of_x86) else "TVM"


def of_c(graph: Graph, integers: bool) -> str:
    if integers and floats_of(graph):
        return "float32"
    steps = fuse(passes.run(PASSES, graph))
    parts = [(step, part) for step in steps for part in step.parts]
    found = [(step, x) for step, x in parts if x.label == "it"]
    for kind, cell in ((Table, "table"), (Pointwise, "function")):
        alone = [x for step, x in parts if isinstance(step, Single)]
        if any(isinstance(x, kind) for x in alone) and not (integers and found):
            return cell
    if not found:
        return "free"
    step, it = found[-1]
    if isinstance(it, Table):
        return "table"
    return "TVM" if isinstance(step, Generated) else "kernel"


def test_the_table_of_operators_is_what_backends_do(tmp_path: Path) -> None:
    cases = [
        (name, network) for name, networks in NETWORKS.items() for network in networks
    ]
    floats = [model(network) for _, network in cases]
    integers = []
    for index, proto in enumerate(floats):
        folder = tmp_path / str(index)
        folder.mkdir()
        integers.append(quantised(proto, folder))
    data = [each.SerializeToString() for each in integers]
    with relay_worker() as worker:
        found = {
            target: worker.submit(islands, data, target).result()
            for target in ("x86-64-v3", "arm-cortex-a76")
        }
        everywhere = [each.SerializeToString() for each in floats]
        assert not any(worker.submit(islands, everywhere, "x86-64-v3").result())
    table: dict[str, set[tuple[str, ...]]] = {}
    for index, (name, _) in enumerate(cases):
        graph = graph_of(integers[index])
        x86, arm = (
            of_relay(graph, found[target][index], target.startswith("arm"))
            for target in found
        )
        written = passes.run(passes.FLOATS, onnx_form.read(floats[index]))
        row = ("TVM", x86, arm, of_c(written, False), of_c(graph, True))
        table.setdefault(name, set()).add(row)
    stated = {row[0]: {tuple(row[1:])} for row in rows("operators.md", "| operator |")}
    assert table == stated
