"""From a model that passed the gate to Relay."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import onnx

from compile.frontend.canonical.rules import for_relay
from compile.frontend.fold import opset, values
from compile.frontend.names import node_label
from targets.engine import compiler
from targets.errors import UserError
from targets.escapes import shown

# Known to the importer, but not built: their answer changes with every run, or TVM cannot schedule them.
_NOT_BUILT = frozenset(
    [
        "Bernoulli",
        "Hardmax",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ]
)


def to_relay(proto: onnx.ModelProto) -> Any:
    """The model as a Relay module: float32, static, its weights constants.

    Raises:
        UserError: an operator that TVM does not know, a form it cannot import, or an output
            whose shape is not the one ONNX gives it; the node or the output is named.
    """
    tvm = compiler()
    rewritten = for_relay(proto)
    version = opset(rewritten)
    unknown = unsupported(rewritten, version)
    if unknown:
        listed = ", ".join(node_label(node) for node in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{listed}{more}: not an operator that TVM 0.19 can build; replace it before exporting"
        )
    module = _import(tvm, rewritten, version)
    _compare_shapes(module, rewritten)
    return module


def unsupported(proto: onnx.ModelProto, version: int) -> list[onnx.NodeProto]:
    """The nodes whose operator TVM's ONNX importer does not know, in the graph's order."""
    compiler()
    from tvm.relay.frontend import onnx as frontend

    known = frontend._get_convert_map(version).keys() - _NOT_BUILT
    return [node for node in proto.graph.node if node.op_type not in known]


def _import(tvm: Any, proto: onnx.ModelProto, version: int) -> Any:
    known = values(proto.graph)
    # Beforehand: the importer gives nameless nodes names of its own.
    labels = {node.output[0]: node_label(node) for node in proto.graph.node}
    shapes = {each.name: known[each.name].shape for each in proto.graph.input}
    try:
        with warnings.catch_warnings():
            # The importer runs onnx.checker, which rightly objects to for_relay's reductions.
            warnings.simplefilter("ignore")
            module, _ = tvm.relay.frontend.from_onnx(
                proto, shapes, opset=version, freeze_params=True
            )
        return tvm.relay.transform.InferType()(module)
    except Exception as error:
        raise UserError(
            f"{_blamed(error, labels)}: TVM cannot import it ({_reason(error)}); replace it before exporting"
        ) from error


def _blamed(error: BaseException, labels: Mapping[str, str]) -> str:
    """The node that was being converted, read from the importer's own frame; else the graph."""
    trace = error.__traceback__
    blamed = "the graph"
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        if isinstance(node, onnx.NodeProto):
            blamed = labels.get(node.output[0], blamed)
        trace = trace.tb_next
    return blamed


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return shown(last or type(error).__name__, 120)


def _compare_shapes(module: Any, proto: onnx.ModelProto) -> None:
    made = module["main"].checked_type.ret_type
    types = list(getattr(made, "fields", [made]))
    known = values(proto.graph)
    for output, got in zip(proto.graph.output, types, strict=True):
        expected = known[output.name].shape
        actual = tuple(int(dim) if hasattr(dim, "value") else None for dim in got.shape)
        if actual != expected:
            raise UserError(
                f"output {shown(output.name)!r}: TVM gives it the shape {actual}, ONNX {expected}; "
                "this is a fault of the importer: please report the model's operators"
            )
