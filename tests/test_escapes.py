"""Names of models, layers, files and labels, as hostile as they come: no generated text and no terminal obeys them."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import graphs
import numpy as np
import onnx
import pytest
from conftest import ROOT, run
from integers import Floats, graph_of, residuals, tensors
from jinja2 import DictLoader
from markdown_it import MarkdownIt
from PIL import Image
from tiny import tiny_bundle

from netship.bundle.store import MANIFEST, open_bundle
from netship.compile.backends.c.build import build as build_c
from netship.compile.backends.c.drawing import geometry
from netship.compile.backends.standalone import emit
from netship.compile.backends.standalone.emit import Answer, Standalone
from netship.compile.program.planner import Buffer, Plan
from netship.compile.program.program import Call, Program, Tensor
from netship.targets import escapes, templates
from netship.targets.presets import native, resolve
from netship.targets.progress import Progress
from netship.targets.toolchain import zig_path

HOSTILE = {
    "quotes": "a\"'b",
    "docstring": '"""\nimport os\nos.mkdir("made")\n"""',
    "backslash": 'a\\\\\\" \\N{x} \\x \\',
    "comment": "*/ int injected = 1; /* **//**/ // ??/",
    "shell": "$(shell touch made) $(touch made) `touch made` ${made} %made; made",
    "xml": "]]> <script>alert(1)</script> <!-- &amp; <img src=x onerror=y>",
    "markdown": "a | b |\n\n# head *x* **y** [z](http://a.example) `c` ![i](j) ~~k~~ <http://a>",
    "control": "\x00\x1b[31m\x07\b\r\nred\x7f\x9b\u2028",
    "bidi": "a\u202e/* cba\u2066 \u200f\ufeff",
    "jinja": "{{ 7 * 7 }}{% raw %}",
    "surrogate": "a\udcff\udcfe",
    "long": "x" * 5000,
}
ORDINARY = "mobilenetv2-0.35-96.onnx /features/features.0/conv_1/Conv;Relu6:0 (été)"


@pytest.mark.parametrize("name", [*HOSTILE, "ordinary"])
def test_no_filter_lets_a_control_character_through(name: str) -> None:
    text = HOSTILE.get(name, ORDINARY)
    for function in escapes.FILTERS.values():
        if function is not escapes.code:
            assert function(text).isprintable()
            if name == "ordinary" and function is not escapes.c_string:
                assert function(text) == text
    assert escapes.shown(text, 10_000).isprintable()
    assert len(escapes.shown(text)) <= 80
    assert escapes.lines(f"{text}\n{text}").replace("\n", "").isprintable()
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200f\u202e\u2066]",
        escapes.without_controls(text),
    )


def test_a_template_must_choose_a_filter() -> None:
    environment = templates.code_environment(ROOT)

    def render(source: str, **values: object) -> str:
        environment.loader = DictLoader({"t": source})
        return environment.get_template("t").render(values)

    assert (
        render("{{ a }} {{ b }} {{ c|c_comment }}", a="conv_1", b=2.5, c="x y")
        == "conv_1 2.5 x y"
    )
    for text in ("a b", "a/b", 'a"', "a\n", "$(a)", "é", ["a b"]):
        with pytest.raises(TypeError, match="without a filter"):
            render("{{ a }}", a=text)


# A standalone library


def program(layer: str) -> Program:
    tensors = (
        Tensor("input", (1, 4), "float32"),
        Tensor("weights", (4,), "float32", bytes(16)),
        Tensor(layer, (1, 4), "float32"),
    )
    call = Call("kernel", layer, ("nn.conv2d", layer), (0, 1), (2,))
    return Program(tensors, (call,), (0,), (2, 2), {}, 0, 0)


def library(folder: Path, text: str) -> dict[str, str]:
    """The texts of a library in which ``text`` is the model's name and a layer's."""
    version = f"small: {text} (SHA-256 0123) for x"
    answers = (Answer(text, (0.0, 1.0, 2.0, 3.0), (0.0,) * 4),) * 2
    wanted = Standalone("small", text, version, ((-1.0, 1.0),), answers)
    made = program(text)
    layout = emit._lay_out(made)
    values = emit._values(wanted, made, layout, native())
    emit._write_sources(folder, values, layout.weights)
    return {
        path.name: emit._render(path.name, values)
        for path in Path(emit.__file__).parent.glob("*.jinja")
    }


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return library(tmp_path_factory.mktemp("ordinary") / "parts", "model.onnx")


def html(markdown: str) -> str:
    """As a viewer with tables and strikethrough shows it, which passes HTML on."""
    return str(
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    )


def tags(page: str) -> list[str]:
    return re.findall(r"<[/!a-z][a-z0-9]*", page)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_library_s_texts_are_inert(
    name: str, ordinary: dict[str, str], tmp_path: Path
) -> None:
    texts = library(tmp_path / "parts", HOSTILE[name])
    # Python: the same program, but for what its docstring says.
    plain, hostile = (ast.parse(each["wrapper.py.jinja"]) for each in (ordinary, texts))
    assert ast.dump(ast.Module(hostile.body[1:], [])) == ast.dump(
        ast.Module(plain.body[1:], [])
    )
    assert isinstance(hostile.body[0], ast.Expr)
    # C: it compiles without a warning, to the same symbols.
    command = [str(zig_path()), "cc", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-c"]
    subprocess.run(
        [*command, "library.c", "-o", "x.o"], cwd=tmp_path / "parts", check=True
    )
    assert (
        b"injected"
        not in (tmp_path / "parts" / "x.o").read_bytes().split(b"small: ")[0]
    )
    # What has no name in it is the same; Markdown has the same structure.
    for same in ("example.c.jinja", "weights.S.jinja"):
        assert texts[same] == ordinary[same]
    assert tags(html(texts["README.md.jinja"])) == tags(
        html(ordinary["README.md.jinja"])
    )


# A C project


def whatever(inputs: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """A reference that is near enough to any answer."""
    return [(np.zeros(5, np.float32), np.full(5, 1e9, np.float32))]


def c_project(folder: Path, suffix: str) -> dict[str, str]:
    """The texts of a project in which every layer's name ends in ``suffix``, and the model's is that."""
    model = residuals()
    for node in model.graph.node:
        node.name += suffix
    version = f"small: {suffix} (SHA-256 0123) for cortex-m7, float32"
    folder.mkdir()
    # Compiles it for this machine and asks it for an answer.
    build_c(
        graph_of(model),
        "small",
        version,
        resolve("cortex-m7"),
        folder,
        None,
        Progress(quiet=True),
        [tensors(model)[0]],
        whatever,
    )
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return c_project(tmp_path_factory.mktemp("projects") / "ordinary", "x")


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "surrogate"])
def test_a_c_project_s_texts_are_inert(
    name: str, project: dict[str, str], tmp_path: Path
) -> None:
    texts = c_project(tmp_path / "project", HOSTILE[name])
    for same in ("Makefile", "CMakeLists.txt", "toolchain.cmake", "main.c", "golden.h"):
        assert texts[same] == project[same]
    drawings = (ElementTree.fromstring(each["memory.svg"]) for each in (texts, project))
    hostile, plain = (sorted(e.tag for e in each.iter()) for each in drawings)
    assert set(hostile) == set(plain)
    assert tags(html(texts["README.md"])) == tags(html(project["README.md"]))
    assert all(
        line.isprintable()
        for text in texts.values()
        for line in text.replace("\t", "").split("\n")
    )


@pytest.mark.parametrize(
    "word",
    [
        *("int", "static", "memcpy", "overlap", "int8_t", "nn_conv", "small_run"),
        *("input", "arena", "base", "expf"),
    ],
)
def test_a_layer_may_be_called_as_c_calls_something(word: str, tmp_path: Path) -> None:
    model, target = residuals(), resolve("cortex-m7")
    model.graph.node[0].name = word
    (tmp_path / "project").mkdir()
    build_c(
        graph_of(model),
        "small",
        word,
        target,
        tmp_path / "project",
        None,
        Progress(quiet=True),
        [tensors(model)[0]],
        whatever,
    )


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("mobilenetv2-0.35-96", "mobilenetv2_0_35_96"),
        ("My Net", "my_net"),
        ("3d", "model_3d"),
        ("int8", "model_int8"),
        ("class", "model_class"),
        ("golden", "model_golden"),
        ("array", "model_array"),
        *((name, f"model_{name}") for name in ("c", "m", "pthread", "rt", "dl")),
        *((name, f"model_{name}") for name in ("math", "stdio", "json", "numpy")),
        ("x" * 200, "x" * 64),
        ("9" * 200, "model_" + "9" * 58),
    ],
)
def test_a_model_s_name_becomes_a_prefix_that_c_and_python_leave_free(
    name: str, prefix: str
) -> None:
    assert escapes.c_prefix(name) == prefix
    assert escapes.is_c_prefix(prefix)


# Whole commands

WORST = 'a"""\n*/ $(touch made) `touch made` ]]> <script> \x1b[31m \u202e\\'


@pytest.mark.slow
def test_a_model_file_s_name_reaches_no_interpreter(tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(WORST.replace("/", "").encode() + b"\xff.onnx")
    onnx.save(graphs.torchscript_cnn(17), model)
    output = tmp_path / "out"
    options = ("--format", "standalone", "--output", output, "--name", "small")
    built = run("compile.build", "--model", model, *options)
    assert built.returncode == 0, built.stderr
    assert len(built.stdout.splitlines()) == 11
    said = built.stdout + built.stderr
    assert said.replace("\n", "").isprintable()
    assert open_bundle(output).manifest.model.name == WORST.replace("/", "") + "?.onnx"
    subprocess.run(
        [sys.executable, "-c", "import small; small.self_test(); small.version()"],
        cwd=output,
        check=True,
    )
    command = [
        str(zig_path()),
        "cc",
        "-Wall",
        "-Werror",
        "example.c",
        "-I.",
        "libsmall.a",
    ]
    subprocess.run(
        [*command, "-lm", "-o", tmp_path / "example"], cwd=output, check=True
    )
    assert not [path for path in tmp_path.rglob("*") if path.name == "made"]
    assert not (ROOT / "made").exists()


@pytest.mark.slow
def test_labels_and_images_send_no_escape_to_the_terminal(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, native()).path
    labels = "\n".join(f"\x1b[3{i}mlabel {i}\x07\u202e" for i in range(5)) + "\n"
    (bundle / "labels.txt").write_text(labels)
    manifest = open_bundle(bundle).manifest
    files = {
        **manifest.files,
        "labels.txt": hashlib.sha256(labels.encode()).hexdigest(),
    }
    changed = manifest.model_copy(update={"files": files, "labels": "labels.txt"})
    (bundle / MANIFEST).write_text(changed.to_json())
    image = tmp_path / "cat\n\x1b]0;owned\x07\x9b.png"
    Image.new("RGB", (20, 20)).save(image)
    Image.new("RGB", (20, 20)).save(
        tmp_path / "\x1b[2J.gif",
        save_all=True,
        append_images=[Image.new("RGB", (20, 20), "red")],
    )
    for options in (
        ("runtime_demo.run", bundle, "--image", image, tmp_path / "\x1b[2J.gif"),
        ("runtime_demo.run", bundle, "--image", tmp_path / "\x1b[1m\nnone"),
        ("runtime_demo.check", bundle, "--repeat", 1),
    ):
        result = run(*options)
        assert "label " in result.stdout or "no such file" in result.stderr
        said = result.stdout + result.stderr
        assert said.replace("\n", "").isprintable(), said
        assert not any(line.startswith("owned") for line in said.splitlines())


def test_a_long_name_is_shown_by_its_end() -> None:
    name = "/features/features.12/conv/conv.2/Conv"
    assert escapes.ending(name, 21) == "….12/conv/conv.2/Conv"
    fused = "model/relu/Relu6;model/bn/FusedBatchNormV3;model/conv_3/Conv2D"
    assert escapes.ending(fused, 21) == "model/conv_3/Conv2D"
    assert escapes.ending(f"{fused};", 10) == "…_3/Conv2D"
    assert escapes.ending("stem\x1b[31m", 21) == "stem\N{REPLACEMENT CHARACTER}[31m"


def test_long_names_of_steps_fit_below_the_drawing() -> None:
    arena = Plan((Buffer("x", 8, 0, 1),), 8, 8, 0, {}, ())
    drawn = geometry(arena, ["stem", "block/" * 30 + "add"])["below"]
    assert drawn[0] == ("stem", "stem")
    assert len(drawn[1][0]) == 24 and drawn[1][0].endswith("block/block/add")


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (0.00059123, "0.000591 ms"),
        (5.9e-07, "0.00000059 ms"),
        (0.1234, "0.123 ms"),
        (12.6, "12.60 ms"),
        (0.0, "0 ms"),
    ],
)
def test_a_short_time_keeps_three_digits(time: float, text: str) -> None:
    assert escapes.milliseconds(time) == text
