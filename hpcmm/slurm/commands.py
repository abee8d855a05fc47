"""Ask Slurm through its commands: bounded in time, in a clean environment, with one clear sentence when it fails."""

from __future__ import annotations

import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import MOST_BYTES
from hpcmm.text import visible

_TIMEOUT_S = 30
MOST_COMPLAINT = 10_000
"""Characters of what a command complains of, that are looked at."""
_MOST_OUTPUT_BYTES = 256_000_000
"""Of a command; those of a queue of a million jobs are fewer."""
_READ_BYTES = 1 << 20
_MOST_QUOTED = 100
"""Characters of an answer that is none."""
_DEFAULTS_OF_COMMANDS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_")
_OF_THE_CLUSTER = frozenset({"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"})
"""How Slurm's commands find and enter the cluster."""


_CLUSTERS = "SLURM_CLUSTERS"
_OF_ANY_CLUSTER = frozenset({"squeue", "sacct", "scancel", "scontrol", "sinfo"})
"""Commands that take ``--clusters``; sacct does not heed the variable."""
CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
"""Where Slurm's commands look by themselves."""
_CONFIGURED_NAME = re.compile(r"^\s*ClusterName\s*=\s*([\w.-]+)", re.IGNORECASE | re.MULTILINE)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class SilentError(HpcmmError):
    """Slurm gives no answer: no command, no daemon, none in time, or a failure that is no refusal of the question."""

    def __init__(self, sentence: str, reason: str, *, lasting: bool = False) -> None:
        super().__init__(sentence)
        self.reason = reason
        """A few words, for a sentence of one's own."""
        self.lasting = lasting
        """It does not help to ask again."""


class AbsentError(HpcmmError):
    """Slurm answers that it has nothing of what was asked for."""


_NO_CLUSTER = re.compile(r"no cluster '([^']*)'", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(invalid|unrecogni[sz]ed|ambiguous|denied|disabled|requires an argument|not (permitted|allowed|supported))\b"
    r"|\b(unknown|no such) (option|field|format|job|user|group|account|partition|reservation|qos)\b|\busage:|--help\b",
    re.IGNORECASE,
)
"""Words by which Slurm's commands refuse the question itself. Any other failure means that there was no answer."""
_SILENCE = {
    "munge": "munge does not answer here",
    "unable to contact": "Unable to contact slurm controller",
    "configuration source": "no Slurm configuration is found",
    "configuration file": "no Slurm configuration is found",
    "timed out": "the Slurm controller timed out",
    "connection refused": "the connection was refused",
    "authentication error": "its authentication does not work here",
    "can't be reached": "that cluster cannot be reached",
}
"""Words by which Slurm's commands, on several lines, complain of a cluster that is down, and what they come to."""
_LASTING_SILENCE = "no Slurm configuration is found"


def run_command(
    command: Sequence[str],
    environ: Mapping[str, str],
    timeout_s: float,
    *,
    process_group: int | None = None,
    keep_open: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's to its end, with its words whatever their encoding.

    Raises OSError (ValueError for an environment that no program can be given) if it cannot be started, and
    subprocess.TimeoutExpired, and SilentError if it writes without end. ``process_group=0``: in a process group of its
    own, which Ctrl-C does not reach. ``keep_open``: descriptors that the command inherits.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=process_group,
        pass_fds=keep_open,
        env=dict(environ),
    ) as process:
        try:
            written = _written_by(process, command, timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *written)


