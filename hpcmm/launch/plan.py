"""One run: overrides -> plan -> run directory -> queued job."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import FUNCTION, SCRIPT, Analyze, Executor, RunConfig
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.launch.prerequisites import job_to_wait_for, note_other_standins, run_to_start_from, still_to_wait_for
from hpcmm.launch.script import Job, python_of, rank_command, render_analysis_script, render_script
from hpcmm.launch.snapshot import CodePlan, plan_code, take_snapshot
from hpcmm.ranges import profiled_ranks
from hpcmm.runs.run_dir import RunDir

if TYPE_CHECKING:
    from hpcmm.launch.submit import Submission

    pass


@dataclass(frozen=True)
class Plan:
    """A run that is checked and named; nothing is on disk yet."""

    config: RunConfig
    run: RunDir
    code: CodePlan
    job: Job
    overrides: tuple[str, ...]


def launch(overrides: Sequence[str]) -> Submission:
    """Compose, validate, write the run directory and submit; returns once the job is accepted.

    Raises HpcmmError when anything is wrong. The run directory of a job that Slurm refused is removed again.
    """
    config = compose_run(overrides)
    validate(config)
    return queue(plan(config, overrides))


def plan(config: RunConfig, overrides: Sequence[str], points: int | None = None) -> Plan:
    """Name the run directory and the code of a validated run, or of a sweep with ``points`` points.

    Nothing is written. Raises HpcmmError for a script, a job to wait for or a run to start from that is not there, or
    that has no checkpoint.
    """
    name = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run = RunDir(Path(config.runs_root).expanduser().absolute() / name)
    working_directory = Path.cwd()
    code = plan_code(config, run, working_directory)
    if any(os.pathsep in folder for folder in code.python_path):
        raise HpcmmError(
            f"{run.root.parent} holds a colon, at which PYTHONPATH is split: set runs_root to another folder."
        )
    if (start := run_to_start_from(config)) is not None:
        note_other_standins(config, RunDir(Path(start)))
    after = None if config.after is None else job_to_wait_for(config.after, run.root.parent)
    job = Job(run, code.python_path, points=points, after=after, working_directory=working_directory)
    return Plan(config, run, code, job, tuple(overrides))


def frozen(config: RunConfig, code: CodePlan) -> RunConfig:
    """The configuration that the ranks read: with the script where its copy lies, and other runs by their folder."""
    train = replace(config.train, init_from=run_to_start_from(config))
    return replace(config, task=replace(config.task, path=code.script), train=train)


def queue(planned: Plan, *, is_latest: bool = True) -> Submission:
    """Write the run directory and submit its script. ``latest`` points to it then, unless ``is_latest`` is false."""
    from hpcmm.launch.submit import submit  # noqa: PLC0415 -- submitit, which a dry run does not need

    planned = with_live_dependency(planned)
    config, run = frozen(planned.config, planned.code), planned.run
    with writing(run):
        run.create()
        config_file.dump(config, run.config)
        write_shared_files(planned)
    with removed_if_refused(run):
        submission = submit(config, run, planned.code.python_path)
    if is_latest:
        point_latest_to(run)
    return submission


def with_live_dependency(planned: Plan) -> Plan:
    """Without the job to wait for where that has completed. Raises HpcmmError where it can complete no more."""
    # For all that asks Slurm from here on.
    os.environ.update(planned.config.cluster.submit_environment)
    if planned.job.after is None or still_to_wait_for(planned.job.after):
        return planned
    print(f"hpcmm: job {planned.job.after} has completed, so there is nothing to wait for.", file=sys.stderr)
    return replace(planned, job=replace(planned.job, after=None))


def write_shared_files(planned: Plan) -> None:
    """The scripts, the code and the provenance: what a run has, and what the points of a sweep share."""
    from hpcmm.launch.provenance import write_provenance  # noqa: PLC0415 -- not needed by a dry run

    config, run = planned.config, planned.run
    _write_script(run.submission_script, render_script(config, planned.job))
    if config.analyze is Analyze.after and config.cluster.executor is Executor.slurm:
        _write_script(run.analysis_script, render_analysis_script(config, planned.job))
    code_sha256 = take_snapshot(config, run, planned.code.project) if config.launch.snapshot else None
    write_provenance(config, run, overrides=planned.overrides, project=planned.code.project, code_sha256=code_sha256)


@contextmanager
def writing(run: RunDir) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HpcmmError(
            f"The run directory {run.root} cannot be written ({reason}): free some space there, or set runs_root."
        ) from error


@contextmanager
def removed_if_refused(run: RunDir) -> Iterator[None]:
    """Remove the run directory, which this launch has made, where Slurm refuses its job for certain.

    Else it would be the newest run of its name, which never ran. ``dry_run=true`` shows the script.
    """
    from hpcmm.slurm.sbatch import RefusedError  # noqa: PLC0415 -- not needed by a dry run

    try:
        yield
    except RefusedError:
        shutil.rmtree(run.root, ignore_errors=True)
        raise


def point_latest_to(run: RunDir) -> None:
    """Point ``latest`` beside the run directory to it; says so where that cannot be, for the job is queued already."""
    if not _link_latest(run):
        print(
            f"hpcmm: {run.root.parent / 'latest'} does not point to this run; it is no link of ours.", file=sys.stderr
        )


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)


def _link_latest(run: RunDir) -> bool:
    """Replace an older link in one step. False, and nothing changed, where ``latest`` is something else."""
    link = run.root.parent / "latest"
    if link.exists() and not link.is_symlink():
        return False
    fresh = run.root.parent / f".latest-{run.root.name}"
    try:
        fresh.symlink_to(run.root.name)
        fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)
        return False
    return True


def rank_comment(planned: Plan) -> str:
    """The command of each rank, what it ends in, and which ranks a profiler wraps."""
    config = planned.config
    lines = [
        f"srun starts {config.world_size} ranks, each as:",
        f"  {shlex.join(rank_command(config, planned.run))}",
        f"which runs, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, {_task(planned)}",
        f"under a profiler: {_profiled(config)}",
    ]
    return "".join(f"# {printable}\n" for line in lines for printable in line.splitlines())


def _task(planned: Plan) -> str:
    task = planned.config.task
    if task.name == SCRIPT:
        return shlex.join([python_of(planned.config), str(planned.code.script), *task.args])
    if task.name == FUNCTION:
        arguments = ", ".join(f"{key}={value!r}" for key, value in task.kwargs.items())
        return f"{task.target} as a function of ({arguments})"
    return f"the task {task.name}"


def _profiled(config: RunConfig) -> str:
    if config.profile.tool is None:
        return "none"
    ranks = profiled_ranks(config.profile.ranks, config.world_size, config.cluster.ranks_per_node)
    listed = ", ".join(map(str, sorted(ranks)[:16])) + (" ..." if len(ranks) > 16 else "")
    return f"{config.profile.tool}, with the flags of profiles/nsys/{config.profile.flags_file}, on ranks {listed}"
