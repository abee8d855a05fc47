"""From an exception's words, a signal, a log's last lines or threads' stacks to the kind and place of a failure."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcmm.text import StrEnum


class Kind(StrEnum):
    """Kinds of failure, as they are printed."""

    out_of_memory = "out of memory"
    gpu_error = "GPU error"
    disk_full = "disk full"
    setup = "setup"
    rendezvous = "rendezvous"
    collective_timeout = "collective timeout"
    hang = "hang"
    peer_lost = "peer lost"
    import_failed = "import"
    data = "data"
    exception = "exception"
    ended_early = "ended early"
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

ADVICE = {
    Kind.out_of_memory: "Use less: a smaller train.micro_batch_size with more train.gradient_accumulation_steps, a "
    "higher parallel.zero_stage, fewer loader processes; or ask for more with cluster.memory_gb.",
    Kind.gpu_error: "Run `nvidia-smi -q` on the node, or `python -m hpcmm.doctor`; tell the site if errors are counted "
    "there.",
    Kind.disk_full: "Free space where the message says, or set runs_root and cluster.cache_dir to another file system; "
    "`python -m hpcmm.doctor` shows what is free.",
    Kind.setup: "Run the named line on a node of the same partition (`srun --pty bash`), and mend it or what it calls.",
    Kind.rendezvous: "See whether all ranks started (their logs), whether the first node's name resolves on the others "
    "and its ports are open: `python -m hpcmm.doctor` checks both.",
    Kind.collective_timeout: "See what the named rank did at the place shown. If all ranks only needed longer, raise "
    "parallel.collective_timeout_s.",
    Kind.hang: "See what the missing ranks do at the place shown, or why the ranks call different collectives.",
    Kind.peer_lost: "The lost rank left no record: see its log's end and Slurm's word of its node.",
    Kind.import_failed: "Install what is missing into the Python that the job uses, or load its module with "
    "cluster.modules; `python -m hpcmm.doctor` compares the nodes' packages.",
    Kind.data: "See that the file or folder in the message exists and can be read on the named node, and "
    "that the key which names it is right.",
    Kind.exception: "The program itself raised this: its last lines are shown, the rest is in the rank's log.",
    Kind.ended_early: "See why the rank was done before the others: a way out that only some ranks take (an if on the "
    "rank, sys.exit(0), less data), or a call of all ranks that it does not make.",
    Kind.killed: "Something outside of the job sent SIGKILL: most often the kernel, when a node's memory is full (its "
    "administrator sees it in dmesg), else a person. Ask for memory with cluster.memory_gb.",
    Kind.signalled: "The program has no handler for this signal, which Slurm's warning (cluster.stop_warning_s with "
    "requeue=slurm), `scancel --signal` or a person sent. Handle it in the program, or leave requeue=slurm out and ask "
    "hpcmm.annotate.should_stop() after each step.",
    Kind.crashed: "Native code crashed: the stacks file in the failures folder shows where; compare package versions "
    "with `python -m hpcmm.doctor`.",
    Kind.not_started: "See what Slurm says of the node with `scontrol show node`; if it says nothing, ask the site: "
    "the log of the node's slurmd tells more.",
    Kind.node_failure: "Run again without the node, and tell the site.",
    Kind.time_limit: "Raise cluster.time_limit_min, or go on from the last checkpoint.",
    Kind.preempted: "Submit again: it goes on from the last checkpoint where one was saved.",
    Kind.cancelled: "Somebody cancelled it; submit it again if that was a mistake.",
    Kind.unknown: "Read the logs' last lines: python -m hpcmm.jobs logs JOB",
}
"""What helps against each kind."""
ADVICE_FOR_SCRIPTS = ADVICE | {
    Kind.out_of_memory: "Use less: a smaller batch, fewer loader processes; or ask for more of the node's memory with "
    "cluster.memory_gb. `ulimit -v` in cluster.setup shows whether the shell sets a limit of its own.",
    Kind.collective_timeout: "See what the named rank did at the place shown. If all ranks only needed longer, give "
    "the program's init_process_group a longer timeout.",
}
"""The same for programs that have none of the keys of hpcmm's own training."""

