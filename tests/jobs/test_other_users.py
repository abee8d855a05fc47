"""Runs of other users in a shared folder are shown as theirs; what they hold steers nothing."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import another_user
import psutil
import pytest

from hpcmm.config.schema import RunConfig, TrainConfig
from hpcmm.errors import HpcmmError
from hpcmm.jobs.__main__ import main
from hpcmm.jobs.cancel import cancel
from hpcmm.jobs.find_run import default_environment, find_folder, find_targets, slurm_environment
from hpcmm.jobs.state import local_job
from hpcmm.launch.__main__ import _resubmit
from hpcmm.launch.plan import job_to_wait_for, run_to_start_from
from hpcmm.launch.submit import resubmit
from hpcmm.runs import run_dir
from hpcmm.runs.ledger import read_ledger
from hpcmm.runs.run_dir import RunDir, runs_in
from hpcmm.runs.submission import identity_of
from hpcmm.serve.address import find_address

pytestmark = pytest.mark.timeout(120)


def make_run(root, name, job_id=None, **environment):
    run = RunDir(root / name)
    run.create()
    run.config.write_text(json.dumps({"cluster": {"executor": "slurm", "submit_environment": environment}}))
    run.submission_script.write_text("#!/bin/bash\n")
    if job_id:
        run.submission.write_text(json.dumps({"job_id": job_id}))
    return run


def foreign(root, name, job_id=None, **environment):
    run = make_run(root, name, job_id, **environment)
    run.root.chmod(0o755)
    another_user.give(run.root)
    return run


@pytest.fixture
def root(tmp_path):
    """A folder for runs that all may write."""
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o1777)
    return made


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stand-ins of Slurm's commands that know of no job; the file holds how they were called."""
    binaries, calls = tmp_path / "bin", tmp_path / "calls"
    binaries.mkdir()
    calls.touch()
    for name in ("squeue", "sacct", "scancel", "sbatch", "sinfo", "scontrol"):
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{calls}"\n')
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return calls


