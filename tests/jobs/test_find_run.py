"""From a run's folder to the jobs that ran in it."""

import json

import pytest

from hpcmm.jobs.find_run import find_targets
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.submission import job_ids_of


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep-20260102-030405-1a2b"
    folder.mkdir()
    (folder / "submission.sh").write_text("#!/bin/bash\n")
    points = [{"index": 0, "jobs": ["7"]}, {"index": 1, "jobs": ["7", "9"]}, {"index": 2, "jobs": ["7", "x; id"]}]
    (folder / "ledger.json").write_text(json.dumps({"points": points}))
    return RunDir(folder)


def test_a_sweep_is_found_by_its_name_with_all_arrays_it_was_submitted_in(sweep):
    (target,) = find_targets("sweep", sweep.root.parent)
    assert set(target.job_ids) == {"7", "9"}


@pytest.mark.parametrize("text", ["", "[]", '{"points": 3}', '{"points": [3]}', '{"points": [{"jobs": 3}]}'])
def test_a_damaged_ledger_names_no_job(sweep, text):
    (sweep.root / "ledger.json").write_text(text)
    assert job_ids_of(sweep) == ()
