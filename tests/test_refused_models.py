"""A model that cannot be built is refused: exit code 2, one line, nothing left behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from refusals import BUILD, VALID, Place, expect, spoilt


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def weights_with(value: float) -> bytes:
    def change(graph: Any) -> None:
        array = numpy_helper.to_array(graph.initializer[0]).copy()
        array[0, 0, 0, 0] = value
        graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "weights"))

    return spoilt(change)


def external(location: str, offset: int = 0) -> bytes:
    """The model with its weights (432 bytes) in another file."""

    def change(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", location),
            ("offset", offset),
            ("length", 432),
        ):
            tensor.external_data.add(key=key, value=str(value))

    return spoilt(change)


def second_input(graph: Any) -> None:
    graph.input.add().CopyFrom(
        helper.make_tensor_value_info("more", TensorProto.INT16, [1, 4])
    )
    graph.node.append(helper.make_node("Add", ["scores", "more"], ["sum"], "adding"))
    graph.output[0].name = "sum"


def rename_input(graph: Any) -> None:
    graph.input[0].name = graph.node[0].input[0] = "an\x1b[31m image\n"


def cycle(graph: Any) -> None:
    graph.node[0].input[0] = "mean"


def operator(name: str, domain: str = "", called: str = "odd") -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph.node[1].CopyFrom(
            helper.make_node(name, ["map"], ["mean"], called, domain=domain)
        )

    return change


RANDOM = np.random.Generator(np.random.PCG64(11)).bytes(4096)
MODELS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty|copy the model again"),
    "truncated": (VALID[: len(VALID) // 2], "cut short|copy it again"),
    "random bytes": (RANDOM, "not an ONNX model|export or copy it again"),
    "text": (b"This is a text about models.\n", "not an ONNX model|export"),
    "no nodes": (spoilt(lambda g: g.ClearField("node")), "no nodes|export a network"),
    "a control character in an input's name": (
        spoilt(rename_input),
        "has a control character in its name|give it another name",
    ),
    "cycle": (spoilt(cycle), "cycle|'convolution'|export"),
    "unknown operator": (spoilt(operator("Frobnicate")), "'odd' (Frobnicate)|export"),
    "operator of a foreign domain": (
        spoilt(operator("FusedConv", "com.microsoft")),
        "'odd' (FusedConv)|'com.microsoft'|export without",
    ),
    "operator whose name is two lines": (
        spoilt(operator("Frobnicate", called="x\ny\x1b[31m")),
        "Frobnicate|export",
    ),
    "dynamic channel count": (
        spoilt(lambda g: None, shape=("batch", "channels", 16, 16)),
        "'image'|channels|--input-shape image:1,3,224,224",
    ),
    "wrong rank": (
        spoilt(lambda g: None, shape=(1, 3, 4, 4, 1)),
        "'image'|rank 5|need 1 to 4",
    ),
    "batch of two": (
        spoilt(lambda g: None, shape=(2, 3, 16, 16)),
        "'image'|batch 2|export with batch 1",
    ),
    "a second input of another type": (
        spoilt(second_input),
        "input 'more' is int16|need float32",
    ),
    "opset 5": (
        spoilt(lambda g: None, opset=5),
        "opset 5|7 to 28|opset_version=17",
    ),
    "opset 99": (
        spoilt(lambda g: None, opset=99),
        "opset 99|7 to 28|opset_version=17",
    ),
    "NaN in the weights": (weights_with(np.nan), "'weights'|NaN|export it again"),
    "infinite weights": (weights_with(np.inf), "'weights'|infinite|export it again"),
    "integers of 16 bits": (
        spoilt(lambda g: None, dtype=TensorProto.INT16),
        "int16|need float32",
    ),
    "complex numbers": (
        spoilt(lambda g: None, dtype=TensorProto.COMPLEX64),
        "complex64|need float32",
    ),
    "external data at an absolute path": (
        external("/etc/hostname"),
        "'weights'|'/etc/hostname'|beside the model",
    ),
    "external data above the folder": (
        external("../outside.bin"),
        "'../outside.bin'|beside the model",
    ),
    "external data by a link": (
        external("link.bin"),
        "'link.bin'|is a link|put the file itself",
    ),
    "external data beyond the end": (
        external("short.bin"),
        "'weights'|to 432|beyond the file's 100 bytes|copy or export",
    ),
    "external data before the beginning": (external("short.bin", -8), "'weights'|-8"),
    "external data missing": (external("gone.bin"), "'gone.bin'|No such file|check"),
}


@pytest.mark.parametrize("case", MODELS)
def test_refuses_a_model(place: Place, case: str) -> None:
    data, words = MODELS[case]
    (place.here / "model.onnx").write_bytes(data)
    (place.here / "short.bin").write_bytes(bytes(100))
    (place.here.parent / "outside.bin").write_bytes(bytes(432))
    (place.here / "link.bin").symlink_to(place.here.parent / "outside.bin")
    expect(place.refused(BUILD, "--model", "model.onnx"), "model.onnx|" + words)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere.onnx", "nowhere.onnx|No such file|check the path"),
        ("resnet50", "resnet50: no such file or network|ssdlite-m|mobilenetv2-12;"),
        ("mobilenetv2-1.0", "networks by name: mobilenetv2-WIDTH-RESOLUTION"),
        (".", "not a regular file|give an .onnx file"),
        ("", "not a regular file|give an .onnx file"),
        ("pipe.onnx", "pipe.onnx|not a regular file|give an .onnx file"),
        ("huge.onnx", "huge.onnx|3221225472 bytes|up to 1 GiB"),
        ("mobilenetv2-1.0-x", "mobilenetv2-1.0-x"),
        ("mobilenetv2-9.9-224", "width 9.9|choose 0.1 to 4.0"),
    ],
    ids=lambda value: None if "|" in value else value,
)
def test_refuses_what_is_no_model_file(place: Place, model: str, words: str) -> None:
    os.mkfifo(place.here / "pipe.onnx")
    with (place.here / "huge.onnx").open("wb") as file:
        file.truncate(3 << 30)
    expect(place.refused(BUILD, "--model", model), words)


def test_refuses_an_operator_that_the_importer_does_not_know(place: Place) -> None:
    """Found in the engine's own process, and as short all the same."""

    def change(graph: Any) -> None:
        graph.node.append(helper.make_node("Hardmax", ["scores"], ["best"], "odd"))
        graph.output[0].name = "best"

    (place.here / "model.onnx").write_bytes(spoilt(change))
    line = place.refused(BUILD, "--model", "model.onnx")
    expect(line, "'odd' (Hardmax)|replace it before exporting")


def test_there_are_many_cases_and_each_expects_words_of_its_own() -> None:
    """A case whose words any error has would test nothing."""
    assert len(MODELS) >= 25
    for _, words in MODELS.values():
        assert re.sub(r"[^a-z]", "", words.lower())
