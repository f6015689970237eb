"""What is refused, as a user meets it: a process, exit code 2, one line, nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny import tiny_bundle

from targets.presets import native

BUILD, RUN, CHECK = "compile.build", "runtime_demo.run", "runtime_demo.check"
INTERRUPTED = "interrupted: nothing half-made was left behind"


class Place:
    """A folder to run commands in and a temporary folder for them; both must be left as they were."""

    def __init__(self, folder: Path) -> None:
        self.here, self.temporary = folder / "here", folder / "temporary"
        self.here.mkdir()
        self.temporary.mkdir()

    def start(
        self, module: str, *options: object, **more: Any
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, options)],
            cwd=self.here,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def environment(self) -> dict[str, str]:
        # What conftest.py or a CI sets is not set for a user.
        ours = {"CI", "ORT_DISABLE_TELEMETRY"}
        theirs = {name: value for name, value in os.environ.items() if name not in ours}
        return {**theirs, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}

    def refused(self, module: str, *options: object, **more: Any) -> str:
        """The one line with which the command refuses."""
        before = contents(self.here)
        with self.start(module, *options, **more) as process:
            out, err = process.communicate()
        assert "Traceback" not in out + err, err
        assert process.returncode == 2, f"exit code {process.returncode}\n{out}\n{err}"
        *progress, line = err.splitlines()
        assert line.startswith("error: ") and line.isprintable(), err
        # Before it only finished stages and notes, which are indented.
        assert all(each.startswith("  ") for each in progress), err
        assert contents(self.here) == before
        assert contents(self.temporary) == {}
        return line


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, with what would show a change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        changed = 0 if path.is_dir() else status.st_mtime_ns
        size = 0 if path.is_dir() else status.st_size
        found[str(path.relative_to(folder))] = (status.st_mode, size, changed)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def expect(line: str, words: str) -> None:
    """Every one of the words, which are separated by ``|``, stands in the line."""
    for word in words.split("|"):
        assert word in line, f"{word!r} is not in: {line}"


# Models


def classifier(
    shape: tuple[int | str, ...] = (1, 3, 16, 16),
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    channels: int = 4,
) -> onnx.ModelProto:
    """Convolution, pooling, flatten: a valid model, for the cases to spoil."""
    random = np.random.Generator(np.random.PCG64(3))
    weights = random.normal(0, 0.3, (channels, 3, 3, 3))
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", ["image", "weights"], ["map"], "convolution"),
                helper.make_node("GlobalAveragePool", ["map"], ["mean"], "pooling"),
                helper.make_node("Flatten", ["mean"], ["scores"], "flatten"),
            ],
            "classifier",
            [helper.make_tensor_value_info("image", dtype, shape)],
            [helper.make_tensor_value_info("scores", dtype, [shape[0], channels])],
            [numpy_helper.from_array(weights.astype(numpy_type), "weights")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def spoilt(change: Callable[[Any], object], **options: Any) -> bytes:
    """The bytes of the valid model after ``change(graph)``."""
    model = classifier(**options)
    change(model.graph)
    return bytes(model.SerializeToString())


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
        helper.make_tensor_value_info("more", TensorProto.FLOAT, [1, 4])
    )
    graph.node.append(helper.make_node("Add", ["scores", "more"], ["sum"], "adding"))
    graph.output[0].name = "sum"


def cycle(graph: Any) -> None:
    graph.node[0].input[0] = "mean"


def operator(name: str, domain: str = "", called: str = "odd") -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph.node[1].CopyFrom(
            helper.make_node(name, ["map"], ["mean"], called, domain=domain)
        )

    return change


RANDOM = np.random.Generator(np.random.PCG64(11)).bytes(4096)
VALID = classifier().SerializeToString()

MODELS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty|copy the model again"),
    "truncated": (VALID[: len(VALID) // 2], "cut short|copy it again"),
    "random bytes": (RANDOM, "not an ONNX model|export or copy it again"),
    "text": (b"This is a text about models.\n", "not an ONNX model|export"),
    "no nodes": (spoilt(lambda g: g.ClearField("node")), "no nodes|export a network"),
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
        spoilt(lambda g: None, shape=(1, 48)),
        "'image'|rank 2|need rank 4",
    ),
    "batch of two": (
        spoilt(lambda g: None, shape=(2, 3, 16, 16)),
        "'image'|batch 2|export with batch 1",
    ),
    "two inputs": (
        spoilt(second_input),
        "2 inputs ('image', 'more')|export one input",
    ),
    "opset 5": (
        spoilt(lambda g: None, opset=5),
        "opset 5|7 to 22|opset_version=17",
    ),
    "opset 99": (
        spoilt(lambda g: None, opset=99),
        "opset 99|7 to 22|opset_version=17",
    ),
    "NaN in the weights": (weights_with(np.nan), "'weights'|NaN|export it again"),
    "infinite weights": (weights_with(np.inf), "'weights'|infinite|export it again"),
    "float16": (
        spoilt(lambda g: None, dtype=TensorProto.FLOAT16),
        "float16|model.float()",
    ),
    "double": (
        spoilt(lambda g: None, dtype=TensorProto.DOUBLE),
        "double|model.float()",
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


# Options


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
        (["--mean", "inf"], "mean|--mean"),
        (["--mean", "1,2"], "mean|--mean"),
        (["--std", "0"], "std|--std"),
        (["--resize", "8"], "resize 8|crop 16|--resize"),
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


def test_refuses_a_toml_with_a_misspelt_key(place: Place) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    (place.here / "model.toml").write_text("scael = 1.0\n")
    line = place.refused(BUILD, "--model", "model.onnx")
    expect(line, "model.toml|scael|known keys: layout")


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (BUILD, ["--threads", "0"], "--threads|'0'"),
        (BUILD, ["--scale", "1/0"], "--scale|'1/0'"),
        (BUILD, ["--input-shape", "1,3,224,224"], "--input-shape|NAME:1,3,224,224"),
        (CHECK, ["bundle", "--repeat", "abc"], "--repeat|'abc'"),
        (CHECK, ["bundle", "--rpc", "local", "--board", "emulated"], "--board|--rpc"),
        (RUN, ["bundle"], "--image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misused_option_is_named_below_the_usage(
    place: Place, module: str, options: list[str], words: str
) -> None:
    with place.start(module, *options) as process:
        out, err = process.communicate()
    assert process.returncode == 2 and not out
    assert err.startswith("usage: ") and "Traceback" not in err
    expect(err.splitlines()[-1], f"python -m {module}: error: |{words}")


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


def small_files(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("size", [1 << 10, 100 << 10], ids=["golden data", "library"])
def test_no_room_for_a_file_is_one_line(place: Place, size: int) -> None:
    """A full disk as everybody can make it: no file may grow beyond ``size``."""
    model = classifier(channels=2048)
    (place.here / "model.onnx").write_bytes(model.SerializeToString())
    line = place.refused(BUILD, "--model", "model.onnx", preexec_fn=small_files(size))
    expect(line, "File too large|make room")


def in_small_disk(size: str, folder: Path, *command: object) -> list[str]:
    """The command where ``folder`` is a disk of that size, with what it leaves there on stdout."""
    script = (
        f'mount -t tmpfs -o size={size} none "$1" && folder="$1" && shift && "$@"; code=$?; '
        'ls -A "$folder"; exit $code'
    )
    unshare = ["unshare", "--map-root-user", "--mount"]
    return [*unshare, "sh", "-c", script, "sh", str(folder), *map(str, command)]


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none"]
    with contextlib.suppress(OSError):
        return not subprocess.run(
            [*command, "/mnt"], capture_output=True, check=False
        ).returncode
    return False


@pytest.mark.slow
@pytest.mark.parametrize("full", ["output", "temporary"] if can_mount() else [])
def test_a_full_disk_is_one_line(place: Place, full: str) -> None:
    (place.here / "model.onnx").write_bytes(
        classifier(channels=4096).SerializeToString()
    )
    output = place.here / "disk"
    output.mkdir()
    folder = output if full == "output" else place.temporary
    command = [sys.executable, "-m", BUILD, "--model", "model.onnx", "--output"]
    result = subprocess.run(
        in_small_disk("100k", folder, *command, "disk/bundle"),
        cwd=place.here,
        env=place.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *progress, line = result.stderr.splitlines()
    assert all(each.startswith("  ") for each in progress), result.stderr
    expect(line, "error: |No space left|make room")
    assert result.stdout == "", "something is left on the disk"
    assert list(output.iterdir()) == []


# Interrupted


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended before {text!r}:\n{seen}")


def living(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # pid (command) state parent group session …
            state, _, _, of = (
                (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if int(of) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


ENGINE, LINKER = b"spawn_main", b"ziglang"


def child(process: subprocess.Popen[str], word: bytes) -> int:
    """The descendant with that word in its command line, once there is one."""
    while process.poll() is None:
        for pid in living(process.pid):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        time.sleep(0.005)
    raise AssertionError(f"ended without {word!r}")


# The line before what is to be interrupted.
STARTING, LOWERING, LINKING = "reading the model", "importing into Relay", "compiling"


@pytest.mark.slow
@pytest.mark.parametrize("after", [STARTING, LOWERING, LINKING])
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_build_leaves_what_was_there(
    place: Place, bundle: Path, how: str, after: str
) -> None:
    shutil.copytree(bundle, place.here / "bundle")
    (place.here / "model.onnx").write_bytes(VALID)
    # In the linker's place, one that does not end by itself.
    (place.here / "ziglang").mkdir()
    (place.here / "ziglang/__init__.py").touch()
    linker = place.here / "ziglang/zig"
    linker.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    linker.chmod(0o755)
    before = contents(place.here)
    # Lowering takes long enough in a large network, the way to the linker not too long in a small one.
    model = "mobilenetv2-0.35-96" if after == LOWERING else "model.onnx"
    options = ["--model", model, "--output", "bundle"]
    with place.start(BUILD, *options, start_new_session=True) as process:
        read_until(process, after)
        if after != LOWERING:
            child(process, ENGINE if after == STARTING else LINKER)
        if how == "SIGTERM":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    *progress, line = err.splitlines()
    assert (out, line) == ("", INTERRUPTED)
    assert all(each.startswith("  ") for each in progress), err
    assert contents(place.here) == before
    assert contents(place.temporary) == {}
    wait_for(lambda: not living(process.pid), "a process survived")


def test_a_second_ctrl_c_does_not_cut_the_cleaning_up_short(place: Place) -> None:
    (place.here / "impatient.py").write_text(
        "import time\n"
        "from targets.errors import run_command\n"
        "def main(_):\n"
        "    try:\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaning', flush=True)\n"
        "        input()\n"
        "        print('cleaned', flush=True)\n"
        "run_command(main)\n"
    )
    with place.start("impatient", stdin=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        process.terminate()
        out, err = process.communicate("\n")
    assert (process.returncode, out, err) == (130, "cleaned\n", f"{INTERRUPTED}\n")


@pytest.mark.slow
def test_a_killed_engine_is_one_line(place: Place) -> None:
    options = ["--model", "mobilenetv2-0.35-96"]
    with place.start(BUILD, *options, start_new_session=True) as process:
        read_until(process, LOWERING)
        os.kill(child(process, ENGINE), signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in err
    expect(err.splitlines()[-1], "error: |the engine's process|SIGKILL")
    assert (contents(place.here), contents(place.temporary)) == ({}, {})
    wait_for(lambda: not living(process.pid), "a process survived")


# Bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid bundle with labels, said to be built from `classifier`."""
    folder = tmp_path_factory.mktemp("valid")
    path = tiny_bundle(folder, native()).path
    (path / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")

    def change(manifest: Any) -> None:
        manifest["labels"] = "labels.txt"
        manifest["files"]["labels.txt"] = ""
        manifest["model"]["sha256"] = hashlib.sha256(VALID).hexdigest()

    rewrite(path, change)
    rehash(path)
    return path


def rewrite(bundle: Path, change: Callable[[Any], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(bundle: Path) -> None:
    """Make the manifest's hashes those of the files: a forger would."""

    def change(manifest: Any) -> None:
        for name in manifest["files"]:
            data = (bundle / name).read_bytes()
            manifest["files"][name] = hashlib.sha256(data).hexdigest()

    rewrite(bundle, change)


def flip(name: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)

    return damage


def replace_by_link(bundle: Path) -> None:
    (bundle / "model.so").rename(bundle.parent / "elsewhere.so")
    (bundle / "model.so").symlink_to("../elsewhere.so")


def truncate_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])


def huge_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 3 << 30)


