"""Relay: fold, choose the layout, fuse, compile. Only the engine's process imports this."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from bundle.manifest import Group, Lowering, Records
from records.lookup import Record, RecordLog
from targets import engine
from targets.presets import Target

tvm = engine.compiler()
from tvm import auto_scheduler, relay
from tvm.relay.backend import Executor, Runtime

from compile.relay import prefetch
from compile.relay.ops import conv2d_depthwise, depthwise, neon

# TVM's kernels take their workspace in multiples of a cache line.
_WORKSPACE_ALIGNMENT = 64
_PREFIX = re.compile(r"^tvmgen_\w+?_(?=fused)")

_MAC_OPERATORS = frozenset(
    [
        "nn.conv2d",
        "nn.contrib_conv2d_NCHWc",
        "nn.contrib_depthwise_conv2d_NCHWc",
        "nn.contrib_conv2d_winograd_without_weight_transform",
        "nn.conv2d_transpose",
        "nn.dense",
        "nn.contrib_dense_pack",
    ]
)
# Pooling would follow the convolutions unsaid, with a warning.
_NHWC = {
    "nn.conv2d": ["NHWC", "default"],
    **{
        f"nn.{kind}_pool2d": ["NHWC"]
        for kind in ("max", "avg", "global_max", "global_avg")
    },
}


@dataclass(frozen=True)
class Lowered:
    """What Relay made of the network: ``factory`` is TVM's executor factory, not yet linked."""

    factory: Any
    description: Lowering


def lower(
    module: Any,
    target: Target,
    logs: Sequence[RecordLog],
    standalone: str | None = None,
    native: str = "",
) -> Lowered:
    """Compile an imported Relay module for ``target``.

    The layout is NHWC when ``logs`` cover every tuning task of the network and NCHW otherwise:
    without records, NHWC schedules are several times slower than TOPI's own for NCHW.

    Args:
        module: an IRModule with its parameters frozen, as compile.relay.importer gives it.
        logs: tuning records that this target may use; each task takes the first one's that has it.
        standalone: compile kernels that need no TVM, with this in their symbols' names.
        native: what the operators of compile.kernels.neon multiply by, where the module is made of them.
    """
    tvm_target = tvm.target.Target(target.tvm)
    folded = _fold(module)
    plan, schedules = _Plan(folded, "NCHW", "no tuning records for this target"), None
    if native:
        plan = _Plan(folded, "NHWC", native)
    elif logs:
        plan, schedules = _plan_with(logs, folded, tvm_target)
    factory = _compile_scheduled(plan, tvm_target, standalone, schedules)
    if schedules and schedules.unserved:
        plan = _without(plan, folded, schedules)
        factory = _compile(plan, tvm_target, standalone)
    served = schedules.tasks if schedules and plan.layout == "NHWC" else {}
    (workspace,) = factory.function_metadata["__tvm_main__"].workspace_sizes.values()
    description = Lowering(
        layout=plan.layout,
        reason=plan.reason,
        records=plan.records and _with_refused(plan.records, schedules),
        operators=dict(
            Counter(call.op.name for call in _calls(folded["main"]) if _macs(call))
        ),
        groups=_groups(factory, _layers(module), served),
        workspace_bytes=int(workspace),
    )
    return Lowered(factory, description)


def _without(plan: _Plan, folded: Any, schedules: _Schedules) -> _Plan:
    """The plan where records turn out not to fit: a task without a schedule is far slower in NHWC."""
    assert plan.records
    covered = plan.records.covered - len(schedules.unserved)
    reason = f"tuning records fit only {covered} of {plan.records.tasks} tasks"
    records = plan.records.model_copy(update={"covered": covered})
    return _Plan(folded, "NCHW", reason, records)


def _with_refused(records: Records, schedules: _Schedules | None) -> Records:
    refused = tuple(schedules.refused) if schedules else ()
    return records.model_copy(update={"refused": refused})


@dataclass(frozen=True)
class _Plan:
    """A module in the layout it will be compiled in, and why that one."""

    module: Any
    layout: Literal["NCHW", "NHWC"]
    reason: str
    records: Records | None = None


def tuning_tasks(
    module: Any, target: Target, threads: int = 1
) -> tuple[list[Any], list[int]]:
    """AutoScheduler's tasks of an imported Relay module, and how often each occurs.

    The operators that a build fuses in pairs (compile/relay/ops/conv2d_depthwise.py) are none of them.
    """
    tvm_target = tvm.target.Target(target.tvm)
    # The default is the compiling machine's. NEON and the widest of x86; lines of 64 bytes on all.
    hardware = auto_scheduler.HardwareParams(
        num_cores=threads,
        vector_unit_bytes=64 if target.machine == "x86_64" else 16,
        cache_line_bytes=64,
        target=tvm_target,
    )
    return _tasks(_for_auto_scheduler(_fold(module)), tvm_target, hardware)


