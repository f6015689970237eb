"""``--dump``: the operator graph after each pass, the Relay module after each, TIR and assembly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from compile.ir.graph import Graph, Tensor
from targets.errors import UserError


class Dump:
    """Numbered files of one build in a folder."""

    def __init__(self, folder: Path | None, fresh: bool = False) -> None:
        """Go on with the files that are there; ``fresh``: those of an earlier build go. None: nothing is written."""
        self._folder = folder
        self._count = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--dump {folder}: {error.strerror}; give a folder, or one that can be made"
                ) from None
            present = [
                file
                for kind in ("graph", "relay")
                for file in folder.glob(f"[0-9][0-9]-{kind}-*.txt")
            ]
            for old in present if fresh else ():
                old.unlink()
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
        (self._folder / file).write_text(text(), encoding="utf-8")
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
