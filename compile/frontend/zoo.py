"""Trained networks of the ONNX Model Zoo: fetched once, verified, kept in the user's cache."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from netship.bundle.manifest import Preprocessing
from netship.bundle.store import sha256_of
from netship.targets.errors import UserError
from netship.targets.files import cache_folder, file_lock

Progress = Callable[[int, int], None]

#: Environment variable: another address to fetch from, ``https://`` or ``http://127.0.0.1``.
ADDRESS_VARIABLE = "NETSHIP_ZOO"
ADDRESS = "https://huggingface.co/onnxmodelzoo"
TIMEOUT_SECONDS = 20.0

_REDIRECTS = 5
_ATTEMPTS = 3
_CHUNK = 1 << 16
_INSTEAD = (
    "try again later, use the built-in network (--model mobilenetv2-1.0-224), "
    "or give a file (--model FILE.onnx)"
)


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A file below the address, pinned by size and SHA-256, and the preprocessing it was trained with."""

    path: str
    nbytes: int
    sha256: str
    preprocessing: Preprocessing


# ImageNet's mean and standard deviation, as the zoo's page for MobileNet states them for v / 255.
_IMAGENET = Preprocessing(
    resize=256,
    crop=(224, 224),
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

MODELS: dict[str, ZooModel] = {
    "mobilenetv2-12": ZooModel(
        path="mobilenetv2-12/resolve/main/mobilenetv2-12.onnx",
        nbytes=13_964_571,
        sha256="c0c3f76d93fa3fd6580652a45618618a220fced18babf65774ed169de0432ad5",
        preprocessing=_IMAGENET,
    ),
}


class _Cut(Exception):
    """The connection failed; the bytes received so far are kept, and another attempt may continue."""


def fetch(name: str, on_progress: Progress) -> Path:
    """The file of a zoo model, from the cache or the network.

    A download that was cut continues where it stopped, now and at the next call; several
    processes may call at the same time.

    Args:
        name: a key of MODELS.
        on_progress: called with (bytes so far, bytes in all).

    Raises:
        UserError: no such model, nothing fetched, or the bytes are not the pinned ones.
    """
    if name not in MODELS:
        raise UserError(f"zoo model {name[:80]!r}: unknown; known: {', '.join(MODELS)}")
    model = MODELS[name]
    folder = cache_folder("netship/models")
    path = folder / f"{name}.onnx"
    try:
        if _is_whole(path, model):
            return path
        url = f"{_address()}/{model.path}"
        part = folder / f"{name}.part"
        # While another process has the lock: the progress of its part.
        with file_lock(
            folder / f"{name}.lock", lambda: on_progress(_size(part), model.nbytes)
        ):
            if not _is_whole(path, model):
                _download(url, part, model, on_progress)
                part.replace(path)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that can be written to and has room"
        ) from None
    return path


def _address() -> str:
    address = os.environ.get(ADDRESS_VARIABLE) or ADDRESS
    if not _allowed(address):
        raise UserError(
            f"{ADDRESS_VARIABLE}={address}: must begin with https:// (or http://127.0.0.1); "
            "correct it, or unset it"
        )
    return address.rstrip("/")


def _allowed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where the port is not a number
    except ValueError:
        return False
    return (parts.scheme == "https" and bool(parts.hostname)) or _local(url)


def _local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname == "127.0.0.1"


def _is_whole(path: Path, model: ZooModel) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == model.nbytes
        and sha256_of(path) == model.sha256
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _download(url: str, part: Path, model: ZooModel, on_progress: Progress) -> None:
    """Bring ``part`` to the model's whole content; on failure it stays only if a later call can continue it."""
    reason = ""
    if _size(part) > model.nbytes:
        part.unlink()
    for _ in range(_ATTEMPTS):
        before = _size(part)
        if before == model.nbytes:
            break
        try:
            _continue(url, part, model, on_progress)
        except _Cut as cut:
            reason = str(cut)
            if _size(part) <= before:
                break
    size = _size(part)
    if size < model.nbytes:
        kept = f"; {size:,} of {model.nbytes:,} bytes are kept" if size else ""
        raise UserError(f"{url}: {reason}{kept}; {_INSTEAD}")
    if not _is_whole(part, model):
        part.unlink()
        raise UserError(
            f"{url}: the bytes received are not those of the pinned SHA-256 and were removed; {_INSTEAD}"
        )


def _continue(url: str, part: Path, model: ZooModel, on_progress: Progress) -> None:
    """One request, from the end of ``part`` if the server allows it; raises _Cut where the body is too short."""
    offset = _size(part)
    with _open(url, offset) as response:
        offset = _start_of(response, offset, url, model)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.truncate()
            while chunk := _read(response):
                offset += len(chunk)
                if offset > model.nbytes:
                    break
                file.write(chunk)
                on_progress(offset, model.nbytes)
    if offset > model.nbytes:
        part.unlink()
        raise UserError(
            f"{url}: sends more than the {model.nbytes:,} bytes of this model; {_INSTEAD}"
        )
    if offset < model.nbytes:
        raise _Cut("the connection was cut")


def _start_of(response: Any, offset: int, url: str, model: ZooModel) -> int:
    """Where the body begins: at ``offset`` if the server honoured the range, else at 0."""
    total = response.headers.get("Content-Length", "")
    if response.status == 206:
        ranged = re.fullmatch(
            r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)",
            response.headers.get("Content-Range", ""),
        )
        if not ranged or int(ranged[1]) != offset:
            raise UserError(f"{url}: answers with another range than asked; {_INSTEAD}")
        total = ranged[2]
    else:
        offset = 0
    if re.fullmatch(r"\d{1,15}", total) and int(total) != model.nbytes:
        raise UserError(
            f"{url}: offers {int(total):,} bytes, this model has {model.nbytes:,}; {_INSTEAD}"
        )
    return offset


def _open(url: str, offset: int) -> Any:
    headers = {"User-Agent": "netship"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    handlers: list[urllib.request.BaseHandler] = [_Redirects()]
    if _local(url):
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    request = urllib.request.Request(url, headers=headers)
    with _network():
        try:
            return opener.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            meaning = http.client.responses.get(error.code, "")
            raise UserError(
                f"{url}: the server answers {error.code} {meaning}; {_INSTEAD}"
            ) from None


def _read(response: Any) -> bytes:
    with _network():
        return bytes(response.read1(_CHUNK))


@contextmanager
def _network() -> Iterator[None]:
    """Turn errors of the network into _Cut: errors of files are OSErrors too."""
    try:
        yield
    except http.client.IncompleteRead:
        raise _Cut("the connection was cut") from None
    except http.client.HTTPException as error:
        raise _Cut(f"does not speak HTTP ({type(error).__name__})") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _Cut(f"no answer in {TIMEOUT_SECONDS:g} s") from None
        if isinstance(error, urllib.error.URLError):
            raise _Cut(f"cannot be reached ({reason})") from None
        raise _Cut(f"the connection failed ({error.strerror or error})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few redirects, never from https to anything less."""

    max_redirections = _REDIRECTS

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not _allowed(newurl) or (_local(newurl) and not _local(req.full_url)):
            raise UserError(
                f"{req.full_url}: redirects to {newurl[:200]}, which is not https; {_INSTEAD}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