def _tasks(
    module: Any, tvm_target: Any, hardware: Any = None
) -> tuple[list[Any], list[int]]:
    with conv2d_depthwise.unwritten():
        tasks, weights = auto_scheduler.extract_tasks(
            module["main"], {}, tvm_target, hardware_params=hardware
        )
    return list(tasks), [int(weight) for weight in weights]


class _Schedules(auto_scheduler.DispatchContext):  # type: ignore[misc]
    """Applies to each task the best record that fits it.

    Equal workload keys are not always equal tasks (the key leaves padding out), and a log may hold anything: a
    record whose steps the task refuses is named, and the next best one serves.

    Attributes:
        tasks: of each kernel that a record serves, by its name: the workload key.
        refused: the records that do not fit their task, in words.
        unserved: workload keys of the tasks that have records, none of which fits.
    """

    def __init__(self, logs: Sequence[RecordLog]) -> None:
        super().__init__()
        self._logs = logs
        self.tasks: dict[str, str] = {}
        self.refused: list[str] = []
        self.unserved: set[str] = set()
        self._rewritten: dict[str, tuple[str, Any]] = {}
        self._last = ""
        self._applied: dict[str, tuple[Record, Any, Any]] = {}
        self._struck: set[Record] = set()

    def query(
        self, target: Any, workload_key: str, _complex: bool, dag: Any, func_name: str
    ) -> Any:
        if workload_key in self._rewritten:
            self.tasks[func_name], state = self._rewritten[workload_key]
            return state
        for log in self._logs:
            for number, record in enumerate(log.best.get(workload_key, ()), start=1):
                try:
                    state = self._apply(record, dag)
                except (tvm.TVMError, ValueError, AttributeError, TypeError):
                    note = f"{log.name}: record {number} of task {workload_key[:60]}… does not fit it; left out"
                    if note not in self.refused:
                        self.refused.append(note)
                    continue
                self.tasks[func_name] = self._last = workload_key
                self._applied[workload_key] = record, dag, state
                return state
        if any(workload_key in log.best for log in self._logs):
            self.unserved.add(workload_key)
        return self._old_ctx.query(target, workload_key, _complex, dag, func_name)

    def update(self, _target: Any, workload_key: str, state: Any) -> None:
        """The task last asked for has another key once its weights are laid out as its schedule wants them."""
        self._rewritten[workload_key] = self._last, state

    def strike(self) -> bool:
        """Find the records whose schedules can be applied and not compiled; they are as those that do not fit."""
        struck = set()
        for record, dag, state in self._applied.values():
            try:
                tvm.lower(*dag.apply_steps_from_state(state))
            except Exception:  # noqa: BLE001 - TVM has no class for it
                struck.add(record)
        self._struck |= struck
        for told in (self.tasks, self._rewritten, self._applied):
            told.clear()
        return bool(struck)

    def _apply(self, record: Record, dag: Any) -> Any:
        if record in self._struck:
            raise ValueError("it does not compile")
        pair = auto_scheduler.measure_record.load_record_from_string(record.line)
        dag.apply_steps_from_state(pair[0].state)
        return pair[0].state


def _plan_with(
    logs: Sequence[RecordLog], folded: Any, tvm_target: Any
) -> tuple[_Plan, _Schedules | None]:
    """The plan, and the context that applies the records where they cover every task."""
    tuned = _for_auto_scheduler(folded)
    tasks, _ = _tasks(tuned, tvm_target)
    serving = [
        next((log for log in logs if task.workload_key in log.best), None)
        for task in tasks
    ]
    used = list({id(log): log for log in serving if log}.values())
    covered = len(tasks) - serving.count(None)
    records = Records(
        file=", ".join(log.name for log in used),
        measured="; ".join(dict.fromkeys(log.measured for log in used)),
        tasks=len(tasks),
        covered=covered,
    )
    if covered < len(tasks):
        reason = f"tuning records cover {covered} of {len(tasks)} tasks"
        return _Plan(folded, "NCHW", reason, records), None
    reason = f"tuning records cover all {len(tasks)} tasks"
    return _Plan(tuned, "NHWC", reason, records), _Schedules(logs)


def _fold(module: Any) -> Any:
    """Batch normalisation and constants folded into the convolutions."""
    return _apply(
        module,
        relay.transform.InferType(),
        relay.transform.SimplifyInference(),
        relay.transform.FoldConstant(),
        relay.transform.FoldScaleAxis(),
        relay.transform.FoldConstant(),
    )


