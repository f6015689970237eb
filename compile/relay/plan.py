"""How a network is compiled: in which layout, and by which tuning record each of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

from netship.bundle.manifest import Records
from netship.compile.relay import neighbours
from netship.compile.relay.neighbours import Fitted
from netship.compile.relay.tasks import Kernel
from netship.compile.relay.tiles import Vectors
from netship.records.lookup import Record, RecordLog
from netship.targets import engine
from netship.targets.escapes import all_counted, counted

tvm = engine.compiler()
from tvm import auto_scheduler

# A neighbour's schedule that a kernel refuses is rare.
_TRIES = 8


# TOPI's schedules for NCHW are as good for dense convolutions of 3×3 and more.
_MOST_STRANGE = 0.25
# Fitted schedules lose to TOPI's where fewer of the vectors' lanes compute: MobileNetV3-small of half its width takes 1.44
# of ONNX Runtime's time on AVX-512 with 41 %, and 0.9 with TOPI's. MobileNetV2 0.75 gains 30 % with 74 %.
_LEAST_FULL = 0.5


class Choice(NamedTuple):
    """The record that serves a kernel, and its schedule.

    Attributes:
        fitted: where the record is a neighbour's.
    """

    record: Record
    dag: Any
    state: Any
    fitted: Fitted | None = None

    @property
    def strange(self) -> bool:
        """Whether the record is of another kind of convolution."""
        return self.fitted is not None and not self.fitted.alike

    @property
    def lanes(self) -> float:
        """Lanes of vectors for each that computes. Records of the kernel's own were measured: they count as full."""
        return self.fitted.lanes if self.fitted else 1.0

    @property
    def attained(self) -> float:
        """Seconds of the kernel with a record of its own, as far as records show: at the neighbour's own rate."""
        return self.fitted.attained if self.fitted else self.record.seconds

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
    vectors: Vectors,
    rejected: frozenset[Record] = frozenset(),
    channels_last: bool = False,
) -> Plan:
    """NHWC where each convolution has a record that fits or a neighbour's, else NCHW: without one NHWC is slow.

    It is NCHW, too, where the neighbours' are of other kinds of convolutions, or would leave most of the vectors' lanes
    empty, as channels do that are no multiples of a vector's length.

    Equal workload keys are not always equal kernels (the key leaves padding out), and a log may hold anything: a
    record whose steps a kernel refuses is named, and the next best one serves.

    Args:
        logs: the one to prefer first.
        vectors: of the target in float32, for neighbours' schedules.
        rejected: records that are known not to compile.
        channels_last: it is NHWC in any case, as other kernels of the network need it.
    """
    keys = dict.fromkeys(kernel.key for kernel in kernels)
    serving = [next((log for log in logs if key in log.best), None) for key in keys]
    used = {id(log): log for log in serving if log}
    choices: dict[tuple[str, str], Choice] = {}
    refused: dict[str, None] = {}
    own, fitted, slow = set(keys), set(), set()
    estimated, attained = 0.0, 0.0
    # Operations of all kernels, those that take a record of another kind of convolution, and the lanes that all take.
    work, strange, lanes = 0.0, 0.0, 0.0
    for kernel in kernels:
        identity = _identity(kernel.key, kernel.dag)
        if identity not in choices:
            choice = _first_fitting(kernel, logs, rejected, refused)
            if choice is None:
                own.discard(kernel.key)
                choice = _of_neighbour(kernel, logs, vectors, rejected)
                if choice and choice.fitted:
                    fitted.add(kernel.key)
                    used[id(choice.fitted.log)] = choice.fitted.log
                elif neighbours.multiplies(kernel.dag):
                    slow.add(kernel.key)
            if choice:
                choices[identity] = choice
        if choice := choices.get(identity):
            estimated += choice.record.seconds
            attained += choice.attained
            work += kernel.dag.flop_ct
            strange += choice.strange * kernel.dag.flop_ct
            lanes += choice.lanes * kernel.dag.flop_ct
    records = Records(
        file=", ".join(log.name for log in used.values()),
        measured="; ".join(dict.fromkeys(log.measured for log in used.values())),
        tasks=len(keys),
        covered=len(own),
        fitted=len(fitted),
        gain=1 - attained / estimated if fitted else 0.0,
        refused=tuple(refused),
    )
    cover = f"tuning records cover {len(own)} of {counted(len(keys), 'task')}"
    if channels_last:
        reason = f"{cover}, fitted records of neighbours {len(fitted)} more"
        if slow:
            reason += f"; {len(slow)} others are slow without one"
        return Plan("NHWC", reason, records, choices)
    if not keys:
        reason = "it has no operator that can be tuned"
    elif slow:
        reason = f"{cover}; {len(slow)} of the others cannot take one of a neighbour"
    elif strange > _MOST_STRANGE * work:
        reason = (
            f"{cover}; for {strange / work:.0%} of the operations there are only those of "
            "another kind of convolution"
        )
    elif work < _LEAST_FULL * lanes:
        reason = (
            f"{cover}; with fitted records of neighbours {work / lanes:.0%} of the lanes of vectors would compute, "
            f"too few for the layout NHWC"
        )
    elif len(own) == len(keys):
        reason = f"tuning records cover {all_counted(len(keys), 'task')}"
        return Plan("NHWC", reason, records, choices)
    else:
        reason = f"{cover}, fitted records of neighbours {len(fitted)} more"
        return Plan("NHWC", reason, records, choices)
    return Plan("NCHW", reason, records)


def _of_neighbour(
    kernel: Kernel,
    logs: Sequence[RecordLog],
    vectors: Vectors,
    rejected: frozenset[Record],
) -> Choice | None:
    """The schedule for a kernel without a record that is estimated to be the quickest."""
    found = neighbours.fitting(kernel.key, kernel.dag, logs, vectors)
    for fitted in islice(found, _TRIES):
        state = None
        if fitted.record not in rejected:
            state = _applied(fitted.record, kernel.dag)
        if state is not None:
            return Choice(fitted.record, kernel.dag, state, fitted)
    return None


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
