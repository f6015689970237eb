"""A standalone library on this machine and on emulated boards, and every way in which it can fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import succeed
from fake_library import INPUT, OUTPUT, VERSION, fake_library, fake_network

from bundle.golden import read_golden
from bundle.store import Bundle
from devices.sessions.opening import check_served, open_here, open_on_emulated
from devices.sessions.runner import SOURCE, Command, Runner, compile_runner
from devices.sessions.session import Origin
from devices.sessions.standalone import (
    StandaloneSession,
    open_standalone,
    open_standalone_emulated,
)
from runtime_demo.options import open_session
from targets.errors import UserError
from targets.presets import Target, native, resolve
from targets.progress import Progress

A72 = resolve("arm-cortex-a72")
ARMV7 = Target(
    name="arm-cortex-a7",
    summary="armv7",
    tvm="llvm -mtriple=armv7l-linux-gnueabihf",
    linker="arm-linux-gnueabihf.2.28",
    machine="arm",
    qemu_cpu="cortex-a7",
)
IMAGE = np.arange(12, dtype=np.float32).reshape(INPUT.shape)

Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(target=native(), MACRO=…)``: the library with a fault, in a folder of its own."""

    def build(target: Target | None = None, **macros: str) -> Bundle:
        folder = tmp_path_factory.mktemp("fake")
        return fake_library(folder, target or native(), **macros)

    return build


@pytest.fixture(scope="module")
def library(make: Make) -> Bundle:
    return make()


@pytest.fixture(scope="module")
def a72(make: Make) -> Bundle:
    return make(A72)


@pytest.fixture(scope="module")
def armv7(make: Make) -> Bundle:
    return make(ARMV7)


@pytest.fixture(autouse=True)
def no_process_is_left() -> object:
    yield
    assert children() == []