def ask_jobs(root, *arguments):
    command = [sys.executable, "-m", "hpcmm.jobs", arguments[0], "--runs-root", str(root), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_start_of_a_name_means_one_s_own_run_however_new_another_user_s_is(root):
    mine = make_run(root, "demo-20260101-000000-aaaa", "7")
    os.utime(mine.submission_script, (1, 1))
    foreign(root, "demo-99999999-999999-zzzz", "8")
    assert [target.run.root for target in find_targets("demo", root)] == [mine.root]


def test_a_plain_name_of_another_user_s_run_is_no_reason_to_pass_over_one_s_own(root, monkeypatch):
    mine = make_run(root, "demo-20260101-000000-aaaa", "7")
    foreign(root, "demo", "8")
    foreign(root.parent, "demo", "9")
    monkeypatch.chdir(root.parent)
    assert [target.run.root for target in find_targets("demo", root)] == [mine.root]


def test_another_user_s_run_is_found_by_its_name_if_there_is_no_other(root):
    theirs = foreign(root, "demo-20260101-000000-aaaa", "7")
    for asked in ("demo", theirs.root.name, str(theirs.root)):
        (target,) = find_targets(asked, root)
        assert target.run.root == theirs.root
        assert target.user == str(another_user.UID)


def test_a_job_s_number_is_never_looked_up_in_another_user_s_run(root):
    foreign(root, "demo-1", "12")
    foreign(root, "12", "13")
    (target,) = find_targets("12", root)
    assert target.run is None
    assert target.job_ids == ("12",)


def test_another_user_s_link_named_latest_is_theirs_whatever_it_leads_to(root):
    make_run(root, "demo-1", "7")
    (root / "latest").symlink_to("demo-1")
    assert find_targets("latest", root)[0].user is None
    another_user.give(root / "latest")
    assert find_targets("latest", root)[0].user == str(another_user.UID)
    with pytest.raises(HpcmmError, match="another user's"):
        cancel("latest", find_targets("latest", root))


def test_another_user_s_run_is_not_cancelled_nor_waited_for_nor_submitted_again(root, calls):
    theirs = foreign(root, "demo-1", "12")
    with pytest.raises(HpcmmError, match=r"demo-1 is another user's \(54321\)"):
        cancel("demo-1", find_targets("demo-1", root))
    with pytest.raises(HpcmmError, match="after=demo-1 waits for a run of yours"):
        job_to_wait_for("demo-1", root)
    (theirs.root / "ledger.json").write_text('{"points": []}')
    with pytest.raises(HpcmmError, match="its scripts would run as you"):
        resubmit(theirs.root)
    assert calls.read_text() == ""


@pytest.mark.parametrize("depth", ["runs", "above"])
def test_one_s_own_run_behind_a_link_of_another_user_is_not_acted_upon(calls, depth):
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        place = Path(made)
        place.chmod(0o1777)
        mine = make_run(place / "own" / "runs", "demo-1", "12")
        (mine.root / "ledger.json").write_text('{"points": []}')
        link = place / "link"
        link.symlink_to("own/runs" if depth == "runs" else "own")
        runs = link if depth == "runs" else link / "runs"
        assert find_targets("demo", runs)[0].user is None
        another_user.give(link)
        assert runs_in(runs) == []
        for asked in ("demo", "demo-1", str(runs / "demo-1")):
            targets = find_targets(asked, runs)
            assert targets[0].user == str(another_user.UID)
            with pytest.raises(HpcmmError, match="another user's"):
                cancel(asked, targets)
        with pytest.raises(HpcmmError, match="after=demo-1 waits for a run of yours"):
            job_to_wait_for("demo-1", runs)
        with pytest.raises(HpcmmError, match="its scripts would run as you"):
            resubmit(runs / "demo-1")
    assert calls.read_text() == ""


def test_a_sweep_that_a_link_of_one_s_own_names_is_used_by_its_real_path(root):
    mine = make_run(root, "mine-1")
    point = {"index": 0, "overrides": [], "run": "0000", "jobs": []}
    (mine.root / "ledger.json").write_text(json.dumps({"points": [point]}))
    (root / "latest").symlink_to("mine-1")
    assert read_ledger(root / "latest").sweep.root == mine.root
    assert read_ledger(root / "latest" / "ledger.json").sweep.root == mine.root
    assert find_targets("latest", root)[0].run == mine


def test_a_run_that_another_user_exchanges_meanwhile_is_a_sentence(root, calls, monkeypatch, capsys):
    run = make_run(root, "demo-1", "12")

    def exchanged(path, **_):
        raise OSError(errno.EINVAL, "Invalid argument", str(path))

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(os.path, "realpath", exchanged)
        assert identity_of(run, "12").scripts == (str(run.submission_script),)
        meanwhile.setattr("hpcmm.jobs.__main__.states_of", exchanged)
        assert main(["status", "--runs-root", str(root), "demo-1"]) == 1
    assert capsys.readouterr().err.endswith("cannot be used: Invalid argument.\n")


def test_a_link_to_one_s_own_ledger_submits_no_script_of_another_user(root, calls):
    mine = make_run(root, "mine-1")
    (mine.root / "ledger.json").write_text('{"points": []}')
    theirs = foreign(root, "team-1")
    (theirs.root / "ledger.json").symlink_to(mine.root / "ledger.json")
    for given in (theirs.root, theirs.root / "ledger.json"):
        with pytest.raises(HpcmmError, match=r"is a link|another user's"):
            resubmit(given)
    assert calls.read_text() == ""


@pytest.mark.parametrize("name", ["submission.sh", "analysis.sh"])
def test_a_script_that_is_a_link_or_that_others_can_write_is_not_submitted_again(root, calls, name):
    sweep = make_run(root, "sweep-1")
    point = {"index": 0, "overrides": ["train.seed=1"], "run": "0000", "jobs": ["7"]}
    (sweep.root / "ledger.json").write_text(json.dumps({"points": [point]}))
    subprocess.run([sys.executable, "-c", _DUMP, str(sweep.root / "0000")], check=True)
    script = sweep.root / name
    script.unlink(missing_ok=True)
    script.write_text("#!/bin/bash\n")
    script.chmod(0o777)
    with pytest.raises(HpcmmError, match=f"{name} can be written by another user"):
        resubmit(sweep.root)
    script.rename(root / "elsewhere")
    script.symlink_to(root / "elsewhere")
    with pytest.raises(HpcmmError, match=f"{name} is not a script of this sweep"):
        resubmit(sweep.root)
    assert calls.read_text() == ""


_DUMP = """
import sys
from pathlib import Path
from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump
from hpcmm.runs.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
run.create()
dump(compose_run(["cluster=slurm", "task=script", "task.path=a.py"]), run.config)
"""


def test_the_cluster_is_found_by_one_s_own_runs_however_many_others_are_newer(root):
    make_run(root, "demo-1", SLURM_CONF="/site/slurm.conf")
    for number in range(30):
        theirs = foreign(root, f"other-{number}", SLURM_CONF="/theirs/slurm.conf", PATH="/theirs/bin")
        os.utime(theirs.submission_script, (2**31, 2**31))
    found = default_environment(root, {"PATH": "/bin"})
    assert found == {"PATH": "/bin", "SLURM_CONF": "/site/slurm.conf"}


@pytest.mark.parametrize("place", [".", "config.yaml"])
def test_a_configuration_that_others_could_have_written_finds_no_cluster(root, place):
    run = make_run(root, "demo-1", SLURM_CONF="/theirs/slurm.conf")
    assert slurm_environment(run, {}) == {"SLURM_CONF": "/theirs/slurm.conf"}
    (run.root / place).chmod(0o777)
    assert slurm_environment(run, {}) == {}


def test_a_link_to_a_configuration_finds_no_cluster(root):
    run = make_run(root, "demo-1", SLURM_CONF="/theirs/slurm.conf")
    run.config.rename(root / "elsewhere")
    run.config.symlink_to(root / "elsewhere")
    assert slurm_environment(run, {}) == {}


def test_of_an_older_configuration_only_what_finds_the_cluster_is_used(root):
    run = make_run(root, "demo-1", SLURM_CONF="/site/slurm.conf", PATH="/x", LD_PRELOAD="/x.so", SLURM_CLUSTERS="a")
    assert slurm_environment(run, {"PATH": "/bin"}) == {
        "PATH": "/bin",
        "SLURM_CONF": "/site/slurm.conf",
        "SLURM_CLUSTERS": "a",
    }


def test_where_another_user_s_server_listens_is_not_told(root):
    theirs = foreign(root, "serve-1")
    theirs.address.write_text('{"node": "node1; id", "port": 80, "token": "x"}')
    another_user.give(theirs.address)
    with pytest.raises(HpcmmError, match="is another user's"):
        find_address("serve", root)


def test_status_logs_and_why_say_whose_a_run_is(root, calls):
    theirs = foreign(root, "demo-1", "12")
    theirs.exit_status.write_text("12 1\n")
    theirs.batch_log.write_text("hello\n")
    theirs.root.chmod(0o755)
    another_user.give(theirs.root)
    for command in ("status", "logs", "why"):
        done = ask_jobs(root, command, "demo-1")
        assert f"{theirs.root} is of user {another_user.UID}, who may have written anything there." in done.stderr
    assert f"(of user {another_user.UID})" in ask_jobs(root, "status", "demo-1").stdout
    assert "scancel" not in calls.read_text()


def test_a_thousand_folders_of_others_are_not_looked_into(root, monkeypatch):
    mine = make_run(root, "mine-1", "7")
    for number in range(1000):
        folder = root / f"theirs-{number}"
        folder.mkdir()
        os.mkfifo(folder / "submission.json")
        (folder / "submission.sh").touch()
        another_user.give(folder)
    closed = root / "closed"
    closed.mkdir(mode=0o000)
    another_user.give(closed)
    looked = []
    monkeypatch.setattr("hpcmm.runs.run_dir.is_run", lambda folder: looked.append(folder) or True)
    assert [run.root for run in runs_in(root)] == [mine.root]
    assert looked == [mine.root]


def test_an_analysis_takes_one_s_own_run_of_a_name_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = make_run(tmp_path / "runs", "demo-1")
    os.utime(mine.submission_script, (1, 1))
    foreign(tmp_path / "runs", "demo-2")
    assert find_folder(type(tmp_path)("demo")).name == "demo-1"


def test_a_point_of_one_s_own_sweep_comes_before_another_user_s_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o1777)
    for made, where in ((make_run, tmp_path / "runs" / "sweep-1"), (foreign, tmp_path / "sweep")):
        run = made(where, "0003")
        points = [{"index": index, "overrides": [], "run": f"{index:04d}", "jobs": []} for index in range(4)]
        (where / "ledger.json").write_text(json.dumps({"points": points}))
        (where / "submission.sh").touch()
        if made is foreign:
            another_user.give(where)
        else:
            mine = run
    assert find_folder(Path("sweep/0003")).resolve() == mine.root
    assert [target.run.root.resolve() for target in find_targets("sweep/0003", Path("runs"))] == [mine.root]
    assert find_targets(str(tmp_path / "sweep" / "0003"), Path("runs"))[0].user == str(another_user.UID)


