"""All that tells of a job's end: the ranks' records, logs and metrics, and Slurm's word of job and nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, read_tail, read_text
from hpcmm.jobs.find_run import Target, folder_of_command, settings
from hpcmm.jobs.logs import lines_in
from hpcmm.jobs.state import DEPENDENCY_FAILED, State, environment_of_job, reason_of_end, states_of
from hpcmm.node.classify import LoggedError, last_logged_error
from hpcmm.ranges import ranks_in
from hpcmm.runs import failures
from hpcmm.runs.failures import RankError, RankExit
from hpcmm.runs.metrics import RankProgress, progress_of
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.jobs import Job, account_of, node_states

_TAIL_BYTES = 256 * 1024
_LAST_LINES = 6
_MOST_JOBS_NAMED = 3
_MOST_LOGS = 8
"""Of ranks that srun named, and that left no record, as many logs are read."""
_MOST_HOST_LISTS = 64
"""Of the points of a sweep; Slurm is asked once for each."""
_RANK = re.compile(r"[0-9]{1,6}")
_SRUN_TASKS = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? (?P<ranks>[\d,-]+): (?P<what>.+)")


@dataclass(frozen=True)
class RankDiagnostics:
    """What one rank left."""

    rank: int
    node: str = ""
    error: RankError | None = None
    exit: RankExit | None = None
    logged: LoggedError | None = None
    """The last exception in its log; only read where the rank ended badly and recorded no exception."""
    last_lines: list[str] = field(default_factory=list)
    """The last lines of its log with text, read in the same case, and if srun alone tells of its end."""
    stacks: str = ""
    """Its threads' stacks when it was told to end."""
    progress: RankProgress | None = None

    @property
    def silent(self) -> bool:
        """It began, and nothing tells how it ended."""
        ended_well = self.progress is not None and self.progress.ended
        return self.error is None and self.exit is None and not ended_well


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
    text = _of_job(read_tail(run.batch_log, _TAIL_BYTES, within=run.root), job.raw_id)
    log = _of_attempt(text)
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
        _ranks(run, job.raw_id, attempt, srun_words(srun_lines), since_ns),
        nodes,
        srun_lines,
        last_logged_error(batch_log),
        re.search(r"oom[-_ ]kill", batch_log, re.IGNORECASE) is not None,
        notes,
        batch_lines,
        _gone(run),
        _waited_for(run) if job.reason == DEPENDENCY_FAILED else [],
    )


def _waited_for(run: RunDir) -> list[str]:
    """The numbers in the script, for ``after=`` may be a name that means another run by now."""
    place = SweepDir.of_point(run)
    scripts = place[0].shared if place is not None else run
    named = re.search(r"^#SBATCH --dependency=\w+((?::\d+(?:_\d+)?)+)$", _script_of(scripts), re.MULTILINE)
    return named[1].strip(":").split(":")[:_MOST_JOBS_NAMED] if named else []


def _script_of(run: RunDir) -> str:
    try:
        return read_text(run.submission_script, within=run.root)
    except (OSError, ValueError):  # gone, or damaged
        return ""


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


