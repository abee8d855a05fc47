"""What the settings of stopping, requeueing and the capture's window do to the script, and which are refused."""

import subprocess
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.launch.script import Job, render_script
from hpcmm.runs.run_dir import RunDir


def script(*overrides):
    job = Job(RunDir(Path("/shared/run")), launcher="/env/python")
    return render_script(compose_run(["experiment=anomaly_demo", *overrides]), job)


@pytest.mark.parametrize(
    ("policy", "directive", "goes_on"),
    [
        ("never", "--no-requeue", "no"),
        ("on_stop", "--no-requeue", "yes"),
        ("on_node_failure", "--requeue", "yes"),
        ("slurm", "--requeue", "yes"),
    ],
)
def test_the_policy_decides_who_may_requeue(policy, directive, goes_on):
    lines = script(f"requeue={policy}").splitlines()
    assert f"#SBATCH {directive}" in lines
    assert f"goes_on={goes_on}" in lines
    assert any(line.startswith("answers()") for line in lines) == (policy == "on_node_failure")
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=False).returncode == 0


def test_a_warning_of_no_length_is_none():
    assert "#SBATCH --signal=B:USR1@90" in script("cluster.stop_warning_s=90").splitlines()
    assert "#SBATCH --signal" not in script("cluster.stop_warning_s=0")


def test_a_short_limit_gets_a_shorter_warning():
    assert "#SBATCH --signal=B:USR1@120" in script("cluster.time_limit_min=60").splitlines()
    assert "#SBATCH --signal=B:USR1@15" in script("cluster.time_limit_min=1").splitlines()


def test_under_slurm_s_own_requeue_the_ranks_are_warned_only_if_asked_for():
    assert "#SBATCH --signal" not in script("requeue=slurm")
    assert "#SBATCH --signal=USR1@90" in script("requeue=slurm", "cluster.stop_warning_s=90").splitlines()


def test_slurm_s_own_requeue_needs_slurm():
    with pytest.raises(HpcmmError, match="requeue=slurm needs Slurm, and cluster=local has none"):
        validate(compose_run(["cluster=local", "requeue=slurm"]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.stop_warning_s=1200", "the whole job has 1200 s"),
        ("cluster.stop_warning_s=-1", r"cluster\.stop_warning_s is -1"),
        ("train.keep_checkpoints=0", r"train\.keep_checkpoints is 0"),
        ("profile.steps='50:60'", "holds none of this run's steps 0 to 49"),
    ],
)
def test_what_cannot_work_is_refused_before_queueing(override, said):
    with pytest.raises(HpcmmError, match=said):
        validate(compose_run(["experiment=anomaly_demo", override]))
