"""The thin layer over Apache TVM 0.19: environment, onnx shim, messages.

This file holds every work-around that TVM needs before it can be used, each with its reason.
tests/test_engine.py fails when one is no longer needed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import types
from functools import cache
from typing import Any

from netship.targets.errors import UserError


def compiler() -> Any:
    """Import all of TVM (Relay, LLVM), ready to compile; takes about a second the first time.

    Raises:
        UserError: this process has imported the runtime, which cannot compile.
    """
    # Otherwise a build for arm_cpu tries to download schedules, and fails where there is no network.
    os.environ["TOPHUB_LOCATION"] = "NONE"
    # What runtime() sets in a parent process must not reach a child that compiles.
    os.environ.pop("TVM_USE_RUNTIME_LIB", None)
    _onnx_shim()
    import tvm

    if tvm._ffi.base._RUNTIME_ONLY:
        raise UserError(
            "this process runs builds with TVM's runtime, which cannot compile; tune in a process of its own"
        )
    import tvm.relay
    from tvm.relay.backend import te_compiler

    # TVM reads all flags of its own build for each dimension of each shape, 4 ms a time.
    if not hasattr(te_compiler.libinfo, "cache_info"):
        te_compiler.libinfo = cache(te_compiler.libinfo)
    # TVM warns that operators have not been tuned; the build says so itself, with numbers.
    logging.getLogger("te_compiler").setLevel(logging.ERROR)
    logging.getLogger("autotvm").setLevel(logging.ERROR)
    return tvm


def runtime(threads: int) -> Any:
    """Import only TVM's runtime (4.5 MB, no LLVM), its thread pool limited to ``threads``.

    TVM makes the pool at the first inference of the process, so the count cannot change later.

    Raises:
        UserError: called again with another count, or after `compiler`.
    """
    wanted = str(threads)
    if "tvm" in sys.modules and os.environ.get("TVM_NUM_THREADS") != wanted:
        had = os.environ.get("TVM_NUM_THREADS", "its own number of")
        raise UserError(
            f"this process: TVM already has {had} threads, not {wanted}; open the build in a process of its own"
        )
    os.environ["TVM_NUM_THREADS"] = wanted
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    # TVM prints on stderr which library it loads.
    with contextlib.redirect_stderr(io.StringIO()):
        import tvm

    return tvm


def _onnx_shim() -> None:
    """Provide ``onnx.mapping``, which TVM's ONNX frontend imports and onnx removed in 1.19."""
    if "onnx.mapping" in sys.modules:
        return
    import onnx
    from onnx import helper

    module = types.ModuleType("onnx.mapping")
    module.TENSOR_TYPE_TO_NP_TYPE = {  # type: ignore[attr-defined]
        kind: helper.tensor_dtype_to_np_dtype(kind)
        for kind in helper.get_all_tensor_dtypes()
    }
    sys.modules["onnx.mapping"] = module
    onnx.mapping = module  # type: ignore[attr-defined]