def state(*path: str | int, value: object) -> Callable[[Path], None]:
    """Let the manifest say ``value`` at that path."""

    def change(manifest: Any) -> None:
        *way, last = path
        for step in way:
            manifest = manifest[step]
        manifest[last] = value

    return lambda bundle: rewrite(bundle, change)


def another_image(bundle: Path) -> None:
    """As many bytes, and consistent in itself: only the library knows better."""

    def change(manifest: Any) -> None:
        manifest["input"]["shape"] = [1, 3, 8, 32]
        manifest["preprocessing"] |= {"crop": [8, 32], "resize": 32}

    rewrite(bundle, change)


OTHER, OTHER_CODE = ("aarch64", 183) if native().machine == "x86_64" else ("x86_64", 62)


def for_other_machine(bundle: Path) -> None:
    library = bytearray((bundle / "model.so").read_bytes())
    library[18:20] = struct.pack("<H", OTHER_CODE)
    (bundle / "model.so").write_bytes(library)
    rehash(bundle)


def whole_for_other_machine(bundle: Path) -> None:
    for_other_machine(bundle)
    rewrite(bundle, lambda m: m["target"].update(machine=OTHER, name="far-away"))


def no_library(bundle: Path) -> None:
    data = (bundle / "model.so").read_bytes()
    (bundle / "model.so").write_bytes(data[:64] + bytes(len(data) - 64))
    rehash(bundle)


