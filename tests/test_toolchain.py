"""The one runner of zig and of LLVM's tools: what a failure says, and what is kept of what succeeds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from netship.targets import files, toolchain
from netship.targets.errors import UserError
from netship.targets.files import cached_path, make_once
from netship.targets.presets import native
from netship.targets.toolchain import compile_object, compile_once, run_tool, run_zig

TRIPLE = ("-target", "x86_64-linux-gnu.2.28")
# 3 MB of object file.
LARGE = "static const char large[3000000] = {1}; const char *get(int i) { return large + i; }"


def source(folder: Path, text: str, name: str = "given.c") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as refused:
        run_zig(*arguments)  # type: ignore[arg-type]
    line = str(refused.value)
    assert "\n" not in line and len(line) <= 310
    return line


def test_a_compile_error_is_the_compilers_first_ones(tmp_path: Path) -> None:
    source(tmp_path, "static int h(void) { return 1 + missing; }", "given.h")
    text = '#include "given.h"\nint f(void) { return other; }\nint g(void) { return 1 }'
    made = tmp_path / "given.o"
    line = refusal("cc", made, *TRIPLE, "-c", source(tmp_path, text))
    assert line.startswith(
        "given.o: zig failed: given.h:1:33: error: use of undeclared identifier 'missing'; "
        "given.c:2:22: error: use of undeclared identifier 'other'; given.c:3:"
    )
    assert line.endswith("; run make setup again, and report it if it stays so")
    assert str(tmp_path) not in line


def test_of_many_errors_the_first_fit_the_line(tmp_path: Path) -> None:
    text = "\n".join(f"int f{i}(void) {{ return missing{i}; }}" for i in range(15))
    line = refusal("cc", tmp_path / "o", *TRIPLE, "-c", source(tmp_path, text))
    assert "given.c:1:23: error: " in line and "'missing14'" not in line


def test_a_program_that_does_not_link_names_the_symbol(tmp_path: Path) -> None:
    given = source(tmp_path, "int missing(void); int main(void) { return missing(); }")
    line = refusal("cc", tmp_path / "program", *TRIPLE, given)
    assert "program: zig failed: ld.lld: error: undefined symbol: missing; run" in line


def test_a_warning_that_is_an_error_and_assembly_say_where(tmp_path: Path) -> None:
    unused = source(tmp_path, "int f(void) { int unused; return 0; }")
    line = refusal("cc", tmp_path / "o", *TRIPLE, "-Wall", "-Werror", "-c", unused)
    assert "given.c:1:19: error: unused variable 'unused'" in line
    assembly = source(tmp_path, "\nnonsense %eax\n", "given.s")
    line = refusal("cc", tmp_path / "o", *TRIPLE, "-c", assembly)
    assert "given.s:2:1: error: invalid instruction mnemonic 'nonsense'" in line
    assert "cannot open" in refusal("ld.lld", tmp_path / "o", tmp_path / "nowhere.o")


def test_a_compiler_that_crashes_says_the_signal_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    crash = source(tmp_path, "#pragma clang __debug crash\nint main(void) {}")
    for options in (["-c"], []):
        line = refusal("cc", tmp_path / "o", *TRIPLE, *options, crash)
        assert "o: zig crashed (SIG" in line
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        ("SEGV", "made: sh crashed \\(SIGSEGV\\); run make setup"),
        ("KILL", "made: sh was killed \\(SIGKILL\\).*end other programs"),
        ("BUS", "made: sh crashed \\(SIGBUS\\)"),
    ],
)
def test_a_tool_that_dies_of_a_signal_is_one_line(
    tmp_path: Path, signal: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run_tool(["sh", "-c", f"kill -{signal} $$"], tmp_path / "made")


def test_a_tool_that_says_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made: sh failed: exit code 3; "):
        run_tool(["sh", "-c", "exit 3"], tmp_path / "made")


SMALL_FILES = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)"
)
RUN = """
import sys
from pathlib import Path
from netship.targets.errors import run_command
from netship.targets.toolchain import run_zig

def main(_):
    tool, output, *words = sys.argv[1:]
    run_zig(tool, Path(output), *words)
    return 0

