"""All that tells of a job's end: the ranks' records, logs and metrics, and Slurm's word of job and nodes."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import MOST_BYTES, is_regular, read_tail
from hpcmm.jobs.find_run import Target, folder_of_command, settings, world_size_of
from hpcmm.jobs.logs import (
    early_ends,
    lines_in,
    log_ends,
    part_of_attempt,
    part_of_job,
    ranks_with_logs,
    srun_words,
    without_nsys,
)
from hpcmm.jobs.state import DEPENDENCY_FAILED, State, environment_of_job, reason_of_end, states_of
from hpcmm.node.classify import (
    Kind,
    cause_of_exception,
    complaint_in,
    kind_of_exception,
    kind_of_signal,
    kind_of_status,
    signal_name,
)
from hpcmm.runs import failures
from hpcmm.runs.attempts import attempts_of
from hpcmm.runs.failures import (
    LINES_THAT_TELL,
    LoggedError,
    RankError,
    RankExit,
    exception_line,
    last_logged_error,
    says_why,
    thrown_error,
)
from hpcmm.runs.metrics import RankProgress, progress_of
from hpcmm.runs.ownership import is_mine
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.stacks import Answer, HangNote, newest_folder, read_answers, read_hang
from hpcmm.slurm.commands import node_states
from hpcmm.slurm.jobs import Job, account_of

_TAIL_BYTES = 256 * 1024
_MOST_OF_OTHERS = 64 * 1024**2
"""Read of the records of another user's ranks, of their stacks and of their logs; each rank's has its share."""
_LAST_LINES = 6
_MOST_JOBS_NAMED = 3
_MOST_LOGS = 8
"""Of ranks that srun named, and that left no record, as many logs are read."""
_MOST_HOST_LISTS = 64
"""Of the points of a sweep; Slurm is asked once for each."""
TOLD_TO_END = frozenset({signal.SIGTERM, signal.SIGINT})
"""SIGHUP is none of them: neither Slurm nor hpcmm sends it to end a rank."""


@dataclass(frozen=True)
class RankDiagnostics:
    """What one rank left."""

    rank: int
    node: str = ""
    error: RankError | None = None
    exit: RankExit | None = None
    logged: LoggedError | None = None
    """The last exception in its log, only read if the rank ended badly, or without a word, and recorded none."""
    last_lines: list[str] = field(default_factory=list)
    """The last lines of its log that may tell why it ended, read in the same case."""
    stacks: str = ""
    """Its threads' stacks when it was told to end."""
    progress: RankProgress | None = None

    @property
    def silent(self) -> bool:
        """It began, and nothing tells how it ended."""
        ended_well = self.progress is not None and self.progress.ended
        return self.error is None and self.exit is None and not ended_well


@dataclass(frozen=True)
class Event:
    """How one rank ended."""

    rank: int
    node: str
    unix_ns: int
    kind: Kind
    what: str
    traceback: list[str] = field(default_factory=list)
    remedy: str = ""


_LAUNCHER_TOLD_TO_END = "torch.distributed.elastic.multiprocessing.api.SignalException"
"""What torchrun ends with after SIGTERM, when it has ended its workers."""


def event_of(rank: RankDiagnostics) -> Event | None:
    """How a rank ended by its own fault or another's; None if it was told to end, or nothing tells of its end."""
    if rank.error is not None:
        error = rank.error
        kind, remedy = cause_of_exception(error.kind, error.message, error.traceback)
        what = exception_line(error.kind, error.message)
        return Event(rank.rank, error.node, error.unix_ns, kind, what, error.traceback, remedy)
    if rank.exit is None or rank.exit.signal in TOLD_TO_END:
        return None
    if rank.exit.signal is None and rank.logged is not None and rank.logged.kind == _LAUNCHER_TOLD_TO_END:
        return None
    if rank.exit.signal is None:
        return end_by_log(rank, f"exit status {rank.exit.status}", rank.exit.status)
    return _crash(rank, rank.exit, rank.exit.signal)


def _crash(rank: RankDiagnostics, ended: RankExit, number: int) -> Event:
    """A rank that a signal ended: its log may hold what a library said before."""
    place, what, kind = (rank.rank, ended.node, ended.unix_ns), signal_name(number), kind_of_signal(number)
    if rank.logged is None:
        return Event(*place, kind, what, ["its log ends:", *rank.last_lines] if rank.last_lines else [])
    thrown = kind_of_exception(rank.logged.kind, rank.logged.message)
    kind = kind if thrown in {Kind.exception, Kind.data} else thrown
    return Event(*place, kind, f"{what}: {rank.logged.message or rank.logged.kind}", rank.logged.lines)