def _for_auto_scheduler(module: Any) -> Any:
    """NHWC, large pairs fused, and the classifier as a 1×1 convolution: ``dense`` breaks AutoScheduler in TVM 0.19."""
    convolutions = _rewrite(_DenseAsConvolution(), module)
    laid_out = _apply(
        convolutions,
        # bias_add as a plain add: ConvertLayout would not move a layout across it.
        relay.transform.CanonicalizeOps(),
        relay.transform.InferType(),
        relay.transform.ConvertLayout(_NHWC),
    )
    constant = _apply(
        _rewrite(_ConstantsLaidOut(), laid_out),
        relay.transform.InferType(),
        relay.transform.FoldConstant(),
    )
    return _apply(conv2d_depthwise.fuse(constant), relay.transform.InferType())


def _rewrite(mutator: Any, module: Any) -> Any:
    return tvm.IRModule.from_expr(mutator.visit(module["main"]))


def _apply(module: Any, *passes: Any) -> Any:
    # ConvertLayout silently does nothing outside a PassContext of opt_level 3.
    with tvm.transform.PassContext(opt_level=3):
        for each in passes:
            module = each(module)
    return module


class _ConstantsLaidOut(relay.ExprMutator):  # type: ignore[misc]
    """Layout changes of weights, done by numpy: FoldConstant compiles a kernel for each, a tenth of a second."""

    def visit_call(self, call: Any) -> Any:
        call = super().visit_call(call)
        if not isinstance(call.op, tvm.ir.Op) or not isinstance(
            call.args[0], relay.Constant
        ):
            return call
        value = call.args[0].data.numpy()
        if call.op.name == "expand_dims":
            axis = int(call.attrs.axis)
            axis += value.ndim + 1 if axis < 0 else 0
            for _ in range(int(call.attrs.num_newaxis)):
                value = np.expand_dims(value, axis)
            return relay.const(value)
        source, target = (
            getattr(call.attrs, "src_layout", ""),
            getattr(call.attrs, "dst_layout", ""),
        )
        if call.op.name == "layout_transform" and sorted(source) == sorted(target):
            order = [source.index(letter) for letter in target]
            return relay.const(np.ascontiguousarray(value.transpose(order)))
        return call


class _DenseAsConvolution(relay.ExprMutator):  # type: ignore[misc]
    def visit_call(self, call: Any) -> Any:
        call = super().visit_call(call)
        if not isinstance(call.op, tvm.ir.Op) or call.op.name != "nn.dense":
            return call
        data, weight = call.args
        image = relay.expand_dims(data, axis=2, num_newaxis=2)
        kernel = relay.expand_dims(weight, axis=2, num_newaxis=2)
        return relay.squeeze(
            relay.nn.conv2d(image, kernel, kernel_size=(1, 1)), axis=[2, 3]
        )


def _compile_scheduled(
    plan: _Plan, tvm_target: Any, standalone: str | None, schedules: _Schedules | None
) -> Any:
    if schedules is None:
        return _compile(plan, tvm_target, standalone)
    with schedules:
        while True:
            try:
                return _compile(plan, tvm_target, standalone, scheduled=True)
            except Exception:
                if not schedules.strike():
                    raise


def _compile(
    plan: _Plan, tvm_target: Any, standalone: str | None, scheduled: bool = False
) -> Any:
    options: dict[str, Any] = {}
    config: dict[str, Any] = {"relay.backend.use_auto_scheduler": scheduled}
    if scheduled:
        config |= prefetch.passes(tvm_target)
    if standalone is not None:
        # The system library of TVM's C runtime holds plain kernels; nothing else of it is used.
        crt = Runtime("crt", {"system-lib": True})
        options = {
            "executor": Executor("graph"),
            "runtime": crt,
            "mod_name": standalone,
        }
        # Shapes are fixed in the calls, and the texts of these checks are 3 % of the library.
        config["tir.disable_assert"] = True
    if any(_is_int8(call) for call in _calls(plan.module["main"])):
        # LLVM's verifier refuses the vectors that TVM names as common; LLVM finds them itself.
        config["tir.disable_cse_tir"] = True
        config["tir.disable_assert"] = True
    with tvm.transform.PassContext(opt_level=3, config=config):
        return relay.build(plan.module, tvm_target, **options)


def _is_int8(call: Any) -> bool:
    return call.op.name in _MAC_OPERATORS and call.args[1].checked_type.dtype == "int8"


def _layers(module: Any) -> list[tuple[str, int]]:
    """Of each operator with multiply-adds: its node's name in the ONNX graph, its output elements."""
    heavy = [call for call in _calls(module["main"]) if _macs(call)]
    return [
        (
            str(call.span.source_name.name) if call.span else "",
            prod(_shape(call.checked_type)),
        )
        for call in heavy
    ]


