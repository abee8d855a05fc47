"""A job is not its number: rows of squeue and sacct count only if they are of the run's own job, on its own cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shlex import quote

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import Target, find_targets
from hpcmm.jobs.state import states_of
from hpcmm.launch.script import Job as ScriptJob
from hpcmm.launch.script import render_analysis_script, render_script
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.runs.submission import JobIdentity, identity_of, write_submission
from hpcmm.slurm.commands import SilentError, ask, cluster_here, node_states, on_cluster
from hpcmm.slurm.jobs import (
    Job,
    UnknownJobError,
    account_of,
    array_states,
    find_job,
    is_same_job,
    job_records,
    own_jobs,
)
from hpcmm.slurm.polling import Poller
from hpcmm.slurm.sbatch import Accepted, accepted_by

SEPARATOR = "\x1f"
SCRIPT = "/runs/old-20260101-120000-1a2b/submission.sh"
OTHERS = "/runs/precious-20260102-120000-3c4d/submission.sh"
NOON, LATER, EARLIER = "2026-01-01T12:00:00", "2026-01-03T12:00:00", "2025-12-01T12:00:00"
NOON_S = time.mktime(time.strptime(NOON, "%Y-%m-%dT%H:%M:%S"))
KNOWN = JobIdentity("7", "", "me", "old", (SCRIPT,), NOON_S - 5, NOON_S)


def row(command="", user="me", name="old", submitted=NOON, state="RUNNING", source="squeue", job_id="7", uid=""):
    return Job(job_id, job_id, name, user, state, submitted=submitted, command=command, uid=uid, source=source)


@pytest.mark.parametrize(
    "same",
    [
        row(SCRIPT),
        row(SCRIPT, submitted=LATER),  # requeued, or submitted once more by hand after the numbers began anew
        row(SCRIPT, name="renamed-by-scontrol"),
        row(f"sbatch --array=0-2 {SCRIPT}", source="sacct"),
        row(f"{SCRIPT} --an-argument"),
        row("/net/home/runs/old-20260101-120000-1a2b/submission.sh"),  # by another path, as an automounter shows it
        row("sbatch ./submission.sh", source="sacct"),
        row("", source="sacct"),  # as of a folder with quotes in its name
        row("", submitted=LATER),
        row("sbatch", source="sacct"),
        row("", user="1000"),  # a user without a name
        row(SCRIPT, uid="1000"),
        row(f"sbatch -p gpu --mail-type END -HN2 --hold {SCRIPT} --an-argument", source="sacct"),
        row("sbatch -p gpu ./submission.sh", source="sacct"),
        row("sbatch old-20260101-120000-1a2b/submission.sh", source="sacct", submitted=LATER),  # by hand, from above
        row("sbatch ../submission.sh", source="sacct"),
        row(f"sbatch --nice --propagate --exclusive {SCRIPT}", source="sacct", submitted=LATER),
        row("  ", source="sacct"),
        row("", submitted=""),
        row("/var/spool/copy-by-the-site", submitted=NOON),  # to the second, by the same user and with the same name
        row(SCRIPT, job_id="7_3"),
    ],
)  # fmt: skip
def test_a_row_with_the_script_or_else_with_user_name_and_time_is_of_the_job(same):
    assert is_same_job(KNOWN, same)


@pytest.mark.parametrize(
    "another",
    [
        row(OTHERS),
        row(OTHERS, submitted=NOON, name="precious"),
        row("/home/me/train.sh", submitted=LATER),
        row("/elsewhere/submission.sh", submitted=LATER),
        row(f"sbatch {OTHERS}", source="sacct", submitted=LATER),
        row("sbatch precious-20260102-120000-3c4d/submission.sh", source="sacct"),
        row("sbatch --wrap=sleep 5", source="sacct", name="wrap"),
        row("", user="you"),
        row(SCRIPT, user="you"),
        row("", name="precious"),
        row("/home/you/evil.sh " + SCRIPT, submitted=LATER),
        row("/home/you/evil.sh runs" + SCRIPT, submitted=LATER),
        row(f"sbatch --hold evil.sh {SCRIPT}", source="sacct", submitted=LATER),
        row(f"sbatch --job-name=old --begin=now+1hour evil.sh {SCRIPT}", source="sacct", submitted=LATER),
        row(f"sbatch -o /dev/null --wrap sleep {SCRIPT}", source="sacct", submitted=LATER),
        row(f"sbatch -o {SCRIPT} evil.sh", source="sacct", submitted=LATER),
        row("", submitted=EARLIER),
        row(SCRIPT, job_id="8"),
    ],
)
def test_a_row_with_another_script_user_or_name_or_from_before_is_another_job_s(another):
    assert not is_same_job(KNOWN, another)


@pytest.mark.parametrize("user", ["me", "nobody", "", "54321"])
def test_a_user_s_number_counts_and_not_the_name_that_slurm_shows(user):
    known = replace(KNOWN, uid=1000)
    assert is_same_job(known, row(SCRIPT, user=user, uid="1000"))
    assert not is_same_job(known, row(SCRIPT, user=user, uid="54321"))
    assert not is_same_job(replace(known, user=""), row(SCRIPT, user=user, uid="54321"))
    of_root = replace(KNOWN, user="root")  # as an older version noted it
    assert not is_same_job(of_root, row(SCRIPT, user=user, uid="54321"))
    assert is_same_job(of_root, row(SCRIPT, user=user, uid="0"))


def test_the_number_of_the_user_is_noted_also_of_one_without_a_name(tmp_path):
    for uid in (0, 54321):
        run = make_run(tmp_path, f"run-{uid}", user="", uid=uid)
        assert (identity_of(run, "7").uid, identity_of(run, "7").user) == (uid, "")


def test_accounting_shows_no_job_as_active_whose_number_squeue_shows_as_another_s(slurm, tmp_path):
    run = make_run(tmp_path, "v3-1", uid=1000)
    slurm.answers("squeue", queued(run, name="v3", command="/home/you/evil.sh", user="nobody", uid="54321"))
    slurm.answers("sacct", accounted(run, name="v3", state="PENDING", user=""))
    with pytest.raises(HpcmmError, match=r"Nothing to cancel: Slurm's job 7 is another job now \(v3, of nobody\)"):
        cancel("v3", find_targets("v3", tmp_path))
    assert slurm.called("scancel") == []


def test_a_clock_of_the_login_node_that_is_ahead_is_no_reason_to_disown_a_job():
    by_own_clock = replace(KNOWN, slurm_submitted_unix_s=None, submitted_unix_s=NOON_S + 300)
    assert is_same_job(by_own_clock, row(""))
    assert not is_same_job(by_own_clock, row("", submitted=EARLIER))
    assert is_same_job(JobIdentity("7"), row("/any/script.sh"))  # of which nothing but the number is known


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, each a script of a test's own, which log how they are called."""
    monkeypatch.delenv("SLURM_CLUSTERS", raising=False)
    conf = tmp_path / "slurm.conf"
    conf.write_text("# a site\nclustername=Small\n", encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    return Slurm(tmp_path, monkeypatch)


class Slurm:
    def __init__(self, folder, monkeypatch):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.calls = folder / "calls"
        self.calls.touch()
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        for name in ("squeue", "sacct", "scancel", "sinfo"):
            self.does(name, "true")

    def does(self, name, shell):
        path = self.folder / name
        script = f'#!/bin/bash\necho {name} "$@" >> {quote(str(self.calls))}\n{shell}\n'
        path.write_text(parted_as_asked(script), encoding="utf-8")
        path.chmod(0o755)

    def answers(self, name, *lines):
        (self.folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.does(name, f"cat {quote(str(self.folder))}/{name}.txt")

    def called(self, name):
        return [line for line in self.calls.read_text(encoding="utf-8").splitlines() if line.split()[0] == name]


def queued(run, job_id="7", raw_id=None, name="run", state="RUNNING", command=None, submitted=NOON, user="me", uid=""):
    command = str(run.submission_script) if command is None else command
    values = [
        job_id,
        raw_id or job_id,
        name,
        user,
        state,
        "None",
        submitted,
        NOON,
        "N/A",
        "0:10",
        "n1",
        "1",
        command,
        uid,
    ]
    return SEPARATOR.join(values)


def accounted(run, job_id="7", name="run", state="COMPLETED", submitted=NOON, user="me", line=None):
    line = f"sbatch {run.submission_script}" if line is None else line
    values = [job_id, job_id, name, user, state, "None", submitted, NOON, NOON, "0:10", "n1", "1", "0:0", "0:0", line]
    return SEPARATOR.join(values)


def make_run(root, name, job_id="7", cluster="", **more):
    run = RunDir(root / name)
    run.create()
    settings = {"name": name, "cluster": {"executor": "slurm", "nodes": 1, "ranks_per_node": 1}}
    run.config.write_text(json.dumps(settings), encoding="utf-8")
    run.submission_script.touch()
    identity = JobIdentity(job_id, cluster, "me", "run", (str(run.submission_script),), NOON_S, NOON_S)
    write_submission(run, replace(identity, **more), job_id=job_id, analysis_job_id=None)
    return run


@pytest.fixture
def reused(slurm, tmp_path):
    """An old run that ended well, and a new one of another user's with the same number, which runs."""
    old, precious = make_run(tmp_path / "runs", "old-1"), make_run(tmp_path / "theirs", "precious-1", user="you")
    old.exit_status.write_text("7 0\n", encoding="utf-8")
    slurm.answers("squeue", queued(precious, name="precious", user="you"))
    return old, precious


def jobs_command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "hpcmm.jobs", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )


ANOTHER = "Slurm's job 7 is another job now (precious, of you)"


def test_the_state_of_a_run_whose_number_is_another_job_s_is_told_by_its_directory(reused, tmp_path, slurm):
    (state,) = states_of(find_targets("old", tmp_path / "runs"))
    assert [(job.state, job.source) for job in state.jobs] == [("COMPLETED", "run directory")]
    assert state.notes == [f"{ANOTHER}, so this is what the run directory of old tells."]
    done = jobs_command(tmp_path, "why", "old")
    assert done.stdout.startswith("job 7 (old-1): COMPLETED.")
    assert ANOTHER in done.stdout
    done = jobs_command(tmp_path, "status", "old")
    assert (done.returncode, "RUNNING" in done.stdout, ANOTHER in done.stderr) == (0, False, True)


def test_accounting_may_still_know_the_run_s_own_job_among_those_of_its_number(reused, tmp_path, slurm):
    old, precious = reused
    slurm.answers(
        "sacct", accounted(old, state="TIMEOUT"), accounted(precious, user="you", state="RUNNING", submitted=LATER)
    )
    (state,) = states_of(find_targets("old", tmp_path / "runs"))
    assert [(job.state, job.source) for job in state.jobs] == [("TIMEOUT", "sacct")]
    assert "--duplicates" in slurm.called("sacct")[0]
    assert state.notes == []


def test_of_a_job_that_was_requeued_the_newest_record_counts(slurm, tmp_path):
    run = make_run(tmp_path, "run-1")
    slurm.answers("sacct", accounted(run, state="COMPLETED", submitted=LATER), accounted(run, state="REQUEUED"))
    assert find_job(identity_of(run, "7")).state == "COMPLETED"


def test_cancelling_a_run_never_cancels_another_job_of_its_number(reused, tmp_path, slurm):
    old, _ = reused
    with pytest.raises(HpcmmError, match=r"Nothing to cancel: job 7 of old is over \(COMPLETED\)"):
        cancel("old", find_targets("old", tmp_path / "runs"))
    old.exit_status.unlink()
    with pytest.raises(HpcmmError, match=r"Nothing to cancel: Slurm's job 7 is another job now \(precious, of you\)"):
        cancel("old", find_targets("old", tmp_path / "runs"))
    assert slurm.called("scancel") == []


def test_two_runs_with_one_number_are_told_apart_in_one_command(slurm, tmp_path):
    old, new = make_run(tmp_path, "old-1"), make_run(tmp_path, "new-1")
    old.exit_status.write_text("7 3\n", encoding="utf-8")
    slurm.answers("squeue", queued(new))
    targets = [find_targets(name, tmp_path)[0] for name in ("old", "new")]
    assert [[job.state for job in state.jobs] for state in states_of(targets)] == [["FAILED"], ["RUNNING"]]
    assert len(slurm.called("squeue")) == 1


def test_a_number_means_the_job_that_slurm_knows_by_it_now(reused, tmp_path, slurm):
    old, precious = reused
    (state,) = states_of(find_targets("7", tmp_path / "runs"))
    assert [job.name for job in state.jobs] == ["precious"]
    assert state.run is not None
    assert state.run.root == precious.root
    slurm.answers("squeue", queued(old, name="not-ours", command="/home/you/job.sh", user="you"))
    (state,) = states_of(find_targets("7", tmp_path / "runs"))
    assert ([job.name for job in state.jobs], state.run) == (["not-ours"], None)
    done = jobs_command(tmp_path, "logs", "7")
    assert done.returncode == 1
    assert "Slurm's job 7 is another job now, and its run directory is not known" in done.stderr
    assert f"for the run that had this number, name {old.root}." in done.stderr
    slurm.answers("squeue")  # nothing has the number now, so the run that had it is meant
    (state,) = states_of(find_targets("7", tmp_path / "runs"))
    assert [(job.state, job.source) for job in state.jobs] == [("COMPLETED", "run directory")]
    assert state.run == old


def test_a_run_of_an_older_version_is_known_by_its_script_and_its_time(slurm, tmp_path):
    run = make_run(tmp_path, "run-1")
    run.submission.write_text(json.dumps({"job_id": "7", "submitted_unix_s": NOON_S}), encoding="utf-8")
    slurm.answers("squeue", queued(run))
    assert states_of(find_targets("run-1", tmp_path))[0].jobs[0].state == "RUNNING"
    for another in (queued(run, command=OTHERS), queued(run, command="(null)", submitted=EARLIER)):
        slurm.answers("squeue", another)
        assert states_of(find_targets("run-1", tmp_path))[0].jobs == []


@pytest.mark.parametrize(
    "damage",
    [
        '{"jobs": [7]}',
        '{"jobs": {"7": 1}}',
        '{"jobs": {"7": {"cluster": "; rm", "user": 1, "submitted_unix_s": "x"}}}',
        "[]",
        "",
    ],
)
def test_a_damaged_record_identifies_no_less_than_the_script(tmp_path, damage):
    run = make_run(tmp_path, "run-1")
    run.submission.write_text(damage, encoding="utf-8")
    assert identity_of(run, "7") == JobIdentity("7", scripts=(str(run.submission_script),))


def test_points_of_a_sweep_are_known_by_what_their_sweep_notes_also_after_they_were_submitted_again(tmp_path):
    sweep = make_run(tmp_path, "sweep-1", "7")
    points = [{"index": index, "overrides": [], "run": f"{index:04d}", "jobs": ["7", "9"]} for index in range(2)]
    SweepDir(sweep.root).ledger.write_text(json.dumps({"points": points}), encoding="utf-8")
    write_submission(sweep, JobIdentity("9", "big", "me"), job_id="9", analysis_job_id=None)
    point = RunDir(sweep.root / "0001")
    point.root.mkdir()
    assert identity_of(point, "9_1").cluster == "big"
    assert identity_of(point, "7_1").scripts == (str(sweep.submission_script),)
    assert identity_of(point, "7_1").slurm_submitted_unix_s == NOON_S


def test_tasks_of_another_array_with_the_number_do_not_keep_a_point_in_the_queue(slurm, tmp_path):
    mine, theirs = make_run(tmp_path, "sweep-1"), make_run(tmp_path, "sweep-2")
    arrays = {"7": identity_of(mine, "7"), "9": identity_of(mine, "9")}
    slurm.answers("squeue", queued(theirs, "7_0", "8"), queued(mine, "9_0", "10"), queued(mine, "9_1", "9"))
    assert array_states(arrays) == {"9_0": "RUNNING", "9_1": "RUNNING"}
    assert array_states({}) == {}


def test_how_tasks_ended_that_the_queue_forgot_is_accounting_s_word(slurm, tmp_path, capsys):
    mine, theirs = make_run(tmp_path, "sweep-1"), make_run(tmp_path, "sweep-2")
    arrays = {"7": identity_of(mine, "7")}

    def over(task, state, run=mine, submitted=NOON):
        values = [task, "70", "run", "me", state, "None", submitted, NOON, NOON, "0:10", "n1", "1", "0:0", "0:0"]
        return SEPARATOR.join([*values, f"sbatch {run.submission_script}"])

    slurm.answers("squeue", queued(mine, "7_0", "8"))
    slurm.answers(
        "sacct", over("7_0", "NODE_FAIL"), over("7_1", "NODE_FAIL"), over("7_1", "COMPLETED", submitted=LATER),
        over("7_2", "TIMEOUT"), over("7_3", "RUNNING"), over("7_4", "FAILED", theirs),
        over("7_[2-5]", "CANCELLED by 0"),
    )  # fmt: skip
    told = {"7_0": "RUNNING", "7_1": "COMPLETED", "7_2": "TIMEOUT", "7_5": "CANCELLED"}
    assert array_states(arrays).items() >= told.items()
    assert array_states(arrays)["7_4"] == "CANCELLED"  # another array's task tells nothing
    slurm.does("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert array_states(arrays) == {"7_0": "RUNNING"}
    assert "hpcmm: sacct gives no answer" in capsys.readouterr().err


def test_records_of_accounting_are_the_job_s_own_or_none(slurm, tmp_path):
    run = make_run(tmp_path, "run-1")
    fields = "JobID\tJobName\tState\tSubmit\tUser\tSubmitLine"
    slurm.answers("sacct", fields, f"7\trun\tCOMPLETED\t{EARLIER}\tme\tsbatch {OTHERS}")
    assert job_records(identity_of(run, "7")) == []
    slurm.answers("sacct", fields, f"7\trun\tFAILED\t{NOON}\tme\tsbatch {run.submission_script}")
    assert job_records(identity_of(run, "7"))[0]["State"] == "FAILED"


def test_exit_codes_of_an_older_job_are_not_those_of_the_one_in_the_queue(slurm, tmp_path):
    run, older = make_run(tmp_path, "run-1"), make_run(tmp_path, "run-2")
    slurm.answers("squeue", queued(run, state="FAILED"))
    slurm.answers("sacct", accounted(older))
    job = find_job(identity_of(run, "7"))
    assert account_of([job]) == {}
    slurm.answers("sacct", accounted(run))
    assert len(account_of([job])) == 1


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("85\n", Accepted("85")),
        ("85;big\n", Accepted("85", "big")),
        ("Submitted batch job 85\n", Accepted("85")),
        ("Submitted batch job 85 on cluster big-2\r\n", Accepted("85", "big-2")),
        ("-----\n 2026 users, node 12\n 404\n--> (login4)...OK\nSubmitted batch job 85\nBye, 7\n", Accepted("85")),
        ("Welcome to node 12\n85;big\nHave a nice day\n", Accepted("85", "big")),
        ("\x1b[32mSubmitted batch job 85\x1b[0m\n", Accepted("85")),
        ("sbatch: Submitted batch job 85\n", Accepted("85")),
        ("as in 'Submitted batch job 1'\nSubmitted batch job 85\n", Accepted("85")),
        ("85\n86\n", None),
        ("Welcome to node 12\n", None),
        ("", None),
        ("0\n", None),
        ("Submitted batch job\n", None),
        ("job 85\n", None),
    ],
)  # fmt: skip
def test_a_job_s_number_is_read_from_whatever_sbatch_prints_around_it(answer, accepted):
    assert accepted_by(answer) == accepted


