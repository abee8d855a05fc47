"""Follow a submitted job, or a sweep, to its end: its state, rank 0's progress, and at last its accounting record."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hpcmm.config.schema import Analyze, Executor, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import Target, target_of
from hpcmm.jobs.logs import Log
from hpcmm.jobs.state import State, all_over, local_job, poller_of, record_of
from hpcmm.jobs.table import has_completed, jobs_by_state, rows_of
from hpcmm.jobs.table import lines_of as lines_of_table
from hpcmm.jobs.why import explain, lines_of
from hpcmm.resources import environment_of_modules, own_module
from hpcmm.runs.exit_status import outcome_of
from hpcmm.runs.metrics import FinishedStep, finished_step, read_scores, read_settled
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import JobIdentity, identity_of, write_job_record
from hpcmm.slurm.commands import SilentError
from hpcmm.slurm.jobs import ACTIVE, Job, find_job, job_records
from hpcmm.slurm.polling import Poller
from hpcmm.text import printable_lines

_FIRST_S, _LONGEST_S = 1.0, 5.0
"""First and longest pause between two questions to the scheduler."""
_RECORD_WAIT_S = 30
_MOST_LINES = 10_000
"""Of the analysis' output."""


class _PlainConsole(Console):
    """Prints text as it is, but for what a terminal would obey: logs, files and Slurm's answers may hold anything."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable_lines(each) if isinstance(each, str) else each for each in objects), **options)


class Submission(Protocol):
    """A job that the scheduler has accepted, as the launcher hands it over."""

    @property
    def run(self) -> RunDir: ...
    @property
    def job_id(self) -> str: ...
    @property
    def job(self) -> Any:
        """submitit's handle, with the ranks' results."""

    @property
    def analysis_job_id(self) -> str | None: ...


def follow(config: RunConfig, submission: Submission) -> int:
    """Watch until the job is over. Returns the exit status: 0 when it completed, 1 when it failed, 130 on Ctrl-C."""
    console = _PlainConsole(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    try:
        return _follow(config, submission, console)
    except OSError:
        if submission.run.root.is_dir():
            raise
        said = f"hpcmm: {submission.run.root} is gone, so job {submission.job_id} cannot be followed."
        console.print(said, markup=False)
        return 1


def follow_sweep(sweep: SweepDir) -> int:
    """Watch until all points are over, and print their table. Returns 0 if each completed, 1 if not, 130 on Ctrl-C."""
    console = _PlainConsole(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    target, shown = target_of(sweep.shared), ""

    def is_over(states: list[State]) -> bool:
        nonlocal shown
        counts = jobs_by_state(states[0]).most_common()
        if (line := ", ".join(f"{count} {state}" for state, count in counts)) != shown:
            console.print(f"sweep {sweep.root.name}: {line}", markup=False)
            shown = line
        return all_over(states)

    def tell(complaint: str) -> None:
        console.print(f"hpcmm: {complaint} It is asked again.", markup=False)

    try:
        states = poller_of([target], longest_s=_LONGEST_S, tell=tell).wait(is_over)
    except KeyboardInterrupt:
        cancel = f"python -m hpcmm.jobs cancel {shlex.quote(str(sweep.root))}"
        console.print(f"Following stopped; the points go on. To end them: {cancel}", markup=False)
        return 130
    rows = rows_of(states[0])
    print("\n".join(lines_of_table(rows, str(sweep.root))), flush=True)
    return 0 if has_completed(rows) else 1


def _follow(config: RunConfig, submission: Submission, console: Console) -> int:
    try:
        job = _watch(config, submission, console)
        record = _record(config, submission, job, console)
    except KeyboardInterrupt:
        job_id = submission.job_id
        if config.cluster.executor is Executor.local:  # a terminal sends Ctrl-C to all that was started from it
            console.print(f"Following stopped; Ctrl-C reached job {job_id} too, which runs on this machine.")
        else:
            console.print(f"Following stopped; job {job_id} goes on. To end it: python -m hpcmm.jobs cancel {job_id}")
        return 130
    except HpcmmError as error:
        console.print(f"hpcmm: {error}", markup=False)
        return 1
    write_job_record(submission.run, record)
    if config.analyze is Analyze.after:
        _show_analysis(submission, console)
    outcome = outcome_of(submission.run, submission.job_id)
    if outcome is not None and outcome.completed:
        if (settled := read_settled(submission.run)) is not None:
            console.print(str(settled), markup=False)
        if scores := read_scores(submission.run):
            said = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
            console.print(f"on held-out data: {said}")
        return 0
    _show_failure(submission, console)
    return 1


def _watch(config: RunConfig, submission: Submission, console: Console) -> Job:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    shows_a_bar = console.is_terminal and not console.is_dumb_terminal
    hidden = not shows_a_bar or config.task._target_ is None
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden) as bar:
        return _poller(lambda: _job(config, submission), console).wait(_View(config, submission, bar).show)


class _View:
    """What was shown of a followed job, so that only what is new is shown."""

    def __init__(self, config: RunConfig, submission: Submission, bar: Progress) -> None:
        run = submission.run
        self._train = config.train
        self._job_id = submission.job_id
        self._bar = bar
        self._task = bar.add_task("waiting", total=config.train.steps)
        self._metrics = Log("metrics", run.rank_metrics(0))
        self._logs = [Log("batch", run.batch_log)]
        if config.task._target_ is None:  # a workload tells of its steps in its metrics
            self._logs.append(Log("0", run.rank_log(0)))
        self._state = ("", "")

    def show(self, job: Job) -> bool:
        """Show the job's state and what its files gained. Returns whether the job is over."""
        state = (job.state, job.reason if job.active else "")
        if state != self._state:
            self._state = state
            self._say(_state_line(self._job_id, job))
        for log in self._logs:
            for line in _new_lines(log, job):
                self._say(line)
        for step in filter(None, map(finished_step, _new_lines(self._metrics, job))):
            self._show_step(step)
        return not job.active

    def _show_step(self, step: FinishedStep) -> None:
        done, description = step.steps_done, f"loss {step.loss:.4f}, {step.step_s:.3f} s a step"
        self._bar.update(self._task, completed=done, description=description)
        if self._bar.disable and (done % self._train.log_every == 0 or done in (1, self._train.steps)):
            self._say(f"step {done}/{self._train.steps}: {description}")

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False)


