"""Whose fault an error is: the machine's, and then it says nothing about a method, or the method's own."""

from __future__ import annotations

import errno
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from slimbench.harness.schema.identity import Reason
from slimbench.util import files
from slimbench.util.files import cache_dir
from slimbench.util.writing.teaching import TeacherError

_BY_ERRNO = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO),
        Reason.DISK,
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.EAGAIN), Reason.MACHINE),
    **dict.fromkeys(
        (
            errno.ETIMEDOUT,
            errno.ECONNRESET,
            errno.ECONNREFUSED,
            errno.ECONNABORTED,
            errno.EHOSTUNREACH,
            errno.EHOSTDOWN,
            errno.ENETUNREACH,
            errno.ENETDOWN,
            errno.ENETRESET,
        ),
        Reason.NETWORK,
    ),
}
_BY_WORDS = {
    Reason.DISK: (
        "no space left on device",
        "disk quota exceeded",
        "input/output error",
        "stale file handle",
        "read-only file system",
        "transport endpoint is not connected",
        "database or disk is full",
        "disk i/o error",
        "pytorchstreamwriter failed writing",
    ),
    Reason.CARD: (
        "uncorrectable",
        "unspecified launch failure",
        "device lost",
        "gpu is lost",
        "fallen off the bus",
        "hardware stack error",
        "devices are busy or unavailable",
        "cuda unknown error",
        "no cuda-capable device is detected",
        "system not yet initialized",
        "mapping of buffer object failed",
        "nvml: driver/library version mismatch",
    ),
    Reason.MACHINE: ("too many open files",),
    Reason.NETWORK: (
        "temporary failure in name resolution",
        "name or service not known",
        "connection reset by peer",
        "connection timed out",
        "network is unreachable",
    ),
}
"""What libraries write into errors of their own that have no number: sqlite, pyarrow, safetensors, torch, CUDA."""
_OF_NETWORK = {
    "httpx": ("TransportError",),
    "httpcore": ("NetworkError", "TimeoutException", "ProtocolError", "ProxyError"),
    "requests": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3": ("TimeoutError", "ConnectTimeoutError", "NewConnectionError", "ProtocolError", "MaxRetryError", "SSLError"),
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "http": ("IncompleteRead", "RemoteDisconnected"),
    "urllib": ("URLError",),
    "socket": ("gaierror", "herror"),
    "ssl": ("SSLError",),
}
_OF_HUB = {"huggingface_hub": ("LocalEntryNotFoundError", "OfflineModeIsEnabled"), "datasets": ("OfflineModeIsEnabled",)}
_AGAIN = (408, 425, 429)  # answers of a host that asks to come back; from 500 on it has failed itself
_TIMED_OUT = "timed out"  # the errors of sockets have no number


def reason(error: BaseException) -> Reason | None:
    """Whose fault an error is, or what it came of; None where it is not known to be the machine's."""
    return next((found for part in _chain(error) if (found := _of_one(part)) is not None), None)


def reason_of_text(text: str) -> Reason | None:
    """The fault that a library tells in words alone."""
    text = text.lower()
    return next((reason for reason, words in _BY_WORDS.items() if any(word in text for word in words)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on, as a traceback shows them."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)


def _of_one(error: BaseException) -> Reason | None:
    if (answer := _answer(error)) is not None:
        return Reason.HUB if answer in _AGAIN or answer >= 500 else None
    if _is_one_of(error, _OF_HUB):
        return Reason.HUB
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    if isinstance(error, PermissionError) and _is_in_own_folders(error):
        return Reason.DISK
    if isinstance(error, TeacherError):
        return Reason.NETWORK
    if _is_one_of(error, _OF_NETWORK) or (isinstance(error, TimeoutError) and _TIMED_OUT in str(error)):
        return Reason.NETWORK
    return reason_of_text(str(error))


def _is_in_own_folders(error: PermissionError) -> bool:
    """Whether the cache or the temporary folder refused, as on a shared disk whose ticket ran out; elsewhere a method has no business."""
    named = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    if named:
        return any(path.is_relative_to(folder) for path in named for folder in (cache_dir(), tempfile.gettempdir()))
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename == files.__file__


def _answer(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and type(error).__module__.startswith("urllib"):
        status = getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _is_one_of(error: BaseException, names: dict[str, tuple[str, ...]]) -> bool:
    """Whether an error is of a class of some library, which need not be imported for it."""
    return any(kind.__name__ in names.get(kind.__module__.partition(".")[0], ()) for kind in type(error).__mro__)
