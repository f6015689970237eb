"""Rewrites of the operator graph, from what the model says to what a backend's kernels run: the whole list is here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx

from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, check
from netship.compile.passes import integers, movement, simplify, tables, weights

Pass = Callable[[Graph], Graph]
Dump = Callable[[str, Graph], None]


def no_dump(name: str, graph: Graph) -> None:
    """Where nobody wants to see what passes make."""


# Of a QDQ graph: integers in the place of what lies between DequantizeLinear and QuantizeLinear.
INTEGERS: tuple[Pass, ...] = (
    simplify.drop_identities,
    integers.absorb_constants,
    simplify.fold_constants,
    simplify.matmul_as_gemm,
    simplify.matmul_as_convolution,
    simplify.mean_as_pool,
    simplify.one_dimension_as_two,
    simplify.fold_limits,
    simplify.dense_as_convolution,
    movement.dequantise_later,
    movement.quantise_earlier,
    integers.as_stored,
    tables.as_tables,
    integers.to_integers,
    weights.split_wide_weights,
    simplify.drop_identities,
    simplify.unfold_limits,
)
# Of a float32 graph, for kernels of ours; TVM has its own.
FLOATS: tuple[Pass, ...] = (
    simplify.drop_identities,
    simplify.fold_normalisation,
    simplify.matmul_as_gemm,
    simplify.mean_as_pool,
    simplify.one_dimension_as_two,
    simplify.fold_limits,
    simplify.dense_as_convolution,
    simplify.drop_identities,
)


def read(proto: onnx.ModelProto, passes: Iterable[Pass], dump: Dump = no_dump) -> Graph:
    """The operator graph of a model that passed the gate, after the passes."""
    graph = onnx_form.read(proto)
    dump("read", graph)
    return run(passes, graph, dump)


def run(passes: Iterable[Pass], graph: Graph, dump: Dump = no_dump) -> Graph:
    """The graph after each pass in turn, each of which is checked.

    Args:
        dump: called with each pass's name and what it made.
    """
    for each in passes:
        graph = each(graph)
        check(graph)
        dump(each.__name__, graph)
    return graph