def end_by_log(rank: RankDiagnostics, ended: str, status: int | None) -> Event:
    """A rank that left no exception, by its last words. ``ended``: what else is known, such as ``exit status 3``.

    What stands further up in a log is no reason: programs go on after warnings and after exceptions that they handle.
    """
    place = (rank.rank, rank.exit.node if rank.exit else rank.node, rank.exit.unix_ns if rank.exit else 0)
    logged, said = rank.logged, rank.exit.said if rank.exit else ""
    if logged is not None and _ended_it(logged, status, said):
        kind, remedy = cause_of_exception(logged.kind, logged.message, logged.lines)
        what = exception_line(logged.kind, logged.message) + (f'; then {ended}: "{said}"' if said else "")
        what = what if logged.worker is None else f"of its workers rank {logged.worker} failed first: {what}"
        return Event(*place, kind, what, logged.lines if len(logged.lines) > 1 else [], remedy)
    last = said.strip() or (rank.last_lines[-1] if rank.last_lines else "")
    complaint = complaint_in(last.splitlines()[-1:])
    kind = kind_of_status(status)
    kind = complaint.kind if complaint is not None and kind is Kind.unknown else kind
    remedy = complaint.remedy if complaint is not None else ""
    if said.strip():
        remedy = remedy or "The program ended itself with these words (sys.exit): its log tells what led to them."
        return Event(*place, kind, f'{ended}; it said: "{said.strip()}"', rank.last_lines, remedy)
    return Event(*place, kind, f"{ended}{log_ends(rank.last_lines)}", rank.last_lines[:-1], remedy)


def _ended_it(logged: LoggedError, status: int | None, said: str) -> bool:
    """Whether what a log tells of is what ended its program: that may have gone on after it, and failed otherwise."""
    if len(logged.lines) == 1:  # a sentence of hpcmm's, which may be a mere note
        return status == 1 and not said and logged.lines_after <= LINES_THAT_TELL
    return logged.lines_after <= (len(said.splitlines()) if said else LINES_THAT_TELL)


@dataclass(frozen=True)
class JobDiagnostics:
    """What there is of one job."""

    job: Job
    run: RunDir | None
    restart: int = 0
    """Which time the job ran, counted from 0; the records are of this one."""
    ranks: dict[int, RankDiagnostics] = field(default_factory=dict)
    node_states: dict[str, str] = field(default_factory=dict)
    """Slurm's state of the job's nodes now, with its reason if there is one: ``down* (Not responding)``."""
    srun_lines: list[str] = field(default_factory=list)
    """srun's words of ranks that ended badly: ``node2: task 1: Killed``."""
    batch_error: LoggedError | None = None
    """The last complaint in the batch script's log."""
    oom_kill: bool = False
    """Slurm noted in the batch script's log that the kernel killed for want of memory."""
    notes: list[str] = field(default_factory=list)
    batch_lines: list[str] = field(default_factory=list)
    """The last lines of the batch script's log that are of this attempt."""
    gone: str = ""
    """The run directory, or its folder of logs, if that is not there (any more)."""
    waited_for: list[str] = field(default_factory=list)
    """The jobs that this one was to run after, as its script names them."""
    moved_from: str = ""
    """The run directory that the job was submitted with, if the run is elsewhere now and nothing is there."""
    prepared: bool = False
    """The job's script came as far as the end of its preparation: cluster.setup, cluster.modules, compiled ops."""
    answers: dict[int, Answer] = field(default_factory=dict)
    """Where each rank stood when that was asked last."""
    hang: HangNote | None = None
    """The watchdog's word, if it ended the job."""

    @property
    def done(self) -> list[int]:
        """Ranks that ended well."""
        return [rank.rank for rank in self.ranks.values() if rank.progress and rank.progress.ended]


def has_begun(rank: RankDiagnostics) -> bool:
    return bool(rank.progress or rank.last_lines or rank.error or rank.exit or rank.stacks)


_NODE_DOWN = ("down", "fail", "drain", "inval", "reboot")


def dead_nodes(evidence: JobDiagnostics) -> list[str]:
    """Nodes that Slurm gave up, while no rank of theirs could tell how it ended."""
    told = {rank.node for rank in evidence.ranks.values() if not rank.silent}
    named = [line.rpartition(" ")[2] for line in evidence.srun_lines if line.startswith("Node failure on ")]
    down = [
        node
        for node, state in evidence.node_states.items()
        if state.startswith(_NODE_DOWN) or state.partition(" ")[0].endswith("*")
    ]
    silent = {rank.node for rank in evidence.ranks.values() if rank.silent and rank.node}
    dead = [node for node in down if node in silent or (node not in told and evidence.job.state == "NODE_FAIL")]
    return sorted({*named, *dead})


