"""Weights on their way into the second-level cache while those before them are multiplied.

Between two inferences the weights of a layer leave the caches of a core: a network has more of them than fit. A kernel
that goes through its weights block by block, each for many pixels, then waits for each block's first pixels and has its
loads idle for the others. This pass lets it fetch the next block meanwhile, spread over the loops that use the present
one. Tuning compiles its candidates so too, and so finds the loops that gain by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from netship.targets import engine

tvm = engine.compiler()
from tvm import tir

# float32 values of a cache line.
LINE = 16
# Fewer values than this arrive while a kernel starts.
_FEW = 8192
# Lines fetched in a row: about what a first-level cache can wait for (12 on Skylake, 16 on Golden Cove: Intel's
# Optimization Reference Manual, tables of load ports and fill buffers).
_MOST = 12
# Multiply-adds of vectors for each line that is fetched meanwhile.
_WORK = 4
# Times that each weight is loaded, at least: otherwise there is nothing to hide its way behind.
_USES = 2
# Operands of LLVM's prefetch: read, into the second level, data.
_READ, _SECOND_LEVEL, _DATA = 0, 2, 1
# After TVM's own unrolling and simplification.
_LAST_PHASE = 3


def passes(target: Any) -> dict[str, Any]:
    """The part of a PassContext's configuration that adds the pass; empty where no gain was measured.

    Args:
        target: TVM's.
    """
    if not str(target.attrs.get("mtriple", "")).startswith("x86_64"):
        return {}
    # Its search for common subexpressions, before this phase, would hide the indices. LLVM finds them itself.
    return {
        "tir.disable_cse_tir": True,
        "tir.add_lower_pass": [(_LAST_PHASE, _PASS)],
    }


class Walk(NamedTuple):
    """How an innermost loop goes through its weights.

    Attributes:
        first: the index of the block's first value, of the loops' variables.
        block: values from one block of weights to the next.
        over: the loop from block to block, and how many of its steps share a block.
        inner: the loops below it, outermost first.
        lines: of weights that one turn of the innermost loop reads.
    """

    first: Any
    block: int
    over: tuple[Any, int]
    inner: list[Any]
    lines: int


def _transform(function: Any, _module: Any, _context: Any) -> Any:
    sizes = {
        buffer.data: prod(int(size) for size in buffer.shape)
        for buffer in function.buffer_map.values()
    }
    loops: list[Any] = []
    # Of each of `loops`, whether another is in it.
    outer: list[bool] = []

    def enter(loop: Any) -> None:
        outer[-1:] = [True] if outer else []
        outer.append(False)
        loops.append(loop)

    def leave(loop: Any) -> Any:
        loops.pop()
        return None if outer.pop() else _fetching([*loops, loop], sizes)

    body = tir.stmt_functor.ir_transform(function.body, enter, leave, ["tir.For"])
    return function.with_body(body)


_PASS = tir.transform.prim_func_pass(_transform, opt_level=0, name="prefetch_weights")


def _fetching(loops: list[Any], sizes: dict[Any, int]) -> Any | None:
    """The innermost of ``loops`` with the fetching of weights in it; None where it cannot gain."""
    loop = loops[-1]
    stores = _stores(loop.body)
    loads = _weights(stores, sizes)
    if not (loads and all(map(_has_fixed_place, stores))):
        return None
    walk = _walk(loops, loads)
    if walk is None:
        return None
    variable, steps = walk.over
    trips = prod(int(each.extent) for each in walk.inner)
    share = -(-walk.block // (LINE * steps))
    lines = -(-share // trips)
    if lines > _MOST or lines * _WORK > len(loads):
        return None
    if trips * steps * walk.lines * LINE < _USES * walk.block:
        return None
    trip = tir.IntImm(loop.loop_var.dtype, 0)
    for each in walk.inner:
        trip = trip * int(each.extent) + each.loop_var
    # Trips that are left over when all is fetched fetch the last lines again.
    trip = tir.min(trip, -(-share // lines) - 1)
    ahead = walk.first + walk.block + (variable % steps * share + trip * lines) * LINE
    fetches = [_fetch(loads[0].buffer, ahead + i * LINE) for i in range(lines)]
    return tir.For(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        tir.SeqStmt([*fetches, loop.body]),
        loop.thread_binding,
        loop.annotations,
    )


def _walk(loops: list[Any], loads: list[Any]) -> Walk | None:
    """How ``loads`` move through the weights; None where no loop takes them from block to block.

    None too among loops whose extents are not fixed, as those of compile/relay/ops/rows.py.
    """
    begin = dict.fromkeys((loop.loop_var for loop in loops), 0)
    bases = [load.indices[0].base for load in loads]
    try:
        extents = [int(loop.extent) for loop in loops]
        used = {_value(base, begin) // LINE for base in bases}
        first = min(bases, key=lambda base: _value(base, begin))
        for depth, loop in enumerate(loops[:-1]):
            starts = [
                _value(first, begin | {loop.loop_var: step})
                for step in range(extents[depth])
            ]
            if len(set(starts)) > 1:
                break
        else:
            return None
    except TypeError:
        return None
    steps = next(i for i, start in enumerate(starts) if start != starts[0])
    block = starts[steps] - starts[0]
    moves = [b - a == block for a, b in zip(starts, starts[steps:], strict=False)]
    if block < LINE or sum(moves) * 2 < len(moves):
        return None
    inner = loops[depth + 1 :]
    first = tir.stmt_functor.substitute(
        first, {each.loop_var: tir.IntImm(each.loop_var.dtype, 0) for each in inner}
    )
    return Walk(first, block, (loop.loop_var, steps), inner, len(used))


def _stores(body: Any) -> list[Any]:
    found: list[Any] = []
    tir.stmt_functor.ir_transform(body, found.append, None, ["tir.BufferStore"])
    return found


def _weights(stores: list[Any], sizes: dict[Any, int]) -> list[Any]:
    """The vectors of one large input that are multiplied by one value each, as a convolution's weights are."""
    found: list[Any] = []
    values = [store.value for store in stores]
    while values:
        value = values.pop()
        if isinstance(value, tir.Add):
            values += [value.b, value.a]
        elif (
            isinstance(value, tir.Mul)
            and isinstance(value.a, tir.Broadcast)
            and isinstance(value.b, tir.BufferLoad)
            and isinstance(value.b.indices[0], tir.Ramp)
            and sizes.get(value.b.buffer.data, 0) >= _FEW
        ):
            found.append(value.b)
    return [load for load in found if load.buffer.data.same_as(found[0].buffer.data)]


