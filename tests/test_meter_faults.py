"""The meter's counts are a program's own, and what goes wrong is one line that says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from tiny import DOT_PRODUCT, tiny_bundle

from netship.bundle.manifest import TargetIdentity
from netship.devices import sysroot
from netship.meter import counting
from netship.meter.counting import Block, Cache, count, read_blocks
from netship.meter.operators import _attribution as attribution
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.targets.toolchain import run_zig

CACHES = (Cache(4 << 10, 2), Cache(64 << 10, 8))


def program(folder: Path, body: str) -> list[str]:
    source, made = folder / "program.c", folder / "program"
    source.write_text(
        f"#include <signal.h>\n#include <string.h>\nint main(void) {{ {body} return 0; }}\n"
    )
    target = ("-target", "aarch64-linux-musl", "-static", "-O1")
    run_zig("cc", made, *target, source)
    return [str(made)]


def test_counts_and_misses_are_the_same_in_any_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The environment lies on the stack: by its size the array shares other sets of the caches.
    command = program(
        tmp_path,
        "volatile char on_stack[9000];"
        "for (int k = 0; k < 3; k++) for (int i = 0; i < 9000; i++) on_stack[i]++;",
    )
    seen: list[list[Block]] = []
    for filler in ("", "x" * 777):
        monkeypatch.setenv("FILLER", filler)
        seen.append(count(command, cpu="cortex-a72", caches=CACHES)[0])
    assert seen[0] == seen[1]
    assert sum(block.misses[0] for block in seen[0]) > 3 * 9000 // 64


def test_the_environment_that_is_given_is_the_programs(tmp_path: Path) -> None:
    command = program(
        tmp_path,
        'extern char **environ; return environ[1] || strcmp(environ[0], "A=B");',
    )
    count(command, cpu="cortex-a72", environment={"A": "B"})


def test_a_killed_run_is_one_line(tmp_path: Path) -> None:
    command = program(tmp_path, "raise(SIGKILL);")
    with pytest.raises(UserError, match="was killed under QEMU; end other programs"):
        count(command, cpu="cortex-a72")


@pytest.mark.parametrize("content", ["", "1000 1 5 1f2003d5\n"], ids=["none", "cut"])
def test_counts_that_a_full_disk_cut_short_are_refused(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "blocks"
    file.write_text(content)
    with pytest.raises(UserError, match="not written whole; is the disk full"):
        read_blocks(file)
    file.write_text("1000 1 5 1f2003d5\nend\n")
    assert read_blocks(file) == [Block(0x1000, bytes.fromhex("1f2003d5"), 5)]


def test_a_cache_folder_without_room_is_one_line(tmp_path: Path) -> None:
    script = (
        "import resource\n"
        "from netship.meter.cycles import Costs\n"
        "from netship.targets.errors import run_command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "run_command(lambda words: Costs('cortex-a72') and 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert "meter-costs.sqlite" in line and "make room" in line


def test_a_temporary_folder_without_room_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.so").write_bytes(bytes(4096))
    script = (
        "import resource\n"
        "from pathlib import Path\n"
        "from netship.targets.errors import run_command\n"
        "from netship.targets.files import copy_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "run_command(lambda words: copy_folder(Path('bundle'), Path('copied')) or 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert line.endswith("make room there") and "[" not in line


def test_the_static_qemu_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = tmp_path / "qemu-aarch64-static"
    static.write_text("#!/bin/sh\necho qemu-aarch64 version 7.2.0\n")
    static.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match="apt install qemu-user.*static QEMU takes no plugins"
    ):
        counting.find_qemu()


def test_a_library_without_symbols_is_refused(tmp_path: Path) -> None:
    source, library = tmp_path / "model.c", tmp_path / "model.so"
    source.write_text("int tvmgen_default_fused_add(void) { return 1; }\n")
    options = ("-target", "aarch64-linux-gnu.2.28", "-shared", "-fPIC")
    run_zig("cc", library, *options, source)
    function = bytes.fromhex("20008052c0035fd6")  # mov w0, #1; ret
    kernel_at = attribution(library, [Block(0, function, 1)])
    assert kernel_at(0) == "fused_add"
    run_zig("cc", library, *options, "-s", source)
    with pytest.raises(UserError, match="no symbols.*build it again"):
        attribution(library, [Block(0, function, 1)])


def test_c_that_a_kernel_calls_is_the_kernels(tmp_path: Path) -> None:
    source, library = tmp_path / "model.c", tmp_path / "model.so"
    source.write_text(
        "int tvmgen_default_fused_add(void) { return 1; }\n"
        'int __attribute__((visibility("hidden"), used)) called(void) { return 2; }\n'
        "int other(void) { return 3; }\n"
    )
    options = ("-target", "aarch64-linux-gnu.2.28", "-shared", "-fPIC", "-O1")
    run_zig("cc", library, *options, source)
    functions = [bytes.fromhex(f"{2 * n:x}0008052c0035fd6") for n in (1, 2, 3)]
    # mov w0, #n; ret, one after the other.
    blocks = [Block(8 * n, code, 1) for n, code in enumerate(functions)]
    kernel_at = attribution(library, blocks, {"called": "fused_add"})
    found = [kernel_at(block.address) for block in blocks]
    assert found == ["fused_add", "fused_add", "outside the kernels"]


@pytest.fixture(scope="module")
def dot_product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for Cortex-A72 whose code has an SDOT, which Cortex-A76 has first."""
    try:
        counting.find_qemu()
        sysroot.prepare(lambda stage: print(stage, file=sys.stderr))
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")
    folder = tmp_path_factory.mktemp("dot")
    return tiny_bundle(folder, resolve("arm-cortex-a72"), extra_c=DOT_PRODUCT).path


def refusal(bundle: Path, **environment: str) -> str:
    """The one line that the meter refuses a bundle with."""
    result = run("meter", bundle, "--cpu", "cortex-a72", "--json", **environment)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    return line


@pytest.mark.slow
def test_a_bundle_with_an_instruction_that_the_cpu_lacks_is_one_line(
    dot_product: Path, tmp_path: Path
) -> None:
    assert "needs an instruction that this CPU does not have" in refusal(dot_product)
    # The same library, and the manifest says whose it is.
    other = tmp_path / "a76"
    shutil.copytree(dot_product, other)
    manifest = json.loads((other / "manifest.json").read_text())
    target = TargetIdentity.of(resolve("arm-cortex-a76"))
    manifest["target"] = target.model_dump(mode="json")
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert re.search("arm-cortex-a76: this CPU .* has no asimddp", refusal(other))


@pytest.mark.slow
def test_a_bundle_that_nothing_can_count_is_one_line(
    dot_product: Path, tmp_path: Path
) -> None:
    nothing = str(tmp_path)
    assert "no qemu-aarch64 to count with" in refusal(dot_product, PATH=nothing)
    killed = tmp_path / "qemu-aarch64"
    killed.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo qemu-aarch64 version 7.2.0 && exit\n'
        "kill -9 $$\n"
    )
    killed.chmod(0o755)
    line = refusal(dot_product, PATH=nothing)
    assert f"{dot_product}: was killed under QEMU; end other programs" in line
