"""Follow a submitted job to its end: its state, rank 0's progress, and at last its accounting record."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hpcmm.config.schema import Analyze, Executor, RunConfig, TaskName
from hpcmm.errors import HpcmmError
from hpcmm.launch.submit import Submission
from hpcmm.runs.metrics import finished_step, read_scores
from hpcmm.runs.outcome import outcome_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import write_job_record
from hpcmm.slurm.accounting import QueueState, job_records, queue_state

_POLL_S = (1.0, 5.0)
"""First and longest pause between two questions to the scheduler; each pause is a fifth longer than the one before."""
_READ_S = 0.5
_RECORD_WAIT_S = 30


def follow(config: RunConfig, submission: Submission) -> int:
    """Watch until the job is over. Returns the exit status: 0 when it completed, 1 when it failed, 130 on Ctrl-C."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return _follow(config, submission, console)
    except OSError:
        if submission.run.root.is_dir():
            raise
        said = f"hpcmm: {submission.run.root} is gone, so job {submission.job_id} cannot be followed."
        console.print(said, markup=False)
        return 1


def _follow(config: RunConfig, submission: Submission, console: Console) -> int:
    try:
        state = _watch(config, submission, console)
        record = _record(config, submission, state)
    except KeyboardInterrupt:
        job_id = submission.job_id
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
        if scores := read_scores(submission.run):
            said = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
            console.print(f"on held-out images: {said}")
        return 0
    _show_failure(submission.run, console)
    return 1


def _watch(config: RunConfig, submission: Submission, console: Console) -> QueueState:
    metrics = _Tail(submission.run.rank_metrics(0))
    shown_logs = [_Tail(submission.run.batch_log)]
    if config.task.name is not TaskName.anomaly:  # which tells of its steps in its metrics
        shown_logs.append(_Tail(submission.run.rank_log(0)))
    states = _states(config, submission)
    shown = QueueState("")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    shows_a_bar = console.is_terminal and not console.is_dumb_terminal
    hidden = not shows_a_bar or config.task.name is not TaskName.anomaly
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task("waiting", total=config.train.steps)
        for state in states:
            if state.state != shown.state or (state.active and state.reason != shown.reason):
                shown = state
                console.print(_state_line(submission.job_id, state), markup=False)
            for line in (line for log in shown_logs for line in log.lines()):
                console.print(line, markup=False)
            for step in filter(None, map(finished_step, metrics.lines())):
                done, description = step.steps_done, f"loss {step.loss:.4f}, {step.step_s:.3f} s a step"
                bar.update(task, completed=done, description=description)
                if bar.disable and (done % config.train.log_every == 0 or done in (1, config.train.steps)):
                    console.print(f"step {done}/{config.train.steps}: {description}")
            if not state.active:
                return state
    raise AssertionError("the states end with one that is not active")


def _states(config: RunConfig, submission: Submission) -> Iterator[QueueState]:
    """The job's state, asked for gently and given often, so that the reader of the files can go on between."""
    pause_s, longest_s = _POLL_S
    while True:
        state = _state(config, submission)
        yield state
        until = time.monotonic() + pause_s
        while state.active and time.monotonic() < until:
            time.sleep(_READ_S)
            yield state
        pause_s = min(longest_s, pause_s * 1.2)


def _state(config: RunConfig, submission: Submission) -> QueueState:
    if config.cluster.executor is Executor.slurm:
        return queue_state(submission.job_id)
    if not submission.job.done():
        return QueueState("RUNNING")
    failed = any(rank_job.exception() is not None for rank_job in submission.job._sub_jobs or [submission.job])
    return QueueState("FAILED" if failed else "COMPLETED")


def _state_line(job_id: str, state: QueueState) -> str:
    line = f"job {job_id}: {state.state}"
    if state.state == "PENDING":
        line += f" ({state.reason})" if state.reason != "None" else ""
        line += f", expected start {state.start}" if state.start != "N/A" else ""
    return line


def _record(config: RunConfig, submission: Submission, state: QueueState) -> dict[str, Any]:
    """The record that ``job.json`` keeps."""
    record = {"job_id": submission.job_id, "executor": str(config.cluster.executor), "state": state.state}
    if config.cluster.executor is Executor.local:
        return record
    # The accounting daemon hears of a job's end a little after the queue.
    until = time.monotonic() + _RECORD_WAIT_S
    while time.monotonic() < until:
        records = job_records(submission.job_id)
        if records and all(QueueState(each["State"].split()[0]).active is False for each in records):
            return record | {"state": records[0]["State"].split()[0], "sacct": records}
        time.sleep(1)
    return record


def _show_analysis(submission: Submission, console: Console) -> None:
    """Show the analysis: of the job that is queued behind the run, or made here where there is no queue."""
    run = submission.run
    if submission.analysis_job_id is None:
        command = [sys.executable, "-m", "hpcmm.analyze", str(run.root)]
        subprocess.run(command, check=False)
        return
    pause_s, longest_s = _POLL_S
    while (state := queue_state(submission.analysis_job_id)).active:
        time.sleep(pause_s)
        pause_s = min(longest_s, pause_s * 1.2)
    if run.analysis_log.is_file():
        print(run.analysis_log.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
    if state.state != "COMPLETED":
        console.print(f"analysis job {submission.analysis_job_id}: {state.state}", markup=False)


def _show_failure(run: RunDir, console: Console) -> None:
    """Which rank failed first, where, and what to do; the batch script's own log was shown as it came."""
    command = ["-m", "hpcmm.jobs", "why", str(run.root)]
    explained = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)
    console.print(explained.stdout.rstrip("\n"), markup=False)
    console.print(f"all logs: {run.logs}", markup=False)
    console.print(f"this again: python {shlex.join(command)}", markup=False)


@dataclass
class _Tail:
    """The lines that were added to a file since the last look; a line counts once it is whole."""

    path: Path
    _offset: int = 0

    def lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()
