"""``python -m hpcmm.jobs``: see ``--help``."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hpcmm.cli import run_command
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular
from hpcmm.jobs import logs, table
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import Target, default_environment, find_targets, run_of_command
from hpcmm.jobs.state import State, all_over, poller_of, recorded_jobs, silence, states_of
from hpcmm.ranges import profiled_ranks
from hpcmm.runs.metrics import read_settled
from hpcmm.runs.ownership import other_user
from hpcmm.runs.run_dir import RunDir, SweepDir, runs_in
from hpcmm.runs.submission import job_ids_of
from hpcmm.runs.throughput import in_words, throughput_of
from hpcmm.slurm.commands import SilentError
from hpcmm.slurm.jobs import Answer, Job, own_jobs
from hpcmm.text import printable

_MOST_RANKS = 1_000_000
_MOST_RUNS = 20
_MOST_TASKS_SHOWN = 10
_LINES, _MOST_LINES = 25, 2000
"""Shown of a log, and of all logs of a sweep."""
_COLUMNS = ("job", "name", "state", "where", "since", "why it waits", "run directory")

DESCRIPTION = "What runs, where, since when, what it says, and why it failed."
EPILOG = """\
JOB is a job's number (12, 12_7 for a task of an array, 12+1 for a component of a heterogeneous job), a run directory,
the name of a run in --runs-root, or the start of that name; of several runs the newest is taken. The start holds at
least the whole name that the run was launched with: slow-20260102-030405-1a2b is meant by slow and slow-2026, not by
slo. A number means the job, also if a run has that name. A sweep's name means the newest job of each of its points;
SWEEP/0003 and latest/0003 mean one point.

Slurm is asked through squeue and, for jobs that are over, sacct; where sacct gives no answer, squeue and the run
directory are used, and a line says so. Where squeue gives none either, status, list and why tell of the jobs whose end
a run directory notes. Where SLURM_CONF is not set, that of the run's
configuration is used, of the newest run in --runs-root, or of the local cluster (slurm/local/up).

exit status: 0 done, 1 not (why: no job failed), 130 after Ctrl-C, which stops the following and not the job.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.jobs") -> int:
    """The command line; returns the exit status."""
    return run_command(
        "hpcmm.jobs",
        lambda given: _command(_parser(prog).parse_args(given)),
        arguments,
        errors=(HpcmmError, OSError),  # what another user does to their run meanwhile
    )


def _command(options: argparse.Namespace) -> int:
    os.environ.update(default_environment(options.runs_root))
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], said: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=said, description=said)
        command.set_defaults(command=function)
        command.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
        return command

    listed = add("list", _list, "the jobs that wait or run")
    listed.add_argument("--all-users", action="store_true", help="everybody's, not only yours")
    listed.add_argument("--since", metavar="TIME", help="also those that are over, as sacct reads a time: now-1day")
    status = add("status", _status, "the state of runs, jobs or arrays")
    status.add_argument("jobs", nargs="+", metavar="JOB")
    status.add_argument("-f", "--follow", action="store_true", help="say each change until all are over")
    shown = add("logs", _logs, "the logs of a run's ranks, with the rank in front of each line")
    shown.add_argument("job", metavar="JOB")
    shown.add_argument("-r", "--ranks", metavar="RANKS", help="such as 0,3-5 (default: all, and the batch script)")
    shown.add_argument("-n", "--lines", type=int, metavar="N", help=f"last lines of each (default: {_LINES})")
    shown.add_argument("-f", "--follow", action="store_true", help="go on with what is added, until the job is over")
    cancelled = add("cancel", _cancel, "cancel a run")
    cancelled.add_argument("job", metavar="JOB")
    patience = "seconds that a profiled run may take to save a checkpoint and its reports (default: 60; 0: at once)"
    cancelled.add_argument("--wait", type=float, default=60.0, metavar="S", help=patience)
    compared = add(
        "table", _table, "a sweep's points side by side: time of a step, bytes that ranks exchange, memory, loss"
    )
    compared.add_argument("jobs", nargs="+", metavar="SWEEP", help="a sweep, or runs")
    explained = add("why", _why, "why a job failed: which rank first, where, and what to do")
    explained.add_argument("job", metavar="JOB")
    for command in (listed, status, cancelled, compared, explained):
        command.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _list(options: argparse.Namespace) -> int:
    try:
        answer = own_jobs(None if options.all_users else getpass.getuser(), options.since)
        status = 0
    except SilentError as error:
        answer = Answer(recorded_jobs(runs_in(options.runs_root)[:_MOST_RUNS]), [silence(error, os.environ)])
        status = 1
    _complain(answer.notes)
    if options.json:
        _print_json({"jobs": [_as_values(job, None) for job in answer.jobs], "notes": answer.notes})
    elif answer.jobs:
        print("\n".join(_job_lines(answer.jobs)))
    else:
        print("No jobs.")
    return status


