"""Plan -> the run directory, or a sweep's folder with one for each point: configurations, tasks, scripts, code."""

from __future__ import annotations

from pathlib import Path

from submitit.core.utils import DelayedSubmission

from hpcmm.config import config_file
from hpcmm.config.schema import Analyze, Executor
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import Plan, PlannedPoint
from hpcmm.launch.provenance import write_provenance
from hpcmm.launch.script import render_analysis_script, render_script
from hpcmm.launch.snapshot import take_snapshot
from hpcmm.runs.ledger import Ledger, LedgerPoint
from hpcmm.runs.run_dir import SweepDir
from hpcmm.worker.task import RankTask


def write(planned: Plan) -> None:
    """Write all that the job reads. Raises HpcmmError if the disk refuses it, or the code cannot be copied."""
    try:
        if planned.is_sweep:
            planned.run.root.mkdir(mode=0o700, parents=True)
            planned.run.logs.mkdir()
        for point in planned.points:
            _write_point(point)
        _write_shared_files(planned)
        if planned.is_sweep:
            _write_ledger(planned)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HpcmmError(
            f"The run directory {planned.run.root} cannot be written ({reason}): free some space there, or set "
            "runs_root."
        ) from error


def _write_point(point: PlannedPoint) -> None:
    point.run.create()
    config_file.dump(point.config, point.run.config)
    DelayedSubmission(RankTask(str(point.run.root))).dump(point.run.submitit / "task.pkl")


def _write_shared_files(planned: Plan) -> None:
    """The scripts, the code and the provenance: what a run has, and what the points of a sweep share."""
    config, run = planned.config, planned.run
    _write_script(run.submission_script, render_script(config, planned.job))
    if config.analyze is Analyze.after and config.cluster.executor is Executor.slurm:
        _write_script(run.analysis_script, render_analysis_script(config, planned.job))
    code_sha256 = take_snapshot(config, run, planned.project) if config.launch.snapshot else None
    write_provenance(config, run, overrides=planned.overrides, project=planned.project, code_sha256=code_sha256)


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)


def _write_ledger(planned: Plan) -> None:
    points = [
        LedgerPoint(index, list(point.overrides), point.run.root.name) for index, point in enumerate(planned.points)
    ]
    Ledger(SweepDir(planned.run.root), points).write()
