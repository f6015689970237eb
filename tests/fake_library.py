"""A standalone library of a network that is ``y = 2 x + 1`` over 12 floats, written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from netship.bundle.store import MANIFEST, Bundle, open_bundle, sha256_of
from netship.targets.presets import Target
from netship.targets.toolchain import archive, run_zig

Array = NDArray[np.float32]

NAME = "fake"
VERSION = "fake 1.0"
INPUT = Tensor(name="image", shape=(1, 3, 2, 2), layout="NCHW")
OUTPUT = Tensor(name="scores", shape=(1, 12))
# Of a library with the macro SECOND, which writes 0, 1, 2 into ``second``.
SECOND = Tensor(name="places", shape=(1, 3), dtype="int64")
PREPROCESSING = Preprocessing(
    resize=2, crop=(2, 2), scale=1 / 127.5, mean=(1,), std=(1,)
)

HEADER = """
#include <stddef.h>
#include <stdint.h>
typedef struct fake fake_t;
const char *fake_version(void);
size_t fake_workspace_bytes(void);
fake_t *fake_create(int threads);
int fake_last_error(void);
const char *fake_error_text(int code);
int fake_run(fake_t *, const float *input, OUTPUTS);
void fake_destroy(fake_t *);
int fake_self_test(void);
"""
# Each macro is what a fault puts in its place.
SOURCE = """
#define _DEFAULT_SOURCE
#include "fake.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifndef VERSION
#define VERSION "fake 1.0"
#endif
#ifndef ON_LOAD
#define ON_LOAD
#endif
#ifndef ON_CREATE
#define ON_CREATE
#endif
#ifndef ON_RUN
#define ON_RUN
#endif
#ifndef ON_DESTROY
#define ON_DESTROY
#endif
#ifndef ON_SELF_TEST
#define ON_SELF_TEST
#endif
#ifndef SECOND
#define SECOND
#endif
#ifndef WRITTEN
#define WRITTEN 12
#endif
struct fake { int threads; };
static int error;
__attribute__((constructor)) static void load(void) { ON_LOAD; }
const char *fake_version(void) { return VERSION; }
size_t fake_workspace_bytes(void) { return 4096; }
fake_t *fake_create(int threads) {
    ON_CREATE;
    if (threads > 64) { error = 7; return NULL; }
    fake_t *made = malloc(sizeof *made);
    made->threads = threads;
    return made;
}
int fake_last_error(void) { return error; }
const char *fake_error_text(int code) { return code == 7 ? "too many threads" : NULL; }
int fake_run(fake_t *it, const float *input, OUTPUTS) {
    (void)it;
    SECOND;
    ON_RUN;
    for (int i = 0; i < WRITTEN; i++) output[i] = 2 * input[i % 12] + 1;
    return 0;
}
void fake_destroy(fake_t *it) { ON_DESTROY; free(it); }
#ifndef NO_SELF_TEST
int fake_self_test(void) { ON_SELF_TEST; return 0; }
#endif
"""


def fake_library(
    folder: Path, target: Target, name: str = "fake", **macros: object
) -> Bundle:
    """Build and open the library's folder for ``target`` as ``folder/name``.

    ``macros`` are defined when `SOURCE` is compiled.
    """
    path = folder / name
    path.mkdir()
    two = "SECOND" in macros
    pointers = "float *output, int64_t *second" if two else "float *output"
    (path / "fake.h").write_text(HEADER.replace("OUTPUTS", pointers))
    source, part = folder / f"{name}.c", folder / f"{name}.o"
    source.write_text(SOURCE.replace("OUTPUTS", pointers))
    defined = [f"-D{macro}={value}" for macro, value in macros.items()]
    options = ["-O2", "-fPIC", "-Wall", "-Wextra", "-I", str(path), *defined]
    triple = ("-target", target.linker)
    run_zig("cc", part, *triple, "-c", *options, source)
    run_zig("cc", path / f"lib{NAME}.so", *triple, "-shared", part)
    archive([part], path / f"lib{NAME}.a")
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    outputs = (OUTPUT, SECOND) if two else (OUTPUT,)
    near = [np.full(each.shape, 1e-5, np.float32) for each in outputs]
    places = [np.arange(3).reshape(SECOND.shape)] if two else []
    golden = write_golden(
        path, [Check([x], [fake_network(x), *places], near) for x in inputs]
    )
    files = sorted(file for file in path.rglob("*") if file.is_file())
    manifest = Manifest(
        format="standalone",
        name=NAME,
        library=f"lib{NAME}.so",
        model=ModelIdentity(name="fake", sha256="0" * 64),
        target=TargetIdentity.of(target),
        engine="none",
        threads=1,
        inputs=(INPUT,),
        outputs=outputs,
        probabilities=False,
        preprocessing=PREPROCESSING,
        lowering=Lowering(
            layout="NCHW", reason="test", groups=(), operators={}, workspace_bytes=4096
        ),
        golden=tuple(golden),
        files={file.relative_to(path).as_posix(): sha256_of(file) for file in files},
    )
    (path / MANIFEST).write_text(manifest.to_json())
    return open_bundle(path)


def fake_network(image: Array) -> Array:
    return (2 * image + 1).reshape(OUTPUT.shape)
