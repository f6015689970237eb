"""Cores without a board of their own in QEMU, without DSP or FPU, and C99 for any CPU: the interpreter's integers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from cortex_m_projects import Projects, expected_output, graph_for_c
from integers import patterns

from netship.bundle.store import Bundle
from netship.compile.kernels import cortex_m
from netship.devices.microcontroller.firmware import run_firmware
from netship.devices.microcontroller.portable import PortableSession
from netship.devices.microcontroller.session import (
    FirmwareSession,
    from_outputs,
    interface_of,
    open_firmware,
    to_input,
)
from netship.devices.sessions.opening import open_here
from netship.targets.cores import CORES
from netship.targets.errors import UserError

BOARDS = {
    "cortex-m0plus": "mps2-an385 (cortex-m3, code compiled for cortex-m0plus)",
    "cortex-m3": "mps2-an385 (cortex-m3)",
    "cortex-m4-nofpu": "mps2-an386 (cortex-m4)",
    "cortex-m85": "mps3-an547 (cortex-m55, code compiled for cortex-m",
}


@pytest.mark.parametrize("name", ["extremes", "oddities"])
@pytest.mark.parametrize("cpu", BOARDS)
def test_a_core_gives_the_interpreter_s_integers(
    networks: dict[str, onnx.ModelProto],
    projects: Projects,
    cpu: str,
    name: str,
    tmp_path: Path,
) -> None:
    bundle, graph = projects[name, cpu], graph_for_c(networks[name])
    size = interface_of(bundle).inputs[0].nbytes
    inputs = np.random.default_rng(1).integers(-128, 128, (2, size), dtype=np.int8)
    with open_firmware(bundle) as session:
        assert isinstance(session, FirmwareSession)
        stored = [each.tobytes() for each in inputs]
        run = run_firmware(session.image, interface_of(bundle), stored, tmp_path, 60)
        code = _disassembled(session.image.path)
    assert BOARDS[cpu] in session.image.board.title
    assert run.self_test == 0
    kernels = (bundle.path / "small_int8.h").read_text()
    assert "\n//" not in f"\n{kernels}"
    # Few sums go through soft floating point.
    assert ("nn_requantise_exactly" in kernels) != CORES[cpu].fpu
    for image, (output,) in zip(inputs, run.outputs, strict=True):
        assert (output == expected_output(graph, image)).all()
    assert ("smlad" in code) == (cpu == "cortex-m4-nofpu")
    assert bool(re.search(r"\tv\S+\tq\d", code)) == CORES[cpu].mve
    assert bool(re.search(r"\tv\w+\.f32", code)) == CORES[cpu].fpu


def _disassembled(program: Path) -> str:
    command = ["arm-none-eabi-objdump", "-d", str(program)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return ran.stdout


EXACT = """
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#define NN_LAYOUT 3
#define NN_OPERATORS "portable.h"
#include "kernels.h"
int main(void) {
  long wrong = 0, seen = 0;
  uint32_t state = 1;
  for (int i = 0; i < 30000; i++) {
    state = state * 1664525u + 1013904223u;
    const float ratio = ldexpf(1.0f + (float)(state >> 9) / 8388608.0f, -(i % 33) + 3);
    const int32_t zero = (int32_t)(state >> 3 & 255) - 128;
    for (int half = -130; half < 130; half += 3) { /* around every half, and where a sum is not exact in float32 */
      const double at = (half + 0.5) / ratio;
      if (fabs(at) > 2e9) continue;
      for (int32_t sum = (int32_t)at - 2, end = sum + 5; sum != end; sum++, seen++)
        wrong += nn_requantise(sum, ratio, zero) != nn_requantise_exactly(sum, ratio, zero);
    }
    nn_add sum = {.ratio_a = ratio, .ratio_b = 1.5f * ratio, .fixed = (float)zero / 3, .offset = (int16_t)zero, .low = -128, .high = 127};
    if (i % 2) sum.ratio_a = 0.5f, sum.ratio_b = 0.25f * (float)(i % 7), sum.fixed = (float)(i % 5) / 2; /* halves */
    int8_t a[64], b[64], out[64];
    for (int k = 0; k < 64; k++) a[k] = (int8_t)(state >> (k % 23)), b[k] = (int8_t)(state >> (k % 19));
    nn_add_run(&sum, a, b, out, 64);
    for (int k = 0; k < 64; k++, seen++)
      wrong += out[k] != nn_saturate(nn_add_exactly(&sum, a[k] + sum.offset, b[k] + sum.offset) - sum.offset);
  }
  printf("%ld %d", wrong, seen > 1000000);
  return 0;
}
"""


def test_integers_alone_round_as_float32_does(tmp_path: Path) -> None:
    (tmp_path / "exact.c").write_text(EXACT)
    program, kernels = tmp_path / "exact", Path(cortex_m.__file__).parent
    options = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{kernels}"]
    command = ["gcc", *options, str(tmp_path / "exact.c"), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=True)
    assert ran.stdout == "0 1"


def test_code_for_a_core_without_unaligned_loads_faults_at_them(
    networks: dict[str, onnx.ModelProto], projects: Projects, tmp_path: Path
) -> None:
    """So a kernel that needs them would fail on the board with another core, too."""
    bundle = projects["residuals", "cortex-m0plus"]
    folder = tmp_path / "unaligned"
    shutil.copytree(bundle.path, folder)
    source = folder / "small.c"
    text, load = source.read_text(), "*(volatile int32_t *)((uintptr_t)arena + 2)"
    first = "  NN_STEP(0);"
    assert first in text
    source.write_text(text.replace(first, f"  (void){load};\n{first}"))
    with (
        open_firmware(Bundle(folder, bundle.manifest)) as session,
        pytest.raises(UserError, match="mps2-an385: the firmware faulted"),
    ):
        session.run(patterns(networks["residuals"], 1)[0])


@pytest.mark.parametrize("name", ["residuals", "oddities", "float-oddities"])
def test_c99_runs_as_32_bit_risc_v_code(
    networks: dict[str, onnx.ModelProto], projects: Projects, name: str
) -> None:
    import onnxruntime

    bundle, proto = projects[name, "c99"], networks[name]
    (image,) = patterns(proto, 1)
    with open_here(bundle) as session:
        assert isinstance(session, PortableSession)
        (found,) = session.run(image)
    if name == "float-oddities":
        runtime = onnxruntime.InferenceSession(proto.SerializeToString())
        (expected,) = runtime.run(None, {"image": image})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        return
    stored = np.frombuffer(to_input([image], bundle), np.int8)
    integers = expected_output(graph_for_c(proto), stored)
    (expected,) = from_outputs([integers], bundle)
    assert (found == expected).all()


def test_integers_that_differ_from_this_machine_s_are_refused(
    projects: Projects, tmp_path: Path
) -> None:
    bundle = projects["residuals", "c99"]
    folder = tmp_path / "other"
    shutil.copytree(bundle.path, folder)
    source = folder / "small.c"
    text = source.read_text()
    wrong = "sizeof arena == 4 && input[0] == 127 && input[1] == 127"
    text = text.replace("  NN_STEP(0)", f"  const int wrong = {wrong};\n  NN_STEP(0)")
    end = "return SMALL_OK;"
    text = text.replace(end, f"output[0] = (int8_t)(output[0] ^ wrong);\n  {end}", 1)
    source.write_text(text)
    image = np.full(bundle.manifest.inputs[0].shape, 1e9, np.float32)
    with (
        open_here(Bundle(folder, bundle.manifest)) as session,
        pytest.raises(UserError, match="gives other integers than this machine"),
    ):
        session.run(image)


@pytest.mark.parametrize("cpu", ["cortex-m0plus", "cortex-m3", "cortex-m4-nofpu"])
def test_float32_needs_an_fpu(projects: Projects, cpu: str) -> None:
    with pytest.raises(
        UserError, match=f"--target {cpu}: has no FPU.* add --quantize int8"
    ):
        projects["float-residuals", cpu]
