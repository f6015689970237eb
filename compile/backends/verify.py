"""Run what was built and compare it with the reference, before it is called built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from netship.bundle.accuracy import Accuracy, compare
from netship.bundle.golden import Check
from netship.bundle.store import Bundle, open_bundle
from netship.compile.backends.request import BuildRequest
from netship.devices.microcontroller.host import run_on_host
from netship.devices.microcontroller.session import from_outputs, interface_of, to_input
from netship.devices.sessions.emulated import find_qemu
from netship.devices.sessions.opening import open_here, open_on_emulated
from netship.devices.sessions.session import Origin
from netship.devices.sysroot import prepare
from netship.targets.child import run_in_child
from netship.targets.errors import UserError
from netship.targets.escapes import shown
from netship.targets.presets import Target, missing_features, this_cpu
from netship.targets.progress import Progress

Array = NDArray[Any]


class Verification(NamedTuple):
    """The worst of the inputs, and where it ran."""

    origin: Origin
    inputs: int
    max_abs_error: float
    relative_error: float


def verify(
    folder: Path,
    checks: Sequence[Check],
    emulated: bool,
    stage: Callable[[str], None],
) -> Verification:
    """Run a bundle on the inputs of ``checks``, in a process of its own: a wrong kernel may crash it."""
    bundle = open_bundle(folder)
    where = "an emulated board" if emulated else "this machine"
    session = (
        open_on_emulated(bundle, on_progress=stage) if emulated else open_here(bundle)
    )
    stage(f"comparing with ONNX Runtime on {where}")
    with session:
        results = [
            compare(session.run(*each.inputs), each.outputs, each.tolerances)
            for each in checks
        ]
    wrong = f"the compiled model gives other answers than ONNX Runtime on {where}"
    return _worst(bundle, results, session.origin, wrong, ", and try another --target")


def _worst(
    bundle: Bundle,
    results: Sequence[Accuracy],
    origin: Origin,
    wrong: str,
    advice: str = "",
) -> Verification:
    worst = max(results, key=lambda result: (not result.passed, result.relative_error))
    if not worst.passed:
        how = "its outputs have other shapes"
        if (element := worst.worst) is not None:
            name = shown(bundle.manifest.outputs[element.output].name)
            how = (
                f"output {name!r} has {element.found:.6g} at {list(element.place)} instead of "
                f"{element.expected:.6g}, {element.excess:.2g} times its tolerance"
            )
            if isnan(element.expected):
                raise UserError(
                    f"{wrong}: {how}; the network itself makes NaN of an input that has none, as a root or logarithm of a "
                    "negative number does, and compiled code does not keep it: bound that operator's input"
                )
        raise UserError(f"{wrong}: {how}; please report the model{advice}")
    return Verification(origin, len(results), worst.max_abs_error, worst.relative_error)


def verify_here_or_emulated(
    folder: Path,
    checks: Sequence[Check],
    target: Target,
    progress: Progress,
    *,
    needs_system: bool,
) -> Verification | str:
    """A bundle or library on this machine, or on an emulated board where this CPU lacks something.

    Args:
        needs_system: on an emulated board it wants that board's system.

    Returns:
        The worst of the answers; why there are none, where no board can be emulated.

    Raises:
        UserError: an answer is wrong.
    """
    missing = missing_features(target, this_cpu())
    if missing and not target.qemu_cpu:
        return f"this machine lacks {', '.join(missing)}, and {target.name} has no emulated board"
    try:
        if missing:
            find_qemu(target.machine)
        if missing and needs_system:
            prepare(progress.stage)
    except UserError as error:
        return str(error)
    return run_in_child(
        verify, folder, checks, bool(missing), stage=progress.stage, tick=progress.tick
    )


def verify_c(folder: Path, checks: Sequence[Check]) -> Verification:
    """Run the C project in ``folder``, compiled for this machine, on the inputs of ``checks``.

    Raises:
        UserError: an answer is wrong.
    """
    bundle = open_bundle(folder)
    interface = interface_of(bundle)
    inputs = [to_input(each.inputs, bundle) for each in checks]
    outputs = run_on_host(folder, bundle.manifest.name, interface, inputs)
    results = [
        compare(from_outputs(output, bundle), each.outputs, each.tolerances)
        for output, each in zip(outputs, checks, strict=True)
    ]
    return _worst(
        bundle, results, Origin.HOST, "the C gives other answers than the reference"
    )


def answers(
    folder: Path,
    samples: Sequence[Sequence[Array]],
    request: BuildRequest,
    progress: Progress,
) -> tuple[list[list[Array]], Origin] | str:
    """What a build answers to inputs, here or on an emulated board, and where; or why it cannot run."""
    missing = missing_features(request.target, this_cpu())
    if missing and not request.target.qemu_cpu:
        return f"this machine lacks {', '.join(missing)}"
    try:
        if missing:
            find_qemu(request.target.machine)
    except UserError as error:
        return str(error)
    return run_in_child(
        _answers,
        *(folder, samples, bool(missing)),
        stage=progress.stage,
        tick=progress.tick,
    )


def _answers(
    folder: Path,
    samples: Sequence[Sequence[Array]],
    emulated: bool,
    stage: Callable[[str], None],
) -> tuple[list[list[Array]], Origin]:
    bundle = open_bundle(folder)
    session = (
        open_on_emulated(bundle, on_progress=stage) if emulated else open_here(bundle)
    )
    stage("running the photographs")
    with session:
        return [session.run(*each) for each in samples], session.origin