# Several clusters.


def test_each_run_is_asked_for_at_its_own_cluster(slurm, tmp_path):
    here, there = make_run(tmp_path, "here-1", cluster="small"), make_run(tmp_path, "there-1", cluster="big")
    slurm.does(
        "squeue",
        f"""case $* in
*--clusters=big*) echo 'CLUSTER: its-own-name'; echo '{queued(there, state="PENDING")}' ;;
*) echo '{queued(here)}' ;;
esac""",
    )
    targets = [find_targets(name, tmp_path)[0] for name in ("here", "there")]
    states = states_of(targets)
    assert [[(job.state, job.cluster) for job in state.jobs] for state in states] == [
        [("RUNNING", "small")],
        [("PENDING", "big")],
    ]
    assert len(slurm.called("squeue")) == 2
    assert "--clusters" not in slurm.called("squeue")[0]
    cancel("there", [targets[1]])
    assert slurm.called("scancel") == ["scancel --clusters=big 7"]
    assert slurm.called("sacct") == []


def test_a_cluster_that_cannot_be_reached_hides_no_run_of_another_one(slurm, tmp_path):
    here, there = make_run(tmp_path, "here-1"), make_run(tmp_path, "there-1", cluster="gone")
    there.exit_status.write_text("7 0\n", encoding="utf-8")
    slurm.does(
        "squeue",
        "case $* in *--clusters=*) echo \"squeue: error: No cluster 'gone' known by database.\" >&2; exit 1;; esac\n"
        f"echo '{queued(here)}'",
    )
    states = states_of([find_targets(name, tmp_path)[0] for name in ("here", "there")], needs_slurm=False)
    assert [state.jobs[0].state for state in states] == ["RUNNING", "COMPLETED"]
    assert "it knows no cluster gone" in states[1].notes[0]


