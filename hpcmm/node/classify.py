"""From an exception's words, a signal or a log's traceback to the kind of failure that it is."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of failure, as they are printed."""

    out_of_memory = "out of memory"
    gpu_error = "GPU error"
    disk_full = "disk full"
    rendezvous = "rendezvous"
    collective_timeout = "collective timeout"
    peer_lost = "peer lost"
    import_failed = "import"
    data = "data"
    exception = "exception"
    killed = "killed"
    crashed = "crashed"
    node_failure = "node failure"
    time_limit = "time limit"
    preempted = "preempted"
    cancelled = "cancelled"
    unknown = "unknown"


CONSEQUENCES = frozenset({Kind.collective_timeout, Kind.peer_lost})
"""What a rank sees when it is another one, or the network, that has failed."""

_BY_WORDS: tuple[tuple[Kind, str], ...] = (
    (
        Kind.out_of_memory,
        r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|cannot allocate memory|std::bad_alloc"
        r"|DefaultCPUAllocator|oom[-_ ]kill|DataLoader worker .* killed by signal: Bus error",
    ),
    (Kind.disk_full, r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]|PytorchStreamWriter failed"),
    (
        Kind.gpu_error,
        r"CUDA (?:driver )?error|CUDA_ERROR_|CUDNN_STATUS|CUBLAS_STATUS|device-side assert|uncorrectable ECC"
        r"|No CUDA GPUs are available|NVIDIA driver|NVML|\bXid\b|ncclUnhandledCudaError|unhandled cuda error",
    ),
    (
        Kind.rendezvous,
        r"did not meet the other ranks|DistStoreError|DistNetworkError|waiting for clients|client socket has"
        r"|Address already in use|EADDRINUSE|Name or service not known|failure in name resolution|RendezvousError",
    ),
    (
        Kind.collective_timeout,
        r"Timed out waiting \d+ ?ms|Watchdog caught collective operation timeout|collective operation timeout"
        r"|(?:Read|Socket) timeout|Wait timeout after|timed out.*(?:all_?reduce|all_?gather|broadcast|barrier|reduce)"
        r"|Connection timed out|No route to host|Network is unreachable|Host is unreachable",
    ),
    (
        Kind.peer_lost,
        r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|ncclRemoteError"
        r"|Socket closed|Connection was likely closed|Connection refused|Application timeout caused pair closure",
    ),
    (Kind.import_failed, r"ModuleNotFoundError|ImportError|error while loading shared libraries|undefined symbol"),
    (Kind.data, r"^hpcmm\.errors\.\w+: Input cannot be used: "),
)
_DATA_KINDS = frozenset(
    {
        "FileNotFoundError",
        "NotADirectoryError",
        "IsADirectoryError",
        "PermissionError",
        "EOFError",
        "PIL.UnidentifiedImageError",
        "UnicodeDecodeError",
        "zipfile.BadZipFile",
    }
)
_HIDDEN_BY_IMPORTS = frozenset({Kind.out_of_memory, Kind.disk_full, Kind.gpu_error})
_DATA_FRAMES = re.compile(r'File "[^"]*/(?:hpcmm/workloads/\w+/data(?:/|_root)|torch/utils/data/)')
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})
_LOG_PREFIX = re.compile(r"^\[rank\d+\]:? ?")
_LAST_LINE = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class LoggedError:
    """An exception as Python printed it. ``kind`` is its class with its module."""

    kind: str
    message: str
    lines: list[str]


def kind_of_exception(kind: str, message: str, traceback: Sequence[str] = ()) -> Kind:
    """The kind of failure behind an exception of class ``kind``. Its own words count before those it was raised from.

    Only exceptions in the chain are looked at, not source lines, since these may well mention a timeout.
    """
    head = f"{kind}: {message}"
    chain = [line for line in traceback if line[:1].strip() and not line.startswith(_TRACEBACK)]
    said = [_by_words(text) for text in (head, *reversed(chain))]
    if said[0] is Kind.import_failed:  # which may hide why it failed
        return next((found for found in said if found in _HIDDEN_BY_IMPORTS), Kind.import_failed)
    if said[0] is None and (kind in _DATA_KINDS or _raised_by_data(traceback)):
        return Kind.data
    return next((found for found in said if found is not None), Kind.exception)


def _by_words(text: str) -> Kind | None:
    for found, pattern in _BY_WORDS:
        if re.search(pattern, text, re.IGNORECASE if found is not Kind.gpu_error else 0):
            return found
    return None


def _raised_by_data(traceback: Sequence[str]) -> bool:
    frames = [line for line in traceback if line.lstrip().startswith("File ")]
    return any(_DATA_FRAMES.search(frame) for frame in frames[-1:])


def kind_of_signal(number: int) -> Kind:
    """The kind of a rank's end by a signal that was not sent because another rank had failed."""
    if number in _CRASHES:
        return Kind.crashed
    return Kind.killed


def last_logged_error(text: str) -> LoggedError | None:
    """The last traceback, or the last sentence of hpcmm's own, in a rank's log."""
    lines = [_LOG_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [index for index, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    for start in reversed(starts):
        for end in range(start + 1, len(lines)):
            if lines[end][:1].strip():  # the first line that is not indented ends the traceback
                match = _LAST_LINE.match(lines[end])
                if match:
                    return LoggedError(match["kind"], match["message"] or "", lines[start : end + 1])
                break
    said = [line for line in lines if line.startswith("hpcmm: ")]
    return LoggedError("hpcmm.errors.HpcmmError", said[-1].removeprefix("hpcmm: "), said[-1:]) if said else None


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
