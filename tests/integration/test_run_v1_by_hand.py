"""What an earlier version left for sbatch runs on the real local Slurm, with the code that it kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import kept_run
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

TRAINED_BY = "\nprint('trained by', __file__, flush=True)\n"


@pytest.fixture
def run(slurm_cluster, tmp_path):
    """The kept run, whose code tells where it lies when it trains; its sweep, too."""
    run = kept_run.unpack(tmp_path / "project", slurm_cluster.conf)
    for each in (run, run.with_name(kept_run.SWEEP)):
        with (each / "code" / "hpcmm" / "hpcmm" / "train" / "loop.py").open("a") as loop:
            loop.write(TRAINED_BY)
    return run


def told(run, code_of):
    return f"trained by {code_of / 'code' / 'hpcmm' / 'hpcmm' / 'train' / 'loop.py'}\n" in (
        run / "logs" / "rank_0000.log"
    ).read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.nsys
def test_its_script_trains_once_more_with_its_own_code(slurm_cluster, nsys, run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    for rank in range(2):
        (run / "nsys" / f"rank_{rank:04d}.sqlite").unlink()
    script = str(run / "submission.sh")
    job_id = slurm_cluster.run("sbatch", "--parsable", "--wait", script, timeout_s=200).split()[-1]
    assert (run / "exit_status").read_text(encoding="utf-8") == f"3 0\n{job_id} 0\n"
    assert told(run, run)
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_000010"
    assert len((run / "attempts.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert {path.name for path in (run / "nsys").glob("*.nsys-rep")} == {"rank_0000.nsys-rep", "rank_0001.nsys-rep"}


def test_a_failed_point_of_its_sweep_is_submitted_once_more(slurm_cluster, run):
    sweep = run.with_name(kept_run.SWEEP)
    (sweep / "0001" / "exit_status").write_text("4_1 1\n", encoding="utf-8")
    shutil.rmtree(sweep / "0001" / "checkpoints")
    (sweep / "0001" / "checkpoints").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.launch", "resubmit", str(sweep)],
        env=slurm_cluster.env, cwd=run.parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "an array of 1 task\n" in done.stdout
    first, again = (point["jobs"] for point in json.loads((sweep / "ledger.json").read_text())["points"])
    assert (first, len(again)) == (["4"], 2)
    until = time.monotonic() + 150
    while slurm_cluster.run("squeue", "-h", "-j", again[-1], "-t", "PD,R,CG,CF").strip():
        assert time.monotonic() < until, slurm_cluster.run("squeue")
        time.sleep(0.5)
    assert (sweep / "0001" / "exit_status").read_text(encoding="utf-8") == f"4_1 1\n{again[-1]}_1 0\n"
    assert told(sweep / "0001", sweep)
    assert not told(sweep / "0000", sweep)
    assert (sweep / "0001" / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_000002"
