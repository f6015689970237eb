"""A build that is interrupted, killed or out of disk ends in one line and leaves what was there."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import (
    BUILD,
    CHECK,
    RUN,
    VALID,
    Place,
    classifier,
    contents,
    expect,
    labelled_bundle,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_bundle(tmp_path_factory.mktemp("valid"))


INTERRUPTED = "interrupted: nothing half-made was left behind"


def small_files(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("size", [1 << 10, 100 << 10], ids=["golden data", "library"])
def test_no_room_for_a_file_is_one_line(place: Place, size: int) -> None:
    """A full disk as everybody can make it: no file may grow beyond ``size``."""
    model = classifier(channels=2048)
    (place.here / "model.onnx").write_bytes(model.SerializeToString())
    line = place.refused(BUILD, "--model", "model.onnx", preexec_fn=small_files(size))
    expect(line, "File too large|make room")


def in_small_disk(size: str, folder: Path, *command: object) -> list[str]:
    """The command where ``folder`` is a disk of that size, with what it leaves there on stdout."""
    script = (
        f'mount -t tmpfs -o size={size} none "$1" && folder="$1" && shift && "$@"; code=$?; '
        'ls -A "$folder"; exit $code'
    )
    unshare = ["unshare", "--map-root-user", "--mount"]
    return [*unshare, "sh", "-c", script, "sh", str(folder), *map(str, command)]


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none"]
    with contextlib.suppress(OSError):
        return not subprocess.run(
            [*command, "/mnt"], capture_output=True, check=False
        ).returncode
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full", "size"),
    [("output", "100k"), ("temporary", "100k"), ("temporary", "700k"), ("dump", "20k")]
    if can_mount()
    else [],
)
def test_a_full_disk_is_one_line(place: Place, full: str, size: str) -> None:
    (place.here / "model.onnx").write_bytes(
        classifier(channels=4096).SerializeToString()
    )
    output, dump = place.here / "disk", place.here / "dump"
    output.mkdir()
    dump.mkdir()
    folder = {"output": output, "temporary": place.temporary, "dump": dump}[full]
    command = [sys.executable, "-m", BUILD, "--model", "model.onnx"]
    command += ["--output", "disk/bundle", "--dump", "dump"]
    result = subprocess.run(
        in_small_disk(size, folder, *command),
        cwd=place.here,
        env=place.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *progress, line = result.stderr.splitlines()
    assert all(each.startswith("  ") for each in progress), result.stderr
    named = str(folder) if full == "temporary" else folder.name
    expect(line, f"{named}: No space left|make room")
    assert result.stdout == "" or full == "dump", "something is left on the disk"
    assert list(output.iterdir()) == []


# Interrupted


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended before {text!r}:\n{seen}")


def living(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # pid (command) state parent group session …
            state, _, _, of = (
                (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if int(of) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


ENGINE, LINKER = b"spawn_main", b"ziglang"


def child(process: subprocess.Popen[str], word: bytes) -> int:
    """The descendant with that word in its command line, once there is one."""
    while process.poll() is None:
        for pid in living(process.pid):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        time.sleep(0.005)
    raise AssertionError(f"ended without {word!r}")


# The line before what is to be interrupted.
STARTING, LOWERING, LINKING = "reading the model", "importing into Relay", "compiling"


@pytest.mark.slow
@pytest.mark.parametrize("after", [STARTING, LOWERING, LINKING])
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_build_leaves_what_was_there(
    place: Place, bundle: Path, how: str, after: str
) -> None:
    shutil.copytree(bundle, place.here / "bundle")
    (place.here / "model.onnx").write_bytes(VALID)
    # In the linker's place, one that does not end by itself.
    (place.here / "ziglang").mkdir()
    (place.here / "ziglang/__init__.py").touch()
    (place.here / "ziglang/LICENSE").touch()
    linker = place.here / "ziglang/zig"
    linker.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    linker.chmod(0o755)
    before = contents(place.here)
    # Lowering takes long enough in a large network, the way to the linker not too long in a small one.
    model = "mobilenetv2-0.35-96" if after == LOWERING else "model.onnx"
    options = ["--model", model, "--output", "bundle"]
    with place.start(BUILD, *options, start_new_session=True) as process:
        read_until(process, after)
        if after != LOWERING:
            child(process, ENGINE if after == STARTING else LINKER)
        if how == "SIGTERM":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == (143 if how == "SIGTERM" else 130), err
    *progress, line = err.splitlines()
    assert (out, line) == ("", INTERRUPTED)
    assert all(each.startswith("  ") for each in progress), err
    assert contents(place.here) == before
    assert contents(place.temporary) == {}
    wait_for(lambda: not living(process.pid), "a process survived")


COMMANDS = [BUILD, RUN, CHECK, "runtime_demo.board", "tuning.tune", "meter"]
BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_while_a_command_is_imported_is_one_line(
    place: Place, module: str, number: signal.Signals
) -> None:
    # In the place of a module that every command imports first of all.
    (place.here / "argparse.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(60)\n"
    )
    with place.start(module) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (128 + number, "", f"{INTERRUPTED}\n")


def interrupted(place: Place, body: str) -> tuple[int, str, str]:
    """The end of a command with this ``main``, which calls ``interrupt()``."""
    (place.here / "command.py").write_text(
        "import os, signal, sys, time\n"
        "from netship.targets.errors import run_command\n"
        "from netship.targets.interrupts import Interrupted, in_thread\n"
        "def interrupt():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        f"def main(_):\n{textwrap.indent(body, '    ')}\n"
        "run_command(main)\n"
    )
    with place.start("command") as process:
        out, err = process.communicate()
    return process.returncode, out, err


def test_an_interrupt_that_turns_into_another_error_is_an_interrupt(
    place: Place,
) -> None:
    """As ONNX Runtime's import makes an ImportError of it."""
    body = "try:\n    interrupt()\nexcept KeyboardInterrupt:\n    raise ImportError('half')"
    assert interrupted(place, body) == (143, "", f"{INTERRUPTED}\n")


