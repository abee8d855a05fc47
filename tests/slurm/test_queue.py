"""What squeue and sacct answer, and the runs that a user means."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from shlex import quote

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.errors import HpcmmError
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import default_environment, find_targets, slurm_environment
from hpcmm.jobs.state import states_of
from hpcmm.ranges import count_tasks, tasks_in
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import job_ids_of
from hpcmm.slurm.commands import node_states
from hpcmm.slurm.jobs import (
    Job,
    UnknownJobError,
    account_of,
    find_job,
    find_jobs,
)
from hpcmm.slurm.polling import LONGEST_S, Poller

SEPARATOR = "\x1f"


def squeue_row(job_id="7", raw_id="7", state="RUNNING", command="(null)", started="2026-01-01T00:00:00"):
    values = [job_id, raw_id, "run", "me", state, "None", "N/A", started, "N/A", "0:10", "n[1-2]", "2", command]
    return SEPARATOR.join(values)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins whose answers a test writes, to see what is made of them; they log how often they are called."""
    return Slurm(tmp_path, monkeypatch)


class Slurm:
    def __init__(self, folder, monkeypatch):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.calls = folder / "calls"
        self.calls.touch()
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        for name in ("squeue", "sacct", "scancel", "sinfo"):
            self.answers(name)

    def answers(self, name, *lines, complaint=""):
        (self.folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        end = f"echo {complaint!r} >&2; exit 1" if complaint else f"cat {quote(str(self.folder))}/{name}.txt"
        script = f'#!/bin/sh\necho {name} "$@" >> {quote(str(self.calls))}\n{end}\n'
        (self.folder / name).write_text(parted_as_asked(script), encoding="utf-8")
        (self.folder / name).chmod(0o755)

    def called(self, name):
        return [line for line in self.calls.read_text().splitlines() if line.startswith(name)]


def make_run(root, name="run-20260101-000000-1a2b", job_id="7", environment=None):
    run = RunDir(root / name)
    run.create()
    cluster = {"submit_environment": environment or {}, "executor": "slurm", "nodes": 1, "ranks_per_node": 2}
    run.config.write_text(json.dumps({"cluster": cluster}), encoding="utf-8")
    run.submission_script.touch()
    if job_id:
        (run.submitit / f"{job_id}_submitted.pkl").touch()
    return run


def test_many_jobs_take_one_call_of_squeue_and_at_most_one_of_sacct(slurm):
    slurm.answers("squeue", *(squeue_row(str(number), str(number)) for number in range(50)))
    found = find_jobs([str(number) for number in range(60)])
    assert len(found.jobs) == 50
    assert len(slurm.called("squeue")) == len(slurm.called("sacct")) == 1
    assert "--jobs=50,51" in slurm.called("sacct")[0]


def test_names_with_separators_and_odd_rows_do_no_harm(slurm):
    slurm.answers("squeue", squeue_row(command="/a b/it's|x/submission.sh"), "slurm_load: odd", "")
    (job,) = find_jobs(["7"]).jobs
    assert job.command == "/a b/it's|x/submission.sh"
    assert (job.state, job.nodes, job.ended, job.reason) == ("RUNNING", "n[1-2]", "", "")


def test_without_sacct_what_the_queue_knows_is_told_and_a_note(slurm):
    slurm.answers("squeue", squeue_row())
    slurm.answers("sacct", complaint="Slurm accounting storage is disabled")
    found = find_jobs(["7", "8"])
    assert [job.job_id for job in found.jobs] == ["7"]
    assert "accounting storage is disabled" in found.notes[0]


def test_a_controller_that_is_silent_is_one_sentence(slurm):
    slurm.answers("squeue", complaint="slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(HpcmmError, match=r"squeue failed .*Unable to contact"):
        find_jobs(["7"])


@pytest.mark.parametrize(
    ("job_id", "tasks"),
    [
        ("7", 1),
        ("7_3", 1),
        ("7_[0-999]", 1000),
        ("7_[0-2,4-999%5]", 999),
        ("7_[0-10:5]", 3),
        ("7_[8]", 1),
        ("7_[x]", 1),
    ],
)
def test_the_tasks_of_an_array_are_counted(job_id, tasks):
    assert count_tasks(job_id) == tasks


def test_arrays_of_millions_of_tasks_in_the_queue_are_not_spread_into_their_tasks(slurm, monkeypatch):
    def spread(job_id):
        assert count_tasks(job_id) == 1
        return tasks_in(job_id)

    for module in ("jobs.state", "slurm.jobs"):
        monkeypatch.setattr(f"hpcmm.{module}.tasks_in", spread)
    others = [squeue_row(f"{number}_[0-9999998]", str(number), "PENDING") for number in range(700, 1000)]
    slurm.answers("squeue", squeue_row("7_[0-9999998]", "7", "PENDING"), *others)
    assert cancel("7_4000", find_targets("7_4000", Path("runs"))).ids == ["7_4000"]
    assert account_of(find_jobs(["7", "700"]).jobs) == {}


@pytest.mark.parametrize("state", ["REQUEUE_FED", "EXPEDITING", "POWERED_BY_A_NEWER_SLURM", "", "RUNNING"])
def test_whatever_squeue_shows_in_no_state_that_ends_a_job_is_active(slurm, state):
    slurm.answers("squeue", squeue_row(state=state))
    (job,) = find_jobs(["7"]).jobs
    assert job.active


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED by 0", "LAUNCH_FAILED", "OUT_OF_MEMORY", "REVOKED"])
def test_a_known_end_is_none(slurm, state):
    slurm.answers("squeue", squeue_row(state=state))
    assert not any(job.active for job in find_jobs(["7"]).jobs)


def test_a_run_is_found_by_its_directory_its_name_and_the_start_of_it(tmp_path):
    old = make_run(tmp_path / "runs", "run-1", "3")
    new = make_run(tmp_path / "runs", "run-2", "9")
    os.utime(old.submission_script, (1, 1))
    (tmp_path / "runs" / "latest").symlink_to("run-2")
    for asked in (str(new.root), "run-2", "latest"):
        (target,) = find_targets(asked, tmp_path / "runs")
        assert (target.run.root, target.job_ids) == (new.root, ("9",))
    assert [target.job_ids for target in find_targets("run", tmp_path / "runs")] == [("9",), ("3",)]
    (by_number,) = find_targets("3", tmp_path / "runs")
    assert by_number.run.root == old.root
    with pytest.raises(HpcmmError, match="did you mean run-2"):
        find_targets("rum-2", tmp_path / "runs")


def test_the_jobs_of_a_run_are_those_that_were_submitted_in_it_newest_last(tmp_path):
    run = make_run(tmp_path, job_id="30")
    (run.submitit / "4_7_submitted.pkl").touch()
    os.utime(run.submitit / "30_submitted.pkl", (1, 1))
    assert job_ids_of(run) == ("30", "4_7")


def test_a_run_that_was_never_submitted_is_not_the_newest_of_its_name(tmp_path):
    ghost = make_run(tmp_path, "run-2", job_id=None)
    waits = make_run(tmp_path, "run-1", job_id=None)
    waits.submission.write_text('{"job_id": "9"}', encoding="utf-8")
    os.utime(waits.submission_script, (1, 1))
    assert [(target.run.root.name, target.job_ids) for target in find_targets("run", tmp_path)] == [
        ("run-1", ("9",)),
        ("run-2", ()),
    ]
    for asked, why in ((ghost, "it was never submitted"), (waits, "its job has not started")):
        done = ask_jobs(tmp_path, "logs", str(asked.root))
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr == f"hpcmm.jobs: {asked.root} holds no logs: {why}.\n"


def ask_jobs(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "hpcmm.jobs", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )


def test_only_the_user_s_own_configuration_sets_the_environment_of_slurm_s_commands(tmp_path, monkeypatch):
    run = make_run(tmp_path, environment={"SLURM_CONF": "/site/slurm.conf"})
    assert slurm_environment(run, {})["SLURM_CONF"] == "/site/slurm.conf"
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if run.config.stat().st_uid != 0:
        assert "SLURM_CONF" not in slurm_environment(run, {})
    os.chown(run.config, 4243, -1) if os.getuid() == 0 else None
    assert "SLURM_CONF" not in slurm_environment(run, {})


def test_a_job_that_slurm_forgot_is_told_from_its_run_directory(slurm, tmp_path):
    run = make_run(tmp_path)
    for rank in range(2):
        start = {"event": "start", "rank": rank, "node": "n1", "job_id": "7", "unix_ns": 1}
        run.rank_metrics(rank).write_text(json.dumps(start) + '\n{"event": "end", "unix_ns": 2}\n', encoding="utf-8")
    slurm.answers("squeue", complaint="Invalid job id specified")
    slurm.answers("sacct", complaint="no accounting")
    (state,) = states_of(find_targets(str(run.root), tmp_path))
    assert [(job.state, job.source) for job in state.jobs] == [("COMPLETED", "run directory")]


MUNGE = (
    "squeue: error: If munged is up, restart with --num-threads=10; squeue: error: Munge encode failed: Failed to "
    "access /run/munge/munge.socket.2: No such file; slurm_load_jobs error: Protocol authentication error"
)


def test_while_the_cluster_is_down_the_run_directory_tells_of_ends(slurm, tmp_path):
    conf = tmp_path / "cluster" / "etc" / "slurm.conf"
    conf.parent.mkdir(parents=True)
    (conf.parent.parent / "cluster.json").touch()
    root = tmp_path / "runs"
    well, failed, unknown = (
        make_run(root, f"{name}-1", job_id, {"SLURM_CONF": str(conf)})
        for name, job_id in (("well", "7"), ("failed", "8"), ("unknown", "9"))
    )
    well.exit_status.write_text("7 1\n7 0\n", encoding="utf-8")
    failed.exit_status.write_text("7 0\n8 3\n", encoding="utf-8")
    unknown.exit_status.write_text("9 stopped\n", encoding="utf-8")
    for name in ("squeue", "sacct", "sinfo"):
        slurm.answers(name, complaint=MUNGE)
    silence = "Slurm does not answer (munge does not answer here; make cluster-up starts the local cluster)"
    note = f"hpcmm.jobs: {silence}, so this is what the run directory tells.\n"

    done = ask_jobs(tmp_path, "status", "well", "failed")
    assert (done.returncode, done.stderr) == (0, note)
    assert "COMPLETED" in done.stdout
    assert "FAILED" in done.stdout
    done = ask_jobs(tmp_path, "status", "unknown")
    assert (done.returncode, done.stderr) == (1, note)
    assert "unknown: no end of it is noted" in done.stdout

    done = ask_jobs(tmp_path, "list")
    assert (done.returncode, done.stderr) == (1, note)
    assert str(well.root) in done.stdout
    assert str(failed.root) in done.stdout
    assert str(unknown.root) not in done.stdout

    done = ask_jobs(tmp_path, "why", "failed")
    assert done.returncode == 0
    assert "Slurm:    FAILED, exit code 3:0, by run directory" in done.stdout
    assert f"note: {silence}" in done.stdout
    done = ask_jobs(tmp_path, "why", "unknown")
    assert done.returncode == 1
    assert done.stderr == f"hpcmm.jobs: {silence}, and no run directory tells of an end of unknown.\n"

    done = ask_jobs(tmp_path, "cancel", "unknown")
    assert done.returncode == 1
    assert done.stderr == "hpcmm.jobs: squeue failed (munge does not answer here); the job itself is not affected.\n"


def test_while_the_cluster_is_down_the_points_tell_of_a_sweep(slurm, tmp_path):
    sweep = SweepDir(tmp_path / "runs" / "sweep-1")
    sweep.root.mkdir(parents=True)
    sweep.shared.submission_script.touch()
    points = [{"index": index, "overrides": [], "run": f"{index:04d}", "jobs": ["7"]} for index in range(3)]
    sweep.ledger.write_text(json.dumps({"points": points}), encoding="utf-8")
    for index, status in enumerate((0, 3, None)):
        run = make_run(sweep.root, f"{index:04d}", f"7_{index}")
        if status is not None:
            run.exit_status.write_text(f"7_{index} {status}\n", encoding="utf-8")
    for name in ("squeue", "sacct", "sinfo"):
        slurm.answers(name, complaint=MUNGE)

    done = ask_jobs(tmp_path, "status", "sweep-1", "--json")

    told = [(job["job_id"], job["state"]) for job in json.loads(done.stdout)["targets"][0]["jobs"]]
    assert (done.returncode, told) == (0, [("7_0", "COMPLETED"), ("7_1", "FAILED")])
    assert "No end is noted of 1 point of sweep-1: 0002." in done.stderr
    done = ask_jobs(tmp_path, "why", "sweep-1")
    assert done.returncode == 0
    assert done.stdout.startswith(
        "sweep sweep-1: 3 points: 1 failed, 1 completed, 1 without a known end.\njob 7_1 (0001): "
    )


def test_cancelling_asks_first_and_cancels_only_what_is_active(slurm, tmp_path):
    make_run(tmp_path, "a-1", "7")
    make_run(tmp_path, "a-2", "8")
    slurm.answers("squeue", squeue_row(state="COMPLETED"), squeue_row("8", "8", "PENDING"))
    assert cancel("a", find_targets("a", tmp_path)).ids == ["8"]
    assert slurm.called("scancel") == ["scancel 8"]
    slurm.answers("squeue", squeue_row(), squeue_row("8", "8"))
    with pytest.raises(HpcmmError, match="start of 2 active runs: name one of a-"):
        cancel("a", find_targets("a", tmp_path))
    slurm.answers("squeue", squeue_row(state="FAILED"), squeue_row("8", "8", "TIMEOUT"))
    with pytest.raises(HpcmmError, match=r"Nothing to cancel: job \d of a is over"):
        cancel("a", find_targets("a", tmp_path))
    assert len(slurm.called("scancel")) == 1


def test_a_profiled_run_is_asked_to_stop_before_it_is_cancelled(slurm, tmp_path):
    run = make_run(tmp_path)
    given = json.loads(run.config.read_text(encoding="utf-8"))
    asked = ["scancel --batch --signal=USR2 7", "scancel 7"]
    for name, tool, calls in (("script", "nsys", 1), ("anomaly", None, 1), ("anomaly", "nsys", 2)):
        run.config.write_text(json.dumps(given | {"task": {"name": name}, "profile": {"tool": tool}}), encoding="utf-8")
        slurm.answers("squeue", squeue_row())
        done = cancel("run", find_targets("run", tmp_path), patience_s=0.1)
        assert not done.in_peace
        assert slurm.called("scancel")[-calls:] == asked[-calls:]
    assert len(slurm.called("scancel")) == 4


def test_a_run_that_was_asked_to_stop_is_cancelled_also_if_slurm_falls_silent_meanwhile(slurm, tmp_path):
    run = make_run(tmp_path)
    given = json.loads(run.config.read_text(encoding="utf-8"))
    run.config.write_text(json.dumps(given | {"task": {"name": "anomaly"}, "profile": {"tool": "nsys"}}))
    slurm.answers("squeue", squeue_row())
    (slurm.folder / "silent").write_text(f"#!/bin/sh\necho squeue >> {slurm.calls}\necho 'timed out' >&2; exit 1\n")
    (slurm.folder / "silent").chmod(0o755)
    text = f'#!/bin/sh\necho scancel "$@" >> {slurm.calls}\ncp {slurm.folder}/silent {slurm.folder}/squeue\n'
    (slurm.folder / "scancel").write_text(text)
    assert not cancel("run", find_targets("run", tmp_path), patience_s=2.2).in_peace
    assert len(slurm.called("squeue")) == 2
    assert slurm.called("scancel") == ["scancel --batch --signal=USR2 7", "scancel 7"]


def test_without_slurm_conf_the_newest_run_tells_where_the_cluster_is(tmp_path):
    make_run(tmp_path, environment={"SLURM_CONF": "/site/slurm.conf"})
    assert default_environment(tmp_path, {"SLURM_CONF": "/mine"})["SLURM_CONF"] == "/mine"
    assert default_environment(tmp_path, {})["SLURM_CONF"] == "/site/slurm.conf"


def test_without_any_run_it_is_the_local_cluster_where_that_is_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCMM_CLUSTER_DIR", str(tmp_path))
    assert "SLURM_CONF" not in default_environment(tmp_path, {})
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "slurm.conf").touch()
    if not Path("/etc/slurm/slurm.conf").exists():
        assert default_environment(tmp_path, {})["SLURM_CONF"] == str(tmp_path / "etc" / "slurm.conf")


def test_polling_waits_ever_longer_and_starts_anew_after_a_change():
    clock, asked, states = [0.0], [], ["RUNNING"]

    def ask():
        asked.append(clock[0])
        return Job("7", "7", state=states[0])

    poller = Poller(ask, lambda job: job.state, clock=lambda: clock[0])
    for tick in range(2000):
        clock[0] = tick * 0.5
        if clock[0] == 500:
            states[0] = "COMPLETING"
        poller.poll()
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert len(asked) < 60
    assert max(pauses) <= LONGEST_S + 0.5
    assert pauses[0] < 3
    assert min(pauses[20:]) < 3  # after the change


def test_a_question_without_answer_keeps_the_last_state():
    answers = [Job("7", "7", state="RUNNING")]

    def ask():
        if not answers:
            raise HpcmmError("squeue gave no answer")
        return answers.pop()

    times = iter([0.0, 0.0, 0.0, 100.0, 100.0, 100.0])
    poller = Poller(ask, lambda job: job.state, clock=lambda: next(times))
    poller.poll()
    assert poller.poll().state == "RUNNING"
    assert poller.complaint == "squeue gave no answer"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass while somebody sleeps."""
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda pause_s: now.__setitem__(0, now[0] + pause_s))
    return lambda: now[0]


def test_a_job_that_slurm_does_not_know_is_asked_for_some_seconds_more(clock):
    asked = []

    def ask():
        asked.append(clock())
        if len(asked) > 1:
            raise UnknownJobError("nobody knows it")
        return Job("7", "7", state="RUNNING")

    with pytest.raises(UnknownJobError):
        Poller(ask, lambda job: job.state, clock=clock).wait(lambda job: not job.active)
    assert len(asked) == 6
    assert asked[-1] > 10


def test_waiting_ends_with_the_answer_that_was_waited_for_or_with_its_time(clock):
    states = iter(["PENDING", "RUNNING", "COMPLETED"])

    def ask():
        return Job("7", "7", state=next(states))

    poller = Poller(ask, lambda job: job.state, known=Job("7", "7", state="PENDING"), clock=clock)
    assert poller.wait(lambda job: not job.active, timeout_s=0.1).state == "PENDING"  # nobody was asked
    assert poller.wait(lambda job: not job.active).state == "COMPLETED"


def test_an_answer_that_is_known_already_outlives_a_first_question_that_fails(clock):
    def ask():
        raise HpcmmError("squeue gave no answer")  # by whatever kind of failure

    poller = Poller(ask, lambda job: job.state, known=Job("7", "7", state="RUNNING"), clock=clock)
    assert poller.wait(lambda job: not job.active, timeout_s=60).state == "RUNNING"
    assert poller.complaint == "squeue gave no answer"
    with pytest.raises(HpcmmError, match="squeue gave no answer"):
        Poller(ask, lambda job: job.state, clock=clock).poll()


def test_one_job_is_told_by_squeue_else_by_sacct_and_an_array_by_what_matters_most(slurm):
    slurm.answers("squeue", squeue_row("7_0", "8", "COMPLETED"), squeue_row("7_1", "9", "FAILED"))
    assert find_job("7").state == "FAILED"
    slurm.answers("squeue", squeue_row("7_0", "8", "COMPLETED"), squeue_row("7_[1-9]", "7", "PENDING"))
    assert find_job("7").state == "PENDING"
    assert slurm.called("sacct") == []
    slurm.answers("squeue", complaint="slurm_load_jobs error: Invalid job id specified")
    slurm.answers("sacct", SEPARATOR.join(["7", "7", "run", "me", "CANCELLED by 0", *["Unknown"] * 10]))
    assert (find_job("7").state, find_job("7").reason, find_job("7").source) == ("CANCELLED", "by 0", "sacct")
    slurm.answers("sacct")
    with pytest.raises(UnknownJobError, match="Neither squeue nor sacct knows job 7"):
        find_job("7")
    slurm.answers("sacct", complaint="Slurm accounting storage is disabled")
    with pytest.raises(HpcmmError, match=r"sacct failed .*storage is disabled"):
        find_job("7")


def test_the_states_of_nodes_come_with_their_reasons(slurm):
    slurm.answers("sinfo", "n1\x1fidle\x1fnone", "n2\x1fdown*\x1fNot responding")
    assert node_states("n[1-2]") == {"n1": "idle", "n2": "down* (Not responding)"}
    assert node_states("") == {}


def test_the_command_imports_no_torch(slurm, tmp_path):
    slurm.answers("squeue", *(squeue_row(f"7_{number}", str(number + 10)) for number in range(1000)))
    code = (
        "import sys; from hpcmm.jobs.__main__ import main; status = main(['status', '7']);"
        "import hpcmm.jobs.why; assert not {'torch', 'deepspeed', 'numpy', 'hydra'} & set(sys.modules);"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 (1000 tasks)" in done.stdout
    assert "1000 RUNNING" in done.stdout


@pytest.mark.parametrize("arguments", [["status", "nothing"], ["logs", "nothing"], ["why", "nothing"], ["cancel", ""]])
def test_what_does_not_exist_is_one_sentence(tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.jobs", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "is not a run in" in done.stderr
