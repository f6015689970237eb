"""Random small networks through every road of the build, each answer compared with ONNX Runtime's.

``python -m tests.fuzz_graphs --count 5000 --log FILE`` runs graphs and appends a line of JSON for each; a second run
with the same log goes on where the first ended. ``--only SEED:INDEX`` runs one graph again. A graph that is not right
is kept as ONNX beside the log. Verdicts:

- ``right``: built, and right on inputs that the build does not compare too;
- ``refused``: one line that says why;
- ``caught``: the build found its own answer wrong;
- ``silent``: built, and wrong on other inputs;
- ``unclear``, ``traceback``, ``crash``, ``hang``: faults of the program.

Longer than 450 lines: each operator has its own random attributes, and the command is one module.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from netship.bundle import golden
from netship.bundle.accuracy import compare
from netship.compile import driver
from netship.compile.backends import bundle as bundle_backend
from netship.compile.backends import verify
from netship.compile.backends.c import build as c_build
from netship.compile.backends.request import BuildRequest
from netship.compile.frontend.reference import Reference
from netship.compile.quantize import calibrate
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session
from netship.targets.presets import resolve
from netship.targets.progress import Progress

Floats = NDArray[np.float32]

ROADS = {
    "native": ("native", False),
    "c": ("cortex-m7", False),
    "int8": ("native", True),
    "c-int8": ("cortex-m7", True),
}
FAULTS = frozenset(["caught", "silent", "unclear", "traceback", "crash", "hang"])
# Of the clock, until a build's use of the processor is looked at; how often.
_SECONDS, _PATIENCE = 300, 4
_ELEMENTS = 20_000
_WEIGHTS = 1 << 20
# C keywords, names of C's libraries and of generated code, and names that become the same in C.
_NAMES = (
    *("int", "for", "static", "main", "NULL", "memcpy", "expf", "network", "arena"),
    *("a.b", "a/b", "a_b", "a b", "0", "1x", "é", "input", "output", "x", "weights"),
)
_UNARY = (
    *("Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Exp"),
    *("Softplus", "Neg", "Abs", "Erf", "Floor", "Identity", "Selu", "Celu", "Clip"),
)
_FOR_C = (
    *("conv", "conv", "depthwise", "pointwise", "residual", "unary", "global"),
    *("flatten", "gemm", "reshape", "squeeze", "branches", "unary"),
)
_ALL = (
    *(*_FOR_C, "grouped", "pool", "matmul", "transpose", "slice", "pad", "concat"),
    *("split", "binary", "constant", "reduce", "softmax", "resize", "depth", "norm"),
)


class Writer:
    """A random network being written; a node that ONNX's shape inference refuses is left out again."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = np.random.default_rng([seed, index])
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        height, width = (int(self.random.choice([5, 7, 8, 9, 12])) for _ in range(2))
        channels = int(self.random.choice([1, 1, *[3] * 8, 2]))
        shape = self.one_of(
            [(1, channels, height, width)] * 4
            + [(1, 1, 28, 28), (1, 28, 28, 1), (1, height, width, 3)]
        )
        self.input = self.one_of(["input", "image", "x", "int", "a.b"])
        self.shapes = {self.input: tuple(shape)}
        self.odd = self.chance(0.3)
        self.x = self.input

    def chance(self, likely: float) -> bool:
        return bool(self.random.random() < likely)

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[int(self.random.integers(len(values)))]

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.x]

    def axis(self) -> int:
        rank = len(self.shape)
        axis = self.number(min(1, rank - 1), rank - 1)
        return axis - rank if self.chance(0.3) else axis

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        if np.size(values) > _WEIGHTS:
            raise ValueError("too many weights")
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, *shape: int, spread: float = 0.5) -> str:
        return self.constant(self.random.normal(0, spread, shape))

    def kernel(self, *shape: int) -> str:
        return self.normal(*shape, spread=float(np.sqrt(2 / np.prod(shape[1:]))))

    def node(
        self, kind: str, inputs: Sequence[str], count: int = 1, **attributes: Any
    ) -> None:
        """Append a node and go on from its first output."""
        names: list[str] = []
        for _ in range(count):
            name = f"t{len(self.shapes) + len(names)}"
            wanted = self.one_of(_NAMES)
            taken = {*self.shapes, *names}
            names.append(wanted if self.odd and wanted not in taken else name)
        called = self.one_of([*_NAMES, self.input, ""]) if self.odd else names[0]
        made = helper.make_node(kind, inputs, names, called, **attributes)
        self.nodes.append(made)
        self.shapes |= self._inferred(made)
        self.x = names[0]

    def _inferred(self, node: onnx.NodeProto) -> dict[str, tuple[int, ...]]:
        known = [
            self._value(each)
            for each in dict.fromkeys(node.input)
            if each in self.shapes
        ]
        used = [each for each in self.weights if each.name in node.input]
        outputs = [helper.make_empty_tensor_value_info(each) for each in node.output]
        graph = helper.make_graph([node], "one", known, outputs, used)
        inferred = onnx.shape_inference.infer_shapes(
            _model(graph), check_type=True, strict_mode=True, data_prop=True
        )
        found = {}
        for value in inferred.graph.output:
            shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            if (
                not shape
                or min(shape) < 1
                or np.prod(shape) > _ELEMENTS
                or len(shape) > 5
            ):
                raise ValueError(shape)
            found[value.name] = shape
        return found

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])

    def attempt(self, kind: str) -> None:
        before = (len(self.nodes), len(self.weights), dict(self.shapes), self.x)
        try:
            getattr(self, kind)()
        except (ValueError, IndexError, onnx.shape_inference.InferenceError):
            nodes, weights, self.shapes, self.x = before
            del self.nodes[nodes:], self.weights[weights:]

    def finish(self) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output]
        ends = [name for name in made if name not in read]
        if self.chance(0.15):
            ends.append(self.one_of(made))
        outputs = [self._value(name) for name in dict.fromkeys(ends)]
        graph = helper.make_graph(
            self.nodes, "random", [self._value(self.input)], outputs, self.weights
        )
        return _model(graph)

    # Operators.

    def _window(self) -> dict[str, Any]:
        rank = len(self.shape) - 2
        at: dict[str, Any] = {
            "strides": [self.number(1, 3) if self.chance(0.4) else 1] * rank
        }
        kernel = [self.number(1, 4) for _ in range(rank)]
        at["kernel_shape"] = (
            kernel if self.chance(0.5) else [self.one_of([1, 3])] * rank
        )
        if self.chance(0.2):
            return at | {"auto_pad": self.one_of(["SAME_UPPER", "SAME_LOWER", "VALID"])}
        if self.chance(0.7):
            same = self.chance(0.5)
            at["pads"] = [
                (k - 1) // 2 if same else self.number(0, k - 1)
                for k in at["kernel_shape"] * 2
            ]
        return at

    def _convolution(self, out: int, group: int, window: dict[str, Any]) -> None:
        into = self.shape[1]
        if self.chance(0.15):
            window["dilations"] = [self.number(1, 2) for _ in window["kernel_shape"]]
        inputs = [self.x, self.kernel(out, into // group, *window["kernel_shape"])]
        if self.chance(0.7):
            inputs.append(self.normal(out))
        self.node("Conv", inputs, group=group, **window)

    def conv(self) -> None:
        self._convolution(self.number(1, 9), 1, self._window())

    def pointwise(self) -> None:
        self._convolution(
            self.number(1, 12), 1, {"kernel_shape": [1] * (len(self.shape) - 2)}
        )

    def depthwise(self) -> None:
        many = self.number(1, 2) if self.chance(0.3) else 1
        self._convolution(self.shape[1] * many, self.shape[1], self._window())

    def grouped(self) -> None:
        group = self.one_of([g for g in (2, 3, 4) if self.shape[1] % g == 0])
        self._convolution(group * self.number(1, 3), group, self._window())

    def residual(self) -> None:
        source, channels = self.x, self.shape[1]
        same = {"kernel_shape": [3, 3], "pads": [1] * 4}
        self._convolution(channels, self.one_of([1, channels]), same)
        self.node("Add", self.one_of([[source, self.x], [self.x, source]]))

    def unary(self) -> None:
        kind = self.one_of(_UNARY)
        limits = [self.constant(-0.5), self.constant(6)] if kind == "Clip" else []
        self.node(kind, [self.x, *limits])

    def pool(self) -> None:
        kind = self.one_of(["MaxPool", "AveragePool", "LpPool"])
        more: dict[str, Any] = (
            {"ceil_mode": self.number(0, 1)}
            if kind != "LpPool"
            else {"p": self.number(1, 3)}
        )
        if kind == "AveragePool":
            more["count_include_pad"] = self.number(0, 1)
        if kind == "MaxPool" and self.chance(0.2):
            more["dilations"] = [2] * (len(self.shape) - 2)
        self.node(kind, [self.x], **self._window(), **more)

    def globals(self) -> None:
        self.node(self.one_of(["GlobalAveragePool", "GlobalMaxPool"]), [self.x])

    def flatten(self) -> None:
        self.node(
            "Flatten", [self.x], axis=self.one_of([0, *[1] * 12, len(self.shape)])
        )

    def gemm(self) -> None:
        if len(self.shape) != 2:
            self.node("Flatten", [self.x])
        out, into = self.number(1, 9), self.shape[1]
        transposed = self.number(0, 1)
        weights = self.kernel(*((out, into) if transposed else (into, out)))
        bias = (
            [self.normal(*self.one_of([(out,), (1, out)]))] if self.chance(0.7) else []
        )
        scales: dict[str, Any] = (
            {"alpha": 0.5, "beta": 2.0} if self.chance(0.15) else {}
        )
        self.node("Gemm", [self.x, weights, *bias], transB=transposed, **scales)

    def matmul(self) -> None:
        self.node("MatMul", [self.x, self.kernel(self.shape[-1], self.number(1, 9))])

    def reshape(self) -> None:
        size = int(np.prod(self.shape))
        factors = [f for f in range(1, min(size, 64) + 1) if size % f == 0]
        first = self.one_of(factors)
        second = self.one_of([f for f in factors if size // first % f == 0])
        last = size // first // second
        shape = self.one_of(
            [(1, -1), (1, size), (1, first, -1), (1, first, second, last)]
            + [(0, 0, -1), (first, -1), (1, last, 1, first * second)]
        )
        self.node("Reshape", [self.x, self.constant(shape, np.int64)])

    def squeeze(self) -> None:
        axes = [i for i, size in enumerate(self.shape) if size == 1 and i]
        if axes and self.chance(0.7):
            self.node("Squeeze", [self.x, self.constant([self.one_of(axes)], np.int64)])
        else:
            axis = self.number(1, len(self.shape))
            self.node("Unsqueeze", [self.x, self.constant([axis], np.int64)])

    def transpose(self) -> None:
        rank = len(self.shape)
        order = self.random.permutation(np.arange(1, rank)).tolist()
        self.node("Transpose", [self.x], perm=[0, *order])

    def slice(self) -> None:
        axis = self.axis()
        start = self.number(0, max(self.shape[axis] - 1, 0))
        bounds = (start, 10_000, self.number(1, 2))
        if self.chance(0.2):
            bounds = (-1, -10_000, -1)
        first, last, step = (self.constant([each], np.int64) for each in bounds)
        axes = self.constant([axis], np.int64)
        self.node("Slice", [self.x, first, last, axes, step])

    def pad(self) -> None:
        pads = [self.number(0, 2) if i > 1 else 0 for i in range(len(self.shape))] * 2
        mode = self.one_of(["constant", "reflect", "edge"])
        value = [self.constant(0.25)] if mode == "constant" else []
        self.node("Pad", [self.x, self.constant(pads, np.int64), *value], mode=mode)

    def concat(self) -> None:
        axis, source = self.axis(), self.x
        self.unary()
        same = [n for n, s in self.shapes.items() if s == self.shape]
        self.node("Concat", [self.x, source, self.one_of(same)], axis=axis)

    def split(self) -> None:
        axis = self.axis()
        first = self.number(1, self.shape[axis] - 1)
        sizes = self.constant([first, self.shape[axis] - first], np.int64)
        self.node("Split", [self.x, sizes], 2, axis=axis)
        if self.chance(0.5):
            self.x = self.nodes[-1].output[1]

    def binary(self) -> None:
        kind = self.one_of(["Add", "Sub", "Mul", "Max", "Min"])
        other = self.one_of(list(self.shapes))
        self.node(kind, self.one_of([[self.x, other], [other, self.x]]))

    def constant_binary(self) -> None:
        shape = [size if self.chance(0.5) else 1 for size in self.shape]
        other = self.normal(*shape[self.number(0, len(shape)) :])
        kind = self.one_of(["Add", "Sub", "Mul"])
        self.node(kind, self.one_of([[self.x, other], [other, self.x]]))

    def branches(self) -> None:
        source = self.x
        self.pointwise()
        one, out = self.x, self.shape[1]
        self.x = source
        self._convolution(out, 1, {"kernel_shape": [3, 3], "pads": [1] * 4})
        self.node("Add", [one, self.x])

    def reduce(self) -> None:
        kind = self.one_of(["Mean", "Max", "Min", "Sum"])
        keep, rank = self.number(0, 1), len(self.shape)
        axes = self.one_of([[self.axis()], [2, 3], [-1, -2], [rank - 1]])
        if kind == "Sum":
            self.node(
                "ReduceSum", [self.x, self.constant(axes, np.int64)], keepdims=keep
            )
        else:
            self.node(f"Reduce{kind}", [self.x], axes=axes, keepdims=keep)

    def softmax(self) -> None:
        self.node(self.one_of(["Softmax", "LogSoftmax"]), [self.x], axis=self.axis())

    def resize(self) -> None:
        scales = [1, 1, *(float(self.one_of([0.5, 1, 2, 3])) for _ in self.shape[2:])]
        mode = self.one_of(["nearest", "linear"])
        place = self.one_of(["half_pixel", "asymmetric", "align_corners"])
        self.node(
            "Resize",
            [self.x, "", self.constant(scales)],
            mode=mode,
            coordinate_transformation_mode=place,
            nearest_mode=self.one_of(["floor", "round_prefer_floor"]),
        )

    def depth(self) -> None:
        if self.shape[1] % 4 == 0:
            mode = self.one_of(["DCR", "CRD"])
            self.node("DepthToSpace", [self.x], blocksize=2, mode=mode)
        else:
            self.node("SpaceToDepth", [self.x], blocksize=2)

    def norm(self) -> None:
        channels = self.shape[1]
        positive = [
            self.constant(self.random.uniform(0.5, 1.5, channels)) for _ in "ab"
        ]
        mean, bias = self.normal(channels), self.normal(channels)
        inputs = [self.x, positive[0], bias, mean, positive[1]]
        self.node("BatchNormalization", inputs)


_METHODS = {"global": "globals", "constant": "constant_binary"}


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def random_graph(seed: int, index: int) -> onnx.ModelProto:
    """A network that ONNX's checker and ONNX Runtime take; the same for the same numbers."""
    writer = Writer(seed, index)
    kinds = _FOR_C if writer.chance(0.5) else _ALL
    wanted = writer.number(2, 10)
    while True:
        for _ in range(4 * wanted):
            if len(writer.nodes) < wanted:
                kind = writer.one_of(kinds)
                writer.attempt(_METHODS.get(kind, kind))
        proto = writer.finish()
        try:
            onnx.checker.check_model(proto, full_check=True)
            shape = writer.shapes[writer.input]
            outputs = _asked(proto, np.ones(shape, np.float32))
        except (UserError, onnx.checker.ValidationError):
            outputs = []
        if outputs and all(np.isfinite(each).all() for each in outputs):
            return proto
        writer.nodes.clear()
        writer.weights.clear()
        writer.shapes = {writer.input: writer.shapes[writer.input]}
        writer.x = writer.input


def _asked(proto: onnx.ModelProto, tensor: Floats) -> list[Floats]:
    session = Session(proto.SerializeToString(), "random graph")
    names = [each.name for each in proto.graph.output]
    return session.run(names, {proto.graph.input[0].name: tensor})


def _others(tensor: Floats) -> list[Floats]:
    """Inputs that the build does not compare."""
    random = np.random.default_rng(11)
    size = float(np.abs(tensor).max())
    ramp = np.linspace(-size, size, tensor.size).reshape(tensor.shape)
    noise = random.uniform(-size, size, tensor.shape)
    sparse = np.where(random.random(tensor.shape) < 0.1, noise, 0)
    return [each.astype(np.float32) for each in (ramp, noise, sparse)]


def _in_this_process(
    work: Callable[..., Any],
    *arguments: Any,
    stage: Callable[[str], None],
    tick: Callable[[], None],
) -> Any:
    return work(*arguments, stage)


class Roads:
    """Builds networks in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.more = folder, True
        self.original: onnx.ModelProto | None = None
        for module in (bundle_backend, c_build, verify, calibrate):
            vars(module)["run_in_child"] = _in_this_process
        prepare, signed, check = (
            vars(driver)["prepare"],
            golden.signed_inputs,
            Reference.check,
        )

        def with_others(
            tensor: Any, preprocessing: Any, *, number: int = 0
        ) -> list[Floats]:
            made = signed(tensor, preprocessing, number=number)
            return [*made, *(_others(made[0]) if self.more else [])]

        def with_original(reference: Reference, tensor: Floats) -> Any:
            found = check(reference, tensor)
            if self.original is not None:
                expected = _asked(self.original, tensor)
                if not compare(found.outputs, expected, found.tolerances).passed:
                    raise UserError(
                        "the gate changes what the model answers; please report"
                    )
            return found

        vars(golden)["signed_inputs"] = with_others
        setattr(Reference, "check", with_original)  # noqa: B010
        # Random weights lose what they lose.
        vars(driver)["prepare"] = lambda *a, **k: prepare(
            *a, **(k | {"trained": False})
        )
        self.photos = folder / "photos"
        self.photos.mkdir()
        random = np.random.default_rng(5)
        for number in range(8):
            pixels = random.integers(0, 256, (6, 6, 3), np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(self.photos / f"{number}.png")

    def verdict(self, proto: onnx.ModelProto, road: str) -> tuple[str, str]:
        self.more = True
        found = self._built(proto, road)
        if found[0] == "caught":
            self.more = False
            if self._built(proto, road)[0] == "right":
                return "silent", found[1]
        return found

    def _built(self, proto: onnx.ModelProto, road: str) -> tuple[str, str]:
        target, quantize = ROADS[road]
        self.original = None if quantize else proto
        if quantize:
            self._write_arrays(proto.graph.input[0])
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            path = Path(scratch) / "graph.onnx"
            onnx.save(proto, path)
            resolved = resolve(target)
            request = BuildRequest(
                str(path),
                resolved,
                Path(scratch) / "built",
                format="c" if resolved.microcontroller else "bundle",
                quantize=quantize,
                calibration=(self.photos,) if quantize else (),
            )
            try:
                driver.build(request, Progress(quiet=True))
            except UserError as error:
                return _kind_of(str(error).replace(scratch, "")), str(error)
            except Exception:  # noqa: BLE001  (any is what is looked for)
                return "traceback", traceback.format_exc()[-1500:]
        return "right", ""

    def _write_arrays(self, value: onnx.ValueInfoProto) -> None:
        """What calibrates a network whose input is no image, beside the photographs."""
        random = np.random.default_rng(6)
        shape = [each.dim_value for each in value.type.tensor_type.shape.dim]
        for number in range(8):
            array = random.uniform(-1, 1, shape).astype(np.float32)
            np.save(self.photos / f"{number}.npy", array)


def _kind_of(message: str) -> str:
    if "please report" in message:
        return "caught"
    odd = ("Error:", "Check failed", "Traceback", "has not completed", "\n")
    return "unclear" if any(each in message for each in odd) else "refused"


def _work(connection: Connection) -> None:
    # TVM reads it once in a process.
    os.environ["TVM_NUM_THREADS"] = "1"
    # ONNX Runtime's calibration prints.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="netship-fuzz-") as folder:
        roads = Roads(Path(folder))
        while asked := connection.recv():
            connection.send(roads.verdict(onnx.load_from_string(asked[0]), asked[1]))


def _cpu_seconds(process: int) -> float:
    """What a process and its ended children took of the processor."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A process that builds; it is started again when it dies or answers nothing."""

    def __init__(self) -> None:
        self._process: Any = None

    def verdict(self, proto: onnx.ModelProto, road: str) -> tuple[str, str]:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,))
            self._process.start()
            theirs.close()
        self._connection.send((proto.SerializeToString(), road))
        before = _cpu_seconds(self._process.pid)
        try:
            # On a busy machine a build takes longer, but no more of the processor.
            for _ in range(_PATIENCE):
                if self._connection.poll(_SECONDS):
                    found: tuple[str, str] = self._connection.recv()
                    return found
                if _cpu_seconds(self._process.pid) - before > _SECONDS / 2:
                    break
            self.close()
            return "hang", f"nothing in {_SECONDS} to {_PATIENCE * _SECONDS} s"
        except (EOFError, ConnectionResetError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return "crash", f"exit code {code}"

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None


def run(
    numbers: Sequence[tuple[int, int]], roads: Sequence[str], keep: Path
) -> Iterator[dict[str, Any]]:
    """What became of each graph; one that shows a fault is kept in ``keep``."""
    worker = Worker()
    try:
        for seed, index in numbers:
            proto = random_graph(seed, index)
            found: dict[str, Any] = {
                "seed": seed,
                "index": index,
                "operators": [node.op_type for node in proto.graph.node],
            }
            for road in roads:
                started = time.monotonic()
                verdict, why = worker.verdict(proto, road)
                seconds = round(time.monotonic() - started, 2)
                found[road] = {"verdict": verdict, "why": why, "seconds": seconds}
                if verdict in FAULTS:
                    keep.mkdir(parents=True, exist_ok=True)
                    onnx.save(proto, keep / f"{seed}-{index}.onnx")
            yield found
    finally:
        worker.close()


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Verdicts of each road, and the kinds of what was refused or wrong, the most frequent first."""
    verdicts, kinds = Counter[str](), Counter[str]()
    first: dict[str, str] = {}
    for line in lines:
        for road in ROADS.keys() & line:
            verdict = line[road]["verdict"]
            verdicts[f"{road} {verdict}"] += 1
            if verdict != "right":
                last = line[road]["why"].strip().splitlines()[-1]
                why = re.sub(r"^.*graph\.onnx: |'[^']*'|-?[\d.]+(e[-+]\d+)?", "_", last)
                kinds[kind := f"{road} {verdict}: {why[:200]}"] += 1
                first.setdefault(kind, f"{line['seed']}:{line['index']}")
    rows = [f"{n:6} {each}" for each, n in sorted(verdicts.items())]
    return "\n".join(
        [*rows, *(f"{n:6} {k} ({first[k]})" for k, n in kinds.most_common())]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SEED:INDEX")
    parser.add_argument("--roads", default=",".join(ROADS))
    parser.add_argument("--log", type=Path, default=Path("out/fuzz/log.jsonl"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args(argv)
    done = []
    if options.log.exists():
        done = [json.loads(each) for each in options.log.read_text().splitlines()]
    if options.summary:
        print(summary(done))
        return 0
    seen = {(each["seed"], each["index"]) for each in done}
    numbers = [(options.seed, n) for n in range(options.count)]
    numbers = [each for each in numbers if each not in seen]
    if options.only:
        seed, index = map(int, options.only.split(":"))
        numbers = [(seed, index)]
    options.log.parent.mkdir(parents=True, exist_ok=True)
    faults = 0
    for found in run(numbers, options.roads.split(","), options.log.parent / "graphs"):
        text = json.dumps(found)
        if not options.only:
            with options.log.open("a") as log:
                log.write(text + "\n")
        said = {road: found[road]["verdict"] for road in ROADS if road in found}
        faults += bool(FAULTS & set(said.values()))
        if options.only or FAULTS & set(said.values()):
            print(
                f"{found['seed']}:{found['index']} {' '.join(found['operators'])} {said}",
                flush=True,
            )
        if options.only:
            print(*(f"{r}: {found[r]['why']}" for r in said), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
