"""Whether a board is fit: what it has, what that means, and what to do where something is missing."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from importlib.metadata import version
from typing import NamedTuple

from netship.devices.board.board_state import BoardState
from netship.devices.board.programs import SERVER, SOURCES
from netship.devices.transport.link import Address
from netship.targets.errors import UserError
from netship.targets.presets import PRESETS

_OLDEST_GLIBC = (2, 28)
# A MobileNetV2 of float32 takes 14 MB on disk and some 60 MB of memory while it runs.
_MEMORY_KB, _DISK_BYTES = 100_000, 50_000_000
_HOT = 75.0
_MACHINES = ("aarch64", "arm", "x86_64")


class Grade(StrEnum):
    GOOD = "ok"
    UNKNOWN = "unknown"
    NOTE = "note"
    MISSING = "missing"


class Check(NamedTuple):
    """A row: what was looked at, what was found, and what to do where that is not good."""

    name: str
    found: str
    grade: Grade = Grade.GOOD
    advice: str = ""


class Found(NamedTuple):
    """What is known of a board.

    Attributes:
        how: it was reached.
        system: its name; empty where that is not known.
        no_server: why no server of ours describes it; empty where one does.
    """

    how: str
    state: BoardState
    system: str = ""
    no_server: str = ""


def checks(found: Found) -> list[Check]:
    """Every row of the table."""
    state = found.state
    if state.emulated:
        # These are this machine's.
        changing = ("governor", "temperature_c", "throttled")
        state = state.model_copy(update=dict.fromkeys(changing))
    what, _, advice = found.no_server.partition("; ")
    server = "" if found.no_server else f"{SERVER} {state.server}"
    tvm = "" if found.no_server else state.tvm
    engine = ".".join(version("xtc-tvm-python-bindings").split(".")[:3])
    return [
        Check("reachable", found.how),
        _check(
            "architecture",
            state.machine,
            state.machine not in _MACHINES,
            "the kit is for aarch64, ARMv7 with NEON and x86_64: take another board, or a 64-bit system",
            Grade.MISSING,
        ),
        *([Check("system", found.system)] if found.system else []),
        _glibc(state.glibc or "none"),
        _cpu(state),
        _check(
            "cores",
            f"{state.cores}, the server uses {state.threads or state.cores}",
            0 < state.threads < state.cores,
            f"start it with --threads {state.cores} to use all",
        ),
        _check(
            "memory",
            _amount(state.memory_kb, 1e3, "MB"),
            (state.memory_kb or 0) < _MEMORY_KB,
            "build a smaller network",
        ),
        _check(
            "disk",
            _amount(state.disk_free_bytes, 1e6, "MB free"),
            (state.disk_free_bytes or 0) < _DISK_BYTES,
            "make room: `sudo apt clean`, `df -h`; or give the server another --work-dir",
            Grade.MISSING,
        ),
        _check(
            "governor",
            state.governor or "",
            state.governor != "performance",
            "times vary with the clock; for steady ones run there `echo performance | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`",
        ),
        _check(
            "temperature",
            _amount(state.temperature_c, 1, "°C"),
            (state.temperature_c or 0) >= _HOT,
            "it slows down at 80 °C: cool it",
        ),
        _check(
            "throttling",
            "" if state.throttled is None else ", ".join(state.limits()) or "none now",
            bool(state.limits()),
            "times are not the CPU's: give it a better power supply, or cool it",
        ),
        Check("server", what, Grade.MISSING, advice)
        if found.no_server
        else _check(
            "server",
            server,
            state.server != _our_version(),
            f"this project is {_our_version()}: put a kit of it on the board",
        ),
        _check(
            "TVM",
            tvm,
            tvm != engine,
            f"{engine} is needed: put a kit of this version on the board",
            Grade.MISSING,
        ),
    ]


def _check(
    name: str, found: str, wrong: bool, advice: str, grade: Grade = Grade.NOTE
) -> Check:
    """A row: unknown where nothing was found, of that grade and with advice only where it is wrong."""
    if not found:
        return Check(name, "", Grade.UNKNOWN)
    return Check(name, found, grade, advice) if wrong else Check(name, found)


def _amount(value: float | None, unit: float, name: str) -> str:
    return "" if value is None else f"{value / unit:.0f} {name}"


def fit(rows: list[Check]) -> bool:
    return all(row.grade is not Grade.MISSING for row in rows)


def _glibc(found: str) -> Check:
    release = re.match(r"(\d+)\.(\d+)", found)
    if release is None:
        advice = "a system without glibc cannot run the kit: install Raspberry Pi OS, Debian or Ubuntu"
        return Check("glibc", found, Grade.MISSING, advice)
    old = (int(release[1]), int(release[2])) < _OLDEST_GLIBC
    advice = "2.28 or newer is needed: upgrade to Debian 10, Ubuntu 20.04 or later"
    return _check("glibc", found, old, advice, Grade.MISSING)


def _cpu(state: BoardState) -> Check:
    fitting = [
        target.name
        for target in PRESETS
        if not target.microcontroller
        and target.machine == state.machine
        and target.features <= set(state.features)
    ]
    found = f"{state.cpu_model or state.board or 'unknown'}: {', '.join(fitting) or 'no target'}"
    advice = "no target fits: take another board"
    return _check("CPU", found, not fitting, advice, Grade.MISSING)


def _our_version() -> str:
    text = (SOURCES / "board_info.h").read_text()
    found = re.search(r'kVersion = "([^"]+)"', text)
    assert found
    return found[1]


# Prints `name value`, one a line, without what the board does not report.
_SCRIPT = r"""
say() { [ -z "$2" ] || echo "$1 $2"; }
say bits "$(getconf LONG_BIT 2>/dev/null)"
say machine "$(uname -m)"
say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)"
say system "$(. /etc/os-release 2>/dev/null; echo "$PRETTY_NAME")"
say board "$(cat /proc/device-tree/model 2>/dev/null | tr -d '\0')"
say features "$(grep -m1 -iE '^(features|flags)' /proc/cpuinfo | cut -d: -f2)"
say cpu_model "$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2)"
say cores "$(nproc 2>/dev/null)"
say memory_kb "$(grep -m1 MemTotal /proc/meminfo | tr -dc 0-9)"
say disk_kb "$(df -kP . 2>/dev/null | tail -1 | awk '{print $4}')"
say governor "$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"
say millidegrees "$(cat /sys/class/thermal/thermal_zone0/temp 2>/dev/null)"
say throttled "$(vcgencmd get_throttled 2>/dev/null | cut -d= -f2)"
"""


def ask_system(destination: str) -> tuple[BoardState, str]:
    """What a board reports without our server, and the name of its system."""
    from netship.devices.transport.ssh import run

    lines = run(destination, _SCRIPT).splitlines()
    said = dict(line.split(" ", 1) for line in lines if " " in line)
    machine, features = said.get("machine", "unknown"), said.get("features", "").split()
    if machine == "armv7l" or (machine == "aarch64" and said.get("bits") == "32"):
        machine = "arm"
        if "asimd" in features:
            # The 64-bit kernel's names differ for a 32-bit program; each board with one has both.
            features += ["neon", "vfpv4"]
    degrees, disk = said.get("millidegrees"), said.get("disk_kb")
    found = {
        "server": "",
        "tvm": "",
        "machine": machine,
        "features": features,
        "cpu_model": said.get("cpu_model", "").strip() or None,
        "temperature_c": int(degrees) / 1000 if degrees else None,
        "throttled": int(said["throttled"], 0) if "throttled" in said else None,
        "disk_free_bytes": float(disk) * 1024 if disk else None,
    }
    state = BoardState.model_validate({**said, **found})
    return state, said.get("system", "")


def examine_ssh(destination: str, key: str | None) -> Found:
    """A board that ssh reaches, with a server or without."""
    from netship.devices.sessions.rpc import describe
    from netship.devices.transport.ssh import open_server

    state, system = ask_system(destination)
    try:
        with open_server(destination, key) as address:
            theirs = describe(address)
    except UserError as error:
        reason = str(error).removeprefix(f"{destination}: ")
        return Found(f"ssh {shlex.quote(destination)}", state, system, reason)
    if theirs is None:
        return Found(f"ssh {destination}", state, system, _STOCK)
    return Found(f"ssh {destination}", theirs, system)


def examine_rpc(address: Address) -> Found:
    """A board whose server is at ``address``."""
    from netship.devices.sessions.rpc import describe

    state = describe(address)
    if state is None:
        raise UserError(f"{address}: {_STOCK}")
    return Found(f"TVM RPC at {address}", state)


_STOCK = "the server is TVM's own, which says nothing of its board; start the kit's there, or give --ssh"
