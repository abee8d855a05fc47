"""Whether a job failed has one answer: jobs status, why, the ledger and the analysis' record of the run agree."""

import json
import os
import signal

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import find_targets
from hpcmm.jobs.state import states_of
from hpcmm.jobs.why import explain
from hpcmm.reports.run_record import read_run_record
from hpcmm.runs import attempts, failures
from hpcmm.runs.attempts import attempts_of, begin_attempt, note_cancelled, was_cancelled
from hpcmm.runs.exit_status import Outcome, newest_outcome, outcome_of, states_of_points
from hpcmm.runs.ledger import Ledger, LedgerPoint
from hpcmm.runs.metrics import MetricsWriter
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import write_job_record
from hpcmm.slurm.commands import SilentError


@pytest.fixture(autouse=True)
def _slurm_is_silent(monkeypatch):
    def ask(*_):
        raise SilentError("no controller", "squeue")

    monkeypatch.setattr("hpcmm.jobs.state.find_jobs", ask)


class Job:
    """A job that leaves in a run directory what its script and ranks do."""

    def __init__(self, run, raw_id, task=None):
        self.run, self.raw_id = run, raw_id
        self.job_id = f"{task[0]}_{task[1]}" if task else raw_id
        self.environ = {"SLURM_JOB_ID": raw_id}
        if task:
            self.environ |= {"SLURM_ARRAY_JOB_ID": task[0], "SLURM_ARRAY_TASK_ID": task[1]}
        run.create()
        run.config.write_text('{"name": "demo", "task": {"name": "anomaly"}}', encoding="utf-8")
        run.submission_script.touch()
        (run.submitit / f"{self.job_id}_submitted.pkl").touch()

    def starts(self, restart=0):
        self.environ["SLURM_RESTART_COUNT"] = str(restart)
        with MetricsWriter(self.run.rank_metrics(0), begin_attempt(self.run, self.environ)) as metrics:
            metrics.start(rank=0, local_rank=0, world_size=1, node="n1", job_id=self.raw_id)

    def trains_to_its_end(self):
        with MetricsWriter(self.run.rank_metrics(0)) as metrics:
            metrics.end()

    def loses_a_rank(self):
        record = failures.RankExit(0, "n1", 1, None, int(signal.SIGKILL))
        failures.write(record, failures.exit_file(failures.attempt_folder(self.run, self.environ), 0))

    def script_ends(self, outcome):
        with self.run.exit_status.open("a", encoding="utf-8") as file:
            file.write(f"{self.job_id} {outcome}\n")


def completed(job):
    job.starts()
    job.trains_to_its_end()
    job.script_ends(0)


def completed_without_a_word_of_its_script(job):
    job.starts()
    job.trains_to_its_end()


def crashed_as_its_interpreter_ended(job):
    job.starts()
    job.trains_to_its_end()
    job.loses_a_rank()


def failed(job):
    job.starts()
    job.loses_a_rank()
    job.script_ends(1)


def failed_without_a_word_of_a_rank(job):
    job.starts()
    job.script_ends(1)


def stopped(job):
    job.starts()
    job.script_ends("stopped")


def killed_with_its_script(job):
    job.starts()
    job.loses_a_rank()


def killed_at_once(job):
    job.starts()


def completed_after_a_requeue(job):
    job.starts()
    job.script_ends("stopped")
    job.starts(restart=1)
    job.trains_to_its_end()
    job.script_ends(0)


def stopped_after_a_node_failure(job):
    job.starts()
    job.loses_a_rank()
    for path in job.run.failures.rglob("*"):
        os.utime(path, (1, 1))
    job.starts(restart=1)
    job.script_ends("stopped")


def killed_after_a_requeue(job):
    job.starts()
    job.script_ends("stopped")
    os.utime(job.run.exit_status, (1, 1))
    job.starts(restart=1)
    job.loses_a_rank()