def odd_name(name: str) -> Callable[[Path], None]:
    return lambda bundle: rewrite(bundle, lambda m: m["files"].update({name: "0" * 64}))


def newer(bundle: Path) -> None:
    rewrite(bundle, lambda m: m.update(format_version=2, novelty=[]))


AGAIN = "build the bundle again"
BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of model.so": (flip("model.so"), "model.so|SHA-256|copy or build"),
    "a byte of a golden output": (flip("golden/0.output0.bin"), "0.output0|SHA-256"),
    "a byte of the labels": (flip("labels.txt"), "labels.txt|SHA-256|copy or build"),
    "no model.so": (lambda b: (b / "model.so").unlink(), "model.so|missing|copy"),
    "no golden input": (
        lambda b: (b / "golden/1.input.bin").unlink(),
        "golden/1.input.bin|missing|copy or build",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "not a bundle|build"),
    "a link for model.so": (replace_by_link, "model.so|a link|copy the bundle again"),
    "a manifest that is text": (
        lambda b: (b / "manifest.json").write_text("hello"),
        f"manifest.json|{AGAIN}",
    ),
    "half a manifest": (truncate_manifest, f"manifest.json|{AGAIN}"),
    "a manifest of 3 GB": (huge_manifest, f"manifest.json|{AGAIN}"),
    "a newer format": (newer, f"manifest.json|format version 2|{AGAIN}"),
    "../ in a file's name": (odd_name("../outside"), f"'../outside'|{AGAIN}"),
    "an absolute file name": (odd_name("/etc/hostname"), f"'/etc/hostname'|{AGAIN}"),
    "a file's name of two lines": (odd_name("a\nb\x1b[1m"), "missing|copy"),
    "channels last, it says": (
        state("input", "shape", value=[1, 16, 3, 16]),
        f"manifest.json|{AGAIN}",
    ),
    "another image, it says": (
        another_image,
        f"float32[1,3,16,16]|the manifest says image float32[1,3,8,32]|{AGAIN}",
    ),
    "no image, it says": (
        state("input", "shape", value=[768]),
        f"manifest.json|not an image|{AGAIN}",
    ),
    "a larger input, it says": (
        lambda b: rewrite(
            b,
            lambda m: (
                m["input"].update(shape=[1, 3, 32, 32]),
                m["preprocessing"].update(crop=[32, 32], resize=32),
            ),
        ),
        f"0.input.bin|3072 bytes|takes 12288|{AGAIN}",
    ),
    "another output, it says": (
        state("outputs", 0, "shape", value=[5, 1]),
        f"output float32[1,5]|says float32[5,1]|{AGAIN}",
    ),
    "another input's name, it says": (
        state("input", "name", value="picture"),
        f"image|picture|{AGAIN}",
    ),
    "no golden data": (state("golden", value=[]), f"golden|{AGAIN}"),
    "a library for another machine": (
        for_other_machine,
        f"model.so|is for {OTHER}, the manifest says {native().machine}",
    ),
    "a whole bundle for another machine": (
        whole_for_other_machine,
        f"is for {OTHER} (far-away)|this machine is {native().machine}|run it on",
    ),
    "a CPU feature that is not here": (
        state("target", "features", value=["timetravel"]),
        "lacks timetravel|--target native",
    ),
    "a library of zeros": (no_library, "model.so|cannot be loaded|build it"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_refuses_a_bundle(place: Place, bundle: Path, case: str) -> None:
    damage, words = BUNDLES[case]
    shutil.copytree(bundle, place.here / "bundle")
    damage(place.here / "bundle")
    expect(place.refused(CHECK, "bundle"), "bundle|" + words)


def test_the_undamaged_bundle_passes(place: Place, bundle: Path) -> None:
    shutil.copytree(bundle, place.here / "bundle")
    before = contents(place.here)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "PASSED" in out
    assert (contents(place.here), contents(place.temporary)) == (before, {})


def test_a_wrong_answer_is_no_refusal_but_a_verdict(place: Place, bundle: Path) -> None:
    path = place.here / "bundle"
    shutil.copytree(bundle, path)
    golden = path / "golden/0.output0.bin"
    golden.write_bytes((np.frombuffer(golden.read_bytes(), "<f4") + 1).tobytes())
    rehash(path)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == 1, err
    assert "FAILED" in out and "error:" not in err


def test_refuses_the_archive_in_place_of_the_folder(place: Place) -> None:
    (place.here / "bundle.tar.gz").write_bytes(b"\x1f\x8b")
    line = place.refused(CHECK, "bundle.tar.gz")
    expect(line, "bundle.tar.gz|not a bundle|unpack it first (tar xf)")


def test_refuses_a_folder_that_is_not_there(place: Place) -> None:
    expect(place.refused(CHECK, "nowhere"), "nowhere|not a bundle|compile.build")


# Images and models beside a bundle


def png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


IMAGES = {
    "truncated.jpg": "truncated.jpg|damaged image|replace it",
    "truncated.png": "truncated.png|damaged image|replace it",
    "bomb.png": "bomb.png|100,000,000 pixels|make it smaller",
    "large.png": "large.png|12000×10000|100,000,000 pixels|make it smaller",
    "text.jpg": "text.jpg|not an image|convert it to JPEG or PNG",
    "empty.jpg": "empty.jpg|not an image",
    "nowhere.jpg": "nowhere.jpg|no such file|give an image",
    "folder": "folder|no images in it (.bmp, ",
    "folder.jpg": "folder.jpg|no images in it (.bmp, ",
}


@pytest.mark.parametrize("name", IMAGES)
def test_refuses_an_image(place: Place, bundle: Path, name: str) -> None:
    here = place.here
    image = Image.effect_noise((64, 64), 50)
    for kind in ("jpg", "png"):
        image.save(here / f"truncated.{kind}")
        os.truncate(here / f"truncated.{kind}", 600)
    (here / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (here / "large.png").write_bytes(png_header(12_000, 10_000))
    (here / "text.jpg").write_text("This is no photograph.")
    (here / "empty.jpg").touch()
    (here / "folder").mkdir()
    (here / "folder.jpg").mkdir()
    expect(place.refused(RUN, bundle, "--image", name), IMAGES[name])


def test_refuses_images_without_the_model(place: Place, bundle: Path) -> None:
    line = place.refused(CHECK, bundle, "--images", ".")
    expect(line, "--images needs --model")


def test_refuses_a_model_other_than_the_bundle_s(place: Place, bundle: Path) -> None:
    (place.here / "other.onnx").write_bytes(spoilt(lambda g: None, channels=5))
    line = place.refused(CHECK, bundle, "--model", "other.onnx")
    expect(line, "other.onnx|SHA-256|give that model, or build again")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("name,class\nphoto.png,1\n", "'class_index'|file and class_index"),
        ("file,class_index\nphoto.png,cat\n", "cat|whole number"),
    ],
    ids=["columns", "numbers"],
)
def test_refuses_a_table_of_labels(
    place: Place, bundle: Path, table: str, words: str
) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    Image.new("RGB", (20, 20)).save(place.here / "photo.png")
    (place.here / "labels.csv").write_text(table)
    line = place.refused(
        CHECK, bundle, "--model", "model.onnx", "--images", "photo.png"
    )
    expect(line, "labels.csv|" + words)