def _groups(
    factory: Any, layers: list[tuple[str, int]], tasks: dict[str, str]
) -> tuple[Group, ...]:
    """The fused groups of operators, in the order they run.

    Lowering keeps the order of operators but not their names, so the names are given back in
    order, and only if every output's size agrees.
    """
    nodes = json.loads(factory.get_graph_json())["nodes"]
    names = [node["attrs"]["func_name"] for node in nodes if node["op"] == "tvm_op"]
    groups = [
        _group(name, factory.function_metadata, tasks.get(name, ""))
        for name in names
        if name != "__nop"
    ]
    heavy = iter(layers)
    described = []
    for group in groups:
        own = list(itertools.islice(heavy, _heavy_operators(group)))
        if own and own[-1][1] != prod(group.output_shape):
            return tuple(groups)
        layer = " + ".join(name for name, _ in own if name)
        described.append(group.model_copy(update={"layer": layer}))
    return tuple(described)


def _heavy_operators(group: Group) -> int:
    """How many of the network's operators with multiply-adds are in a group."""
    return sum(
        2
        if name == conv2d_depthwise.OPERATOR
        else name in _MAC_OPERATORS or name in neon.CONVOLUTIONS
        for name in group.operators
    )


def _group(name: str, metadata: Any, task: str) -> Group:
    (function,) = metadata[name].relay_primfuncs.values()
    calls = _calls(function)
    return Group(
        name=_PREFIX.sub("", name),
        operators=tuple(call.op.name for call in calls),
        output_shape=_shape(function.ret_type),
        macs=sum(_macs(call) for call in calls),
        task=task,
        symbol=next(
            (str(c.attrs["symbol"]) for c in calls if c.op.name in neon.OPERATORS), ""
        ),
    )


def _calls(function: Any) -> list[Any]:
    """The operator calls of a Relay function, each after those it takes its arguments from."""
    found: list[Any] = []

    def collect(expression: Any) -> None:
        if isinstance(expression, relay.Call) and isinstance(expression.op, tvm.ir.Op):
            found.append(expression)

    relay.analysis.post_order_visit(function, collect)
    return found


def workspaces(factory: Any) -> tuple[int, int]:
    """Bytes that a kernel allocates: (outside its parallel loops, in one task of them), the largest."""
    functions = [
        function
        for information in factory.function_metadata.values()
        for function in information.tir_primfuncs.values()
    ]
    found = [_workspace(function.body) for function in functions]
    return max(outer for outer, _ in found), max(inner for _, inner in found)


def _workspace(body: Any) -> tuple[int, int]:
    depth = 0
    totals = [0, 0]

    def enter(statement: Any) -> None:
        nonlocal depth
        if isinstance(statement, tvm.tir.For):
            depth += statement.kind == tvm.tir.ForKind.PARALLEL
        else:
            kind = tvm.DataType(statement.dtype)
            nbytes = (
                prod(int(extent) for extent in statement.extents)
                * kind.bits
                * kind.lanes
                // 8
            )
            totals[depth > 0] += (
                -(-nbytes // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
            )

    def leave(statement: Any) -> None:
        nonlocal depth
        if isinstance(statement, tvm.tir.For):
            depth -= statement.kind == tvm.tir.ForKind.PARALLEL

    tvm.tir.stmt_functor.ir_transform(body, enter, leave, ["tir.For", "tir.Allocate"])
    return totals[0], totals[1]


def _shape(tensor_type: Any) -> tuple[int, ...]:
    if isinstance(tensor_type, tvm.ir.TupleType):
        return _shape(tensor_type.fields[0])
    return tuple(int(size) for size in tensor_type.shape)


def _macs(call: Any) -> int:
    """Multiply-adds of one operator: output elements × the inputs each one sums over."""
    if call.op.name == conv2d_depthwise.OPERATOR:
        return conv2d_depthwise.macs(call)
    if call.op.name in neon.OPERATORS or call.op.name == depthwise.OPERATOR:
        return int(call.attrs["macs"])
    if call.op.name not in _MAC_OPERATORS:
        return 0
    data = _shape(call.args[0].checked_type)
    output = prod(_shape(call.checked_type))
    if "dense" in call.op.name:
        return output * data[-1]
    attrs = call.attrs
    layout = [letter for letter in attrs.data_layout if letter.isalpha()]
    channels = prod(
        size for letter, size in zip(layout, data, strict=True) if letter in "Cc"
    )
    per_group = channels // int(attrs.groups)
    kernel = prod(int(size) for size in attrs.kernel_size)
    if call.op.name == "nn.conv2d_transpose":
        return prod(data) * kernel * int(attrs.channels) // int(attrs.groups)
    return output * per_group * kernel
