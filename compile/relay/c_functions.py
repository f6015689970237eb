"""C for any operators, by TVM: what its importer knows, as plain loops that need libc's mathematics only.

A function gets pointers to its inputs, to constants that are no single number, to its outputs and to scratch memory.
Between its operators no value that is read once is stored. Images lie in memory as their tensors' layouts say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from netship.compile.ir.graph import NHWC, Array, Tensor
from netship.compile.ir.islands import CFunction, Island
from netship.compile.program.planner import aligned
from netship.compile.relay import generic
from netship.targets import engine
from netship.targets.errors import UserError, reason
from netship.targets.escapes import C_TYPES, c_float, shown

tvm = engine.compiler()
from tvm import relay, te, tir

_ALIGNMENT = 8
# Arrays of at most these bytes lie on the stack.
_ON_STACK = 64
# Operators in one expression.
_MOST = 64
# Where TVM's expressions have others.
_PARTS = (
    *("a", "b", "value", "condition", "true_value", "false_value"),
    *("args", "indices", "source"),
)
# Calls that cost next to nothing; a value that needs another, or a division, is not computed twice.
_CHEAP = {
    "tir.if_then_else",
    "tir.likely",
    "tir.bitwise_and",
    "tir.shift_left",
    "tir.shift_right",
    "tir.fabs",
    "tir.trunc",
}
# Functions that TVM cannot write, by their names in C.
_UNKNOWN = {"tir.fabs": "fabs", "tir.trunc": "trunc"}
# "stackvm" has no schedules of its own, so that TOPI gives the plain computation.
_PLAIN, _C = "stackvm", "c"


def c_functions(
    islands: Sequence[Island], opset: int, stage: Callable[[str], None] = lambda _: None
) -> list[CFunction]:
    """A function for each island.

    Raises:
        UserError: an operator that TVM does not know, or has no C for; it is named.
    """
    return [_function(each, opset) for each in islands]


def _function(island: Island, opset: int) -> CFunction:
    if island.operators[0].kind == "TopK":
        return CFunction(_top(island), (), 0)
    try:
        expression, arguments = _expression(island, opset)
        module, constants = _without_constants(expression, arguments)
        primitive = module["main"].with_attr("Primitive", tir.IntImm("int32", 1))
        with tvm.target.Target(_PLAIN):
            lowered = tvm.get_global_func("relay.backend.LowerToTE")(primitive)
        lowest, scratch = _lowered(
            list(lowered.inputs), list(lowered.outputs), island.name
        )
        text = _text(lowest, island.name, len(arguments) + len(constants))
    except UserError:
        raise
    except Exception as error:
        kinds = " + ".join(each.kind for each in island.operators)
        label = shown(island.operators[-1].label)
        raise UserError(
            f"node {label!r} ({kinds}): TVM has no C for it ({shown(reason(error), 160)}); replace it before exporting"
        ) from error
    return CFunction(text, constants, scratch)


def _expression(island: Island, opset: int) -> tuple[Any, list[Any]]:
    values: dict[str, Any] = {}
    arguments = []
    for number, tensor in enumerate(island.inputs):
        x = relay.var(f"in{number}", shape=stored_shape(tensor), dtype=tensor.dtype)
        arguments.append(x)
        values[tensor.name] = _in_order(tensor, x)
    for operator in island.operators:
        inputs = [values[each.name] for each in operator.activations]
        outputs = generic.lower(operator, inputs, opset)
        for tensor, output in zip(operator.outputs, outputs, strict=True):
            values[tensor.name] = output
    made = [_laid_out(each, values[each.name]) for each in island.outputs]
    return made[0] if len(made) == 1 else relay.Tuple(made), arguments


def _top(island: Island) -> str:
    """TopK, of which TVM has no C: each value goes to its place among the best before it; of equal ones the first leads."""
    (operator,), (source,) = island.operators, island.inputs
    tensors = source, *operator.outputs
    axis = int(operator.attributes.get("axis", -1)) % len(source.shape)
    best = ">" if operator.attributes.get("largest", 1) else "<"
    count, kept = (each.shape[axis] for each in tensors[:2])
    # The three may lie in different orders of axes.
    others = [each for each in range(len(source.shape)) if each != axis]
    loops = " ".join(
        f"for (int32_t a{k} = 0; a{k} < {source.shape[k]}; ++a{k})" for k in others
    )
    strides = [_strides(each) for each in tensors]
    begins = [" + ".join([f"a{k} * {of[k]}" for k in others] or "0") for of in strides]
    x, v, n = (of[axis] for of in strides)
    kind = C_TYPES[source.dtype]
    return f"""NN_KERNEL void {island.name}(const {kind} *from, {kind} *values, int64_t *indices, uint8_t *scratch) {{
  {loops} {{
    const {kind} *const x = from + {begins[0]};
    {kind} *const v = values + {begins[1]};
    int64_t *const n = indices + {begins[2]};
    for (int32_t i = 0; i < {count}; ++i) {{
      int32_t place = i < {kept} ? i : {kept};
      for (; place > 0 && x[i * {x}] {best} v[(place - 1) * {v}]; --place)
        if (place < {kept}) {{
          v[place * {v}] = v[(place - 1) * {v}];
          n[place * {n}] = n[(place - 1) * {n}];
        }}
      if (place < {kept}) {{
        v[place * {v}] = x[i * {x}];
        n[place * {n}] = i;
      }}
    }}
  }}
}}
"""


def _strides(tensor: Tensor) -> list[int]:
    """Of each of ONNX's axes how many elements lie between neighbours."""
    shape = stored_shape(tensor)
    stored = [int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(len(shape))]
    order = (0, 3, 1, 2) if tensor.layout == NHWC else range(len(shape))
    return [stored[place] for place in order]


