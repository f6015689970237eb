"""The format ``standalone``: a C library that needs no TVM."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from netship.bundle.manifest import MemoryPlan
from netship.compile.backends.backend import Built, Job
from netship.compile.backends.bundle import BundleBackend
from netship.compile.backends.engine import EngineJob
from netship.compile.backends.image.emit import Image, byte_values
from netship.compile.backends.request import Format
from netship.compile.backends.standalone.emit import (
    Answer,
    Standalone,
    emit,
    self_test_input,
)
from netship.records.lookup import RecordLog
from netship.targets.errors import UserError
from netship.targets.escapes import listed, shown
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.compile.relay.convert import Converted
    from netship.compile.relay.lower import Lowered


# What TVM does by functions of its runtime.
_SORTS = {"NonMaxSuppression", "TopK"}


class StandaloneBackend(BundleBackend):
    """See compile.backends.backend.Backend."""

    format: Format = "standalone"
    _needs_system = False

    def name(self, wanted: str) -> str:
        return wanted

    def library(self, name: str) -> str:
        return f"lib{name}.so"

    def build(self, job: Job, logs: Sequence[RecordLog], progress: Progress) -> Built:
        ranges, image = job.input_ranges, job.model.image
        detector = job.task.detector if job.task else None
        segments = job.task is not None and job.task.kind == "segment"
        pairs = zip(ranges, job.model.inputs, strict=True)
        check = job.check(*(self_test_input(*each, port) for each, port in pairs))
        wanted = Standalone(
            name=job.name,
            model=job.model.identity.name,
            version=f"{job.version}, by Apache TVM 0.19",
            ranges=ranges,
            answers=tuple(
                Answer(port.name, *(tuple(each.ravel().tolist()) for each in pair))
                for port, *pair in zip(
                    job.model.outputs, check.outputs, check.tolerances, strict=True
                )
            ),
            image=_image(job),
            labels=job.labels,
            detector=detector,
            segmentation=job.task if image and segments else None,
            input_size=image.size if (detector or segments) and image else (0, 0),
        )
        return self._compile(job, logs, progress, partial(link, wanted), job.name)


# Of a photograph of 4000 pixels a side for an input of 224.
_IMAGE_MEMORY_BYTES = 1 << 15


def _image(job: Job) -> Image | None:
    tensor, how = job.model.image, job.preprocessing
    if tensor is None or how is None:
        return None
    number = str(job.model.inputs.index(tensor)) if len(job.model.inputs) > 1 else ""
    values = byte_values(how, tensor)
    return Image(how, tensor, number, values, tensor.layout, _IMAGE_MEMORY_BYTES, True)


def link(
    wanted: Standalone, lowered: Lowered, network: Converted, job: EngineJob
) -> MemoryPlan:
    """Write the network as C, and link it with its kernels and weights."""
    from netship.compile.program.program import read_program
    from netship.compile.relay.describe import workspaces

    factory = lowered.factory
    program = read_program(
        factory.get_graph_json(),
        factory.get_params(),
        lowered.description.groups,
        workspaces(factory),
    )
    # The outer module only registers the kernels with TVM's C runtime; they are inside.
    with tempfile.TemporaryDirectory() as scratch:
        kernels = []
        for number, inner in enumerate(factory.get_lib().imported_modules):
            kernels.append(Path(scratch) / f"kernels{number}.o")
            inner.save(str(kernels[-1]))
            if b"TVMFuncCall" in kernels[-1].read_bytes():
                sorting = [
                    f"node {shown(each.label)!r} ({each.kind})"
                    for each in job.graph.operators
                    if each.kind in _SORTS
                ]
                raise UserError(
                    f"{listed(sorting, 3) or 'an operator'}: sorts, which takes TVM's runtime; use --format bundle, "
                    "or end the network before it"
                )
        if network.source is not None:
            kernels.append(Path(scratch) / "native.o")
            network.source.compile(kernels[-1])
        folder = job.library.parent
        return emit(folder, wanted, program, kernels, job.target, job.dump)
