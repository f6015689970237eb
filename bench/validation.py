"""The meter's estimates and published measurements on real boards.

``published.json`` holds what others measured, with sources. ``validation_results.json`` holds the meter's estimates
for the same runtime, network and core; ``python -m bench validate --measure`` writes it, nobody edits it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter

from netship.bench import published_networks
from netship.bench.baselines import runtimes
from netship.devices.sessions.session import Origin
from netship.meter.counts import (
    Counts,
    meter_version,
    milliseconds,
    overlapped_milliseconds,
)
from netship.targets.errors import UserError
from netship.targets.files import write_whole
from netship.targets.progress import Progress

PUBLISHED = Path(__file__).with_name("published.json")
RESULTS = Path(__file__).with_name("validation_results.json")
CLOSE = 1.25
"""An estimate more than this factor away from the published time is called wrong."""
HALVES = {
    "fit": "boards that the meter's figures were chosen by",
    "judge": "boards that only judge it",
}


class Source(NamedTuple):
    """Who measured, on what, how.

    Attributes:
        clock: GHz.
        runtime: the name in ``BASELINES`` of what they ran.
        memory: the board, by the meter's name, whose memory is taken; another one than ``board`` where that one's is
            not known.
        half: "fit" of the sources that the meter's figures were chosen by, "judge" of those that only judge it.
    """

    title: str
    url: str
    date: str
    board: str
    cpu: str
    clock: Annotated[float, Field(gt=0, lt=10)]
    os: str
    runtime: str
    version: str
    threads: Literal[1, 2, 4]
    method: str
    memory: str
    half: Literal["fit", "judge"]


class LeftOut(NamedTuple):
    """A published figure that is not compared, and why."""

    title: str
    url: str
    why: str


@dataclass(frozen=True)
class Pair:
    """One published time in milliseconds, and the estimate; ``counts`` is None where there is none yet."""

    source: Source
    network: str
    published: float
    counts: Counts | None

    @property
    def estimate(self) -> float | None:
        """Milliseconds at the source's clock."""
        if self.counts is None:
            return None
        return milliseconds(self.counts, *self._where)

    @property
    def overlapped(self) -> float | None:
        """Milliseconds if the core worked all the time that it waits for memory."""
        if self.counts is None:
            return None
        return overlapped_milliseconds(self.counts, *self._where)

    @property
    def _where(self) -> tuple[str, float, str]:
        return self.source.cpu, self.source.clock, self.source.memory

    @property
    def ratio(self) -> float | None:
        """Estimated over published."""
        return None if self.estimate is None else self.estimate / self.published

    @property
    def verdict(self) -> str:
        """What is wrong with the estimate, in words; empty where it is close."""
        if self.ratio is None:
            return "not estimated"
        if 1 / CLOSE <= self.ratio <= CLOSE:
            return ""
        if self.ratio < 1:
            return f"wrong: {1 / self.ratio:.1f} × too fast"
        return f"wrong: {self.ratio:.1f} × too slow"


