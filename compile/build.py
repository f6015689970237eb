"""``python -m compile.build``: from an ONNX model to a checked bundle, in one command.

Longer than 450 lines: every option, and the table that a build prints, are in one place.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from netship.targets.arguments import (
    as_json,
    command_parser,
    count_up_to,
    named_path,
)
from netship.targets.commands import as_called
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import (
    c_prefix,
    counted,
    ending,
    is_c_prefix,
    is_taken,
    lines,
    listed,
    magnitude,
    megabytes,
    millions,
    one_line,
    shown,
)
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.bundle.manifest import Lowering, Manifest
    from netship.bundle.store import Bundle
    from netship.compile.backends.request import BuildRequest

_positive = count_up_to(1 << 16)
# A share of the time that is not worth the search.
_NO_GAIN = 0.005
# Exit code of a build that was written and not compared.
_NOT_COMPARED = 3
_EPILOG = """\
examples:
  python -m compile.build
      the built-in MobileNetV2 1.0/224 for this machine
  python -m compile.build --target arm-cortex-a72 --model model.onnx
      your network for a Raspberry Pi 4, into out/model-arm-cortex-a72
  python -m compile.build --model model.onnx --scale 1/255 --mean 0.485,0.456,0.406 \\
      --std 0.229,0.224,0.225 --labels labels.txt --golden photos/

