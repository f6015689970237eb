"""Every work-around of targets/engine.py is still needed: these fail when one is not."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_onnx_still_lacks_the_module_that_tvm_imports() -> None:
    assert "ModuleNotFoundError" in python("import onnx.mapping").stderr
    assert (
        python(
            "from netship.targets.engine import compiler; compiler(); import onnx.mapping"
        ).returncode
        == 0
    )


def test_tophub_would_still_be_asked_for_schedules() -> None:
    code = "from tvm.autotvm.tophub import AUTOTVM_TOPHUB_LOC_VAR as v; import os; print(v in os.environ)"
    assert python(code).stdout.split()[-1] == "False"
    quiet = python("from netship.targets.engine import compiler; compiler(); " + code)
    assert quiet.stdout.split()[-1] == "True"


def test_the_runtime_alone_still_announces_itself() -> None:
    said = python("import tvm", TVM_USE_RUNTIME_LIB="1").stderr
    assert "Loading runtime library" in said
    assert python("from netship.targets.engine import runtime; runtime(1)").stderr == ""


def test_the_runtime_alone_has_no_compiler() -> None:
    code = "from netship.targets.engine import runtime; t = runtime(1); print(t._ffi.base._RUNTIME_ONLY)"
    assert python(code).stdout.strip() == "True"


def test_the_thread_pool_cannot_be_resized() -> None:
    code = (
        "from netship.targets.engine import runtime; runtime(1); runtime(1); runtime(2)"
    )
    assert "already has 1 threads, not 2" in python(code).stderr


def test_the_engines_flags_are_still_asked_for_at_each_dimension() -> None:
    code = """
from netship.targets.engine import compiler
compiler()
from tvm import tir
from tvm.relay.backend import te_compiler
compiler()
te_compiler.get_shape([tir.IntImm("int32", 1), tir.IntImm("int32", 2)])
print(te_compiler.libinfo.cache_info())
"""
    assert "hits=1, misses=1," in python(code).stdout


def test_dense_still_breaks_auto_scheduler() -> None:
    code = """
from netship.targets.engine import compiler
tvm = compiler()
import numpy as np
from tvm import auto_scheduler, relay
weight = relay.const(np.zeros((32, 64), "float32"))
module = tvm.IRModule.from_expr(relay.nn.dense(relay.var("x", shape=(1, 64)), weight))
target = tvm.target.Target("llvm -num-cores=1")
(task,), _ = auto_scheduler.extract_tasks(module["main"], {}, target)
for state in auto_scheduler.SketchPolicy(task, verbose=0).sample_initial_population():
    task.compute_dag.apply_steps_from_state(state, layout_rewrite=task.layout_rewrite_option)
"""
    assert "name_it != name_to_arg.end()" in python(code).stderr