def stored_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape with the axes in the order in which they lie in memory."""
    if tensor.layout != NHWC:
        return tensor.shape
    batch, channels, height, width = tensor.shape
    return batch, height, width, channels


def _in_order(tensor: Tensor, x: Any) -> Any:
    return relay.transpose(x, (0, 3, 1, 2)) if tensor.layout == NHWC else x


def _laid_out(tensor: Tensor, x: Any) -> Any:
    return relay.transpose(x, (0, 2, 3, 1)) if tensor.layout == NHWC else x


class _Constants(relay.ExprMutator):  # type: ignore[misc]
    """Parameters in the place of constants that are no single number."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: list[Any] = []
        self.values: list[Array] = []

    def visit_constant(self, const: Any) -> Any:
        value = const.data.numpy()
        if value.ndim == 0:
            return const
        self.variables.append(
            relay.var(f"c{len(self.values)}", shape=value.shape, dtype=str(value.dtype))
        )
        self.values.append(value)
        return self.variables[-1]


def _without_constants(
    expression: Any, arguments: list[Any]
) -> tuple[Any, tuple[Array, ...]]:
    simplify = tvm.transform.Sequential(
        [
            relay.transform.InferType(),
            relay.transform.SimplifyInference(),
            relay.transform.CanonicalizeOps(),
            relay.transform.FoldConstant(),
            relay.transform.InferType(),
        ]
    )
    module = simplify(tvm.IRModule.from_expr(relay.Function(arguments, expression)))
    function, constants = module["main"], _Constants()
    body = constants.visit(function.body)
    made = relay.Function([*function.params, *constants.variables], body)
    module = relay.transform.InferType()(tvm.IRModule.from_expr(made))
    return module, tuple(constants.values)


def _lowered(inputs: list[Any], outputs: list[Any], name: str) -> tuple[Any, int]:
    """The TIR function, and the bytes of scratch memory that is its last argument."""
    outputs = [
        _own_stage(each, outputs[:index] + inputs) for index, each in enumerate(outputs)
    ]
    schedule = te.create_schedule([each.op for each in outputs])
    _place_stages(schedule, outputs)
    with tvm.transform.PassContext(opt_level=3, config={"tir.disable_vectorize": True}):
        module = tvm.lower(schedule, [*inputs, *outputs], name=name)
    function = module[name]
    return _with_scratch(function)


