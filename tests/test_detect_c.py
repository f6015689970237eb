"""The generated C finds the same boxes as the decoder in numpy, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import CDLL
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from netship.bundle.decode import decode
from netship.bundle.task import Detector, Level, Task, Values
from netship.compile.backends.companions import Port, files
from netship.compile.backends.detector.emit import write
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

SIZE = (96, 128)
GRIDS = {8: (12, 16), 16: (6, 8), 32: (3, 4)}


def listed(rows: int, classes: int, **facts: Any) -> tuple[Detector, list[Port]]:
    level = Level(
        columns=rows,
        boxes=Values(output=0, cell=4),
        scores=Values(output=1, cell=classes),
    )
    detector = Detector(decoder="t", levels=(level,), classes=classes, **facts)
    return detector, [Port("b", (1, rows, 4)), Port("s", (1, rows, classes))]


def heads(
    anchors: int, parts: dict[str, int], **facts: Any
) -> tuple[Detector, list[Port]]:
    """An output [1, anchors × values, h, w] for each part and stride."""
    levels: list[Level] = []
    ports: list[Port] = []
    for stride, (lines, columns) in GRIDS.items():
        cells = lines * columns
        places: dict[str, Any] = {}
        for part, count in parts.items():
            places[part] = Values(
                output=len(ports), cell=1, anchor=count * cells, step=cells
            )
            ports.append(Port(f"{part}{stride}", (1, anchors * count, lines, columns)))
        sizes = tuple((stride * 1.5 + a, stride * 0.75) for a in range(anchors))
        level = Level(
            lines=lines,
            columns=columns,
            stride=(stride, stride),
            anchors=sizes,
            **places,
        )
        levels.append(level)
    classes, points = parts["scores"], parts.get("points", 0) // 2
    detector = Detector(
        decoder="t", levels=tuple(levels), classes=classes, points=points, **facts
    )
    return detector, ports


PLAIN = {"boxes": 4, "scores": 3}
KINDS: dict[str, tuple[Detector, list[Port]]] = {
    "corners": listed(3000, 2, box="corners", normalised=True, background=0),
    "one": listed(1, 1, box="centre", score_threshold=0.1),
    "centre": listed(700, 5, box="centre", normalised=True, transposed=True, per_class=False),
    "ssd": heads(3, PLAIN, box="offsets", variances=(0.1, 0.2), activation="softmax", background=0, transposed=True),
    "sigmoids": heads(2, PLAIN, box="distances", activation="sigmoid", candidates=40),
    "faces": heads(1, {"scores": 1, "objectness": 1, "boxes": 4, "points": 10}, box="offsets", product="root", most=7),
    "bins": heads(1, {"boxes": 32, "scores": 4}, box="dfl", bins=8, activation="sigmoid"),
    "negative": listed(300, 3, box="corners", score_threshold=0, iou_threshold=0, per_class=False),
    "all": listed(300, 2, box="corners", score_threshold=0, iou_threshold=1, candidates=60, most=50),
    "five": heads(3, {"boxes": 4, "objectness": 1, "scores": 4}, box="yolov5", activation="sigmoid"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CDLL]:
    folder = tmp_path_factory.mktemp("detect")
    sources = []
    for name, (detector, ports) in KINDS.items():
        write(folder, name, "test", detector, SIZE, ports)
        sources.append(folder / files(name, "detect")[1])
    detector, ports = KINDS["ssd"]
    moved = [Port(p.name, p.shape, channels_last=True) for p in ports]
    write(folder, "last", "test", detector, SIZE, moved)
    eight = [Port(p.name, p.shape, "int8", scale=0.125, zero=-3) for p in ports]
    write(folder, "eight", "test", detector, SIZE, eight)
    sources += [folder / files(name, "detect")[1] for name in ("last", "eight")]
    options = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic")
    output = folder / "detect.so"
    target = ("-target", native().linker, "-shared", "-fPIC", "-lm")
    assert run_zig("cc", output, *target, *options, "-Werror", *sources) == ""
    yield CDLL(str(output))


def found_by_c(
    library: CDLL, name: str, detector: Detector, outputs: Sequence[NDArray[Any]]
) -> NDArray[Any]:
    fields: list[Any] = [("box", "f4", 4), ("score", "f4"), ("class", "i4")]
    fields += [("points", "f4", (detector.points, 2))] if detector.points else []
    found = np.zeros(detector.most + 1, fields)
    memory = np.full(3 * min(detector.candidates, detector.rows) + 1, 7, np.int32)
    arrays = [*(np.ascontiguousarray(each) for each in outputs), found, memory]
    count = getattr(library, f"{name}_detect")(*(a.ctypes for a in arrays))
    assert memory[-1] == 7
    assert not found[-1]["score"]
    return found[:count]


def equal(
    ours: NDArray[Any], detector: Detector, outputs: Sequence[NDArray[Any]]
) -> int:
    expected = decode(Task(kind="detect", detector=detector), outputs, SIZE)
    assert ours["box"].tobytes() == expected.boxes.tobytes()
    assert ours["score"].tobytes() == expected.scores.tobytes()
    assert ours["class"].tobytes() == expected.classes.tobytes()
    if detector.points:
        assert ours["points"].tobytes() == expected.points.tobytes()
    return len(expected.scores)


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, -0.0, 0, 1, -1, 88, -87, 1e-30],
    np.float32,
)


def random_outputs(
    name: str, ports: Sequence[Port], seed: int
) -> list[NDArray[np.float32]]:
    """Shares and logits of many sizes; of the other seeds many are equal, odd, negative or too large."""
    random = np.random.default_rng(seed)
    outputs: list[NDArray[Any]] = [
        random.normal(0, 2, port.shape).astype(np.float32) for port in ports
    ]
    if name in ("corners", "centre", "one", "faces"):
        outputs = [np.abs(output) / 4 for output in outputs]
    match seed % 8:
        case 1:
            outputs = [np.rint(output * 4) / 4 for output in outputs]
        case 2:
            for output in outputs:
                odd = random.integers(output.size, size=output.size // 20 + 1)
                output.ravel()[odd] = random.choice(SPECIAL, odd.size)
        case 3:
            outputs = [output - 100 for output in outputs]
        case 4:  # All scores equal.
            outputs = [
                output if port.name.startswith("b") else np.full_like(output, 0.75)
                for port, output in zip(ports, outputs, strict=True)
            ]
        case 5:
            outputs = [random.choice(SPECIAL, port.shape) for port in ports]
        case 6:
            outputs = [output * 1e30 for output in outputs]
        case 7:
            outputs = [np.full_like(x, random.choice(SPECIAL)) for x in outputs]
    with np.errstate(over="ignore"):
        return [output.astype(np.float32) for output in outputs]


@pytest.mark.parametrize("name", KINDS)
def test_c_and_numpy_find_the_same(library: CDLL, name: str) -> None:
    detector, ports = KINDS[name]
    counts = []
    for seed in range(24):
        outputs = random_outputs(name, ports, seed)
        ours = found_by_c(library, name, detector, outputs)
        counts.append(equal(ours, detector, outputs))
    assert max(counts) >= min(5, detector.rows)
    assert min(counts) == 0


def test_of_0_and_minus_0_both_take_the_first(library: CDLL) -> None:
    detector, ports = KINDS["negative"]
    outputs = [np.full(port.shape, -1, np.float32) for port in ports]
    for row, scores in enumerate(((0.0, -0.0), (-0.0, 0.0))):
        outputs[0][0, row] = (9 * row, 0, 9 * row + 5, 5)
        outputs[1][0, row, :2] = scores
    ours = found_by_c(library, "negative", detector, outputs)
    assert equal(ours, detector, outputs) == 2
    assert np.signbit(ours["score"]).tolist() == [False, True]


def test_c_reads_the_order_and_the_integers_of_a_microcontroller(library: CDLL) -> None:
    detector, ports = KINDS["ssd"]
    outputs = random_outputs("ssd", ports, 1)
    last = [output.transpose(0, 2, 3, 1) for output in outputs]
    assert equal(found_by_c(library, "last", detector, last), detector, outputs)
    stored = [np.clip(np.rint(x * 8) - 3, -128, 127).astype(np.int8) for x in outputs]
    real = [(x.astype(np.float32) + 3) * np.float32(0.125) for x in stored]
    assert equal(found_by_c(library, "eight", detector, stored), detector, real)


def test_c_refuses_a_missing_pointer(library: CDLL) -> None:
    memory = np.zeros(64, np.int32)
    assert library.one_detect(memory.ctypes, None, memory.ctypes, memory.ctypes) == -1
    assert library.one_detect(memory.ctypes, memory.ctypes, None, memory.ctypes) == -1