def children() -> list[int]:
    """Of this process, runners and emulators, alive or not waited for."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name.startswith(("runner", "qemu")) and rest.split()[1] == str(
                os.getpid()
            ):
                found.append(int(status.parent.name))
    return found


def check_session(session: StandaloneSession, bundle: Bundle) -> None:
    for image, [expected] in read_golden(bundle):
        [actual] = session.run(image)
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)
    seconds = session.time(image, 130)
    assert len(seconds) == 130
    assert all(isinstance(value, float) and 0 <= value < 60 for value in seconds)
    assert session.profile(image) == []
    session.self_test()
    resident, peak = session.memory()
    assert 0 < resident <= peak
    assert (session.version, session.workspace_bytes) == (VERSION, 4096)


def test_this_machine_gives_the_reference(library: Bundle) -> None:
    with open_standalone(library, threads=2) as session:
        assert (session.origin, session.threads) == (Origin.HOST, 2)
        check_session(session, library)
        # A process with the library and little else.
        assert session.memory().peak < 16 << 20


@pytest.mark.parametrize("board", ["a72", "armv7"])
def test_emulated_boards_give_the_reference(
    board: str, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(board)
    stages: list[str] = []
    with open_standalone_emulated(bundle, None, stages.append, threads=2) as session:
        assert (session.origin, session.threads) == (Origin.EMULATED, 2)
        check_session(session, bundle)
    machine, cpu = bundle.manifest.target.machine, bundle.manifest.target.qemu_cpu
    assert stages == [
        f"linking libfake.a for {machine}",
        f"starting an emulated {cpu}",
    ]


def test_the_number_of_threads_is_the_manifests_unless_given(library: Bundle) -> None:
    manifest = library.manifest.model_copy(update={"threads": 3})
    with open_standalone(replace(library, manifest=manifest)) as session:
        assert session.threads == 3


def test_the_last_input_is_what_is_timed_and_outputs_are_kept(library: Bundle) -> None:
    with open_standalone(library) as session:
        [first] = session.run(IMAGE)
        session.time(IMAGE + 1, 1)
        session.run(IMAGE + 2)
        np.testing.assert_array_equal(first, fake_network(IMAGE))
        first[0, 0] = 5  # the caller's own memory


def test_another_shape_is_a_bug_of_the_caller(library: Bundle) -> None:
    with open_standalone(library) as session, pytest.raises(ValueError, match="input"):
        session.run(IMAGE.reshape(1, 12, 1, 1))


def test_closing_twice_is_once(library: Bundle) -> None:
    session = open_standalone(library)
    session.close()
    session.close()
    with pytest.raises(UserError, match="its process has ended; open it again"):
        session.run(IMAGE)


def test_large_tensors_pass_whole(make: Make) -> None:
    bundle = make(WRITTEN=3 << 20)
    shape = (1, 3, 1024, 1024)
    manifest = bundle.manifest.model_copy(
        update={
            "input": INPUT.model_copy(update={"shape": shape}),
            "outputs": (OUTPUT.model_copy(update={"shape": shape}),),
        }
    )
    image = np.random.default_rng(0).random(shape, np.float32)
    with open_standalone(replace(bundle, manifest=manifest)) as session:
        [output] = session.run(image)
    np.testing.assert_array_equal(
        output.ravel(), np.resize(2 * image.ravel()[:12] + 1, 3 << 20)
    )


def test_what_a_library_prints_is_no_answer(make: Make) -> None:
    with open_standalone(make(ON_RUN='puts("hello"); fflush(stdout)')) as session:
        np.testing.assert_array_equal(session.run(IMAGE)[0], fake_network(IMAGE))


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
    ],
)
def test_a_run_that_goes_wrong_is_one_line(
    make: Make, macros: dict[str, object], words: str
) -> None:
    bundle = make(**macros)
    if "input[16]" in str(macros):
        bundle = with_input_of_16_floats(bundle)
    with open_standalone(bundle) as session:
        image = np.zeros(bundle.manifest.input.shape, np.float32)
        with pytest.raises(UserError, match=words) as refused:
            session.run(image)
    assert "\n" not in str(refused.value)


def with_input_of_16_floats(bundle: Bundle) -> Bundle:
    """Multiples of 64 bytes end at the page that must not be touched."""
    tensor = INPUT.model_copy(update={"shape": (1, 1, 4, 4)})
    manifest = bundle.manifest.model_copy(update={"input": tensor})
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
        "import sys, numpy; from pathlib import Path; from bundle.store import open_bundle\n"
        "from devices.sessions.standalone import open_standalone\n"
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


def test_another_architecture_is_refused_before_loading(a72: Bundle) -> None:
    with pytest.raises(UserError, match="libfake.so is for aarch64 .*--board emulated"):
        open_standalone(a72)


def test_only_one_output_is_taken(library: Bundle, a72: Bundle) -> None:
    for bundle, open_it in (
        (library, open_standalone),
        (a72, open_standalone_emulated),
    ):
        manifest = bundle.manifest.model_copy(update={"outputs": (OUTPUT, OUTPUT)})
        with pytest.raises(UserError, match="one output, the manifest says 2"):
            open_it(replace(bundle, manifest=manifest))


def test_no_board_of_this_machines_kind_is_emulated(library: Bundle) -> None:
    with pytest.raises(UserError, match="libfake.a is for x86_64, emulated boards are"):
        open_standalone_emulated(library)


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


def test_an_unknown_cpu_is_refused_with_the_known_ones(armv7: Bundle) -> None:
    with pytest.raises(UserError, match="knows no CPU 'cortex-x9', only .*cortex-a7"):
        open_standalone_emulated(armv7, cpu="cortex-x9")


def test_no_qemu_gives_the_line_that_installs_it(
    armv7: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="QEMU for arm; .*`apt install qemu-user-stat"):
        open_standalone_emulated(armv7)


@pytest.mark.parametrize("file", ["libfake.a", "fake.h"])
def test_a_file_that_nobody_vouches_for_is_not_linked(a72: Bundle, file: str) -> None:
    files = {name: sha for name, sha in a72.manifest.files.items() if name != file}
    manifest = a72.manifest.model_copy(update={"files": files})
    with pytest.raises(UserError, match=f"it has no {file}; build it again"):
        open_standalone_emulated(replace(a72, manifest=manifest))


def test_a_static_library_that_lacks_a_function_is_one_line(make: Make) -> None:
    with pytest.raises(UserError, match=r"error: .*fake_self_test.*; build it again"):
        open_standalone_emulated(make(A72, NO_SELF_TEST=1))


def test_the_format_decides_what_opens_it(library: Bundle, a72: Bundle) -> None:
    with open_here(library, 2) as session:
        assert isinstance(session, StandaloneSession)
        assert session.threads == 2
    with open_on_emulated(a72, 2) as session:
        assert isinstance(session, StandaloneSession)
        assert (session.origin, session.threads) == (Origin.EMULATED, 2)
    manifest = a72.manifest.model_copy(update={"format": "bundle"})
    with pytest.raises(UserError, match="--threads: an emulated board runs on 1"):
        open_on_emulated(replace(a72, manifest=manifest), 2)
    check_served(replace(a72, manifest=manifest))


@pytest.mark.parametrize(
    "place",
    [
        {"rpc": "local"},
        {"rpc": "127.0.0.1:9"},
        {"tracker": "127.0.0.1:9", "key": "board"},
        {"ssh": "pi@127.0.0.1"},
    ],
)
def test_a_server_is_refused_before_anybody_is_asked(
    library: Bundle, place: dict[str, str]
) -> None:
    names = ("ssh", "rpc", "tracker", "key", "board", "cpu", "threads")
    options = {**dict.fromkeys(names), "wait": 1, "priority": 1}
    arguments = SimpleNamespace(**{**options, **place})
    with pytest.raises(UserError, match="needs no RPC server; .* fake_self_test there"):
        open_session(library, arguments, Progress(quiet=True))  # type: ignore[arg-type]


def test_run_and_check_take_a_standalone_library(library: Bundle) -> None:
    output = succeed("runtime_demo.check", library.path, "--repeat", "3", "--json")
    result = json.loads(output)
    assert result["passed"] is True


def test_the_numbers_of_the_commands_are_the_runners() -> None:
    named = re.search(r"enum \{ (CREATE = 1.*?) \}", SOURCE.read_text())
    assert named
    names = named[1].replace(" = 1", "").split(", ")
    assert names == [command.name for command in Command if command]


@pytest.mark.parametrize("triple", ["x86_64-linux-gnu.2.28", "arm-linux-musleabihf"])
@pytest.mark.parametrize("static", [False, True])
def test_the_runner_compiles_without_a_warning(
    triple: str, static: bool, library: Bundle, tmp_path: Path
) -> None:
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-c"]
    name = ["-DSTATIC_NAME=fake", "-iquote", str(library.path)] if static else []
    compile_runner(tmp_path, triple, strict + name)
