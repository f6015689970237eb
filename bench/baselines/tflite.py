"""ONNX → .tflite, for LiteRT: CNNs with channels last, as LiteRT wants them.

It takes what a comparison needs: one image, float32 or the int8 of a QDQ graph. Batch normalisation and ReLU are
fused as LiteRT's own converter does. The schema's Python classes come with LiteRT's wheel.

Longer than 450 lines: each operator has a form of its own, and all share the tensors made so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from netship.bench.baselines.int8_graph import int8_activations
from netship.bench.baselines.plain import added_as_bias, no_bias, ordered
from netship.bench.baselines.tflite_file import TfliteFile
from netship.bench.baselines.tflite_pixels import same_pixels
from netship.compile import passes
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Operator, Tensor, constant
from netship.compile.ir.operators import Convolution, Dense, Limited, Transpose
from netship.compile.passes.integers import absorb_constants
from netship.compile.passes.simplify import (
    drop_identities,
    fold_limits,
    fold_normalisation,
    limits_of,
    matmul_as_gemm,
)
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

# LiteRT's activation functions, by what they limit values to.
_ACTIVATIONS = {
    (-math.inf, math.inf): "NONE",
    (0.0, math.inf): "RELU",
    (0.0, 6.0): "RELU6",
}
_BINARY = {"Add": "ADD", "Div": "DIV", "Mul": "MUL", "Sub": "SUB"}
# LiteRT's operator, and its table of options.
_UNARY = {
    "DequantizeLinear": ("DEQUANTIZE", ""),
    "HardSwish": ("HARD_SWISH", ""),
    "QuantizeLinear": ("QUANTIZE", ""),
    "Sigmoid": ("LOGISTIC", ""),
    "Tanh": ("TANH", ""),
}
_CHANNELS_LAST = (0, 2, 3, 1)


_PASSES = (
    drop_identities,
    fold_normalisation,
    absorb_constants,
    matmul_as_gemm,
    added_as_bias,
    fold_limits,
    int8_activations,
)


def convert(proto: onnx.ModelProto, schema: ModuleType) -> bytes:
    """The .tflite flatbuffer of a static ONNX graph; its input and 4-D tensors are NHWC.

    Inputs and outputs stay float32. Between QuantizeLinear and DequantizeLinear everything is int8.

    Args:
        schema: LiteRT's ``schema_py_generated``.

    Raises:
        UserError: an operator, or a form of one, that this conversion does not know.
    """
    graph = passes.run(_PASSES, onnx_form.read_as_written(proto))
    return _Converter(graph, TfliteFile(schema)).converted()


class _Converter:
    """One graph: its tensors to those of the file, operator by operator."""

    def __init__(self, graph: Graph, file: TfliteFile) -> None:
        self.graph, self.file = graph, file
        # Of a tensor whose axes lie in this order: axis i of the file's is axis order[i] of the graph's.
        self.index: dict[str, dict[tuple[int, ...], int]] = {}
        self.converters: dict[str, Callable[[Any], None]] = {
            **{kind: self._binary for kind in _BINARY},
            **{kind: self._unary for kind in _UNARY},
            **dict.fromkeys(
                ("Flatten", "Reshape", "Squeeze", "Unsqueeze"), self._reshape
            ),
            **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), self._mean),
            **dict.fromkeys(("Identity", "Dropout"), self._skip),
            **dict.fromkeys(("MaxPool", "AveragePool"), self._pool),
            **dict.fromkeys(("Relu", "Clip"), self._limit),
            "Concat": self._concat,
            "Conv": self._convolution,
            "Gemm": self._dense,
            "HardSigmoid": self._hard_sigmoid,
            "Pad": self._pad,
            "Resize": self._resize,
            "Softmax": self._softmax,
            "Transpose": self._transpose,
        }

    def converted(self) -> bytes:
        inputs = [self._tensor(each) for each in self.graph.inputs]
        for operator in self.graph.operators:
            if operator.kind not in self.converters:
                raise _unknown(operator, "this operator")
            layer = isinstance(operator, Convolution | Dense)
            if layer and len(operator.activations) > 1:
                raise _unknown(operator, "weights that are computed")
            self.converters[operator.kind](operator)
        outputs = [self._tensor(each) for each in self.graph.outputs]
        return self.file.serialised(inputs, outputs)

    def _emit(
        self,
        code: str,
        operator: Operator,
        inputs: Sequence[int] = (),
        options: str = "",
        **fields: object,
    ) -> None:
        """Add what makes the operator's output, by default of its own inputs."""
        inputs = inputs or [self._tensor(each) for each in operator.inputs if each]
        output, limits = operator.output, None
        if isinstance(operator, Limited):
            limits = operator.limits
            functions = self.file.schema.ActivationFunctionType
            kind = _ACTIVATIONS.get(limits, "NONE")
            fields["fusedActivationFunction"] = int(getattr(functions, kind))
        if limits is None or limits in _ACTIVATIONS:
            self.file.operator(code, inputs, self._tensor(output), options, **fields)
        else:
            free = self._tensor(replace(output, name=f"{output.name}/free"))
            self.file.operator(code, inputs, free, options, **fields)
            self._bound(operator, free, limits)

    def _bound(
        self, operator: Operator, source: int, limits: tuple[float, float]
    ) -> None:
        """The operator's output: ``source`` between two numbers."""
        output = operator.output
        if output.quantisation is not None:
            raise _unknown(operator, "bounds other than 0 and 6 of int8")
        ends = zip(("MAXIMUM", "MINIMUM"), limits, strict=True)
        codes = [(code, limit) for code, limit in ends if math.isfinite(limit)]
        for number, (code, limit) in enumerate(codes, 1):
            last = number == len(codes)
            made = output if last else replace(output, name=f"{output.name}/{code}")
            target = self._tensor(made)
            inputs = [source, self._number(f"{output.name}/{code} bound", limit)]
            self.file.operator(code, inputs, target, "MaximumMinimumOptions")
            source = target

    def _tensor(self, tensor: Tensor, order: tuple[int, ...] = ()) -> int:
        """The file's tensor of an activation, or of a constant among activations.

        Args:
            order: of its axes, by default the file's own: an image's channels lie last.
        """
        order = order or _usual(len(tensor.shape))
        known = self.index.setdefault(tensor.name, {})
        if order not in known:
            made = ordered(tensor, order)
            if known and tensor.value is None:
                have, source = next(iter(known.items()))
                made = replace(made, name=f"{made.name}/{order}")
                axes = [have.index(axis) for axis in order]
                inputs = [source, self._integers(f"{made.name}/axes", axes)]
                known[order] = self.file.tensor(made)
                self.file.operator(
                    "TRANSPOSE", inputs, known[order], "TransposeOptions"
                )
            else:
                known[order] = self.file.tensor(made)
        return known[order]

    def _number(self, name: str, value: float) -> int:
        return self.file.tensor(constant(name, np.array(value, np.float32)))

    def _integers(self, name: str, values: Sequence[Any]) -> int:
        value = np.array(values, np.int32)
        return self.file.tensor(Tensor(name, value.shape, "int32", value=value))

    def _skip(self, operator: Operator) -> None:
        self._tensor(operator.input)
        self.index[operator.output.name] = self.index[operator.input.name]

    def _transpose(self, operator: Transpose) -> None:
        """No operator: the same tensor, its axes in another order of the graph's."""
        self._tensor(operator.input)
        self.index[operator.output.name] = {
            tuple(operator.order.index(axis) for axis in order): index
            for order, index in self.index[operator.input.name].items()
        }

    def _unary(self, operator: Operator) -> None:
        code, options = _UNARY[operator.kind]
        self._emit(code, operator, (), options)

    def _binary(self, operator: Operator) -> None:
        code = _BINARY[operator.kind]
        inputs = self._operands(operator)
        self._emit(code, operator, inputs, f"{code.title()}Options")

    def _operands(self, operator: Operator) -> list[int]:
        """The inputs with as many axes as the output; constants in its type."""
        rank, inputs = len(operator.output.shape), []
        for each in operator.inputs:
            assert each is not None
            missing = rank - len(each.shape)
            if each.value is not None:
                is_float = operator.output.quantisation is None
                value = each.real.astype(np.float32) if is_float else each.value
                made = constant(
                    f"{each.name}/{rank} {value.dtype}",
                    value.reshape(*[1] * missing, *each.shape),
                    None if is_float else each.quantisation,
                )
                if not is_float and made.dtype != "int8":
                    raise _unknown(operator, "a constant that is not int8")
                inputs.append(self._tensor(made))
                continue
            if missing:
                raise _unknown(operator, "computed values of fewer axes")
            inputs.append(self._tensor(each))
        return inputs

    def _limit(self, operator: Operator) -> None:
        limits, source = limits_of(operator), self._tensor(operator.input)
        if limits is None:
            raise _unknown(operator, "bounds that are computed")
        if limits in _ACTIVATIONS:
            self._emit(_ACTIVATIONS[limits], operator, [source])
        else:
            self._bound(operator, source, limits)

    def _hard_sigmoid(self, operator: Operator) -> None:
        """As Keras has it: ReLU6(6 alpha x + 6 beta) / 6."""
        attributes, name = operator.attributes, operator.output.name
        alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
        functions = self.file.schema.ActivationFunctionType
        steps = (
            ("MUL", 6 * alpha, "NONE"),
            ("ADD", 6 * beta, "RELU6"),
            ("MUL", 1 / 6, "NONE"),
        )

        def emit(source: int, target: int) -> None:
            for number, (code, value, function) in enumerate(steps):
                made = replace(operator.output.as_float(), name=f"{name}/step {number}")
                inputs = [source, self._number(f"{name}/factor {number}", value)]
                source = target if number == 2 else self._tensor(made)
                fused = int(getattr(functions, function))
                options = f"{code.title()}Options"
                self.file.operator(
                    code, inputs, source, options, fusedActivationFunction=fused
                )

        self._in_float(operator, emit)

    def _in_float(self, operator: Operator, emit: Callable[[int, int], None]) -> None:
        """What LiteRT has no int8 form of: dequantised, computed and quantised.

        Args:
            emit: adds what makes the second tensor of the first.
        """
        source, output = operator.input, operator.output
        if output.quantisation is None:
            emit(self._tensor(source), self._tensor(output))
            return
        given, made = (
            self._tensor(replace(each.as_float(), name=f"{each.name}/float"))
            for each in (source, output)
        )
        self.file.operator("DEQUANTIZE", [self._tensor(source)], given)
        emit(given, made)
        self.file.operator("QUANTIZE", [made], self._tensor(output))

    def _pad(self, operator: Operator) -> None:
        rank = len(operator.input.shape)
        pads = operator.attributes.get("pads", operator.constant(1))
        value = operator.constant(2)
        zeros = operator.attributes.get("mode", b"constant") == b"constant"
        zeros &= not (value is not None and value.any())
        if pads is None or not zeros or len(pads) != 2 * rank or min(pads) < 0:
            raise _unknown(operator, "padding other than by zeros")
        both = np.array(pads).reshape(2, rank).T[list(_usual(rank))]
        rows = self._integers(f"{operator.output.name}/pads", both.tolist())
        inputs = [self._tensor(operator.input), rows]
        self._emit("PAD", operator, inputs, "PadOptions")

    def _convolution(self, operator: Convolution) -> None:
        if len(operator.output.shape) != 4:
            raise _unknown(operator, "a convolution that is not 2-D")
        x, fields = self._window(operator, operator.kernel, operator.dilations)
        fields["dilationHFactor"], fields["dilationWFactor"] = operator.dilations
        code, options, order = "CONV_2D", "Conv2DOptions", _CHANNELS_LAST
        if operator.group == operator.input.shape[1] > 1:
            code, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
            order = (1, 2, 3, 0)
            fields["depthMultiplier"] = operator.output.shape[1] // operator.group
        inputs = [x, *self._weights(operator, order)]
        self._emit(code, operator, inputs, options, **fields)

    def _dense(self, operator: Dense) -> None:
        attributes = operator.attributes
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise _unknown(operator, "alpha or beta other than 1")
        order = (0, 1) if attributes.get("transB", 0) else (1, 0)
        inputs = [self._tensor(operator.input), *self._weights(operator, order)]
        self._emit("FULLY_CONNECTED", operator, inputs, "FullyConnectedOptions")

    def _weights(
        self, operator: Convolution | Dense, order: Sequence[int]
    ) -> Iterator[int]:
        """Constant weights, their axes in ``order``, and bias; integers in an int8 layer."""
        _, weights, *rest = operator.inputs
        bias = rest[0] if rest else None
        assert weights is not None
        if bias is None and isinstance(operator, Convolution):
            bias = no_bias(operator.input, weights)
        constants = {"weights": ordered(weights, order)}
        if bias is not None:
            constants["bias"] = replace(bias, shape=(bias.size,))
        is_int8 = operator.input.quantisation is not None
        found = [each.dtype for each in constants.values()]
        if is_int8 and found != ["int8", "int32"][: len(found)]:
            raise _unknown(operator, "weights and bias that are not int8 and int32")
        for what, each in constants.items():
            made = replace(each, name=f"{operator.output.name}/{what}")
            yield self.file.tensor(made if is_int8 else made.as_float())

    def _window(
        self,
        operator: Operator,
        kernel: Sequence[int],
        dilations: Sequence[int],
        same: bool = True,
        around: float | None = 0.0,
    ) -> tuple[int, dict[str, object]]:
        """A window's input, and its padding and strides: SAME or VALID, or VALID after padding where neither fits.

        Args:
            same: whether the operator gives what LiteRT's padding SAME gives, where the sizes fit.
            around: what it takes to lie around its input; None where no number does.
        """
        attributes, source = operator.attributes, operator.input
        automatic = attributes.get("auto_pad", b"NOTSET")
        strides = attributes.get("strides", [1, 1])
        size = np.array(source.shape[2:])
        spread = (np.array(kernel) - 1) * dilations + 1
        total = np.maximum((-(-size // strides) - 1) * strides + spread - size, 0)
        upper, lower = total - total // 2, total // 2
        pads = np.array(attributes.get("pads", [0, 0, 0, 0])).reshape(2, 2)
        if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
            ends = (lower, upper) if automatic == b"SAME_UPPER" else (upper, lower)
            pads = np.array(ends)
        same = same and np.array_equal(pads, [lower, upper])
        x = self._tensor(source)
        if pads.any() and not same:
            if around is None:
                raise _unknown(operator, "padding")
            name, whole = operator.output.name, x
            rows = self._integers(f"{name}/pads", [[0, 0], *pads.T, [0, 0]])
            shape = (*source.shape[:2], *(size + pads.sum(axis=0)).tolist())
            x = self._tensor(replace(source, name=f"{name}/padded", shape=shape))
            if around == 0:
                self.file.operator("PAD", [whole, rows], x, "PadOptions")
            else:
                least = self._least(source, f"{name}/around")
                self.file.operator("PADV2", [whole, rows, least], x, "PadV2Options")
        paddings = self.file.schema.Padding
        padding = paddings.SAME if pads.any() and same else paddings.VALID
        fields: dict[str, object] = {"padding": padding}
        fields["strideH"], fields["strideW"] = strides
        return x, fields

    def _pool(self, operator: Operator) -> None:
        attributes, kernel = operator.attributes, operator.attributes["kernel_shape"]
        if attributes.get("ceil_mode", 0):
            raise _unknown(operator, "ceil_mode=1")
        biggest = operator.kind == "MaxPool"
        counted = bool(attributes.get("count_include_pad", 0))
        around = -math.inf if biggest else 0.0 if counted else None
        if biggest and self._is_rectified(operator.input):
            around = 0.0
        x, fields = self._window(
            operator, kernel, [1, 1], biggest or not counted, around
        )
        fields["filterHeight"], fields["filterWidth"] = kernel
        code = "MAX_POOL_2D" if biggest else "AVERAGE_POOL_2D"
        self._emit(code, operator, [x], "Pool2DOptions", **fields)

    def _least(self, like: Tensor, name: str) -> int:
        """A number that no value of a tensor is below."""
        given = like.quantisation
        value = np.float32(np.finfo(np.float32).min) if given is None else np.int8(-128)
        return self.file.tensor(constant(name, np.array(value), given))

    def _is_rectified(self, tensor: Tensor | None) -> bool:
        """Whether no element of a tensor is negative."""
        if tensor is None or tensor.name not in self.graph.makers:
            return False
        maker = self.graph.makers[tensor.name]
        if maker.kind in ("Concat", "MaxPool"):
            return all(map(self._is_rectified, maker.inputs))
        limits = maker.limits if isinstance(maker, Limited) else limits_of(maker)
        return limits is not None and limits[0] >= 0

    def _mean(self, operator: Operator) -> None:
        rank, kept = len(operator.input.shape), operator.attributes.get("keepdims", 1)
        given = operator.attributes.get("axes", operator.constant(1))
        if operator.kind == "GlobalAveragePool":
            given = range(2, rank)
        if given is None or not len(given):
            given = range(rank)
        axes = {int(axis) % rank for axis in given}
        # Without the reduced axes an image's others would lie in another order than the graph's.
        in_order = kept or axes == {2, 3}
        order = _usual(rank) if in_order else tuple(range(rank))
        places = [place for place, axis in enumerate(order) if axis in axes]
        rows = self._integers(f"{operator.output.name}/axes", places)
        inputs = [self._tensor(operator.input, order), rows]
        self._emit("MEAN", operator, inputs, "ReducerOptions", keepDims=bool(kept))

    def _concat(self, operator: Operator) -> None:
        rank = len(operator.output.shape)
        axis = _usual(rank).index(operator.attributes["axis"] % rank)
        inputs = [
            self._rescaled(index, tensor, operator.output)
            for index, tensor in zip(
                self._operands(operator), filter(None, operator.inputs), strict=True
            )
        ]
        self._emit("CONCATENATION", operator, inputs, "ConcatenationOptions", axis=axis)

    def _rescaled(self, index: int, tensor: Tensor, to: Tensor) -> int:
        """The file's tensor with the scale of another: LiteRT joins int8 of one scale only."""
        if tensor.quantisation == to.quantisation:
            return index
        name = f"{tensor.name}/as {to.name}"
        made = replace(tensor, name=name, quantisation=to.quantisation, value=None)
        rescaled = self._tensor(made)
        self.file.operator("QUANTIZE", [index], rescaled)
        return rescaled

    def _reshape(self, operator: Operator) -> None:
        shapes = operator.input.shape, operator.output.shape
        # One pixel's channels lie the same way in both orders.
        source, to = (
            _usual(len(shape)) if shape[2:] == (1, 1) else tuple(range(len(shape)))
            for shape in shapes
        )
        sizes = [operator.output.shape[axis] for axis in to]
        rows = self._integers(f"{operator.output.name}/shape", sizes)
        inputs = [self._tensor(operator.input, source), rows]
        made = self._tensor(operator.output, to)
        self.file.operator("RESHAPE", inputs, made, "ReshapeOptions", newShape=sizes)

    def _softmax(self, operator: Operator) -> None:
        rank = len(operator.input.shape)
        if rank != 2 or operator.attributes.get("axis", -1) % rank != 1:
            raise _unknown(operator, "a softmax over another axis than the classes")
        facts = operator.output.quantisation
        if facts is None or (facts.scale, facts.zero) == ((1 / 256,), (-128,)):
            self._emit("SOFTMAX", operator, (), "SoftmaxOptions", beta=1.0)
            return
        # LiteRT's int8 one has no other scale than 1/256.
        self._in_float(
            operator,
            lambda given, made: self.file.operator(
                "SOFTMAX", [given], made, "SoftmaxOptions", beta=1.0
            ),
        )

    def _resize(self, operator: Operator) -> None:
        """Height and width only, by the three ways that LiteRT has to place a pixel."""
        attributes, source, output = (
            operator.attributes,
            operator.input,
            operator.output,
        )
        mode = attributes.get("mode", b"nearest").decode()
        place = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
        old, new = source.shape[2:], output.shape[2:]
        scales = operator.constant(2) if len(operator.inputs) > 2 else None
        if len(old) != 2 or source.shape[:2] != output.shape[:2]:
            raise _unknown(operator, "a resize of other axes than height and width")
        if scales is not None and scales.size:
            exact = [a * b for a, b in zip(old, scales[2:].tolist(), strict=True)]
            if exact != [*new]:
                raise _unknown(operator, "a scale that gives no whole number of pixels")
        if attributes.get("antialias", 0) or mode not in ("nearest", "linear"):
            raise _unknown(operator, "an antialiased or cubic resize")
        if mode == "nearest":
            rounding = attributes.get("nearest_mode", b"round_prefer_floor").decode()
            place = same_pixels(place, rounding, (*zip(old, new, strict=True),))
        if place == "pytorch_half_pixel" and min(new) > 1:
            place = "half_pixel"
        if place not in ("half_pixel", "align_corners", "asymmetric"):
            raise _unknown(
                operator, f"how the pixels of this resize ({place or mode}) are placed"
            )
        code, options = {
            "nearest": ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"),
            "linear": ("RESIZE_BILINEAR", "ResizeBilinearOptions"),
        }[mode]
        made = self._with_scale_of(source, output)
        inputs = [self._tensor(source), self._integers(f"{output.name}/size", new)]
        places = {
            "halfPixelCenters": place == "half_pixel",
            "alignCorners": place == "align_corners",
        }
        self.file.operator(code, inputs, self._tensor(made), options, **places)
        if made is not output:
            self.file.operator("QUANTIZE", [self._tensor(made)], self._tensor(output))

    def _with_scale_of(self, source: Tensor, output: Tensor) -> Tensor:
        """An output as LiteRT makes it that moves int8 values: with the scale of its input."""
        if source.quantisation == output.quantisation:
            return output
        name = f"{output.name}/as {source.name}"
        return replace(output, name=name, quantisation=source.quantisation)


def _usual(rank: int) -> tuple[int, ...]:
    """The order of axes in the file: an image's channels lie last."""
    return _CHANNELS_LAST if rank == 4 else tuple(range(rank))


def _unknown(operator: Operator, what: str) -> UserError:
    return UserError(
        f"node {operator.label!r} ({operator.kind}): the conversion to .tflite does not "
        f"know {what}; give LiteRT's file with --tflite, or leave litert out of --runtimes"
    )
