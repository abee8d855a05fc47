"""A sweep on Slurm: one job array for all points, a ledger of them, and the failed ones once more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpcmm.config import config_file
from hpcmm.config.schema import Executor, RunConfig
from hpcmm.config.sweep import Point
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import (
    Plan,
    frozen,
    plan,
    point_latest_to,
    removed_if_refused,
    with_live_dependency,
    write_shared_files,
    writing,
)
from hpcmm.launch.prerequisites import run_to_start_from
from hpcmm.launch.snapshot import CodePlan, plan_code
from hpcmm.launch.submit import note_submission, pickle_task, submit_analysis, uninterrupted
from hpcmm.runs.ledger import Ledger, LedgerPoint, read_ledger
from hpcmm.runs.outcome import COMPLETED, FAILED, IN_QUEUE, states_of_points
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.slurm.jobs import ACTIVE, array_states
from hpcmm.slurm.sbatch import check_array_size, sbatch, warn_where_it_cannot_start


def plan_sweep(points: Sequence[Point], overrides: Sequence[str]) -> Plan:
    """Validate every point, and name the sweep's folder. Raises HpcmmError; nothing is written."""
    first = points[0].config
    for point in points:
        try:
            validate(point.config)
            run_to_start_from(point.config)
        except HpcmmError as error:
            raise HpcmmError(f"At the point {', '.join(point.overrides)}: {error}") from error
    if first.cluster.executor is Executor.local:
        raise HpcmmError("A sweep is a Slurm job array, and cluster=local has no Slurm: choose another cluster.")
    if first.wait:
        raise HpcmmError("A sweep returns at once: leave wait=true out, and see how it goes with squeue.")
    return plan(first, overrides, points=len(points))


def queue_sweep(planned: Plan, points: Sequence[Point]) -> tuple[Ledger, str]:
    """Write the sweep's folder with a run directory for each point, and submit all as one array.

    Returns the ledger and the array's job id. Raises HpcmmError when Slurm refuses it.
    """
    planned = with_live_dependency(planned)
    config, sweep = planned.config, SweepDir(planned.run.root)
    codes = _codes(planned, points)
    check_array_size(len(points))
    with writing(planned.run):
        planned.run.root.mkdir(mode=0o700, parents=True)
        planned.run.logs.mkdir()
        for index, point in enumerate(points):
            _write_point(sweep.point(index), frozen(point.config, codes[point.config.task.path]))
        write_shared_files(planned)
        listed = [
            LedgerPoint(index, list(point.overrides), sweep.point(index).root.name)
            for index, point in enumerate(points)
        ]
        ledger = Ledger(sweep, listed)
        ledger.write()
    with removed_if_refused(planned.run), ledger.locked():
        job_id = _submit_array(config, ledger, ledger.points)
    point_latest_to(planned.run)
    return ledger, job_id


def resubmit(path: Path) -> tuple[Ledger, list[LedgerPoint], str | None]:
    """Submit the failed points of a sweep once more, with the same script, code and configurations.

    Returns the ledger, the points and their job id; no points and None where none has failed. Raises HpcmmError.
    """
    with read_ledger(path).locked():
        ledger = read_ledger(path)  # as it is now that nobody else writes it
        config = config_file.load(ledger.run(ledger.points[0]).config)
        os.environ.update(config.cluster.submit_environment)
        states = point_states(ledger)
        failed = [point for point in ledger.points if states[point.index] == FAILED]
        return ledger, failed, _submit_array(config, ledger, failed) if failed else None


def point_states(ledger: Ledger) -> dict[int, str]:
    """``COMPLETED``, ``FAILED`` or ``ACTIVE`` of each point, by index.

    One question to Slurm for all that it still has in its queue. Raises HpcmmError when Slurm does not answer.
    """
    active = {task for task, state in array_states(ledger.newest_arrays()).items() if state in ACTIVE}
    return states_of_points(ledger, active)


def summary(ledger: Ledger) -> str:
    """How many points are in which state."""
    states = list(point_states(ledger).values())
    counts = {state: states.count(state) for state in (COMPLETED, IN_QUEUE, FAILED)}
    return ", ".join(f"{count} {state.lower()}" for state, count in counts.items())


def _codes(planned: Plan, points: Sequence[Point]) -> dict[str | None, CodePlan]:
    """The code of each script that is swept; all must lie in one project, since one copy is made."""
    codes = {planned.config.task.path: planned.code}
    for point in points:
        path = point.config.task.path
        if path not in codes:
            codes[path] = plan_code(point.config, planned.run, planned.job.working_directory)
            if codes[path].project != planned.code.project:
                raise HpcmmError(
                    f"task.path={path} lies in another project than {planned.config.task.path}: "
                    "a sweep shares one copy of the code, so launch these one by one."
                )
    return codes


def _write_point(run: RunDir, config: RunConfig) -> None:
    run.create()
    config_file.dump(config, run.config)
    pickle_task(run)


def _submit_array(config: RunConfig, ledger: Ledger, points: Sequence[LedgerPoint]) -> str:
    shared = ledger.sweep.shared
    tasks = f"--array={_ranges([point.index for point in points])}"
    if config.launch.parallel_points:
        tasks += f"%{config.launch.parallel_points}"
    with uninterrupted() as submitted:
        job_id = sbatch(config, shared.submission_script, tasks)
        submitted.append(job_id)
        try:
            ledger.note_array(job_id, points)
        except OSError as error:
            raise HpcmmError(
                f"Job {job_id} is submitted, but {ledger.sweep.ledger} cannot be written ({error.strerror}): free some "
                f"space, and take the job back with `python -m hpcmm.jobs cancel {job_id}` before you launch again."
            ) from error
        note_submission(shared, job_id=job_id, analysis_job_id=None)
        # Each point's analysis waits for its own point alone.
        analysis_job_id = submit_analysis(config, shared, job_id, tasks, f"--dependency=aftercorr:{job_id}")
        submitted.extend([analysis_job_id] if analysis_job_id else [])
    warn_where_it_cannot_start(config, job_id)
    return job_id


def _ranges(indices: Sequence[int]) -> str:
    """Sorted indices as sbatch takes them: ``0-3,7,9-10``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
