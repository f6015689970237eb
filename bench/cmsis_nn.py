"""MLPerf Tiny's networks as calls of CMSIS-NN, as C projects that the meter can count.

Only this file's text is ours: CMSIS-NN is read from a checkout of its user's. Weights are not the networks' (which are
not needed: no instruction of these kernels but a softmax's depends on them), shapes and calls are. An interpreter such
as TFLite Micro is left out.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from netship.bundle.manifest import Firmware, FirmwareTensor
from netship.targets.errors import UserError

# v4.1.0 of May 2023: round 1.1 of MLPerf Tiny was published in June 2023.
COMMIT = "61d1bb6c4428ad730e525d0164e12df12b789985"
# Its warnings are not ours to act on. Everything is one file here: without the last two it would be compiled as no
# project's files one by one are.
FLAGS = ("-w", "-fno-inline-functions", "-fno-ipa-cp")
_NAME = "cmsis"
_SOURCES = (
    "BasicMathFunctions/arm_elementwise_add_s8.c",
    "ConvolutionFunctions/arm_convolve_*s8*.c",
    "ConvolutionFunctions/arm_depthwise_conv_*s8*.c",
    "ConvolutionFunctions/arm_nn_depthwise_conv_s8_core.c",
    "ConvolutionFunctions/arm_nn_mat_mult_kernel_s8_s16.c",
    "ConvolutionFunctions/arm_nn_mat_mult_s8.c",
    "FullyConnectedFunctions/arm_fully_connected_*s8*.c",
    "NNSupportFunctions/arm_nn_[dmv]*_s8*.c",
    "NNSupportFunctions/arm_q7_to_q15_*.c",
    "NNSupportFunctions/arm_s8_to_s16_unordered_with_offset.c",
    "PoolingFunctions/arm_avgpool*_s8*.c",
    "SoftmaxFunctions/arm_softmax_s8.c",
    "SoftmaxFunctions/arm_nn_softmax_common_s8.c",
)


class Layer(NamedTuple):
    """One call: its function, the shapes [height, width, channels] it goes from and to, kernel and stride.

    Attributes:
        other: an addition's second operand is the tensor of this name; a convolution reads it in place of the last one.
        keep: the name under which the output is kept.
    """

    call: str
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    other: str = ""
    keep: str = ""

    @property
    def weights(self) -> int:
        """Bytes of weights and biases."""
        inputs = {
            "convolve": self.before[2],
            "fully_connected": _size(self.before),
            "depthwise_conv": 1,
        }
        each = inputs.get(self.call, 0) * self.kernel[0] * self.kernel[1]
        return self.after[2] * (each + 4) if each else 0

    @property
    def macs(self) -> int:
        each = self.weights // self.after[2] - 4 if self.weights else 0
        return each * _size(self.after)

    @property
    def padding(self) -> tuple[int, int]:
        """Before the first row and column, of "same" padding."""
        if self.call == "avgpool":
            return 0, 0
        totals = (
            max(0, (out - 1) * stride + kernel - size)
            for size, out, kernel, stride in zip(
                self.before, self.after, self.kernel, self.stride, strict=False
            )
        )
        first, second = (total // 2 for total in totals)
        return first, second


def _size(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


def _chain(
    start: tuple[int, int, int],
    *rows: tuple[str, int, tuple[int, int], tuple[int, int]],
) -> list[Layer]:
    """Layers one after the other: function, channels after it, kernel, stride."""
    shape, layers = start, []
    for call, channels, kernel, stride in rows:
        size = (
            (1, 1)
            if call in ("avgpool", "fully_connected", "softmax")
            else tuple(
                -(-length // step) for length, step in zip(shape, stride, strict=False)
            )
        )
        after = (size[0], size[1], channels)
        layers.append(Layer(call, shape, after, kernel, stride))
        shape = after
    return layers


def _mobilenet() -> list[Layer]:
    rows = [("convolve", 8, (3, 3), (2, 2))]
    channels = 8
    for after, stride in (
        (16, 1),
        (32, 2),
        (32, 1),
        (64, 2),
        (64, 1),
        (128, 2),
        *[(128, 1)] * 5,
        (256, 2),
        (256, 1),
    ):
        rows += [
            ("depthwise_conv", channels, (3, 3), (stride, stride)),
            ("convolve", after, (1, 1), (1, 1)),
        ]
        channels = after
    ends = [
        ("avgpool", 256, (3, 3), (3, 3)),
        ("fully_connected", 2, (1, 1), (1, 1)),
        ("softmax", 2, (1, 1), (1, 1)),
    ]
    return _chain((96, 96, 3), *rows, *ends)


def _dscnn() -> list[Layer]:
    pairs = [
        ("depthwise_conv", 64, (3, 3), (1, 1)),
        ("convolve", 64, (1, 1), (1, 1)),
    ] * 4
    ends = [
        ("avgpool", 64, (25, 5), (25, 5)),
        ("fully_connected", 12, (1, 1), (1, 1)),
        ("softmax", 12, (1, 1), (1, 1)),
    ]
    return _chain((49, 10, 1), ("convolve", 64, (10, 4), (2, 2)), *pairs, *ends)


def _resnet() -> list[Layer]:
    layers = [Layer("convolve", (32, 32, 3), (32, 32, 16), (3, 3), keep="block")]
    side, channels = 32, 16
    for after, stride in ((16, 1), (32, 2), (64, 2)):
        before, result = (side, side, channels), (side // stride, side // stride, after)
        layers.append(Layer("convolve", before, result, (3, 3), (stride, stride)))
        layers.append(Layer("convolve", result, result, (3, 3), keep="branch"))
        if stride > 1:
            layers.append(
                Layer(
                    "convolve", before, result, (1, 1), (stride, stride), other="block"
                )
            )
        layers.append(
            Layer(
                "elementwise_add",
                result,
                result,
                other="branch" if stride > 1 else "block",
                keep="block",
            )
        )
        side, channels = side // stride, after
    return layers + _chain(
        (8, 8, 64),
        ("avgpool", 64, (8, 8), (8, 8)),
        ("fully_connected", 10, (1, 1), (1, 1)),
        ("softmax", 10, (1, 1), (1, 1)),
    )


def _autoencoder() -> list[Layer]:
    sizes = (128, 128, 128, 128, 8, 128, 128, 128, 128, 640)
    return _chain(
        (1, 1, 640), *(("fully_connected", size, (1, 1), (1, 1)) for size in sizes)
    )


NETWORKS = {"vww": _mobilenet(), "ic": _resnet(), "kws": _dscnn(), "ad": _autoencoder()}


def interface(layers: list[Layer], cpu: str) -> Firmware:
    """What the harness must know of the project."""
    first, last = _size(layers[0].before), _size(layers[-1].after)
    return Firmware(
        cpu=cpu,
        inputs=(FirmwareTensor(dtype="int8", nbytes=first),),
        outputs=(FirmwareTensor(dtype="int8", nbytes=last),),
        exact=True,
        arena_bytes=-(-first // 8) * 8,
        input_offsets=(0,),
        peak="",
        steps=len(layers),
        weights_bytes=sum(layer.weights for layer in layers),
    )


def write_project(layers: list[Layer], checkout: Path, folder: Path) -> str:
    """Write the C project into ``folder``; returns its name.

    Raises:
        UserError: the checkout is not CMSIS-NN at `COMMIT`.
    """
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise UserError(
            "no git, which tells the commit of CMSIS-NN; install it"
        ) from None
    if found.stdout.strip() != COMMIT or not (checkout / "Source").is_dir():
        raise UserError(
            f"--cmsis-nn {checkout}: is no checkout of CMSIS-NN at {COMMIT[:12]}; clone "
            "github.com/ARM-software/CMSIS-NN, then git checkout v4.1.0"
        )
    sources = sorted(
        {
            path
            for pattern in _SOURCES
            for path in (checkout / "Source").glob(pattern)
            if "s16.c" not in path.name or "s8_s16" in path.name
        }
    )
    driver = Path(__file__).with_name("cmsis_nn.c").read_text()
    (folder / f"{_NAME}.c").write_text(
        "\n".join(
            [
                *(f'#include "{path}"' for path in sources),
                f"#define BIGGEST {max(max(_size(e.before), _size(e.after)) for e in layers)}",
                driver,
                "int cmsis_run(const int8_t *input, int8_t *output, void *arena) {",
                "  (void)arena;",
                *_calls(layers),
                f"  NN_STEP({len(layers)});",
                f"  memcpy(output, last, {_size(layers[-1].after)});",
                "  return 0;",
                "}",
                "",
            ]
        )
    )
    (folder / f"{_NAME}.h").write_text(
        "#include <stdint.h>\nint cmsis_run(const int8_t *input, int8_t *output, void *arena);\n"
        "int cmsis_self_test(int8_t *output, void *arena);\n"
    )
    (folder / f"{_NAME}_weights.c").write_text(
        f"#include <stdint.h>\nextern const int8_t cmsis_weights[];\n"
        f"_Alignas(16) const int8_t cmsis_weights[{sum(layer.weights for layer in layers)}] = {{1, 2, 3}};\n"
    )
    return _NAME


def _calls(layers: list[Layer]) -> Iterator[str]:
    """The body: each layer writes a tensor that no later layer needs."""
    yield "  const int8_t *last = input;"
    kept: dict[str, int] = {}
    at, weights = -1, 0
    for number, layer in enumerate(layers):
        source = (
            f"tensors[{kept[layer.other]}]"
            if layer.other and layer.call == "convolve"
            else "last"
        )
        to = next(i for i in range(4) if i != at and i not in kept.values())
        other = f"tensors[{kept[layer.other]}]" if layer.other else "0"
        numbers = ", ".join(
            map(
                str,
                (
                    *layer.before,
                    *layer.after,
                    *layer.kernel,
                    *layer.stride,
                    *layer.padding,
                    weights,
                ),
            )
        )
        yield f"  NN_STEP({number});"
        yield f"  {layer.call}(&(const struct layer){{{numbers}}}, {source}, {other}, tensors[{to}]);"
        yield f"  last = tensors[{to}];"
        at = to
        weights += layer.weights
        if layer.keep:
            kept[layer.keep] = to
