"""The table of rules, and their application to a graph.

Each rule says what goes wrong without it. tests/test_rewrite.py compares every rule with ONNX Runtime, and fails
when TVM gets the original right after all.
"""

from __future__ import annotations

import onnx

from compile.frontend.canonical import (
    decompositions,
    forms,
    recurrent,
    resize,
    sampling,
    unpooling,
    windows,
)
from compile.frontend.canonical.graph import Graph, Rule
from compile.frontend.fold import fold, with_nodes

_RULES: dict[str, Rule] = {
    "AveragePool": windows.pool,
    "BatchNormalization": forms.batch_normalisation,
    "Clip": forms.clip,
    "Conv": windows.convolution,
    "ConvTranspose": windows.transposed_convolution,
    "DeformConv": sampling.deformable_convolution,
    "Dropout": forms.dropout,
    "GRU": recurrent.recurrent,
    "Gelu": decompositions.gelu,
    "GridSample": sampling.grid_sample,
    "GroupNormalization": decompositions.group_normalisation,
    "LSTM": recurrent.recurrent,
    "LogSoftmax": decompositions.log_softmax,
    "MatMul": decompositions.matrix_vector,
    "MaxPool": unpooling.max_pool,
    "MaxUnpool": unpooling.max_unpool,
    "Mean": decompositions.mean,
    "Pad": windows.pad,
    "RNN": recurrent.recurrent,
    "Resize": resize.resize,
    "RoiAlign": sampling.roi_align,
    "Slice": forms.slice_axes,
    "Softplus": decompositions.softplus,
    "Split": forms.split,
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
    folded = fold(proto)
    graph = Graph(folded)
    nodes = [
        new
        for node in folded.graph.node
        for new in _RULES.get(node.op_type, _unchanged)(node, graph)
    ]
    # Folded again: a rule may compute with constants.
    return fold(with_nodes(folded, nodes, graph.constants))


def _unchanged(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    return [node]