@contextmanager
def signals_deferred(told: Callable[[], str]) -> Iterator[None]:
    """Within, signals that end a process wait for the end of the block: Slurm's answer must not be lost.

    Ctrl-C is a KeyboardInterrupt then. For another one, as of a terminal that closes, what ``told`` gives is printed,
    and the process ends by it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []
    before = {each: signal.getsignal(each) for each in _ENDING}
    kept = {each: handler for each, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for each in kept:
            signal.signal(each, lambda signum, _frame: came.append(signum))
        yield
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
    if signal.SIGINT in came:
        raise KeyboardInterrupt(told())
    if came:
        with suppress(OSError, ValueError):  # the terminal may be gone
            print(f"hpcmm: {told() or signal.strsignal(came[0])}.", file=sys.stderr, flush=True)
        signal.raise_signal(came[0])


def _written_by(process: subprocess.Popen[bytes], command: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """What a command writes to its output and to its errors until it ends."""
    until = time.monotonic() + timeout_s
    assert process.stdout is not None
    assert process.stderr is not None
    written: dict[int, list[bytes]] = {process.stdout.fileno(): [], process.stderr.fileno(): []}
    left_bytes = _MOST_OUTPUT_BYTES
    with selectors.DefaultSelector() as selector:
        for descriptor in written:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, until - time.monotonic()))
            if not ready or time.monotonic() > until:
                raise subprocess.TimeoutExpired(command, timeout_s)
            for key, _ in ready:
                chunk = os.read(key.fd, _READ_BYTES)
                written[key.fd].append(chunk)
                left_bytes -= len(chunk)
                if not chunk:
                    selector.unregister(key.fd)
            if left_bytes < 0:
                reason = f"{command[0]} wrote more than {_MOST_OUTPUT_BYTES // 1_000_000} MB"
                # half an answer could be taken for a whole one
                raise SilentError(f"{reason}: see what `{command[0]}` prints here.", reason)
    process.wait(max(0.0, until - time.monotonic()))
    output, errors = (b"".join(chunks).decode(errors="replace") for chunks in written.values())
    return output.replace("\r\n", "\n"), errors.replace("\r\n", "\n")


def ask(
    *command: str, absent: str | None = None, timeout_s: float = _TIMEOUT_S, environ: Mapping[str, str] = os.environ
) -> str:
    """The command's output. Raises AbsentError if it complains of what ``absent`` says.

    SLURM_CLUSTERS in ``environ`` says which clusters are asked. Raises SilentError when Slurm gives no answer, and
    another HpcmmError when it refuses the question.
    """
    # The commands take defaults, such as for their formats, from the user's environment, and these must not apply.
    clean = {name: value for name, value in environ.items() if not name.startswith(_DEFAULTS_OF_COMMANDS)}
    clusters = clean.pop(_CLUSTERS, "") if command[0] in _OF_ANY_CLUSTER else ""
    options = [f"--clusters={clusters}"] if clusters else []
    try:
        done = run_command([command[0], *options, *command[1:]], clean | {"SLURM_TIME_FORMAT": ""}, timeout_s)
    except FileNotFoundError as error:
        sentence = f"{command[0]} not found: run this on a Slurm login node."
        raise SilentError(sentence, f"{command[0]} is not found here", lasting=True) from error
    except (OSError, ValueError) as error:  # no program, or an environment that no program can be given
        reason, lasting = f"{command[0]} cannot be run", not isinstance(error, BlockingIOError)
        raise SilentError(f"{reason} ({error}): see `which {command[0]}`.", reason, lasting=lasting) from error
    except subprocess.TimeoutExpired as error:
        reason = f"{command[0]} gave no answer within {timeout_s:g} s"
        raise SilentError(f"{reason}; the job itself is not affected.", reason) from error
    if done.returncode == 0:
        return done.stdout
    if absent is not None and absent in done.stderr:
        raise AbsentError(f"{command[0]} failed ({absent}).")
    raise _failure(command[0], visible(" ".join(done.stderr[:MOST_COMPLAINT].split()), " "))


CLUSTER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
"""A pattern. Slurm's commands would take a name that begins with a dash for an option."""
CLUSTER_LINE = re.compile(rf"CLUSTER: *({CLUSTER_NAME})\s*")
"""What squeue and sinfo print before the rows of each cluster, also without a header."""


def new_separator() -> str:
    """What stands behind each field of an answer: nobody can know it in advance, and so write it into a job's name."""
    return f"\x1f{secrets.token_hex(8)}\x1f"