_MEMORY = (
    r"\bout of memory\b(?! (?!(?:allocat\w*|while|when|trying|on|in|at|during|error)\b)\w)|oom[-_ ]kill|std::bad_alloc"
    r"|can't allocate memory|cannot allocate memory|unable to allocate .{0,300} array"
)
"""Not that somebody "ran out of memory bank entries"."""
_CUDA = r"CUDA (?:driver |runtime )?error(?:$|[^\w ]| (?:\d|\(|at\b|in\b))"
_NO_NAME = r"Name or service not known|failure in name resolution|No address associated with hostname"
_BY_WORDS: tuple[tuple[Kind, str, str], ...] = (
    (
        Kind.setup,
        r"^hpcmm\.errors\.HpcmmError: cluster\.(?:setup|modules)\b.* (?:failed with|ended the job with) status"
        r"|^hpcmm\.errors\.HpcmmError: .*launch\.stage has no folder to copy to|takes no folder with a lock",
        "",
    ),
    (
        Kind.out_of_memory,
        rf"{_MEMORY}|^[\w.]*(?:OutOfMemoryError|MemoryError)\b|DefaultCPUAllocator"
        r"|DataLoader worker .{0,300} killed by signal: Bus error.{0,300}shared memory",
        "",
    ),
    (
        Kind.disk_full,
        r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]|PytorchStreamWriter failed"
        r"|^hpcmm\.errors\.HpcmmError: .* has (?:.{0,300} free|room for .{0,300} files), but launch\.stage copies",
        "",
    ),
    (
        Kind.gpu_error,
        rf"{_CUDA}|CUDA_ERROR_|CUDNN_STATUS|CUBLAS_STATUS|device-side assert|uncorrectable ECC"
        r"|No CUDA GPUs are available|NVIDIA driver|NVMLError|NVML_|initialize NVML|\bXid \(|ncclUnhandledCudaError"
        r"|unhandled cuda error",
        "",
    ),
    (
        Kind.rendezvous,
        r"MASTER_ADDR \S+ (?:does not resolve|resolves to|cannot be reached)|did not meet the other ranks"
        r"|DistStoreError|DistNetworkError|RendezvousError|\d clients joined|client socket has (?:timed out|failed)",
        rf"waiting for clients|Address already in use|EADDRINUSE|{_NO_NAME}",
    ),
    (
        Kind.collective_timeout,
        r"Timed out waiting \d+ ?ms for|collective operation timeout|Wait timeout after \d+ ?ms",
        r"(?:Read|Socket) timeout|Connection timed out|No route to host|Network is unreachable|Host is unreachable"
        r"|timed out.{0,300}(?:all_?reduce|all_?gather|broadcast|barrier|reduce)",
    ),
    (
        Kind.peer_lost,
        r"Connection closed by peer \[|remote process exited|ncclRemoteError|Application timeout caused pair closure",
        r"Connection (?:closed|reset) by peer|Broken pipe|Socket closed|Connection was likely closed"
        r"|Connection refused",
    ),
    (
        Kind.import_failed,
        r"^[\w.]*(?:ModuleNotFoundError|ImportError)\b|error while loading shared libraries|undefined symbol"
        r"|cannot open shared object",
        "",
    ),
    (
        Kind.data,
        r"^hpcmm\.errors\.\w+: (?:Input cannot be used: |(?:[\w.-]+: )?launch\.stage |.* stage data that)",
        "",
    ),
    (Kind.killed, r"DataLoader worker .{0,300} killed by signal: Killed", ""),
    (
        Kind.crashed,
        r"DataLoader worker .{0,300} by signal: (?:Segmentation fault|Bus error|Aborted|Illegal|Floating point)",
        "",
    ),
    (Kind.signalled, r"DataLoader worker .{0,300} killed by signal: ", ""),
)
"""Kinds by an exception's words. The second ones count only of communication between ranks: any connection may fail."""
_BETWEEN_RANKS = re.compile(
    r"torch\.distributed|\bc10d\b|\bDist(?:Network|Store|Backend)Error|\bgloo\b|nccl|TCPStore|ProcessGroup",
    re.IGNORECASE,
)
_BETWEEN_RANKS_FRAME = re.compile(
    r'File "[^"]*/(?:torch/distributed/(?!checkpoint/)|deepspeed/comm/|hpcmm/annotate/collectives|'
    r"hpcmm/worker/distributed\.py)"
)
_OF_LOGIC = frozenset(
    {"AssertionError", "AttributeError", "IndexError", "KeyError", "NameError", "TypeError", "ValueError"}
)
"""A program's own complaints of its values, whatever system's words these hold."""
_OWN_ERRORS = "hpcmm.errors."
_QUOTED = re.compile(r"""(?<!failure )(?<!failure \d )(?<!\w)(?:'[^'\n]*'|"[^"\n]*")(?!\w)""")
"""Values, but for what NCCL quotes of CUDA: Cuda failure 2 'out of memory'."""
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
_OWN_CONNECTION = (
    "The program's own connection failed: see whether the node reaches what it connects to (many sites' nodes have no "
    "internet), and whether that runs."
)
_CONNECTS = (
    rf"{_NO_NAME}|Connection (?:refused|reset|timed out|aborted)|Network is unreachable|No route to host"
    r"|Max retries exceeded|could(?:n't| not) (?:connect|resolve)|cannot connect|failed to connect|Failed to establish"
    r"|^[\w.]{0,300}(?:gaierror|Connection\w{0,100}Error|Connect(?:Timeout|Error)|ReadTimeout(?:Error)?)\b"
)
_REMEDIES: tuple[tuple[Kind, str, str], ...] = (
    (Kind.exception, r"^hpcmm\.errors\.HpcmmError: ", "Do what the sentence says, then launch again."),
    (
        Kind.exception,
        r"^subprocess\.CalledProcessError",
        "A command that the program ran failed. The command's own words stand in the rank's log, above the traceback.",
    ),
    (
        Kind.exception,
        r"DataLoader worker .{0,300} exited unexpectedly",
        "A loader's worker ended without a word: its own words may stand in the rank's log; if not, memory may have "
        "run out (fewer workers, or more with cluster.memory_gb).",
    ),
    (
        Kind.exception,
        r"Address already in use|EADDRINUSE",
        "A port that the program itself wants is in use on the node: let the program choose a free one.",
    ),
    (Kind.exception, _CONNECTS, _OWN_CONNECTION),
    (
        Kind.setup,
        r"no folder to copy to|takes no folder with a lock",
        "Set cluster.scratch_dir to a folder that every node has, and that you can write to.",
    ),
    (
        Kind.data,
        r"^UnicodeDecodeError",
        "The file that was read there is not text in the encoding that the message names: open it with its own "
        "encoding, or see that it is the right file.",
    ),
    (
        Kind.out_of_memory,
        r"DataLoader worker .{0,300} out of shared memory",
        "The node's /dev/shm is too small for the loader's workers: use fewer of them, or smaller batches.",
    ),
)
"""What to do about exceptions of a kind that have these words."""
_LOCAL_FRAME = re.compile(r'File "[^"]*/(?:multiprocessing|concurrent)/')
"""Connections between processes of one node."""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})
_TRACEBACK = "Traceback (most recent call last):"


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
        rf"{_MEMORY}|exceeded .{{0,20}}memory limit|MemoryError",
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
        r"Lmod has detected the following error|Unable to locate a modulefile|\bmodule\(s\) .{0,300}(?:unknown|cannot)",
        "See the names with `module avail` on a node of the job, and set cluster.modules.",
    ),
    (Kind.import_failed, r"command not found|: not found$", _NO_PROGRAM),
    (Kind.import_failed, r"execve\(\): .{0,300}No such file or directory|bad interpreter: No such file", _NOT_SHARED),
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
_NO_FAILURE = re.compile(r"\b\w*warning\b|\bignor|\bretry|\bskipp|\bhandled\b|\bfall(?:ing)? ?back\b", re.IGNORECASE)
"""What says of itself that the program went on."""
_SAYS_NOTHING = re.compile(
    r"srun: (?:launch/slurm: |Job step aborted|forcing job termination|got SIG|interrupt)"
    r"|srun: error: [\w.-]+: tasks? [\d,-]+: "
    r"|(?:slurmstepd|srun)[\w.-]*: (?:error: )?\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT \S+ \*\*\*"
)
"""Slurm's words of what follows from another failure."""
_COPY_OF_SCRIPT = re.compile(r"^\S*/slurm_script: ")
_MOST_COMPLAINTS = 5
_MOST_CHARACTERS, _MOST_LINES = 4000, 200
"""Of a line that is looked at, and of a traceback: what is beyond is no sentence any more."""
_LAST_LINES = 3