def srun_words(lines: list[str]) -> dict[int, tuple[str, str]]:
    """Node and srun's word, such as ``Killed``, of each rank that srun named."""
    found: dict[int, tuple[str, str]] = {}
    for line in lines:
        match = _SRUN_TASKS.fullmatch(f"srun: error: {line}")
        for rank in ranks_in(match["ranks"]) if match else []:
            found.setdefault(rank, (match["node"], match["what"]) if match else ("", ""))
    return found


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
    run: RunDir, raw_id: str, attempt: Path | None, named: Mapping[int, tuple[str, str]], since_ns: int
) -> dict[int, RankDiagnostics]:
    progress = {
        rank: each for rank, each in progress_of(run).items() if each.job_id == raw_id and each.last_unix_ns >= since_ns
    }
    numbers = set(progress)
    if attempt is not None:
        numbers |= failures.ranks_with_records(attempt)
        numbers |= set(range(_world_size(run)))
    told = list(named)[:_MOST_LOGS]
    numbers |= set(told)
    profile = settings(run).get("profile")
    is_profiled = isinstance(profile, dict) and profile.get("tool") is not None
    found = {}
    for rank in sorted(numbers):
        error = failures.read(failures.error_file(attempt, rank), RankError) if attempt else None
        ended = failures.read(failures.exit_file(attempt, rank), RankExit) if attempt else None
        if error is not None and error.kind == "SystemExit" and ended is not None:
            error = None  # its status tells as much
        unexplained = error is None and (ended is not None or rank in told)
        lines = lines_in(read_tail(run.rank_log(rank), _TAIL_BYTES, within=run.root)) if unexplained else []
        lines = without_nsys(lines) if is_profiled else lines
        logged = last_logged_error("\n".join(lines)) if ended is not None else None
        last_lines = [line for line in lines if line.strip() and not line.startswith("submitit INFO")][-_LAST_LINES:]
        here = progress.get(rank)
        node = error.node if error else ended.node if ended else here.node if here else named.get(rank, ("", ""))[0]
        stacks = read_tail(failures.stacks_file(attempt, rank), _TAIL_BYTES, within=run.root) if attempt else ""
        found[rank] = RankDiagnostics(rank, node, error, ended, logged, last_lines, stacks, here)
    return found


_SAID_BY_NSYS = re.compile(
    r"(?:Importer error status: |Unable to retrieve the importer version|Generating '|Generated:\s*$|Processing events|"
    r"Saved report file to |Capture range (?:started|ended)|Collecting data|\[\d+/\d+\] \[|"
    r"\s+/\S+\.(?:qdstrm|nsys-rep|sqlite)\s*$).*"
)
_AFTER_A_BAR = re.compile(r"(?:Importer error status: |Generating '/|Processing events\.\.\.|Capture range ended).*")
"""nsys' first line, where the program's last one has no line break, as that of a progress bar."""


def without_nsys(lines: Sequence[str]) -> list[str]:
    """A rank's log without the last lines, which are nsys' own words of its report and not the program's."""
    end = len(lines)
    while end and (not lines[end - 1].strip() or _SAID_BY_NSYS.match(lines[end - 1])):
        end -= 1
    return [*lines[: end - 1], _AFTER_A_BAR.sub("", lines[end - 1])] if end else []


def _world_size(run: RunDir) -> int:
    cluster = settings(run).get("cluster")
    given = [cluster.get(key) for key in ("nodes", "ranks_per_node")] if isinstance(cluster, dict) else []
    sizes = [each for each in given if isinstance(each, int) and 0 < each <= 1_000_000]
    return min(sizes[0] * sizes[1], 1_000_000) if len(sizes) == 2 else 0


_OTHER_JOB = re.compile(r"(?:StepId=|\bJOB )(\d+)\b[^\n]*\n")
_WENT_BACK = re.compile(r"(?:DUE TO (?:JOB REQUEUE|PREEMPTION|NODE FAILURE)|^hpcmm: .*\bqueue\b)[^\n]*\n", re.MULTILINE)
_OF_SLURM = re.compile(r"\s*(?:srun|slurmstepd[\w.-]*): ")


def _of_job(log: str, raw_id: str) -> str:
    """The part of a batch log, to which each job of the run appends, from this job's first mention on."""
    others = [match.end() for match in _OTHER_JOB.finditer(log) if match[1] != raw_id]
    return log[others[-1] :] if others else log


def _of_attempt(log: str) -> str:
    """The part of a job's log that is of its newest attempt: what follows after it went back into the queue."""
    for match in reversed(list(_WENT_BACK.finditer(log))):
        after = log[match.end() :]
        if any(line.strip() and not _OF_SLURM.match(line) for line in after.splitlines()):
            return after
    return log


def _started_ns(job: Job) -> int:
    """When Slurm started the newest attempt, in ns since 1970; 0 if it does not tell."""
    try:
        return int(datetime.fromisoformat(job.started).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError, OSError):
        return 0
