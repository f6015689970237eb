"""SSDLite and DeepLabv3 on MobileNetV2 (arXiv 1801.04381, 6.2 and 6.3) as ONNX graphs with seeded weights."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Preprocessing
from netship.compile.frontend import family
from netship.compile.frontend.family import Graph, Signal, divisible
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

# COCO's classes and the background; PASCAL VOC's classes and the background.
SSDLITE_CLASSES, DEEPLABV3_CLASSES = 81, 21
#: Convolutions of this suffix have a bias of their own; all others have batch normalisation.
PREDICTION = ".predict"

FORMS = (
    "mobilenetv2-WIDTH-RESOLUTION",
    "ssdlite-mobilenetv2-WIDTH-RESOLUTION",
    "deeplabv3-mobilenetv2-WIDTH-RESOLUTION or the same with -os8",
)
# Paper, 6.2: the first map is the expansion of layer 15 (the stem is layer 1), the second the last layer.
# TensorFlow's object_detection, models/ssd_mobilenet_v2_feature_extractor.py: the channels of the four
# others; samples/configs/ssdlite_mobilenet_v2_coco.config: scales and aspect ratios of the anchors.
_FIRST_MAP = 15 - 2
_EXTRA_CHANNELS = (512, 256, 256, 128)
_SCALES = (0.2, 0.95)
_RATIOS = (1.0, 2.0, 0.5, 3.0, 0.3333)
# DeepLab's model.py: channels of each branch of the head.
_HEAD_CHANNELS = 256


class Network(NamedTuple):
    """A built-in network by its name.

    Attributes:
        head: empty for the classifier.
        output_stride: of the last map, pixels of the input for each of its own.
    """

    head: str
    width: float
    resolution: int
    output_stride: int

    @property
    def name(self) -> str:
        head = f"{self.head}-" if self.head else ""
        stride = "-os8" if self.output_stride == 8 else ""
        return head + family.network_name(self.width, self.resolution) + stride

    def build(self) -> onnx.ModelProto:
        if self.head == "ssdlite":
            return ssdlite(self.width, self.resolution)
        if self.head == "deeplabv3":
            return deeplabv3(self.width, self.resolution, self.output_stride)
        return family.build(self.width, self.resolution)

    def preprocessing(self) -> Preprocessing:
        """The family's; detection and segmentation see the whole short side of the photograph."""
        own = family.preprocessing(self.resolution)
        return own.model_copy(update={"resize": self.resolution}) if self.head else own


def parse(name: str) -> Network:
    """The built-in network of that name.

    Raises:
        UserError: the name has another form, or a number is out of range.
    """
    match = re.fullmatch(r"(?:(ssdlite|deeplabv3)-)?(.*?)(-os8)?", name[:80], re.DOTALL)
    assert match
    head, rest, stride = match[1] or "", match[2], match[3]
    if (stride and head != "deeplabv3") or not rest.startswith("mobilenetv2-"):
        raise UserError(
            f"network {name[:80]!r}: is none of {', '.join(FORMS)}; "
            f"write for example {head or 'deeplabv3'}-mobilenetv2-1.0-320"
        )
    width, resolution = family.parse_name(rest)
    return Network(
        head, width, resolution, 8 if stride else 16 if head == "deeplabv3" else 32
    )


def ssdlite(
    width: float, resolution: int, classes: int = SSDLITE_CLASSES
) -> onnx.ModelProto:
    """The detector without its decoding: the same bytes for the same arguments.

    ``input`` is as the classifier's. ``boxes`` is float32 [1, anchors, 4]: the offsets ty, tx, th, tw of
    each anchor. ``scores`` is float32 [1, anchors, classes]: logits, the background first.
    """
    family.check_range(width, resolution)
    graph = Graph()
    *expanded, x = family.backbone(graph, width, resolution)
    x = graph.convolution("head", x, family.head_channels(width))
    maps = [expanded[_FIRST_MAP], x]
    for index, unscaled in enumerate(_EXTRA_CHANNELS, 3):
        channels = divisible(unscaled * width)
        x = graph.convolution(
            f"extra{index}.reduce", x, divisible(unscaled * width / 2)
        )
        x = graph.depthwise(f"extra{index}.depthwise", x, stride=2)
        x = graph.convolution(f"extra{index}.expand", x, channels)
        maps.append(x)
    specifications = box_specifications(len(maps))
    anchors = sum(
        x.size**2 * len(boxes) for x, boxes in zip(maps, specifications, strict=True)
    )
    outputs = {"boxes": (1, anchors, 4), "scores": (1, anchors, classes)}
    for output, (_, _, values) in outputs.items():
        graph.constant(f"{output}.shape", np.array([1, -1, values]))
        rows = [
            _predictions(graph, f"map{index}.{output}", x, len(boxes) * values, output)
            for index, (x, boxes) in enumerate(
                zip(maps, specifications, strict=True), 1
            )
        ]
        graph.node("Concat", output, rows, output, axis=1)
    return graph.finish(outputs, resolution)


