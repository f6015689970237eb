"""A memory plan as the manifest has it."""

from __future__ import annotations

from bundle.manifest import MemoryPlan, PlannedBuffer
from compile.program.planner import Plan
from compile.program.program import Program


def describe_plan(plan: Plan, program: Program) -> MemoryPlan:
    """Arena, lower bound, workspaces, and every buffer with its place and lifetime."""
    return MemoryPlan(
        arena_bytes=plan.nbytes,
        lower_bound=plan.lower_bound,
        outer_workspace_bytes=program.outer_bytes,
        inner_workspace_bytes=program.inner_bytes,
        buffers=tuple(
            PlannedBuffer(
                name=each.name,
                nbytes=each.nbytes,
                offset=each.offset,
                first=each.first,
                last=each.last,
            )
            for each in plan.buffers
        ),
    )
