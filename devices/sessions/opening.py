"""Opens a session for a build, by its format: bundle, standalone library or C source."""

from __future__ import annotations

from collections.abc import Callable

from bundle.store import Bundle
from devices.sessions.session import Session
from targets.errors import UserError


def open_here(bundle: Bundle, threads: int | None = None) -> Session:
    """Load a bundle or a standalone library on this machine; C source on its emulated board.

    Raises:
        UserError: as `open_local`, `open_standalone` and `open_firmware`.
    """
    if bundle.manifest.format == "c":
        return _open_firmware(bundle, threads)
    if bundle.manifest.format == "standalone":
        from devices.sessions.standalone import open_standalone

        return open_standalone(bundle, threads)
    from devices.sessions.local import open_local

    return open_local(bundle, threads)


def open_on_emulated(
    bundle: Bundle,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
    cpu: str | None = None,
) -> Session:
    """Load a bundle or a standalone library on an emulated board.

    Args:
        cpu: QEMU's name of it; the target's where None.

    Raises:
        UserError: a bundle on more than one thread; and as `open_emulated` and
            `open_standalone_emulated`.
    """
    if bundle.manifest.format == "c":
        if cpu is not None:
            raise UserError(
                f"--cpu: {bundle.path} is for one microcontroller; leave it out"
            )
        return _open_firmware(bundle, threads, on_progress)
    if bundle.manifest.format == "standalone":
        from devices.sessions.standalone import open_standalone_emulated

        return open_standalone_emulated(
            bundle, cpu, on_progress=on_progress, threads=threads
        )
    from devices.sessions.emulated import open_emulated

    if threads not in (None, 1):
        raise UserError("--threads: an emulated board runs on 1 thread; leave it out")
    return open_emulated(bundle, cpu, on_progress=on_progress)


def _open_firmware(
    bundle: Bundle,
    threads: int | None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Session:
    if threads not in (None, 1):
        raise UserError("--threads: a microcontroller has one; leave it out")
    from devices.microcontroller.session import open_firmware

    return open_firmware(bundle, on_progress)


def check_served(bundle: Bundle) -> None:
    """Refuse to send a standalone library or C source to a TVM RPC server.

    Raises:
        UserError: it is one.
    """
    if bundle.manifest.format == "c":
        raise UserError(
            f"{bundle.path}: is C source for a microcontroller; leave --ssh, --rpc and --tracker out"
        )
    if bundle.manifest.format == "standalone":
        raise UserError(
            f"{bundle.path}: a standalone library needs no RPC server; leave --ssh, --rpc and --tracker "
            f"out, copy the folder to the board and run {bundle.manifest.name}_self_test there"
        )
