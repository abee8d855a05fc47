"""What sbatch of a real Slurm refuses, with accounts and limits enforced, and the sentence that comes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(300)]

RULES = """
AccountingStorageEnforce=associations,limits,qos
EnforcePartLimits=ALL
PartitionName=tiny Nodes=spare1 MaxTime=10 MaxNodes=1 State=UP
PartitionName=closed Nodes=spare1 State=DOWN
PartitionName=theirs Nodes=spare1 AllowAccounts=other State=UP
"""
ACCOUNTS = (
    "add account proj",
    "add account other",
    "add qos short set maxwall=5 maxsubmitjobsperuser=1",
    "add user root account=proj qos=normal,short",
)
SHORT = ("cluster.account=proj", "cluster.qos=short", "cluster.sbatch.begin=now+1hour")


@pytest.fixture(scope="module")
def strict_cluster(spare_clusters):
    """A cluster that enforces what sites enforce."""
    cluster = spare_clusters()
    assert cluster.command("up", "--prefix", "spare").returncode == 0
    (cluster.conf.parent / "extra.conf").write_text(RULES)
    os.kill(int((cluster.directory / "run" / "slurmctld.pid").read_text()), signal.SIGTERM)
    started = cluster.command("up")
    assert started.returncode == 0, started.stderr
    for words in ACCOUNTS:
        cluster.run("sacctmgr", "-i", *words.split())
    return cluster


@pytest.fixture
def launch(strict_cluster, tmp_path):
    def begin(*overrides):
        given = ["cluster=local_slurm", "cluster.gpus_per_node=0", "cluster.nodes=1", "launch.snapshot=false"]
        done = subprocess.run(
            [sys.executable, "-m", "hpcmm.launch", *given, *overrides],
            cwd=tmp_path, env=strict_cluster.env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done

    yield begin
    strict_cluster.run("scancel", "--user=root")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["cluster.nodes=5"], "Node count specification invalid). Asked for are 5 nodes"),
        (["cluster.memory_gb=9999"], "Memory specification can not be satisfied; .*cluster.memory_gb is 9999.0"),
        (["cluster.partition=none"], "invalid partition specified: none; .*`sinfo -s` lists"),
        (["cluster.account=none"], "Invalid account .*cluster.account is none"),
        (["cluster.account=other"], "Invalid account .*cluster.account is other"),
        (["cluster.partition=theirs"], "Invalid account or account/partition .*cluster.partition theirs"),
        (["cluster.qos=none"], "Invalid qos specification.*lists which go together"),
        (["cluster.account=proj", "cluster.qos=urgent"], "cluster.qos is urgent and cluster.account proj"),
        (["cluster.time_limit_min=5000"], "time limit is invalid .*cluster.time_limit_min is 5000"),
        (["cluster.partition=tiny", "cluster.nodes=2", "cluster.time_limit_min=5"], "Node count specification invalid"),
        (["cluster.constraint=none"], "Invalid feature specification.*cluster.constraint is none"),
        (["cluster.gpus_per_node=2", "cluster.gpu_type=h100"], "configuration is not available.*GPUs of type h100"),
        (["cluster.cpus_per_rank=99"], "More processors requested.*ranks of 99 CPUs"),
        (["cluster.exclude=none"], "Invalid node name specified.*cluster.exclude is none"),
        (["cluster.sbatch.reservation=none"], "reservation is invalid.*scontrol show reservation"),
    ],
)  # fmt: skip
def test_what_slurm_refuses_is_one_sentence_with_what_to_do(launch, asked, said):
    done = launch(*asked)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said.replace("). ", r"\). "), done.stderr), done.stderr


def test_a_limit_on_jobs_is_told(launch):
    assert launch(*SHORT, "cluster.time_limit_min=2").returncode == 0
    done = launch(*SHORT, "cluster.time_limit_min=2")
    assert done.returncode == 1
    assert "QOSMaxSubmitJobPerUserLimit" in done.stderr
    assert "A limit of your account or QOS is reached" in done.stderr


def test_a_job_that_can_never_start_is_said_to_wait_for_ever(launch):
    done = launch("cluster.partition=closed")
    assert done.returncode == 0
    assert "cannot start as it is (PartitionDown). Partition closed is closed at present" in done.stderr
