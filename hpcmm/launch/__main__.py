"""``python -m hpcmm.launch``: see ``--help``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.cli import run_command
from hpcmm.config.command import SEPARATOR, split
from hpcmm.errors import HpcmmError
from hpcmm.runs.ownership import other_user
from hpcmm.runs.run_dir import JOB_ID, RUNS, RunDir, SweepDir
from hpcmm.text import printable

if TYPE_CHECKING:
    from hpcmm.jobs.find_run import Target
    from hpcmm.launch.submit import Submission

EPILOG = """\
examples:
  python -m hpcmm.launch experiment=anomaly_demo            the main job, on the local four-node Slurm
  python -m hpcmm.launch experiment=anomaly_demo wait=true  ... and follow it to its end
  python -m hpcmm.launch cluster=local train.steps=20       four ranks on this machine, no Slurm
  python -m hpcmm.launch cluster=a30 profile=nsys analyze=after -- train.py --lr 1e-4    a script; or -m MODULE ...
  python -m hpcmm.launch cluster=a30 cluster.ranks_per_node=1 -- torchrun train.py       it starts a node's workers
  python -m hpcmm.launch cluster=a30 'task.args=[--lr,1e-3],[--lr,1e-4]' -- train.py     two points, one job array
  python -m hpcmm.launch cluster=a30 task=function task.target=my_pkg.train:main task.kwargs.lr=1e-4
  python -m hpcmm.launch cluster=a30 train.learning_rate=1e-3,1e-4 'train.seed=range(0,5)'    ten points, one job array
  python -m hpcmm.launch cluster=a30 stages=decoder_then_words      two runs, the second from the first one's weights
  python -m hpcmm.launch resubmit latest                    the failed points of a sweep once more; latest/0003: one
  python -m hpcmm.launch experiment=anomaly_demo dry_run=true   print the job's script, submit nothing