def _predictions(graph: Graph, name: str, x: Signal, channels: int, output: str) -> str:
    """A separable convolution of a map, as rows of the output: [1, anchors of the map, values]."""
    x = graph.depthwise(f"{name}.depthwise", x)
    x = graph.convolution(name + PREDICTION, x, channels, linear=True)
    last = graph.node("Transpose", f"{name}.transpose", [x.name], perm=[0, 2, 3, 1])
    return graph.node("Reshape", f"{name}.rows", [last, f"{output}.shape"])


def box_specifications(maps: int) -> list[list[tuple[float, float]]]:
    """Scale, of the input's side, and aspect ratio of each anchor of a cell, for every map of TensorFlow's SSD."""
    low, high = _SCALES
    scales = [low + (high - low) * i / (maps - 1) for i in range(maps)] + [1.0]
    cells = [
        [(scale, ratio) for ratio in _RATIOS] + [(math.sqrt(scale * larger), 1.0)]
        for scale, larger in pairwise(scales)
    ]
    # Three, not six, on the first map: Table 6's 4.3 M parameters need it too.
    return [[(0.1, 1.0), (low, 2.0), (low, 0.5)], *cells[1:]]


def anchors(resolution: int) -> NDArray[np.float32]:
    """The anchors of ``ssdlite``'s rows, float32 [anchors, 4]: centre y, centre x, height, width.

    All are fractions of the input's side. TensorFlow's box coder gives a box of centre
    ``cy + ty / 10 · h``, ``cx + tx / 10 · w`` and size ``h · exp(th / 5)``, ``w · exp(tw / 5)``.
    """
    first = math.ceil(resolution / 16)
    boxes = []
    for index, cell in enumerate(box_specifications(2 + len(_EXTRA_CHANNELS))):
        side = math.ceil(first / 2**index)
        centres = (np.arange(side) + 0.5) / side
        sizes = np.array(
            [
                (scale / math.sqrt(ratio), scale * math.sqrt(ratio))
                for scale, ratio in cell
            ]
        )
        grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1)
        shape = (side, side, len(cell), 2)
        centre = np.broadcast_to(grid[:, :, np.newaxis], shape)
        size = np.broadcast_to(sizes, shape)
        boxes.append(np.concatenate([centre, size], -1).reshape(-1, 4))
    return np.concatenate(boxes).astype(np.float32)


def deeplabv3(
    width: float,
    resolution: int,
    output_stride: int = 16,
    classes: int = DEEPLABV3_CLASSES,
) -> onnx.ModelProto:
    """The segmentation network without ASPP: the same bytes for the same arguments.

    The head is on the second last map (320 channels × width): a 1×1 convolution, the pooled image, and a
    projection of both. ``input`` is as the classifier's; ``logits`` is float32
    [1, classes, resolution, resolution], resized bilinearly from the last map.
    """
    family.check_range(width, resolution)
    graph = Graph()
    x = family.backbone(graph, width, resolution, output_stride)[-1]
    pooled = graph.node("GlobalAveragePool", "pool", [x.name])
    whole = Signal(pooled, x.channels, 1, x.mean, x.variance)
    image = graph.convolution("image", whole, _HEAD_CHANNELS)
    shape = graph.constant("image.shape", np.array([1, 1, x.size, x.size]))
    spread = graph.node("Expand", "image.expand", [image.name, shape])
    local = graph.convolution("local", x, _HEAD_CHANNELS)
    both = graph.node("Concat", "both", [spread, local.name], axis=1)
    y = Signal(both, 2 * _HEAD_CHANNELS, x.size, local.mean, local.variance)
    y = graph.convolution("projection", y, _HEAD_CHANNELS)
    y = graph.convolution("logits" + PREDICTION, y, classes, linear=True)
    output = (1, classes, resolution, resolution)
    sizes = graph.constant("logits.sizes", np.array(output))
    graph.node(
        "Resize",
        "resize",
        [y.name, "", "", sizes],
        "logits",
        mode="linear",
        coordinate_transformation_mode="align_corners",
    )
    return graph.finish({"logits": output}, resolution)
