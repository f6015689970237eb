"""The cores that C is generated for: what compilers call them, and what they have."""

from __future__ import annotations

from typing import NamedTuple


class Core(NamedTuple):
    """A core, or all CPUs that C99 is compiled for.

    Attributes:
        cpu: for ``-mcpu``; empty for any CPU.
        float_abi: for ``-mfloat-abi``; "soft" for a core without an FPU.
        dsp: it has the instructions of the DSP extension, such as SMLAD.
        mve: it has MVE (Helium).
        older: for ``-mcpu`` of compilers that do not know ``cpu``; empty where all know it.
    """

    cpu: str
    float_abi: str = "hard"
    dsp: bool = True
    mve: bool = False
    older: str = ""

    @property
    def fpu(self) -> bool:
        return self.float_abi == "hard"

    @property
    def flags(self) -> str:
        """What a compiler for it needs; empty for any CPU."""
        return (
            f"-mcpu={self.cpu} -mthumb -mfloat-abi={self.float_abi}" if self.cpu else ""
        )


ANY = "c99"
CORES = {
    "cortex-m0plus": Core("cortex-m0plus", "soft", dsp=False),
    "cortex-m3": Core("cortex-m3", "soft", dsp=False),
    "cortex-m4": Core("cortex-m4"),
    "cortex-m4-nofpu": Core("cortex-m4", "soft"),
    "cortex-m7": Core("cortex-m7"),
    "cortex-m33": Core("cortex-m33"),
    "cortex-m55": Core("cortex-m55", mve=True),
    "cortex-m85": Core("cortex-m85", mve=True, older="cortex-m55"),
    ANY: Core("", "", dsp=False),
}