def test_what_is_kept_is_said_and_temporary_folders_go(place: Place) -> None:
    body = """
import tempfile
folder = tempfile.TemporaryDirectory()
try:
    interrupt()
except KeyboardInterrupt:
    raise Interrupted('interrupted: all is kept') from None
"""
    assert interrupted(place, body) == (143, "", "interrupted: all is kept\n")
    assert contents(place.temporary) == {}


def test_a_thread_that_is_busy_does_not_hold_an_interrupt_up(place: Place) -> None:
    body = """
import threading
def busy():
    # The system may choose any thread.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    threading.Event().wait()
in_thread(busy)
"""
    assert interrupted(place, body) == (143, "", f"{INTERRUPTED}\n")


def test_an_interrupt_after_the_end_changes_nothing(place: Place) -> None:
    body = """
import atexit
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
print('done')
return 0
"""
    assert interrupted(place, body) == (0, "done\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", BOTH)
def test_an_interrupted_search_says_what_it_keeps(
    place: Place, number: signal.Signals
) -> None:
    (place.here / "model.onnx").write_bytes(VALID)
    command = ["tuning.tune", "--model", "model.onnx", "--trials", "1000"]
    with place.start(*command, "--output", "log.json") as process:
        read_until(process, "log log.json")
        log = place.here / "log.json"
        wait_for(lambda: log.read_text().count("\n") > 1, "nothing measured", 120)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number, err
    kept = log.read_text().count("\n") - 1
    said = f"{kept} trials kept in log.json; the same command goes on with them"
    assert err.splitlines()[-1] == f"interrupted: {said}"
    assert contents(place.temporary) == {}


def test_a_second_ctrl_c_does_not_cut_the_cleaning_up_short(place: Place) -> None:
    (place.here / "impatient.py").write_text(
        "import time\n"
        "from netship.targets.errors import run_command\n"
        "def main(_):\n"
        "    try:\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaning', flush=True)\n"
        "        input()\n"
        "        print('cleaned', flush=True)\n"
        "run_command(main)\n"
    )
    with place.start("impatient", stdin=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        process.terminate()
        out, err = process.communicate("\n")
    assert (process.returncode, out, err) == (130, "cleaned\n", f"{INTERRUPTED}\n")


@pytest.mark.slow
def test_a_killed_engine_is_one_line(place: Place) -> None:
    options = ["--model", "mobilenetv2-0.35-96"]
    with place.start(BUILD, *options, start_new_session=True) as process:
        read_until(process, LOWERING)
        os.kill(child(process, ENGINE), signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in err
    expect(err.splitlines()[-1], "error: |the engine's process|SIGKILL")
    assert (contents(place.here), contents(place.temporary)) == ({}, {})
    wait_for(lambda: not living(process.pid), "a process survived")
