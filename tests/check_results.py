"""Results of a check as a report gets them, and the page that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from netship.bundle.accuracy import Accuracy, Swap, Worst
from netship.bundle.manifest import (
    Golden,
    Group,
    Lowering,
    Manifest,
    ModelIdentity,
    Preprocessing,
    Records,
    TargetIdentity,
    Tensor,
)
from netship.bundle.store import Bundle
from netship.devices.sessions.session import OperatorTime, Origin
from netship.runtime_demo.report import write_report
from netship.runtime_demo.result import Answer, CheckResult, InputResult, Latency

LABELS = ["ash", "birch", "<script>alert('cedar')</script>", "dogwood", "elm"]
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Checks that every tag is closed where it should be, and keeps text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def photographs(self) -> int:
        return sum(v.startswith("data:image/jpeg;base64,") for _, v in self.attributes)


def manifest(**changes: Any) -> Manifest:
    return Manifest(
        **{
            "model": ModelIdentity(name="trees.onnx", sha256="ab" * 32),
            "target": TargetIdentity(
                name="znver4", tvm="llvm -mcpu=znver4", machine="x86_64"
            ),
            "engine": "Engine 0.19",
            "threads": 3,
            "inputs": (Tensor(name="image", shape=(1, 3, 8, 8), layout="NCHW"),),
            "outputs": (Tensor(name="scores", shape=(1, 5)),),
            "probabilities": False,
            "preprocessing": Preprocessing(
                resize=8, crop=(8, 8), scale=1, mean=(0,), std=(1,)
            ),
            "labels": "labels.txt",
            "lowering": Lowering(
                layout="NHWC",
                reason="tuning records cover all 7 tasks",
                records=Records(
                    file="znver4.json", measured="on a Zen core", tasks=7, covered=7
                ),
                operators={"nn.conv2d": 1},
                groups=(
                    Group(
                        name="fused_conv",
                        operators=("nn.conv2d", "add"),
                        output_shape=(1, 5, 1, 1),
                        macs=2_000_000,
                    ),
                ),
                workspace_bytes=1_230_000,
            ),
            "golden": (
                Golden(
                    inputs=("golden/in",),
                    outputs=("golden/out",),
                    tolerances=("golden/near",),
                ),
            ),
            "files": {
                name: "0" * 64
                for name in (
                    "model.so",
                    "labels.txt",
                    "golden/in",
                    "golden/out",
                    "golden/near",
                )
            },
            "measured": {
                "built_on": "a build machine",
                "library_bytes": 4_560_000,
                "verification": {
                    "origin": "emulated",
                    "inputs": 2,
                    "relative_error": 3e-7,
                },
            },
            **changes,
        }
    )


def an_input(
    path: Path | None,
    ours: int = 0,
    reference: int = 0,
    relative: float = 1e-6,
    expected: int | None = None,
    name: str = "",
) -> InputResult:
    def five(best: int, probability: float) -> tuple[Answer, ...]:
        order = [best, *(i for i in range(5) if i != best)]
        return tuple(Answer(i, LABELS[i], probability) for i in order)

    return InputResult(
        name=name or (path.name if path else "golden input 0"),
        path=path,
        ours=five(ours, 0.873),
        reference=five(reference, 0.651),
        accuracy=Accuracy(
            relative * 20,
            relative * 5,
            relative,
            0.999,
            Worst(0, (0, 0), 1.0, 1.0, relative / 2e-4),
        ),
        gap=4.5e-5,
        swap=Swap(ours, reference, 4.5e-5, 6e-5) if ours != reference else None,
        expected=expected,
        errors=np.array([0.0, relative, relative * 20]),
    )


def a_result(
    folder: Path, inputs: Sequence[InputResult], **changes: Any
) -> CheckResult:
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    return replace(
        CheckResult(
            bundle=Bundle(folder, manifest()),
            compared="images",
            origin=Origin.HOST,
            threads=2,
            labels="labels.csv",
            reference="onnxruntime 9",
            inputs=tuple(inputs),
            latency=Latency.of([0.0125, 0.0126, 0.0130]),
            reference_latency=Latency.of([0.0250, 0.0252, 0.0260]),
            operators=(
                OperatorTime("tvmgen_default_fused_conv", (1, 5, 1, 1), 4e-4),
                OperatorTime("tvmgen_default_fused_other", (1, 5), 1e-4),
            ),
        ),
        **changes,
    )


def written(result: CheckResult, folder: Path) -> Page:
    path = folder / "report.html"
    write_report(result, path)
    return Page(path.read_text(encoding="utf-8"))
