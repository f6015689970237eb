"""Networks × precisions × targets, each built and compared: the table of docs/networks.md.

``python -m tests.network_table`` builds every cell and appends a line of JSON for each to docs/networks.jsonl, with the
commit that built it; a second run goes on where the first ended. A line that is removed is built again. ``--write
docs/networks.md`` writes the page from the log. Networks of ``NETSHIP_SHARED`` are taken where they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle, open_bundle
from netship.compile.frontend import gate
from netship.compile.frontend.reference import Reference

ROOT = Path(__file__).parent.parent
TARGETS = (
    *("native", "arm-cortex-a72", "arm-cortex-a76", "arm-cortex-a7"),
    *("cortex-m4", "cortex-m7", "cortex-m55"),
)
# Of each, the first target's build quantises; the others take its QDQ file.
_FAMILIES = (("native",), TARGETS[1:4], TARGETS[4:])
_SHAPES = {"YuNet 128": (1, 3, 128, 128)}
_SECONDS = 900
# Below NETSHIP_SHARED, by the name in the table; those of one precision have it here.
_SHARED = {
    "UltraFace 320": ("detect/ultraface_rfb_320.onnx", ""),
    "YuNet 320": ("detect/yunet_n_320.onnx", ""),
    "YuNet 128": ("detect/yunet_n_dynamic.onnx", ""),
    "DeepLabv3 0.5/513 (.tflite)": (
        "detect/deeplabv3_mnv2_dm05_pascal_uint8.tflite",
        "int8",
    ),
    **{
        f"{title} (.tflite)": (f"tiny/{name}_{kind}.tflite", precision)
        for precision, kind in (("float32", "float"), ("int8", "int8"))
        for title, name in (
            (f"MLPerf Tiny vww, {precision}", "vww_96"),
            (f"MLPerf Tiny ic, {precision}", "ic_resnet8"),
            (f"MLPerf Tiny kws, {precision}", "kws_dscnn"),
            (f"MLPerf Tiny ad, {precision}", "ad_autoencoder"),
        )
    },
}


def models(folder: Path) -> dict[str, tuple[Path, str]]:
    """By name: the file, and its precision where it has one of its own."""
    sys.path.insert(0, str(ROOT / "tests"))
    from more_networks import NETWORKS

    found = {}
    for index, (name, make) in enumerate(NETWORKS.items()):
        path = folder / f"network{index}.onnx"
        onnx.save(make(), path)
        found[name] = (path, "")
    shared = os.environ.get("NETSHIP_SHARED")
    for name, (file, precision) in _SHARED.items():
        if shared and (Path(shared) / file).exists():
            found[name] = (Path(shared) / file, precision)
    return found


def photographs(folder: Path) -> Path:
    """Eight images of smooth noise, for calibration of networks whose weights mean nothing."""
    folder.mkdir()
    for index in range(8):
        random = np.random.default_rng(index)
        small = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((128, 128), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
    return folder


def from_onnx_runtime(bundle: Bundle, reference: Path) -> dict[str, float]:
    """How far the golden outputs are from ONNX Runtime's: in steps of an output, and the share of classes that differ."""
    manifest, model = bundle.manifest, gate.load(reference)
    assert manifest.quantisation is not None
    session, steps, classes = Reference(model), 0.0, 0.0
    for check in read_golden(bundle):
        theirs = session.run(*check.inputs)
        for ours, other, step in zip(
            check.outputs, theirs, manifest.quantisation.output_steps, strict=True
        ):
            if ours.dtype.kind == "f":
                steps = max(steps, float(np.abs(ours - other).max()) / step)
            else:
                classes = max(classes, float((ours != other).mean()))
    return {"steps": steps, "classes": classes}


