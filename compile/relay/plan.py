"""How a network is compiled: in which layout, and by which tuning record each of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bundle.manifest import Records
from compile.relay.tasks import Kernel
from records.lookup import Record, RecordLog
from targets import engine

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
    chooser = _Chooser(logs, rejected)
    if covered == len(keys):
        chooser.choose(kernels)
    refused = tuple(chooser.refused)
    records = Records(
        file=", ".join(log.name for log in used),
        measured="; ".join(dict.fromkeys(log.measured for log in used)),
        tasks=len(keys),
        covered=covered - len(chooser.without),
        refused=refused,
    )
    if covered < len(keys):
        reason = f"tuning records cover {covered} of {len(keys)} tasks"
    elif chooser.without:
        reason = f"tuning records fit only {records.covered} of {len(keys)} tasks"
    else:
        reason = f"tuning records cover all {len(keys)} tasks"
        return Plan("NHWC", reason, records, chooser.choices)
    return Plan("NCHW", reason, records)


class _Chooser:
    """Attributes: refused: records that do not fit, in words; without: keys of the kernels that none fits."""

    def __init__(self, logs: Sequence[RecordLog], rejected: frozenset[Record]) -> None:
        self._logs = logs
        self._rejected = rejected
        self.choices: dict[tuple[str, str], Choice] = {}
        self.refused: dict[str, None] = {}
        self.without: set[str] = set()

    def choose(self, kernels: Sequence[Kernel]) -> None:
        for kernel in kernels:
            identity = _identity(kernel.key, kernel.dag)
            if identity in self.choices:
                continue
            choice = self._first_fitting(kernel)
            if choice is None:
                self.without.add(kernel.key)
            else:
                self.choices[identity] = choice

    def _first_fitting(self, kernel: Kernel) -> Choice | None:
        for log in self._logs:
            for number, record in enumerate(log.best.get(kernel.key, ()), start=1):
                state = (
                    None if record in self._rejected else _applied(record, kernel.dag)
                )
                if state is not None:
                    return Choice(record, kernel.dag, state)
                self.refused[
                    f"{log.name}: record {number} of task {kernel.key[:60]}… does not fit it; left out"
                ] = None
        return None


def _applied(record: Record, dag: Any) -> Any | None:
    """The schedule that a record holds; None where its steps do not fit the kernel."""
    try:
        state = auto_scheduler.measure_record.load_record_from_string(record.line)[
            0
        ].state
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