def preempted_and_queued_again_by_slurm(job):
    job.starts()
    job.loses_a_rank()
    job.script_ends("terminated")


def ended_by_the_watchdog(job):
    job.starts()
    job.loses_a_rank()
    job.script_ends("hung")


def queued_again_by_the_watchdog(job):
    ended_by_the_watchdog(job)
    job.script_ends("terminated")
    job.script_ends("restarted")
    job.starts(restart=1)


def started_again_after_its_end(job):
    job.starts()
    job.loses_a_rank()
    job.script_ends(1)
    job.script_ends("restarted")
    job.starts(restart=1)


def killed_once_more_after_its_end(job):
    started_again_after_its_end(job)
    os.utime(job.run.exit_status, (1, 1))
    job.loses_a_rank()


def completed_after_slurm_s_own_requeue(job):
    started_again_after_its_end(job)
    job.trains_to_its_end()
    job.script_ends(0)


def lost_with_its_node_though_srun_said_0(job):
    job.starts()
    job.loses_a_rank()
    job.script_ends(0)


def completed_after_its_node_was_lost(job):
    lost_with_its_node_though_srun_said_0(job)
    job.script_ends("restarted")
    job.starts(restart=1)
    job.script_ends(0)


def completed_by_hand_after_it_failed_while_it_was_followed(job):
    failed(job)
    write_job_record(job.run, {"job_id": job.job_id, "state": "FAILED"})
    job.script_ends("restarted")
    job.starts(restart=1)
    job.trains_to_its_end()
    job.script_ends(0)


def started_again_after_it_was_followed(job):
    failed(job)
    write_job_record(job.run, {"job_id": job.job_id, "state": "FAILED"})
    job.script_ends("restarted")
    job.starts(restart=1)


def followed_when_it_was_started_again(job):
    started_again_after_its_end(job)
    job.script_ends(0)
    write_job_record(job.run, {"job_id": job.job_id, "state": "FAILED"})


ENDS = [
    (completed, "COMPLETED"),
    (crashed_as_its_interpreter_ended, "FAILED"),
    (failed, "FAILED"),
    (failed_without_a_word_of_a_rank, "FAILED"),
    (stopped, "STOPPED"),
    (killed_with_its_script, "FAILED"),
    (killed_at_once, None),
    (completed_after_a_requeue, "COMPLETED"),
    (stopped_after_a_node_failure, "STOPPED"),
    (killed_after_a_requeue, "FAILED"),
    (preempted_and_queued_again_by_slurm, None),
    (ended_by_the_watchdog, "FAILED"),
    (queued_again_by_the_watchdog, None),
    (started_again_after_its_end, None),
    (killed_once_more_after_its_end, "FAILED"),
    (completed_after_slurm_s_own_requeue, "COMPLETED"),
    (lost_with_its_node_though_srun_said_0, "FAILED"),
    (completed_after_its_node_was_lost, "COMPLETED"),
    (completed_by_hand_after_it_failed_while_it_was_followed, "COMPLETED"),
    (started_again_after_it_was_followed, None),
    (followed_when_it_was_started_again, "FAILED"),
]


@pytest.mark.parametrize("in_sweep", [False, True], ids=["run", "point"])
@pytest.mark.parametrize(("end", "state"), ENDS, ids=lambda value: getattr(value, "__name__", ""))
def test_all_who_are_asked_give_one_answer(tmp_path, end, state, in_sweep):
    sweep = SweepDir(tmp_path / "demo-1")
    ledger = Ledger(sweep, [LedgerPoint(0, [], "0000", ["7"])])
    run = sweep.point(0) if in_sweep else RunDir(sweep.root)
    job = Job(run, "70", ("7", "0") if in_sweep else None)
    if in_sweep:
        sweep.shared.submission_script.touch()
        ledger.write()
    end(job)

    outcome = outcome_of(run, job.job_id)
    assert (outcome and outcome.state) == state
    assert newest_outcome(run) == outcome

    (target,) = find_targets("demo-1", tmp_path)
    (told,) = states_of([target], {}, needs_slurm=False)
    if state in {None, "STOPPED"}:  # it may go on, so no end is told
        assert told.jobs == []
        with pytest.raises(HpcmmError, match="no run directory tells of an end"):
            explain(target)
    else:
        assert [each.state for each in told.jobs] == [state]
        assert explain(target).failed == (state == "FAILED")
    if in_sweep:  # what has left the queue without having completed is submitted once more
        assert states_of_points(ledger, []) == {0: "COMPLETED" if state == "COMPLETED" else "FAILED"}
        assert states_of_points(ledger, ["7_0"]) == {0: "ACTIVE"}
    assert read_run_record(run).failed_before_steps == (state == "FAILED")


