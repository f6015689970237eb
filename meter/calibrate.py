"""``python -m meter calibrate``: compare the meter with a real board of the user's own.

The time measured on the board divided by the estimate for the same bundle is a factor. The meter shows
it with its estimates for that CPU; it never changes an estimate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from netship.bundle.store import open_bundle
from netship.devices.sessions.session import Origin
from netship.meter import board_files
from netship.meter.counts import Counts, count_bundle, meter_version, milliseconds
from netship.meter.memory import Hierarchy, boards, hierarchy
from netship.targets.arguments import (
    add_json,
    as_json,
    command_parser,
    named_path,
    number_between,
)
from netship.targets.errors import UserError, run_command
from netship.targets.files import write_whole

_EPILOG = """\
example:
  python -m runtime_demo.check out/model-arm-cortex-a72 --ssh pi@raspberrypi --json > result.json
  python -m meter calibrate result.json --clock 1.8

One factor is kept for each CPU, the last one given; `--forget CPU` removes it. It is shown with estimates for the
same board on one thread.
Exit codes: 0 stored, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""

# Of milliseconds, and of a factor.
_MOST = 1e9


@dataclass(frozen=True)
class Calibration:
    """How a board's measured time relates to the meter's estimate of the same bundle.

    Attributes:
        cpu: such as cortex-a72.
        factor: measured divided by estimated time; more than 1 where the meter is too fast.
        measured_ms: the median that the board measured.
        estimated_ms: at ``clock``.
        clock: the board's, in GHz.
        model_sha256: of the ONNX that the bundle was built from.
        meter: the meter's version.
        date: when it was stored, ISO 8601.
        board: whose memory the estimate took, by the meter's name; empty for the core's default one.
    """

    cpu: str
    factor: float
    measured_ms: float
    estimated_ms: float
    clock: float
    model_sha256: str
    meter: str
    date: str
    board: str = ""

    @property
    def hierarchy(self) -> Hierarchy:
        return hierarchy(self.cpu, self.board)

    @property
    def is_current(self) -> bool:
        """Whether the factor is of this meter's estimates."""
        return self.meter == meter_version()

    def suits(self, board: str, threads: int) -> bool:
        """Whether it is of estimates for a board and so many threads."""
        return threads == 1 and self.hierarchy == hierarchy(self.cpu, board)


def factor(cpu: str) -> Calibration | None:
    """The stored factor of the user's own board with ``cpu``; None where nothing is stored."""
    stored = _stored().get(cpu)
    if stored is None:
        return None
    if not (isinstance(stored, dict) and _is_calibration(stored, cpu)):
        raise _damaged()
    return Calibration(**stored)


def _is_calibration(stored: dict[str, Any], cpu: str) -> bool:
    kinds = {each.name: each.type for each in fields(Calibration)}
    if not kinds.keys() - {"board"} <= stored.keys() <= kinds.keys():
        return False
    texts, numbers = (
        [value for name, value in stored.items() if kinds[name] == kind]
        for kind in ("str", "float")
    )
    return (
        all(isinstance(value, str) for value in texts)
        and all(type(value) in (int, float) and 0 < value < _MOST for value in numbers)
        and stored["cpu"] == cpu
        and stored.get("board", "") in ("", *boards(cpu))
    )


def config_file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "netship" / "calibration.json"


