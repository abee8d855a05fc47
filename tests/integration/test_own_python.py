"""A script of the user's under each Python that this machine has, which may have nothing but its standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from other_pythons import VERSIONS, python_of

SCRIPT = """\
import os, sys, time
from hpcmm import annotate
assert "omegaconf" not in sys.modules and "submitit" not in sys.modules, "the rank needs nothing of these"
for number in range(3):
    with annotate.step(number):
        time.sleep(0.01)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "python %d.%d" % sys.version_info[:2], sys.argv[1:])
"""


def launched(folder, env, *overrides):
    (folder / "train.py").write_text(SCRIPT)
    words = ["task=script", "task.path=train.py", "task.args=[--lr,1e-4]", "wait=true", "launch.check_rendezvous=true"]
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.launch", *words, *overrides],
        capture_output=True, text=True, check=False, cwd=folder, env=env, stdin=subprocess.DEVNULL, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "latest"


def check_ranks(run, version):
    for rank in (0, 1):
        said = (run / "logs" / f"rank_{rank:04d}.log").read_text()
        assert said == f"rank {rank} of 2 python {version} ['--lr', '1e-4']\n"
    record = json.loads((run / "provenance.json").read_text())
    assert record["python"]["version"].startswith(f"{version}.")
    assert "omegaconf" not in record["packages"]


@pytest.mark.parametrize("version", VERSIONS)
def test_ranks_run_on_this_machine_under_each_python(tmp_path, version):
    python = python_of(version)
    run = launched(tmp_path, os.environ, "cluster=local", "cluster.ranks_per_node=2", f"cluster.python={python}")
    check_ranks(run, version)


@pytest.mark.slurm
@pytest.mark.parametrize(
    "version", [VERSIONS[0], *(pytest.param(each, marks=pytest.mark.long) for each in VERSIONS[1:-1]), VERSIONS[-1]]
)
def test_ranks_run_on_slurm_under_each_python(slurm_cluster, tmp_path, version):
    python = python_of(version)
    nodes = ["cluster=local_slurm", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.gpus_per_node=1"]
    checks = ["launch.preflight=true"] if version == VERSIONS[0] else []
    run = launched(tmp_path, slurm_cluster.env, *nodes, *checks, f"cluster.python={python}")
    check_ranks(run, version)