def test_slurm_s_own_word_counts_before_the_script_s(tmp_path):
    job = Job(RunDir(tmp_path / "demo-1"), "7")
    failed(job)
    write_job_record(job.run, {"job_id": "7", "state": "TIMEOUT"})
    assert outcome_of(job.run, "7") == Outcome("TIMEOUT")
    assert newest_outcome(job.run).failed


@pytest.mark.parametrize("in_sweep", [False, True], ids=["run", "point"])
@pytest.mark.parametrize(
    ("end", "state"),
    [
        (killed_at_once, "CANCELLED"),
        (killed_with_its_script, "CANCELLED"),
        (failed, "CANCELLED"),
        (preempted_and_queued_again_by_slurm, "CANCELLED"),
        (completed, "COMPLETED"),
        (completed_without_a_word_of_its_script, "COMPLETED"),  # as on submitit's local executor
        (stopped, "STOPPED"),
        (completed_after_a_requeue, "COMPLETED"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_user_cancelled_is_cancelled_unless_it_ended_well_first(tmp_path, end, state, in_sweep):
    ledger = Ledger(SweepDir(tmp_path / "demo-1"), [LedgerPoint(0, [], "0000", ["7"])])
    run = ledger.sweep.point(0) if in_sweep else ledger.sweep.shared
    job = Job(run, "70", ("7", "0") if in_sweep else None)
    if in_sweep:
        ledger.write()
    end(job)
    note_cancelled(run, [job.job_id])
    assert outcome_of(run, job.job_id).state == state
    job.script_ends("restarted")  # by hand
    job.starts(restart=2)
    assert outcome_of(run, job.job_id) in {None, Outcome("COMPLETED"), Outcome("FAILED")}


def test_a_link_in_the_place_of_the_note_is_not_written_through(tmp_path):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    run.cancelled.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        note_cancelled(run, ["7"])
    assert not was_cancelled(run, "7", 0)


def test_tasks_that_were_cancelled_while_they_waited_are_one_line_which_is_parsed_once_for_all_points(
    tmp_path, monkeypatch
):
    ledger = Ledger(SweepDir(tmp_path / "demo-1"), [LedgerPoint(i, [], f"{i:04d}", ["7"]) for i in range(200)])
    ledger.sweep.point(4).create()
    ledger.write()
    note_cancelled(ledger.sweep.shared, ["7_[100-3999999]", "7_3"])
    assert ledger.sweep.shared.cancelled.read_text() == "7_[100-3999999] 0\n7_3 0\n"
    reads = []
    read_tail = attempts.read_tail
    monkeypatch.setattr(attempts, "read_tail", lambda path, *a, **k: reads.append(path) or read_tail(path, *a, **k))
    cancelled = [point.index for point in ledger.points if was_cancelled(ledger.run(point), point.job_id, 0)]
    assert cancelled == [3, *range(100, 200)]
    assert len(reads) == 1
    note_cancelled(ledger.sweep.point(4), ["7_4"])  # a note that is added later counts too
    assert was_cancelled(ledger.sweep.point(4), "7_4", 0)


def test_a_task_that_slurm_started_again_after_its_range_was_cancelled_is_not_cancelled(tmp_path):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    note_cancelled(run, ["7_[0-9]"])
    assert was_cancelled(run, "7_9", 0)
    assert not was_cancelled(run, "7_9", 1)
    assert not was_cancelled(run, "7_10", 0)


def test_each_file_of_a_run_is_read_once_for_its_outcome(tmp_path, monkeypatch):
    job = Job(RunDir(tmp_path / "demo-1"), "7")
    failed(job)
    note_cancelled(job.run, ["7"])
    reads = []
    read_tail = attempts.read_tail
    monkeypatch.setattr(
        attempts, "read_tail", lambda path, *a, **k: reads.append(path.name) or read_tail(path, *a, **k)
    )
    assert outcome_of(job.run, "7") == Outcome("CANCELLED", 1)
    assert sorted(reads) == ["attempts.jsonl", "cancelled", "exit_status"]


def test_of_many_notes_of_cancelled_tasks_a_line_that_is_cut_names_no_other_task(tmp_path):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    line = "117_5 0\n"
    run.cancelled.write_text(line * (2**20 // len(line)) + "118_60 0\n")  # the last MiB begins with "17_5 0"
    assert was_cancelled(run, "117_5", 0)
    assert was_cancelled(run, "118_60", 0)
    assert not was_cancelled(run, "17_5", 0)


@pytest.mark.parametrize(
    ("end", "told", "state"),
    [
        (completed, "COMPLETED", "COMPLETED"),
        *((completed, word, "FAILED") for word in ("NODE_FAIL", "TIMEOUT", "PREEMPTED", "CANCELLED", "FAILED")),
        (stopped, "COMPLETED", "FAILED"),  # it is to go on
        (killed_at_once, "COMPLETED", "COMPLETED"),  # its script had no room for a word of its end
        (killed_at_once, "NODE_FAIL", "FAILED"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_of_a_point_slurm_s_word_of_a_bad_end_counts_before_its_script_s(tmp_path, end, told, state):
    ledger = Ledger(SweepDir(tmp_path / "demo-1"), [LedgerPoint(0, [], "0000", ["7"])])
    end(Job(ledger.sweep.point(0), "70", ("7", "0")))
    assert states_of_points(ledger, [], {"7_0": told}) == {0: state}


def test_a_task_of_an_array_is_known_by_both_of_its_numbers(tmp_path):
    job = Job(RunDir(tmp_path / "0003"), "70", ("7", "3"))
    killed_with_its_script(job)
    assert [(each.job_id, each.raw_id) for each in attempts_of(job.run)] == [("7_3", "70")]
    assert outcome_of(job.run, "7_3") == Outcome("FAILED")
    assert outcome_of(job.run, "7_4") is None


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"job_id": {}}',
        b'{"job_id": "/*", "state": []}',
        b"9" * 6000,
        b"x" * (1 << 21),
    ],
)
def test_damaged_and_hostile_files_tell_nothing_and_do_no_harm(tmp_path, damage):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    (run.failures / "7.x").mkdir(parents=True)
    (run.failures / "9.0").touch()
    for path in (run.job_record, run.submission, run.attempts, run.exit_status, run.rank_metrics(0), run.evaluation):
        path.write_bytes(damage + b"\n")
    SweepDir(run.root).ledger.write_bytes(damage)
    assert outcome_of(run, "7") is None
    assert newest_outcome(run) is None
    assert attempts_of(run) == []


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    for path in (run.job_record, run.submission, run.attempts, run.exit_status, run.rank_metrics(0), run.provenance):
        os.mkfifo(path)
    assert newest_outcome(run) is None
    assert outcome_of(run, "7") is None


def test_an_odd_state_is_not_passed_on(tmp_path):
    run = RunDir(tmp_path / "demo-1")
    run.create()
    run.job_record.write_text(json.dumps({"job_id": "7", "state": "\x1b[2J"}), encoding="utf-8")
    assert outcome_of(run, "7") == Outcome("UNKNOWN")