Preprocessing may also stand in a model.toml next to model.onnx, with the options' names as keys.
Exit codes: 0 built and compared, 2 refused (one line says why), 3 built, but nothing here could run it for a
comparison (one line says why; 0 with --accept-uncompared), 130 Ctrl-C, 143 SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    with Progress(quiet=arguments.json) as progress:
        from netship.compile.precision.search import build
        from netship.targets.presets import faster_cores

        bundle = build(request(arguments), progress)
        warnings = _warnings(bundle.manifest, arguments)
        if cores := faster_cores(arguments.target):
            progress.note(
                f"{arguments.target} has slower cores, too: run this on its others, with taskset -c {cores}"
            )
    if arguments.json:
        print(as_json(_summary(bundle, warnings)))
    else:
        print(lines(_table(bundle, arguments.model, warnings)))
    why = bundle.manifest.measured.get("not_verified_because")
    if why is None or arguments.accept_uncompared:
        return 0
    line = (
        f"NOT compared with ONNX Runtime: {why}; the build is written. Compare it: "
        f"{_next(bundle, arguments.model)}; --accept-uncompared ends with 0"
    )
    print(one_line(as_called(line)), file=sys.stderr)
    return _NOT_COMPARED


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compile.build",
        "Compile a vision network (ONNX or .tflite) into a bundle or a C library,\n"
        "compared with ONNX Runtime before it is called built.",
        _EPILOG,
    )
    option = parser.add_argument
    option(
        "--licenses",
        action=_Licenses,
        nargs=0,
        help="print the terms of the project, of what it writes, and of what others wrote in it",
    )
    option(
        "--model",
        default="mobilenetv2-1.0-224",
        metavar="MODEL",
        help="an .onnx or .tflite file; mobilenetv2-WIDTH-RESOLUTION, also after ssdlite- or deeplabv3-, built in with "
        "seeded weights; or "
        "mobilenetv2-12, the Model Zoo's trained network, downloaded (default: %(default)s)",
    )
    option(
        "--target",
        default="native",
        help="a name that `python -m targets` lists, or a TVM "
        "target string (default: %(default)s)",
    )
    option(
        "--output",
        type=named_path,
        metavar="DIR",
        help="where the bundle goes; a bundle that is "
        "there is replaced (default: out/MODEL-TARGET)",
    )
    option(
        "--format",
        choices=["bundle", "standalone", "c"],
        help="bundle: model.so for TVM's runtime; standalone: a C library with a header that "
        "needs no TVM and nothing else; c: C source for a microcontroller (default: by target)",
    )
    option(
        "--name",
        type=_identifier,
        metavar="NAME",
        help="the prefix of the C functions (default: from the model's name)",
    )
    option(
        "--quantize",
        choices=["int8"],
        help="quantise the network to int8; needs --calibration",
    )
    option(
        "--precision",
        choices=["float32", "float16", "bfloat16", "auto"],
        default="float32",
        help="float16, bfloat16: arithmetic and weights of 16 bits where they are accurate enough, on a CPU that has them; "
        "inputs and outputs stay float32; auto: int8, float16 or float32 for each layer, the fastest that loses at "
        "most --max-loss on --calibration (default: %(default)s)",
    )
    option(
        "--max-loss",
        type=_fraction,
        metavar="X",
        help="for --precision auto: the mean over the photographs of the largest error of an output, as a fraction of "
        "that output's range in float32, such as 0.01",
    )
    option(
        "--input-type",
        choices=["uint8"],
        help="uint8: the image is bytes [1, height, width, channels], as a camera's of that size, which the network scales "
        "itself (default: the model's own)",
    )
    option(
        "--calibration",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="photographs (or .npy files; .npz where there are several inputs) of the kind the network will see, 16 or more, or folders of them",
    )
    option(
        "--keep-float",
        nargs="+",
        default=[],
        metavar="NODE",
        help="nodes that --quantize int8 or --precision float16 or bfloat16 leaves in float32",
    )
    option(
        "--accept-loss",
        action="store_true",
        help="build a network of int8, float16 or bfloat16 although it loses more against float32 than a build accepts",
    )
    option(
        "--strict-int8",
        action="store_true",
        help="refuse an int8 network of which a part computes in float32",
    )
    option(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="threads that the bundle runs with by default (default: %(default)s)",
    )
    option(
        "--arena-limit",
        type=_bytes,
        metavar="72KB",
        help="for a microcontroller: refuse a network whose activations take more (KB: 1000 bytes, KiB: 1024; MB and MiB likewise)",
    )
    option(
        "--flash-limit",
        type=_bytes,
        metavar="512KB",
        help="for a microcontroller: refuse a network whose weights take more, code not counted (units as of --arena-limit)",
    )
    option(
        "--memory",
        type=_memory,
        default=(),
        metavar="dtcm=128K,sram=512K",
        help="for a microcontroller: split activations over memories (dtcm, sram, psram, sdram …) so that they wait least, and "
        "put weights into flash or qspi, where those are given (K: 1024 bytes, M: 1024 K)",
    )
    option(
        "--part",
        metavar="NAME",
        help="for a microcontroller: the --memory of a part, such as stm32f746 or stm32f746g-disco",
    )
    option(
        "--package",
        nargs="+",
        default=[],
        choices=[
            *("cmsis-pack", "arduino", "zephyr"),
            *("platformio", "esp-idf", "cmake"),
        ],
        metavar="KIND",
        help="for a microcontroller: write the C also as a library for %(choices)s, into package/KIND",
    )
    option(
        "--input-shape",
        action="append",
        default=[],
        type=_input_shape,
        metavar="NAME:1,3,224,224",
        help="fill in an input's symbolic dimensions",
    )
    option(
        "--records",
        type=named_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="tuning records that are preferred to those in tuned/ (here, next to the model, in the user's data folder) and to the shipped ones",
    )
    option(
        "--require-tuned",
        action="store_true",
        help="refuse a network whose tuning tasks the records do not all cover",
    )
    option(
        "--golden",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="photographs, .npy or .npz files for "
        "the golden data, at most 4 are taken (default: two seeded patterns)",
    )
    option(
        "--accept-uncompared",
        action="store_true",
        help="end with exit code 0, not 3, where the build can run neither here nor on an emulated board",
    )
    option(
        "--dump",
        type=named_path,
        metavar="DIR",
        help="write the network after each pass, the fused TIR and the assembly; for a standalone "
        "library also the C that it is made of",
    )
    option(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    group = parser.add_argument_group(
        "preprocessing", "pixel v (0 to 255) becomes (v × scale − mean) / std"
    )
    option = group.add_argument
    for name, metavar, text in (
        ("scale", "S", "such as 1/255 (with none of scale, mean, std: v / 127.5 − 1)"),
        ("mean", "M[,M,M]", "one number, or one a channel (default with --scale: 0)"),
        ("std", "S[,S,S]", "likewise (default with --scale: 1)"),
        (
            "preprocessing",
            "PRESET",
            "torchvision, keras-mobilenet, keras-resnet, tflite, yolo, yunet, ultraface or none; other options change parts",
        ),
        (
            "resize",
            "PIXELS|H,W",
            "short side before cropping (default: 8/7 of the input), or the size to stretch to",
        ),
        ("crop", "H[,W]", "the centre crop; must be the input's size"),
        ("crop-fraction", "F", "instead of --resize: the input's side / F, as 0.875"),
        (
            "fit",
            "FIT",
            "crop (default, but for detect and segment); stretch: all of the photograph, without its aspect; letterbox: all of it, padded",
        ),
        ("pad", "0-255", "the value around a letterbox (default: 0)"),
        ("channel-order", "RGB|BGR", "of the input (default: RGB)"),
        (
            "interpolation",
            "NAME",
            "bilinear (default), bicubic, nearest, area or lanczos",
        ),
        (
            "layout",
            "NCHW|NHWC|data",
            "of the input that is an image; data: none is (default: seen from shapes)",
        ),
        ("labels", "FILE", "class names, one a line"),
        ("task", "TASK", "what the outputs are for: classify, detect, segment or raw"),
        (
            "decode",
            "PRESET|FILE.toml",
            "how outputs become boxes: ssd, yolo, yunet, ultraface, or your own (docs/detection.md)",
        ),
    ):
        option(
            f"--{name}",
            type=partial(_override, name.replace("-", "_")),
            metavar=metavar,
            help=text,
        )
    return parser


def request(arguments: argparse.Namespace) -> BuildRequest:
    """What the options ask for.

    Raises:
        UserError: no such target.
    """
    from netship.compile.backends.request import BuildRequest
    from netship.compile.frontend.preprocessing import Overrides
    from netship.devices.microcontroller.regions import of_part
    from netship.targets.presets import resolve

    target = resolve(arguments.target)
    if arguments.part and arguments.memory:
        raise UserError("--part and --memory: both say the memories; leave one out")
    if arguments.part and target.microcontroller:
        of_part(arguments.part, target.name)
    auto = arguments.precision == "auto"
    if auto != (arguments.max_loss is not None):
        raise UserError(
            "--precision auto: needs --max-loss X, such as 0.01"
            if auto
            else "--max-loss: goes with --precision auto; add it"
        )
    return BuildRequest(
        model=arguments.model,
        target=target,
        output=arguments.output,
        format=arguments.format or target.format,
        name=arguments.name,
        threads=arguments.threads,
        input_shapes=dict(arguments.input_shape),
        golden=tuple(arguments.golden),
        dump=arguments.dump,
        overrides=Overrides(
            **{name: getattr(arguments, name) for name in Overrides.model_fields}
        ),
        arena_limit=arguments.arena_limit,
        flash_limit=arguments.flash_limit,
        package=tuple(arguments.package),
        memory=arguments.memory,
        part=arguments.part,
        quantize=arguments.quantize is not None,
        precision="float32" if auto else arguments.precision,
        max_loss=arguments.max_loss,
        input_type=arguments.input_type,
        calibration=tuple(arguments.calibration),
        keep_float=tuple(arguments.keep_float),
        accept_loss=arguments.accept_loss,
        strict_int8=arguments.strict_int8,
        records=tuple(arguments.records),
        require_tuned=arguments.require_tuned,
    )


def _summary(bundle: Bundle, warnings: Sequence[str]) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "model": manifest.model.model_dump(),
        "target": manifest.target.name,
        "layout": manifest.lowering.layout,
        "groups": len(manifest.lowering.groups),
        "macs": sum(group.macs for group in manifest.lowering.groups),
        "preprocessing_assumed": _assumed(manifest),
        "warnings": warnings,
        "compared": manifest.measured["verification"] is not None,
        "layers": {
            each.layer: each.numbers
            for each in (manifest.precision.layers if manifest.precision else ())
        },
        **manifest.measured,
    }


