"""When a rank under a profiler is told to end, since another one has failed."""

from hpcmm.runs import failures
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.nsys_rank import SomeRankFailed


def test_a_rank_must_end_some_time_after_any_rank_has_left_a_record(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = RunDir(tmp_path)
    must_end = SomeRankFailed(run, kill_wait_s=20)
    assert not must_end()
    error = failures.RankError(3, "node1", 1, "ValueError", "no")
    failures.write(error, failures.error_file(failures.attempt_folder(run), 3))
    assert not must_end()
    now[0] += 4.9
    assert not must_end()
    now[0] += 0.2
    assert must_end()
