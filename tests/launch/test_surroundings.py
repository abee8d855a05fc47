"""What the shell that one launches from may change of a job: nothing that is not in the configuration."""

import json
import os
import subprocess
import sys

import pytest

from hpcmm.slurm.commands import job_variables, outside_of_jobs

SHELL = {"SBATCH_PARTITION": "other", "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "3", "SRUN_CPU_BIND": "none"}
CLUSTER = {"SLURM_CONF": "/site/slurm.conf", "HOME": "/home/me"}


def test_what_belongs_to_jobs_is_told_from_what_finds_the_cluster():
    assert job_variables(SHELL | CLUSTER) == sorted(SHELL)
    assert outside_of_jobs(SHELL | CLUSTER) == CLUSTER
    assert outside_of_jobs(SHELL, keep=["SBATCH_PARTITION"]) == {"SBATCH_PARTITION": "other"}


def test_sbatch_sees_no_option_of_the_shell_and_the_user_is_told(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    seen = tmp_path / "seen.json"
    dump = (
        f"import json, os, sys; json.dump(dict(os.environ), open({str(seen)!r}, 'w')); print('Submitted batch job 1')"
    )
    for name in ("sbatch", "srun", "squeue"):
        body = f'exec {sys.executable} -c "$CODE"' if name == "sbatch" else "exit 1"
        (binaries / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (binaries / name).chmod(0o755)
    environment = os.environ | SHELL | {"PATH": f"{binaries}:{os.environ['PATH']}", "CODE": dump}
    environment.pop("SLURM_CONF", None)
    command = [sys.executable, "-m", "hpcmm.launch", "cluster=slurm", "launch.snapshot=false"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    given = json.loads(seen.read_text())
    assert [name for name in SHELL if name in given] == []
    assert "SBATCH_PARTITION" in done.stderr
    assert "SRUN_CPU_BIND" in done.stderr
    assert "SLURM_JOB_ID" not in done.stderr