def _status(options: argparse.Namespace) -> int:
    targets, unknown = _known(options.jobs, options.runs_root)
    _complain([*map(_whose, targets), *unknown])
    if options.follow:
        return max(_follow_states(targets), int(bool(unknown)))
    states = states_of(targets, needs_slurm=False)
    notes = list(dict.fromkeys(note for state in states for note in state.notes))
    _complain(notes)
    if options.json:
        targets_json = [
            {"asked": state.target.asked, "jobs": [_as_values(job, state.run_of(job)) for job in state.jobs]}
            | ({"counts": _counts(state)} if state.is_array else {})
            for state in states
        ]
        _print_json({"targets": targets_json, "notes": [*unknown, *notes]})
    else:
        print("\n".join(line for state in states for line in _state_lines(state)))
    return 0 if all(state.jobs for state in states) and not unknown else 1


def _known(asked: Sequence[str], runs_root: Path) -> tuple[list[Target], list[str]]:
    """What is meant, with a sentence for each that is not known. Raises HpcmmError if none is."""
    targets, unknown = list[Target](), list[str]()
    for each in asked:
        try:
            targets.append(find_targets(each, runs_root)[0])
        except HpcmmError as error:
            unknown.append(str(error))
    if not targets:
        raise HpcmmError("\n".join(unknown))
    return targets, unknown


def _follow_states(targets: list[Target]) -> int:
    shown = ""

    def show(states: list[State]) -> bool:
        nonlocal shown
        text = "\n".join(f"{job.job_id}: {job.state}" for state in states for job in state.jobs)
        if text != shown:
            print("\n".join(line for state in states for line in _state_lines(state)), flush=True)
            shown = text
        return all_over(states)

    states = poller_of(targets, tell=_tell_silence).wait(show)
    return 0 if all(state.jobs for state in states) else 1


def _logs(options: argparse.Namespace) -> int:
    target = _with_run(options.job, options.runs_root)
    _complain([_whose(target)])
    run = target.run
    assert run is not None
    ranks = None if options.ranks in {None, "all"} else profiled_ranks(options.ranks, _MOST_RANKS, 1, "--ranks")
    points = [point.run for point in target.points if point.run is not None]

    def find() -> list[logs.Log]:
        return logs.logs_of(run, ranks) if target.sweep is None else logs.logs_of_points(points, ranks)

    found = find()
    if target.sweep is not None:
        _complain(_without_logs(points, found))
    _print_logs(logs.last_lines(found, _lines_of_each(options.lines, found, is_sweep=target.sweep is not None)))
    if options.follow:
        poller = poller_of([target], tell=_tell_silence)
        _print_logs(logs.follow(find, found, lambda: poller.is_done(all_over)))
    if not any(is_regular(log.path) for log in found):
        why = "its job has not started" if target.job_ids else "it was never submitted"
        raise HpcmmError(f"{run.root} holds no logs: {why}.")
    return 0


def _without_logs(points: Sequence[RunDir], found: Sequence[logs.Log]) -> list[str]:
    """A sentence for the points that have no logs, unless none has any."""
    with_logs = {log.label.partition("/")[0] for log in found}
    names = [point.root.name for point in points if point.root.name not in with_logs]
    if not names or not with_logs:
        return []
    named = ", ".join(names[:_MOST_TASKS_SHOWN])
    more = f" and {len(names) - _MOST_TASKS_SHOWN} more" if len(names) > _MOST_TASKS_SHOWN else ""
    return [f"No logs yet of point{'' if len(names) == 1 else 's'} {named}{more}."]


