"""``--dump``: the operator graph after each pass, the Relay module after each, TIR and assembly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netship.compile.ir.graph import Graph, Tensor
from netship.targets.disk import DISK_FULL
from netship.targets.errors import UserError

# What else a build leaves there: compile/backends/engine.py, compile/backends/standalone/emit.py.
_UNNUMBERED = (
    *("kernels.txt", "tir.txt", "model.s", "native.c", "native.s", "kernels.h"),
    *("library.c", "library.h", "runtime.c", "runtime.h", "weights.S", "weights.bin"),
    *("kernels0.o", "kernels1.o", "native.o"),
)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what is written into the dump's folder: an error names the folder."""
    try:
        yield
    except OSError as error:
        advice = "make room there, or give another one"
        if error.errno not in DISK_FULL:
            advice = "give a folder, or one that can be made"
        raise UserError(f"--dump {folder}: {error.strerror}; {advice}") from None


class Dump:
    """Numbered files of one build in a folder."""

    def __init__(self, folder: Path | None, fresh: bool = False) -> None:
        """Go on with the files that are there; ``fresh``: those of an earlier build go. None: nothing is written."""
        self._folder = folder
        self._count = 0
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            present = [
                file
                for kind in ("graph", "relay")
                for file in folder.glob(f"[0-9][0-9]-{kind}-*.txt")
            ]
            others = [folder / name for name in _UNNUMBERED] if present else []
            for old in (*present, *others) if fresh else ():
                old.unlink(missing_ok=True)
            self._count = 0 if fresh else len(present)

    def graph(self, name: str, graph: Graph) -> None:
        """The operator graph that pass ``name`` made."""
        self._write("graph", name, lambda: text_of(graph))

    def module(self, name: str, module: Any) -> None:
        """The Relay module that pass ``name`` made."""
        self._write("relay", name, lambda: module.astext(show_meta_data=False))

    def _write(self, kind: str, name: str, text: Callable[[], str]) -> None:
        if self._folder is None:
            return
        plain = name.replace(" ", "-").replace("_", "-")
        file = f"{self._count:02d}-{kind}-{plain}.txt"
        content = text()
        with writing(self._folder):
            (self._folder / file).write_text(content, encoding="utf-8")
        self._count += 1


def text_of(graph: Graph) -> str:
    """One operator a line: what it makes, of what, its attributes."""
    lines = [f"inputs {', '.join(map(_typed, graph.inputs))}"]
    for operator in graph.operators:
        inputs = ", ".join(_typed(each) if each else "—" for each in operator.inputs)
        attributes = ", ".join(f"{k}={v!r}" for k, v in operator.attributes.items())
        outputs = ", ".join(map(_typed, operator.outputs))
        lines.append(
            f"{outputs} = {operator.kind}({inputs}) {{{attributes}}}  # {operator.name!r}"
        )
    lines.append(f"outputs {', '.join(map(_typed, graph.outputs))}")
    return "\n".join(lines) + "\n"


def _typed(tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape))
    layout = f" {tensor.layout}" if tensor.layout else ""
    constant = " constant" if tensor.value is not None else ""
    steps = ""
    if tensor.quantisation is not None and tensor.quantisation.per_tensor:
        steps = f" scale {tensor.scale!r} zero {tensor.zero}"
    return f"{tensor.name!r}: {tensor.dtype}[{shape}]{layout}{constant}{steps}"
