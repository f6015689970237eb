"""Other runtimes for aarch64, unpacked in the user's cache folder and run under QEMU on one thread.

Pinned wheels (peers-arm64.lock) fetched by pip and verified by SHA-256; nothing is installed. Models
are converted by each runtime's own converter, in the emulated system too, except for LiteRT
(``bench.tflite``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from bench import int8_forms, qdq, tflite
from devices import sysroot
from devices.sessions.emulated import check_cpu, find_qemu
from meter import board_files
from meter.counts import Command
from targets.errors import UserError
from targets.files import cache_folder, file_lock
from targets.toolchain import compile_once

if TYPE_CHECKING:
    import onnx

LOCK = Path(__file__).with_name("baselines-arm64.lock")
_RUN = Path(__file__).with_name("run_baseline.py")
_MARK = Path(__file__).with_name("mark.c")
CONVERSION = "2"
"""Goes up when a conversion changes, so that what is kept of the one before is not taken."""
# The wheels' glibc, newest first; the arm64 system has Debian 12's 2.36.
_PLATFORMS = tuple(f"manylinux_2_{n}_aarch64" for n in (36, 35, 31, 28, 27, 24, 17))
# What a run takes at most: a large network's conversion, or its inferences under the counters.
_TIMEOUT_SECONDS = 1800.0

Progress = Callable[[str], None]


class Peer(NamedTuple):
    """A runtime: its name on the command line, what people call it, the wheel it is in."""

    name: str
    title: str
    package: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("litert", "LiteRT (XNNPACK)", "ai-edge-litert"),
        Peer("ncnn", "ncnn", "ncnn"),
        Peer("ncnn-default", "ncnn (its default)", "ncnn"),
        Peer("mnn", "MNN", "mnn"),
        Peer("openvino", "OpenVINO", "openvino"),
        Peer("onnxruntime", "ONNX Runtime", "onnxruntime"),
    )
}
COMPARED = ("litert", "ncnn", "mnn", "openvino", "onnxruntime")
"""The runtimes that a comparison takes by default: all in the model's own precision."""


def peer(name: str) -> Peer:
    """Raises: UserError for a name that no runtime here has."""
    if name not in PEERS:
        raise UserError(f"--runtimes {name}: unknown; known: {', '.join(PEERS)}")
    return PEERS[name]


def version(runtime: Peer) -> str:
    """The version that the lock pins."""
    return _pins()[runtime.package]


def _pins() -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==(\S+) ", LOCK.read_text(), re.MULTILINE)
    return dict(found)


def prepare(on_progress: Progress) -> Path:
    """Fetch and unpack the runtimes if they are not there yet; the folder with their Python.

    Raises:
        UserError: no network or no pip; a pinned version is gone; a file's hash is not the lock's.
    """
    cache = cache_folder()
    key = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    path = cache / f"baselines-arm64-{key}"
    if path.is_dir():
        return path
    waiting = "waiting for another process that fetches the runtimes"
    with file_lock(cache / "baselines.lock", lambda: on_progress(waiting)):
        if path.is_dir():
            return path
        for abandoned in cache.glob(".baselines-*"):
            shutil.rmtree(abandoned)
        on_progress(
            f"fetching {len(_pins())} aarch64 wheels of other runtimes (about 140 MB)"
        )
        with tempfile.TemporaryDirectory(prefix=".baselines-", dir=cache) as work:
            wheels, site = Path(work, "wheels"), Path(work, "site")
            _download(wheels)
            for wheel in sorted(wheels.iterdir()):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
            # Of a zip file's modes nothing is kept; QEMU wants this one.
            _pnnx(site).chmod(0o755)
            site.rename(path)
    return path


def _pnnx(site: Path) -> Path:
    return site / "pnnx" / "pnnx"


