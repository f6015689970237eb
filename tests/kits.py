"""Kits for this machine, and the bundles that they are tested with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from netship.bundle.store import Bundle
from netship.devices.board.kit import write_kit
from netship.targets.presets import native, resolve

HERE = native().machine
# A target of another architecture.
OTHER = resolve("arm-cortex-a72" if HERE == "x86_64" else "x86-64-v2")


def unpacked_kit(folder: Path, bundle: Bundle) -> Path:
    """The kit for this machine with the bundle, unpacked into the folder."""
    archive = folder.with_suffix(".tar.gz")
    write_kit(HERE, archive, bundle)  # type: ignore[arg-type]
    subprocess.run(["tar", "xf", str(archive)], cwd=folder, check=True)
    return folder
