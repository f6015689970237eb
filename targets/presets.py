"""The table of targets: what TVM, the linker, Linux and QEMU call each of them."""

from __future__ import annotations

import difflib
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from netship.targets.cores import ANY, CORES
from netship.targets.errors import UserError


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU to build for.

    Attributes:
        name: what ``--target`` takes, and what records and bundles are filed under.
        summary: one line for a person.
        tvm: TVM's target string. ARM targets have ``-keys=cpu`` too: the schedules of that key
            need a fifth of the instructions of ``arm_cpu``'s untuned ones.
        linker: the triple that zig links for; its suffix is the oldest glibc that can load the .so.
        machine: the ELF machine of the .so, as ``readelf -h`` and Linux's ``uname -m`` name it.
        features: what /proc/cpuinfo must list on the device (empty: the architecture's baseline).
        qemu_cpu: QEMU's ``-cpu`` that runs its code, this CPU or one with the same extensions; empty where an
            emulated board does not exist.
    """

    name: str
    summary: str
    tvm: str
    linker: str
    machine: str
    features: frozenset[str] = frozenset()
    qemu_cpu: str = ""

    @property
    def core(self) -> str:
        """The core, as LLVM's ``-mcpu`` names it; empty where the string names none."""
        found = re.search(r"-mcpu=(\S+)", self.tvm)
        return found[1] if found else ""

    @property
    def microcontroller(self) -> bool:
        """Whether it takes C source, and neither a library nor tuning."""
        return self.tvm.startswith("c ")

    @property
    def has_float16(self) -> bool:
        """Whether it has Armv8.2's arithmetic on vectors of float16."""
        return "asimdhp" in self.features

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies vectors of bfloat16."""
        return "avx512_bf16" in self.features

    @property
    def format(self) -> Literal["bundle", "c"]:
        """What a build for it is by default."""
        return "c" if self.microcontroller else "bundle"


# Micro-architecture levels: x86-64 psABI, section 3.1.1, table 3.1; names as /proc/cpuinfo has them.
_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
# What LLVM's znver4 adds over level 4 and may emit (llvm/lib/TargetParser/X86TargetParser.cpp).
_ZNVER4 = _V4.union(
    ["avx512_bf16", "avx512_vnni", "avx512vbmi", "avx512ifma", "avx512_vbmi2"],
    ["gfni", "vaes"],
)
# What LLVM's sapphirerapids adds to that.
_SAPPHIRE_RAPIDS = _ZNVER4 | frozenset(["avx512_fp16", "avx_vnni"])

_X86_LINKER = "x86_64-linux-gnu.2.28"
_ARM64_LINKER = "aarch64-linux-gnu.2.28"
_ARM32_LINKER = "arm-linux-gnueabihf.2.28"


def _x86(name: str, summary: str, features: frozenset[str]) -> Target:
    tvm = f"llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu={name} -num-cores=1"
    return Target(name, summary, tvm, _X86_LINKER, "x86_64", features)


# Armv8.2: dot product and arithmetic in float16.
_V8_2 = frozenset(["asimddp", "asimdhp", "atomics", "fphp", "asimdrdm"])


def _arm64(
    cpu: str,
    summary: str,
    features: frozenset[str] = frozenset(),
    qemu: str = "",
) -> Target:
    tvm = f"llvm -keys=cpu -mtriple=aarch64-linux-gnu -mcpu={cpu} -num-cores=4"
    name = cpu if cpu.startswith("neoverse") else f"arm-{cpu}"
    return Target(name, summary, tvm, _ARM64_LINKER, "aarch64", features, qemu or cpu)


def _cortex_m(name: str, summary: str) -> Target:
    """A microcontroller: C source, for the compiler of the firmware."""
    tvm = f"c -keys=arm_cpu,cpu -mcpu={CORES[name].cpu}"
    return Target(name, f"{summary}: C source", tvm, "thumb-freestanding", "arm")


# The triple does not imply hard-float: without the option LLVM calls soft-float routines, the link
# succeeds and the numbers are off by 0.3.
_ARMV7 = (
    "llvm -keys=cpu -mtriple=armv7l-linux-gnueabihf -mfloat-abi=hard -mattr=+neon,+vfp4"
)


def _arm32(cpu: str, name: str, summary: str) -> Target:
    tvm, features = f"{_ARMV7} -mcpu={cpu} -num-cores=4", frozenset(["neon", "vfpv4"])
    # QEMU's arm has no Cortex-A53; its Cortex-A7 lacks nothing that the code for one may use.
    qemu = "cortex-a7" if cpu == "cortex-a7" else "max"
    return Target(name, summary, tvm, _ARM32_LINKER, "arm", features, qemu)


PRESETS: tuple[Target, ...] = (
    _x86("x86-64-v2", "x86-64 with SSE4.2: Intel and AMD from about 2009", _V2),
    _x86(
        "x86-64-v3",
        "x86-64 with AVX2 and FMA: Intel Haswell (2013), AMD Zen, and later",
        _V3,
    ),
    _x86(
        "x86-64-v4",
        "x86-64 with AVX-512: Intel Skylake-SP (2017), AMD Zen 4, and later",
        _V4,
    ),
    _x86("znver4", "AMD Zen 4: EPYC 9004, Ryzen 7000", _ZNVER4),
    _x86(
        "sapphirerapids",
        "Intel Sapphire Rapids and later Xeons: 4th generation",
        _SAPPHIRE_RAPIDS,
    ),
    _arm64(
        "cortex-a53",
        "Cortex-A53, 64 bit: Raspberry Pi 3, Zero 2 W; any ARMv8.0-A runs it",
    ),
    _arm64("cortex-a72", "Cortex-A72, 64 bit: Raspberry Pi 4, Compute Module 4"),
    _arm64(
        "cortex-a76",
        "Cortex-A76, 64 bit with dot product and fp16: Raspberry Pi 5, RK3588's large cores",
        _V8_2,
    ),
    # QEMU 7.2 has neither A55 nor A78; A76 has their extensions.
    _arm64(
        "cortex-a55",
        "Cortex-A55, 64 bit with dot product and fp16: RK3566, RK3568, i.MX 93",
        _V8_2,
        "cortex-a76",
    ),
    _arm64(
        "cortex-a78",
        "Cortex-A78 and A78AE, 64 bit with dot product and fp16: Jetson Orin",
        _V8_2,
        "cortex-a76",
    ),
    _arm64(
        "neoverse-n1",
        "Neoverse N1, 64 bit with dot product and fp16: Ampere Altra, Graviton 2",
        _V8_2,
    ),
    _arm32(
        "cortex-a7", "arm-cortex-a7", "Cortex-A7, 32 bit hard-float: Raspberry Pi 2"
    ),
    _arm32(
        "cortex-a53",
        "arm-cortex-a53-32bit",
        "Cortex-A53 under a 32-bit system, hard-float: Raspberry Pi 3, Zero 2 W",
    ),
    _cortex_m("cortex-m0plus", "Cortex-M0+ and M0: RP2040, STM32G0, SAMD21"),
    _cortex_m("cortex-m3", "Cortex-M3: STM32F1, STM32L1"),
    _cortex_m("cortex-m4", "Cortex-M4 with DSP: STM32F4, nRF52"),
    _cortex_m("cortex-m4-nofpu", "Cortex-M4 without an FPU: Kinetis K20, Teensy 3.2"),
    _cortex_m("cortex-m7", "Cortex-M7: STM32F7, STM32H7, i.MX RT"),
    _cortex_m("cortex-m33", "Cortex-M33 with DSP: STM32U5, nRF53"),
    _cortex_m("cortex-m55", "Cortex-M55 with MVE: Ensemble, STM32N6"),
    _cortex_m("cortex-m85", "Cortex-M85 with MVE: RA8"),
    Target(
        ANY, "any 32-bit or 64-bit CPU: ESP32, RISC-V: C source", "c -keys=cpu", "", ""
    ),
)
_BY_NAME = {target.name: target for target in PRESETS}

# What people have in their hands, by the beginning of its name: the preset for its cores, by the makers' data sheets.
# Of parts with two kinds of cores, the faster one.
_BOARDS = {
    "arm-cortex-a7": ("rpi2", "stm32mp1"),
    "arm-cortex-a53": ("rpi3", "zero2w", "imx8m", "am62", "stm32mp2"),
    "arm-cortex-a72": ("rpi4", "jetsonnano", "jetsontx", "rk3399", "s922x"),
    "arm-cortex-a76": ("rpi5", "cm5", "rk3588", "orangepi5", "rock5"),
    "arm-cortex-a55": (
        *(
            "rk3566",
            "rk3568",
            "imx93",
            "radxazero3",
            "orangepicm4",
            "rock3",
            "odroidm1",
        ),
        *("s905x3", "odroidc4", "t527"),
    ),
    "arm-cortex-a78": ("jetsonorin", "orin", "qcs6490", "dragonq6a"),
    "neoverse-n1": ("altra", "graviton2"),
    "cortex-m0plus": (
        *("stm32f0", "stm32g0", "stm32l0", "stm32c0", "stm32u0", "stm32wb0"),
        *("rp2040", "samd21", "nrf51"),
    ),
    "cortex-m3": ("stm32f1", "stm32f2", "stm32l1", "sam3x"),
    "cortex-m4-nofpu": ("teensy31", "teensy32", "mk20"),
    "cortex-m4": ("stm32f3", "stm32f4", "stm32g4", "stm32l4", "stm32wb", "nrf52"),
    "cortex-m7": ("stm32f7", "stm32h7", "imxrt10", "imxrt11", "teensy4", "same70"),
    "cortex-m33": (
        *("stm32h5", "stm32l5", "stm32u5", "stm32wba", "nrf53", "nrf54", "rp2350"),
        *("imxrt5", "imxrt6", "cm33"),
    ),
    "cortex-m55": ("stm32n6", "ensemble", "cm55"),
    "cortex-m85": ("ra8", "cm85"),
    ANY: ("esp32", "gd32v", "ch32v"),
}
_PRESET_OF = {board: preset for preset, boards in _BOARDS.items() for board in boards}
# Of these, those with two kinds of cores: the faster ones, in Linux's numbers (Linux 6.12, arch/arm64/boot/dts:
# rockchip/rk3588-base.dtsi, rockchip/rk3399-base.dtsi, amlogic/meson-g12b.dtsi, qcom/sc7280.dtsi).
_FASTER_CORES = {
    **dict.fromkeys(("rk3588", "orangepi5", "rock5"), "4-7"),
    **dict.fromkeys(("qcs6490", "dragonq6a"), "4-7"),
    "rk3399": "4-5",
    "s922x": "2-5",
}
_WITHOUT_TARGET = {
    "cm3": "a Compute Module 3 is rpi3, a Cortex-M3 is cortex-m3",
    "cm4": "a Compute Module 4 is rpi4, a Cortex-M4 is cortex-m4",
    "rpi1": "an ARMv6 core without NEON",
    "rpizero": "an ARMv6 core without NEON",
    "jetsonxavier": "has cores without dot product, for which arm-cortex-a72 builds",
}
# A maker's name alone means its boards; before a board's name it means nothing.
_MAKERS = {
    "nvidia": "jetson",
    "rockchip": "rk",
    "nxp": "imx",
    "nordic": "nrf",
    "espressif": "esp",
}

# "CPU part" of /proc/cpuinfo, implementer 0x41 (Arm Ltd): Arm's MIDR_EL1 part numbers.
_ARM_PARTS = {
    "0xd03": "arm-cortex-a53",
    "0xd08": "arm-cortex-a72",
    "0xd0b": "arm-cortex-a76",
    "0xd05": "arm-cortex-a55",
    "0xd41": "arm-cortex-a78",
    "0xd42": "arm-cortex-a78",
    "0xd0c": "neoverse-n1",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """The CPU this process runs on."""

    machine: str
    features: frozenset[str]
    part: str
    model: str


def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Read Linux's description of this CPU (the first processor that it lists)."""
    try:
        text = cpuinfo.read_text()
    except OSError as error:
        raise UserError(
            f"{cpuinfo}: {error.strerror}; native needs Linux: name a target"
        ) from None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = frozenset(fields.get("flags", fields.get("Features", "")).split())
    model = (
        fields.get("model name", "") or f"ARM part {fields.get('CPU part', 'unknown')}"
    )
    return Cpu(platform.machine(), features, fields.get("CPU part", ""), model)


def missing_features(target: Target, cpu: Cpu) -> list[str]:
    """The features that code for ``target`` needs and ``cpu`` lacks, sorted."""
    if target.machine != cpu.machine:
        return [f"machine {target.machine}"]
    return sorted(target.features - cpu.features)


def native(cpu: Cpu | None = None) -> Target:
    """Of the presets whose features this CPU has, the one with the most."""
    cpu = cpu or this_cpu()
    if cpu.machine == "aarch64":
        return _BY_NAME[_ARM_PARTS.get(cpu.part, "arm-cortex-a53")]
    fitting = [target for target in PRESETS if not missing_features(target, cpu)]
    if not fitting:
        raise UserError(
            f"no preset fits this CPU ({cpu.model}, {cpu.machine}); give --target a TVM target string"
        )
    return max(fitting, key=lambda target: len(target.features))


def resolve(name: str) -> Target:
    """The target that ``--target NAME`` means.

    ``name`` is a preset, ``native``, a board or part (``rpi4``, ``stm32h743``), or a raw TVM
    target string (``llvm -mcpu=…``).

    Raises:
        UserError: no such preset (the nearest are named), or a raw string for
            a kind or an architecture that nothing here can link.
    """
    if name == "native":
        return native()
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.split(maxsplit=1)[:1] == ["llvm"]:
        return _from_tvm_string(name)
    board = _normalised(name)
    found = _longest_prefix(board, _PRESET_OF | _WITHOUT_TARGET)
    if found in _BY_NAME:
        return _BY_NAME[found]
    if found:
        raise UserError(
            f"target {name!r}: {found}; `python -m targets` lists what can be built"
        )
    family = _family(board)
    if len(family) > 1:
        raise UserError(
            f"target {name!r}: names several; give one of {', '.join(family)}"
        )
    near = family or (
        difflib.get_close_matches(name, [*_BY_NAME, "native"], n=3, cutoff=0.6)
        or difflib.get_close_matches(board, _PRESET_OF, n=3, cutoff=0.6)
    )
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "`python -m targets` lists them"
    )
    raise UserError(f"unknown target {name!r}; {hint}")


