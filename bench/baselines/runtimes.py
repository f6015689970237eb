"""Other runtimes for aarch64, unpacked in the user's cache folder.

Pinned wheels (baselines-arm64.lock), fetched by pip and verified by SHA-256; nothing is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from netship.devices.sysroot import unpack_wheels
from netship.meter import board_files
from netship.targets.errors import UserError
from netship.targets.files import cached_path, make_once

LOCK = Path(__file__).with_name("baselines-arm64.lock")
_COMPILE = Path(__file__).parents[2] / "compile"
_GRAPH = (
    *("frontend/absorb.py", "frontend/fold.py", "frontend/quantised"),
    *("ir", "passes"),
)
SOURCES = (
    Path(__file__).parent,
    Path(board_files.__file__),
    *(_COMPILE / each for each in _GRAPH),
)
"""What a runtime's model and its run depend on in the project: this folder, the description of boards, the operator graph."""
# The wheels' glibc, newest first; the arm64 system has Debian 12's 2.36.
_PLATFORMS = tuple(f"manylinux_2_{n}_aarch64" for n in (36, 35, 31, 28, 27, 24, 17))
_ABIS = ("cp311", "abi3", "none")

Progress = Callable[[str], None]


class Baseline(NamedTuple):
    """A runtime.

    Attributes:
        name: on the command line.
        title: what people call it.
        package: the wheel it is in.
        openmp: whether its threads are OpenMP's, whose tasks the meter can count apart.
    """

    name: str
    title: str
    package: str
    openmp: bool = False


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("litert", "LiteRT (XNNPACK)", "ai-edge-litert"),
        Baseline("ncnn", "ncnn", "ncnn", openmp=True),
        Baseline(
            "ncnn-default", "ncnn (its default, half precision)", "ncnn", openmp=True
        ),
        Baseline("mnn", "MNN", "mnn"),
        Baseline("mnn-half", "MNN (half precision)", "mnn"),
        Baseline("openvino", "OpenVINO", "openvino"),
        Baseline("onnxruntime", "ONNX Runtime", "onnxruntime"),
    )
}
DEFAULT = ("litert", "ncnn", "mnn", "openvino", "onnxruntime")
"""The runtimes that a comparison takes by default: all compute in the model's own precision."""


def find(name: str) -> Baseline:
    """Raises: UserError for an unknown name."""
    if name not in BASELINES:
        raise UserError(f"--runtimes {name}: unknown; known: {', '.join(BASELINES)}")
    return BASELINES[name]


def version(runtime: Baseline) -> str:
    """The version that the lock pins."""
    return _pins()[runtime.package]


def _pins() -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==(\S+) ", LOCK.read_text(), re.MULTILINE)
    return dict(found)


def fetch(on_progress: Progress) -> Path:
    """Fetch and unpack the runtimes unless they are there; returns the folder with their Python packages."""
    return make_once(
        cached_path("baselines-arm64", files=[LOCK]),
        lambda site: _unpack(site, on_progress),
        lambda: on_progress("waiting for another process that fetches the runtimes"),
    )


def _unpack(site: Path, on_progress: Progress) -> None:
    on_progress(
        f"fetching {len(_pins())} aarch64 wheels of other runtimes (about 140 MB)"
    )
    try:
        unpack_wheels(LOCK, site, _PLATFORMS, _ABIS)
    except UserError as error:
        raise UserError(f"{LOCK.name}: {error}") from None
    # zipfile drops the files' modes; QEMU needs this one.
    pnnx(site).chmod(0o755)


def pnnx(site: Path) -> Path:
    """The program that converts ONNX for ncnn."""
    return site / "pnnx" / "pnnx"