exit status: 0 the job was accepted (with wait=true: completed), 1 it was not or the configuration is wrong, 130 after
Ctrl-C while following, which leaves the job running.
Every key is documented in hpcmm/config/schema.py; a key that does not exist is refused with the names of those that do.
"""
RESUBMIT = "resubmit"
_ROOT = "runs_root="


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.launch") -> int:
    """The command line; returns the exit status."""
    errors = (HpcmmError, OSError)
    return run_command("hpcmm", lambda given: _command(given, prog), arguments, errors=errors, interrupted="")


def _command(given: list[str], prog: str) -> int:
    overrides, command = split(given)
    if {"-h", "--help"} & set(overrides):
        print(_help(overrides, prog))
        return 0
    if given[:1] == [RESUBMIT]:
        return _resubmit(given[1:])
    return _launch([word for word in overrides if word not in ("-m", "--multirun")], command)


def _launch(overrides: Sequence[str], command: Sequence[str] | None) -> int:
    from hpcmm.config.space import with_config_dirs  # noqa: PLC0415 -- after --help, which needs none of it
    from hpcmm.launch.stages import dry_run_of, launch_stages, plan_stages  # noqa: PLC0415

    overrides = with_config_dirs(overrides)
    options = [word for word in overrides if word.startswith("-")]
    if options:
        raise HpcmmError(
            f"{options[0]} is not an option: everything is given as KEY=VALUE, and the arguments of a script behind "
            "--, see --help."
        )
    words = overrides if command is None else [*overrides, SEPARATOR, *command]
    stages = plan_stages(words)
    if stages[0].planned.config.dry_run:
        print(dry_run_of(stages), end="")
        return 0
    return launch_stages(stages, _show)


def _show(stage: str, submission: Submission) -> int:
    planned = submission.planned
    if JOB_ID.fullmatch(planned.config.name):
        said = f"name={planned.config.name} alone would mean the job of that number"
        print(f"hpcmm: {said}: other commands find this run by {submission.run.root.name}.", file=sys.stderr)
    if stage:
        print(f"stage:          {stage}")
    return _show_sweep(submission) if planned.is_sweep else _show_run(submission)


def _show_run(submission: Submission) -> int:
    config, run = submission.planned.config, submission.run
    print(f"job id:         {submission.job_id}")
    print(f"run directory:  {printable(str(run.root))}")
    if config.wait:
        from hpcmm.jobs.follow import follow  # noqa: PLC0415 -- rich, which a submission alone does not need

        return follow(config, submission)
    print(f"follow rank 0:  tail -F {_word(run.rank_log(0))}")
    if submission.analysis_job_id is None and config.profile.tool is not None:
        print(f"then, analyse:  python -m hpcmm.analyze {_word(run.root)}")
    elif submission.analysis_job_id is not None:
        print(f"analysis:       job {submission.analysis_job_id}, which writes {printable(str(run.analysis_log))}")
    return 0


def _show_sweep(submission: Submission) -> int:
    sweep = SweepDir(submission.run.root)
    print(_arrays(submission.array_ids, len(submission.planned.points)))
    print(f"sweep:          {printable(str(sweep.root))}")
    print(f"ledger:         {printable(str(sweep.ledger))}")
    print(f"failed points:  python -m hpcmm.launch {RESUBMIT} {_word(sweep.root)}")
    print(f"side by side:   python -m hpcmm.jobs table {_word(sweep.root)}", flush=True)
    if submission.planned.config.wait:
        from hpcmm.jobs.follow import follow_sweep  # noqa: PLC0415 -- rich, as above

        return follow_sweep(sweep)
    return 0


def _word(path: Path) -> str:
    """A path as a word for a shell, without what a terminal would obey."""
    return printable(shlex.quote(str(path)))


def _arrays(job_ids: Sequence[str], points: int) -> str:
    if len(job_ids) == 1:
        return f"job id:         {job_ids[0]}, an array of {points} task{'' if points == 1 else 's'}"
    return f"job ids:        {', '.join(job_ids)}, {len(job_ids)} arrays of {points} tasks in all"


def _resubmit(arguments: Sequence[str]) -> int:
    from hpcmm.jobs.find_run import find_targets  # noqa: PLC0415 -- as above
    from hpcmm.launch.submit import resubmit  # noqa: PLC0415

    roots = [word.removeprefix(_ROOT) for word in arguments if word.startswith(_ROOT)]
    named = [word for word in arguments if not word.startswith(_ROOT)]
    if len(named) != 1 or len(roots) > 1:
        raise HpcmmError(
            f"Give one sweep or point: python -m hpcmm.launch {RESUBMIT} SWEEP, its folder or ledger.json, its job's "
            f"number, or SWEEP/0003; {_ROOT}DIR if it does not lie in ./{RUNS}."
        )
    path, indices = Path(named[0]), None
    theirs = not path.is_absolute() and other_user(path) is not None  # one's own run of that name comes first
    if theirs or not path.exists() or SweepDir.of_point(RunDir(path.resolve())) is not None or named[0].isdecimal():
        path, indices = _points_of(find_targets(named[0], Path(roots[0]).expanduser() if roots else RUNS)[0])
    again = resubmit(path, indices)
    if not again.job_ids:
        print(f"No point has failed: {again.summary()}.")
        return 0
    print(_arrays(again.job_ids, len(again.points)))
    for point in again.points:
        print(f"point {point.index:>4}:     {printable(', '.join(point.overrides))}")
    if again.code is not None:
        print(f"code:           {printable(str(again.code))}, as first submitted; changed code needs a new launch")
    return 0


def _points_of(target: Target) -> tuple[Path, set[int] | None]:
    """The sweep's folder and which of its points are meant; None for all."""
    if target.run is None:
        raise HpcmmError(f"Job {target.asked} is of no known sweep: name its folder, or where it lies with {_ROOT}DIR.")
    if (place := SweepDir.of_point(target.run)) is not None:
        return place[0].root, {place[1]}
    if target.array is None:
        return target.run.root, None
    places = [SweepDir.of_point(point.run) for point in target.points if point.run is not None]
    return target.run.root, {place[1] for place in places if place is not None}


def _help(given: Sequence[str], prog: str) -> str:
    from hpcmm.config.keys import keys_help  # noqa: PLC0415
    from hpcmm.config.space import groups_help, space_of, with_config_dirs  # noqa: PLC0415

    space = space_of([word for word in with_config_dirs(given) if "=" in word])
    keys = "\n".join(keys_help(space.schema))

    return argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s [--config-dir DIR] [KEY=VALUE ...] [-- COMMAND ...]\n       %(prog)s {RESUBMIT} SWEEP",
        description="Compose a run from conf/, check it, and submit it. Prints the job id, the run directory and what "
        "to run next, and returns at once. Several values of a key (a,b or range(0,5)) are a sweep: one job array.\n\n"
        f"config groups and their options:\n{groups_help(space)}\n\nkeys, with their defaults:\n{keys}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    ).format_help()


if __name__ == "__main__":
    sys.exit(main())
