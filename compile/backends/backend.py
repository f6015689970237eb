"""What a build asks of the format that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from netship.bundle.golden import Check
from netship.bundle.manifest import Firmware, Lowering, Preprocessing
from netship.bundle.task import Task
from netship.compile import passes
from netship.compile.backends.request import BuildRequest, Format
from netship.compile.backends.verify import Verification
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import Graph
from netship.devices.microcontroller.regions import Region
from netship.records.lookup import RecordLog
from netship.targets.presets import Target
from netship.targets.progress import Progress

Array = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """A network to build.

    Attributes:
        graph: after the passes that every backend starts from (compile.passes).
        name: the prefix of what is generated.
        version: what the result says of itself.
        folder: that it is written into.
        check: what it must answer to the inputs of an inference, and how near.
        input_ranges: the least and the largest value of each input of the self-test (bundle.golden.input_range).
        preprocessing: of the input that is an image; None where all are data.
        task: what its outputs are for, where that is stated.
        labels: of classes; empty where there are none.
        packages: the ecosystems whose layouts are written too.
        memory, part: the memories of a microcontroller, or the part that has them.
    """

    model: Model
    graph: Graph
    target: Target
    name: str
    version: str
    folder: Path
    check: Callable[..., Check]
    input_ranges: tuple[tuple[float, float], ...]
    preprocessing: Preprocessing | None = None
    task: Task | None = None
    labels: Sequence[str] = ()
    dump: Path | None = None
    arena_limit: int | None = None
    flash_limit: int | None = None
    packages: tuple[str, ...] = ()
    memory: tuple[Region, ...] = ()
    part: str | None = None


class Built(NamedTuple):
    """What was made: how, and of C source its interface."""

    lowering: Lowering
    firmware: Firmware | None = None


class Backend(Protocol):
    """One format.

    Attributes:
        format: its name, on the command line and in the manifest.
        engine: what made the code, for the manifest.
        linked: whether a shared library is made, by our linker.
        refused_options: by a field of the request that means nothing here: why another value than the default is refused.
    """

    format: Format
    engine: str
    linked: bool
    refused_options: Mapping[str, str]

    def check_target(self, target: Target) -> None:
        """Raises: UserError where it makes no code for ``target``."""
        ...

    def prepare(self, model: Model, dump: passes.Dump) -> Graph:
        """The operator graph of a float32 model, in the form that the backend starts from."""
        ...

    def name(self, wanted: str) -> str:
        """What the result is called, where the user or the model wants a name."""
        ...

    def library(self, name: str) -> str:
        """The file that holds the network, of a result called ``name``."""
        ...

    def build(self, job: Job, logs: Sequence[RecordLog], progress: Progress) -> Built:
        """Write the result into ``job.folder``.

        Args:
            logs: tuning records, the ones to prefer first.

        Raises:
            UserError: an operator that it does not take, or a tool that failed.
        """
        ...

    def verify(
        self,
        folder: Path,
        checks: Sequence[Check],
        request: BuildRequest,
        progress: Progress,
    ) -> Verification | str:
        """Run the result on the inputs of ``checks``; or say in words why that cannot be done.

        Raises:
            UserError: an answer is wrong.
        """
        ...
