"""A C project's estimated cycles as a table, as JSON and as a page."""

from __future__ import annotations

from pathlib import Path

from netship.devices.microcontroller.parts import PARTS
from netship.devices.sessions.session import Origin
from netship.meter import thumb_cycles
from netship.meter.firmware import Inference, Step, meter_version
from netship.targets import templates
from netship.targets.escapes import ending
from netship.targets.escapes import milliseconds as in_ms

_ESTIMATED = ("core_cycles", "code_cycles", "weight_cycles", "cycles", "milliseconds")


def to_json(inference: Inference) -> dict[str, object]:
    """Cycles are those of the part; ``core_cycles`` those of a memory that never waits.

    ``origins`` are those of each figure, ``origin`` of the cycles; ``memories`` are in bytes.
    """
    part = PARTS.get(inference.part)
    milliseconds = _milliseconds(inference)
    return {
        "cpu": inference.cpu,
        "part": inference.part or None,
        "megahertz": inference.megahertz,
        "meter": meter_version(),
        "origin": Origin.ESTIMATED.value,
        "origins": {
            "instructions": Origin.EMULATED.value,
            **dict.fromkeys(_ESTIMATED, Origin.ESTIMATED.value),
        },
        "core_model": thumb_cycles.core(inference.cpu).source,
        "memory_model": part.source if part else None,
        "code": inference.places.code if part else None,
        "weights": inference.places.weights if part else None,
        **_step_json(inference.total, "name"),
        "milliseconds": milliseconds,
        "fits": inference.fits,
        "memories": [
            {**each._asdict(), "lacks": each.lacks} for each in inference.memories
        ],
        "steps": [_step_json(step) for step in inference.steps],
    }


def _step_json(step: Step, *without: str) -> dict[str, object]:
    fields = {**step._asdict(), "cycles": step.cycles}
    return {key: value for key, value in fields.items() if key not in without}


def _milliseconds(inference: Inference) -> float | None:
    clock = inference.megahertz
    return inference.total.cycles / clock / 1e3 if clock else None


def table(inference: Inference) -> str:
    """The estimate for a terminal, steps in the order they run."""
    total, part = inference.total, PARTS.get(inference.part)
    heads = f"{'0 waits':>12} {'code waits':>11} {'weights w.':>11} " if part else ""
    lines = [
        f"{'cycles':>12} {'share':>6} {heads}{'instr.':>12} {'MACs':>11} {'a cycle':>8}  step"
    ]
    for each in (*inference.steps, total):
        rate = f"{each.macs / each.cycles:.2f}" if each.macs else ""
        waits = f"{each.core_cycles:>12,.0f} {each.code_cycles:>11,.0f} {each.weight_cycles:>11,.0f} "
        lines.append(
            f"{each.cycles:>12,.0f} {each.cycles / total.cycles:>6.1%} {waits if part else ''}"
            f"{each.instructions:>12,} {each.macs:>11,} {rate:>8}  {ending(each.name, 60)}"
        )
    columns = "cycles: of the core, as if memory never waited"
    if part:
        columns = "0 waits: core cycles; code waits, weights w.: cycles that code and weights wait for flash"
    lines += [
        "",
        f"columns      {columns}; a cycle: MACs a cycle",
        f"instructions {total.instructions:,}, exact (QEMU), without the call's checks of its pointers",
        f"core         {total.core_cycles / 1e6:.3f} M cycles with a memory that never waits, estimated ({thumb_cycles.core(inference.cpu).source})",
    ]
    milliseconds = _milliseconds(inference)
    if part is None or milliseconds is None:
        return "\n".join([*lines, f"memory       {_no_part(inference.cpu)}"])
    place = f"code in {inference.places.code}, weights in {inference.places.weights}"
    return "\n".join(
        [
            *lines,
            f"memory       {(total.cycles - total.core_cycles) / 1e6:.3f} M cycles of waiting, estimated ({place}; {part.source})",
            f"time         {in_ms(milliseconds)} on {inference.part} at {part.megahertz} MHz, estimated ({total.cycles / 1e6:.3f} M cycles)",
            *filter(None, [_activations(inference), inference.misfit()]),
        ]
    )


def _activations(inference: Inference) -> str:
    """What the sum leaves out, where the build split the arena; empty elsewhere."""
    cycles = inference.activation_cycles
    if not cycles:
        return ""
    return f"activations  {cycles / 1e6:.3f} M cycles more, estimated at the build for the memories that they lie in; not in the sum"


def _no_part(cpu: str) -> str:
    names = [name for name, each in PARTS.items() if each.cpu == cpu]
    advice = (
        f"--part {' or '.join(names)}" if names else "no part with this core is known"
    )
    return f"not estimated; {advice}"


def write_page(inference: Inference, project: Path, path: Path) -> None:
    """Write the estimate as one self-contained HTML page, whole or not at all."""
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("firmware.html.jinja"),
        inference=inference,
        project=project.name,
        part=PARTS.get(inference.part),
        core_model=thumb_cycles.core(inference.cpu).source,
        total=inference.total,
        worst=max(each.cycles for each in inference.steps),
        milliseconds=_milliseconds(inference),
        no_part="" if inference.part else _no_part(inference.cpu),
        filters={"milliseconds": in_ms},
    )
