"""An option that cannot be followed is refused: exit code 2, one line, nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from refusals import BUILD, CHECK, VALID, Place, expect

from netship.__main__ import main as netship
from netship.compile.build import parser
from netship.targets.commands import COMMANDS
from netship.targets.errors import UserError
from netship.targets.escapes import all_counted, counted, megabytes, millions


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "arm-cortex-a27"], "'arm-cortex-a27'|did you mean arm-cortex-a"),
        (["--target", "%%%"], "'%%%'|python -m targets"),
        (
            ["--target", "llvm -mtriple=riscv64-linux-gnu"],
            "riscv64|known: x86_64-linux-gnu",
        ),
        (
            ["--target", "llvm -mtriple=x86_64-linux-gnu -mcpu=znver44"],
            "-mcpu=znver44|did you mean znver4",
        ),
        (["--target", "llvm -frob=1"], "--target|frob"),
        (["--target", "llvm -mcpu='znver4"], "quot"),
        (["--scale", "nan"], "scale|--scale"),
        (["--scale", "0"], "scale and std must not be 0|--scale"),
        (["--scale", "1/1e400"], "scale and std must not be 0|--scale"),
        (["--mean", "nan", "--scale", "1"], "mean|--mean"),
        (["--output", "b", "--dump", "b"], "--dump b|in the folder of the build"),
        (["--output", "b", "--dump", "./b/../b/c"], "--dump|in the folder of the"),
        (["--target", "x86-64-v3", "--dump", "out/model-x86-64-v3"], "--dump out/mod"),
        (["--mean", "inf"], "mean|--mean"),
        (["--mean", "1,2"], "mean|--mean"),
        (["--std", "0"], "std|--std"),
        (["--resize", "8"], "resize 8|crop 16|--resize"),
        (["--resize", "8,16"], "resize 8|crop 16|--resize"),
        (["--pad", "9"], "--pad|--fit letterbox"),
        (["--fit", "letterbox", "--resize", "16"], "--resize|--fit letterbox"),
        (["--crop", "20"], "crop 20|16×16|leave --crop out"),
        (["--labels", "nowhere.txt"], "nowhere.txt|No such file|--labels"),
        (["--labels", "two.txt"], "two.txt|2 labels|4 classes"),
        (["--labels", "model.onnx"], "model.onnx|UTF-8 text, one a line"),
        (["--golden", "nowhere.jpg"], "nowhere.jpg|no such file|give an image"),
        (["--input-shape", "frame:1,3,16,16"], "'frame'|the input is 'image'"),
        (["--input-shape", "image:1,3,32,32"], "1,3,32,32|[1, 3, 16, 16]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_an_option(place: Place, options: list[str], words: str) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    (place.here / "two.txt").write_text("cat\ndog\n")
    expect(place.refused(BUILD, "--model", "model.onnx", *options), words)


def test_one_is_not_many() -> None:
    assert [counted(n, "image") for n in (1, 2)] == ["1 image", "2 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]
    sizes = [megabytes(n) for n in (812, 99_000, 2_486_000)]
    assert sizes == ["0.8 kB", "99.0 kB", "2.49 MB"]
    assert [millions(n, 1) for n in (13_568, 300_774_272)] == ["13,568", "300.8 M"]
    assert [all_counted(n, "box") for n in (1, 2)] == ["the one box", "all 2 boxes"]


def test_refuses_a_toml_with_a_misspelt_key(place: Place) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    (place.here / "model.toml").write_text("scael = 1.0\n")
    line = place.refused(BUILD, "--model", "model.onnx")
    expect(line, "model.toml|scael|known keys: layout")


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (BUILD, ["--threads", "0"], "--threads|'0'"),
        (BUILD, ["--name", "m"], "--name|'m' is taken|libm|model_m"),
        (BUILD, ["--name", "3d"], "--name|'3d' is not a C identifier|model_3d"),
        (BUILD, ["--scale", "1/0"], "--scale|'1/0'"),
        (BUILD, ["--dump", ""], "--dump|an empty name"),
        (BUILD, ["--golden", ""], "--golden|an empty name"),
        (BUILD, ["--input-shape", "1,3,224,224"], "--input-shape|NAME:1,3,224,224"),
        (CHECK, ["bundle", "--repeat", "abc"], "--repeat|'abc'"),
        (CHECK, ["bundle", "--rpc", "local", "--board", "emulated"], "--board|--rpc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misused_option_is_named_in_one_line(
    place: Place, module: str, options: list[str], words: str
) -> None:
    line = place.refused(module, *options)
    expect(line, f"; see python -m {module} --help|{words}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_an_option_that_it_does_not_take(name: str) -> None:
    words = ["merge", "a", "--output", "b"] if name == "records" else []
    words += ["compare"] if name == "bench" else []
    words += ["emulate"] if name == "board" else []
    with pytest.raises(UserError) as refused:
        netship([name, *words, "--no-such-option"])
    line = str(refused.value)
    assert "\n" not in line and "usage" not in line
    assert "--no-such-option" in line or re.search(
        "(are|is) required; |required: ", line
    )
    assert re.search(r"; see python -m \S+( \w+)? --help$", line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quantise", "int8"], "--quantise int8; did you mean --quantize? see"),
        (["mine.onnx"], "mine.onnx; give it as --model mine.onnx; see"),
        (["mine"], "unrecognized arguments: mine; see"),
        (["--threads"], "--threads: expected one argument; see"),
        (["--format", "elf"], "--format: invalid choice: 'elf' (choose from 'bundle',"),
    ],
)
def test_the_line_says_what_to_write_instead(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parser().parse_args(words)


# Where the bundle goes


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file", "file|not a directory"),
        ("link", "link|not a directory"),
        ("photos", "photos|not a bundle"),
        ("webapp", "webapp|not a bundle"),
        ("taken", "taken.tar.gz|remove it"),
        (".", "no name of its own"),
        ("file/below", "file|Not a directory"),
        ("/proc/nowhere/out", "/proc/nowhere|No such file"),
        ("/sys/kernel/out", "/sys/kernel"),
    ],
    ids=lambda value: None if "|" in value else value[:20],
)
def test_refuses_an_output(place: Place, output: str, words: str) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    (place.here / "file").write_text("mine")
    (place.here / "taken.tar.gz").write_text("mine")
    (place.here / "photos").mkdir()
    (place.here / "photos" / "cat.jpg").write_bytes(b"mine")
    (place.here / "webapp").mkdir()
    (place.here / "webapp" / "manifest.json").write_text("{}")
    (place.here / "link").symlink_to("photos")
    line = place.refused(BUILD, "--model", "model.onnx", "--output", output)
    expect(line, words + "|choose another --output")
