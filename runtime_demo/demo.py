"""``make demo``: build, run and check once, by the commands that a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from netship.targets import interrupts
from netship.targets.arguments import command_parser, named_path
from netship.targets.commands import as_called
from netship.targets.errors import UserError, run_command

_OUTPUT = Path("out/demo")
_REPORT = Path("out/demo-report.html")
# Photographs in the scikit-image wheel that their authors gave to the public (CC0 or public domain,
# as skimage.data documents each).
_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
_TRAINED = "mobilenetv2-12"


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "runtime_demo.demo",
        "Build for this machine, classify photographs, compare with ONNX Runtime, "
        "write the report.",
    )
    parser.add_argument(
        "--model",
        help="an .onnx file or a name, as python -m compile.build takes it (default: the Model Zoo's "
        "trained MobileNetV2 where it can be fetched, the built-in network otherwise)",
    )
    parser.add_argument(
        "--images", type=named_path, help="photographs (default: scikit-image's)"
    )
    arguments = parser.parse_args(argv)
    model = arguments.model or _default_model()
    images = [arguments.images] if arguments.images else _photographs()
    _run("compile.build", "--model", model, "--output", _OUTPUT)
    _run("runtime_demo.run", _OUTPUT, "--image", *images)
    _run(
        "runtime_demo.check",
        _OUTPUT,
        "--model",
        model,
        "--images",
        *images,
        "--report",
        _REPORT,
    )
    print(f"\nThe demo passed. Open {_REPORT.resolve()} in a browser.")
    return 0


def _default_model() -> str:
    """The trained network where it can be fetched, else the built-in one; prints which."""
    from netship.compile.frontend import family, zoo

    try:
        zoo.fetch(_TRAINED, lambda done, size: None)
    except UserError as error:
        print(f"The Model Zoo's trained network cannot be fetched: {error}")
        print(
            f"Using the built-in {family.DEFAULT} instead. Its weights are seeded, not trained: the\n"
            "classes it answers with mean nothing; that both runtimes agree on them does."
        )
        return family.DEFAULT
    print(f"Using the ONNX Model Zoo's trained network, {_TRAINED}.")
    return _TRAINED


def _photographs() -> list[Path]:
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError(
            "scikit-image, whose photographs the demo shows, is missing; install it (make setup does), or give --images FOLDER"
        )
    folder = Path(package.origin).parent / "data"
    return [folder / name for name in _PHOTOS]


def _run(module: str, *options: str | Path) -> None:
    words = [*map(str, options)]
    print(f"\n$ {as_called(f'python -m {module}')} {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", f"netship.{module}", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # subprocess.run would kill it while it cleans up.
        process.terminate()
        process.wait()
        code = interrupts.exit_code()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)