def build(
    name: str, model: Path, target: str, photos: Path | None, keep: Path
) -> dict[str, Any]:
    """The verdict of one cell.

    Args:
        photos: quantise with them.
        keep: where the QDQ file goes that was made.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "built"
        command = [
            *(sys.executable, "-m", "compile.build", "--model", str(model)),
            *("--target", target, "--output", str(output)),
        ]
        if name in _SHAPES and model != keep:
            command += ["--input-shape", f"input:{','.join(map(str, _SHAPES[name]))}"]
        if photos is not None:
            options = ("--quantize", "int8", "--calibration", str(photos))
            command += [*options, "--accept-loss"]
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"verdict": "slow", "why": f"not built in {_SECONDS} s"}
        seconds = round(time.monotonic() - started, 1)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            why = said.replace(str(model), model.name)
            return {"verdict": "refused", "why": why, "seconds": seconds}
        bundle = open_bundle(output)
        manifest, reference = bundle.manifest, output / "reference/quantised.onnx"
        if photos is not None:
            shutil.copyfile(reference, keep)
        checked = manifest.measured["verification"]
        if checked is None:
            why = manifest.measured["not_verified_because"]
            return {"verdict": "not compared", "why": why, "seconds": seconds}
        firmware = manifest.firmware
        found = {}
        if manifest.quantisation is not None:
            found = from_onnx_runtime(bundle, model if photos is None else reference)
            # The device's own distance from the golden outputs.
            found["steps"] += (
                checked["max_abs_error"] / manifest.quantisation.output_steps[0]
            )
        return {
            "verdict": "right",
            "why": "",
            "seconds": seconds,
            "error": checked["max_abs_error"],
            "origin": checked["origin"],
            "islands": manifest.lowering.reason,
            "arena": firmware.arena_bytes if firmware else None,
            **found,
        }


def cells(networks: dict[str, tuple[Path, str]]) -> Iterator[tuple[str, str, str]]:
    for name, (_, own) in networks.items():
        for precision in (own,) if own else ("float32", "int8"):
            for target in TARGETS:
                yield name, precision, target


def made() -> dict[str, str]:
    """The commit and the day of a build."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {"commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def page(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The Markdown of docs/networks.md: the targets for which every network was built."""
    commits = sorted({(row["date"], row["commit"]) for row in rows.values()})
    names = dict.fromkeys((name, precision) for name, precision, _ in rows)
    targets = [x for x in TARGETS if all((*name, x) in rows for name in names)]
    lines = [
        *("# Networks", "", "```"),
        "python -m tests.network_table --write docs/networks.md",
        *("```", ""),
        "Every cell is a build, which compares its answers with the reference on at least four inputs: on this machine",
        "(native and C for Cortex-M), or on an emulated board (Cortex-A). A float32 cell has the largest error over all",
        "outputs; an int8 cell the largest difference from ONNX Runtime on the same QDQ file, in steps of the output, and of",
        "classes the share that differs. A dash is explained below. The networks have seeded weights, but for UltraFace,",
        "YuNet, DeepLabv3 and MLPerf Tiny's. A network is quantised once for native, once for Cortex-A and once for",
        "Cortex-M.",
        f"Made at {', '.join(f'{commit} ({date})' for date, commit in commits)}.",
        "",
        "| network | precision | " + " | ".join(targets) + " |",
        "|---|---|" + "--:|" * len(targets),
    ]
    reasons: dict[str, list[str]] = {}
    for name, precision in names:
        shown = []
        for target in targets:
            row = rows[name, precision, target]
            if row["verdict"] != "right":
                shown.append("–")
                why = re.sub(r"^error: ", "", row["why"])
                reasons.setdefault(f"{name}, {precision}: {why}", []).append(target)
            elif precision == "int8":
                classes = f", {row['classes']:.2%}" if row["classes"] else ""
                shown.append(f"{row['steps']:.3g}{classes}")
            else:
                shown.append(f"{row['error']:.1e}")
        lines.append(f"| {name} | {precision} | " + " | ".join(shown) + " |")
    lines += ["", "## Cells without a figure", ""]
    lines += [f"- {place} ({', '.join(where)})" for place, where in reasons.items()]
    if not reasons:
        lines.append("There is none.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, default=ROOT / "docs/networks.jsonl")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="part of a network's name")
    arguments = parser.parse_args()
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    if arguments.log.exists():
        for line in arguments.log.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["network"], row["precision"], row["target"]] = row
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        networks, photos = models(folder), photographs(folder / "photos")
        for name, precision, target in cells(networks):
            if (name, precision, target) in rows or arguments.only not in name:
                continue
            if target not in arguments.targets.split(","):
                continue
            model, own = networks[name]
            given, family = None, next(k for k in _FAMILIES if target in k)
            keep = folder / f"{list(networks).index(name)}-{family[0]}.onnx"
            if precision == "int8" and not own:
                given = None if keep.exists() else photos
                model = keep if keep.exists() else model
            verdict = build(name, model, target, given, keep)
            row = {"network": name, "precision": precision, "target": target, **made()}
            rows[name, precision, target] = row | verdict
            with arguments.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row | verdict) + "\n")
            print(name, precision, target, verdict["verdict"], verdict["why"][:120])
    if arguments.write:
        arguments.write.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
