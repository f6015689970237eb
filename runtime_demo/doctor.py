"""Whether a board is fit: what it has, what that means, and what to do where something is missing."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from importlib.metadata import version
from typing import NamedTuple

from devices.board.board_state import BoardState
from devices.transport.link import Address
from targets.errors import UserError
from targets.presets import PRESETS

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
    rows = [Check("reachable", found.how), _machine(state)]
    if found.system:
        rows.append(Check("system", found.system))
    rows += [_glibc(state), _cpu(state), _cores(state), _memory(state), _disk(state)]
    rows += [_governor(state), _temperature(state), _throttling(state)]
    rows += [_server(found), _tvm(found)]
    return rows


def fit(rows: list[Check]) -> bool:
    return all(row.grade is not Grade.MISSING for row in rows)


def _machine(state: BoardState) -> Check:
    if state.machine in _MACHINES:
        return Check("architecture", state.machine)
    advice = "the kit is for aarch64, ARMv7 with NEON and x86_64: take another board, or a 64-bit system"
    return Check("architecture", state.machine, Grade.MISSING, advice)


def _glibc(state: BoardState) -> Check:
    parts = (state.glibc or "").split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        advice = "a system without glibc cannot run the kit: install Raspberry Pi OS, Debian or Ubuntu"
        return Check("glibc", state.glibc or "none", Grade.MISSING, advice)
    if (int(parts[0]), int(parts[1])) < _OLDEST_GLIBC:
        advice = "2.28 or newer is needed: upgrade to Debian 10, Ubuntu 20.04 or later"
        return Check("glibc", str(state.glibc), Grade.MISSING, advice)
    return Check("glibc", str(state.glibc))


def _cpu(state: BoardState) -> Check:
    fitting = [
        target.name
        for target in PRESETS
        if not target.microcontroller
        and target.machine == state.machine
        and target.features <= set(state.features)
    ]
    found = f"{state.cpu_model or state.board or 'unknown'}: {', '.join(fitting) or 'no target'}"
    if fitting:
        return Check("CPU", found)
    return Check("CPU", found, Grade.MISSING, "no target fits: take another board")


def _cores(state: BoardState) -> Check:
    found = f"{state.cores}, the server uses {state.threads or state.cores}"
    if state.threads and state.threads < state.cores:
        advice = f"start it with --threads {state.cores} to use all"
        return Check("cores", found, Grade.NOTE, advice)
    return Check("cores", found)


def _memory(state: BoardState) -> Check:
    if state.memory_kb is None:
        return Check("memory", "", Grade.UNKNOWN)
    found = f"{state.memory_kb / 1e3:.0f} MB"
    if state.memory_kb < _MEMORY_KB:
        return Check("memory", found, Grade.NOTE, "build a smaller network")
    return Check("memory", found)


def _disk(state: BoardState) -> Check:
    if state.disk_free_bytes is None:
        return Check("disk", "", Grade.UNKNOWN)
    found = f"{state.disk_free_bytes / 1e6:.0f} MB free"
    if state.disk_free_bytes < _DISK_BYTES:
        advice = "make room: `sudo apt clean`, `df -h`; or give the server another --work-dir"
        return Check("disk", found, Grade.MISSING, advice)
    return Check("disk", found)


def _governor(state: BoardState) -> Check:
    if state.emulated or not state.governor:
        return Check("governor", "", Grade.UNKNOWN)
    if state.governor == "performance":
        return Check("governor", state.governor)
    advice = (
        "times vary with the clock; for steady ones run there `echo performance | sudo tee "
        "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`"
    )
    return Check("governor", state.governor, Grade.NOTE, advice)


def _temperature(state: BoardState) -> Check:
    if state.emulated or state.temperature_c is None:
        return Check("temperature", "", Grade.UNKNOWN)
    found = f"{state.temperature_c:.0f} °C"
    if state.temperature_c >= _HOT:
        return Check(
            "temperature", found, Grade.NOTE, "it slows down at 80 °C: cool it"
        )
    return Check("temperature", found)


def _throttling(state: BoardState) -> Check:
    if state.emulated or state.throttled is None:
        return Check("throttling", "", Grade.UNKNOWN)
    if limits := state.limits():
        advice = "times are not the CPU's: give it a better power supply, or cool it"
        return Check("throttling", ", ".join(limits), Grade.NOTE, advice)
    return Check("throttling", "none now")


def _server(found: Found) -> Check:
    if found.no_server:
        what, _, advice = found.no_server.partition("; ")
        return Check("server", what, Grade.MISSING, advice)
    from devices.board.programs import SERVER

    state, ours = found.state, _our_version()
    if state.server != ours:
        advice = f"this project is {ours}: put a kit of it on the board"
        return Check("server", f"{SERVER} {state.server}", Grade.NOTE, advice)
    return Check("server", f"{SERVER} {state.server}")


def _tvm(found: Found) -> Check:
    if found.no_server:
        return Check("TVM", "", Grade.UNKNOWN)
    wanted, there = ".".join(_engine().split(".")[:3]), found.state.tvm
    if there != wanted:
        advice = f"{wanted} is needed: put a kit of this version on the board"
        return Check("TVM", there, Grade.MISSING, advice)
    return Check("TVM", there)


def _our_version() -> str:
    from devices.board.programs import SOURCES

    text = (SOURCES / "board_info.h").read_text()
    found = re.search(r'kVersion = "([^"]+)"', text)
    assert found
    return found[1]


def _engine() -> str:
    return version("xtc-tvm-python-bindings")


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
    from devices.transport.ssh import run

    said = dict(
        line.split(" ", 1)
        for line in run(destination, _SCRIPT).splitlines()
        if " " in line
    )
    machine = said.get("machine", "unknown")
    if machine == "armv7l" or (machine == "aarch64" and said.get("bits") == "32"):
        machine = "arm"
    features = tuple(said.get("features", "").split())
    degrees = said.get("millidegrees")
    disk = said.get("disk_kb")
    state = BoardState(
        server="",
        tvm="",
        machine=machine,
        # The 64-bit kernel's names differ for a 32-bit program; each board with one has both.
        features=(*features, "neon", "vfpv4")
        if machine == "arm" and "asimd" in features
        else features,
        board=said.get("board"),
        cpu_model=said.get("cpu_model", "").strip() or None,
        cores=int(said.get("cores", 0)),
        glibc=said.get("glibc"),
        governor=said.get("governor"),
        temperature_c=int(degrees) / 1000 if degrees else None,
        throttled=int(said["throttled"], 0) if "throttled" in said else None,
        memory_kb=float(said["memory_kb"]) if "memory_kb" in said else None,
        disk_free_bytes=float(disk) * 1024 if disk else None,
    )
    return state, said.get("system", "")


def examine_ssh(destination: str, key: str | None) -> Found:
    """A board that ssh reaches, with a server or without."""
    from devices.sessions.rpc import describe
    from devices.transport.ssh import open_server

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
    from devices.sessions.rpc import describe

    state = describe(address)
    if state is None:
        raise UserError(f"{address}: {_STOCK}")
    return Found(f"TVM RPC at {address}", state)


_STOCK = "the server is TVM's own, which says nothing of its board; start the kit's there, or give --ssh"
