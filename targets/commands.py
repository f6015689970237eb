"""The names of the commands: ``netship build`` of an installed package, ``python -m compile.build`` in a checkout."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """What ``netship NAME`` runs: a module below ``netship``, with the words that go before the user's."""

    module: str
    summary: str
    words: tuple[str, ...] = ()


COMMANDS = {
    "build": Command(
        "compile.build", "from an ONNX or .tflite file to a checked bundle"
    ),
    "run": Command("runtime_demo.run", "photographs through a bundle"),
    "check": Command("runtime_demo.check", "compare a bundle with ONNX Runtime"),
    "compare": Command(
        "runtime_demo.compare", "builds of one or several networks side by side"
    ),
    "board": Command("runtime_demo.board", "the kit for a board, emulated boards"),
    "doctor": Command(
        "runtime_demo.board", "is a board fit, what is missing", ("doctor",)
    ),
    "targets": Command("targets", "what --target takes"),
    "tune": Command("tuning.tune", "search for faster kernels"),
    "refine": Command("tuning.refine", "choose among records inside the network"),
    "records": Command("tuning.records", "merge and check tuning records, list tasks"),
    "meter": Command("meter", "estimate cycles on a Cortex-A or Cortex-M core"),
    "bench": Command("bench", "compare with other runtimes and published times"),
    "mobilenet": Command(
        "compile.mobilenet", "the MobileNetV2 family's parameters and multiply-adds"
    ),
    "sysroot": Command("devices.sysroot", "fetch the systems of emulated boards"),
    "demo": Command("runtime_demo.demo", "build, run and check once, on this machine"),
}
_NAMES = {each.module: name for name, each in COMMANDS.items() if not each.words}
_BY_MODULE = re.compile(
    rf"python\s+-m\s+({'|'.join(map(re.escape, _NAMES))})(?![\w.]*\w)"
)

_SETUP = re.compile("run make setup(?: again)?")


def as_called(text: str) -> str:
    """A text for the user that names commands ``python -m MODULE``, with the names that work here.

    It stays as it is in a checkout, whose folders are links below ``netship/``, unless the command ``netship`` was called.
    """
    if not _is_checkout():
        text = _SETUP.sub("install netship again", text)
    elif "netship" not in Path([*sys.argv, ""][0]).parts[-2:]:
        return text
    return _BY_MODULE.sub(lambda match: f"netship {_NAMES[match[1]]}", text)


def _is_checkout() -> bool:
    return Path(__file__).parent.is_symlink()