def gather(target: Target) -> JobDiagnostics:
    """What there is of the newest job of ``target``. Raises HpcmmError if there is nothing, see :func:`known_state`."""
    return gather_newest(known_state(target))


def gather_newest(state: State) -> JobDiagnostics:
    """What there is of the newest job."""
    run, notes, newest = state.run, list(state.notes), state.newest
    environ = environment_of_job(run, newest)
    (job,), complaint = _accounted([newest], environ)
    notes += [complaint] if complaint and not notes else []
    return _evidence(job, run, _node_states(job.nodes, environ), notes)


def gather_points(state: State, jobs: Sequence[Job]) -> tuple[list[JobDiagnostics], list[str]]:
    """What there is of each of these tasks of a sweep, with one question to each cluster for all, and notes on that."""
    found: list[JobDiagnostics] = []
    complaints: list[str] = []
    for cluster in dict.fromkeys(job.cluster for job in jobs):
        here = [job for job in jobs if job.cluster == cluster]
        environ = environment_of_job(state.run, here[0])
        accounted, complaint = _accounted(here, environ)
        complaints += [complaint] if complaint else []
        host_lists = list(dict.fromkeys(job.nodes for job in accounted))
        nodes = {hosts: _node_states(hosts, environ) for hosts in host_lists[:_MOST_HOST_LISTS]}
        found += [_evidence(job, state.run_of(job), nodes.get(job.nodes, {}), []) for job in accounted]
    return found, complaints if not state.notes else []


def known_state(target: Target) -> State:
    """The state of a target of which some job is known.

    Raises HpcmmError when Slurm does not answer and the run directory does not tell of a job either.
    """
    state = states_of([target], needs_slurm=False)[0]
    if not state.jobs and state.silent:
        reason = state.notes[0].partition(", so this")[0]
        raise HpcmmError(f"{reason}, and no run directory tells of an end of {target.asked}.{target.namesake_hint}")
    if not state.jobs:
        known = f"No job of {target.asked} is known to Slurm or noted in a run directory."
        raise HpcmmError(f"{known}{target.namesake_hint}")
    return state


def _evidence(job: Job, run: RunDir | None, nodes: dict[str, str], notes: list[str]) -> JobDiagnostics:
    job = job if job.active else replace(job, reason=reason_of_end(job))
    if run is None:
        return JobDiagnostics(job, None, node_states=nodes, notes=notes, gone=_gone(folder_of_command(job)))
    attempt, restart = failures.newest_attempt(run, job.raw_id) or (None, 0)
    text = part_of_job(read_tail(run.batch_log, _TAIL_BYTES, within=run.root), job.raw_id)
    log = part_of_attempt(text)
    since_ns = _started_ns(job) if log != text else 0
    if (failures.last_record_ns(run, job.raw_id) or 0) < since_ns:
        attempt = None  # of an earlier attempt
    batch_lines = lines_in(log)
    batch_log = "\n".join(batch_lines)
    srun_lines = [line.removeprefix("srun: error: ") for line in batch_lines if line.startswith("srun: error: ")]
    return JobDiagnostics(
        job,
        run,
        restart,
        _ranks(run, job, attempt, batch_lines, since_ns),
        nodes,
        srun_lines,
        last_logged_error(batch_log),
        re.search(r"oom[-_ ]kill", batch_log, re.IGNORECASE) is not None,
        notes,
        batch_lines,
        _gone(run),
        _waited_for(run) if job.reason == DEPENDENCY_FAILED else [],
        _moved_from(job, run),
        any(each.raw_id == job.raw_id for each in attempts_of(run)),
        *_stands(run, job, attempt),
    )


def _stands(run: RunDir, job: Job, attempt: Path | None) -> tuple[dict[int, Answer], HangNote | None]:
    """What the ranks answered last in the newest start of the job, and the watchdog's word of it."""
    folder = newest_folder(run, job.raw_id)
    if folder is None:
        return {}, None
    hang = read_hang(run, attempt) if attempt is not None and attempt.name == folder.name else None
    return read_answers(run, folder, is_mine=is_mine(run.root)), hang


def _moved_from(job: Job, run: RunDir) -> str:
    before = folder_of_command(job)
    return str(before.root) if before is not None and before.root != run.root and _is_absent(before.root) else ""


def _waited_for(run: RunDir) -> list[str]:
    """The numbers in the script, for ``after=`` may be a name that means another run by now."""
    place = SweepDir.of_point(run)
    scripts = place[0].shared if place is not None else run
    script = read_tail(scripts.submission_script, MOST_BYTES, within=scripts.root)
    named = re.search(r"^#SBATCH --dependency=\w+((?::\d+(?:_\d+)?)+)$", script, re.MULTILINE)
    return named[1].strip(":").split(":")[:_MOST_JOBS_NAMED] if named else []