# Boards


@pytest.fixture
def nobody() -> int:
    """A port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_refuses_a_port_where_nobody_listens(
    place: Place, bundle: Path, nobody: int
) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{nobody}")
    expect(line, f"127.0.0.1:{nobody}|nobody listens|tvm.exec.rpc_server")


@pytest.mark.slow
def test_refuses_a_web_server(place: Place, bundle: Path, web: int) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{web}")
    expect(line, f"127.0.0.1:{web}")


@pytest.mark.slow
def test_refuses_a_server_that_never_answers(
    place: Place, bundle: Path, silent: int
) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{silent}")
    expect(line, f"127.0.0.1:{silent}")


def test_refuses_a_tracker_that_is_not_there(
    place: Place, bundle: Path, nobody: int
) -> None:
    options = ["--tracker", f"127.0.0.1:{nobody}", "--key", "pi"]
    expect(place.refused(RUN, bundle, "--image", ".", *options), "no images")
    expect(place.refused(CHECK, bundle, *options), f"127.0.0.1:{nobody}|tracker")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tracker", "127.0.0.1:9190"], "--tracker|--key KEY"),
        (["--key", "pi"], "--key|--tracker|leave it out"),
        (["--rpc", "raspberrypi"], "'raspberrypi'|HOST:PORT"),
        (["--rpc", "raspberrypi:99999"], "HOST:PORT"),
        (["--rpc", "no-such-host.invalid:9090"], "no-such-host.invalid|check its name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_the_options_of_a_board(
    place: Place, bundle: Path, options: list[str], words: str
) -> None:
    expect(place.refused(CHECK, bundle, *options), words)


def test_there_are_as_many_cases_as_were_promised() -> None:
    assert len(MODELS) + len(BUNDLES) + len(IMAGES) >= 30


def test_the_cases_name_what_is_wrong_in_words_of_their_own() -> None:
    """A case whose words any error has would test nothing."""
    for _, words in [*MODELS.values(), *BUNDLES.values()]:
        assert re.sub(r"[^a-z]", "", words.lower())
