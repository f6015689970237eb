"""The format ``c``: a C project for a microcontroller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from netship.bundle.golden import Check, stored
from netship.bundle.manifest import Firmware, Preprocessing, Tensor
from netship.compile import passes
from netship.compile.backends.backend import Array, Built, Job
from netship.compile.backends.c import packages
from netship.compile.backends.c.build import build
from netship.compile.backends.companions import Port
from netship.compile.backends.detector import emit as detectors
from netship.compile.backends.dump import Dump
from netship.compile.backends.image import emit as images
from netship.compile.backends.image.emit import Image, byte_values
from netship.compile.backends.request import BuildRequest, Format
from netship.compile.backends.segmentation import emit as segmentation
from netship.compile.backends.verify import Verification, verify_c
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import NHWC, Graph
from netship.compile.passes.layout import channels_first_inputs
from netship.compile.passes.ports import bytes_as_given, integer_ports
from netship.compile.passes.simplify import drop_identities
from netship.devices.microcontroller.regions import of_part
from netship.devices.microcontroller.session import stored_input
from netship.records.lookup import RecordLog
from netship.targets.errors import UserError
from netship.targets.presets import Target
from netship.targets.progress import Progress


class CBackend:
    """See compile.backends.backend.Backend."""

    format: Format = "c"
    engine = "C kernels"
    linked = False
    refused_options: Mapping[str, str] = {
        **dict.fromkeys(
            ("records", "require_tuned"),
            "--records and --require-tuned: {target} takes C source, which is not tuned; leave them out",
        ),
        "threads": "--threads: {target} has one core and no threads; leave it out",
    }

    def check_target(self, target: Target) -> None:
        if not target.microcontroller:
            raise UserError(
                f"--format c: is for microcontrollers, such as --target cortex-m7; not for {target.name}"
            )

    def prepare(self, model: Model, dump: passes.Dump) -> Graph:
        return passes.read(model.proto, passes.FLOATS, dump)

    def name(self, wanted: str) -> str:
        return wanted

    def library(self, name: str) -> str:
        return f"{name}.c"

    def build(self, job: Job, logs: Sequence[RecordLog], progress: Progress) -> Built:
        graph = job.graph
        if any(each.layout == NHWC for each in job.model.inputs):
            names = [each.name for each in job.model.inputs if each.layout == NHWC]
            graph = channels_first_inputs(integer_ports(graph), names)
            how, source = job.preprocessing, job.model.image
            if how and how.inside and source and graph.quantised:
                graph = bytes_as_given(drop_identities(graph), source.name)
        detector = job.task.detector if job.task else None
        segments = job.task is not None and job.task.kind == "segment"
        extras = [
            kind
            for kind, there in (
                ("image", job.preprocessing),
                ("labels", job.labels),
                ("detect", detector),
                ("segment", segments and job.model.image),
            )
            if there
        ]
        built = build(
            graph,
            job.name,
            job.version,
            job.target,
            job.folder,
            job.arena_limit,
            progress,
            job.model.inputs,
            partial(_expected, job),
            Dump(job.dump).graph,
            job.flash_limit,
            extras=extras,
            regions=of_part(job.part, job.target.name) if job.part else job.memory,
        )
        if job.preprocessing and built.firmware:
            image = _image(job, job.preprocessing, built.firmware)
            images.write(job.folder, job.name, job.version, image)
        if job.labels:
            images.write_labels(job.folder, job.name, job.version, job.labels)
        if built.firmware and job.model.image and (detector or segments):
            ports = [
                Port(
                    port.name,
                    port.shape,
                    kept.dtype,
                    True,
                    *((q.scale, q.zero) if (q := kept.quantised) else ()),
                )
                for port, kept in zip(
                    job.model.outputs, built.firmware.outputs, strict=True
                )
            ]
            size, facts = job.model.image.size, (job.folder, job.name, job.version)
            if detector:
                detectors.write(*facts, detector, size, ports)
            elif job.task:
                segmentation.write(*facts, job.task, size, ports[0])
        for kind in dict.fromkeys(job.packages):
            packages.write(job.folder, kind, job.name, job.target.name)
        return built

    def verify(
        self,
        folder: Path,
        checks: Sequence[Check],
        request: BuildRequest,
        progress: Progress,
    ) -> Verification | str:
        return verify_c(folder, checks)


# Of a camera's image of 640×480 for an input of 96×96, half of its columns at a time.
_IMAGE_MEMORY_BYTES = 1 << 12


def _image(job: Job, how: Preprocessing, firmware: Firmware) -> Image:
    tensor = job.model.image
    assert tensor is not None
    index = job.model.inputs.index(tensor)
    number = str(index) if len(job.model.inputs) > 1 else ""
    bytes_of_each = byte_values(how, tensor).reshape(tensor.channels, 256)
    values = stored_input(bytes_of_each, firmware.inputs[index], tensor)
    return Image(how, tensor, number, values, "NHWC", _IMAGE_MEMORY_BYTES, False)


def _expected(job: Job, patterns: Sequence[Array]) -> list[tuple[Array, Array]]:
    """The reference's answers to inputs as the C takes them, with tolerances; both as the C gives the outputs."""
    pairs = zip(patterns, job.model.inputs, strict=True)
    check = job.check(*(_in_order(*each) for each in pairs))
    return [
        (_laid_out(output), _laid_out(tolerance))
        for output, tolerance in zip(check.outputs, check.tolerances, strict=True)
    ]


def _in_order(pattern: Array, wanted: Tensor) -> Array:
    if len(wanted.shape) == 4 and wanted.layout != NHWC:
        batch, channels, height, width = wanted.shape
        pattern = pattern.reshape(batch, height, width, channels)
        pattern = pattern.transpose(0, 3, 1, 2)
    return stored(np.ascontiguousarray(pattern.reshape(wanted.shape)), wanted)


def _laid_out(output: Array) -> Array:
    return (output.transpose(0, 2, 3, 1) if output.ndim == 4 else output).ravel()
