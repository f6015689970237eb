"""Linking for any target with the zig compiler from PyPI: no host or cross compiler needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from targets.errors import UserError
from targets.presets import Target


def link_shared(objects: Sequence[Path], output: Path, target: Target) -> None:
    """Link object files into a stripped shared library.

    The same objects give the same bytes: nothing of paths or times is kept.

    Raises:
        UserError: the linker failed; its last words are quoted.
    """
    options = [
        "-shared",
        "-fPIC",
        "-O2",
        "-s",
        "-Wl,--build-id=none",
        "-Wl,-soname,model.so",
    ]
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        target.linker,
        *options,
    ]
    result = subprocess.run(
        [*command, "-o", str(output), *map(str, objects)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"{output}: linking for {target.linker} failed: {said[-1]}")
