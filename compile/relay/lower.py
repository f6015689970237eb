"""Relay: fold, plan, lay out, compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bundle.manifest import Lowering
from compile.relay import describe, module_passes, prefetch
from compile.relay.convert import Converted
from compile.relay.module_passes import CHANNELS_LAST, FOLD, Dump
from compile.relay.plan import UNTUNED, Plan, Schedules, make_plan
from compile.relay.tasks import kernels
from records.lookup import Record, RecordLog
from targets import engine
from targets.presets import Target

tvm = engine.compiler()
from tvm import relay
from tvm.relay.backend import Executor, Runtime


@dataclass(frozen=True)
class Lowered:
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

    The layout is NHWC when ``logs`` cover every tuning task of the network and NCHW otherwise:
    without records, NHWC schedules are several times slower than TOPI's own for NCHW.

    Args:
        logs: tuning records that this target may use; each task takes the first one's that has it.
        standalone: compile kernels that need no TVM, with this in their symbols' names.
        dump: called with the name of each pass and the module that it made.
    """
    tvm_target = tvm.target.Target(target.tvm)
    folded = module_passes.run(FOLD, network.module, dump)
    served: dict[str, str] = {}
    if logs and not network.instruction:
        plan, factory, served = _tuned(folded, tvm_target, logs, standalone, dump)
    else:
        plan = UNTUNED
        if network.instruction:
            plan = Plan("NHWC" if network.source else "NCHW", network.instruction)
        factory = _compile(folded, plan, tvm_target, standalone)
    (workspace,) = factory.function_metadata["__tvm_main__"].workspace_sizes.values()
    description = Lowering(
        layout=plan.layout,
        reason=plan.reason,
        records=plan.records,
        operators=describe.operators(folded),
        groups=describe.groups(factory, network.module, served),
        workspace_bytes=int(workspace),
    )
    return Lowered(factory, description)


def _tuned(
    folded: Any,
    tvm_target: Any,
    logs: Sequence[RecordLog],
    standalone: str | None,
    dump: Dump,
) -> tuple[Plan, Any, dict[str, str]]:
    """The plan, what is compiled by it, and which kernels records serve; records that do not compile are left out."""
    laid_out = module_passes.run(CHANNELS_LAST, folded, dump)
    found = kernels(laid_out, tvm_target)
    rejected: frozenset[Record] = frozenset()
    while True:
        plan = make_plan(found, logs, rejected)
        if plan.layout == "NCHW":
            return plan, _compile(folded, plan, tvm_target, standalone), {}
        try:
            with Schedules(plan) as schedules:
                factory = _compile(laid_out, plan, tvm_target, standalone)
            return plan, factory, schedules.tasks
        except Exception:
            failing = plan.failing()
            if not failing:
                raise
            rejected |= failing


def _compile(module: Any, plan: Plan, tvm_target: Any, standalone: str | None) -> Any:
    options: dict[str, Any] = {}
    config: dict[str, Any] = {"relay.backend.use_auto_scheduler": bool(plan.choices)}
    if plan.choices:
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
    if describe.has_int8(module):
        # LLVM's verifier refuses the vectors that TVM names as common; LLVM finds them itself.
        config["tir.disable_cse_tir"] = True
        config["tir.disable_assert"] = True
    with tvm.transform.PassContext(opt_level=3, config=config):
        return relay.build(module, tvm_target, **options)
