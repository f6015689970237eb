"""Targets: what --target takes, and what `native` finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import succeed

from netship.meter.board_files import BOARDS
from netship.meter.cycles import CORES
from netship.meter.memory import boards
from netship.meter.operators import PEAK_MACS
from netship.targets.errors import UserError
from netship.targets.presets import (
    PRESETS,
    Cpu,
    boards_of,
    faster_cores,
    missing_features,
    native,
    of_core,
    resolve,
    this_cpu,
)

V3 = frozenset(
    ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]
    + ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"]
)


def test_the_list_names_every_target_and_what_native_is() -> None:
    shown = succeed("targets")
    for target in PRESETS:
        assert target.name in shown
    answer = json.loads(succeed("targets", "--json"))
    assert answer["native"] in answer["targets"]
    assert f"): {answer['native']}" in shown
    # Without this key TVM takes arm_cpu, whose schedules are slower here.
    assert "'llvm -keys=cpu -mtriple=aarch64" in shown


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("arm-cortex-a722", "arm-cortex-a72"),
        ("x86-64v3", "x86-64-v3"),
        ("nativ", "native"),
        ("cortex-a72", r"did you mean arm-cortex-a72\?"),
        ("m7", r"did you mean cortex-m7\?"),
        ("A76", r"did you mean arm-cortex-a76\?"),
        ("esp", r"did you mean esp32\?"),
        ("rk3288", "did you mean rk3588"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("rpi4", "arm-cortex-a72"),
        ("Raspberry Pi 5", "arm-cortex-a76"),
        ("raspberry-pi-zero-2-w", "arm-cortex-a53"),
        ("pi3", "arm-cortex-a53"),
        ("jetson-nano", "arm-cortex-a72"),
        ("jetson-orin-nano", "arm-cortex-a78"),
        ("NVIDIA Jetson TX2", "arm-cortex-a72"),
        ("RK3588S", "arm-cortex-a76"),
        ("orange-pi-5-plus", "arm-cortex-a76"),
        ("rk3568", "arm-cortex-a55"),
        ("i.MX 93", "arm-cortex-a55"),
        ("i.MX 8M Plus", "arm-cortex-a53"),
        ("Altra", "neoverse-n1"),
        ("STM32H743ZI", "cortex-m7"),
        ("stm32wb55", "cortex-m4"),
        ("stm32wba52", "cortex-m33"),
        ("cm33", "cortex-m33"),
        ("CM55", "cortex-m55"),
        ("nrf52840", "cortex-m4"),
        ("rp2040", "cortex-m0plus"),
        ("stm32wb05", "cortex-m0plus"),
        ("stm32f103", "cortex-m3"),
        ("teensy-3.2", "cortex-m4-nofpu"),
        ("RA8M1", "cortex-m85"),
        ("esp32-s3", "c99"),
    ],
)
def test_a_board_or_part_means_the_target_of_its_core(name: str, target: str) -> None:
    assert resolve(name).name == target


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cm3", "rpi3.*cortex-m3"),
        ("cm4", "rpi4.*cortex-m4"),
        ("rpi-zero", "NEON"),
        ("jetson-xavier", "arm-cortex-a72"),
    ],
)
def test_a_part_that_nothing_builds_for_says_why(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("jetson", "jetsonnano, jetsonorin, jetsontx"),
        ("nvidia", "jetsonnano, jetsonorin, jetsontx"),
        ("raspberry", "rpi2, rpi3, rpi4, rpi5"),
        ("Raspberry Pi", "rpi2, rpi3, rpi4, rpi5"),
        ("rpi", "rpi2, rpi3, rpi4, rpi5"),
        ("stm32", "stm32h5, stm32h7"),
        ("i.MX", "imx8m, imx93, imxrt10"),
        ("nrf", "nrf51, nrf52"),
        ("orange-pi", "orangepi5, orangepicm4"),
        ("rk", "rk3399, rk3566, rk3568, rk3588"),
        ("cortex-m", "cortex-m33, cortex-m4, "),
        ("cortex-a", "arm-cortex-a53, "),
        ("arm", "arm-cortex-a53, "),
        ("x86", "x86-64-v2, x86-64-v3, x86-64-v4"),
    ],
)
def test_a_family_of_boards_gets_the_names_of_its_members(name: str, some: str) -> None:
    with pytest.raises(UserError, match="names several; give one of") as refused:
        resolve(name)
    _, _, members = str(refused.value).partition("give one of ")
    assert some in members
    assert all(resolve(each) for each in members.split(", "))


def test_the_boards_are_listed_and_mean_presets() -> None:
    shown = succeed("targets")
    boards = {board: target for target in PRESETS for board in boards_of(target)}
    assert len(boards) > 30
    for board, target in boards.items():
        assert resolve(board) is target
        assert board in shown


def test_boards_with_two_kinds_of_cores_say_which_are_meant() -> None:
    assert faster_cores("Orange Pi 5 Plus") == faster_cores("rk3588s") == "4-7"
    assert faster_cores("RK3399") == "4-5"
    for name in ("rpi5", "arm-cortex-a76", "native", "llvm -mcpu=cortex-a76"):
        assert faster_cores(name) == ""
    shown = succeed("targets")
    assert re.search(r"taskset -c 4-7 .*rk3588, orangepi5, rock5", shown)


def test_every_core_of_the_meter_has_a_target_that_an_emulated_cpu_runs() -> None:
    for core, modelled in CORES.items():
        target = of_core(core)
        assert (target.core, target.qemu_cpu) == (core, modelled.qemu)
        assert (core in PEAK_MACS, core in BOARDS, len(boards(core)) > 0) == (True,) * 3
    with pytest.raises(UserError, match="no target has the core 'cortex-a99'"):
        of_core("cortex-a99")


def test_a_name_like_nothing_gets_the_list() -> None:
    with pytest.raises(UserError, match="python -m targets"):
        resolve("zzzz")


def test_a_raw_string_is_taken_with_what_follows_from_it() -> None:
    target = resolve("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76")
    assert (target.machine, target.linker) == ("aarch64", "aarch64-linux-gnu.2.28")
    assert target.features == resolve("arm-cortex-a76").features
    assert target.name == "custom-cortex-a76"


@pytest.mark.parametrize("triple", ["riscv64-linux-gnu", "x86_64-windows-msvc"])
def test_a_raw_string_that_nothing_links_is_refused(triple: str) -> None:
    with pytest.raises(UserError, match=f"no linker for {triple}"):
        resolve(f"llvm -mtriple={triple}")


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        (Cpu("x86_64", V3, "", "Haswell"), "x86-64-v3"),
        (Cpu("aarch64", frozenset(), "0xd03", ""), "arm-cortex-a53"),
        (Cpu("aarch64", frozenset(), "0xd08", ""), "arm-cortex-a72"),
        (Cpu("aarch64", frozenset(), "0xd0b", ""), "arm-cortex-a76"),
        (Cpu("aarch64", frozenset(), "0xfff", ""), "arm-cortex-a53"),
    ],
)
def test_native_is_the_most_specific_that_the_cpu_can_run(cpu: Cpu, name: str) -> None:
    assert native(cpu).name == name


def test_native_never_names_what_this_machine_lacks() -> None:
    assert missing_features(native(), this_cpu()) == []


def test_cpuinfo_of_a_raspberry_pi_is_read(tmp_path: Path) -> None:
    # The lines of a Raspberry Pi 4's /proc/cpuinfo under a 64-bit kernel.
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nprocessor\t: 1\nCPU part\t: 0xd08\n"
    )
    cpu = this_cpu(cpuinfo)
    assert (cpu.part, cpu.model) == ("0xd08", "ARM part 0xd08")
    assert "asimd" in cpu.features
