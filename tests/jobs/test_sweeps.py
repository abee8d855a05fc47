"""A sweep, a point of it and a job's number each mean themselves and nothing else, to every command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.errors import HpcmmError
from hpcmm.evaluate.__main__ import find_runs
from hpcmm.jobs.__main__ import _job_lines
from hpcmm.jobs.asking import Ranks
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import find_folder, find_targets
from hpcmm.jobs.state import states_of
from hpcmm.jobs.why import explain, lines_of, values_of
from hpcmm.launch.__main__ import main as launch
from hpcmm.ranges import tasks_in
from hpcmm.runs import failures
from hpcmm.runs.attempts import begin_attempt
from hpcmm.runs.ledger import Ledger, LedgerPoint, RefusedEntry, read_ledger
from hpcmm.runs.metrics import MetricsWriter, Settled, write_settled
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.serve.address import find_served_run
from hpcmm.slurm.jobs import Job

SEPARATOR = "\x1f"
NAME = "demo-20260102-030405-1a2b"


class Slurm:
    """Stand-ins for squeue, sacct and the others, whose answers a test writes; they log how they are called."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.calls = folder / "calls"
        self.calls.touch()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        (folder / "slurm.conf").touch()
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for name in ("squeue", "sacct", "scancel", "sinfo", "sbatch", "srun", "scontrol"):
            self.answers(name)

    def answers(self, name, *rows):
        answer = self.folder / f"{name}.txt"
        answer.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        script = f'#!/bin/sh\necho {name} "$@" >> {quote(str(self.calls))}\ncat {quote(str(answer))}\n'
        (self.folder / name).write_text(parted_as_asked(script), encoding="utf-8")
        (self.folder / name).chmod(0o755)

    def called(self, name):
        return [line for line in self.calls.read_text().splitlines() if line.startswith(f"{name} ")]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    return Slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Four points: the first completed, the second failed in array 7 and runs again in 9, two failed."""
    made = SweepDir(tmp_path / "runs" / NAME)
    made.root.mkdir(parents=True)
    made.shared.submission_script.touch()
    jobs = [["7"], ["7", "9"], ["7"], ["7"]]
    Ledger(made, [LedgerPoint(i, [f"train.seed={i}"], f"{i:04d}", each) for i, each in enumerate(jobs)]).write()
    for index in range(4):
        make_point(made, index)
    ran(made, 0, "7_0", "70", 0)
    ran(made, 1, "7_1", "71", 1)
    ran(made, 2, "7_2", "72", 1)
    ran(made, 3, "7_3", "7", 1)
    (tmp_path / "runs" / "latest").symlink_to(NAME)
    monkeypatch.chdir(tmp_path)
    return made


def make_point(sweep, index):
    point = sweep.point(index)
    point.create()
    cluster = {"submit_environment": {}, "executor": "slurm", "nodes": 1, "ranks_per_node": 1}
    point.config.write_text(json.dumps({"name": "demo", "cluster": cluster}), encoding="utf-8")


def ran(sweep, index, task, raw_id, status):
    """What the task leaves in its point: a failing rank leaves its exception."""
    point = sweep.point(index)
    array, number = task.split("_")
    environ = {"SLURM_JOB_ID": raw_id, "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": number}
    begin_attempt(point, environ)
    (point.submitit / f"{task}_submitted.pkl").touch()
    point.rank_log(0).write_text(f"rank 0 of point {index}\n", encoding="utf-8")
    if status:
        error = failures.RankError(0, "n1", 10**18 + index, "RuntimeError", f"loss is nan at step {index}", [], [])
        failures.write(error, failures.error_file(failures.attempt_folder(point, environ), 0))
    with point.exit_status.open("a", encoding="utf-8") as file:
        file.write(f"{task} {status}\n")


def row(job_id, raw_id, state, command=""):
    values = [
        job_id,
        raw_id,
        "demo",
        "",
        state,
        "None",
        "N/A",
        "2026-01-02T03:05:00",
        "N/A",
        "0:10",
        "n1",
        "1",
        command,
    ]
    return SEPARATOR.join(values)


def accounted(job_id, raw_id, state, command=""):
    values = [
        job_id,
        raw_id,
        "demo",
        "",
        state,
        "None",
        *["2026-01-02T03:05:00"] * 3,
        "0:10",
        "n1",
        "1",
        "1:0",
        "1:0",
    ]
    return SEPARATOR.join([*values, command])


def all_rows(sweep, again="RUNNING"):
    script = str(sweep.submission_script(0))
    states = (("7_0", "70", "COMPLETED"), ("7_1", "71", "FAILED"), ("7_2", "72", "FAILED"), ("7_3", "7", "FAILED"))
    return [row(*each, script) for each in (*states, ("9_1", "9", again))]


def ask_jobs(*arguments):
    return subprocess.run([sys.executable, "-m", "hpcmm.jobs", *arguments], capture_output=True, text=True, check=False)


def test_the_points_of_a_sweep_stand_side_by_side_with_those_that_were_refused(sweep, slurm):
    slurm.answers("squeue", *all_rows(sweep))
    ledger = read_ledger(sweep.root)
    ledger.refused.append(RefusedEntry(["train.seed=9"], "train.seed is 9, which is unlucky:\nset it to 8."))
    ledger.write()
    for rank in range(2):
        with MetricsWriter(sweep.point(0).rank_metrics(rank)) as metrics:
            metrics.resume(0)
            counted = {"comm_bytes_data": 2e6 * (1 + rank), "comm_bytes_data_x_sequence": 5e5}
            for step, (step_s, more) in enumerate([(9.0, {}), (4.0, counted), (0.5, {}), (0.25, {}), (0.5, {})]):
                numbers = {"samples": 8, "input_tokens": 1000, "peak_memory_bytes": 3e8, "step_s": step_s}
                metrics.step(step, loss=2.5, **more, **numbers)
    done = ask_jobs("table", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split("  +", line.strip()) for line in done.stdout.splitlines()]
    assert lines[0] == [
        "point", "overrides", "state", "step s", "tokens/s", "samples/s", "data MB", "data x sequence MB", "peak MB",
        "loss",
    ]  # fmt: skip
    # 4 steps after the first, of 5.25 s, on both ranks
    assert lines[1] == ["0000", "train.seed=0", "COMPLETED", "0.5", "1,524", "12.2", "3", "0.5", "300", "2.5000"]
    assert lines[2] == ["0001", "train.seed=1", "RUNNING"]
    assert lines[5] == ["train.seed=9", "REFUSED", "train.seed is 9, which is unlucky: set it to 8."]
    assert lines[-1] == ["why one failed: python -m hpcmm.jobs why demo"]
    rows = json.loads(ask_jobs("table", "demo", "--json").stdout)["rows"]
    assert [row["state"] for row in rows] == ["COMPLETED", "RUNNING", "FAILED", "FAILED", "REFUSED"]
    assert rows[0]["comm_bytes"] == {"data": 3e6, "data_x_sequence": 5e5}
    assert (rows[0]["step_s"], rows[0]["loss"]) == (0.5, 2.5)


def shown(asked, runs_root="runs"):
    (state,) = states_of([find_targets(asked, Path(runs_root))[0]])
    return {job.job_id: job.state for job in state.jobs}


@pytest.mark.parametrize(
    "asked",
    [
        f"{NAME}/0001", "demo/0001", "demo-2026/0001", "demo/1", "latest/0001", "latest/0001/", "runs/latest/0001",
        f"runs/{NAME}/0001", f"runs/{NAME}/0001/", f"./runs/{NAME}/0001", "{root}/0001", "~/runs/latest/0001",
    ],
)  # fmt: skip
def test_a_point_is_found_by_every_way_to_write_it_and_means_its_newest_job(sweep, monkeypatch, asked):
    monkeypatch.setenv("HOME", str(sweep.root.parent.parent))
    (target,) = find_targets(asked.format(root=sweep.root), sweep.root.parent)
    assert (target.run, target.job_ids, target.sweep) == (sweep.point(1), ("9_1",), None)


@pytest.mark.parametrize(("asked", "index", "job_id"), [("7_1", 1, "7_1"), ("9_1", 1, "9_1"), ("72", 2, "72")])
def test_a_task_is_found_by_both_of_its_numbers_and_is_that_job_alone(sweep, asked, index, job_id):
    (target,) = find_targets(asked, sweep.root.parent)
    assert (target.run, target.job_ids) == (sweep.point(index), (job_id,))


@pytest.mark.parametrize("asked", ["demo", NAME, "demo-20260102-03", "latest", "latest/", f"runs/{NAME}/ledger.json"])
def test_a_sweep_means_the_newest_job_of_each_point(sweep, asked):
    (target,) = find_targets(asked, sweep.root.parent)
    assert target.run == sweep.shared
    assert list(target.tasks) == ["7_0", "9_1", "7_2", "7_3"]


def test_a_point_that_a_sweep_lacks_is_named(sweep):
    with pytest.raises(HpcmmError, match="has no point 0004; its points are 0000 to 0003"):
        find_targets("demo/0004", sweep.root.parent)
    single = RunDir(sweep.root.parent / "single-20260102-030405-1a2b")
    single.create()
    single.submission_script.touch()
    with pytest.raises(HpcmmError, match="is a single run, which has no points"):
        find_targets("single/0001", sweep.root.parent)


def test_a_job_that_waits_is_newer_than_one_that_has_run(sweep):
    """Only a job that has started leaves a file of its own."""
    (target,) = find_targets("demo/0001", sweep.root.parent)
    assert target.job_ids == ("9_1",)
    (sweep.point(1).submitit / "11_1_submitted.pkl").touch()  # submitted by hand since
    os.utime(sweep.ledger, (1, 1))
    (target,) = find_targets("demo/0001", sweep.root.parent)
    assert target.job_ids == ("11_1",)


def test_an_array_s_number_means_that_array_and_a_point_its_own_job(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep))
    assert shown("demo") == {"7_0": "COMPLETED", "9_1": "RUNNING", "7_2": "FAILED", "7_3": "FAILED"}
    assert shown("7") == {"7_0": "COMPLETED", "7_1": "FAILED", "7_2": "FAILED", "7_3": "FAILED"}
    assert shown("9") == {"9_1": "RUNNING"}
    assert shown("demo/0001") == {"9_1": "RUNNING"}
    assert shown("7_1") == {"7_1": "FAILED"}
    assert shown("71") == {"7_1": "FAILED"}


def test_the_status_of_a_point_is_one_row_and_that_of_a_sweep_sums_up(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep))
    one = ask_jobs("status", "latest/0001")
    assert [line.split()[0] for line in one.stdout.splitlines()] == ["job", "9_1"]
    assert one.stdout.rstrip().endswith(f"{NAME}/0001")
    assert ask_jobs("status", "demo").stdout.splitlines()[-1] == "2 FAILED, 1 COMPLETED, 1 RUNNING"
    told = json.loads(ask_jobs("status", "demo", "--json").stdout)["targets"][0]
    assert told["counts"] == {"FAILED": 2, "COMPLETED": 1, "RUNNING": 1}


def test_a_run_that_ended_because_it_had_settled_says_so(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep))
    write_settled(sweep.point(0), Settled(1840, "loss has not fallen by 0.01 in 200 steps"))
    lines = ask_jobs("status", "demo/0000").stdout.splitlines()
    assert lines[-1] == "  settled after step 1840: loss has not fallen by 0.01 in 200 steps"
    counted = ask_jobs("status", "demo").stdout.splitlines()[-1]
    assert counted == "2 FAILED, 1 COMPLETED, 1 RUNNING; 1 of them settled before the last step"
    (told,) = json.loads(ask_jobs("status", "demo/0000", "--json").stdout)["targets"][0]["jobs"]
    assert told["settled"] == {"steps_done": 1840, "reason": "loss has not fallen by 0.01 in 200 steps"}
    (other,) = json.loads(ask_jobs("status", "demo/0001", "--json").stdout)["targets"][0]["jobs"]
    assert other["settled"] is None


@pytest.mark.parametrize("unknown", ["nosuch", "demo/0009"])
def test_what_is_not_known_hides_no_state_of_what_is(slurm, sweep, unknown):
    slurm.answers("squeue", *all_rows(sweep))
    told = ask_jobs("status", unknown, "demo/0001", "latest/0000")
    assert [line.split()[0] for line in told.stdout.splitlines() if "_" in line.split()[0]] == ["9_1", "7_0"]
    assert unknown.rpartition("/")[2] in told.stderr
    assert told.returncode == 1
    in_json = json.loads(ask_jobs("status", unknown, "demo/0001", "--json").stdout)
    assert [each["asked"] for each in in_json["targets"]] == ["demo/0001"]
    assert unknown.rpartition("/")[2] in in_json["notes"][0]


def test_tasks_that_wait_together_are_told_apart(slurm, sweep):
    slurm.answers("squeue", row("7_[0-3%2]", "7", "PENDING", str(sweep.submission_script(0))))
    assert shown("demo/0002") == {"7_2": "PENDING"}
    assert shown("demo")["7_2"] == "PENDING"
    assert shown("7") == {"7_[0-3%2]": "PENDING"}


def test_of_an_array_that_is_asked_for_its_tasks_are_no_question_of_their_own(slurm, sweep):
    """squeue would show of tasks that wait only those that are asked for by their numbers."""
    slurm.answers("squeue", *all_rows(sweep))
    states_of([find_targets(asked, sweep.root.parent)[0] for asked in ("7_2", "7")])
    assert "--jobs=7 " in slurm.called("squeue")[0]


def test_tasks_that_left_the_queue_before_their_siblings_are_told_by_sacct(slurm, sweep):
    slurm.answers("squeue", all_rows(sweep)[-1])
    slurm.answers(
        "sacct", *(accounted(f"7_{n}", f"7{n}", "TIMEOUT") for n in range(4)), accounted("9_1", "9", "PENDING")
    )
    assert shown("demo") == {"7_0": "TIMEOUT", "9_1": "RUNNING", "7_2": "TIMEOUT", "7_3": "TIMEOUT"}
    assert len(slurm.called("squeue")) == len(slurm.called("sacct")) == 1


def test_what_slurm_forgot_is_told_by_the_points(slurm, sweep):
    slurm.answers("squeue", all_rows(sweep)[-1])
    assert shown("demo") == {"7_0": "COMPLETED", "9_1": "RUNNING", "7_2": "FAILED", "7_3": "FAILED"}


def test_tasks_that_were_cancelled_together_have_one_row_without_a_task(slurm, sweep):
    slurm.answers("squeue", row("7", "7", "CANCELLED"), all_rows(sweep)[-1])
    for index in range(4):
        sweep.point(index).exit_status.unlink()
        for each in sweep.point(index).failures.rglob("*.json"):
            each.unlink()
    assert shown("demo") == {"7_0": "CANCELLED", "9_1": "RUNNING", "7_2": "CANCELLED", "7_3": "CANCELLED"}


@pytest.fixture
def cancelled(slurm, sweep):
    """Accounting of an array that was cancelled, of which one task had not started."""
    script = f"sbatch {sweep.submission_script(0)}"
    own = [accounted(f"7_{n}", f"7{n}", "CANCELLED by 0", script) for n in range(3)]
    slurm.answers("sacct", accounted("7_[0-3%3]", "7", "CANCELLED by 0", script), *own)


@pytest.mark.parametrize("asked", ["7", "demo"])
def test_a_task_counts_once_though_accounting_keeps_the_range_that_it_waited_in(slurm, sweep, cancelled, asked):
    Ledger(sweep, [LedgerPoint(i, [], f"{i:04d}", ["7"]) for i in range(4)]).write()
    assert shown(asked) == {f"7_{n}": "CANCELLED" for n in range(4)}
    assert ask_jobs("status", asked).stdout.splitlines()[-1] == "4 CANCELLED"
    assert lines_of(explain(find_targets(asked, sweep.root.parent)[0]))[0].endswith(": 4 points: 4 failed.")


def test_a_task_of_the_queue_and_one_of_accounting_count_before_a_range(slurm, sweep, cancelled):
    script = str(sweep.submission_script(0))
    slurm.answers("squeue", row("7_1", "71", "RUNNING", script))
    assert shown("7") == {"7_0": "CANCELLED", "7_1": "RUNNING", "7_2": "CANCELLED", "7_3": "CANCELLED"}
    slurm.answers("squeue", row("7_[1-3%3]", "7", "PENDING", script).replace("N/A", "2026-01-02T03:05:00", 1))
    assert shown("7")["7_3"] == "PENDING"


def test_the_same_number_s_older_array_tells_nothing_of_tasks_that_wait(slurm, sweep, cancelled):
    script = str(sweep.submission_script(0))
    slurm.answers("squeue", row("7_[0-3%3]", "7", "PENDING", script).replace("N/A", "2026-01-03T03:05:00", 1))
    assert shown("7") == {"7_[0-3%3]": "PENDING"}


def test_listing_jobs_that_are_over_shows_a_task_once(slurm, sweep, cancelled):
    told = json.loads(ask_jobs("list", "--since", "now-1day", "--json").stdout)["jobs"]
    assert sorted(job["job_id"] for job in told) == ["7_0", "7_1", "7_2", "7_3"]


COMPONENTS = [row("19+0", "19", "RUNNING"), row("19+1", "20", "RUNNING")]


@pytest.mark.parametrize(
    ("asked", "known", "ids"),
    [("19", ["19+0", "19+1"], ["19"]), ("20", ["19+1"], ["19+1"]), ("19+1", ["19+1"], ["19+1"])],
)
def test_a_number_of_a_heterogeneous_job_means_all_of_it_or_one_component(slurm, sweep, asked, known, ids):
    slurm.answers("squeue", *COMPONENTS)
    assert list(shown(asked)) == known
    assert cancel(asked, find_targets(asked, sweep.root.parent)).ids == ids
    assert slurm.called("scancel") == [f"scancel {ids[0]}"]
    slurm.answers("squeue")
    slurm.answers("sacct", accounted("19+0", "19", "COMPLETED"), accounted("19+1", "20", "FAILED"))
    assert list(shown(asked)) == known
    assert explain(find_targets(asked, sweep.root.parent)[0]).evidence.job.job_id == "19+1"


@pytest.mark.parametrize(("asked", "state", "which"), [("20", "PENDING", "waits"), ("19+0", "RUNNING", "leads")])
def test_a_component_that_slurm_does_not_cancel_alone_is_refused_with_the_whole_job_s_number(
    slurm, sweep, asked, state, which
):
    slurm.answers("squeue", *(each.replace("RUNNING", state) for each in COMPONENTS))
    with pytest.raises(HpcmmError, match=rf"component of job 19 that {which}.*: python -m hpcmm.jobs cancel 19$"):
        cancel(asked, find_targets(asked, sweep.root.parent))
    assert slurm.called("scancel") == []


def test_what_hpcmm_cancelled_before_it_started_is_told_though_slurm_forgot_it(slurm, sweep):
    script = str(sweep.submission_script(0))
    for index in (2, 3):
        sweep.point(index).exit_status.unlink()
    slurm.answers("squeue", row("7_[2-3%2]", "7", "PENDING", script))
    cancel("demo/0002", find_targets("demo/0002", sweep.root.parent))
    slurm.answers("squeue")
    assert shown("demo/0002") == {"7_2": "CANCELLED"}
    assert shown("demo")["7_2"] == "CANCELLED"
    told = "\n".join(lines_of(explain(find_targets("7_2", sweep.root.parent)[0])))
    assert "Slurm:    CANCELLED, by run directory" in told


@pytest.mark.parametrize(("asked", "noted"), [("19", "19 0\n"), ("20", "19+1 0\n")])
def test_of_a_heterogeneous_job_what_was_cancelled_is_noted_by_the_number_that_its_run_has(slurm, sweep, asked, noted):
    made = RunDir(sweep.root.parent / "mixed-20260102-030405-1a2b")
    made.create()
    made.submission_script.touch()
    components = [("19+0", "19"), ("19+1", "20")]
    slurm.answers("squeue", *(row(*each, "RUNNING", str(made.submission_script)) for each in components))
    cancel(asked, find_targets(asked, sweep.root.parent), patience_s=0)
    assert made.cancelled.read_text() == noted


def test_tasks_that_wait_together_are_noted_as_cancelled_in_one_line(slurm, sweep):
    slurm.answers("squeue", row("7_[2-3%2]", "7", "PENDING", str(sweep.submission_script(0))))
    cancel("7", find_targets("7", sweep.root.parent), patience_s=0)
    assert sweep.shared.cancelled.read_text() == "7_[2-3] 0\n"


def test_a_cancellation_that_cannot_be_noted_is_said_so(slurm, sweep, capsys):
    sweep.shared.cancelled.mkdir()
    slurm.answers("squeue", *all_rows(sweep))
    assert cancel("demo/0001", find_targets("demo/0001", sweep.root.parent), patience_s=0).ids == ["9_1"]
    assert "hpcmm.jobs: The cancellation could not be noted ([Errno 21] Is a directory" in capsys.readouterr().err


def test_a_number_that_no_job_has_names_the_run_that_is_called_so(slurm, sweep):
    made = RunDir(sweep.root.parent / "123-20260102-030405-1a2b")
    made.create()
    made.submission_script.touch()
    hint = f"A number means a job; the run of that name is {made.root.name}: give its whole name."
    for command in ("status", "cancel", "why", "logs"):
        done = ask_jobs(command, "123")
        assert (done.returncode, hint in done.stdout + done.stderr) == (1, True)
    assert "never queued, was cancelled before it started, or Slurm has forgotten it" in ask_jobs("status", "8").stdout


@pytest.mark.parametrize(("moves", "became"), [(True, "running"), (False, "hanging")])
def test_why_of_a_sweep_asks_the_ranks_of_points_that_run(slurm, sweep, monkeypatch, moves, became):
    slurm.answers("squeue", row("9_1", "9", "RUNNING"))
    slurm.answers("sacct", *all_rows(sweep))
    ranks = Ranks([], [], moves=moves, quiet_s=200.0)
    monkeypatch.setattr("hpcmm.jobs.why.ask_ranks", lambda evidence: (evidence, ranks))
    (target,) = find_targets("demo", Path("runs"))
    told = explain(target)
    assert told.counts[became] == 1
    (point,) = [point for point in values_of(told)["points"] if point["point"] == "0001"]
    assert (point["failed"], point["ranks"]["moves"]) == (not moves, moves)
    assert ("running:  0001: the ranks move" in lines_of(told)) == moves


def test_why_a_sweep_failed_is_its_first_failure_and_the_others_by_kind(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep))
    explanation = explain(find_targets("demo", sweep.root.parent)[0])
    lines = lines_of(explanation)
    assert lines[0] == f"sweep {NAME}: 4 points: 2 failed, 1 completed, 1 running."
    assert lines[1] == "job 7_2 (0002): exception"
    assert "what:     RuntimeError: loss is nan at step 2" in lines
    assert "values:   train.seed=2" in lines
    assert "alike:    0003" in lines
    assert "values:   0003: train.seed=3" in lines
    told = values_of(explanation)
    assert (told["failed"], told["job_id"], told["first"]["rank"]) == (True, "7_2", 0)
    assert {each["point"]: (each["state"], each["failed"]) for each in told["points"]} == {
        "0000": ("COMPLETED", False), "0001": ("RUNNING", False), "0002": ("FAILED", True), "0003": ("FAILED", True),
    }  # fmt: skip
    assert len(slurm.called("squeue")) == 1


def test_an_old_failure_of_a_point_that_has_completed_since_counts_no_more(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep, again="COMPLETED"))
    for index in (2, 3):
        with sweep.point(index).exit_status.open("a") as file:
            file.write(f"9_{index} 0\n")
    Ledger(sweep, [LedgerPoint(i, [], f"{i:04d}", ["7", "9"] if i else ["7"]) for i in range(4)]).write()
    done = ask_jobs("why", "demo")
    assert done.returncode == 1
    assert "4 points: 4 completed." in done.stdout
    assert ask_jobs("why", "demo/0001").stdout == "job 9_1 (0001): COMPLETED. Nothing has failed.\n"
    assert "RuntimeError: loss is nan at step 1" in ask_jobs("why", "7_1").stdout


def test_points_that_were_never_submitted_are_counted(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep))
    Ledger(sweep, [LedgerPoint(i, [], f"{i:04d}", [] if i > 1 else ["7"]) for i in range(4)]).write()
    for index in (2, 3):
        for each in sweep.point(index).submitit.iterdir():
            each.unlink()
    assert ask_jobs("status", "demo").stdout.splitlines()[-1] == "1 COMPLETED, 1 FAILED, 2 never submitted"
    assert "4 points: 1 failed, 1 completed, 2 never submitted." in ask_jobs("why", "demo").stdout


def test_the_logs_of_a_sweep_name_the_point_and_those_without_logs(slurm, sweep):
    sweep.point(3).rank_log(0).unlink()
    slurm.answers("squeue", *all_rows(sweep))
    done = ask_jobs("logs", "demo")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"[{index:04d}/0] rank 0 of point {index}" for index in range(3)]
    assert done.stderr == "hpcmm.jobs: No logs yet of point 0003.\n"
    assert ask_jobs("logs", "7_2").stdout == "[0] rank 0 of point 2\n"
    assert ask_jobs("logs", "72").stdout == "[0] rank 0 of point 2\n"
    assert ask_jobs("logs", "9").stdout == "[0001/0] rank 0 of point 1\n"
    for index in range(3):
        sweep.point(index).rank_log(0).unlink()
    nothing = ask_jobs("logs", "demo")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert nothing.stderr == f"hpcmm.jobs: {sweep.root} holds no logs: its job has not started.\n"


def test_following_a_sweep_s_logs_ends_with_its_last_point(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep, again="COMPLETED"))
    sweep.point(1).rank_log(0).write_text("a line without an end")
    done = ask_jobs("logs", "demo", "-f", "-n", "0")
    assert (done.returncode, done.stdout) == (0, "[0001/0] a line without an end\n")


@pytest.mark.parametrize(
    ("asked", "ids"), [("demo/0001", ["9_1"]), ("9_1", ["9_1"]), ("demo", ["9_1", "7_[2-3]"]), ("7_3", ["7_3"])]
)
def test_cancelling_a_point_touches_no_sibling(slurm, sweep, asked, ids):
    script = str(sweep.submission_script(0))
    slurm.answers("squeue", row("7_0", "70", "COMPLETED", script), row("7_[2-3%2]", "7", "PENDING", script),
                  row("9_1", "9", "RUNNING", script))  # fmt: skip
    assert sorted(cancel(asked, find_targets(asked, sweep.root.parent), patience_s=0).ids) == sorted(ids)
    assert sorted(slurm.called("scancel")[0].split()[1:]) == sorted(ids)


def test_an_array_that_has_the_sweep_s_number_now_is_not_touched(slurm, sweep):
    others = "/shared/runs/other-20260303-030405-1a2b/submission.sh"
    slurm.answers("squeue", *(row(f"7_{n}", f"8{n}", "RUNNING", others) for n in range(4)))
    assert shown("demo") == {"7_0": "COMPLETED", "7_2": "FAILED", "7_3": "FAILED"}  # by the points' own records
    for asked in ("demo", "demo/0002"):
        with pytest.raises(HpcmmError, match="Nothing to cancel"):
            cancel(asked, find_targets(asked, sweep.root.parent))
    assert slurm.called("scancel") == []


def test_of_a_sweep_that_is_over_there_is_nothing_to_cancel(slurm, sweep):
    slurm.answers("squeue", *all_rows(sweep, again="COMPLETED"))
    with pytest.raises(HpcmmError, match="no point of demo waits or runs"):
        cancel("demo", find_targets("demo", sweep.root.parent))


def test_only_the_points_that_are_named_are_submitted_once_more(slurm, sweep, capsys, monkeypatch):
    monkeypatch.setattr("hpcmm.config.config_file.load", lambda _: config())
    rows = all_rows(sweep)
    slurm.answers("squeue", *rows)
    slurm.answers("sbatch", "Submitted batch job 12")
    for asked, tasks in (("demo/0002", "2"), ("latest", "3"), ("7", ""), ("demo/0000", ""), ("9", "")):
        assert launch(["resubmit", asked]) == 0
        said = capsys.readouterr().out
        if tasks:
            assert "job id:         12, an array of 1 task\n" in said
            assert f"--array={tasks} " in slurm.called("sbatch")[-1]
            rows.append(row(f"12_{tasks}", f"12{tasks}", "PENDING", str(sweep.submission_script(0))))
            slurm.answers("squeue", *rows)
        else:
            assert "No point has failed" in said
    assert len(slurm.called("sbatch")) == 2
    assert launch(["resubmit", "77"]) == 1
    assert "Job 77 is of no known sweep" in capsys.readouterr().err


def test_points_that_run_again_are_told_with_their_values_and_the_code_that_they_run(slurm, sweep, capsys, monkeypatch):
    monkeypatch.setattr("hpcmm.config.config_file.load", lambda _: config())
    points = [LedgerPoint(i, ["task.args=[--lr, '1e-3']", f"train.seed={i}"], f"{i:04d}", ["7"]) for i in range(4)]
    Ledger(sweep, points).write()
    slurm.answers("squeue", *all_rows(sweep))
    slurm.answers("sbatch", "Submitted batch job 12")
    sweep.shared.code.mkdir()
    assert launch(["resubmit", "demo/0002"]) == 0
    said = capsys.readouterr().out
    assert "point    2:     task.args=[--lr, '1e-3'], train.seed=2\n" in said
    assert said.count(f"{sweep.shared.code}, as first submitted; changed code needs a new launch") == 1


@pytest.mark.parametrize(("state", "reason"), [("COMPLETED", "JobArrayTaskLimit"), ("TIMEOUT", "TimeLimit")])
def test_a_job_that_is_over_waits_for_nothing(state, reason):
    (_, line) = _job_lines([Job("7", "7", state=state, reason=reason)])
    assert reason not in line


def test_who_cancelled_a_job_is_shown():
    assert "by 1000" in _job_lines([Job("7", "7", state="CANCELLED", reason="by 1000")])[1]
    assert "Resources" not in _job_lines([Job("7", "7", state="CANCELLED", reason="Resources")])[1]
    assert "Resources" in _job_lines([Job("7", "7", state="PENDING", reason="Resources")])[1]


def config():
    from hpcmm.config.compose import compose_run

    return compose_run(["cluster=slurm", "task=function", "task.target=a:b"])


def test_analysis_evaluation_and_server_find_a_point_by_the_same_names(sweep):
    sweep.point(2).newest_checkpoint.write_text("step_1")
    for asked in ("demo/0002", "latest/0002", "7_2", "72", f"runs/{NAME}/0002"):
        assert find_folder(Path(asked)).resolve() == sweep.point(2).root
        assert find_served_run(asked, sweep.root.parent) == sweep.point(2)
        assert [each.run for each in find_runs([Path(asked)])[0]] == [sweep.point(2)]
    with pytest.raises(HpcmmError, match=f"is a sweep: name one of its points, such as {NAME}/0000"):
        find_served_run("demo", sweep.root.parent)
    with pytest.raises(HpcmmError, match="has no point 0009"):
        find_folder(Path("demo/0009"))
    assert find_folder(Path("nothing")) == Path("nothing")


def test_the_tasks_of_a_row_are_written_out():
    assert tasks_in("7_[0-2,5-9:2%4]") == ["7_0", "7_1", "7_2", "7_5", "7_7", "7_9"]
    assert tasks_in("7_3") == ["7_3"]
    assert tasks_in("7") == ["7"]