def _lines_of_each(asked: int | None, found: Sequence[logs.Log], *, is_sweep: bool) -> int:
    """How many last lines of each log are shown: of the many of a sweep fewer, unless a number was asked for."""
    if asked is not None:
        return max(0, asked)
    lines = _LINES if not is_sweep else min(_LINES, max(1, _MOST_LINES // max(1, len(found))))
    if lines < _LINES:
        _complain([f"Of {len(found)} logs the last {lines} line{'' if lines == 1 else 's'} each; -n gives more."])
    return lines


def _cancel(options: argparse.Namespace) -> int:
    done = cancel(options.job, find_targets(options.job, options.runs_root), options.wait)
    listed = ", ".join(done.ids)
    if options.json:
        _print_json({"cancelled": done.ids, "in_peace": done.in_peace})
    elif done.in_peace:
        print(f"Job {listed} has stopped, with a checkpoint and its reports.")
    else:
        print(f"Cancelled job {listed}.")
    return 0


def _table(options: argparse.Namespace) -> int:
    targets, unknown = _known(options.jobs, options.runs_root)
    states = states_of(targets, needs_slurm=False)
    _complain([*map(_whose, targets), *unknown, *(note for state in states for note in state.notes)])
    rows = [row for state in states for row in table.rows_of(state)]
    if options.json:
        _print_json({"rows": table.values_of(rows)})
    else:
        print("\n".join(table.lines_of(rows, options.jobs[0])))
    return int(bool(unknown))


def _why(options: argparse.Namespace) -> int:
    from hpcmm.jobs.why import explain, lines_of, values_of  # noqa: PLC0415 -- only here

    target = find_targets(options.job, options.runs_root)[0]
    _complain([_whose(target)])
    explanation = explain(target)
    if options.json:
        _print_json(values_of(explanation))
    else:
        print("\n".join(lines_of(explanation)))
    return 0 if explanation.failed else 1


def _with_run(asked: str, runs_root: Path) -> Target:
    """The target with its run directory, which Slurm is asked for where only a job's number is known."""
    target = find_targets(asked, runs_root)[0]
    if target.run is not None and not target.by_number:
        return target
    run = states_of([target], needs_slurm=False)[0].run
    if run is None and target.run is not None:
        raise HpcmmError(
            f"Slurm's job {asked} is another job now, and its run directory is not known: for the run that had this "
            f"number, name {target.run.root}."
        )
    if run is None:
        raise HpcmmError(
            f"The run directory of job {asked} is not known: name the directory, or give --runs-root."
            f"{target.namesake_hint}"
        )
    if not SweepDir(run.root).is_there():
        return replace(target, run=run)
    array = asked if asked in job_ids_of(run) else None
    return replace(target, run=run, sweep=SweepDir(run.root), array=array)


def _tell_silence(complaint: str) -> None:
    _complain([f"{complaint} It is asked again."])


def _print_logs(lines: Iterable[tuple[str, str]]) -> None:
    for label, line in lines:
        print(f"[{label}] {line}", flush=True)


def _whose(target: Target) -> str:
    """A sentence on what another user's run is worth; empty for one's own."""
    if target.user is None or target.run is None:
        return ""
    return f"{target.run.root} is of user {target.user}, who may have written anything there."


def _complain(notes: Iterable[str]) -> None:
    for note in filter(None, notes):
        lines = [logs.printable(line.encode(errors="replace")) for line in note.splitlines()]
        print("hpcmm.jobs: " + "\n".join(lines), file=sys.stderr)


def _print_json(values: object) -> None:
    print(json.dumps(values, indent=2))


def _job_lines(jobs: Sequence[Job], run_of: Callable[[Job], RunDir | None] = run_of_command) -> list[str]:
    """A header and a line a job; arrays of many tasks as one line a state."""
    rows = [_COLUMNS, *(_row(job, run_of(job)) for job in _gathered(jobs))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _state_lines(state: State) -> list[str]:
    """A target's jobs, with how far its ranks came."""
    asked = printable(state.target.asked)
    if not state.jobs and state.silent:
        said = "no end of it is noted: it waits, runs, or was killed with its script."
        return [f"{asked}: {said}{printable(state.target.namesake_hint)}"]
    if not state.jobs:
        said = "it was never queued, was cancelled before it started, or Slurm has forgotten it."
        return [f"{asked}: no job of it is known here: {said}{printable(state.target.namesake_hint)}"]
    lines = _job_lines(state.jobs, state.run_of)
    if state.run is not None and not state.is_array:
        told = [in_words(pace) if (pace := throughput_of(state.run)) else None, read_settled(state.run)]
        lines += [f"  {printable(str(each))}" for each in told if each is not None]
    counts = _counts(state)
    if sum(counts.values()) > 1:
        settled = _settled_points(state)
        early = f"; {settled} of them settled before the last step" if settled else ""
        lines.append(", ".join(f"{count} {printable(name)}" for name, count in counts.items()) + early)
    return lines


def _settled_points(state: State) -> int:
    runs = {run.root: run for job in state.jobs if (run := state.run_of(job)) is not None} if state.is_array else {}
    return sum(read_settled(run) is not None for run in runs.values())


def _counts(state: State) -> dict[str, int]:
    """How many jobs, or points of a sweep, are in which state, the most first."""
    others = {"without a known end": len(state.unknown), "never submitted": len(state.unsubmitted)}
    return dict(table.jobs_by_state(state).most_common()) | {name: count for name, count in others.items() if count}


def _as_values(job: Job, run: RunDir | None) -> dict[str, Any]:
    """A job for JSON; ``expected_start`` stands apart from ``started``."""
    values = asdict(job)
    del values["command"], values["uid"]
    start = values.pop("started")
    found = run or run_of_command(job)
    pace, settled = (throughput_of(found), read_settled(found)) if found else (None, None)
    return values | {
        "settled": None if settled is None else asdict(settled),
        "throughput": None if pace is None else asdict(pace) | {"mfu": pace.mfu, "hfu": pace.hfu},
        "tasks": job.tasks,
        "active": job.active,
        "started": "" if job.pending else start,
        "expected_start": start if job.pending else "",
        "run_dir": str(found.root) if found else None,
    }


def _gathered(jobs: Sequence[Job]) -> list[Job]:
    """Many tasks of one array in one state become one line, which names the first of them."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        array = job.job_id.split("_")[0] if "_" in job.job_id else job.job_id
        groups.setdefault((array, job.state), []).append(job)
    shown: list[Job] = []
    for (array, _), group in groups.items():
        tasks = sum(job.tasks for job in group)
        if len(group) <= _MOST_TASKS_SHOWN:
            shown += group
        else:
            shown.append(Job(**{**vars(group[0]), "job_id": f"{array} ({tasks} tasks)", "nodes": ""}))
    return shown


def _row(job: Job, run: RunDir | None) -> tuple[str, ...]:
    if job.pending:
        since = f"expected {job.started}" if job.started else f"submitted {job.submitted}" if job.submitted else ""
    elif job.active:
        since = f"{job.started} ({job.elapsed})"
    else:
        since = f"ended {job.ended}" if job.ended else ""
    by = re.match(r"by \d+", job.reason) if job.state == "CANCELLED" else None  # else why it waited last
    reason = job.reason if job.pending else by[0] if by else ""
    where = job.nodes or (f"{job.node_count} nodes" if job.node_count and job.node_count != "1" else "")
    user = other_user(run.root) if run else None
    folder = f"{run.root} (of user {user})" if run and user else str(run.root) if run else ""
    cells = (_short(job.job_id), job.name, job.state, where, since, reason, folder)
    return tuple(logs.printable(cell.encode(errors="backslashreplace")) for cell in cells)


def _short(job_id: str) -> str:
    return job_id if len(job_id) <= 24 else job_id[:20] + "...]"


if __name__ == "__main__":
    sys.exit(main())
