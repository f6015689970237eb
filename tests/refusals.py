"""Commands that refuse, run as a user runs them: a process in a folder that must stay as it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import ROOT
from onnx import TensorProto, helper, numpy_helper
from tiny import tiny_bundle

from netship.targets.presets import native

BUILD, RUN, CHECK = "compile.build", "runtime_demo.run", "runtime_demo.check"


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


VALID = classifier().SerializeToString()


# Bundles


def labelled_bundle(folder: Path) -> Path:
    """A valid bundle with labels in ``folder``; its manifest names `classifier` as its model."""
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
