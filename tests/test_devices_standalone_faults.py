"""A standalone library that crashes, hangs, lies or is interrupted ends in one line and leaves no process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_library import INPUT, fake_network
from standalone_libraries import A72, ARMV7, IMAGE, Make, children, maker

from netship.bundle.store import Bundle
from netship.devices.sessions.runner import SOURCE, Runner
from netship.devices.sessions.standalone import (
    open_standalone,
    open_standalone_emulated,
)
from netship.targets.errors import UserError
from netship.targets.presets import native

PLACES = "for (int i = 0; i < 3; i++) second[i] = i"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(scope="module")
def library(make: Make) -> Bundle:
    return make()


@pytest.fixture(autouse=True)
def no_process_is_left() -> object:
    yield
    assert children() == []


@pytest.mark.parametrize(
    ("macros", "words"),
    [
        (
            {"ON_RUN": "raise(SIGSEGV)"},
            r"libfake.so: crashed at RUN \(SIGSEGV\); build it again",
        ),
        ({"ON_RUN": "abort()"}, r"crashed at RUN \(SIGABRT\)"),
        ({"ON_RUN": "raise(SIGKILL)"}, r"killed at RUN \(SIGKILL\).* memory is short"),
        (
            {"ON_RUN": 'fputs("no\\nreason\\n", stderr); exit(9)'},
            r"ended its process at RUN \(exit code 9: reason\)",
        ),
        ({"ON_RUN": "return 7"}, r"fake_run gave error 7 \(too many threads\)"),
        ({"ON_RUN": "return -1"}, r"fake_run gave error -1 \(it has no text\)"),
        ({"WRITTEN": 11}, "fake_run leaves 1 of 12 outputs unwritten"),
        ({"WRITTEN": 13}, "fake_run writes behind its 12 outputs"),
        ({"WRITTEN": 1000}, "fake_run writes behind its 12 outputs"),
        ({"WRITTEN": 100000}, r"crashed at RUN \(SIGSEGV\)"),
        ({"ON_RUN": "return (int)input[16]"}, r"crashed at RUN \(SIGSEGV\)"),
        ({"SECOND": "second[0] = second[1] = 0"}, "leaves 1 of 15 outputs unwritten"),
        ({"SECOND": f"{PLACES}; second[3] = 0"}, "writes behind its 15 outputs"),
        ({"SECOND": PLACES, "WRITTEN": 14}, "writes behind its 15 outputs"),
    ],
)
def test_a_run_that_goes_wrong_is_one_line(
    make: Make, macros: dict[str, object], words: str
) -> None:
    bundle = make(**macros)
    if "input[16]" in str(macros):
        bundle = with_input_of_16_floats(bundle)
    with open_standalone(bundle) as session:
        image = np.zeros(bundle.manifest.inputs[0].shape, np.float32)
        with pytest.raises(UserError, match=words) as refused:
            session.run(image)
    assert "\n" not in str(refused.value)


def with_input_of_16_floats(bundle: Bundle) -> Bundle:
    """Multiples of 64 bytes end at the page that must not be touched."""
    tensor = INPUT.model_copy(update={"shape": (1, 1, 4, 4)})
    manifest = bundle.manifest.model_copy(update={"inputs": (tensor,)})
    return replace(bundle, manifest=manifest)


def test_an_error_leaves_the_model_usable(make: Make) -> None:
    once = "static int runs; if (runs++ == 0) return 7"
    with open_standalone(make(ON_RUN=once)) as session:
        with pytest.raises(UserError, match="error 7"):
            session.run(IMAGE)
        np.testing.assert_array_equal(session.run(IMAGE)[0], fake_network(IMAGE))


@pytest.mark.parametrize(
    ("macros", "words"),
    [
        (
            {"NO_SELF_TEST": 1},
            "libfake.so: it has no function fake_self_test; build it again, for this",
        ),
        ({"ON_LOAD": "raise(SIGSEGV)"}, r"crashed at LOAD \(SIGSEGV\)"),
        (
            {"ON_LOAD": '__asm__ volatile("ud2")'},
            f"built for {native().name}, needs an instruction that .* does not have",
        ),
        ({"ON_CREATE": "raise(SIGFPE)"}, r"crashed at CREATE \(SIGFPE\)"),
        (
            {"ON_CREATE": "error = 3; return NULL"},
            r"fake_create gave error 3 \(it has no text\); give fewer --threads",
        ),
    ],
)
def test_a_library_that_gives_no_model_is_one_line(
    make: Make, macros: dict[str, object], words: str
) -> None:
    bundle = make(**macros)
    with pytest.raises(UserError, match=words):
        open_standalone(bundle)


def test_too_many_threads_are_refused_in_the_librarys_words(library: Bundle) -> None:
    with pytest.raises(UserError, match=r"fake_create gave error 7 \(too many threads"):
        open_standalone(library, threads=1000)


def test_a_failed_self_test_is_one_line(make: Make) -> None:
    bundle = make(ON_SELF_TEST="return 7")
    failed = pytest.raises(UserError, match="fake_self_test gave error 7")
    with open_standalone(bundle) as session, failed:
        session.self_test()


def test_a_crash_at_the_end_is_seen(make: Make) -> None:
    bundle = make(ON_DESTROY="raise(SIGSEGV)")
    session = open_standalone(bundle)
    with pytest.raises(UserError, match=r"crashed at QUIT \(SIGSEGV\)"):
        session.close()
    with pytest.raises(ZeroDivisionError), open_standalone(bundle):
        raise ZeroDivisionError  # what went wrong first


@pytest.mark.parametrize(
    ("macros", "stage"),
    [
        ({"ON_LOAD": "pause()"}, "LOAD"),
        ({"ON_RUN": "pause()"}, "RUN"),
        ({"ON_DESTROY": "pause()"}, "QUIT"),
    ],
)
def test_what_hangs_is_ended(make: Make, macros: dict[str, object], stage: str) -> None:
    bundle = make(**macros)
    ended = pytest.raises(UserError, match=f"no answer to {stage} within 1 s")
    with ended, open_standalone(bundle, call_timeout=1) as session:
        session.run(IMAGE)


def test_a_runner_that_is_killed_from_outside_is_one_line(library: Bundle) -> None:
    with open_standalone(library) as session:
        session.run(IMAGE)
        [runner] = children()
        os.kill(runner, signal.SIGKILL)
        with pytest.raises(UserError, match=r"killed at INPUT \(SIGKILL\)"):
            session.run(IMAGE)
        with pytest.raises(UserError, match="has ended; open it again"):
            session.run(IMAGE)


def test_ctrl_c_in_a_terminal_reaches_this_process_alone(library: Bundle) -> None:
    with open_standalone(library):
        [runner] = children()
        assert os.getpgid(runner) != os.getpgid(0)


def test_ctrl_c_in_an_inference_ends_it(make: Make) -> None:
    bundle = make(ON_RUN="pause()")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with open_standalone(bundle) as session:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                session.run(IMAGE)
            assert children() == []
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_runner_ends_with_a_parent_that_is_killed_in_an_inference(
    make: Make,
) -> None:
    bundle = make(ON_RUN="kill(getppid(), SIGKILL); pause()")
    program = (
        "import sys, numpy; from pathlib import Path; from netship.bundle.store import open_bundle\n"
        "from netship.devices.sessions.standalone import open_standalone\n"
        "session = open_standalone(open_bundle(Path(sys.argv[1])))\n"
        "print(session._runner._process.pid, flush=True)\n"
        "session.run(numpy.zeros((1, 3, 2, 2), numpy.float32))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(bundle.path)],
        stdout=subprocess.PIPE,
        cwd=SOURCE.parents[1],
    )
    assert parent.stdout
    runner = Path("/proc", parent.stdout.readline().decode().strip())
    assert parent.wait(10) == -signal.SIGKILL
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while runner.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runner.exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\0\0\0\0\xff\xff\xff\xff", "its answer is garbled"),
        (b"\2\0\0\0\0\0\0\0", "its answer is garbled"),
        (b"\0\0\0\0\x08\0\0\0half", r"at LOAD \(exit code 0\)"),
    ],
)
def test_a_garbled_answer_is_one_line(
    library: Bundle, answer: bytes, words: str
) -> None:
    program = f"import os; os.write(1, {answer!r})"
    with pytest.raises(UserError, match=words):
        Runner([sys.executable, "-c", program], library, "this CPU", 10)


def test_an_answer_may_come_byte_by_byte(library: Bundle) -> None:
    program = (
        "import os\nfor byte in bytes([0, 0, 0, 0, 3, 0, 0, 0]) + b'abc':\n"
        "    os.write(1, bytes([byte]))\nos.read(0, 1)"
    )
    runner = Runner([sys.executable, "-c", program], library, "this CPU", 10)
    assert runner.greeting == b"abc"
    with pytest.raises(UserError, match="QUIT"):
        runner.close()


def test_a_library_that_is_none_is_one_line(library: Bundle, tmp_path: Path) -> None:
    (tmp_path / "libfake.so").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(UserError, match="libfake.so: cannot be loaded: .*; build it"):
        open_standalone(replace(library, path=tmp_path))


def test_an_instruction_that_the_emulated_cpu_lacks_is_one_line(make: Make) -> None:
    # SDOT v0.4s, v1.16b, v2.16b (FEAT_DotProd): Arm Architecture Reference Manual, C7.2.
    bundle = make(A72, ON_RUN='__asm__ volatile(".inst 0x4e829420")')
    lacking = pytest.raises(
        UserError,
        match="built for arm-cortex-a72, needs an instruction that the emulated cortex-a72",
    )
    with open_standalone_emulated(bundle) as session, lacking:
        session.run(IMAGE)
    with open_standalone_emulated(bundle, cpu="cortex-a76") as session:
        session.run(IMAGE)


def test_an_emulated_crash_leaves_no_core_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = make(ARMV7, ON_RUN="raise(SIGSEGV)")
    crashed = pytest.raises(UserError, match=r"crashed at RUN \(SIGSEGV\)")
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        with open_standalone_emulated(bundle) as session, crashed:
            session.run(IMAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
