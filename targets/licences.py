"""Under which terms the project may be used, and what a build writes."""

from __future__ import annotations

from netship.targets.escapes import shown
from netship.targets.toolchain import zig_path

PROJECT = "netship is free software under the Apache License 2.0; its file LICENSE has the text."
_OUTPUT = """\
All code that netship writes into this folder, as source or as machine code, is yours: use, change and
distribute it under any terms, without a notice and without any obligation to netship's authors. It comes
without warranty of any kind."""
_LINKED = """\
Shared libraries may contain routines of the compiler that links them, zig's compiler-rt, under this licence:

"""


def notice(model: str, *, linked: bool) -> str:
    """The file LICENSES of a folder that a build writes.

    Args:
        model: the file, or the built-in name, that the weights are from.
        linked: there is a shared library in it.
    """
    weights = (
        f"The weights are those of {shown(model)}. For them, and for the images and labels that the build\n"
        "was given, the terms of their owners hold."
    )
    return "\n\n".join([_OUTPUT, weights, *([_LINKED + of_zig()] if linked else [])])


def of_zig() -> str:
    """The MIT License with zig's copyright, which asks to be passed on."""
    return (zig_path().parent / "LICENSE").read_text(encoding="utf-8")
