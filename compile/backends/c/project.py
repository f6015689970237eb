"""A network ready to be written as C: its steps, and the memory that the C calls by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from netship.bundle.manifest import Tensor as Given
from netship.bundle.manifest import image_of
from netship.compile.backends.c.arrange import Arranged
from netship.compile.backends.c.ports import InputPort, Port, base_of, input_port
from netship.compile.backends.c.steps import Step
from netship.compile.ir.graph import Graph
from netship.compile.program.planner import Plan
from netship.devices.microcontroller.regions import Region
from netship.targets.cores import CORES, Core


class Space(NamedTuple):
    """A part of the plan that the generated function has a pointer to.

    Attributes:
        pointer, base, macro: what the C calls it, its values, and its bytes.
        begin, nbytes: of the plan.
        memory: that it is for; empty where the caller decides.
    """

    pointer: str
    base: str
    macro: str
    begin: int
    nbytes: int
    memory: str = ""


@dataclass(frozen=True)
class Project:
    """A network ready to be written: what it is called and says of itself, its steps and their memory."""

    name: str
    version: str
    cpu: str
    graph: Graph
    arranged: Arranged
    given: Sequence[Given]  # The model's inputs.
    extras: Sequence[str] = ()  # What else belongs to it: see compile.backends.c.build.
    regions: Sequence[Region] = ()  # The memories that were asked for.

    @property
    def core(self) -> Core:
        return CORES[self.cpu]

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.arranged.steps

    @property
    def plan(self) -> Plan:
        return self.arranged.plan

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The arena, or its part in each memory: the first has the name of all."""
        found: list[Space] = []
        for arena in self.plan.arenas:
            pointer = f"arena_{arena.name}" if found else "arena"
            names = (pointer, base_of(pointer), pointer.upper())
            found.append(Space(*names, arena.begin, arena.nbytes, arena.name))
        return tuple(found) or (Space("arena", "base", "ARENA", 0, self.plan.nbytes),)

    def space(self, begin: int) -> Space:
        """The one in which an offset of the plan lies."""
        return [x for x in self.spaces if x.begin <= begin][-1]

    @property
    def floating(self) -> bool:
        """Whether it works on float32, not on int8."""
        return not self.graph.quantised

    @property
    def dtype(self) -> str:
        """Of the values that the kernels work on."""
        return "float32" if self.floating else "int8"

    @property
    def inputs(self) -> tuple[InputPort, ...]:
        tensors = self.graph.inputs
        numbers = map(str, range(len(tensors))) if len(tensors) > 1 else [""]
        offsets = [self.plan.offsets[self.arranged.owner(each)] for each in tensors]
        spaces = [self.space(each) for each in offsets]
        offsets = [x - space.begin for x, space in zip(offsets, spaces, strict=True)]
        images = [each is image_of(self.given) for each in self.given]
        pointers = [each.pointer for each in spaces]
        ports = map(InputPort, tensors, numbers, offsets, self.given, images, pointers)
        return tuple(input_port(self.name, each, self.dtype) for each in ports)

    @property
    def outputs(self) -> tuple[Port, ...]:
        if len(self.graph.outputs) == 1:
            return (Port(self.graph.outputs[0], ""),)
        return tuple(Port(each, str(i)) for i, each in enumerate(self.graph.outputs))

    @property
    def exact(self) -> bool:
        """Whether every device gives the same bits: integers, and no function of libm between them."""
        tensors = self.graph.tensors.values()
        return all(each.dtype != "float32" for each in tensors if each.value is None)
