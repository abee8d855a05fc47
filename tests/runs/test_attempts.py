"""The attempts of a run are numbered over requeues and further submissions."""

import json

from hpcmm.runs.attempts import begin_attempt, current_attempt
from hpcmm.runs.run_dir import RunDir


def test_each_start_of_the_script_is_the_next_attempt(tmp_path):
    run = RunDir(tmp_path)
    assert current_attempt(run) == 1  # none is noted if no script runs
    requeued = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    assert begin_attempt(run, {"SLURM_JOB_ID": "7"}) == 1
    assert current_attempt(run) == 1
    assert begin_attempt(run, requeued) == 2
    assert begin_attempt(run, {"SLURM_JOB_ID": "8"}) == 3
    assert current_attempt(run) == 3
    noted = [json.loads(line) for line in run.attempts.read_text(encoding="utf-8").splitlines()]
    assert [(record["attempt"], record["job_id"], record["restart_count"]) for record in noted] == [
        (1, "7", 0), (2, "7", 1), (3, "8", 0),
    ]  # fmt: skip
