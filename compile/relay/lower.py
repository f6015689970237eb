"""Relay: fold, plan, lay out, compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from netship.bundle.manifest import Lowering
from netship.compile.relay import describe, module_passes, prefetch, tiles
from netship.compile.relay.convert import Converted
from netship.compile.relay.fallbacks import accepted
from netship.compile.relay.module_passes import CHANNELS_LAST, FOLD, FOLD_HALF, Dump
from netship.compile.relay.ops import half
from netship.compile.relay.plan import UNTUNED, Plan, Schedules, make_plan
from netship.compile.relay.tasks import kernels
from netship.compile.relay.tiles import Vectors
from netship.records.lookup import Record, RecordLog
from netship.targets import engine
from netship.targets.errors import reason
from netship.targets.presets import Target

tvm = engine.compiler()
from tvm import relay
from tvm.relay.backend import Executor, Runtime


class Lowered(NamedTuple):
    """What Relay made of the network: ``factory`` is TVM's executor factory, not yet linked."""

    factory: Any
    description: Lowering


def lower(
    network: Converted,
    target: Target,
    logs: Sequence[RecordLog],
    standalone: str | None = None,
    dump: Dump = lambda name, module: None,
) -> Lowered:
    """Compile a network for ``target``.

    The layout is NHWC where ``logs`` have a schedule for every convolution, own or a neighbour's, as `make_plan` says,
    and NCHW otherwise: without records, NHWC schedules are several times slower than TOPI's own for NCHW.

    Args:
        logs: tuning records that this target may use; each task takes the first one's that has it.
        standalone: compile kernels that need no TVM, with this in their symbols' names.
        dump: called with the name of each pass and the module that it made.
    """
    tvm_target = tvm.target.Target(target.tvm)
    if network.half:
        half.patch_topi()
    fold = FOLD_HALF if network.half else FOLD
    folded = module_passes.run(fold, network.module, dump)
    if network.bfloat16 or (logs and not network.instruction):
        vectors = tiles.vectors_of(target)
        plan, (factory, served) = _tuned(
            folded, tvm_target, logs, vectors, standalone, dump, network.bfloat16
        )
    else:
        plan = UNTUNED
        if network.instruction:
            plan = Plan("NHWC" if network.source else "NCHW", network.instruction)
        factory, served = _compile(folded, plan, tvm_target, standalone)
    numbers = "float16" if network.half else "bfloat16" if network.bfloat16 else ""
    (workspace,) = factory.function_metadata["__tvm_main__"].workspace_sizes.values()
    description = Lowering(
        layout=plan.layout,
        reason=f"{numbers}: {plan.reason}" if numbers else plan.reason,
        records=plan.records,
        operators=describe.operators(folded),
        groups=describe.groups(
            factory, folded if network.half else network.module, served
        ),
        workspace_bytes=int(workspace),
    )
    return Lowered(factory, description)


def _tuned(
    folded: Any,
    tvm_target: Any,
    logs: Sequence[RecordLog],
    vectors: Vectors,
    standalone: str | None,
    dump: Dump,
    channels_last: bool,
) -> tuple[Plan, tuple[Any, dict[str, str]]]:
    """The plan and what is compiled by it; records that do not compile are left out.

    No record keeps a network from being built: what TVM cannot do in the layout for records, it does without them.

    Args:
        channels_last: it has kernels that need the layout for records.
    """
    rejected: frozenset[Record] = frozenset()
    plan = UNTUNED
    try:
        laid_out = module_passes.run(CHANNELS_LAST, folded, dump)
        found = kernels(laid_out, tvm_target)
        while (
            plan := make_plan(found, logs, vectors, rejected, channels_last)
        ).layout == "NHWC":
            try:
                return plan, _compile(laid_out, plan, tvm_target, standalone)
            except Exception:
                failing = plan.failing()
                if not failing:
                    raise
                rejected |= failing
    except Exception as error:
        if channels_last:
            raise
        why = f"TVM cannot use tuning records for this network ({reason(error)[:200]})"
        plan = Plan("NCHW", why, plan.records)
    return plan, _compile(folded, plan, tvm_target, standalone)


def _compile(
    module: Any, plan: Plan, tvm_target: Any, standalone: str | None
) -> tuple[Any, dict[str, str]]:
    """TVM's factory, and of each kernel that a record serves, by its name: the workload key."""
    options: dict[str, Any] = {}
    config: dict[str, Any] = {"relay.backend.use_auto_scheduler": bool(plan.choices)}
    if plan.choices:
        config |= prefetch.passes(tvm_target)
    if standalone is not None:
        # The system library of TVM's C runtime holds plain kernels; nothing else of it is used.
        crt = Runtime("crt", {"system-lib": True})
        graph = Executor("graph")
        options = {"executor": graph, "runtime": crt, "mod_name": standalone}
        # Shapes are fixed in the calls, and the texts of these checks are 3 % of the library.
        config["tir.disable_assert"] = True
    if describe.has_float16(module):
        # A library of half the size shows their 3 %.
        config["tir.disable_assert"] = True
    if describe.has_int8(module):
        # LLVM's verifier refuses the vectors that TVM names as common; LLVM finds them itself.
        config["tir.disable_cse_tir"] = True
        config["tir.disable_assert"] = True

    def build(more: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
        whole = {**more, "config": {**config, **more.get("config", {})}}
        context = tvm.transform.PassContext(opt_level=3, **whole)
        with Schedules(plan) as schedules, context:
            return relay.build(module, tvm_target, **options), schedules.tasks

    return accepted(build)
