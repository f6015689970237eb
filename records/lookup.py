"""Tuning records on disk: AutoScheduler's own JSON lines, one origin a file, with a header."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from netship.targets.errors import UserError
from netship.targets.escapes import listed
from netship.targets.presets import PRESETS, Target

SHIPPED = Path(__file__).parent / "shipped"
USER = Path("tuned")
# The texts of devices.sessions.session.Origin, the one that is trusted most first.
ORIGINS = ("measured on board", "measured on host", "estimated")
# An emulated board's times say nothing of a board: a build takes such records where they are named only.
EMULATED = "emulated"
# What of a header is text wherever it is there.
_TEXTS = ("target", "preset", "network", "numbers", "origin", "measured", "tvm")
_FORMAT = "v0.6"
_STRANGE = "not a tuning record"
# A date has a year from 1 to 3939. TVM writes 32 bits: a clock that was set past 2038 gives one before 1970.
_SECONDS_SINCE_YEAR_1 = 62_135_596_800


class Record(NamedTuple):
    """One trial.

    Attributes:
        workload: AutoScheduler's key of the task.
        seconds: of one run; meaningless where there is an error.
        error: AutoScheduler's MeasureErrorNo, 0 for none.
        when: seconds since 1970.
        line: its JSON text.
    """

    workload: str
    seconds: float
    error: int
    when: float
    line: str


@dataclass(frozen=True)
class RecordLog:
    """The records of one target, all measured in one way.

    Attributes:
        name: the file's name.
        header: what the first line says: target, measured (on what the times were taken), …
        records: one for each line that parses.
        skipped: one message for each line that does not.
        path: of the file.
    """

    name: str
    header: dict[str, Any]
    records: tuple[Record, ...]
    skipped: tuple[str, ...]
    path: Path = Path()

    @property
    def measured(self) -> str:
        """On what the times were taken."""
        return str(self.header["measured"])

    @property
    def origin(self) -> str:
        """One of `ORIGINS`, or `EMULATED`; empty where the header does not say."""
        stated = str(self.header.get("origin", self.measured))
        known = (*ORIGINS, EMULATED)
        return next((each for each in known if stated.startswith(each)), "")

    @property
    def preset(self) -> str:
        """The target's name."""
        return str(self.header.get("preset", Path(self.name).stem))

    @property
    def numbers(self) -> str:
        """What the networks compute in that its records are of: float32, where the header does not say, or float16."""
        return str(self.header.get("numbers", "float32"))

    @property
    def threads(self) -> int:
        """With how many the times were taken."""
        threads = self.header.get("threads", 1)
        return threads if isinstance(threads, int) else 1

    @property
    def comparable(self) -> dict[str, object]:
        """In what logs must agree for their times to be compared."""
        return {
            "target": canonical(str(self.header.get("target", ""))),
            "origin": self.origin,
            "numbers": self.numbers,
            "threads": self.header.get("threads", 1),
            "tvm": self.header.get("tvm"),
        }

    @property
    def lines(self) -> tuple[str, ...]:
        """The records as JSON text."""
        return tuple(record.line for record in self.records)

    @property
    def text(self) -> str:
        """The file's content."""
        header = json.dumps(self.header, ensure_ascii=False)
        return "\n".join([f"# {header}", *self.lines, ""])

    @cached_property
    def best(self) -> dict[str, list[Record]]:
        """Of each task the records without an error, each schedule once, the quickest first."""
        found: dict[str, dict[str, Record]] = {}
        for record in sorted(self.records, key=lambda record: record.seconds):
            if not record.error:
                steps = json.dumps(json.loads(record.line)["i"][1])
                found.setdefault(record.workload, {}).setdefault(steps, record)
        return {key: list(each.values()) for key, each in found.items()}


def parse(line: str) -> Record:
    """Read a line of AutoScheduler's format: {"i": [task, state], "r": [costs, error, …, when], "v": …}.

    Raises:
        ValueError: it is something else; a person reads the message behind the line's number.
    """
    try:
        whole = json.loads(line)
    except ValueError:
        raise ValueError("torn: not a whole line of JSON") from None
    except RecursionError:
        raise ValueError(_STRANGE) from None
    version = whole.get("v") if isinstance(whole, dict) else None
    if isinstance(version, str) and version != _FORMAT:
        raise ValueError(f"a record of version {version!r}, not {_FORMAT}")
    try:
        (task, (_, steps)), (costs, error, _, when) = whole["i"], whole["r"]
        key, target = task[:2]
        seconds, when = fmean(costs), float(when)
        usable = (
            version == _FORMAT
            and isinstance(error, int)
            and isinstance(steps, list)
            and isinstance(json.loads(key), list)
            and 0 < seconds < math.inf
            and abs(when) < _SECONDS_SINCE_YEAR_1
        )
        # Half a character can be written in JSON, and neither printed nor given to the engine.
        (key + target).encode()
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        usable = False
    if not usable:
        raise ValueError(_STRANGE)
    return Record(key, seconds, error, when, line)


def canonical(target: str) -> str:
    """A TVM target string in one wording; the number of cores is no part of it: a schedule serves any.

    Of the keys the first, which schedules are chosen by, is written out: by default ``arm_cpu`` for Arm's triples,
    else ``cpu``; TVM itself adds others behind it.
    """
    try:
        kind, *options = shlex.split(target) or [""]
    except ValueError:  # a quotation that does not end
        kind, *options = target.split()
    named = dict(option.lstrip("-").partition("=")[::2] for option in options)
    named.pop("num-cores", None)
    arm = named.get("mtriple", "").startswith(("aarch64", "arm", "thumb"))
    keys = named.get("keys", "arm_cpu" if arm else "cpu")
    named["keys"] = keys.partition(",")[0]
    # A triple of x86-64 is the compiling machine's own wherever the string leaves it out.
    if named.get("mtriple", "").startswith("x86_64"):
        del named["mtriple"]
    if "mattr" in named:
        named["mattr"] = ",".join(sorted(named["mattr"].split(",")))
    return " ".join([kind, *(f"-{key}={named[key]}" for key in sorted(named))])