def _gone(run: RunDir | None) -> str:
    if run is None:
        return ""
    folders = [run.root] if is_regular(SweepDir(run.root).ledger) else [run.root, run.logs]
    return next((str(folder) for folder in folders if _is_absent(folder)), "")


def _is_absent(folder: Path) -> bool:
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # not ours to see
        return False
    return False


def _node_states(nodes: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Empty if Slurm does not answer, which the notes say."""
    try:
        return node_states(nodes, environ)
    except HpcmmError:
        return {}


def _accounted(jobs: Sequence[Job], environ: Mapping[str, str]) -> tuple[list[Job], str | None]:
    """The jobs with what only sacct knows: exit codes, and who cancelled them."""
    try:
        known = account_of([job for job in jobs if job.source == "squeue"], environ)
    except HpcmmError as error:
        return list(jobs), f"sacct gives no answer, so exit codes are missing: {error}"
    return [_with_account(job, known.get(job.job_id)) for job in jobs], None


def _with_account(job: Job, known: Job | None) -> Job:
    if job.source != "squeue" or known is None:
        return job
    by = re.match(r"by \d+", known.reason) if known.state == job.state else None
    return replace(
        job,
        exit_code=known.exit_code,
        derived_exit_code=known.derived_exit_code,
        # Of a job that is over, the rest of sacct's reason is why it waited last.
        reason=by[0] if by else job.reason,
    )


def _ranks(
    run: RunDir, job: Job, attempt: Path | None, batch_lines: Sequence[str], since_ns: int
) -> dict[int, RankDiagnostics]:
    progress = {
        rank: each
        for rank, each in progress_of(run).items()
        if each.job_id == job.raw_id and each.last_unix_ns >= since_ns
    }
    named = srun_words([line.removeprefix("srun: error: ") for line in batch_lines])
    told_by = failures.ranks_with_records(attempt) if attempt is not None else set()
    numbers = {*progress, *told_by, *range(world_size_of(run) if attempt is not None else 0)}
    most_bytes = _TAIL_BYTES if is_mine(run.root) else min(_TAIL_BYTES, _MOST_OF_OTHERS // max(1, len(told_by)))
    there = set(ranks_with_logs(run))
    early = early_ends(batch_lines)[1]
    told = [*named, *early][:_MOST_LOGS]
    numbers |= set(told)
    profile = settings(run).get("profile")
    is_profiled = isinstance(profile, dict) and profile.get("tool") is not None
    found = {}
    for rank in sorted(numbers):
        folder = attempt if rank in told_by else None
        error = failures.read(failures.error_file(folder, rank), RankError, 4 * most_bytes) if folder else None
        ended = failures.read(failures.exit_file(folder, rank), RankExit, 4 * most_bytes) if folder else None
        if error is not None and error.kind in {"SystemExit", failures.WORKER_FAILED} and ended is not None:
            error = None  # its status tells as much, and the log what a worker said
        here = progress.get(rank)
        node = error.node if error else ended.node if ended else here.node if here else named.get(rank, ("", ""))[0]
        stacks = read_tail(failures.stacks_file(folder, rank), most_bytes, within=run.root) if folder else ""
        each = RankDiagnostics(rank, node, error, ended, stacks=stacks, progress=here)
        if len(told) < _MOST_LOGS and each.silent and rank in there and job.state != "COMPLETED" and not job.active:
            told += [rank] if _is_newer(run.rank_log(rank), _started_ns(job)) else []
        if error is None and (ended is not None or rank in told):
            each = _with_log(each, run, most_bytes, is_profiled=is_profiled)
        found[rank] = each
    return found


def _is_newer(log: Path, than_ns: int) -> bool:
    try:
        return log.lstat().st_mtime_ns >= than_ns
    except OSError:
        return False


def _with_log(rank: RankDiagnostics, run: RunDir, most_bytes: int, *, is_profiled: bool) -> RankDiagnostics:
    """With what the end of its log tells."""
    lines = lines_in(read_tail(run.rank_log(rank.rank), most_bytes, within=run.root))
    lines = without_nsys(lines) if is_profiled else lines
    by_signal = rank.exit is not None and rank.exit.signal not in {None, signal.SIGINT}
    logged = thrown_error(lines) if by_signal else last_logged_error("\n".join(lines))
    return replace(rank, logged=logged, last_lines=[line for line in lines if says_why(line)][-_LAST_LINES:])


def _started_ns(job: Job) -> int:
    """When Slurm started the newest attempt, in ns since 1970; 0 if it does not tell."""
    try:
        return int(datetime.fromisoformat(job.started).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError, OSError):
        return 0
