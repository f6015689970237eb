"""How a network is compiled: in which layout, and by which tuning record each of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from netship.bundle.manifest import Records
from netship.compile.relay.tasks import Kernel
from netship.records.lookup import Record, RecordLog
from netship.targets import engine

tvm = engine.compiler()
from tvm import auto_scheduler


class Choice(NamedTuple):
    """The record that serves a kernel, and its schedule."""

    record: Record
    dag: Any
    state: Any

    def compiles(self) -> bool:
        """Whether the schedule, which can be applied, also gives code."""
        try:
            tvm.lower(*self.dag.apply_steps_from_state(self.state))
        except Exception:  # noqa: BLE001 - TVM has no class for it
            return False
        return True


@dataclass(frozen=True)
class Plan:
    """The layout, why that one, and the schedules.

    Attributes:
        records: what is known of the tuning records; None where there are none for the target.
        choices: of each kernel, by `_identity`; empty where the layout is NCHW.
    """

    layout: Literal["NCHW", "NHWC"]
    reason: str
    records: Records | None = None
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)

    def failing(self) -> set[Record]:
        """The records whose schedules do not compile."""
        return {each.record for each in self.choices.values() if not each.compiles()}


UNTUNED = Plan("NCHW", "no tuning records for this target")


def make_plan(
    kernels: Sequence[Kernel],
    logs: Sequence[RecordLog],
    rejected: frozenset[Record] = frozenset(),
) -> Plan:
    """NHWC where each kernel has a record that fits, else NCHW: without one NHWC is several times slower.

    Equal workload keys are not always equal kernels (the key leaves padding out), and a log may hold anything: a
    record whose steps a kernel refuses is named, and the next best one serves.

    Args:
        logs: the one to prefer first.
        rejected: records that are known not to compile.
    """
    keys = dict.fromkeys(kernel.key for kernel in kernels)
    serving = [next((log for log in logs if key in log.best), None) for key in keys]
    used = list({id(log): log for log in serving if log}.values())
    covered = len(keys) - serving.count(None)
    choices: dict[tuple[str, str], Choice] = {}
    refused: dict[str, None] = {}
    without = set()
    for kernel in kernels if covered == len(keys) else ():
        identity = _identity(kernel.key, kernel.dag)
        if identity not in choices:
            choice = _first_fitting(kernel, logs, rejected, refused)
            if choice is None:
                without.add(kernel.key)
            else:
                choices[identity] = choice
    records = Records(
        file=", ".join(log.name for log in used),
        measured="; ".join(dict.fromkeys(log.measured for log in used)),
        tasks=len(keys),
        covered=covered - len(without),
        refused=tuple(refused),
    )
    if not keys:
        reason = "it has no operator that can be tuned"
    elif covered < len(keys):
        reason = f"tuning records cover {covered} of {len(keys)} tasks"
    elif without:
        reason = f"tuning records fit only {records.covered} of {len(keys)} tasks"
    else:
        reason = f"tuning records cover all {len(keys)} tasks"
        return Plan("NHWC", reason, records, choices)
    return Plan("NCHW", reason, records)


def _first_fitting(
    kernel: Kernel,
    logs: Sequence[RecordLog],
    rejected: frozenset[Record],
    refused: dict[str, None],
) -> Choice | None:
    """The first record that fits a kernel; those before it are added to ``refused``, in words."""
    for log in logs:
        for number, record in enumerate(log.best.get(kernel.key, ()), start=1):
            state = None if record in rejected else _applied(record, kernel.dag)
            if state is not None:
                return Choice(record, kernel.dag, state)
            refused[
                f"{log.name}: record {number} of task {kernel.key[:60]}… does not fit it; left out"
            ] = None
    return None


def _applied(record: Record, dag: Any) -> Any | None:
    """The schedule that a record holds; None where its steps do not fit the kernel."""
    load = auto_scheduler.measure_record.load_record_from_string
    try:
        state = load(record.line)[0].state
        dag.apply_steps_from_state(state)
    except (tvm.TVMError, ValueError, AttributeError, TypeError):
        return None
    return state


def _identity(key: str, dag: Any) -> tuple[str, str]:
    """What tells kernels apart that a workload key does not."""
    return key, str(dag)


class Schedules(auto_scheduler.DispatchContext):  # type: ignore[misc]
    """Gives each kernel that is compiled the schedule of a plan.

    Attributes:
        tasks: of each kernel that a record serves, by its name: the workload key.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self.tasks: dict[str, str] = {}
        self._rewritten: dict[str, tuple[str, Any]] = {}
        self._last = ""

    def query(
        self, target: Any, workload_key: str, _complex: bool, dag: Any, func_name: str
    ) -> Any:
        if workload_key in self._rewritten:
            self.tasks[func_name], state = self._rewritten[workload_key]
            return state
        choice = self._plan.choices.get(_identity(workload_key, dag))
        if choice is None:
            return self._old_ctx.query(target, workload_key, _complex, dag, func_name)
        self.tasks[func_name] = self._last = workload_key
        return choice.state

    def update(self, _target: Any, workload_key: str, state: Any) -> None:
        """The kernel last asked for has another key once its weights are laid out as its schedule wants them."""
        self._rewritten[workload_key] = self._last, state