def rows_of_answer(
    listed: str, separator: str, width: int, cluster: str, command: str
) -> Iterator[tuple[str, list[str]]]:
    """Each row of ``width`` fields, with the cluster that a line before it names; ``cluster`` before the first.

    ``separator`` stands behind each field, the last one too, so that line breaks within one mean nothing. The header
    must be asked for: raises SilentError for an answer without it, which is none, and for one that ends within a row.
    Lines before the header and after the last row are a site's own.
    """
    fields = listed.split(separator)
    end = fields[-1]
    if "JOBID" not in fields[0].rpartition("\n")[2].upper() or len(fields) % width != 1 or end[:1] + end[-1:] != "\n\n":
        said = visible(" ".join(listed[:_MOST_QUOTED].split()), " ")
        what = "no whole list of jobs" + (f" but {said!r}" if said and len(fields) == 1 else "")
        raise SilentError(f"{command} printed {what}: see what `{command}` prints here.", f"{command} printed {what}")
    for start in range(0, len(fields) - width, width):
        *lines, first = fields[start].split("\n")  # after the end of the row before
        for line in lines:
            if (heading := CLUSTER_LINE.fullmatch(line)) is not None:
                cluster = heading[1]
            elif line.startswith("CLUSTER:"):
                cluster = ""
        yield cluster, [first, *fields[start + 1 : start + width]]


def _failure(command: str, complaint: str) -> HpcmmError:
    """Of which kind a failure is: what Slurm says of itself comes before what it says of the question."""
    if (unknown := _NO_CLUSTER.search(complaint)) is not None:
        reason = f"it knows no cluster {unknown[1]}"
        return SilentError(f"{command} failed ({reason}); the job itself is not affected.", reason, lasting=True)
    silence = next((reason for words, reason in _SILENCE.items() if words in complaint.lower()), None)
    if silence is None and _REFUSAL.search(complaint):
        return HpcmmError(f"{command} failed ({complaint}); the job itself is not affected.")
    reason = silence or complaint or f"{command} said nothing"
    sentence = f"{command} failed ({reason}); the job itself is not affected."
    return SilentError(sentence, reason, lasting=silence == _LASTING_SILENCE)


def cluster_here(environ: Mapping[str, str]) -> str:
    """Slurm's name of the cluster that its commands ask by themselves; empty if no configuration here tells it."""
    for path in map(Path, [environ["SLURM_CONF"]] if environ.get("SLURM_CONF") else CONFIGURATIONS):
        try:
            if path.is_file():  # the site's own, which may be a link and of whatever user: squeue reads it too
                with path.open(encoding="utf-8", errors="replace") as file:
                    found = _CONFIGURED_NAME.search(file.read(MOST_BYTES))
                return found[1].lower() if found else ""
        except (OSError, ValueError):
            continue
    return ""


def on_cluster(cluster: str, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` in which Slurm's commands ask ``cluster``; as it is if that is the one they ask anyway, or empty."""
    if not cluster or (not environ.get(_CLUSTERS) and cluster == cluster_here(environ)):
        return dict(environ)
    return {**environ, _CLUSTERS: cluster}


def clusters_asked(environ: Mapping[str, str]) -> str:
    """The clusters that Slurm's commands ask, with commas; empty if that is not known."""
    return environ.get(_CLUSTERS) or cluster_here(environ)


def job_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables by which the shell would change a new job: options of sbatch and srun, and what an outer job left.

    ``SBATCH_PARTITION`` overrides a script's own ``#SBATCH`` line, and ``SLURM_CPUS_PER_TASK`` of the job that one
    launches from reaches the new job's srun.
    """
    return sorted(name for name in environ if name.startswith(_OF_JOBS) and name not in _OF_THE_CLUSTER)


def outside_of_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as it would be in a plain shell of a login node, without :func:`job_variables`."""
    dropped = set(job_variables(environ))
    return {name: value for name, value in environ.items() if name not in dropped}


def node_states(nodes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Slurm's state of each node of a host list, with its reason if there is one: ``down* (Not responding)``.

    Raises HpcmmError when sinfo does not answer.
    """
    if not nodes:
        return {}
    listed = ask("sinfo", "-hN", f"--nodes={nodes}", "--format=%N\x1f%T\x1f%E", environ=environ)
    states = {}
    for line in listed.splitlines():
        if CLUSTER_LINE.fullmatch(line):
            continue
        name, _, rest = line.partition("\x1f")
        state, _, reason = rest.partition("\x1f")
        states[name.strip()] = state if reason.strip() in {"", "none"} else f"{state} ({reason.strip()})"
    return states
