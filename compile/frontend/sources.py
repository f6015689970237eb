"""What ``--model`` means: a file, a member of the built-in family, or a Model Zoo network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from netship.bundle.manifest import ModelIdentity, Preprocessing
from netship.compile.frontend import dense, family, gate, zoo
from netship.compile.frontend.model import Model
from netship.compile.frontend.preprocessing import Layout, Overrides, load_sidecar
from netship.targets.errors import UserError
from netship.targets.escapes import shown


@dataclass(frozen=True)
class Source:
    """A gated model with what is known of it by its origin.

    Attributes:
        name: for people and for the output folder.
        preprocessing: the built-in or Model Zoo network's own, or what a quantised .tflite image says; None for other
            files.
        overrides: what a TOML file next to the model says.
        note: what the user must know of its weights or its preprocessing; empty for an ONNX file.
        trained: whether the weights mean something, so that int8's loss against float32 is worth judging.
    """

    name: str
    model: Model
    preprocessing: Preprocessing | None
    overrides: Overrides
    note: str
    trained: bool = True


def find(
    text: str,
    input_shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    on_progress: Callable[[str], None],
) -> Source:
    """Find, fetch or build the model that ``--model TEXT`` names, and pass it through the gate.

    Raises:
        UserError: no such model, or the gate refused it.
    """
    path = Path(text)
    if text in zoo.MODELS and not path.exists():
        path = zoo.fetch(
            text,
            lambda done, size: on_progress(
                f"downloading {text}, {done * 100 // size} %"
            ),
        )
        model = gate.load(path, input_shapes, "NCHW")
        note = "the ONNX Model Zoo's trained network"
        return Source(text, model, zoo.MODELS[text].preprocessing, Overrides(), note)
    if is_built_in(text) and not path.exists():
        return _built_in(text)
    if re.fullmatch(r"[\w-]+(\.\d[^.]*)*", text) and not path.exists():
        # Without a file's suffix it is meant as a name.
        names = ", ".join((*dense.FORMS, *zoo.MODELS))
        raise UserError(
            f"--model {shown(text)}: no such file or network; networks by name: {names}; write for example {family.DEFAULT}"
        )
    overrides = load_sidecar(path)
    model = gate.load(path, input_shapes, layout or overrides.layout)
    name = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.") or "model"
    if model.pixels is None or not model.inputs[0].is_image:
        return Source(name, model, None, overrides, "")
    low, high = model.pixels
    own = family.preprocessing(*model.inputs[0].size).model_copy(
        update={"scale": (high - low) / 255, "mean": (-low,), "std": (1.0,)}
    )
    note = f"preprocessing by default: pixels are the stored values of the input, {own.formula()}"
    return Source(name, model, own, overrides, note)


def is_built_in(text: str) -> bool:
    """Whether ``--model TEXT`` names a network whose weights are seeded, where no file has that name."""
    named = r"(?:(?:ssdlite|deeplabv3)-)?mobilenetv2-[^/.]+\.?[^/]*-[^/.]+"
    return re.fullmatch(named, text) is not None


def _built_in(name: str) -> Source:
    network = dense.parse(name)
    proto = network.build()
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    identity = ModelIdentity(name=name, sha256=digest)
    answers = "its boxes and scores" if network.head == "ssdlite" else "its labels"
    note = f"built-in, seeded weights: {answers} mean nothing"
    model = gate.check(proto, identity, {}, "NCHW")
    own = network.preprocessing()
    return Source(name, model, own, Overrides(), note, trained=False)