def of_core(core: str) -> Target:
    """The 64-bit Linux preset of an Arm core, as LLVM names it.

    Raises:
        UserError: there is none.
    """
    for target in PRESETS:
        if target.core == core and target.machine == "aarch64":
            return target
    raise UserError(f"no target has the core {core!r}; `python -m targets` lists them")


def faster_cores(name: str) -> str:
    """What ``taskset -c`` takes to keep a program on the cores that ``--target NAME`` is for; empty where all are."""
    return _longest_prefix(_normalised(name), _FASTER_CORES) or ""


def boards_of(target: Target) -> tuple[str, ...]:
    """How names of boards and parts begin that mean ``target``."""
    return _BOARDS.get(target.name, ())


def _normalised(name: str) -> str:
    """``Raspberry Pi 4B``, ``rpi-4`` → ``rpi4b``, ``rpi4``."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    plain = re.sub(rf"^({'|'.join(_MAKERS)})(?=.)", "", plain)
    plain = re.sub(r"^(raspberry|raspberrypi|raspi|pi)(?=[0-9z]|$)", "rpi", plain)
    return plain.replace("rpizero2", "zero2")


def _family(name: str) -> list[str]:
    """The targets and boards whose names go on where ``name`` ends."""
    begin = _MAKERS.get(name, name)
    if not begin:
        return []
    return sorted(
        each
        for each in (*_BY_NAME, *_PRESET_OF)
        if re.sub("[^a-z0-9]", "", each).startswith(
            tuple(f"{before}{begin}" for before in ("", "arm", "cortex", "armcortex"))
        )
    )


def _longest_prefix(name: str, table: Mapping[str, str]) -> str | None:
    fitting = [key for key in table if name.startswith(key)]
    return table[max(fitting, key=len)] if fitting else None


def _from_tvm_string(text: str) -> Target:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"target {text!r}: {error}; quote it again") from None
    options = dict(re.findall(r"-{1,2}([\w-]+)=(\S+)", " ".join(words)))
    triple = options.get("mtriple", f"{platform.machine()}-linux-gnu")
    machine = triple.partition("-")[0]
    linkers = {"x86_64": _X86_LINKER, "aarch64": _ARM64_LINKER}
    if machine not in linkers or "-linux" not in triple:
        linked = ", ".join(f"{name}-linux-gnu" for name in linkers)
        raise UserError(f"target {text!r}: no linker for {triple}; known: {linked}")
    if "mtriple" not in options:
        text += f" -mtriple={machine}-linux-gnu"
    cpu = re.sub(r"\W+", "-", options.get("mcpu", "generic")).strip("-").lower()
    known = _BY_NAME.get(cpu) or _BY_NAME.get(f"arm-{cpu}")
    return Target(
        name=f"custom-{cpu}",
        summary="a TVM target string of the user's own",
        tvm=text,
        linker=linkers[machine],
        machine=machine,
        features=known.features if known else frozenset(),
        qemu_cpu=known.qemu_cpu if known else ("max" if machine == "aarch64" else ""),
    )
