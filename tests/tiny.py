"""A bundle of a tiny network, for tests of everything that loads bundles.

The library is compiled in a process of its own: this file run as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from netship.bundle.golden import Check, seeded_inputs, write_golden
from netship.bundle.manifest import (
    Lowering,
    Manifest,
    ModelIdentity,
    Preprocessing,
    TargetIdentity,
    Tensor,
)
from netship.bundle.store import LIBRARY, MANIFEST, Bundle, open_bundle, sha256_of
from netship.targets.presets import Target
from netship.targets.toolchain import run_zig

Array = NDArray[np.float32]

INPUT = Tensor(name="image", shape=(1, 3, 16, 16), layout="NCHW")
OUTPUT = Tensor(name="scores", shape=(1, 5))
PREPROCESSING = Preprocessing(
    resize=16, crop=(16, 16), scale=1 / 127.5, mean=(1,), std=(1,)
)

# A constructor, so it runs when model.so is loaded. SDOT v0.4s, v1.16b, v2.16b (FEAT_DotProd),
# encoding: Arm Architecture Reference Manual, C7.2 "SDOT (vector)".
DOT_PRODUCT = """
__attribute__((constructor)) static void dot(void) { __asm__ volatile(".inst 0x4e829420"); }
"""


def tiny_bundle(
    folder: Path, target: Target, name: str = "tiny", extra_c: str = ""
) -> Bundle:
    """Build and open the tiny network's bundle for ``target`` as ``folder/name``.

    ``extra_c`` is C code that is linked into model.so.
    """
    path = folder / name
    path.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    # Set where this process has loaded the runtime alone, which cannot compile.
    environment.pop("TVM_USE_RUNTIME_LIB", None)
    subprocess.run(
        [
            sys.executable,
            __file__,
            target.tvm,
            target.linker,
            extra_c,
            str(path / LIBRARY),
        ],
        check=True,
        env=environment,
        cwd=folder,
    )
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    near = [np.full(OUTPUT.shape, 1e-5, np.float32)]
    golden = write_golden(path, [Check([x], [tiny_network(x)], near) for x in inputs])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    manifest = Manifest(
        model=ModelIdentity(name="tiny", sha256="0" * 64),
        target=TargetIdentity.of(target),
        engine="0.19.0",
        threads=1,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        probabilities=False,
        preprocessing=PREPROCESSING,
        lowering=Lowering(
            layout="NCHW", reason="test", groups=(), operators={}, workspace_bytes=0
        ),
        golden=tuple(golden),
        files={file.relative_to(path).as_posix(): sha256_of(file) for file in files},
    )
    (path / MANIFEST).write_text(manifest.to_json())
    return open_bundle(path)


def tiny_network(image: Array) -> Array:
    """The network in numpy, in double precision: float32 [1,3,16,16] → [1,5]."""
    spatial, pointwise = _weights()
    padded = np.pad(image[0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))
    hidden = np.maximum(np.einsum("chwij,ocij->ohw", windows, spatial), 0)
    scores = np.einsum("chw,oc->ohw", hidden, pointwise[:, :, 0, 0]).mean((1, 2))
    return np.asarray(scores[np.newaxis], np.float32)


def _weights() -> tuple[Array, Array]:
    random = np.random.Generator(np.random.PCG64(7))
    spatial = random.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32)
    return spatial, random.normal(0, 0.4, (5, 8, 1, 1)).astype(np.float32)


def _compile(tvm_target: str, linker: str, extra_c: str, output: str) -> None:
    from netship.targets.engine import compiler

    tvm = compiler()
    relay = tvm.relay
    spatial, pointwise = (relay.const(weight) for weight in _weights())
    image = relay.var(INPUT.name, shape=INPUT.shape)
    hidden = relay.nn.relu(
        relay.nn.conv2d(image, spatial, padding=1, channels=8, kernel_size=(3, 3))
    )
    scores = relay.nn.global_avg_pool2d(
        relay.nn.conv2d(hidden, pointwise, channels=5, kernel_size=(1, 1))
    )
    module = tvm.IRModule.from_expr(relay.nn.batch_flatten(scores))
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(module, tvm.target.Target(tvm_target))

    def link(path: str, objects: list[str], **_options: object) -> None:
        extra = Path(path).with_name("extra.c")
        extra.write_text(extra_c)
        options = ("-target", linker, "-shared", "-fPIC", "-O2", "-s")
        run_zig("cc", Path(path), *options, *objects, extra)

    link.output_format = "so"  # type: ignore[attr-defined]
    library.export_library(output, fcompile=link)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