def test_accounting_and_nodes_are_those_of_the_job_s_cluster(slurm, tmp_path):
    run = make_run(tmp_path, "run-1", cluster="big")
    slurm.answers("sacct", accounted(run))
    assert find_job(identity_of(run, "7")).state == "COMPLETED"
    assert all("--clusters=big" in call for call in slurm.called("squeue") + slurm.called("sacct"))
    slurm.answers("sinfo", "CLUSTER: big", "n1\x1fidle\x1fnone")
    assert node_states("n1", on_cluster("big", os.environ)) == {"n1": "idle"}
    assert "--clusters=big" in slurm.called("sinfo")[0]


def test_a_job_that_may_be_on_several_clusters_is_not_cancelled_on_all_of_them(slurm, tmp_path):
    run = make_run(tmp_path, "run-1", cluster="a,b")
    slurm.answers("squeue", queued(run))
    with pytest.raises(HpcmmError, match=r"may be on any of the clusters a,b.*scancel --clusters=NAME"):
        cancel("run", find_targets("run", tmp_path))
    slurm.answers("squeue", "CLUSTER: a", "CLUSTER: b", queued(run))
    cancel("run", find_targets("run", tmp_path))
    assert slurm.called("scancel") == ["scancel --clusters=b 7"]


def test_a_job_that_went_to_another_cluster_of_the_federation_is_not_revoked(slurm, tmp_path):
    run = make_run(tmp_path, "run-1")
    slurm.does(
        "squeue",
        f"case $* in *--federation*) echo '{queued(run)}';; *) echo '{queued(run, state='REVOKED')}';; esac",
    )
    assert find_job(identity_of(run, "7")).state == "RUNNING"
    assert len(own_jobs(None, None).jobs) == 1