def _table(bundle: Bundle, model: str, warnings: Sequence[str] = ()) -> str:
    manifest, measured = bundle.manifest, bundle.manifest.measured
    lowering, verification = manifest.lowering, measured["verification"]
    firmware = manifest.firmware
    macs = sum(group.macs for group in lowering.groups)
    place = shown(quote(str(bundle.path)), 1000)
    if verification is None:
        checked = "NOT compared with ONNX Runtime: " + measured["not_verified_because"]
    else:
        checked = (
            f"max-abs error {magnitude(verification['max_abs_error'])} against {verification['reference']}, "
            f"{magnitude(verification['relative_error'])} of its range, {counted(verification['inputs'], 'input')}, "
            f"{verification['origin']}"
        )
    if _assumed(manifest):
        checked += "; preprocessing assumed, not given: see --preprocessing"
    rows = [
        ("bundle", f"{place} (and {place}.tar.gz)"),
        (
            "model",
            f"{shown(manifest.model.name)}, SHA-256 {manifest.model.sha256[:12]}…",
        ),
        ("target", f"{manifest.target.name}: {manifest.target.tvm}"),
        ("fused", f"{_fusion(lowering)}; {millions(macs, 1)} multiply-adds"),
        ("layout", f"{lowering.layout}: {lowering.reason}"),
        *_tuning(manifest, model),
        ("size", _size(manifest)),
        ("memory", _memory_of(lowering)),
        *([("placed", firmware.placed)] if firmware and firmware.placed else []),
        *(("warning", each) for each in warnings),
        *_int8(manifest),
        *_float16(manifest),
        *_bfloat16(manifest),
        *_precision(bundle),
        ("checked", checked),
        (
            "took",
            f"{measured['seconds']:.1f} s, peak memory {measured['peak_memory_bytes'] / 1e6:.0f} MB",
        ),
        ("next", as_called(_next(bundle, model))),
    ]
    return "\n".join(f"{name:<8} {value}" for name, value in rows)


