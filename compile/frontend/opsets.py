"""Which opsets of ONNX are taken, and the newest written in older operators."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper
from onnx.inliner import inline_selected_functions

from netship.compile.frontend.fold import infer, is_onnx, opset
from netship.compile.frontend.limits import MAX_NODES
from netship.compile.frontend.names import Unfit
from netship.compile.frontend.quantised.operators import as_qdq

# 7 is the oldest that ONNX Runtime supports, and the first with NumPy's broadcasting, which Relay has too.
# 28 is the newest of the installed onnx and ONNX Runtime (tests/test_onnx_node_tests.py compares its operators).
OPSETS = range(7, 29)
# Newer models are made this one where they say nothing that it cannot: ONNX Runtime 1.32 has no
# QuantizeLinear of opset 28, nor OneHot or Swish.
_COMMON = 22
# Its attributes are the same, but of real numbers it is what opset 28 only says.
_CHANGED = ("Mod",)
# Operators that ONNX defines by simpler ones, and that neither the rules nor TVM's importer know.
_EXPANDED = (
    *("Attention", "CausalConvWithState", "CenterCropPad", "RMSNormalization"),
    *("SwiGLU", "Swish"),
)
# Nodes that Attention, the largest, becomes; Swish becomes two, CastLike one.
_LARGEST_EXPANSION = 100
_SMALL = ("CastLike", "Swish")


def check_opsets(proto: onnx.ModelProto) -> None:
    if not proto.opset_import or not proto.HasField("graph"):
        raise Unfit("not an ONNX model (no graph or no opset); export it again")
    version = opset(proto)
    if version not in OPSETS:
        raise Unfit(
            f"opset {version} of ai.onnx, this takes {OPSETS[0]} to {OPSETS[-1]}; export with "
            "opset_version=17, or use onnx.version_converter"
        )


def expanded(static: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ONNX's own definitions in the place of some operators that are new, or rare."""
    every = [node.op_type for node in static.graph.node]
    found = [kind for kind in every if kind in (*_EXPANDED, "CastLike")]
    if not found:
        return static
    count = sum(kind not in _SMALL for kind in found)
    if count * _LARGEST_EXPANSION > MAX_NODES:
        raise Unfit(
            f"{count} operators that stand for up to {_LARGEST_EXPANSION} nodes each, "
            f"more than the {MAX_NODES} allowed"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(static)
    for node in copy.graph.node:
        if node.op_type in _EXPANDED:
            _add_defaults(node, opset(static))
    static = copy
    # Definitions use CastLike, whose own needs the types that they give.
    for kinds in (_EXPANDED, ("CastLike",)):
        typed = infer(static)
        # The inliner asks for the type of every input, also of weights and of those left out.
        typed.graph.value_info.extend(
            helper.make_tensor_value_info(name, dtype, None)
            for name, dtype in [
                *((each.name, each.data_type) for each in static.graph.initializer),
                ("", TensorProto.FLOAT),
            ]
        )
        functions = [("", name) for name in kinds]
        static = inline_selected_functions(
            typed, functions, inline_schema_functions=True
        )
        del static.graph.value_info[:]
    return static


def _add_defaults(node: onnx.NodeProto, version: int) -> None:
    """Attributes that a plain definition refers to, and that the inliner would leave without a value."""
    schema = onnx.defs.get_schema(node.op_type, version)
    given = {each.name for each in node.attribute}
    if schema.function_body.node:
        node.attribute.extend(
            each.default_value
            for name, each in schema.attributes.items()
            if name not in given and each.default_value.name
        )


def made_older(static: onnx.ModelProto) -> onnx.ModelProto:
    """The model as opset 22, where its operators mean the same there; else as it is."""
    version = opset(static)
    if version <= _COMMON:
        return static
    older = onnx.ModelProto()
    older.CopyFrom(static)
    for each in older.opset_import:
        if is_onnx(each.domain):
            each.version = _COMMON
    for node in older.graph.node:
        if not is_onnx(node.domain):
            continue
        known = onnx.defs.has(node.op_type, max_inclusive_version=_COMMON)
        if not known or node.op_type in _CHANGED or _says_more(node, version):
            return static
    try:
        infer(as_qdq(older))
    except onnx.shape_inference.InferenceError:
        return static
    return older


def _says_more(node: onnx.NodeProto, version: int) -> bool:
    """Whether it has an attribute that the common opset does not have; those that say the default are taken out."""
    known = onnx.defs.get_schema(node.op_type, _COMMON).attributes
    schema = onnx.defs.get_schema(node.op_type, version).attributes
    for each in [each for each in node.attribute if each.name not in known]:
        default = helper.get_attribute_value(schema[each.name].default_value)
        if helper.get_attribute_value(each) != default:
            return True
        node.attribute.remove(each)
    return False
