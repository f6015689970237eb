"""One operator of TFLite each, with the right answer in numpy: axes in the file's order, which has channels last.

Longer than 450 lines: it is one list of every operator that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import erf
from typing import Any

import numpy as np
from tflite_models import RELU, RELU6, SAME, VALID, Array, TfliteFile

RANDOM = np.random.default_rng(5)


@dataclass(frozen=True)
class Case:
    """An operator, what it reads and what it must give.

    Attributes:
        shapes: of the inputs that are computed; constants follow them where ``places`` says nothing else.
        constants: float32 weights, which a quantised file stores as int8 (a bias as int32), or int32 numbers.
        answer: of all inputs in the operator's order.
        places: which of shapes (0, 1, …) and constants (−1, −2, …) are the operator's inputs, in order.
        low, high: of the inputs' values.
        quantised: whether it is also tested with int8 and uint8.
    """

    kind: str
    shapes: Sequence[tuple[int, ...]]
    answer: Callable[..., Any]
    constants: Sequence[Array] = ()
    options: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    places: Sequence[int] = ()
    low: float = -3.0
    high: float = 3.0
    quantised: bool = True
    weights_axis: int | None = None
    name: str = ""

    @property
    def order(self) -> Sequence[int]:
        return self.places or [
            *range(len(self.shapes)),
            *(-1 - k for k in range(len(self.constants))),
        ]

    def inputs(self, seed: int = 0) -> list[Array]:
        random = np.random.default_rng(seed)
        return [
            random.uniform(self.low, self.high, shape).astype(np.float32)
            for shape in self.shapes
        ]

    def answers(
        self, inputs: Sequence[Array], constants: Sequence[Array]
    ) -> list[Array]:
        every = [inputs[k] if k >= 0 else constants[-1 - k] for k in self.order]
        with np.errstate(all="ignore"):
            found = self.answer(
                *(x.astype(np.float64) if x.dtype.kind == "f" else x for x in every)
            )
        return (
            [np.asarray(x) for x in found]
            if isinstance(found, tuple)
            else [np.asarray(found)]
        )


def float_file(case: Case) -> bytes:
    file = TfliteFile()
    inputs = [file.tensor(shape, name=f"x{k}") for k, shape in enumerate(case.shapes)]
    held = [file.tensor(x.shape, str(x.dtype), x) for x in case.constants]
    answers = case.answers(case.inputs(), case.constants)
    outputs = [
        file.tensor(
            y.shape, "float32" if y.dtype.kind == "f" else str(y.dtype), name=f"y{k}"
        )
        for k, y in enumerate(answers)
    ]
    named = [inputs[k] if k >= 0 else held[-1 - k] for k in case.order]
    file.operator(case.kind, named, outputs, case.options, **case.fields)
    return file.serialised(inputs, outputs)


def _steps(low: float, high: float, dtype: str) -> tuple[float, int]:
    """Scale and zero point that cover a range."""
    info = np.iinfo(dtype)
    low, high = min(low, 0.0), max(high, low + 1e-3, 0.0)
    scale = float(np.float32((high - low) / 255))
    return scale, round(info.min - low / scale)


@dataclass(frozen=True)
class QuantisedFile:
    """A file of a case, with the inputs as real values that it stores, and the right answers with their steps."""

    data: bytes
    inputs: list[Array]
    answers: list[Array]
    scales: list[float]


def quantised_file(case: Case, dtype: str) -> QuantisedFile:
    file = TfliteFile()
    inputs, real, scales = [], [], []
    for k, x in enumerate(case.inputs()):
        scale, zero = _steps(case.low, case.high, dtype)
        inputs.append(file.tensor(x.shape, dtype, scale=scale, zero=zero, name=f"x{k}"))
        info = np.iinfo(dtype)
        stored = np.clip(np.rint(x / np.float32(scale)) + zero, info.min, info.max)
        real.append(((stored - zero) * np.float32(scale)).astype(np.float32))
        scales.append(scale)
    held, values = [], []
    unit: Array = np.ones(1, np.float32)
    for k, value in enumerate(case.constants):
        if value.dtype.kind != "f":
            held.append(file.constant(value, str(value.dtype)))
            values.append(value)
            continue
        if k == 1 and case.weights_axis is not None:
            stored = np.rint(value / unit).astype(np.int32)
            held.append(file.tensor(value.shape, "int32", stored, scale=unit))
            values.append((stored * unit).astype(np.float32))
            continue
        axis, zero = case.weights_axis, 0
        if axis is not None and dtype == "int8":
            others = tuple(a for a in range(value.ndim) if a != axis)
            scale = np.abs(value).max(axis=others) / 127
            shape = [1] * value.ndim
            shape[axis] = -1
            stored = np.rint(value / scale.reshape(shape))
            values.append((stored * scale.reshape(shape)).astype(np.float32))
            held.append(
                file.tensor(value.shape, "int8", stored, scale=scale, axis=axis)
            )
        else:
            scale, zero = _steps(float(value.min()), float(value.max()), dtype)
            info = np.iinfo(dtype)
            stored = np.clip(np.rint(value / scale) + zero, info.min, info.max)
            values.append(((stored - zero) * np.float32(scale)).astype(np.float32))
            held.append(file.tensor(value.shape, dtype, stored, scale=scale, zero=zero))
        unit = np.float32(scales[0]) * np.asarray(scale, np.float32)
    answers = case.answers(real, values)
    outputs, steps = [], []
    for k, y in enumerate(answers):
        if y.dtype.kind != "f":
            outputs.append(file.tensor(y.shape, str(y.dtype), name=f"y{k}"))
            steps.append(0.0)
            continue
        scale, zero = _steps(float(y.min()), float(y.max()), dtype)
        if case.kind == "SOFTMAX":
            scale, zero = 1 / 256, int(np.iinfo(dtype).min)
        elif case.kind in _SAME_SCALE:
            scale, zero = _steps(case.low, case.high, dtype)
        outputs.append(
            file.tensor(y.shape, dtype, scale=scale, zero=zero, name=f"y{k}")
        )
        steps.append(scale)
    named = [inputs[k] if k >= 0 else held[-1 - k] for k in case.order]
    file.operator(case.kind, named, outputs, case.options, **case.fields)
    return QuantisedFile(file.serialised(inputs, outputs), real, answers, steps)


# Operators that LiteRT demands one scale of, for input and output.
_SAME_SCALE = {
    *(
        "AVERAGE_POOL_2D",
        "BATCH_TO_SPACE_ND",
        "DEPTH_TO_SPACE",
        "EXPAND_DIMS",
        "GATHER",
    ),
    *(
        "MAX_POOL_2D",
        "MAXIMUM",
        "MINIMUM",
        "MIRROR_PAD",
        "PACK",
        "PAD",
        "PADV2",
        "REDUCE_MAX",
        "REDUCE_MIN",
    ),
    *(
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "SLICE",
        "SPACE_TO_BATCH_ND",
    ),
    *(
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "SQUEEZE",
        "STRIDED_SLICE",
        "TILE",
        "TRANSPOSE",
        "UNPACK",
    ),
}


def _weights(*shape: int) -> Array:
    return RANDOM.uniform(-1, 1, shape).astype(np.float32)


def _ints(*values: Any) -> Array:
    return np.array(values[0] if len(values) == 1 else values, np.int32)


def _around(
    x: Array, kernel: Any, strides: Any, dilations: Any, padding: int, fill: float
) -> Iterator[tuple[int, int, Array, Array]]:
    """For every place in the kernel: what it sees [N, out height, out width, C], and which of that is no padding."""
    sizes, before, after = [], [], []
    for size, k, s, d in zip(x.shape[1:3], kernel, strides, dilations, strict=True):
        extent = (k - 1) * d + 1
        out = -(-size // s) if padding == SAME else (size - extent) // s + 1
        total = max((out - 1) * s + extent - size, 0) if padding == SAME else 0
        sizes.append(out)
        before.append(total // 2)
        after.append(total - total // 2)
    widths = ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0))
    padded = np.pad(x, widths, constant_values=fill)
    real = np.pad(np.ones_like(x), widths)
    for i, j in np.ndindex(*kernel):
        rows = slice(
            i * dilations[0],
            i * dilations[0] + (sizes[0] - 1) * strides[0] + 1,
            strides[0],
        )
        columns = slice(
            j * dilations[1],
            j * dilations[1] + (sizes[1] - 1) * strides[1] + 1,
            strides[1],
        )
        yield i, j, padded[:, rows, columns], real[:, rows, columns]


def _conv(
    x: Array,
    w: Array,
    b: Array,
    strides: Any = (1, 1),
    dilations: Any = (1, 1),
    padding: int = VALID,
) -> Array:
    total: Any = 0.0
    groups = x.shape[3] // w.shape[3]
    for i, j, seen, _ in _around(x, w.shape[1:3], strides, dilations, padding, 0.0):
        parts = [
            part @ weights.T
            for part, weights in zip(
                np.split(seen, groups, -1), np.split(w[:, i, j], groups), strict=True
            )
        ]
        total = total + np.concatenate(parts, -1)
    return np.asarray(total + b)


def _depthwise(
    x: Array,
    w: Array,
    b: Array,
    strides: Any = (1, 1),
    dilations: Any = (1, 1),
    padding: int = VALID,
) -> Array:
    times = w.shape[3] // x.shape[3]
    total: Any = 0.0
    for i, j, seen, _ in _around(x, w.shape[1:3], strides, dilations, padding, 0.0):
        total = total + np.repeat(seen, times, -1) * w[0, i, j]
    return np.asarray(total + b)


def _pool(x: Array, kernel: Any, strides: Any, padding: int, form: str) -> Array:
    seen = list(
        _around(x, kernel, strides, (1, 1), padding, -np.inf if form == "max" else 0.0)
    )
    if form == "max":
        return np.asarray(np.max([part for *_, part, _ in seen], axis=0))
    count = np.sum([real for *_, real in seen], axis=0)
    if form == "l2":
        squares = np.sum([part**2 for *_, part, _ in seen], axis=0)
        return np.asarray(np.sqrt(squares / count))
    return np.asarray(np.sum([part for *_, part, _ in seen], axis=0) / count)


def _transposed(
    w: Array, x: Array, b: Array, size: Any, stride: int, before: int
) -> Array:
    out = np.zeros((1, *size, w.shape[0]))
    for y, z in np.ndindex(*x.shape[1:3]):
        for i, j in np.ndindex(*w.shape[1:3]):
            r, c = y * stride + i - before, z * stride + j - before
            if 0 <= r < size[0] and 0 <= c < size[1]:
                out[0, r, c] += w[:, i, j] @ x[0, y, z]
    return np.asarray(out + b)


def _resized(x: Array, size: Any, linear: bool, corners: bool, halves: bool) -> Array:
    def places(old: int, new: int) -> Array:
        scale = (old - 1) / (new - 1) if corners and new > 1 else old / new
        at = np.arange(new) + (0.5 if halves else 0.0)
        if linear:
            at = at * scale - (0.5 if halves else 0.0)
        else:
            at = np.floor(at * scale + (0.5 if corners else 0.0))
        return np.asarray(np.clip(at, 0, old - 1))

    for axis, new in zip((1, 2), size, strict=True):
        at = places(x.shape[axis], new)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        shape = [1] * 4
        shape[axis] = -1
        part = (at - low).reshape(shape)
        x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
    return x


def _softmax(x: Array, beta: float = 1.0) -> Array:
    e = np.exp(beta * (x - x.max(-1, keepdims=True)))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _lrn(x: Array) -> Array:
    out = np.empty_like(x)
    for c in range(x.shape[3]):
        near = x[..., max(0, c - 1) : c + 2]
        out[..., c] = x[..., c] / (1.5 + 0.3 * (near**2).sum(-1)) ** 0.75
    return out


def _strided(
    down: int, across: int, padding: int, dilation: int = 1, function: int = 0
) -> dict[str, Any]:
    return {
        "StrideH": down,
        "StrideW": across,
        "Padding": padding,
        "DilationHFactor": dilation,
        "DilationWFactor": dilation,
        "FusedActivationFunction": function,
    }


def _pooled(kernel: tuple[int, int], stride: int, padding: int) -> dict[str, Any]:
    return {
        "FilterHeight": kernel[0],
        "FilterWidth": kernel[1],
        "StrideH": stride,
        "StrideW": stride,
        "Padding": padding,
    }


IMAGE, ROW = (1, 5, 6, 4), (1, 12)
_DEPTHWISE = {"DepthMultiplier": 1}
_UNARY: dict[str, Any] = {
    "ABS": np.abs,
    "TANH": np.tanh,
    "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
    "RELU": lambda x: np.maximum(x, 0),
    "RELU6": lambda x: np.clip(x, 0, 6),
    "RELU_N1_TO_1": lambda x: np.clip(x, -1, 1),
    "HARD_SWISH": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "ELU": lambda x: np.where(x < 0, np.expm1(x), x),
}
_FLOAT_UNARY: dict[str, Any] = {
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ROUND": np.rint,
    "SIN": np.sin,
    "COS": np.cos,
    "EXP": np.exp,
    "NEG": np.negative,
    "SQUARE": np.square,
    "RELU_0_TO_1": lambda x: np.clip(x, 0, 1),
}
_POSITIVE: dict[str, Any] = {
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RSQRT": lambda x: 1 / np.sqrt(x),
}
_BINARY: dict[str, Any] = {
    "ADD": np.add,
    "SUB": np.subtract,
    "MUL": np.multiply,
    "MAXIMUM": np.maximum,
    "MINIMUM": np.minimum,
    "SQUARED_DIFFERENCE": lambda a, b: (a - b) ** 2,
}
_OPTIONS = {
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
}
_REDUCED: dict[str, Any] = {
    "MEAN": np.mean,
    "SUM": np.sum,
    "REDUCE_MAX": np.max,
    "REDUCE_MIN": np.min,
}
_SHUFFLED = RANDOM.permutation(120).reshape(5, 24) / 60 - 1


def _cases() -> Iterator[Case]:
    for padding, stride, dilation in ((SAME, 2, 1), (VALID, 1, 2), (SAME, 1, 2)):
        yield Case(
            "CONV_2D",
            [(1, 7, 8, 4)],
            lambda x, w, b, p=padding, s=stride, d=dilation: np.clip(
                _conv(x, w, b, (s, s), (d, d), p), 0, 6
            ),
            [_weights(5, 3, 2, 4), _weights(5)],
            "Conv2DOptions",
            _strided(stride, stride, padding, dilation, RELU6),
            weights_axis=0,
        )
        yield Case(
            "DEPTHWISE_CONV_2D",
            [(1, 7, 8, 3)],
            lambda x, w, b, p=padding, s=stride, d=dilation: np.maximum(
                _depthwise(x, w, b, (s, s), (d, d), p), 0
            ),
            [_weights(1, 3, 3, 6), _weights(6)],
            "DepthwiseConv2DOptions",
            _strided(stride, stride, padding, dilation, RELU) | {"DepthMultiplier": 2},
            weights_axis=3,
        )
        yield Case(
            "MAX_POOL_2D",
            [(1, 7, 8, 3)],
            lambda x, p=padding, s=stride: _pool(x, (3, 2), (s, s), p, "max"),
            options="Pool2DOptions",
            fields=_pooled((3, 2), stride, padding),
        )
        yield Case(
            "AVERAGE_POOL_2D",
            [(1, 7, 8, 3)],
            lambda x, p=padding, s=stride: _pool(x, (3, 2), (s, s), p, "mean"),
            options="Pool2DOptions",
            fields=_pooled((3, 2), stride, padding),
        )
    yield Case(
        "L2_POOL_2D",
        [(1, 7, 8, 3)],
        lambda x: _pool(x, (3, 2), (2, 2), SAME, "l2"),
        options="Pool2DOptions",
        fields=_pooled((3, 2), 2, SAME),
        quantised=False,
    )
    yield Case(
        "AVERAGE_POOL_2D",
        [IMAGE],
        lambda x: x.mean((1, 2), keepdims=True),
        options="Pool2DOptions",
        fields=_pooled((5, 6), 1, VALID),
        name="global",
    )
    # Groups, which LiteRT has by the weights' shape only.
    yield Case(
        "CONV_2D",
        [(1, 5, 5, 4)],
        lambda x, w, b: _conv(x, w, b),
        [_weights(6, 3, 3, 2), _weights(6)],
        "Conv2DOptions",
        _strided(1, 1, VALID),
        weights_axis=0,
        name="groups",
    )
    for padding, size, before in (
        (SAME, (8, 10), 0),
        (VALID, (9, 11), 0),
        (SAME, (7, 9), 1),
    ):
        yield Case(
            "TRANSPOSE_CONV",
            [(1, 4, 5, 3)],
            lambda s, w, x, b, n=size, k=before: _transposed(w, x, b, n, 2, k),
            [_weights(2, 3, 3, 3), _weights(2), _ints(1, *size, 2)],
            "TransposeConvOptions",
            {"StrideH": 2, "StrideW": 2, "Padding": padding},
            places=[-3, -1, 0, -2],
            weights_axis=0,
        )
    yield Case(
        "FULLY_CONNECTED",
        [ROW],
        lambda x, w, b: x @ w.T + b,
        [_weights(7, 12), _weights(7)],
        "FullyConnectedOptions",
        weights_axis=None,
        quantised=False,
    )
    yield Case(
        "FULLY_CONNECTED",
        [ROW],
        lambda x, w, b: np.maximum(x @ w.T + b, 0),
        [_weights(7, 12), _weights(7)],
        "FullyConnectedOptions",
        {"FusedActivationFunction": RELU},
        weights_axis=0,
    )
    yield Case(
        "FULLY_CONNECTED",
        [(1, 2, 3, 12)],
        lambda x, w: x @ w.T,
        [_weights(7, 12)],
        "FullyConnectedOptions",
        {"KeepNumDims": True},
    )
    for kind, function in (_UNARY | _FLOAT_UNARY).items():
        for shape in (IMAGE, ROW):
            yield Case(kind, [shape], function, quantised=kind in _UNARY)
    for kind, function in _POSITIVE.items():
        yield Case(kind, [IMAGE], function, low=0.25, quantised=kind == "RSQRT")
    yield Case(
        "LEAKY_RELU",
        [IMAGE],
        lambda x: np.where(x < 0, 0.25 * x, x),
        options="LeakyReluOptions",
        fields={"Alpha": 0.25},
    )
    for approximate in (True, False):
        yield Case(
            "GELU",
            [ROW],
            (
                lambda x: (
                    0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
                )
            )
            if approximate
            else (lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))),
            options="GeluOptions",
            fields={"Approximate": approximate},
        )
    yield Case(
        "PRELU", [IMAGE], lambda x, a: np.where(x < 0, a * x, x), [_weights(1, 1, 4)]
    )
    for kind, function in _BINARY.items():
        options = _OPTIONS.get(kind, "")
        yield Case(kind, [IMAGE, IMAGE], function, options=options)
        yield Case(kind, [IMAGE, (1, 1, 1, 4)], function, options=options)
        yield Case(
            kind,
            [IMAGE],
            function,
            [_weights(4)],
            options,
            quantised=kind in _OPTIONS,
        )
        yield Case(kind, [IMAGE, (6, 4)], function, options=options, quantised=False)
        yield Case(kind, [ROW, ROW], function, options=options)
    yield Case(
        "DIV", [IMAGE, IMAGE], np.divide, options="DivOptions", low=0.5, quantised=False
    )
    yield Case("POW", [IMAGE, IMAGE], np.power, low=0.5, quantised=False)
    yield Case(
        "ADD",
        [IMAGE, IMAGE],
        lambda a, b: np.clip(a + b, -1, 1),
        options="AddOptions",
        fields={"FusedActivationFunction": 2},
    )
    for kind, function in _REDUCED.items():
        for axes in ((1, 2), (3,), (2,), (0, 1, 2, 3)):
            for keeps in (True, False):
                if axes == (0, 1, 2, 3) and not keeps:
                    continue
                yield Case(
                    kind,
                    [IMAGE],
                    lambda x, _, f=function, a=axes, k=keeps: f(x, axis=a, keepdims=k),
                    [_ints(axes)],
                    "ReducerOptions",
                    {"KeepDims": keeps},
                )
    yield Case(
        "REDUCE_PROD",
        [ROW],
        lambda x, _: np.prod(x, axis=1),
        [_ints([1])],
        "ReducerOptions",
        quantised=False,
    )
    for shape in (IMAGE, ROW):
        yield Case(
            "SOFTMAX",
            [shape],
            lambda x: _softmax(x, 0.5),
            options="SoftmaxOptions",
            fields={"Beta": 0.5},
        )
        yield Case(
            "LOG_SOFTMAX", [shape], lambda x: np.log(_softmax(x)), quantised=False
        )
        yield Case(
            "L2_NORMALIZATION",
            [shape],
            lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True)),
            options="L2NormOptions",
            quantised=False,
        )
    yield Case(
        "LOCAL_RESPONSE_NORMALIZATION",
        [IMAGE],
        _lrn,
        options="LocalResponseNormalizationOptions",
        fields={"Radius": 1, "Bias": 1.5, "Alpha": 0.3, "Beta": 0.75},
        quantised=False,
    )
    for axis in (3, -3, 1):
        yield Case(
            "CONCATENATION",
            [IMAGE, IMAGE],
            lambda a, b, n=axis: np.concatenate([a, b], n),
            options="ConcatenationOptions",
            fields={"Axis": axis},
        )
    yield Case(
        "CONCATENATION",
        [ROW, ROW],
        lambda a, b: np.concatenate([a, b], -1),
        options="ConcatenationOptions",
        fields={"Axis": -1},
    )
    yield Case("RESHAPE", [IMAGE], lambda x, s: x.reshape(s), [_ints(1, 10, 12)])
    yield Case("RESHAPE", [(1, 1, 1, 12)], lambda x, s: x.reshape(s), [_ints(1, 12)])
    yield Case(
        "SQUEEZE", [(1, 5, 1, 4)], lambda x: x[:, :, 0], options="SqueezeOptions"
    )
    yield Case("EXPAND_DIMS", [(1, 5, 4)], lambda x, _: x[:, None], [_ints([1])])
    for perm in ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1, 3)):
        yield Case("TRANSPOSE", [IMAGE], lambda x, p: x.transpose(p), [_ints(perm)])
    yield Case(
        "SLICE",
        [IMAGE],
        lambda x, b, s: x[:, 1:4, :, 2:4],
        [_ints(0, 1, 0, 2), _ints(1, 3, -1, 2)],
    )
    yield Case(
        "STRIDED_SLICE",
        [IMAGE],
        lambda x, *_: x[:, 1:5:2, ::-1, 2:],
        [_ints(0, 1, 5, 2), _ints(1, 5, 9, 4), _ints(1, 2, -1, 1)],
        "StridedSliceOptions",
        {"EndMask": 0b0100},
    )
    yield Case(
        "STRIDED_SLICE",
        [IMAGE],
        lambda x, *_: x[:, -2, 1:, 3],
        [_ints(0, -2, 1, 3), _ints(0, 0, 0, 0), _ints(1, 1, 1, 1)],
        "StridedSliceOptions",
        {"EndMask": 0b0101, "ShrinkAxisMask": 0b1010},
    )
    yield Case(
        "SPLIT",
        [IMAGE],
        lambda a, x: tuple(np.split(x, 2, 3)),
        [_ints(3).reshape(())],
        "SplitOptions",
        {"NumSplits": 2},
        places=[-1, 0],
    )
    yield Case(
        "SPLIT_V",
        [IMAGE],
        lambda x, s, a: tuple(np.split(x, [1, 3], 2)),
        [_ints(1, 2, 3), _ints(2).reshape(())],
        "SplitVOptions",
        {"NumSplits": 3},
    )
    yield Case(
        "PACK",
        [(1, 5, 4), (1, 5, 4)],
        lambda a, b: np.stack([a, b], 2),
        options="PackOptions",
        fields={"Axis": 2, "ValuesCount": 2},
    )
    yield Case(
        "UNPACK",
        [(1, 5, 2, 4)],
        lambda x: (x[:, :, 0], x[:, :, 1]),
        options="UnpackOptions",
        fields={"Axis": 2, "Num": 2},
    )
    yield Case(
        "GATHER",
        [IMAGE],
        lambda x, i: np.take(x, i, 2),
        [_ints(5, 0, 3)],
        "GatherOptions",
        {"Axis": 2},
    )
    widths = ((0, 0), (1, 2), (0, 3), (2, 1))
    yield Case("PAD", [IMAGE], lambda x, w: np.pad(x, w), [_ints(widths)])
    yield Case(
        "PADV2",
        [IMAGE],
        lambda x, w, v: np.pad(x, w, constant_values=v),
        [_ints(widths), np.array([1.5], np.float32)],
        quantised=False,
    )
    yield Case(
        "MIRROR_PAD",
        [IMAGE],
        lambda x, w: np.pad(x, w, mode="reflect"),
        [_ints(widths)],
        "MirrorPadOptions",
    )
    for corners, halves in ((False, False), (True, False), (False, True)):
        chosen = {"AlignCorners": corners, "HalfPixelCenters": halves}
        for linear in (True, False):
            kind = "RESIZE_BILINEAR" if linear else "RESIZE_NEAREST_NEIGHBOR"
            for size in ((10, 13), (3, 4)):
                yield Case(
                    kind,
                    [IMAGE],
                    lambda x, s, n=linear, c=corners, h=halves: _resized(x, s, n, c, h),
                    [_ints(size)],
                    "ResizeBilinearOptions"
                    if linear
                    else "ResizeNearestNeighborOptions",
                    chosen,
                )
    yield Case(
        "SPACE_TO_DEPTH",
        [(1, 4, 6, 3)],
        lambda x: (
            x.reshape(1, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 3, 12)
        ),
        options="SpaceToDepthOptions",
        fields={"BlockSize": 2},
    )
    yield Case(
        "DEPTH_TO_SPACE",
        [(1, 2, 3, 12)],
        lambda x: (
            x.reshape(1, 2, 3, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 4, 6, 3)
        ),
        options="DepthToSpaceOptions",
        fields={"BlockSize": 2},
    )
    for axis in (3, 1):
        yield Case(
            "ARG_MAX",
            [IMAGE],
            lambda x, a: np.argmax(x, a).astype(np.int64),
            [_ints(axis).reshape(())],
            "ArgMaxOptions",
            {"OutputType": 4},
        )
    yield Case(
        "ARG_MIN",
        [ROW],
        lambda x, a: np.argmin(x, a).astype(np.int32),
        [_ints(1).reshape(())],
        "ArgMinOptions",
        {"OutputType": 2},
    )
    yield Case(
        "BATCH_MATMUL",
        [(2, 3, 4), (2, 5, 4)],
        lambda a, b: a @ b.transpose(0, 2, 1),
        options="BatchMatMulOptions",
        fields={"AdjY": True},
    )
    yield Case("TILE", [ROW], lambda x, n: np.tile(x, n), [_ints(2, 3)])
    yield Case(
        "BROADCAST_TO",
        [ROW],
        lambda x, s: np.broadcast_to(x, s),
        [_ints(3, 12)],
        quantised=False,
    )


def _rare_cases() -> Iterator[Case]:
    """Operators of float32 that networks have for post-processing."""
    for kind, function in (
        ("EQUAL", np.equal),
        ("GREATER", np.greater),
        ("GREATER_EQUAL", np.greater_equal),
        ("LESS", np.less),
        ("LESS_EQUAL", np.less_equal),
    ):
        yield Case(kind, [IMAGE, (1, 1, 1, 4)], function, quantised=False)
    chosen = RANDOM.integers(0, 2, IMAGE).astype(bool)
    for kind in ("SELECT", "SELECT_V2"):
        places = [-1, 0, 1]
        yield Case(
            kind, [IMAGE, IMAGE], np.where, [chosen], places=places, quantised=False
        )
    for kind, both in (("LOGICAL_AND", np.logical_and), ("LOGICAL_OR", np.logical_or)):
        yield Case(
            kind,
            [],
            both,
            [chosen, RANDOM.integers(0, 2, (4,)).astype(bool)],
            quantised=False,
        )
    yield Case("LOGICAL_NOT", [], np.logical_not, [chosen], quantised=False)
    yield Case("SIGN", [IMAGE], np.sign, quantised=False)
    yield Case("ADD_N", [ROW, ROW, ROW], lambda *x: np.sum(x, axis=0), quantised=False)
    yield Case(
        "CAST",
        [IMAGE],
        lambda x: x.astype(np.int32),
        options="CastOptions",
        fields={"InDataType": 0, "OutDataType": 2},
        quantised=False,
    )


CASES = [*_cases(), *_rare_cases()]