@dataclass(frozen=True)
class Validation:
    """All pairs; ``meter`` and ``versions`` of the runtimes are those of the estimates."""

    pairs: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]
    meter: str
    versions: dict[str, str]

    @property
    def stale(self) -> str:
        """How the estimates' versions differ from today's; empty where they do not."""
        now = {name: runtimes.version(runtimes.find(name)) for name in self.versions}
        pairs = [("meter", self.meter or "none", meter_version())]
        pairs += [(name, old, now[name]) for name, old in self.versions.items()]
        return ", ".join(
            f"of {name} {old}, this is {new}" for name, old, new in pairs if old != new
        )

    def groups(self) -> list[tuple[str, list[Pair]]]:
        """The pairs by board and threads; where there are several boards, by half and threads too, and all together."""
        boards: dict[str, list[Pair]] = {}
        halves: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            source = pair.source
            several = f", {source.threads} threads" if source.threads > 1 else ""
            boards.setdefault(source.board + several, []).append(pair)
            kind = "several threads" if several else "one thread"
            halves.setdefault(f"{HALVES[source.half]}, {kind}", []).append(pair)
        found = list(boards.items())
        if len(found) == 1:
            return found
        return [*found, *sorted(halves.items()), ("all", list(self.pairs))]

    def to_json(self) -> dict[str, Any]:
        return {
            "meter": self.meter,
            "versions": self.versions,
            "pairs": [
                {
                    "board": pair.source.board,
                    "threads": pair.source.threads,
                    "memory": pair.source.memory,
                    "half": pair.source.half,
                    "cpu": pair.source.cpu,
                    "clock_ghz": pair.source.clock,
                    "runtime": pair.source.runtime,
                    "network": pair.network,
                    "published_ms": pair.published,
                    "published_origin": str(Origin.BOARD),
                    "source": pair.source.url,
                    "estimated_ms": pair.estimate,
                    "estimated_overlapped_ms": pair.overlapped,
                    "estimated_origin": str(Origin.ESTIMATED),
                    "ratio": pair.ratio,
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
            "summary": [
                summary(name, pairs)._asdict() for name, pairs in self.groups()
            ],
        }


class Summary(NamedTuple):
    """How estimates and published times agree over some pairs.

    Attributes:
        ratio: the geometric mean of estimated over published; low, high: the extremes.
        spearman: rank correlation; None under three pairs.
        wrong: how many are further away than ``CLOSE``.
    """

    name: str
    pairs: int
    ratio: float | None
    low: float | None
    high: float | None
    spearman: float | None
    wrong: int


def summary(name: str, pairs: Sequence[Pair]) -> Summary:
    known = [
        (p.published, p.estimate, p.ratio) for p in pairs if p.estimate and p.ratio
    ]
    if not known:
        return Summary(name, 0, None, None, None, None, 0)
    published, estimates, ratios = (
        np.array(column) for column in zip(*known, strict=True)
    )
    return Summary(
        name,
        len(known),
        float(np.exp(np.log(ratios).mean())),
        float(ratios.min()),
        float(ratios.max()),
        spearman(published.tolist(), estimates.tolist()),
        sum(1 for p in pairs if p.ratio and p.verdict),
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None under three values."""
    if len(x) < 3:
        return None
    ranks = np.array([_ranks(x), _ranks(y)])
    if not ranks.std(axis=1).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


class _Measurement(NamedTuple):
    """One row of ``published.json``; ``source`` is a key of its sources."""

    source: str
    network: str
    ms: Annotated[float, Field(gt=0, lt=1e6)]


def _sensible(counts: Counts) -> Counts:
    if not all(0 <= figure < _MOST for figure in counts) or not counts.cycles:
        raise ValueError("no such counts")
    return counts


_MOST = 1e15
_ESTIMATES = TypeAdapter(dict[str, Annotated[Counts, AfterValidator(_sensible)]])
_SOURCES = TypeAdapter(dict[str, Source])
_LEFT_OUT = TypeAdapter(tuple[LeftOut, ...])
_MEASUREMENTS = TypeAdapter(list[_Measurement])
_VERSIONS = TypeAdapter(dict[str, str])


def read() -> Validation:
    """The published measurements with the stored estimates."""
    results: dict[str, Any] = {"meter": "", "versions": {}, "estimates": {}}
    try:
        published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
        if RESULTS.exists():
            results = json.loads(RESULTS.read_text(encoding="utf-8"))
        estimates = _ESTIMATES.validate_python(results["estimates"])
        sources = _SOURCES.validate_python(published["sources"])
        left_out = _LEFT_OUT.validate_python(published["left_out"])
        pairs = []
        for each in _MEASUREMENTS.validate_python(published["measurements"]):
            source = sources[each.source]
            counts = estimates.get(_key(each.network, source))
            pairs.append(Pair(source, each.network, each.ms, counts))
        meter, versions = (
            str(results["meter"]),
            _VERSIONS.validate_python(results["versions"]),
        )
        return Validation(tuple(pairs), left_out, meter, versions)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{PUBLISHED.parent}: published.json or validation_results.json is damaged ({error}); "
            "take them from the repository again"
        ) from None


def _key(network: str, source: Source) -> str:
    """What an estimate depends on besides the clock."""
    where = source.cpu, source.memory, f"{source.threads} threads"
    return ", ".join((source.runtime, network, *where))


def measure(
    validation: Validation, progress: Progress, only_missing: bool = False
) -> None:
    """Estimate every pair's runtime and network on its core, and write the results.

    Args:
        only_missing: keep the estimates that are there.

    Raises:
        UserError: a network cannot be run, or the estimates to keep are of another version.
    """
    from netship.bench.measurement import case_of
    from netship.bench.measurement import measure as measure_row

    if only_missing and validation.stale:
        raise UserError(
            f"--measure missing: the stored estimates are {validation.stale}; --measure all makes all of them again"
        )
    wanted = {_key(pair.network, pair.source): pair for pair in validation.pairs}
    counts: dict[str, Counts] = {}
    cases = {}
    for key, pair in sorted(wanted.items()):
        network, source = pair.network, pair.source
        if only_missing and pair.counts is not None:
            counts[key] = pair.counts
            continue
        progress.note(key)
        if network not in cases:
            cases[network] = case_of(published_networks.build(network), network)
        row = measure_row(
            cases[network],
            runtimes.find(source.runtime),
            source.cpu,
            progress,
            board=source.memory,
            threads=source.threads,
        )
        if row.counts is None:
            raise UserError(f"{network} in {row.title} on {source.cpu}: {row.refused}")
        counts[key] = row.counts
    names = {pair.source.runtime for pair in validation.pairs}
    versions = {name: runtimes.version(runtimes.find(name)) for name in sorted(names)}
    found = {
        "meter": meter_version(),
        "versions": versions,
        "estimates": {key: each._asdict() for key, each in sorted(counts.items())},
    }
    write_whole(RESULTS, (json.dumps(found, indent=2) + "\n").encode(), "--measure")