def _has_fixed_place(store: Any) -> bool:
    """Whether LLVM keeps what is stored there in a register, across a prefetch too."""
    (index,) = store.indices
    return isinstance(index.base if isinstance(index, tir.Ramp) else index, tir.IntImm)


def _fetch(buffer: Any, index: Any) -> Any:
    address = tir.address_of(tir.BufferLoad(buffer, [index]))
    return tir.Evaluate(
        tir.call_intrin("int32", "tir.prefetch", address, _READ, _SECOND_LEVEL, _DATA)
    )


def _value(expression: Any, at: dict[Any, int]) -> int:
    """An index where the loops' variables have the values ``at``; TypeError of another than integer arithmetic on them."""
    if isinstance(expression, tir.IntImm):
        return int(expression.value)
    if isinstance(expression, tir.Var) and expression in at:
        return at[expression]
    operation = _ARITHMETIC.get(type(expression))
    if operation is None:
        raise TypeError(f"{expression} is no index of loops")
    return operation(_value(expression.a, at), _value(expression.b, at))


_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    tir.Add: operator.add,
    tir.Sub: operator.sub,
    tir.Mul: operator.mul,
    tir.FloorDiv: operator.floordiv,
    tir.FloorMod: operator.mod,
    tir.Min: min,
    tir.Max: max,
}
