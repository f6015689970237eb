"""Targets and an image of the standalone library that tests write by hand; the processes that run it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_library import INPUT, fake_library

from netship.bundle.store import Bundle
from netship.targets.presets import Target, native, resolve

A72 = resolve("arm-cortex-a72")
ARMV7 = Target(
    name="arm-cortex-a7",
    summary="armv7",
    tvm="llvm -mtriple=armv7l-linux-gnueabihf",
    linker="arm-linux-gnueabihf.2.28",
    machine="arm",
    qemu_cpu="cortex-a7",
)
IMAGE = np.arange(12, dtype=np.float32).reshape(INPUT.shape)
Make = Callable[..., Bundle]


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(target=native(), MACRO=…)``: the library with a fault, in a folder of its own."""

    def build(target: Target | None = None, **macros: str) -> Bundle:
        folder = tmp_path_factory.mktemp("fake")
        return fake_library(folder, target or native(), **macros)

    return build


def children() -> list[int]:
    """Of this process, runners and emulators, alive or not waited for."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name.startswith(("runner", "qemu")) and rest.split()[1] == str(
                os.getpid()
            ):
                found.append(int(status.parent.name))
    return found
