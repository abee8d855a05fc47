"""Each common refusal of sbatch's gets a remedy; a job to wait for is found by its name."""

import json

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import job_to_wait_for
from hpcmm.slurm.sbatch import refusal

FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Invalid partition name specified", "cluster.partition is gpu: `sinfo -s`"),
        ("Invalid account or account/partition combination specified", "cluster.account is proj and cluster.partition"),
        ("Invalid qos specification", "cluster.qos is high"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "A limit of"),
        ("Requested node configuration is not available", "2 nodes with 1 ranks of 4 CPUs and 0 GPUs"),
        ("Node count specification invalid", "2 nodes with"),
        ("More processors requested than permitted", "2 nodes with"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "`sinfo -o '%P %l'` shows the limits"),
        ("Required partition not available (inactive or drain)", "closed at present"),
        ("User's group not permitted to use this partition", "which refuses you"),
        ("Memory specification can not be satisfied", "cluster.memory_gb"),
        ("Invalid feature specification", "cluster.constraint"),
        ("Invalid node name specified", "cluster.exclude"),
        ("Invalid generic resource (gres) specification", "cluster.gpu_type"),
        ("Invalid job array specification", "MaxArraySize"),
        ("Job dependency problem", "leave it out if that job has completed"),
        ("Unable to contact slurm controller (connect failure)", "The Slurm controller does not answer"),
        ("Socket timed out on send/recv operation", "busy or down"),
        ("resolve_ctls_from_dns_srv: Could not establish a configuration source", "or launch with cluster=local_slurm"),
        ("Incompatible begin and deadline time specification", "cluster.sbatch.deadline leave too little time"),
        ("This does not look like a batch script", "must begin with a line such as #!/bin/bash"),
        ("Batch script contains DOS line breaks (\\r\\n)", "dos2unix"),
        ("Something new", "Change the cluster settings"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_with_its_remedy(said, remedy):
    config = compose_run(
        [
            "cluster=slurm",
            "cluster.partition=gpu",
            "cluster.account=proj",
            "cluster.qos=high",
            "cluster.nodes=2",
            "after=5",
        ]
    )
    sentence = refusal(config, FAILED + said + "\n")
    assert said in sentence
    assert remedy in sentence
    assert "\n" not in sentence


def test_what_is_too_long_for_slurm_is_named_the_script_an_option_or_the_path(tmp_path):
    config = compose_run(["cluster=slurm"])
    said = FAILED + "Pathname of a file, directory or other parameter too long\n"
    script = tmp_path / "submission.sh"
    script.write_text("x" * 5_000_000)
    assert "The job's script has 5.0 MB; Slurm takes 4 MB" in refusal(config, said, script)
    script.write_text(f"#SBATCH --job-name=x\n#SBATCH --comment={'c' * 6000}\n#SBATCH --output={'o' * 7000}\n")
    assert "option --comment has 6000 characters, which Slurm may not take: shorten it (cluster.sbatch.comment)." in (
        refusal(config, said, script)
    )
    script.write_text(f"#SBATCH --exclude={'n,' * 40_000}\n")
    assert "shorten it (cluster.exclude)" in refusal(config, said, script)
    script.write_text("#SBATCH --comment=short\n")
    assert f"{tmp_path} is too long for Slurm: set runs_root" in refusal(config, said, script)


def test_the_job_of_a_run_is_found_by_the_run_s_name(tmp_path):
    run = tmp_path / "demo-1"
    run.mkdir()
    (run / "submission.json").write_text(json.dumps({"job_id": "42"}))
    (tmp_path / "latest").symlink_to("demo-1")
    assert job_to_wait_for("demo-1", tmp_path) == "42"
    assert job_to_wait_for("latest", tmp_path) == "42"
    assert job_to_wait_for("17", tmp_path) == "17"
    assert job_to_wait_for("17_3", tmp_path) == "17_3"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "holds no run of that name"),
        ("", "tells no job: see python -m hpcmm.jobs status demo"),
        ("[]", "tells no job: see python -m hpcmm.jobs status demo"),
        ('{"job_id": "1 --wrap=pwn"}', "is not a job id"),
    ],
)
def test_a_run_without_a_job_is_no_job_to_wait_for(tmp_path, record, expected):
    if record is not None:
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "submission.json").write_text(record)
    with pytest.raises(HpcmmError, match=expected):
        job_to_wait_for("demo", tmp_path)