def _new_lines(log: Log, job: Job) -> Iterator[str]:
    """With what stands after the last line break if the job is over, and nothing more will come."""
    yield from log.new_lines()
    if not job.active:
        yield from log.rest()


def _poller(ask: Callable[[], Job], console: Console) -> Poller[Job]:
    """Of one job. A question to Slurm that gets no answer is asked again, also the first one."""

    def tell(complaint: str) -> None:
        console.print(f"hpcmm: {complaint} It is asked again.", markup=False)

    return Poller(ask, lambda job: (job.state, job.reason), first_s=_FIRST_S, longest_s=_LONGEST_S, tell=tell)


def _job(config: RunConfig, submission: Submission) -> Job:
    job_id = submission.job_id
    if config.cluster.executor is Executor.slurm:
        try:
            return find_job(identity_of(submission.run, job_id))
        except SilentError:
            raise
        except HpcmmError:  # Slurm knows it no longer, or keeps no accounts
            if (record := record_of(submission.run, job_id)) is not None:
                return record
            raise
    state = "RUNNING"
    if submission.job.done():
        ranks = submission.job._sub_jobs or [submission.job]
        if not any(rank.exception() is not None for rank in ranks):  # but each may still crash as its interpreter ends
            return local_job(submission.run, job_id, config.name, config.cluster.ranks_per_node)
        state = "FAILED"
    return Job(job_id, job_id, state=state, source="run directory")


def _state_line(job_id: str, job: Job) -> str:
    line = f"job {job_id}: {job.state}"
    if job.state == "PENDING":
        line += f" ({job.reason})" if job.reason else ""
        line += f", expected start {job.started}" if job.started else ""
    return line


def _record(config: RunConfig, submission: Submission, job: Job, console: Console) -> dict[str, Any]:
    """The record that ``job.json`` keeps."""
    record = {"job_id": submission.job_id, "executor": str(config.cluster.executor), "state": job.state}
    if config.cluster.executor is Executor.local:
        return record
    # The accounting daemon hears of a job's end a little after the queue.
    known = identity_of(submission.run, submission.job_id)
    poller = Poller(lambda: _records(known), len, first_s=_FIRST_S, longest_s=_LONGEST_S)
    try:
        records = poller.wait(_all_ended, _RECORD_WAIT_S)
    except HpcmmError as error:  # a cluster without accounting
        console.print(f"hpcmm: {error}", markup=False)
        return record
    return record | {"state": _state_of(records[0]), "sacct": records} if _all_ended(records) else record


def _records(known: JobIdentity) -> list[dict[str, str]]:
    try:
        return job_records(known)
    except SilentError:
        return []  # it is asked again


def _all_ended(records: Sequence[dict[str, str]]) -> bool:
    return bool(records) and not any(_state_of(record) in ACTIVE for record in records)


def _state_of(record: dict[str, str]) -> str:
    return record["State"].split()[0]


def _show_analysis(submission: Submission, console: Console) -> None:
    """Show the analysis: of the job that is queued behind the run, or made here if there is no queue."""
    run = submission.run
    if submission.analysis_job_id is None:
        # A process of its own: its memory, of gigabytes for a large run, ends with it.
        command = [*own_module("hpcmm.analyze"), str(run.root)]
        subprocess.run(command, check=False, env=environment_of_modules())
        return
    known = identity_of(run, submission.analysis_job_id)
    job = _poller(lambda: find_job(known), console).wait(lambda job: not job.active)
    for line in Log("analysis", run.analysis_log).tail(_MOST_LINES):
        print(line, flush=True)
    if job.state != "COMPLETED":
        console.print(f"analysis job {job.job_id}: {job.state}", markup=False)


def _show_failure(submission: Submission, console: Console) -> None:
    """Which rank failed first, where, and what to do; the batch script's own log was shown as it came."""
    run = submission.run
    try:
        explanation = explain(Target(str(run.root), (submission.job_id,), run))
        console.print("\n".join(lines_of(explanation)), markup=False)
    except HpcmmError as error:
        console.print(f"hpcmm: {error}", markup=False)
    console.print(f"all logs: {run.logs}", markup=False)
    console.print(f"this again: python -m hpcmm.jobs why {shlex.quote(str(run.root))}", markup=False)
