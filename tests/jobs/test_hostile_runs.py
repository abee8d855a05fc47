"""What a run directory holds may be damaged or another's: it is never obeyed, and never ends in a traceback."""

import json
import os

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import find_targets, settings
from hpcmm.jobs.state import local_job
from hpcmm.ranges import ranks_in
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import job_ids_of
from hpcmm.slurm.commands import ask
from hpcmm.slurm.jobs import Answer


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "runs" / "demo-1")
    made.create()
    made.submission_script.write_text("#!/bin/bash\n")
    return made


@pytest.mark.parametrize("job_id", ["/x", "../**", "-1", "9" * 100, {"a": 1}, None])
def test_a_job_record_without_a_job_s_number_is_left_out(run, job_id):
    run.job_record.write_text(json.dumps({"job_id": job_id}))
    assert job_ids_of(run) == ()


def test_a_slurm_job_that_only_its_directory_knows_is_never_taken_for_a_process(run, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    monkeypatch.setattr("hpcmm.jobs.state.find_jobs", lambda *_: Answer([]))
    run.job_record.write_text(json.dumps({"job_id": "77", "state": "RUNNING"}))
    with pytest.raises(HpcmmError, match="Slurm does not know job 77"):
        cancel("demo-1", find_targets("demo-1", run.root.parent))
    assert killed == []


def test_an_odd_number_of_a_local_job_is_no_process(run):
    assert local_job(run, f"{os.getpid()}_3", "demo", 1).state == "FAILED"
    assert local_job(run, "9" * 12, "demo", 99_999_999_999).state == "FAILED"


def test_a_nested_configuration_without_end_is_no_configuration(run):
    run.config.write_text("[" * 50_000)
    assert settings(run) == {}


def test_a_user_without_a_home_is_no_run(tmp_path):
    with pytest.raises(HpcmmError, match="is not a run in"):
        find_targets("~nobody-here", tmp_path)


def test_only_so_many_ranks_are_counted_as_there_can_be():
    assert ranks_in("0-2,5,0-99999999999," + "9" * 5000) == [0, 1, 2, 5]


def test_a_command_that_cannot_start_is_named(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("no program")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HpcmmError, match="squeue cannot be run"):
        ask("squeue")
    with pytest.raises(HpcmmError, match="squeue cannot be run"):
        ask("squeue", environ={"A": "x\0y"})
