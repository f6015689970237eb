"""Every backend by the name of its format."""

from __future__ import annotations

from netship.compile.backends.backend import Backend
from netship.compile.backends.bundle import BundleBackend
from netship.compile.backends.c.backend import CBackend
from netship.compile.backends.standalone.backend import StandaloneBackend

BACKENDS: dict[str, Backend] = {
    each.format: each for each in (BundleBackend(), StandaloneBackend(), CBackend())
}
