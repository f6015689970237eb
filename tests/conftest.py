"""What every test shares: the real network where it is at hand, built bundles, honest skips."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import onnx
    from cortex_m_projects import Projects

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("NETSHIP_SHARED", ROOT.parent / "shared"))
NOT_RUN = "check of the real network not run"

sys.path.insert(0, str(ROOT))
# A job in the background starts with Ctrl-C ignored, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# As targets/__init__.py does, which some tests import after ONNX Runtime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def run(
    module: str, *options: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command line of ours, as a user's shell would run it."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(module: str, *options: object, **environment: str) -> str:
    """Run a command that must succeed; its stdout."""
    result = run(module, *options, **environment)
    assert result.returncode == 0, (
        f"{module} {options}\n{result.stdout}\n{result.stderr}"
    )
    return result.stdout


def hostile(folder: Path) -> Path:
    """A working folder with folders and files of the user's own that have the names of the project's."""
    here = folder / "hostile"
    (here / "compile").mkdir(parents=True)
    for name in ("targets.py", "bundle.py", "records.py", "compile/build.txt"):
        (here / name).write_text("raise SystemExit('a file of the user was imported')")
    return here


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The trained MobileNetV2; the test is counted as not run where it is absent."""
    return shared("models/mobilenetv2.onnx")


@pytest.fixture(scope="session")
def real_labels() -> Path:
    return shared("models/imagenet_labels.txt")


@pytest.fixture(scope="session")
def real_photos() -> Path:
    return shared("photos")


def shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{NOT_RUN}: no {relative} below NETSHIP_SHARED")
    return path


@pytest.fixture(scope="session")
def free_photos() -> list[Path]:
    """Photographs of the scikit-image wheel, as the demo uses them."""
    from netship.runtime_demo.demo import _photographs

    return _photographs()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``built(model, target="native", *options)``: a bundle, built once a test run."""
    bundles: dict[tuple[str, ...], Path] = {}

    def build(model: object, target: str = "native", *options: object) -> Path:
        key = (str(model), target, *map(str, options))
        if key not in bundles:
            output = tmp_path_factory.mktemp("bundles") / "bundle"
            succeed(
                "compile.build",
                "--model",
                model,
                "--target",
                target,
                "--output",
                output,
                *options,
            )
            bundles[key] = output
        return bundles[key]

    return build


_skips: list[str] = []


def pytest_collection_finish() -> None:
    if "tvm" in sys.modules:
        raise pytest.UsageError(
            "importing a test loads TVM, whose threads are chosen by its first user: import it in a process of its own"
        )


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if "tvm" in sys.modules and "TVM_NUM_THREADS" not in os.environ:
        pytest.fail(
            "it loads TVM without choosing the threads, which tests after it cannot: do so in a process of its own"
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = (
            report.longrepr[2]
            if isinstance(report.longrepr, tuple)
            else str(report.longrepr)
        )
        _skips.append(reason)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI set, only the real network's absence may skip a test."""
    if os.environ.get("CI") and any(NOT_RUN not in reason for reason in _skips):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = sum(NOT_RUN in reason for reason in _skips)
    if missing:
        terminalreporter.write_line(f"{missing} checks of the real network not run")
    if os.environ.get("CI"):
        for reason in (reason for reason in _skips if NOT_RUN not in reason):
            terminalreporter.write_line(f"a skip that CI does not allow: {reason}")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """The small int8 networks that C projects are tested with."""
    from cortex_m_projects import small_networks

    return small_networks(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def projects(
    networks: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory
) -> Projects:
    """A module's C projects of these networks, each built once."""
    from cortex_m_projects import Projects

    return Projects(networks, tmp_path_factory.mktemp("projects"))
