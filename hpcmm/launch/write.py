"""Plan -> the run directory, or a sweep's folder with one for each point: all that the job reads."""

from __future__ import annotations

import errno
import getpass
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from hpcmm.config import config_file
from hpcmm.config.schema import Analyze, Executor
from hpcmm.errors import HpcmmError
from hpcmm.files import is_regular
from hpcmm.launch.interpreter import as_recorded
from hpcmm.launch.plan import Plan, PlannedPoint
from hpcmm.launch.project_files import project_root, revision
from hpcmm.launch.script import render_analysis_script, render_script
from hpcmm.launch.snapshot import take_snapshot
from hpcmm.resources import PACKAGE
from hpcmm.runs.ledger import Ledger, LedgerPoint, RefusedEntry
from hpcmm.runs.ownership import check_runs_root
from hpcmm.runs.run_dir import RunDir, SweepDir, make_private
from hpcmm.runs.submission import write_provenance_record
from hpcmm.worker.task import RankSettings, RankTask, nsys_flags_of, write_settings


def write_provenance(planned: Plan, code_sha256: str | None) -> None:
    """Write ``provenance.json``, and beside the code a patch for each project with uncommitted changes."""
    config, run, code = planned.config, planned.run, planned.code
    record: dict[str, Any] = {
        "overrides": list(planned.overrides),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": getpass.getuser(),
        "host": platform.node(),
        "working_directory": str(Path.cwd()),
        "config_sha256": _sha256(run.config) if is_regular(run.config) else None,
        "script_sha256": _sha256(run.submission_script),
        "code_sha256": code_sha256,
        "code": {"hpcmm": _origin(PACKAGE, run, "hpcmm")},
        "python": as_recorded(config, planned.interpreter),
        "packages": planned.interpreter.packages(),
        "modules": [*filter(None, os.environ.get("LOADEDMODULES", "").split(":"))],
    }
    if code.project is not None:
        record["code"]["project"] = _origin(code.project, run, "project", code.scripts)
    write_provenance_record(run, record)


def _origin(folder: Path, run: RunDir, name: str, scripts: Sequence[Path] = ()) -> dict[str, Any]:
    """Where a part of the code comes from."""
    root = project_root(folder)
    origin: dict[str, Any] = {"path": str(folder)}
    if root is None:
        return origin
    try:
        state = revision(root, scripts)
    except HpcmmError as error:
        return origin | {"git": str(error)}
    origin |= {"commit": state.commit, "uncommitted_changes": None}
    if state.changes:
        patch = run.root / f"{name}.patch"
        patch.write_bytes(state.changes)
        origin["uncommitted_changes"] = patch.name
    return origin


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(planned: Plan) -> None:
    """Write all that the job reads, or nothing. Raises HpcmmError if the disk refuses it, or code cannot be copied."""
    try:
        make_private(planned.run.root)
        try:
            _write_all(planned)
        except BaseException:  # Ctrl-C too: else it would be the newest run of its name
            shutil.rmtree(planned.run.root, ignore_errors=True)
            raise
    except (OSError, UnicodeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        is_full = code in {errno.ENOSPC, errno.EDQUOT}
        reason = os.strerror(code) if code and is_full else error  # which names the file
        remedy = "free some space there" if is_full else "put that right"
        raise HpcmmError(
            f"The run directory {planned.run.root} cannot be written ({reason}): {remedy}, or set runs_root."
        ) from error


def _write_all(planned: Plan) -> None:
    # Another user may have made a folder above that was missing when this was planned.
    check_runs_root(planned.run.root, again=True, known=planned.exchangeable)
    if planned.is_sweep:
        planned.run.logs.mkdir()
        for point in planned.points:
            make_private(point.run.root)
    for point in planned.points:
        _write_point(point)
    _write_shared_files(planned)
    uses_deepspeed = planned.packages is None or "deepspeed" in planned.packages
    for point in planned.points:
        write_settings(RankSettings(point.config, nsys_flags_of(point.config.profile), uses_deepspeed), point.run)
    if planned.is_sweep:
        _write_ledger(planned)


def _write_point(point: PlannedPoint) -> None:
    point.run.make_folders()
    config_file.dump(point.config, point.run.config)
    DelayedSubmission(RankTask(str(point.run.root))).dump(point.run.submitit / "task.pkl")


def _write_shared_files(planned: Plan) -> None:
    """The scripts, the code and the provenance: what a run has, and what the points of a sweep share."""
    config, run = planned.config, planned.run
    scripts = SweepDir(run.root)
    for array in planned.arrays:
        _write_script(scripts.submission_script(array.first), render_script(config, array))
        if config.analyze is Analyze.after and config.cluster.executor is Executor.slurm:
            _write_script(scripts.analysis_script(array.first), render_analysis_script(config, array))
    code_sha256 = take_snapshot(config, run, planned.code) if config.launch.snapshot else None
    write_provenance(planned, code_sha256)


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)


def _write_ledger(planned: Plan) -> None:
    points = [
        LedgerPoint(index, list(point.overrides), point.run.root.name) for index, point in enumerate(planned.points)
    ]
    refused = [RefusedEntry(list(each.overrides), each.reason) for each in planned.refused]
    Ledger(SweepDir(planned.run.root), points, refused).write()
