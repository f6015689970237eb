"""What AutoScheduler can find schedules for in a network: its fused kernels that sum, as TVM will compile them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from compile.relay import module_passes
from compile.relay.describe import calls
from compile.relay.ops import conv2d_depthwise
from targets import engine
from targets.presets import Target

tvm = engine.compiler()
from tvm import auto_scheduler, relay
from tvm.auto_scheduler.relay_integration import traverse_to_get_io_tensors
from tvm.auto_scheduler.workload_registry import register_workload_tensors


class Kernel(NamedTuple):
    """A fused kernel that can be scheduled.

    Attributes:
        key: AutoScheduler's workload key. Kernels of one key may still differ: the key leaves padding out.
        tensors: inputs and outputs of its computation.
    """

    key: str
    dag: Any
    tensors: tuple[Any, ...]


def kernels(module: Any, target: Any) -> list[Kernel]:
    """Every kernel of a module in the layout NHWC that can be scheduled, in the order they run.

    A convolution fused with a depthwise one has code of its own and is none of them.

    Args:
        target: TVM's.
    """
    # As a build with records does, but for the weights' layouts, which depend on the schedules.
    with tvm.transform.PassContext(
        opt_level=3,
        config={"relay.backend.use_auto_scheduler": True},
        disabled_pass={"AutoSchedulerLayoutRewrite"},
    ):
        optimised, _ = relay.optimize(module, target)
        with target:
            return list(filter(None, map(_kernel, _fused(optimised["main"]))))


def _fused(function: Any) -> Iterator[Any]:
    """The fused functions that a function calls."""
    found: list[Any] = []

    def collect(node: Any) -> None:
        if isinstance(node, relay.Call) and isinstance(node.op, relay.Function):
            found.append(node.op)

    relay.analysis.post_order_visit(function, collect)
    return iter(found)


def _kernel(function: Any) -> Kernel | None:
    """None where it does not sum, and so has nothing to schedule, or has code of its own."""
    if any(call.op.name == conv2d_depthwise.OPERATOR for call in calls(function)):
        return None
    lowered = tvm.get_global_func("relay.backend.LowerToTE")(function)
    tensors, _, sums = traverse_to_get_io_tensors(list(lowered.outputs))
    if not tensors or not sums:
        return None
    dag = auto_scheduler.ComputeDAG(tensors)
    return Kernel(str(dag.workload_key()), dag, tuple(tensors))


def tuning_tasks(
    module: Any, target: Target, threads: int = 1
) -> tuple[list[Any], list[int]]:
    """AutoScheduler's tasks of an imported Relay module, and how often each occurs."""
    tvm_target = tvm.target.Target(target.tvm)
    # The default is the compiling machine's. NEON and the widest of x86; lines of 64 bytes on all.
    hardware = auto_scheduler.HardwareParams(
        num_cores=threads,
        vector_unit_bytes=64 if target.machine == "x86_64" else 16,
        cache_line_bytes=64,
        target=tvm_target,
    )
    tuned = module_passes.run(
        (*module_passes.FOLD, *module_passes.CHANNELS_LAST), module
    )
    counts: dict[str, int] = {}
    first: dict[str, Kernel] = {}
    for kernel in kernels(tuned, tvm_target):
        counts[kernel.key] = counts.get(kernel.key, 0) + 1
        first.setdefault(kernel.key, kernel)
    rewriting = auto_scheduler.LayoutRewriteOption.get_target_default(tvm_target, True)
    tasks = [
        auto_scheduler.SearchTask(
            workload_key=register_workload_tensors(key, list(kernel.tensors)),
            target=tvm_target,
            hardware_params=hardware,
            layout_rewrite_option=rewriting,
        )
        for key, kernel in first.items()
    ]
    return tasks, list(counts.values())