def _own_stage(output: Any, others: list[Any]) -> Any:
    """A copy of an output that is an input, or another output, itself."""
    if all(not output.op.same_as(each.op) for each in others) and isinstance(
        output.op, te.ComputeOp
    ):
        return output
    if isinstance(output.op, te.ExternOp) and all(
        not output.op.same_as(each.op) for each in others
    ):
        return output
    return te.compute(output.shape, lambda *index: output(*index), name="copy")


def _place_stages(schedule: Any, outputs: list[Any]) -> None:
    """Each computation inside the one that reads it, where it then is not done twice."""
    final = {each.op for each in outputs}
    large = _too_large([stage.op for stage in schedule.stages])
    # By an operation: those that read it, once what is inlined is.
    readers: dict[Any, set[Any]] = {}
    order = [stage.op for stage in schedule.stages]
    for op in order:
        for tensor in op.input_tensors:
            readers.setdefault(tensor.op, set()).add(op)
    for op in reversed(order):
        if op in final or not isinstance(op, te.ComputeOp):
            continue
        after = readers[op]
        only = next(iter(after)) if len(after) == 1 else None
        once = only is not None and _volume(only) == _volume(op, sums=False)
        if not op.reduce_axis and any(isinstance(x, te.ExternOp) for x in after):
            continue
        if not op.reduce_axis and op not in large:
            if once or not _is_costly(op):
                schedule[op].compute_inline()
                for tensor in op.input_tensors:
                    readers[tensor.op] = (readers[tensor.op] - {op}) | after
        elif once and isinstance(only, te.ComputeOp) and not only.reduce_axis:
            schedule[op].compute_at(schedule[only], only.axis[-1])


def _too_large(order: Sequence[Any]) -> set[Any]:
    """The computations of which several copies would be an expression of more than _MOST operators.

    Args:
        order: each after those that it reads.
    """
    loads = {op: _loads(op) for op in order}
    reads: Counter[Any] = sum(loads.values(), Counter())
    sizes: dict[Any, int] = {}
    found = set()
    for op in order:
        sizes[op] = 1 + sum(n * sizes[each] for each, n in loads[op].items())
        if reads[op] > 1 and sizes[op] * reads[op] > _MOST:
            found.add(op)
            sizes[op] = 1
    return found


def _loads(op: Any) -> Counter[Any]:
    """How often the expression of an operation has a value of each other one."""
    found: Counter[Any] = Counter()
    left = list(op.body) if isinstance(op, te.ComputeOp) else []
    # TVM's own visitors pass by a second place of the same expression.
    while left:
        node = left.pop()
        if isinstance(node, tir.ProducerLoad):
            found[node.producer.op] += 1
        parts = (getattr(node, name, None) for name in _PARTS)
        left += [x for part in parts for x in _expressions(part)]
    return found


def _expressions(part: Any) -> list[Any]:
    several = list(part) if isinstance(part, tvm.ir.Array) else [part]
    return [each for each in several if isinstance(each, tir.PrimExpr)]


def _is_costly(op: Any) -> bool:
    found: list[bool] = []

    def visit(node: Any) -> None:
        if isinstance(node, tir.Call):
            found.append(node.op.name not in _CHEAP)
        elif isinstance(node, tir.Div):
            found.append("float" in str(node.dtype))

    for each in op.body:
        tir.stmt_functor.post_order_visit(each, visit)
    return any(found)


def _volume(op: Any, sums: bool = True) -> int | None:
    if not isinstance(op, te.ComputeOp):
        return None
    axes = [*op.axis, *(op.reduce_axis if sums else ())]
    sizes = [int(tvm.arith.Analyzer().simplify(axis.dom.extent)) for axis in axes]
    return int(np.prod(sizes, dtype=np.int64))


