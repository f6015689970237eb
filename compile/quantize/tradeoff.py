"""Which layers of a network compute in which type: from the fastest to the most accurate choice, step by step.

A model of costs and losses puts the choices in order. What each of them really loses is measured (compile/precision.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Precision = Literal["int8", "float16", "float32"]
Choice = tuple[Precision, ...]
"""The type of each layer, in the order they run."""

# From the least accurate to float32 itself.
PRECISIONS: tuple[Precision, ...] = ("int8", "float16", "float32")
_LEAST_NOISE = 1e-18
# How many neighbouring layers a step changes.
_BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Traded:
    """A layer as the search sees it.

    Attributes:
        costs: of an inference, by the types that it can have; float32 is always one of them.
        losses: what the network loses by the layer's own arithmetic in that type, without the rounding of `Passed`.
    """

    costs: Mapping[Precision, float]
    losses: Mapping[Precision, float]


@dataclass(frozen=True)
class Passed:
    """A tensor between layers, converted once for each other type that reads it.

    Attributes:
        maker: number of a layer; None of the network's input, which is float32.
        readers: numbers of layers; None of the network's output, which is float32.
        loss: what the network loses where the tensor is rounded to int8, because its maker or a reader is int8.
    """

    maker: int | None
    readers: tuple[int | None, ...]
    elements: int
    loss: float = 0.0


@dataclass(frozen=True)
class Tradeoff:
    """A network to choose types for.

    Attributes:
        border: the cost of a value between integers and float; `float_border` of one between two float types.
    """

    layers: Sequence[Traded]
    tensors: Sequence[Passed]
    border: float
    float_border: float

    def cost(self, choice: Choice) -> float:
        """By the model: of all layers and of all conversions between them."""
        own = sum(
            each.costs[kind] for each, kind in zip(self.layers, choice, strict=True)
        )
        return own + sum(self._conversions(each, choice) for each in self.tensors)

    def _cost_of(self, block: Sequence[int], choice: Choice) -> float:
        """Of some layers, and of all conversions that their types are part of."""
        near = {number for k in block for number in self._near[k]}
        own = sum(self.layers[k].costs[choice[k]] for k in block)
        return own + sum(self._conversions(self.tensors[i], choice) for i in near)

    @cached_property
    def _near(self) -> list[list[int]]:
        """By layer, the numbers of the tensors that it makes or reads."""
        near: list[list[int]] = [[] for _ in self.layers]
        for number, each in enumerate(self.tensors):
            for layer in {each.maker, *each.readers} - {None}:
                assert layer is not None
                near[layer].append(number)
        return near

    def _conversions(self, tensor: Passed, choice: Choice) -> float:
        made, *read = self._types(tensor, choice)
        each = sum(
            self.border if "int8" in (made, kind) else self.float_border
            for kind in {*read} - {made}
        )
        return each * tensor.elements

    def uniform(self, precision: Precision) -> Choice:
        """That type wherever it can be had, else the next more accurate one."""
        accurate = PRECISIONS[PRECISIONS.index(precision) :]
        return tuple(
            next(kind for kind in accurate if kind in each.costs)
            for each in self.layers
        )

    def choices(self) -> Iterator[Choice]:
        """From the fastest by the model to float32 everywhere.

        Each step makes neighbouring layers more accurate: those whose noise falls most for what they cost more.
        """
        choice = self.uniform("int8")
        yield choice
        while True:
            best: tuple[float, Choice] | None = None
            for changed, block in self._steps(choice):
                gain = self._noise_of(block, choice) - self._noise_of(block, changed)
                more = self._cost_of(block, changed) - self._cost_of(block, choice)
                # A step that costs nothing comes before all others.
                worth = gain / more if more > 0 else float("inf")
                if gain > 0 and (best is None or worth > best[0]):
                    best = worth, changed
            if best is None:
                return
            choice = best[1]
            yield choice

    def _steps(self, choice: Choice) -> Iterator[tuple[Choice, list[int]]]:
        """Blocks of layers made more accurate: the choice, and the layers."""
        count = len(choice)
        for precision in PRECISIONS[1:]:
            target = self.uniform(precision)
            rises = [
                PRECISIONS.index(after) > PRECISIONS.index(before)
                for before, after in zip(choice, target, strict=True)
            ]
            for length in {min(each, count) for each in _BLOCKS} | {count}:
                for start in range(count - length + 1):
                    block = [k for k in range(start, start + length) if rises[k]]
                    if not block or block[0] != start:
                        continue
                    changed = list(choice)
                    for k in block:
                        changed[k] = target[k]
                    yield tuple(changed), block

    def _noise_of(self, block: Sequence[int], choice: Choice) -> float:
        """Of some layers, and of all roundings to int8 that their types are part of: independent, so squares add up."""
        own = 0.0
        for k in block:
            own += self.layers[k].losses.get(choice[k], 0.0) ** 2
            # What is more accurate is never worth nothing: the last step is float32 everywhere.
            own += _LEAST_NOISE * (len(PRECISIONS) - PRECISIONS.index(choice[k]))
        near = {number for k in block for number in self._near[k]}
        return own + sum(
            self.tensors[i].loss ** 2
            for i in near
            if "int8" in self._types(self.tensors[i], choice)
        )

    def _types(self, tensor: Passed, choice: Choice) -> list[Precision]:
        """Of what makes and of what reads a tensor."""
        ends = (tensor.maker, *tensor.readers)
        return ["float32" if each is None else choice[each] for each in ends]