def test_also_before_a_link_of_that_name_that_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o1777)
    mine = make_run(tmp_path / "runs", "demo-1")
    (tmp_path / "demo").symlink_to("nowhere")
    another_user.give(tmp_path / "demo")
    assert find_folder(Path("demo")).resolve() == mine.root
    assert find_folder(Path("n" * 5000)) == Path("n" * 5000)


@pytest.mark.parametrize("is_link", [False, True])
def test_also_before_a_folder_of_that_name_that_another_user_made_here(tmp_path, monkeypatch, capsys, is_link):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o1777)
    mine = make_run(tmp_path / "runs", "demo-1")
    theirs = foreign(tmp_path, "theirs" if is_link else "demo")
    if is_link:
        (tmp_path / "demo").symlink_to(theirs.root)
        another_user.give(tmp_path / "demo")
    assert find_folder(Path("demo")).resolve() == mine.root
    assert find_folder(Path("demo/nsys")) == Path("demo/nsys")
    assert run_to_start_from(RunConfig(train=TrainConfig(init_from="demo"), after="1")) == str(mine.root)
    with pytest.raises(HpcmmError, match=r"runs/demo-1 is a single run, and no sweep"):
        _resubmit(["demo"])
    capsys.readouterr()
    another_user.give(mine.root)
    assert find_folder(Path("demo")) == Path("demo")
    assert f"demo is of user {another_user.UID}, who may have written anything there." in capsys.readouterr().err