def _with_scratch(function: Any) -> tuple[Any, int]:
    """The function whose large arrays lie in memory that its caller gives, and how much it wants."""
    memory = tir.Var("scratch", tvm.ir.PointerType(tvm.ir.PrimType("uint8")))
    buffer = tir.decl_buffer((1,), "uint8", "scratch", data=memory)
    # Each array lies behind those around it.
    used, most = 0, 0

    def enter(allocate: Any) -> None:
        nonlocal used, most
        used += _room(allocate)
        most = max(most, used)

    def leave(allocate: Any) -> Any:
        nonlocal used
        room = _room(allocate)
        used -= room
        if not room:
            return allocate
        first = tir.BufferLoad(buffer, [used])
        place = tir.call_intrin("handle", "tir.address_of", first)
        return tir.LetStmt(allocate.buffer_var, place, allocate.body)

    body = tir.stmt_functor.ir_transform(function.body, enter, leave, ["tir.Allocate"])
    arguments = [*function.params, memory]
    maps = function.buffer_map, function.attrs
    return tir.PrimFunc(arguments, body, function.ret_type, *maps), most


def _room(allocate: Any) -> int:
    """Bytes of scratch memory; 0 of what lies on the stack."""
    sizes = [int(each) for each in allocate.extents]
    size = int(np.prod(sizes, dtype=np.int64))
    size *= np.dtype(str(allocate.dtype)).itemsize
    return aligned(size, _ALIGNMENT) if size > _ON_STACK else 0


def _as_c(function: Any) -> tuple[Any, list[str]]:
    """The function with calls in the place of what TVM writes wrongly in C; and the numbers of its ``literal_N()``.

    TVM prints six digits of a float constant. It gives what a minimum or maximum reads a name, which it takes for the value
    of the same element after that was written, too. Of some functions it knows nothing.
    """
    literals: list[str] = []

    def replaced(node: Any) -> Any:
        dtype = str(node.dtype)
        if isinstance(node, tir.Max | tir.Min):
            name = f"nn_{'max' if isinstance(node, tir.Max) else 'min'}_{dtype}"
            return tir.call_pure_extern(dtype, name, node.a, node.b)
        if isinstance(node, tir.Call):
            # Of a call of another function ``op`` is that.
            function = _UNKNOWN.get(getattr(node.op, "name", ""))
            if function is None:
                return node
            suffix = "f" if dtype == "float32" else ""
            return tir.call_pure_extern(dtype, function + suffix, *node.args)
        literals.append(_literal(node.value, dtype))
        return tir.call_pure_extern(dtype, f"literal_{len(literals) - 1}")

    kinds = ["FloatImm", "tir.Call", "tir.Max", "tir.Min"]
    body = tir.stmt_functor.ir_transform(function.body, lambda _: None, replaced, kinds)
    return function.with_body(body), literals


def _literal(value: float, dtype: str) -> str:
    text = c_float(value, "f" if dtype == "float32" else "")
    return text if text[0].isdigit() and "/" not in text else f"({text})"


def _text(function: Any, name: str, read: int) -> str:
    """Args: read: how many of the parameters, from the first on, are not written."""
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    target = tvm.target.Target(_C, host=_C)
    for each in (
        tir.transform.BindTarget(target),
        tir.transform.Simplify(),
        tir.transform.MakeUnpackedAPI(),
        tir.transform.LowerIntrin(),
    ):
        module = each(module)
    written, literals = _as_c(module[name])
    module = tvm.IRModule({name: written})
    source = tvm.get_global_func("target.build.c")(module, target).get_source()
    # Behind the declarations.
    begin = source.rindex(f" {name}(") + len(name) + 2
    parameters, body = source[begin:].split(") {\n", 1)
    typed = [each.strip().replace("* ", " *") for each in parameters.split(",")]
    typed = [f"const {each}" if i < read else each for i, each in enumerate(typed)]
    body = body.strip().removesuffix("}").rstrip().removesuffix("return 0;").rstrip()
    body = re.sub(r"literal_(\d+)\(\)", lambda m: literals[int(m[1])], body)
    if "TVM" in body or "return" in body:
        raise ValueError("it calls TVM's runtime")
    return f"NN_KERNEL void {name}({', '.join(typed)}) {{\n  {body}\n}}\n"
