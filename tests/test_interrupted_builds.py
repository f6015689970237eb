"""A build that is interrupted, killed or out of disk ends in one line and leaves what was there."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import BUILD, VALID, Place, classifier, contents, expect, labelled_bundle


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
@pytest.mark.parametrize("full", ["output", "temporary"] if can_mount() else [])
def test_a_full_disk_is_one_line(place: Place, full: str) -> None:
    (place.here / "model.onnx").write_bytes(
        classifier(channels=4096).SerializeToString()
    )
    output = place.here / "disk"
    output.mkdir()
    folder = output if full == "output" else place.temporary
    command = [sys.executable, "-m", BUILD, "--model", "model.onnx", "--output"]
    result = subprocess.run(
        in_small_disk("100k", folder, *command, "disk/bundle"),
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
    expect(line, "error: |No space left|make room")
    assert result.stdout == "", "something is left on the disk"
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


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
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
    assert process.returncode == 130, err
    *progress, line = err.splitlines()
    assert (out, line) == ("", INTERRUPTED)
    assert all(each.startswith("  ") for each in progress), err
    assert contents(place.here) == before
    assert contents(place.temporary) == {}
    wait_for(lambda: not living(process.pid), "a process survived")


def test_a_second_ctrl_c_does_not_cut_the_cleaning_up_short(place: Place) -> None:
    (place.here / "impatient.py").write_text(
        "import time\n"
        "from targets.errors import run_command\n"
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