def test_another_user_s_process_that_names_one_s_own_local_run_is_not_the_run(root, monkeypatch):
    mine = make_run(root, "demo-1")
    command = ["/bin/sh", "-c", "read line", str(mine.submitit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as own:
        assert local_job(mine, str(own.pid), "demo", 1).state == "RUNNING"
        with monkeypatch.context() as patched:
            patched.setattr(psutil.Process, "cmdline", lambda _: [])  # as for a moment after exec
            assert local_job(mine, str(own.pid), "demo", 1).state == "RUNNING"
        own.kill()
        os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
        assert local_job(mine, str(own.pid), "demo", 1).state == "FAILED"  # a zombie has no words, either
    if os.geteuid() != 0:
        pytest.skip("only root can start another user's process")
    them = another_user.UID
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/", user=them, group=them, extra_groups=[]) as theirs:
        try:
            assert local_job(mine, str(theirs.pid), "demo", 1).state == "FAILED"
        finally:
            theirs.kill()


def test_of_very_many_folders_of_others_only_so_many_are_looked_into(root, monkeypatch):
    mine = make_run(root, "mine-1")
    for index in range(5):
        foreign(root, f"theirs-{index}")
    looked = []
    monkeypatch.setattr(run_dir, "_MOST_OF_OTHERS", 3)
    monkeypatch.setattr(run_dir, "is_run", lambda folder: looked.append(folder) or True)
    assert [run.root for run in runs_in(root)] == [mine.root]
    assert looked == [mine.root]
    assert len(runs_in(root, of_others=True)) == 3