def _download(folder: Path) -> None:
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-input"]
    python = ["--python-version", "3.11", "--implementation", "cp"]
    for abi in ("cp311", "abi3", "none"):
        python += ["--abi", abi]
    for name in _PLATFORMS:
        python += ["--platform", name]
    what = ["--requirement", str(LOCK), "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet"]
    result = subprocess.run(
        [*pip, *options, *python, *what], capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        said = [line for line in lines if "ERROR" in line] or lines[-1:]
        why = re.sub(r"^ERROR:\s*", "", said[0].strip())
        raise UserError(
            f"{LOCK.name}: {why}; check the network and the index that pip uses"
        )


class Emulated(NamedTuple):
    """The arm64 Python with the runtimes in it, on one CPU."""

    cpu: str
    qemu: str
    root: Path
    site: Path

    def command(self, arguments: Sequence[str]) -> Command:
        environment = {
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        # -S: no site-packages of this machine, whose files the emulated process can see.
        python = (str((self.root / "usr/bin/python3.11").resolve()), "-S")
        return Command(self.root, (*python, *arguments), environment)

    def run(self, command: Command, folder: Path) -> str:
        """Run to the end in ``folder``; what it printed.

        Raises:
            UserError: it failed or took too long.
        """
        words = [self.qemu, "-cpu", self.cpu, "-L", str(command.root)]
        try:
            done = subprocess.run(
                [*words, *command.arguments],
                env=command.environment,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"no end after {_TIMEOUT_SECONDS:.0f} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(said[-1] if said else f"exit code {done.returncode}")
        return done.stdout


def emulated(cpu: str, on_progress: Progress) -> Emulated:
    """The arm64 system as the board with ``cpu`` has it, with every runtime; fetched the first time.

    Raises:
        UserError: no QEMU, a CPU that it does not know or that no board here has, or a failed fetch.
    """
    board_files.board(cpu)
    qemu = find_qemu()
    check_cpu(qemu, cpu)
    system = sysroot.prepare(on_progress)
    site = prepare(on_progress)
    root = board_files.root(system, cpu, cache_folder() / "boards")
    return Emulated(cpu, qemu, root, site)


def inference(
    machine: Emulated, runtime: Peer, model: Path, tensor: Path, output: Path
) -> Command:
    """The program that loads ``model``, runs it on ``tensor`` and writes ``output``.

    It marks its second inference as the one that counts.

    Args:
        model: as ``converted`` gave it.
        tensor: a .npy file of the ONNX input; output: a .npy file of the first output.

    Raises:
        UserError: the marks cannot be compiled.
    """
    files = [str(path.resolve()) for path in (model, tensor, output, _marks())]
    return machine.command([str(_RUN), runtime.name, *files])


def _marks() -> Path:
    """The library of the marks, for aarch64, compiled once and kept."""
    target = ("-target", "aarch64-linux-gnu.2.28")
    return compile_once(_MARK, "peer-marks.so", *target, "-O2", "-shared", "-fPIC")


def converted(
    machine: Emulated, runtime: Peer, model: onnx.ModelProto, on_progress: Progress
) -> Path:
    """The file that the runtime loads, made of an ONNX graph with a static input; kept for next time.

    Raises:
        UserError: the runtime's converter refuses it, in its own words.
    """
    data = model.SerializeToString(deterministic=True)
    made_of = [data, runtime.package.encode(), LOCK.read_bytes(), CONVERSION.encode()]
    key = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in made_of))
    name, convert = _CONVERTERS[runtime.package]
    path = cache_folder() / "peer-models" / f"{runtime.package}-{key.hexdigest()[:24]}"
    if not path.is_dir():
        on_progress(f"converting for {runtime.title}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".model-", dir=path.parent) as work:
            folder = Path(work, "made")
            folder.mkdir()
            convert(machine, folder, model)
            with contextlib.suppress(FileExistsError, OSError):
                folder.rename(path)
    return path / name


Converter = Callable[[Emulated, Path, "onnx.ModelProto"], None]


def _to_onnxruntime(_machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    _write(model, folder)


def _to_openvino(_machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    quantised = qdq.is_quantised(model)
    _write(int8_forms.for_openvino(model) if quantised else model, folder)


def _to_mnn(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    # Its command line installs packages behind one's back; the extension module does not.
    call = "import _tools, sys; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
    files = ["--modelFile", "model.onnx", "--MNNModel", "model.mnn"]
    if qdq.is_quantised(model):
        model, parameters = int8_forms.for_mnn(qdq.take_apart(model))
        (folder / "int8.json").write_text(parameters)
        files += ["--compressionParamsFile", "int8.json"]
    _write(model, folder)
    words = ["-c", call, "-f", "ONNX", *files, "--bizCode", "netship"]
    said = machine.run(machine.command(words), folder)
    _must_exist(folder / "model.mnn", said)


def _to_ncnn(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    network = qdq.take_apart(model) if qdq.is_quantised(model) else None
    _write(qdq.with_relu(network, layers_too=True) if network else model, folder)
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    shape = ",".join(str(d.dim_value) for d in dimensions)
    program = str(_pnnx(machine.site))
    words = (program, "model.onnx", f"inputshape=[{shape}]", "fp16=0")
    said = machine.run(machine.command([])._replace(arguments=words), folder)
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    for path in (param, weights):
        _must_exist(path, said)
    if network:
        text, data = int8_forms.for_ncnn(
            network, param.read_text(), weights.read_bytes()
        )
        param.write_text(text)
        weights.write_bytes(data)


def _to_tflite(machine: Emulated, folder: Path, model: onnx.ModelProto) -> None:
    schema = _module(machine.site / "ai_edge_litert" / "schema_py_generated.py")
    (folder / "model.tflite").write_bytes(tflite.convert(model, schema))


_CONVERTERS: dict[str, tuple[str, Converter]] = {
    "ai-edge-litert": ("model.tflite", _to_tflite),
    "mnn": ("model.mnn", _to_mnn),
    "ncnn": ("model.ncnn", _to_ncnn),
    "onnxruntime": ("model.onnx", _to_onnxruntime),
    "openvino": ("model.onnx", _to_openvino),
}


def _write(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _must_exist(path: Path, said: str) -> None:
    if not path.is_file():
        lines = said.strip().splitlines() or ["no reason given"]
        raise UserError(f"its converter made no {path.name}: {lines[-1]}")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
