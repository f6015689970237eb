"""Files of users that are hostile or broken: each is refused in one line, soon, and without much memory."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_detectors import LISTED, network

from netship.bundle import inputs
from netship.bundle.manifest import Tensor
from netship.bundle.task import Detector, Task
from netship.compile.frontend.detectors import resolve_task
from netship.compile.frontend.preprocessing import load_sidecar, read_labels
from netship.runtime_demo import coco, known_classes, result_files
from netship.targets.errors import UserError
from netship.targets.files import read_text

READERS: dict[str, Callable[[Path], object]] = {
    "decode": lambda path: resolve_task("detect", str(path), network(*LISTED)),
    "labels": lambda path: read_labels(path, [Tensor(name="y", shape=(1, 4))]),
    "boxes": lambda path: coco.read(path, ["x"], 1),
    "classes": lambda path: known_classes.find([path], [], path, [], 4),
    "results": result_files.read,
    "archive": lambda path: inputs.read(path, [Tensor(name="a", shape=(4,))], None),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_and_an_endless_file_are_refused(tmp_path: Path, reader: str) -> None:
    pipe, large = tmp_path / "pipe.npz", tmp_path / "large.npz"
    os.mkfifo(pipe)
    large.touch()
    os.truncate(large, 1 << 40)
    for path in (pipe, large):
        with pytest.raises(UserError, match=path.name):
            READERS[reader](path)


def test_a_text_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_text(path) == "a\r\n"
    with pytest.raises(OSError, match="zero byte"):
        read_text(Path("a\0b"))


PARTS = ("boxes", "scores", "points")
TEXT = 'box = "corners"\nboxes = "boxes"\nscores = "scores"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + "strides = [5e-324]", "strides"),
        (TEXT + f"strides = [{'8,' * 1000}]", "strides"),
        (TEXT + f"strides = [{'8,' * 1_000_000}]", "has more than 1 MiB"),
        (TEXT + "bins = inf", "bins"),
        (TEXT + "bins = []", "bins"),
        (TEXT + "grids = 5", "there is no key 'grids'"),
        (TEXT + "levels = []", "there is no key 'levels'"),
        ("a = " + "[" * 100_000, "not TOML"),
    ],
)
def test_a_hostile_decoding_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "d.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        READERS["decode"](path)


def test_a_decoding_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"d\xff.toml")
    path.write_text(TEXT)
    task, _ = resolve_task("detect", str(path), network(*LISTED))
    assert task and task.model_dump_json()


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "#" * (2 << 20)])
def test_a_hostile_sidecar_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(UserError, match=r"m\.toml"):
        load_sidecar(tmp_path / "m.onnx")


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(values))
    return file.getvalue()


def test_a_huge_header_of_an_array_takes_no_memory(tmp_path: Path) -> None:
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30)
    plain, packed = tmp_path / "a.npy", tmp_path / "a.npz"
    plain.write_bytes(head)
    os.truncate(plain, 1 << 30)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", head + b" " * (32 << 20))
    tracemalloc.start()
    for path in (plain, packed):
        with pytest.raises(UserError, match="not a .npy file of numbers"):
            READERS["archive"](path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for value in (0, 1):
            archive.writestr("a.npy", array(np.full(4, value, np.float32)))
    with pytest.raises(UserError, match="two of its arrays have one name"):
        READERS["archive"](path)


def test_a_boolean_is_0_or_1(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(array([True, False])[:-2] + b"\x01\x07")
    with pytest.raises(UserError, match="has other values than 0 and 1"):
        inputs.read(path, [Tensor(name="a", shape=(2,), dtype="bool")], None)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("images", {"id": 1, "file_name": "b"}, "two images have one id"),
        (
            "categories",
            {"id": 1, "name": "y"},
            r"categories\[1\] \(id 1\): another one has this id",
        ),
        ("categories", {"id": 2, "name": "X "}, "two categories have one name"),
        (
            "annotations",
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": "0"},
            "iscrowd is 0, not 0 or 1",
        ),
    ],
)
def test_ambiguous_labels_of_boxes_are_refused(
    tmp_path: Path, key: str, change: dict[str, object], words: str
) -> None:
    labels: dict[str, list[dict[str, object]]] = {
        "images": [{"id": 1, "file_name": "a"}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [],
    }
    labels[key].append(change)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels))
    with pytest.raises(UserError, match=words):
        READERS["boxes"](path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labelled": 1, "labelled_right": 10**400}, "labelled"),
        ({"labelled": 5, "labelled_right": 6}, "labelled_right is more than labelled"),
        ({"labelled": 10**400}, "labelled"),
        ({"threads": -1}, "threads"),
        ({"cosine": 1e300}, "cosine"),
    ],
)
def test_impossible_results_are_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    result = {
        "bundle": "b",
        "target": "t",
        "device": "emulated",
        "images": 5,
        "compared": "images",
        "threads": 1,
        "passed": True,
        "cosine": 1,
        "max_abs_error": 0,
        "relative_error": 0,
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert result_files.read(path)
    path.write_text(json.dumps(result | change))
    with pytest.raises(UserError, match=words):
        result_files.read(path)


@pytest.mark.parametrize("values", [[0, 5], [-6, 4], [10**12, 0]])
def test_an_index_beyond_the_table_is_refused(
    tmp_path: Path, values: list[int]
) -> None:
    """ONNX Runtime refuses it; ours takes another row."""
    path = tmp_path / "i.npy"
    tensor = Tensor(name="i", shape=(2,), dtype="int64", choices=5)
    path.write_bytes(array(np.array([-5, 4])))
    assert inputs.read(path, [tensor], None).tensors[0].tolist() == [-5, 4]
    path.write_bytes(array(np.array(values)))
    with pytest.raises(UserError, match="has the index .*, the input takes 0 to 4"):
        inputs.read(path, [tensor], None)


@pytest.mark.parametrize(
    ("box", "classes", "points"),
    [("corners", 1 << 16, 0), ("dfl", 1, 0), ("corners", 1, 256)],
)
def test_a_detector_reads_no_value_twice(box: str, classes: int, points: int) -> None:
    """Else a small manifest would ask for any memory."""
    place = {"output": 0, "cell": 0, "step": 0}
    level = {"columns": 1 << 10, "lines": 1 << 10, **dict.fromkeys(PARTS, place)}
    detector = Detector.model_validate(
        {"decoder": "", "levels": [level], "box": box, "classes": classes}
        | {"points": points}
    )
    with pytest.raises(ValueError, match="read twice of output 0"):
        Task(kind="detect", detector=detector).check([(1, 1 << 20)])
