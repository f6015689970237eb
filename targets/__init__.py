"""Targets, and what every other package uses: errors, files, the toolchain, the engine.

Every command imports this package first. So a wrong Python is refused here, in one line, before
anything that needs more than Python 3.6 is parsed.
"""

import os
import sys

from netship.targets import interrupts

# While `python -m` looks for a command.
if sys.argv[:1] == ["-m"]:
    interrupts.end_at_once()

from importlib.util import find_spec

VERSION = "0.1.0"
_ENGINE_PYTHONS = ((3, 11), (3, 12))


def _refuse_wrong_python() -> None:
    if sys.version_info[:2] not in _ENGINE_PYTHONS:
        problem = (
            f"Python {sys.version_info[0]}.{sys.version_info[1]} has no engine package"
        )
    elif not all(
        find_spec(name) for name in ("tvm", "onnx", "onnxruntime", "pydantic")
    ):
        problem = f"{sys.executable} does not have the project's packages"
    else:
        return
    sys.stderr.write(
        f"error: {problem}; in the project's folder run `make setup` once, "
        "then `. .venv/bin/activate`\n"
    )
    sys.exit(2)


_refuse_wrong_python()

# From 1.29 on, ONNX Runtime's Linux wheels report each model that they load to their maker, and leave a
# file in the temporary folder, unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
