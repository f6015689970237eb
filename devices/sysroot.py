"""``python -m devices.sysroot``: fetch the arm64 and armhf systems that emulated boards run on.

apt and pip fetch pinned Debian packages (sysroot-arm64.lock, sysroot-armhf.lock) and, for arm64,
the engine's own wheels (requirements.lock) as the user. The files are verified by SHA-256 and
unpacked in the user's cache folder. Nothing on the machine is installed or changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from netship.bundle.store import sha256_of
from netship.targets.arguments import add_json, as_json, command_parser
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted
from netship.targets.files import cache_folder, make_once

# Debian's names of the architectures, by Linux's names.
ARCHITECTURES = {"aarch64": "arm64", "arm": "armhf"}
REQUIREMENTS = Path(__file__).parents[1] / "requirements.lock"
SUITE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "NETSHIP_DEBIAN_MIRROR"
REFRESH = "python -m devices.sysroot --lock"

# The engine's requirements that `import tvm.rpc.server` needs.
WHEELS = ("ml-dtypes", "numpy", "xtc-tvm-python-bindings")
# The packages' own tests, and everything of the engine but its Python and its runtime.
_LEFT_OUT = re.compile(r".*/tests/|tvm/(?!.*\.py$|libtvm_runtime\.so$)")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64")

Progress = Callable[[str], None]


class Package(NamedTuple):
    """A line of a lock: one package of Debian's suite."""

    name: str
    version: str
    sha256: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "devices.sysroot",
        "Fetch the systems that emulated boards run on, into the cache folder.",
        f"Packages come from this machine's Debian mirror; ${MIRROR_VARIABLE} names another.",
    )
    parser.add_argument(
        "--lock",
        action="store_true",
        help=f"pin the versions that {SUITE} has today: rewrites the lock",
    )
    parser.add_argument(
        "--machine",
        choices=ARCHITECTURES,
        default="aarch64",
        help="aarch64 (64-bit boards, the default) or arm (32-bit ones)",
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.lock:
        relock(_say, arguments.machine)
        return 0
    path = prepare(_say, arguments.machine)
    size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    if arguments.json:
        print(as_json({"path": str(path), "bytes": size}))
    else:
        print(f"{path}: {size / 1e6:.0f} MB")
    return 0


def _say(stage: str) -> None:
    print(stage, file=sys.stderr)


def lock_of(machine: str = "aarch64") -> Path:
    return Path(__file__).with_name(f"sysroot-{ARCHITECTURES[machine]}.lock")


def sysroot_path(machine: str = "aarch64") -> Path:
    """The folder of the system that the locks describe, whether it is there or not."""
    key = hashlib.sha256()
    wheels = _wheel_requirements() if machine == "aarch64" else ""
    for part in (lock_of(machine).read_text(), wheels, _LEFT_OUT.pattern):
        key.update(part.encode())
    return cache_folder() / f"sysroot-{ARCHITECTURES[machine]}-{key.hexdigest()[:16]}"


def prepare(on_progress: Progress, machine: str = "aarch64") -> Path:
    """Fetch and unpack the system if it is not there yet; its folder.

    Args:
        machine: aarch64 (with Python and the engine's runtime) or arm (without).

    Raises:
        UserError: no network, apt, dpkg or pip; a pinned version is gone; a file's hash
            is not the lock's.
    """

    def fetch(root: Path) -> None:
        root.mkdir()
        work = root.parent
        for archive in _fetch_packages(work, on_progress, machine):
            _run(["dpkg-deb", "-x", str(archive), str(root)])
        if machine == "aarch64":
            on_progress("fetching the engine's aarch64 wheels")
            requirements = work / "requirements.txt"
            requirements.write_text(_wheel_requirements())
            site = root / "opt" / "site-packages"
            unpack_wheels(
                requirements,
                site,
                _PLATFORMS,
                wanted=lambda name: not _LEFT_OUT.match(name),
            )

    waiting = "waiting for another process that fetches a system"
    return make_once(sysroot_path(machine), fetch, lambda: on_progress(waiting))


def relock(on_progress: Progress, machine: str = "aarch64") -> None:
    """Rewrite the lock with the same packages in the versions that the suite has today."""
    lock = lock_of(machine)
    comments = [line for line in lock.read_text().splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as work:
        environment = _private_apt(Path(work), on_progress, machine)
        lines = []
        for package in read_lock(machine):
            show = ["apt-cache", "show", "--no-all-versions", package.name]
            fields = dict(
                re.findall(r"^(\w+): (.*)$", _run(show, environment), re.MULTILINE)
            )
            lines.append(f"{package.name} {fields['Version']} {fields['SHA256']}")
    lock.write_text("\n".join([*comments, *lines]) + "\n")
    on_progress(f"{lock}: {counted(len(lines), 'package')}")


def read_lock(machine: str = "aarch64") -> list[Package]:
    lines = lock_of(machine).read_text().splitlines()
    return [Package(*line.split()) for line in lines if line and line[0] != "#"]


def _fetch_packages(work: Path, on_progress: Progress, machine: str) -> list[Path]:
    packages = read_lock(machine)
    environment = _private_apt(work, on_progress, machine)
    on_progress(
        f"fetching {len(packages)} {ARCHITECTURES[machine]} packages of Debian {SUITE}"
    )
    folder = work / "packages"
    folder.mkdir()
    pins = [f"{package.name}={package.version}" for package in packages]
    _run(["apt-get", "download", *pins], environment, folder)
    archives = []
    for package in packages:
        [archive] = folder.glob(f"{package.name}_*.deb")
        if sha256_of(archive) != package.sha256:
            raise UserError(
                f"{archive.name}: its SHA-256 is not the one in {lock_of(machine).name}; try again, "
                f"and if it stays so refresh the lock with `{REFRESH}`"
            )
        archives.append(archive)
    return archives


def _private_apt(work: Path, on_progress: Progress, machine: str) -> dict[str, str]:
    """Settings for an apt of the board's architecture that runs as the user; of this machine's it takes the proxy only."""
    if not KEYRING.is_file():
        raise UserError(
            f"{KEYRING}: missing; install it with `apt install debian-archive-keyring`"
        )
    mirror, architecture = _mirror(), ARCHITECTURES[machine]
    for folder in (
        "state/lists/partial",
        "cache/archives/partial",
        "etc/apt.conf.d",
        "etc/preferences.d",
    ):
        (work / "apt" / folder).mkdir(parents=True)
    (work / "apt" / "status").touch()
    (work / "apt" / "etc" / "sources.list").write_text(
        f"deb [arch={architecture} signed-by={KEYRING}] {mirror} {SUITE} main\n"
    )
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Dir::State": str(work / "apt" / "state"),
        "Dir::State::status": str(work / "apt" / "status"),
        "Dir::Cache": str(work / "apt" / "cache"),
        "Dir::Etc": str(work / "apt" / "etc"),
    }
    proxies = [
        line
        for line in _run(["apt-config", "dump", "Acquire"]).splitlines()
        if line.startswith(("Acquire::http", "Acquire::https"))
    ]
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    (work / "apt.conf").write_text("\n".join([*proxies, *lines]) + "\n")
    environment = {"APT_CONFIG": str(work / "apt.conf")}
    on_progress(f"reading the package list of {mirror}")
    _run(["apt-get", "update"], environment)
    return environment


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses, or the one that the user names."""
    if named := os.environ.get(MIRROR_VARIABLE):
        return named
    listed = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"]).split()
    for uri in listed:
        if urlsplit(uri).path.rstrip("/").endswith("/debian"):
            return uri
    raise UserError(
        f"this machine's apt knows no Debian mirror; set {MIRROR_VARIABLE} to the URL of one"
    )


def _wheel_requirements() -> str:
    """The lines of requirements.lock, with their hashes, for the packages that the RPC server imports."""
    text = re.sub(r"\n\s*#.*", "", REQUIREMENTS.read_text())
    blocks = re.split(r"\n(?=\S)", text)
    wanted = re.compile(rf"(?:{'|'.join(WHEELS)})==")
    return "\n".join(block for block in blocks if wanted.match(block)) + "\n"


def unpack_wheels(
    requirements: Path,
    site: Path,
    platforms: Sequence[str],
    abis: Sequence[str] = ("cp311",),
    wanted: Callable[[str], object] = bool,
) -> None:
    """Wheels for the arm64 system's Python, fetched by pip and unpacked in the folder ``site``.

    Args:
        requirements: with a hash of each wheel.
        wanted: whether a file of that name is unpacked; by default all are.

    Raises:
        UserError: no network or no pip; a pinned version is gone; a file's hash is another one.
    """
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-input"]
    python = ["--python-version", "3.11", "--implementation", "cp"]
    python += [word for name in abis for word in ("--abi", name)]
    python += [word for name in platforms for word in ("--platform", name)]
    what = ["--requirement", str(requirements)]
    pip = [*_pip(), "download", "--quiet"]
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        _run([*pip, *options, *python, *what, "--dest", folder])
        for wheel in sorted(Path(folder).iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if wanted(name)]
                archive.extractall(site, names)


def _pip() -> list[str]:
    """The command pip. An environment that uv makes, also for pipx, has none: Python's own copy of pip runs there."""
    found = find_spec("ensurepip")
    if find_spec("pip") is None and found is not None and found.origin is not None:
        for wheel in Path(found.origin).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, str(wheel / "pip")]
    return [sys.executable, "-m", "pip"]


def _run(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run a tool; what it printed. A failure is one line with the tool's name."""
    try:
        result = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not found; emulated boards need apt and dpkg, which Debian and "
            "Ubuntu have and other systems have packages of"
        ) from None
    if result.returncode == 0:
        return result.stdout
    raise UserError(_why(Path(command[0]).name, result.stderr or result.stdout))


def _why(tool: str, output: str) -> str:
    """One line for the failure of apt, dpkg or pip."""
    said = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("E:", "W:", "ERROR:"))]
    first = re.sub(
        r"^(E:|W:|ERROR:)\s*", "", (errors or said or ["no reason given"])[0]
    )
    if "was not found" in first and "Version" in first:
        return (
            f"the lock is stale: {first}, Debian has a newer one; refresh it "
            f"with `{REFRESH}`"
        )
    if "No module named pip" in output:
        return f"this Python has no pip; run `{sys.executable} -m ensurepip`, then try again"
    if tool.startswith("python"):
        return f"{first}; check the network and the index that pip uses, then try again"
    if tool.startswith("apt"):
        return f"{first}; check the network (or ${MIRROR_VARIABLE}), then try again"
    return f"{tool}: {first}; try again"


if __name__ == "__main__":
    run_command(main)