run_command(main)
"""


def refused_without_room(
    tmp_path: Path, *words: object, before: str = "", disk: Path | None = None
) -> str:
    """The one line of a process in which no file grows, or for which ``disk`` is a small one."""
    command = [sys.executable, "-c", f"{before}\n{RUN}", *map(str, words)]
    if disk:
        script = 'mount -t tmpfs -o size=200k none "$0" && exec "$@"'
        mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
        command = [*mounted, str(disk), *command]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("tool", ["cc", "ld.lld"])
def test_no_room_for_the_output_says_which_folder(tmp_path: Path, tool: str) -> None:
    given = source(tmp_path, LARGE)
    compiled, made = tmp_path / "given.o", tmp_path / "made" / "o"
    made.parent.mkdir()
    compile_object(given, compiled, native())
    words = [*TRIPLE, "-c", given] if tool == "cc" else ["-r", compiled]
    line = refused_without_room(tmp_path, tool, made, *words, before=SMALL_FILES)
    assert line == f"error: {made.parent}: File too large for o; make room there"


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none"]
    with contextlib.suppress(OSError):
        return not subprocess.run(
            [*command, "/mnt"], capture_output=True, check=False
        ).returncode
    return False


@pytest.mark.parametrize("full", ["made", "cache/zig"] if can_mount() else [])
def test_a_full_disk_says_which_folder(tmp_path: Path, full: str) -> None:
    given, made = source(tmp_path, LARGE), tmp_path / "made" / "o"
    made.parent.mkdir()
    disk = tmp_path / full
    disk.mkdir(parents=True, exist_ok=True)
    words = ("cc", made, *TRIPLE, "-c", given)
    line = refused_without_room(tmp_path, *words, disk=disk)
    assert line == f"error: {disk}: No space left on device for o; make room there"


def test_a_cache_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zig itself would not end."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    given = source(tmp_path, "int x;")
    line = refusal("cc", tmp_path / "o", *TRIPLE, "-c", given)
    assert line.startswith("/proc/nowhere/zig: ") and "set XDG_CACHE_HOME" in line


def test_the_users_own_compiler_variables_do_not_reach_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, "#error theirs", "stdio.h")
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("CCC_OVERRIDE_OPTIONS", "+-Dint=nonsense")
    given = source(tmp_path, "#include <stdio.h>\nint x;")
    assert run_zig("cc", tmp_path / "o", *TRIPLE, "-c", given) == ""


def test_what_is_compiled_once_depends_on_source_options_and_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zig_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zig")
    (tmp_path / "zig").symlink_to(zig_cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran: list[tuple[object, ...]] = []

    def counted(*words: object) -> str:
        ran.append(words)
        return run_zig(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(toolchain, "run_zig", counted)
    one = source(tmp_path, "int x = A;", "one.c")

    def made(given: Path, *options: str) -> Path:
        return compile_once(given, "kept.o", *TRIPLE, "-c", *options)

    first = made(one, "-DA=1")
    assert first.suffix == ".o" and first.parent == tmp_path / "netship"
    assert made(one, "-DA=1") == first and len(ran) == 1
    others = {made(one, "-DA=2"), made(one, "-DA=1", "-O2"), made(one, "-O2", "-DA=1")}
    others.add(made(source(tmp_path, "int y = A;", "other.c"), "-DA=1"))
    monkeypatch.setattr(files, "version", lambda package: f"{package} 99")
    others.add(made(one, "-DA=1"))
    assert len({first, *others}) == 6 == len(ran)
    assert made(one, "-DA=2").read_bytes() != first.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "netship"


def test_parts_of_a_key_are_not_run_together(cache: Path) -> None:
    paths = {cached_path("x.so", *key) for key in (("ab", "c"), ("a", "bc"), ("abc",))}
    assert len(paths) == 3


def test_what_fails_leaves_nothing_in_the_cache(cache: Path) -> None:
    path = cached_path("thing", "key")

    def fail(made: Path) -> None:
        made.mkdir()
        (made / "half").touch()
        raise UserError("no network")

    with pytest.raises(UserError, match="no network"):
        make_once(path, fail)
    assert [each.name for each in cache.iterdir()] == ["thing.lock"]
    (cache / ".thing-killed").mkdir()
    (cache / ".thing-killed/link").symlink_to(Path(__file__).parent)
    foreign = set()
    if os.geteuid() == 0:
        (cache / ".thing-foreign").mkdir()
        os.chown(cache / ".thing-foreign", 12345, 12345)
        foreign.add(".thing-foreign")
    make_once(path, Path.mkdir)
    left = {each.name for each in cache.iterdir()}
    assert left == {"thing.lock", path.name, *foreign}
    assert Path(__file__).exists()


def test_one_makes_it_and_the_others_wait(cache: Path) -> None:
    path, waits = cached_path("thing", "key"), list[str]()
    begun, end = threading.Event(), threading.Event()

    def slowly(made: Path) -> None:
        begun.set()
        assert end.wait(20)
        made.write_text(json.dumps("first"))

    def waiting() -> None:
        waits.append("waiting")
        end.set()

    def start(*arguments: Callable[..., None]) -> threading.Thread:
        thread = threading.Thread(target=make_once, args=(path, *arguments))
        thread.start()
        return thread

    first = start(slowly)
    assert begun.wait(20)
    second = start(lambda made: made.write_text("second") and None, waiting)
    first.join()
    second.join()
    assert (path.read_text(), waits) == ('"first"', ["waiting"])