def test_the_name_of_the_cluster_is_read_from_its_configuration(slurm, tmp_path):
    assert cluster_here(os.environ) == "small"
    assert cluster_here({"SLURM_CONF": str(tmp_path / "none")}) == ""
    environ = {"SLURM_CONF": os.environ["SLURM_CONF"]}
    assert on_cluster("small", environ) == on_cluster("", environ) == environ
    assert on_cluster("small", environ | {"SLURM_CLUSTERS": "a,b"})["SLURM_CLUSTERS"] == "small"
    assert on_cluster("big", environ)["SLURM_CLUSTERS"] == "big"


def test_the_clusters_of_a_run_are_those_of_its_analysis_and_its_job_asks_its_own(tmp_path):
    config = compose_run(["cluster=slurm", "cluster.sbatch.clusters=big", "profile=nsys", "analyze=after"])
    job = ScriptJob(RunDir(tmp_path / "run-1"))
    for script in (render_script(config, job), render_analysis_script(config, job)):
        assert "#SBATCH --clusters=big\n" in script
        assert "\nunset SLURM_CLUSTERS " in script


# A launch, with stand-ins for all of Slurm.


@pytest.fixture
def launch(slurm, tmp_path):
    """Launch a script; sbatch numbers the job 7 and notes the script's path for squeue."""
    (tmp_path / "job.py").touch()
    slurm.does("srun", "true")
    slurm.does("sbatch", f'echo "${{@: -1}}" > {tmp_path}/script; echo "${{SAYS:-Submitted batch job 7}}"')
    slurm.does("scontrol", "echo MaxArraySize = 1001")
    # As squeue shows the job that sbatch was given.
    found = queued(RunDir(tmp_path), command="SCRIPT", user="USER", submitted="N/A", name="NAME", state="STATE")
    shown = {"SCRIPT": f"${{SHOWN:-$(cat {tmp_path}/script)}}", "USER": "${OF:-$(id -un)}", "NAME": "${NAMED:-run}"}
    edits = "; ".join(f"s|{word}|{value}|" for word, value in {**shown, "STATE": "${STATE:-RUNNING}"}.items())
    slurm.does("squeue", f"""echo '{found}' | sed "{edits}" """)

    def launched(*overrides, program=("-m", "hpcmm.launch"), **environment):
        words = ["cluster=slurm", "task=script", "task.path=job.py", "launch.snapshot=false", *overrides]
        return subprocess.run(
            [sys.executable, *program, *words],
            env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip

    return launched


def newest(folder):
    return RunDir((folder / "runs" / "latest").resolve())


def test_a_launch_notes_what_identifies_its_job_and_asks_slurm_once(launch, slurm, tmp_path):
    assert launch().returncode == 0
    run = newest(tmp_path)
    known = identity_of(run, "7")
    assert (known.cluster, known.name, known.scripts) == ("small", "run", (str(run.submission_script),))
    assert known.user
    assert known.submitted_unix_s is not None
    assert json.loads(run.submission.read_text(encoding="utf-8"))["job_id"] == "7"
    assert (len(slurm.called("squeue")), len(slurm.called("sacct"))) == (1, 0)


@pytest.mark.parametrize("answer", ["7;big", "Submitted batch job 7 on cluster big"])
def test_the_cluster_that_sbatch_names_is_asked_from_then_on(launch, slurm, tmp_path, answer):
    assert launch("cluster.sbatch.clusters='big,other'", SAYS=answer).returncode == 0
    assert identity_of(newest(tmp_path), "7").cluster == "big"
    assert "--clusters=big " in slurm.called("squeue")[0]


def test_the_cluster_of_the_configuration_is_asked_if_sbatch_names_none(launch, slurm, tmp_path):
    assert launch("+cluster.submit_environment.SLURM_CLUSTERS=big").returncode == 0
    assert "--clusters=big " in slurm.called("squeue")[0]
    assert launch("cluster.sbatch.clusters=large").returncode == 0
    assert "--clusters=large " in slurm.called("squeue")[1]
    assert identity_of(newest(tmp_path), "7").cluster == "large"


def test_a_cluster_by_a_name_that_nothing_here_knows_is_asked_as_before(launch, slurm, tmp_path):
    unknown = (
        "case $* in *--clusters=*) echo \"squeue: error: No cluster 'nautilus' known by database.\" >&2; exit 1;; esac"
    )
    (slurm.folder / "squeue").write_text(
        (slurm.folder / "squeue").read_text(encoding="utf-8").replace("\necho '7", f"\n{unknown}\necho '7"),
        encoding="utf-8",
    )
    done = launch(SAYS="Submitted batch job 7 on cluster nautilus")
    assert (done.returncode, done.stderr) == (0, "")
    assert identity_of(newest(tmp_path), "7").cluster == "small"


def test_a_launch_says_if_squeue_shows_another_job_by_the_number(launch, tmp_path, monkeypatch):
    for name, value in {"SHOWN": "/home/you/job.sh", "OF": "you", "NAMED": "precious"}.items():
        monkeypatch.setenv(name, value)
    done = launch()
    assert done.returncode == 0
    assert "squeue shows another job by that number (precious, of you): is yours on another cluster?" in done.stderr
    assert states_of([Target("run", ("7",), newest(tmp_path))])[0].jobs == []


def test_a_copy_of_the_script_that_a_site_submits_is_known_from_then_on(launch, tmp_path):
    done = launch(SHOWN="/var/spool/site/tmp.42")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/var/spool/site/tmp.42" in identity_of(newest(tmp_path), "7").scripts


def test_a_run_does_not_wait_for_another_job_of_the_number_that_was_named(launch, slurm, tmp_path):
    old = make_run(tmp_path / "runs", "old-1")
    other = {"SHOWN": "/home/you/job.sh", "OF": "you", "NAMED": "precious"}
    done = launch("after=old-1", **other)
    assert done.returncode == 1
    assert f"{ANOTHER}, and neither squeue nor sacct knows the one that is meant." in done.stderr
    assert f"{old.root} notes no end of it either." in done.stderr
    assert slurm.called("sbatch") == []
    old.exit_status.write_text("7 1\n", encoding="utf-8")
    assert "after=old-1: that job ended as FAILED" in launch("after=old-1", **other).stderr
    old.exit_status.write_text("7 0\n", encoding="utf-8")
    done = launch("after=old-1", **other)
    assert done.returncode == 0, done.stderr
    assert "job 7 has completed, so there is nothing to wait for" in done.stderr


def test_a_run_cannot_wait_for_a_job_of_another_cluster(launch, tmp_path):
    make_run(tmp_path / "runs", "old-1", cluster="big")
    done = launch("after=old-1")
    assert done.returncode == 1
    assert "after=old-1: job 7 is on cluster big, and this launch goes to small" in done.stderr


def test_an_option_by_its_letter_is_refused_with_the_one_to_write(launch, slurm):
    done = launch("+cluster.sbatch.M=big")
    assert done.returncode == 1
    assert "write cluster.sbatch.clusters." in done.stderr
    assert slurm.called("sbatch") == []


# Following.


@pytest.mark.parametrize(
    "complaint",
    [
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Resource temporarily unavailable",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "squeue: error: 'big' can't be reached now, or it is an invalid entry for --cluster.",
        "squeue: error: something that nobody has seen before",
        "",
    ],
)
def test_a_failure_that_is_no_refusal_is_no_answer_and_is_asked_again(slurm, complaint):
    slurm.does("squeue", f"echo {quote(complaint)} >&2; exit 1")
    with pytest.raises(SilentError) as raised:
        ask("squeue")
    assert not raised.value.lasting


@pytest.mark.parametrize(
    ("complaint", "lasting"),
    [
        ("squeue: error: Invalid user: nobody-here", None),
        ("squeue: unrecognized option '--fed'", None),
        ("slurm_load_jobs error: Access/permission denied", None),
        ("Slurm accounting storage is disabled", None),
        ("squeue: error: No cluster 'big' known by database.", True),
        ("squeue: fatal: Could not establish a configuration source", True),
    ],
)
def test_a_refusal_or_a_lasting_failure_is_not_asked_again_at_first(slurm, complaint, lasting):
    slurm.does("squeue", f"echo {quote(complaint)} >&2; exit 1")
    with pytest.raises(HpcmmError) as raised:
        Poller(lambda: ask("squeue"), str).wait(lambda _: True)
    assert getattr(raised.value, "lasting", None) is lasting
    assert len(slurm.called("squeue")) == 1


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass while somebody sleeps."""
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda pause_s: now.__setitem__(0, now[0] + pause_s))
    return lambda: now[0]


def test_a_first_question_without_an_answer_is_asked_for_minutes_ever_less_often(clock):
    asked, told = [], []

    def asking():
        asked.append(clock())
        if clock() < 600:
            raise SilentError("squeue failed (Socket timed out).", "timed out")
        return "RUNNING"

    poller = Poller(asking, str, tell=told.append, clock=clock)
    assert poller.wait(lambda _: True) == "RUNNING"
    assert 600 <= asked[-1] < 640
    assert 10 < len(asked) < 60
    assert told == ["squeue failed (Socket timed out)."]


def test_a_job_that_neither_squeue_nor_accounting_knows_yet_is_asked_for_a_few_times(clock):
    asked = []

    def asking():
        asked.append(clock())
        if len(asked) < 3:
            raise UnknownJobError("nobody knows it")
        return "COMPLETED"

    assert Poller(asking, str, clock=clock).wait(lambda _: True) == "COMPLETED"

    def never():
        raise UnknownJobError("nobody knows it")

    with pytest.raises(UnknownJobError):
        Poller(never, str, clock=clock).wait(lambda _: True)


def test_a_followed_launch_outlives_answers_that_fail_from_the_first_one_on(launch, slurm, tmp_path):
    count = tmp_path / "count"
    before = (slurm.folder / "squeue").read_text(encoding="utf-8").removeprefix("#!/bin/bash\n")
    failing = f"""#!/bin/bash
[ -n "$RETOLD" ] || {{ count=$(cat {count} 2>/dev/null || echo 0); echo $((count + 1)) > {count}; }}
case $count in 1|2) echo 'slurm_load_jobs error: Resource temporarily unavailable' >&2; exit 1 ;; esac
"""
    (slurm.folder / "squeue").write_text(failing + before, encoding="utf-8")
    soon = "from hpcmm.jobs import follow; follow._FIRST_S = follow._LONGEST_S = 0.01; follow._RECORD_WAIT_S = 0\n"
    soon += "import sys; from hpcmm.launch.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = launch("wait=true", program=("-c", soon), STATE="COMPLETED")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("Resource temporarily unavailable); the job itself is not affected. It is asked again.") == 1
    )
    assert Path(count).read_text(encoding="utf-8").strip() == "4"


def test_following_the_states_and_logs_of_a_run_outlives_a_question_that_fails(slurm, tmp_path):
    run = make_run(tmp_path / "runs", "run-1")
    run.batch_log.write_text("a line\n", encoding="utf-8")
    for arguments in (("status", "-f", "run-1"), ("logs", "-f", "run-1")):
        count = tmp_path / f"count-{arguments[0]}"
        slurm.does(
            "squeue",
            f"[ -e {count} ] || {{ touch {count}; echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1; }}\n"
            f"echo '{queued(run, state='COMPLETED')}'",
        )
        done = jobs_command(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert "It is asked again." in done.stderr
