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
from hpcmm.jobs.state import State, environment_of_job, states_of
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


_NEVER = "It never starts as it is: python -m hpcmm.jobs cancel JOB, and launch it again"
_OVER = "Launch it again"
"""In place of it if the job is over: there is nothing to cancel any more."""
DEPENDENCY_FAILED = "DependencyNeverSatisfied"
"""Slurm's reason for a job whose ``after=`` failed."""
_IN_TURN: tuple[tuple[str, str], ...] = (
    ("Resources", "It waits until enough nodes are free."),
    ("Priority", "Jobs with a higher priority are before it in the queue."),
    ("BeginTime", "It is not to begin before a set time, or Slurm lets some time pass before it starts it again."),
    ("Dependency", "It waits for the end of the job that it is to run after."),
    ("Cleaning|Prolog|Configuring", "Slurm cleans or prepares its nodes."),
    ("JobArrayTaskLimit", "As many points of the sweep run as may at once; the others follow."),
    ("Licenses", "All licences that it asks for are in use."),
    ("Reservation", "It waits for its reservation to begin."),
    ("SchedDefer|None", "Slurm has not looked at it yet."),
)
"""Slurm's reasons to wait for one's turn, as patterns, and what they mean. They tell nothing of a job that is over."""
_WAITS = (
    *_IN_TURN,
    (
        DEPENDENCY_FAILED,
        f"The job that it is to run after did not end as it should. {_NEVER} without after=, or after another job.",
    ),
    ("JobHeldUser", "Its user holds it: `scontrol release JOB` lets it go."),
    ("JobHeldAdmin", "An administrator holds it: ask the site, or `scontrol release JOB` if that is you."),
    (
        "JobHoldMaxRequeue|MaxRequeue",
        "It went back into the queue as often as Slurm allows, and is held: find out what ended it, then "
        "`scontrol release JOB`.",
    ),
    (
        "launch[ _]failed[ _]requeued[ _]held",
        "Slurm could not start it, put it back and holds it: a node could not run its prolog or its script. Tell the "
        "site, then `scontrol release JOB`.",
    ),
    ("(?:job[ _])?requeued[ _]in[ _]held[ _]state", "It was put back and is held: `scontrol release JOB` lets it go."),
    (
        "ReqNodeNotAvail.*|NodeDown|FrontEndDown",
        "Nodes that it needs are down, or reserved for others, as for maintenance: see `sinfo -R` and `scontrol show "
        "reservation`. A shorter cluster.time_limit_min may fit before a maintenance.",
    ),
    (
        "BadConstraints",
        f"No nodes fit what it asks for (nodes, CPUs, memory, GPUs, cluster.constraint). {_NEVER} for what `sinfo -o "
        "'%P %D %c %m %G %f'` shows.",
    ),
    ("PartitionDown|PartitionInactive", "Its partition is closed at present: see `sinfo -s`, or choose another one."),
    ("PartitionNodeLimit|PartitionConfig", f"It breaks a limit of its partition. {_NEVER} smaller, or in another one."),
    (
        "PartitionTimeLimit",
        f"Its time limit is above that of its partition. {_NEVER} with less time (`sinfo -o '%P %l'`).",
    ),
    ("AccountNotAllowed|InvalidAccount", f"Its account may not be used there. {_NEVER} with another cluster.account."),
    ("QOSNotAllowed|InvalidQOS", f"Its QOS may not be used there. {_NEVER} with another cluster.qos."),
    ("ReservationDeleted", f"Its reservation was deleted. {_NEVER} without it."),
    ("DeadLine", f"It cannot end before its deadline. {_NEVER} with a later one."),
    (
        "(?:QOS|Assoc).*(?:PerJob|PerNode|MaxWall|Min).*",
        f"It asks for more, or less, than its account or QOS allows for one job (`sacctmgr show qos`). {_NEVER} with "
        "less.",
    ),
    (
        "(?:QOS|Assoc).*",
        "A limit of its account or QOS is reached: it starts when other jobs of that account or user have ended "
        "(`sacctmgr show qos`, `squeue --me`).",
    ),
)
"""All reasons to wait."""


def why_it_waits(job: Job) -> str:
    """What Slurm's reason means for a job that waits, or was over before it started; empty if that is not known."""
    found = next((said for reason, said in _WAITS if re.fullmatch(reason, job.reason)), "")
    return (found if job.active else found.replace(_NEVER, _OVER)).replace("JOB", job.job_id)


def reason_of_end(job: Job) -> str:
    """Slurm's reason for the end of a job that is over. sacct gives in its place why the job waited last."""
    waited = any(re.fullmatch(reason, job.reason) for reason, _ in (_WAITS if job.nodes else _IN_TURN))
    by = re.match(r"by \d+", job.reason)
    return by[0] if by else "" if waited else job.reason


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
