"""Scripts that know nothing of hpcmm, or one line: launched, profiled and analysed, each by one command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.nsys, pytest.mark.timeout(700)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RANKS = 4
STEPS = {"pytorch_ddp": 20, "deepspeed_zero": 20, "hf_trainer": 10}


@pytest.fixture(scope="module")
def runs(slurm_cluster, nsys, tmp_path_factory):
    """The run directory of each example, after its analysis. All are queued at once."""
    folder = tmp_path_factory.mktemp("examples")
    for name in STEPS:
        subprocess.run(
            [
                sys.executable, "-m", "hpcmm.launch", "cluster=local_slurm", "cluster.nodes=2", "profile=nsys",
                "analyze=after", f"name={name}", "--", str(EXAMPLES / f"{name}.py"),
            ],
            env=slurm_cluster.env, cwd=folder, check=True, capture_output=True, timeout=200, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    found = {name: next((folder / "runs").glob(f"{name}-*")) for name in STEPS}
    jobs = [json.loads((run / "submission.json").read_text())["analysis_job_id"] for run in found.values()]
    until = time.monotonic() + 500  # with what is compiled once
    while slurm_cluster.run("squeue", "-h", "-j", ",".join(jobs), "-t", "PD,R,CG").strip():
        assert time.monotonic() < until, slurm_cluster.run("squeue")
        time.sleep(1)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_every_rank_ran_the_copy_of_the_script_to_its_end(runs, name):
    run = runs[name]
    assert (run / "exit_status").read_text().split()[1] == "0", (run / "logs" / "rank_0000.log").read_text()
    assert "loss" in (run / "logs" / "rank_0000.log").read_text()
    assert (run / "code" / "project" / "examples" / f"{name}.py").is_file()


@pytest.mark.parametrize("name", STEPS)
def test_one_command_ended_in_tables_of_every_rank_s_steps(runs, name):
    analysis = runs[name] / "analysis"
    assert (analysis / "report.html").is_file(), (runs[name] / "logs" / "analysis.log").read_text()
    assert list(pd.read_csv(analysis / "coverage.csv")["status"]) == ["found"] * RANKS
    steps = pd.read_csv(analysis / "phases.csv").groupby("rank")["step"].nunique()
    assert steps.to_dict() == dict.fromkeys(range(RANKS), STEPS[name])


@pytest.mark.parametrize("name", STEPS)
def test_the_collectives_were_annotated_without_the_script_s_knowledge(runs, name):
    collectives = pd.read_csv(runs[name] / "analysis" / "collectives.csv")
    in_steps = collectives[collectives["step"].notna()]
    took_part = in_steps.groupby(["group", "op", "sequence"])["rank"].nunique()
    assert len(took_part) >= STEPS[name]
    assert (took_part == RANKS).all()
