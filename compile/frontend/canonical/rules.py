"""The table of rules, and their application to a graph.

Each rule says what goes wrong without it. tests/test_rewrite.py compares every rule with ONNX Runtime, and fails
when TVM gets the original right after all.
"""

from __future__ import annotations

import onnx

from netship.compile.frontend.absorb import absorb
from netship.compile.frontend.canonical import (
    decompositions,
    dft,
    forms,
    indices,
    recurrent,
    resize,
    rotary,
    sampling,
    unpooling,
    windows,
)
from netship.compile.frontend.canonical.graph import Graph, Rule, refusal
from netship.compile.frontend.canonical.views import join
from netship.compile.frontend.fold import fold, with_nodes
from netship.compile.frontend.names import Unfit
from netship.compile.frontend.quantised.operators import as_qdq
from netship.compile.frontend.shapes import check_sizes
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import shown

_RULES: dict[str, Rule] = {
    "ArgMax": forms.extreme_place,
    "ArgMin": forms.extreme_place,
    "AveragePool": windows.pool,
    "BatchNormalization": forms.batch_normalisation,
    "Cast": forms.cast,
    "Clip": forms.clip,
    "Conv": windows.convolution,
    "ConvTranspose": windows.transposed_convolution,
    "DFT": dft.dft,
    "DeformConv": sampling.deformable_convolution,
    "Div": forms.divide,
    "Dropout": forms.dropout,
    "GRU": recurrent.recurrent,
    "Gather": indices.elements,
    "GatherElements": indices.elements,
    "GatherND": indices.slices,
    "Gelu": decompositions.gelu,
    "GlobalLpPool": windows.global_lp_pool,
    "GlobalMaxPool": windows.global_max_pool,
    "GridSample": sampling.grid_sample,
    "LSTM": recurrent.recurrent,
    "LogSoftmax": decompositions.log_softmax,
    "LpNormalization": decompositions.lp_normalisation,
    "LpPool": windows.lp_pool,
    "MatMul": decompositions.matrix_vector,
    "MaxPool": unpooling.max_pool,
    "MaxUnpool": unpooling.max_unpool,
    "Mean": decompositions.mean,
    "Mod": indices.modulo,
    "Pad": windows.pad,
    "RNN": recurrent.recurrent,
    "Resize": resize.resize,
    "RoiAlign": sampling.roi_align,
    "RotaryEmbedding": rotary.rotary_embedding,
    "Scatter": indices.elements,
    "ScatterElements": indices.elements,
    "ScatterND": indices.slices,
    "Slice": forms.slices,
    "Softmax": decompositions.softmax,
    "Softplus": decompositions.softplus,
    "SpaceToDepth": decompositions.space_to_depth,
    "Split": forms.split,
    "TopK": indices.top,
    "Trilu": decompositions.trilu,
    "Unsqueeze": forms.unsqueeze,
    "Upsample": resize.resize,
    **{
        f"Reduce{kind}": forms.reduction
        for kind in (
            *("L1", "L2", "LogSum", "LogSumExp", "Max"),
            *("Mean", "Min", "Prod", "Sum", "SumSquare"),
        )
    },
}


def canonical(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in the one form of each operator that the compiler knows, and TVM's importer reads rightly.

    Args:
        proto: a static model (every shape known or inferable), one opset of ai.onnx.

    Raises:
        UserError: a form that has no right rewrite, named with its node.
    """
    folded = fold(as_qdq(proto))
    graph = Graph(folded)
    nodes = [new for node in folded.graph.node for new in _rewritten(node, graph)]
    try:
        # Folded again: a rule may compute with constants.
        result = join(absorb(fold(with_nodes(folded, nodes, graph.constants))))
        check_sizes(result)
    except Unfit as error:
        raise UserError(str(error)) from None
    except onnx.shape_inference.InferenceError as error:
        raise UserError(
            f"its operators contradict each other once they are rewritten ({shown(first_line(error), 160)}); "
            "please report the model"
        ) from None
    return result


def _rewritten(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    try:
        return _RULES.get(node.op_type, _unchanged)(node, graph)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # ONNX's checker and inference let operands pass that the operator's definition does not allow.
        why = shown(first_line(error), 120)
        raise refusal(
            node,
            f"its inputs or attributes are not what ONNX defines ({why}); export it again",
        ) from error


def _unchanged(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    return [node]
