"""A plan resolves what a launch needs once, before anything is written; a single run is a sweep of one point."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.launch import plan as plan_module
from hpcmm.launch.plan import Plan, launch, plan
from hpcmm.runs.ledger import read_ledger

ACCEPTING_SBATCH = "#!/bin/sh\necho Submitted batch job 7\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a script and a trained run, and Slurm's commands on the PATH, all of which accept."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct", "scontrol"):
        (tmp_path / "bin" / name).write_text(ACCEPTING_SBATCH)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "runs" / "decoder-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "decoder-1" / "checkpoints" / "latest").write_text("step_000010")
    (tmp_path / "runs" / "decoder-1" / "config.yaml").write_text("name: decoder\n")
    (tmp_path / "runs" / "latest").symlink_to("decoder-1")
    monkeypatch.setattr("hpcmm.launch.interpreter.find_spec", lambda name: name)  # as if torch were installed
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides: str) -> Plan:
    return plan(compose_points(overrides), overrides)


def test_a_single_run_is_one_point_whose_folder_is_the_run_directory(here: Path):
    made = planned("cluster=slurm", "task=script", "task.path=train.py")
    (point,) = made.points
    assert (made.is_sweep, made.job.points, point.overrides) == (False, None, ())
    assert point.run == made.run
    assert point.config.task.path == str(made.run.code / "project" / "train.py")
    assert not made.run.root.exists()


def test_a_sweep_of_one_point_is_an_array_all_the_same(here: Path):
    made = planned("cluster=slurm", "train.seed=choice(3)")
    (point,) = made.points
    assert (made.is_sweep, made.job.points, point.overrides) == (True, 1, ("train.seed=3",))
    assert point.run.root == made.run.root / "0000"


def test_the_run_to_start_from_is_looked_up_once_and_each_point_has_its_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str | None] = []
    looked_up = plan_module.run_to_start_from
    monkeypatch.setattr(
        plan_module, "run_to_start_from", lambda config: asked.append(config.train.init_from) or looked_up(config)
    )
    submission = launch(["cluster=slurm", "launch.snapshot=false", "train.init_from=latest", "train.seed=1,2,3"])
    assert asked == ["latest"]
    assert {point.config.train.init_from for point in submission.planned.points} == {str(here / "runs" / "decoder-1")}
    assert (here / "runs" / "latest").resolve() == submission.run.root


def test_a_sweep_is_launched_as_a_run_is_and_has_a_handle_for_each_point(here: Path):
    single = launch(["cluster=slurm", "launch.snapshot=false"])
    assert [job.job_id for job in single.jobs] == ["7"]
    assert single.job is single.jobs[0]
    sweep = launch(["cluster=slurm", "launch.snapshot=false", "train.seed=1,2"])
    assert [job.job_id for job in sweep.jobs] == ["7_0", "7_1"]
    assert [job.paths.folder for job in sweep.jobs] == [point.run.submitit for point in sweep.planned.points]
    assert [point.jobs for point in read_ledger(sweep.run.root).points] == [["7"], ["7"]]


def test_a_plan_refuses_a_script_of_any_point_before_slurm_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HpcmmError, match=r"task\.path is none\.py, but there is no such file"):
        planned("cluster=slurm", "task=script", "task.path=train.py,none.py")
    (here / "other").mkdir()
    (here / "other" / ".git").mkdir()
    (here / "other" / "train.py").write_text("")
    with pytest.raises(HpcmmError, match=r"task\.path=other/train\.py lies in another project than train\.py"):
        planned("cluster=slurm", "task=script", "task.path=train.py,other/train.py")
    with pytest.raises(HpcmmError, match="sbatch and srun not found"):
        planned("cluster=slurm", "train.seed=1,2")
    assert planned("cluster=slurm", "train.seed=1,2", "dry_run=true").is_sweep


def test_a_sweep_may_be_waited_for():
    assert planned("cluster=slurm", "train.seed=1,2", "wait=true", "dry_run=true").is_sweep
