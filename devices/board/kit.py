"""The kit for a board: one archive with the RPC server, ``verify``, a systemd service and a page of instructions."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

from netship.bundle.store import MANIFEST, Bundle, write_archive
from netship.devices.board.programs import (
    SOURCES,
    Machine,
    engine_sources,
    native_server,
    native_verifier,
)
from netship.targets import licences
from netship.targets.errors import UserError
from netship.targets.files import check_writable, write_whole

TEMPLATES = SOURCES / "kit"
_SYSTEMS: dict[Machine, str] = {
    "aarch64": "64-bit ARM (arm64)",
    "arm": "32-bit ARM with hard-float and NEON (armhf)",
    "x86_64": "x86-64 (amd64)",
}
_EXECUTABLE, _PLAIN = 0o755, 0o644
_TEMPLATES = (
    ("LICENSES", _PLAIN),
    ("README.md", _PLAIN),
    ("install", _EXECUTABLE),
    ("netship-serve.service", _PLAIN),
)


def write_kit(
    machine: Machine,
    output: Path,
    bundle: Bundle | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Write the kit for boards of ``machine``, a .tar.gz whose bytes depend only on its content.

    Args:
        output: the archive; one that is there is replaced.
        bundle: becomes the folder ``bundle``, which ``./verify`` checks by default.
        on_progress: called with each stage.

    Raises:
        UserError: the bundle is for another machine, ``output`` cannot be written, the
            programs cannot be built.
    """
    check_writable(output, "--output")
    if bundle and bundle.manifest.is_source:
        raise UserError(
            f"{bundle.path}: is C source for a microcontroller, a kit is for Linux boards; "
            "leave it out, or build it for one"
        )
    if bundle and bundle.manifest.target.machine != machine:
        raise UserError(
            f"{bundle.path}: is for {bundle.manifest.target.machine}, the kit for {machine}; "
            "give a kit and a bundle for the same board"
        )
    server = native_server(machine, on_progress).read_bytes()
    verifier = native_verifier(machine, on_progress).read_bytes()
    on_progress(f"packing {output.name}")
    files = [(name, mode, _filled(name, machine)) for name, mode in _TEMPLATES]
    files += [("serve", _EXECUTABLE, server), ("verify", _EXECUTABLE, verifier)]
    if bundle:
        for name in sorted([MANIFEST, *bundle.manifest.files]):
            files.append((f"bundle/{name}", _PLAIN, bundle.read(name)))
    packed = io.BytesIO()
    write_archive(packed, files, level=9)
    write_whole(output, packed.getvalue(), "--output")


def notices() -> str:
    """The file LICENSES of every kit."""
    return _filled("LICENSES", "aarch64").decode()


def _filled(template: str, machine: Machine) -> bytes:
    """A template with each ``@WORD@`` replaced."""
    third = engine_sources() / "3rdparty"
    words = {
        "MACHINE": machine,
        "SYSTEM": _SYSTEMS[machine],
        "TVM": _tvm_version(),
        # The licences of the parts that are compiled in require these texts.
        "APACHE": (third / "dmlc-core/LICENSE").read_text(),
        "HALF": _first_comment(third / "compiler-rt/builtin_fp16.h"),
        "PICOJSON": _first_comment(third / "picojson/picojson.h"),
        "ZIG": licences.of_zig(),
    }
    text = (TEMPLATES / template).read_text()
    return re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text).encode()


def _tvm_version() -> str:
    header = engine_sources() / "include/tvm/runtime/c_runtime_api.h"
    found = re.search(r'#define TVM_VERSION "([\d.]+)"', header.read_text())
    assert found
    return found[1]


def _first_comment(source: Path) -> str:
    inside = source.read_text().split("/*", 1)[1].split("*/", 1)[0]
    return re.sub(r"(?m)^ \* ?", "", inside).strip() + "\n"