def _next(bundle: Bundle, model: str) -> str:
    """How the build is compared where it can run, with photographs if a server there takes it."""
    from netship.devices.microcontroller.boards import BOARDS
    from netship.devices.microcontroller.firmware import misfit
    from netship.devices.sessions.session import Origin

    manifest = bundle.manifest
    verification = manifest.measured["verification"]
    board = ""
    place = shown(quote(str(bundle.path)), 1000)
    firmware = manifest.firmware
    emulated = BOARDS.get(firmware.cpu) if firmware else None
    if firmware and emulated and misfit(firmware, emulated):
        return (
            f"example/main.c of {place} on your board: the emulated {emulated.machine} has no room for this "
            "network"
        )
    if verification is None and manifest.format == "standalone":
        kit = f"python -m runtime_demo.board kit --target {manifest.target.name} --output kit.tar.gz"
        return (
            f"./verify FOLDER on its board, with a copy of {place} and the kit ({kit})"
        )
    if verification is None:
        board = " --ssh USER@BOARD"
    elif verification["origin"] == Origin.EMULATED:
        board = " --board emulated"
    files = "PHOTOS" if manifest.preprocessing else "FILE.npy"
    if len(manifest.inputs) > 1:
        files = "FILE.npz"
    return (
        f"python -m runtime_demo.check {place}{board} "
        f"--model {shown(quote(model), 1000)} --images {files}"
    )


def _tuning(manifest: Manifest, model: str) -> list[tuple[str, str]]:
    """What tuning would bring, where tasks have no records of their own."""
    records = manifest.lowering.records
    if records is None or records.complete:
        return []
    command = as_called("python -m tuning.tune")
    if records.fitted and records.gain < _NO_GAIN:
        return []
    saved = f"may save up to {records.gain:.0%} of the time (estimated)"
    gain = saved if records.fitted else "makes faster kernels"
    return [
        (
            "tuning",
            f"{gain}: {command} --target {manifest.target.name} --model {shown(quote(model), 1000)}",
        )
    ]


