"""Every backend by the name of its format."""

from __future__ import annotations

from compile.backends.backend import Backend
from compile.backends.bundle import BundleBackend
from compile.backends.c.backend import CBackend
from compile.backends.standalone.backend import StandaloneBackend

BACKENDS: dict[str, Backend] = {
    each.format: each for each in (BundleBackend(), StandaloneBackend(), CBackend())
}