def _stored() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(config_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise _damaged() from None
    if not isinstance(found, dict):
        raise _damaged()
    return found


def _damaged() -> UserError:
    return UserError(
        f"{config_file()}: not what `python -m meter calibrate` wrote; remove it and calibrate again"
    )


def _store(entries: dict[str, dict[str, Any]]) -> None:
    path = config_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    write_whole(path, text.encode(), "XDG_CONFIG_HOME")


@dataclass(frozen=True)
class Measured:
    """From a result of ``runtime_demo.check``: the bundle, its CPU, the median in milliseconds."""

    bundle: Path
    model_sha256: str
    cpu: str
    milliseconds: float


def read_result(path: Path) -> Measured:
    """A result of ``runtime_demo.check --json``, measured on a board with one thread."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a result file") from None
    except ValueError:
        raise UserError(
            f"{path}: not JSON; make it with `python -m runtime_demo.check … --json`"
        ) from None
    try:
        origin, target = str(found["device"]), str(found["target"])
        threads, latency = int(found["threads"]), found["latency_ms"]
        bundle, model = Path(found["bundle"]), str(found["model_sha256"])
        median = float(latency["median"]) if latency else math.nan
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: not a result of `python -m runtime_demo.check … --json`; give one"
        ) from None
    if origin != Origin.BOARD:
        raise UserError(
            f"{path}: its times are {origin}, not {Origin.BOARD}; "
            "check the bundle on the board itself (--ssh or --rpc)"
        )
    if threads != 1:
        raise UserError(
            f"{path}: {threads} threads; a factor is of one: check with --threads 1"
        )
    if not (math.isfinite(median) and median > 0):
        raise UserError(f"{path}: has no times; check with --repeat 50")
    cpu = target.removeprefix("arm-").removeprefix("custom-")
    if cpu not in board_files.BOARDS:
        raise UserError(
            f"{path}: is of target {target}, of which the meter has no model; "
            f"known: {', '.join(board_files.BOARDS)}"
        )
    return Measured(bundle, model, cpu, median)


Estimate = Callable[[Path, str, str], Counts]
"""A bundle, a CPU and a board → an inference's counts."""


def calibrate(
    measured: Measured, clock: float, estimate: Estimate, board: str = ""
) -> Calibration:
    """Estimate the measured bundle and store the factor for its CPU; ``clock`` in GHz."""
    counts = estimate(measured.bundle, measured.cpu, board)
    estimated = milliseconds(counts, measured.cpu, clock, board)
    made = Calibration(
        cpu=measured.cpu,
        factor=round(measured.milliseconds / estimated, 4),
        measured_ms=measured.milliseconds,
        estimated_ms=round(estimated, 3),
        clock=clock,
        model_sha256=measured.model_sha256,
        meter=meter_version(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        board=board,
    )
    _store({**_stored(), made.cpu: asdict(made)})
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.forget:
        return _forget(arguments.forget, arguments.json)
    if arguments.result is None:
        raise UserError("give a RESULT.json of `python -m runtime_demo.check … --json`")
    measured = read_result(arguments.result)
    if arguments.bundle is not None:
        measured = replace(measured, bundle=arguments.bundle)
    built = open_bundle(measured.bundle).manifest.model.sha256
    if built != measured.model_sha256:
        raise UserError(
            f"{measured.bundle}: is of another network than the one that {arguments.result} measured; give --bundle"
        )
    board = arguments.board or ""
    clock = arguments.clock or hierarchy(measured.cpu, board).clock
    made = calibrate(measured, clock, _estimate, board)
    if arguments.json:
        print(as_json(asdict(made)))
    else:
        print(
            f"{made.cpu}: {made.measured_ms:.2f} ms {Origin.BOARD}, {made.estimated_ms:.2f} ms "
            f"{Origin.ESTIMATED} at {clock:.2f} GHz: factor {made.factor:.2f}, "
            f"in {config_file()}"
        )
    return 0


def _estimate(bundle: Path, cpu: str, board: str) -> Counts:
    return count_bundle(bundle, cpu, board=board)


def _forget(cpu: str, json_only: bool) -> int:
    entries = _stored()
    if cpu not in entries:
        stored = (
            f"only for {', '.join(entries)}" if entries else "nor for any other CPU"
        )
        raise UserError(f"--forget {cpu}: nothing is stored for it, {stored}")
    del entries[cpu]
    _store(entries)
    said = f"{cpu}: its factor is removed from {config_file()}"
    print(as_json({"cpu": cpu, "removed": True}) if json_only else said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "meter calibrate",
        "Compare the meter with a measurement on your own board.",
        _EPILOG,
    )
    option = parser.add_argument
    option(
        "result",
        type=named_path,
        nargs="?",
        metavar="RESULT.json",
        help="what `python -m runtime_demo.check --json` printed for a board, one thread",
    )
    option(
        "--bundle",
        type=named_path,
        metavar="DIR",
        help="the bundle that was measured (default: where the result says it was)",
    )
    option(
        "--clock",
        type=number_between(0.1, 10, "a clock in GHz, such as 1.5"),
        metavar="GHZ",
        help="the board's clock (default: as the meter has it for the board)",
    )
    option(
        "--board",
        help="whose memory the core has, as of python -m meter (default: a Raspberry Pi's, where one has the core)",
    )
    option("--forget", metavar="CPU", help="remove what is stored for a CPU")
    add_json(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