def _warnings(manifest: Manifest, arguments: argparse.Namespace) -> list[str]:
    """What no microcontroller of the target has room for, where the user stated no size."""
    from netship.devices.microcontroller.parts import too_large
    from netship.targets.cores import CORES

    firmware = manifest.firmware
    if firmware is None or firmware.arenas or not CORES[firmware.cpu].cpu:
        return []
    return too_large(
        CORES[firmware.cpu].cpu,
        0 if arguments.flash_limit else firmware.weights_bytes,
        0 if arguments.arena_limit else firmware.arena_bytes,
        manifest.quantisation is not None,
    )


def _assumed(manifest: Manifest) -> bool:
    return manifest.preprocessing is not None and manifest.preprocessing.assumed


def _int8(manifest: Manifest) -> list[tuple[str, str]]:
    facts = manifest.quantisation
    if facts is None:
        return []
    measured = manifest.measured.get("int8") or {}
    if facts.method == "given":
        how = "as the model gives it"
    else:
        agreement = measured["top1_agreement"]
        best = "" if agreement is None else f"top-1 {agreement:.0%}, "
        if (found := measured.get("boxes")) and found["judged"]:
            best = f"{found['judged'] - found['wrong']} of {counted(found['judged'], 'box')} agree, "
        how = (
            f"{facts.method} of {counted(len(facts.images), 'image')}, {facts.skipped} skipped; against float32 on "
            f"{counted(measured['images'], 'image')}: {best}cosine {measured['cosine']:.4f}"
        )
        if facts.accepted_loss:
            how += " (accepted)"
        if facts.judging is not None:
            way = facts.judging.ways[facts.judging.taken]
            same = "" if way.same is None else f"best class on {way.same}, "
            how += f"; on {counted(way.images, 'image')} that did not calibrate: {same}cosine {way.cosine:.4f}"
        if facts.kept_float:
            how += f"; kept in float32: {listed([ending(each, 40) for each in facts.kept_float], 4)}"
    lowering = manifest.lowering
    if lowering.float_operators is not None:
        share = ""
        if lowering.float_operators:
            macs, elements = lowering.float_shares
            share = f" ({macs:.1%} of multiply-adds, {elements:.1%} of elements)"
        how += f"; {counted(lowering.float_operators, 'float operator')} inside{share}, sums rounded in float32 as ONNX Runtime does"
    return [("int8", how)]


def _float16(manifest: Manifest) -> list[tuple[str, str]]:
    facts, measured = manifest.float16, manifest.measured.get("float16") or {}
    if facts is None:
        return []
    counts = Counter(each.reason for each in facts.float32)
    kept = listed([f"{n} ({reason})" for reason, n in counts.most_common()], 4)
    sums = len(facts.float32_sums)
    how = f"{_lost(measured)}; operators in float32: {kept or 'none'}; {sums} with sums in float32"
    return [("float16", how)]


def _bfloat16(manifest: Manifest) -> list[tuple[str, str]]:
    facts, lost = manifest.bfloat16, manifest.measured.get("bfloat16") or {}
    if facts is None:
        return []
    kept = listed(
        [f"{ending(each.node, 40)} ({each.reason})" for each in facts.float32], 4
    )
    return [("bfloat16", f"{_lost(lost)}; layers in float32: {kept or 'none'}")]


def _lost(measured: dict[str, Any]) -> str:
    """What 16 bits lose against float32."""
    agreement = measured["top1_agreement"]
    best = "" if agreement is None else f"top-1 {agreement:.0%}, "
    return (
        f"against float32 on {counted(measured['images'], 'input')}, simulated: {best}cosine {measured['cosine']:.6f}, worst at "
        f"{shown(measured['worst_layer'])} ({measured['worst_decibels']} dB)"
    )


