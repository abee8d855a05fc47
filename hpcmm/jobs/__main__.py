"""``python -m hpcmm.jobs``: see ``--help``."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hpcmm.cli import run_command
from hpcmm.errors import HpcmmError
from hpcmm.jobs import logs
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import Target, default_environment, find_targets
from hpcmm.jobs.polling import Poller
from hpcmm.jobs.show import as_values, job_lines, state_lines
from hpcmm.jobs.state import recorded_jobs, silence, states_of
from hpcmm.ranges import profiled_ranks
from hpcmm.runs.run_dir import runs_in
from hpcmm.slurm import queue
from hpcmm.slurm.commands import SilentError

_MOST_RANKS = 1_000_000
_MOST_RUNS = 20

DESCRIPTION = "What runs, where, since when, what it says, and why it failed."
EPILOG = """\
JOB is a job's number (12, or 12_7 for a task of an array), a run directory, the name of a run in --runs-root, or the
start of that name; of several runs the newest is taken.

Slurm is asked through squeue and, for jobs that are over, sacct; where sacct gives no answer, squeue and the run
directory are used, and a line says so. Where squeue gives none either, status, list and why tell of the jobs whose end
a run directory notes. Where SLURM_CONF is not set, that of the run's
configuration is used, of the newest run in --runs-root, or of the local cluster (slurm/local/up).

exit status: 0 done, 1 not (why: no job failed), 130 after Ctrl-C, which stops the following and not the job.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.jobs") -> int:
    """The command line; returns the exit status."""
    return run_command("hpcmm.jobs", lambda given: _command(_parser(prog).parse_args(given)), arguments)


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
    shown.add_argument("-n", "--lines", type=int, default=25, metavar="N", help="last lines of each (default: 25)")
    shown.add_argument("-f", "--follow", action="store_true", help="go on with what is added, until the job is over")
    cancelled = add("cancel", _cancel, "cancel a run")
    cancelled.add_argument("job", metavar="JOB")
    patience = "seconds that a profiled run may take to save a checkpoint and its reports (default: 60; 0: at once)"
    cancelled.add_argument("--wait", type=float, default=60.0, metavar="S", help=patience)
    explained = add("why", _why, "why a job failed: which rank first, where, and what to do")
    explained.add_argument("job", metavar="JOB")
    for command in (listed, status, cancelled, explained):
        command.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _list(options: argparse.Namespace) -> int:
    try:
        answer = queue.own_jobs(None if options.all_users else getpass.getuser(), options.since)
        status = 0
    except SilentError as error:
        answer = queue.Answer(recorded_jobs(runs_in(options.runs_root)[:_MOST_RUNS]), [silence(error, os.environ)])
        status = 1
    _complain(answer.notes)
    if options.json:
        _print_json({"jobs": [as_values(job, None) for job in answer.jobs], "notes": answer.notes})
    elif answer.jobs:
        print("\n".join(job_lines(answer.jobs)))
    else:
        print("No jobs.")
    return status


def _status(options: argparse.Namespace) -> int:
    targets = [find_targets(each, options.runs_root)[0] for each in options.jobs]
    if options.follow:
        return _follow_states(targets)
    states = states_of(targets, needs_slurm=False)
    notes = list(dict.fromkeys(note for state in states for note in state.notes))
    _complain(notes)
    if options.json:
        targets_json = [
            {"asked": state.target.asked, "jobs": [as_values(job, state.run) for job in state.jobs]} for state in states
        ]
        _print_json({"targets": targets_json, "notes": notes})
    else:
        print("\n".join(line for state in states for line in state_lines(state)))
    return 0 if all(state.jobs for state in states) else 1


def _follow_states(targets: list[Target]) -> int:
    poller, shown = Poller(targets), ""
    while True:
        states = poller.poll()
        text = "\n".join(f"{job.job_id}: {job.state}" for state in states for job in state.jobs)
        if text != shown:
            print("\n".join(line for state in states for line in state_lines(state)), flush=True)
            shown = text
        if poller.over:
            return 0 if all(state.jobs for state in states) else 1
        time.sleep(0.5)


def _logs(options: argparse.Namespace) -> int:
    target = _with_run(options.job, options.runs_root)
    run = target.run
    assert run is not None
    ranks = None if options.ranks in {None, "all"} else profiled_ranks(options.ranks, _MOST_RANKS, 1)
    found = logs.logs_of(run, ranks)
    _print_logs(logs.last_lines(found, max(0, options.lines)))
    if options.follow:
        poller = Poller([target])
        _print_logs(logs.follow(run, ranks, found, lambda: poller.over))
    if not any(log.path.is_file() for log in found):
        why = "its job has not started" if target.job_ids else "it was never submitted"
        raise HpcmmError(f"{run.root} holds no logs: {why}.")
    return 0


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


def _why(options: argparse.Namespace) -> int:
    from hpcmm.jobs.why import explain, lines_of, values_of  # noqa: PLC0415 -- only here

    explanation = explain(find_targets(options.job, options.runs_root)[0])
    if options.json:
        _print_json(values_of(explanation))
    else:
        print("\n".join(lines_of(explanation)))
    return 0 if explanation.failed else 1


def _with_run(asked: str, runs_root: Path) -> Target:
    """The target with its run directory, which Slurm is asked for where only a job's number is known."""
    target = find_targets(asked, runs_root)[0]
    if target.run is not None:
        return target
    run = states_of([target], needs_slurm=False)[0].run
    if run is None:
        raise HpcmmError(f"The run directory of job {asked} is not known: name the directory, or give --runs-root.")
    return Target(target.asked, target.job_ids, run)


def _print_logs(lines: Iterable[tuple[str, str]]) -> None:
    for label, line in lines:
        print(f"[{label}] {line}", flush=True)


def _complain(notes: Iterable[str]) -> None:
    for note in notes:
        lines = [logs.printable(line.encode(errors="replace")) for line in note.splitlines()]
        print("hpcmm.jobs: " + "\n".join(lines), file=sys.stderr)


def _print_json(values: object) -> None:
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    sys.exit(main())
