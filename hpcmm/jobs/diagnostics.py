"""All that tells of a job's end: the ranks' records, logs and metrics, and Slurm's word of job and nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular, read_tail
from hpcmm.jobs.find_run import Target, run_of_command, settings, slurm_environment
from hpcmm.jobs.state import states_of
from hpcmm.node.classify import LoggedError, last_logged_error
from hpcmm.ranges import ranks_in
from hpcmm.runs import failures
from hpcmm.runs.failures import RankError, RankExit
from hpcmm.runs.metrics import RankProgress, progress_of
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.jobs import Job, account_of, node_states

_TAIL_BYTES = 256 * 1024
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


def gather(target: Target) -> JobDiagnostics:
    """Raises HpcmmError when Slurm does not answer and the run directory does not tell of the job either."""
    state = states_of([target], needs_slurm=False)[0]
    if not state.jobs and state.silent:
        reason = state.notes[0].partition(", so this")[0]
        raise HpcmmError(f"{reason}, and no run directory tells of an end of {target.asked}.")
    if not state.jobs:
        raise HpcmmError(f"No job of {target.asked} is known to Slurm or noted in a run directory.")
    run, notes, newest = state.run, list(state.notes), state.jobs[-1]
    if state.silent and run is not None and is_regular(SweepDir(run.root).ledger):
        newest = next((job for job in reversed(state.jobs) if job.state != "COMPLETED"), newest)
        run = run_of_command(newest)  # of the point, whose records tell more than the sweep's folder
    environ = slurm_environment(run)
    job, complaint = _accounted(newest, environ)
    notes += [complaint] if complaint and not notes else []
    if run is None:
        return JobDiagnostics(job, None, node_states=node_states(job.nodes, environ), notes=notes)
    attempt, restart = failures.newest_attempt(run, job.raw_id) or (None, 0)
    batch_log = _of_job(read_tail(run.batch_log, _TAIL_BYTES, within=run.root), job.raw_id)
    return JobDiagnostics(
        job,
        run,
        restart,
        _ranks(run, job.raw_id, attempt),
        _node_states(job.nodes, environ),
        [line.removeprefix("srun: error: ") for line in batch_log.splitlines() if line.startswith("srun: error: ")],
        last_logged_error(batch_log),
        re.search(r"oom[-_ ]kill", batch_log, re.IGNORECASE) is not None,
        notes,
    )


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


def _accounted(job: Job, environ: Mapping[str, str]) -> tuple[Job, str | None]:
    """The job with what only sacct knows: exit codes, and who cancelled it."""
    if job.source != "squeue":
        return job, None
    try:
        rows = [row for row in account_of([job.raw_id], environ) if row.raw_id == job.raw_id]
    except HpcmmError as error:
        return job, f"sacct gives no answer, so exit codes are missing: {error}"
    if not rows:
        return job, None
    known = rows[-1]
    same = known.state == job.state
    return replace(
        job,
        exit_code=known.exit_code,
        derived_exit_code=known.derived_exit_code,
        reason=known.reason if same and known.reason else job.reason,
    ), None


def _ranks(run: RunDir, raw_id: str, attempt: Path | None) -> dict[int, RankDiagnostics]:
    progress = {rank: each for rank, each in progress_of(run).items() if each.job_id == raw_id}
    numbers = set(progress)
    if attempt is not None:
        numbers |= failures.ranks_with_records(attempt)
        numbers |= set(range(_world_size(run)))
    found = {}
    for rank in sorted(numbers):
        error = failures.read(failures.error_file(attempt, rank), RankError) if attempt else None
        ended = failures.read(failures.exit_file(attempt, rank), RankExit) if attempt else None
        unexplained = error is None and ended is not None
        log = read_tail(run.rank_log(rank), _TAIL_BYTES, within=run.root) if unexplained else ""
        logged = last_logged_error(log) if unexplained else None
        here = progress.get(rank)
        node = error.node if error else ended.node if ended else here.node if here else ""
        stacks = read_tail(failures.stacks_file(attempt, rank), _TAIL_BYTES, within=run.root) if attempt else ""
        found[rank] = RankDiagnostics(rank, node, error, ended, logged, stacks, here)
    return found


def _world_size(run: RunDir) -> int:
    cluster = settings(run).get("cluster")
    given = [cluster.get(key) for key in ("nodes", "ranks_per_node")] if isinstance(cluster, dict) else []
    sizes = [each for each in given if isinstance(each, int) and 0 < each <= 1_000_000]
    return min(sizes[0] * sizes[1], 1_000_000) if len(sizes) == 2 else 0


def _of_job(log: str, raw_id: str) -> str:
    """The part of a batch log, to which each job of the run appends, from this job's first mention on."""
    others = [match.end() for match in re.finditer(r"StepId=(\d+)\.\S*\n", log) if match[1] != raw_id]
    return log[others[-1] :] if others else log