def _precision(bundle: Bundle) -> list[tuple[str, str]]:
    facts = bundle.manifest.precision
    if facts is None:
        return []
    from netship.compile.precision.page import PAGE

    judged = bundle.manifest.measured["precision"]
    counts = Counter(each.numbers for each in facts.layers)
    layers = ", ".join(f"{n} in {kind}" for kind, n in counts.most_common())
    cost = f"{facts.cost / 1e6:.2f} M {facts.unit}"
    if judged["cost"]:
        cost += " (estimated)"
    how = (
        f"{layers}; {cost}; loss {judged['loss']:.5f}, at most {facts.max_loss:g} on these "
        f"{counted(facts.images, 'image')}, {judged['origin']}"
    )
    rows = [("layers", how)]
    for kind in counts:
        named = [shown(each.layer) for each in facts.layers if each.numbers == kind]
        if len(counts) > 1:
            rows.append((f"  {kind}", listed(named, 12)))
    curve = [f"{each.cost / 1e6:.2f} M {each.loss:.5f}" for each in facts.pareto]
    return [
        *rows,
        ("curve", "; ".join(curve)),
        ("page", shown(quote(str(bundle.path / PAGE)), 1000)),
    ]


def _size(manifest: Manifest) -> str:
    measured = manifest.measured
    if firmware := manifest.firmware:
        where = firmware.weights_in or "flash"
        return f"weights {firmware.weights_bytes:,} bytes of {where}, without code"
    return (
        f"{manifest.library} {megabytes(measured['library_bytes'])}; the network's weights take "
        f"{megabytes(measured['weight_bytes'])}"
    )


def _fusion(lowering: Lowering) -> str:
    """How the operators fused, such as "52 conv2d + 1 dense in 53 kernels, 1 kernel without multiply-adds"."""
    kinds = " + ".join(
        f"{n} {name.removeprefix('nn.')}" for name, n in lowering.operators.items()
    )
    heavy = sum(1 for group in lowering.groups if group.macs)
    others = len(lowering.groups) - heavy
    return f"{kinds} in {counted(heavy, 'kernel')}, {counted(others, 'kernel')} without multiply-adds"


def _memory_of(lowering: Lowering) -> str:
    """What an instance takes, without the weights."""
    plan = lowering.memory
    if plan is None:
        return f"{megabytes(lowering.workspace_bytes)} for activations, by TVM's plan"
    arena = f"arena {plan.arena_bytes:,} bytes (no plan can need less than {plan.lower_bound:,})"
    outer, inner = plan.outer_workspace_bytes, plan.inner_workspace_bytes
    if not outer and not inner:
        return arena
    return f"{arena}, workspace {outer:,} bytes and {inner:,} a thread"


class _Licenses(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from netship.devices.board.kit import notices
        from netship.targets.licences import PROJECT, notice

        folder = notice("the model", linked=True)
        print(f"{PROJECT}\n\n==== In every output folder, file LICENSES\n\n{folder}")
        print(f"==== In a kit for boards, file LICENSES\n\n{notices()}")
        parser.exit()


def _identifier(text: str) -> str:
    if not is_c_prefix(text):
        other = c_prefix(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is taken: lib{text}, {text}.h or {text}.py would hide a system's, or C, C++ or Python has the "
            f"word; give another, such as {other}"
            if is_taken(text)
            else f"{text!r} is not a C identifier of at most 64 characters; give one, such as {other}"
        )
    return text


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a fraction above 0 and at most 1, such as 0.01"
        )
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})(B|KB|KiB|MB|MiB)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 72KB")
    units = {"KB": 1000, "KiB": 1024, "MB": 10**6, "MiB": 1 << 20}
    return int(match[1]) * units.get(match[2], 1)


def _memory(text: str) -> Any:
    from netship.devices.microcontroller.regions import parse

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _override(name: str, text: str) -> Any:
    """An option of the preprocessing, as model.toml takes it too."""
    from netship.compile.frontend.preprocessing import parse_option

    try:
        return parse_option(name, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")
    if not colon or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:1,3,224,224")
    return name, tuple(_positive(part) for part in sizes.split(","))


if __name__ == "__main__":
    run_command(main)
