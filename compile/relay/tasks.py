"""What AutoScheduler can find schedules for in a network: its fused kernels that sum, as TVM will compile them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from netship.compile.relay import module_passes
from netship.compile.relay.convert import Converted
from netship.compile.relay.expressions import calls, nodes
from netship.compile.relay.fallbacks import accepted
from netship.compile.relay.ops import conv2d_bfloat16, conv2d_depthwise
from netship.targets import engine
from netship.targets.presets import Target

tvm = engine.compiler()
from tvm import auto_scheduler, relay
from tvm.relay.backend import te_compiler


class Kernel(NamedTuple):
    """A fused kernel that can be scheduled.

    Attributes:
        key: AutoScheduler's workload key. Kernels of one key may still differ: the key leaves padding out.
    """

    key: str
    dag: Any


class _Listener(auto_scheduler.DispatchContext):  # type: ignore[misc]
    """Notes what AutoScheduler is asked to schedule, and has no schedule for it."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[Kernel] = []

    def take(self) -> list[Kernel]:
        """What was noted since the last call."""
        taken, self._kernels = self._kernels, []
        return taken

    def query(
        self, _target: Any, workload_key: str, has_sums: bool, dag: Any, _name: str
    ) -> None:
        if has_sums:
            self._kernels.append(Kernel(workload_key, dag))

    def update(self, _target: Any, _workload_key: str, _state: Any) -> None:
        raise AssertionError("nothing was given a schedule")


def kernels(module: Any, target: Any) -> list[Kernel]:
    """Every kernel of a module in the layout NHWC that can be scheduled, in the order they run.

    Args:
        target: TVM's.
    """
    return accepted(lambda more: _kernels(module, target, more))


def _kernels(module: Any, target: Any, more: Mapping[str, Any]) -> list[Kernel]:
    found: list[Kernel] = []
    # As a build with records does, but for the weights' layouts, which depend on the schedules.
    with tvm.transform.PassContext(
        opt_level=3,
        config={**more.get("config", {}), "relay.backend.use_auto_scheduler": True},
        disabled_pass=["AutoSchedulerLayoutRewrite", *more.get("disabled_pass", ())],
    ):
        optimised, _ = relay.optimize(module, target)
        compiler = te_compiler.get()
        compiler.clear()
        heard: dict[int, list[Kernel]] = {}
        with target, _Listener() as listener:
            for function in _fused(optimised["main"]):
                # Functions that are the same give one object, and AutoScheduler is asked once for all.
                lowered = hash(compiler.lower(function, target))
                heard.setdefault(lowered, listener.take())
                found += heard[lowered]
        compiler.clear()
    return found


def _fused(function: Any) -> list[Any]:
    """The fused functions that a function calls, but those of operators of ours, which have schedules of their own."""
    found = [
        node.op
        for node in nodes(function)
        if isinstance(node, relay.Call) and isinstance(node.op, relay.Function)
    ]
    own = {conv2d_depthwise.OPERATOR, conv2d_bfloat16.OPERATOR}
    return [each for each in found if all(c.op.name not in own for c in calls(each))]


def tuning_tasks(
    network: Converted, target: Target, threads: int = 1
) -> tuple[list[Any], list[int]]:
    """AutoScheduler's tasks of an imported network, and how often each occurs."""
    tvm_target = tvm.target.Target(target.tvm)
    # The default is the compiling machine's. NEON and the widest of x86; lines of 64 bytes on all.
    hardware = auto_scheduler.HardwareParams(
        num_cores=threads,
        vector_unit_bytes=64 if target.machine == "x86_64" else 16,
        cache_line_bytes=64,
        target=tvm_target,
    )
    fold = module_passes.FOLD_HALF if network.half else module_passes.FOLD
    tuned = module_passes.run((*fold, *module_passes.CHANNELS_LAST), network.module)
    counts = Counter(kernel.key for kernel in kernels(tuned, tvm_target))
    rewriting = auto_scheduler.LayoutRewriteOption.get_target_default(tvm_target, True)
    tasks = [
        auto_scheduler.SearchTask(
            workload_key=key,
            target=tvm_target,
            hardware_params=hardware,
            layout_rewrite_option=rewriting,
        )
        for key in counts
    ]
    return tasks, list(counts.values())