def complaint_in(lines: Sequence[str]) -> Complaint | None:
    """What the end of a log complains of; None if it says nothing. ``lines`` as :func:`hpcmm.jobs.logs.lines_in`."""
    said = [
        _COPY_OF_SCRIPT.sub("submission.sh: ", line).strip()
        for line in (line[:_MOST_CHARACTERS] for line in lines)
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
    if _NO_FAILURE.search(line):
        return
    if _BETWEEN_RANKS.search(line) and re.search(_NO_NAME + "|Address already in use", line, re.IGNORECASE):
        yield Kind.rendezvous, ""
        return
    for kind, pattern, remedy in _CONSOLE:
        if re.search(pattern, line, re.IGNORECASE):
            yield kind, remedy
            return
    if re.search(_CONNECTS, line, re.IGNORECASE):
        yield Kind.unknown, _OWN_CONNECTION


def kind_of_exception(kind: str, message: str, traceback: Sequence[str] = ()) -> Kind:
    """The kind of failure behind an exception of class ``kind``, see :func:`cause_of_exception`."""
    return cause_of_exception(kind, message, traceback)[0]


def cause_of_exception(kind: str, message: str, traceback: Sequence[str] = ()) -> tuple[Kind, str]:
    """The kind of failure behind an exception of class ``kind``, and what to do about just this; empty if not known.

    Its own words count before those it was raised from. Only exceptions in the chain are looked at, not source lines,
    since these may well mention a timeout.
    """
    kept = [line[:_MOST_CHARACTERS] for line in traceback[-_MOST_LINES:]]
    chain = _chain(f"{kind}: {message}"[:_MOST_CHARACTERS], kept)
    said = [_by_words(text, frame) for text, frame in chain]
    found = next((each for each in said if each is not None), Kind.exception)
    if said[0] is Kind.import_failed:  # which may hide why it failed
        found = next((each for each in said if each in _HIDDEN_BY_IMPORTS), Kind.import_failed)
    elif (said[0] is None and kind in _DATA_KINDS) or (found is Kind.exception and _raised_by_data(*chain[0])):
        found = Kind.data
    return found, next((remedy for text, frame in chain if (remedy := _remedy(found, text, frame))), "")


def _chain(head: str, traceback: Sequence[str]) -> list[tuple[str, str]]:
    """The exception and those it was raised from, the newest first, each with its innermost frame."""
    found, frame = [], ""
    for line in traceback:
        if line.lstrip().startswith("File "):
            frame = line
        elif line[:1].strip() and not line.startswith(_TRACEBACK):
            found.append((line, frame))
        elif line.startswith(_TRACEBACK):
            frame = ""
    return [(head, frame), *reversed(found)]


def _raised_by_data(text: str, frame: str) -> bool:
    return _DATA_FRAMES.search(frame) is not None and "exited unexpectedly" not in text  # that tells of no data


def _by_words(text: str, frame: str) -> Kind | None:
    if text.partition(":")[0] in _OF_LOGIC:
        return None
    text = text if text.startswith(_OWN_ERRORS) else _QUOTED.sub("''", text)
    is_between_ranks = _BETWEEN_RANKS.search(text) or _BETWEEN_RANKS_FRAME.search(frame)
    for found, pattern, between_ranks in _BY_WORDS:
        flags = re.IGNORECASE if found is not Kind.gpu_error else 0
        if re.search(pattern, text, flags):
            return found
        if between_ranks and is_between_ranks and re.search(between_ranks, text, flags):
            return found
    return None


def _remedy(found: Kind, text: str, frame: str) -> str:
    if text.partition(":")[0] in _OF_LOGIC:
        return ""
    for kind, pattern, remedy in _REMEDIES:
        if kind is found and re.search(pattern, text, re.IGNORECASE):
            return "" if remedy is _OWN_CONNECTION and _LOCAL_FRAME.search(frame) else remedy
    return ""


def kind_of_signal(number: int) -> Kind:
    """The kind of a rank's end by a signal that was not sent because another rank had failed."""
    if number in _CRASHES:
        return Kind.crashed
    return Kind.killed if number == signal.SIGKILL else Kind.signalled


def kind_of_status(status: int | None) -> Kind:
    """The kind of an exit status: above 128, a shell says so of a program that a signal ended."""
    number = (status or 0) - 128
    return kind_of_signal(number) if number in _CRASHES or number == signal.SIGKILL else Kind.unknown


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