def places(model: str = "") -> tuple[Path, ...]:
    """Where logs are looked for: ``tuned`` in the working folder, next to the model and in the user's data; those shipped.

    The user's data are in ``$XDG_DATA_HOME/netship``, by default ``~/.local/share/netship``.
    """
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # The XDG base directory specification: a relative path is to be ignored.
    if not data.is_absolute():
        data = Path(os.path.expanduser("~")) / ".local" / "share"
    found = (USER, Path(model).parent / USER, data / "netship" / USER, SHIPPED)
    return tuple({path.absolute(): path for path in reversed(found)}.values())[::-1]


def find(
    target: Target,
    stated: Sequence[Path] = (),
    folders: Iterable[Path] | None = None,
    threads: int = 1,
    numbers: str = "float32",
) -> tuple[list[RecordLog], list[str]]:
    """The logs that a build for ``target`` may use, the one to prefer first, and notes for a person.

    Those that the user names come first; then board before host before estimated, the nearest target whose
    instructions this one has, and the nearest number of ``threads``: what is quickest on one may have nothing to share
    with a second. Those of emulated boards come not at all. A log found by itself that cannot be read is named and left
    out.

    Args:
        folders: where logs are looked for; those of `places` where None.
        numbers: what the network computes in, float32 or float16; a task's key does not always say.

    Raises:
        UserError: a log that the user names cannot be read, or is of other numbers.
    """
    folders = places() if folders is None else folders
    logs, notes = [read(path, bare=True) for path in stated], []
    for log in logs:
        if log.numbers != numbers:
            raise UserError(
                f"{log.path}: its records are of {log.numbers}, the network is in {numbers}; give a log of "
                f"python -m tuning.tune --precision {numbers}"
            )
    found: list[tuple[int, int, int, RecordLog]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            log = read(path)
        except UserError as error:
            notes.append(f"{error}; left out")
            continue
        distance = _distance(log, target)
        if log.numbers == numbers and distance is not None and log.origin in ORIGINS:
            strange = abs(log.threads - threads)
            found.append((ORIGINS.index(log.origin), distance, strange, log))
    logs += [log for *_, log in sorted(found, key=lambda each: each[:3])]
    return logs, notes + [line for log in logs for line in log.skipped]


def described(logs: Sequence[RecordLog]) -> list[str]:
    """For a person: each log of the user's with its path and on what it was measured, the shipped ones in one line."""
    own = [log for log in logs if log.path.parent != SHIPPED]
    ours = [log for log in logs if log.path.parent == SHIPPED]
    said = [f"{log.path}, {log.measured}" for log in own]
    if ours:
        origins = " and ".join(sorted({log.origin for log in ours}))
        names = listed([log.name for log in ours], 2)
        said.append(f"{names}, of those that netship brings, {origins}")
    return said


def shipped(target: Target) -> list[RecordLog]:
    """All shipped logs, nearest target first: schedules of any are a first guess for another."""
    logs = [read(path) for path in sorted(SHIPPED.glob("*.json"))]
    return sorted(logs, key=lambda log: _strangeness(log, target))


def _strangeness(log: RecordLog, target: Target) -> tuple[bool, int]:
    distance = _distance(log, target)
    other = next((each for each in PRESETS if each.name == log.preset), target)
    return other.machine != target.machine, 1000 if distance is None else distance


def _distance(log: RecordLog, target: Target) -> int | None:
    """How far the target that a log was made for is from another; None where its schedules cannot serve."""
    if log.preset == target.name or canonical(log.header.get("target", "")) == (
        canonical(target.tvm)
    ):
        return 0
    other = next((each for each in PRESETS if each.name == log.preset), None)
    if (
        other is None
        or other.microcontroller != target.microcontroller
        or other.machine != target.machine
        or not other.features <= target.features
        or _keys(other) != _keys(target)
    ):
        return None
    return 1 + len(target.features - other.features)


def _keys(target: Target) -> str:
    words = canonical(target.tvm).split()
    return next(word for word in words if word.startswith("-keys="))


def user_log(target_name: str, origin: str) -> Path:
    """Where a user's own records of a preset lie, in the working folder: one log for each origin."""
    return USER / f"{target_name}-{origin}.json"


def read(path: Path, bare: bool = False) -> RecordLog:
    """Read a record log; a torn or foreign line is skipped and named, not fatal.

    Args:
        bare: take a file without a header too, as TVM's own tools write it.

    Raises:
        UserError: the file cannot be read, or does not begin with its header line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if bare and not text.startswith("#"):
        text = '# {"measured": "not said"}\n' + text
    header, _, body = text.partition("\n")
    try:
        fields = dict(json.loads(header.removeprefix("#")))
        if not all(isinstance(fields.get(key, ""), str) for key in _TEXTS):
            raise TypeError
        (fields["measured"] + json.dumps(fields, ensure_ascii=False)).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: line 1 must be '# {{\"measured\": …}}'") from None
    found, skipped = [], []
    for number, line in enumerate(body.splitlines(), start=2):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            found.append(parse(line))
        except ValueError as error:
            skipped.append(f"{path}:{number}: {error}; skipped")
    return RecordLog(path.name, fields, tuple(found), tuple(skipped), path)
