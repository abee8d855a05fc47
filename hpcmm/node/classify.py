"""From an exception's words, a signal, a log's last lines or threads' stacks to the kind and place of a failure."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of failure, as they are printed."""

    out_of_memory = "out of memory"
    gpu_error = "GPU error"
    disk_full = "disk full"
    setup = "setup"
    rendezvous = "rendezvous"
    collective_timeout = "collective timeout"
    peer_lost = "peer lost"
    import_failed = "import"
    data = "data"
    exception = "exception"
    killed = "killed"
    signalled = "signal"
    crashed = "crashed"
    node_failure = "node failure"
    not_started = "not started"
    time_limit = "time limit"
    preempted = "preempted"
    cancelled = "cancelled"
    unknown = "unknown"


CONSEQUENCES = frozenset({Kind.collective_timeout, Kind.peer_lost})
"""What a rank sees when it is another one, or the network, that has failed."""

_BY_WORDS: tuple[tuple[Kind, str], ...] = (
    (
        Kind.setup,
        r"^hpcmm\.errors\.HpcmmError: cluster\.(?:setup|modules)\b.* (?:failed with|ended the job with) status",
    ),
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
        r"MASTER_ADDR \S+ (?:does not resolve|resolves to|cannot be reached)"
        r"|did not meet the other ranks|DistStoreError|DistNetworkError|waiting for clients|client socket has"
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
    lines_after: int = 0
    """Lines with text that stand behind it in the log."""


@dataclass(frozen=True)
class Complaint:
    """What a shell, Slurm or a program said when something failed, as it stands in a log."""

    kind: Kind
    line: str
    """The one that tells most."""
    lines: list[str]
    """The last ones that complain, this one among them."""
    remedy: str = ""
    """What to do about just this; empty if nothing is known beyond what helps against its kind."""


_NO_PROGRAM = (
    "The program is not on the node's PATH: load its module with cluster.modules, or set PATH in cluster.setup."
)
_NOT_SHARED = "It is not there on the node: use a file system that all nodes share."
_CONSOLE: tuple[tuple[Kind, str, str], ...] = (
    (
        Kind.out_of_memory,
        r"oom[-_ ]kill|out of memory|exceeded .{0,20}memory limit|cannot allocate memory|can't allocate memory"
        r"|std::bad_alloc|MemoryError",
        "",
    ),
    (Kind.disk_full, r"No space left on device|quota exceeded|PytorchStreamWriter failed", ""),
    (Kind.time_limit, r"DUE TO TIME LIMIT", ""),
    (Kind.node_failure, r"DUE TO NODE FAILURE|Node failure on ", ""),
    (
        Kind.not_started,
        r"Unable to (?:create step|allocate resources|confirm allocation)|Job credential|launch failed|Task launch for"
        r"|Memory required by task is not available|Requested node configuration is not available"
        r"|More processors requested than permitted",
        "",
    ),
    (
        Kind.data,
        r"\^M\b|\^M:|\$'[^']*\\r'|DOS line breaks",
        "The file has the line ends of Windows: convert it with dos2unix, or with sed -i 's/\\r$//'.",
    ),
    (
        Kind.import_failed,
        r"\bmodule: (?:command )?not found",
        "The node's shell has no module command: source the site's own script for it in cluster.setup, or leave "
        "cluster.modules empty.",
    ),
    (
        Kind.import_failed,
        r"Lmod has detected the following error|Unable to locate a modulefile|\bmodule\(s\) .*(?:unknown|cannot)",
        "See the names with `module avail` on a node of the job, and set cluster.modules.",
    ),
    (Kind.import_failed, r"command not found|: not found$", _NO_PROGRAM),
    (Kind.import_failed, r"execve\(\): .*No such file or directory|bad interpreter: No such file", _NOT_SHARED),
    (
        Kind.import_failed,
        r"ModuleNotFoundError|ImportError|No module named|error while loading shared libraries|undefined symbol"
        r"|cannot open shared object|version .(?:GLIBC|GLIBCXX|CXXABI)_",
        "",
    ),
    (
        Kind.crashed,
        r"Illegal instruction",
        "A program or library is built for another kind of CPU than the node has: build it on such a node, or choose "
        "nodes with cluster.constraint.",
    ),
    (Kind.crashed, r"Segmentation fault|Bus error|Floating point exception|core dumped", ""),
    (Kind.killed, r"(?:^|\d )Killed\b", ""),
    (Kind.rendezvous, r"Address already in use|Name or service not known|failure in name resolution", ""),
    (
        Kind.data,
        r"couldn't chdir to",
        "The folder that the job was launched in is not there on the node: launch in one that all nodes share.",
    ),
    (
        Kind.data,
        r"No such file or directory|Permission denied|Is a directory|Not a directory|Read-only file system"
        r"|Stale file handle|Input/output error",
        "",
    ),
)
"""Kinds by what consoles say, with what to do if that is known; of several that fit a line, the first counts."""

_COMPLAINS = re.compile(
    r"\berror\b|\bfatal\b|: line \d+: |cannot |can't |couldn't |unable to |failed|not found|denied|No such file"
    r"|No module named|unrecognized|invalid |[a-z]Error\b|Exception\b|quota|Killed\b|core dumped"
    r"|Illegal instruction|unbound variable",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(
    r"srun: (?:launch/slurm: |Job step aborted|forcing job termination|got SIG|interrupt)"
    r"|srun: error: [\w.-]+: tasks? [\d,-]+: "
    r"|(?:slurmstepd|srun)[\w.-]*: (?:error: )?\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT \S+ \*\*\*"
)
"""Slurm's words of what follows from another failure."""
_COPY_OF_SCRIPT = re.compile(r"^\S*/slurm_script: ")
_MOST_COMPLAINTS = 5
_LAST_LINES = 3


def complaint_in(lines: Sequence[str]) -> Complaint | None:
    """What the end of a log complains of; None if it says nothing. ``lines`` as :func:`hpcmm.jobs.logs.lines_in`."""
    said = [
        _COPY_OF_SCRIPT.sub("submission.sh: ", line).strip()
        for line in lines
        if line.strip() and not _SAYS_NOTHING.match(line)
    ]
    if not said:
        return None
    complaints = [line for line in said if _COMPLAINS.search(line)][-_MOST_COMPLAINTS:] or said[-_LAST_LINES:]
    known = [(line, kind, remedy) for line in reversed(complaints) for kind, remedy in _by_console(line)]
    memory = [found for found in known if found[1] is Kind.out_of_memory]  # whatever came of it
    line, kind, remedy = (memory or known or [(complaints[-1], Kind.unknown, "")])[0]
    return Complaint(kind, line, complaints, remedy)


def _by_console(line: str) -> Iterator[tuple[Kind, str]]:
    for kind, pattern, remedy in _CONSOLE:
        if re.search(pattern, line, re.IGNORECASE):
            yield kind, remedy
            return


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
    return Kind.killed if number == signal.SIGKILL else Kind.signalled


def kind_of_status(status: int | None) -> Kind:
    """The kind of an exit status: above 128, a shell says so of a program that a signal ended."""
    number = (status or 0) - 128
    return kind_of_signal(number) if number in _CRASHES or number == signal.SIGKILL else Kind.unknown


def last_logged_error(text: str) -> LoggedError | None:
    """The last traceback, or the last sentence of hpcmm's own, in a rank's log."""
    lines = [_LOG_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [index for index, line in enumerate(lines) if _TRACEBACK in line]
    for start in reversed(starts):
        for end in range(start + 1, len(lines)):
            if lines[end][:1].strip():  # the first line that is not indented ends the traceback
                match = _LAST_LINE.match(lines[end])
                if match:
                    shown = [_TRACEBACK, *lines[start + 1 : end + 1]]  # a progress bar may stand before the first
                    return LoggedError(match["kind"], match["message"] or "", shown, _with_text(lines[end + 1 :]))
                break
    said = [index for index, line in enumerate(lines) if line.startswith("hpcmm: ")]
    if not said:
        return None
    sentence = lines[said[-1]]
    after = _with_text(lines[said[-1] + 1 :])
    return LoggedError("hpcmm.errors.HpcmmError", sentence.removeprefix("hpcmm: "), [sentence], after)


def _with_text(lines: Sequence[str]) -> int:
    return sum(1 for line in lines if line.strip())


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
