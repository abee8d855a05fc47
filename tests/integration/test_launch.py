"""Launching on the real Slurm: frozen code, hostile values, sweeps, dependencies, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

TELLS_WHERE_IT_IS = """\
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GREETING")
print(json.dumps({name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:], "version": 1}))
"""
TELLS_WHAT_IT_WAS_GIVEN = """\
import json, os, pathlib, sys, time
staged = pathlib.Path(os.environ["HPCMM_STAGE_DIR"], "set", "x.txt")
given = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MY_TOKEN", "NOT_PASSED", "RANK")}
print(json.dumps(given | {"staged": staged.read_text()}), flush=True)
time.sleep(float(sys.argv[1]))
"""
FAILS_UNTIL_MENDED = """\
import pathlib, sys
if sys.argv[1] == "odd" and not pathlib.Path("mended").exists():
    sys.exit("not yet mended")
"""


TELLS_ITS_PLACE = """\
import json, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()  # else rank 0, which has the store, may end before another rank has read it
told = {"rank": dist.get_rank(), "of": dist.get_world_size(), "argv": sys.argv}
print("\\n" + json.dumps(told) + "\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path):
    """A working directory whose name is hard on shells."""
    hard = tmp_path / 'it\'s a "home"; echo pwn'
    hard.mkdir()
    return hard


def launch(cluster, folder, *overrides, expected=0, environment=None):
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.launch", "cluster=local_slurm", *overrides],
        env=cluster.env | (environment or {}), cwd=folder, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def wait_for(cluster, job_id, within_s=120):
    until = time.monotonic() + within_s
    while cluster.run("squeue", "-h", "-j", job_id, "-t", "PD,R,CG,CF").strip():
        assert time.monotonic() < until, cluster.run("squeue")
        time.sleep(0.5)


def latest(folder):
    return (folder / "runs" / "latest").resolve()


def job_id_of(run):
    return json.loads((run / "submission.json").read_text())["job_id"]


def test_a_queued_job_runs_what_was_submitted_and_nothing_that_was_not_asked_for(slurm_cluster, folder):
    script = folder / "tell.py"
    script.write_text(TELLS_WHERE_IT_IS)
    hostile = ["$(touch pwned)", "x; touch pwned", "`touch pwned`", 'it\'s "quoted"']
    words = ",".join("'" + word.replace("'", "\\'") + "'" for word in hostile)
    launch(
        slurm_cluster, folder, "task=script", "task.path=tell.py", f"task.args=[{words},1e-4]", "cluster.nodes=2",
        "cluster.environment.GREETING='x; touch pwned $(touch pwned)'", "cluster.sbatch.hold=''",
    )  # fmt: skip
    script.write_text("raise SystemExit('the code was not frozen')\n")
    run = latest(folder)
    slurm_cluster.run("scontrol", "release", job_id_of(run))
    wait_for(slurm_cluster, job_id_of(run))
    told = [
        json.loads(
            next(line for line in (run / "logs" / f"rank_{rank:04d}.log").read_text().splitlines() if line[0] == "{")
        )
        for rank in range(4)
    ]
    assert [rank["argv"] for rank in told] == [[*hostile, "1e-4"]] * 4
    assert [rank["RANK"] for rank in told] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in told] == ["0", "1", "0", "1"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in told} == {("4", "2")}
    assert {rank["GREETING"] for rank in told} == {"x; touch pwned $(touch pwned)"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in told}) == 1
    assert not list(folder.rglob("pwned"))


@pytest.fixture
def scratch(folder):
    """What stands in for the nodes' own disks; and a data set and a script that wants it."""
    (folder / "set").mkdir()
    (folder / "set" / "x.txt").write_text("the data")
    (folder / "give.py").write_text(TELLS_WHAT_IT_WAS_GIVEN)
    (folder.parent / "scratch").mkdir(mode=0o700)
    return folder.parent / "scratch"


def two_nodes_with_data(scratch, seconds):
    return [
        "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.gpus_per_node=0", "task=script", "task.path=give.py",
        f"task.args=['{seconds}']", "launch.stage=[set]", f"cluster.scratch_dir={scratch}",
    ]  # fmt: skip


def lines_of_json(run, rank):
    log = run / "logs" / f"rank_{rank:04d}.log"
    return [json.loads(line) for line in log.read_text().splitlines() if line[0] == "{"] if log.exists() else []


def test_nodes_without_scontrol_of_a_site_that_passes_nothing_on_start_all_the_same(
    slurm_cluster, folder, scratch, monkeypatch
):
    (folder / "site.sh").write_text("scontrol() { return 127; }\n")
    monkeypatch.setenv("MY_TOKEN", "a; $(touch pwned)")
    monkeypatch.setenv("NOT_PASSED", "x")
    launch(
        slurm_cluster, folder, *two_nodes_with_data(scratch, 0), "launch.preflight=true", "cluster.sbatch.export=NONE",
        "cluster.environment_from=[MY_TOKEN]", "cluster.setup=['source ./site.sh']", "requeue=on_node_failure",
    )  # fmt: skip
    run = latest(folder)
    wait_for(slurm_cluster, job_id_of(run))
    log = (run / "logs" / "batch.log").read_text()
    told = [each for rank in (0, 1) for each in lines_of_json(run, rank)]
    assert [each["RANK"] for each in told] == ["0", "1"], log
    assert {each["MY_TOKEN"] for each in told} == {"a; $(touch pwned)"}
    assert {(each["NOT_PASSED"], each["staged"]) for each in told} == {(None, "the data")}
    assert len({each["MASTER_ADDR"] for each in told}) == 1
    assert "in 1 file on each of 2 nodes; the slowest" in log
    assert list(scratch.iterdir()) == []


def test_a_cancelled_job_leaves_no_copy_on_any_node(slurm_cluster, folder, scratch):
    launch(slurm_cluster, folder, *two_nodes_with_data(scratch, 600))
    run = latest(folder)
    until = time.monotonic() + 120
    while not all(lines_of_json(run, rank) for rank in (0, 1)):
        assert time.monotonic() < until, (run / "logs" / "batch.log").read_text()
        time.sleep(0.2)
    assert len(list(scratch.iterdir())) == 2  # the test's nodes share a disk
    slurm_cluster.run("scancel", job_id_of(run))
    wait_for(slurm_cluster, job_id_of(run))
    assert list(scratch.iterdir()) == []


def test_a_setup_line_that_fails_in_a_sourced_file_is_what_why_tells(slurm_cluster, folder):
    (folder / "give.py").write_text("")
    (folder / "site.sh").write_text("true\n(exit 9)\n")
    launch(
        slurm_cluster, folder, "cluster.nodes=1", "task=script", "task.path=give.py",
        "cluster.setup=['true','source ./site.sh']",
    )  # fmt: skip
    job_id = job_id_of(latest(folder))
    wait_for(slurm_cluster, job_id)
    told = launch_module(slurm_cluster, folder, "why", job_id, module="hpcmm.jobs")
    assert "cluster.setup line 2 (`source ./site.sh`) failed with status 9, at line 2 of ./site.sh" in told
    assert f"job {job_id} (run-" in told
    assert told.splitlines()[0].endswith(": setup")
    assert "ExitCode=9:0" in slurm_cluster.run("scontrol", "show", "job", job_id)


def test_a_sweep_is_one_array_whose_failed_points_alone_run_again(slurm_cluster, folder):
    (folder / "work.py").write_text(FAILS_UNTIL_MENDED)
    one_rank = ("cluster.nodes=1", "cluster.ranks_per_node=1", "cluster.gpus_per_node=1")
    began = time.monotonic()
    launched = launch(
        slurm_cluster, folder, *one_rank, "task=script", "task.path=work.py", "task.args=[even],[odd],[x]"
    )
    assert time.monotonic() - began < 15
    assert "an array of 3 tasks" in launched.stdout
    sweep = latest(folder)
    array = job_id_of(sweep)
    wait_for(slurm_cluster, array)
    assert {path.name: path.read_text() for path in sweep.glob("*/exit_status")} == {"exit_status": f"{array}_2 0\n"}
    assert [(sweep / f"{index:04d}" / "exit_status").read_text() for index in range(3)] == [
        f"{array}_0 0\n", f"{array}_1 1\n", f"{array}_2 0\n",
    ]  # fmt: skip
    assert "not yet mended" in (sweep / "0001" / "logs" / "rank_0000.log").read_text()
    why = ask_jobs(slurm_cluster, folder, "why", "latest")
    assert "3 points: 1 failed, 2 completed." in why
    assert f"job {array}_1 (0001)" in why
    assert "[0001/0]" in ask_jobs(slurm_cluster, folder, "logs", "latest")
    assert "Nothing has failed." in ask_jobs(slurm_cluster, folder, "why", "latest/0002", expected=1)
    (folder / "mended").touch()
    again = launch_module(slurm_cluster, folder, "resubmit", "latest")
    assert "an array of 1 task\n" in again
    assert "odd" in again
    wait_for(slurm_cluster, job_id_of(sweep))
    points = json.loads((sweep / "ledger.json").read_text())["points"]
    assert [len(point["jobs"]) for point in points] == [1, 2, 1]
    assert "3 points: 3 completed." in ask_jobs(slurm_cluster, folder, "why", "latest", expected=1)
    assert "1 failed" in ask_jobs(slurm_cluster, folder, "why", array)
    assert "No point has failed: 3 completed" in launch_module(
        slurm_cluster, folder, "resubmit", str(sweep / "ledger.json")
    )


def ask_jobs(cluster, folder, *arguments, expected=0):
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.jobs", *arguments],
        env=cluster.env, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def test_cancelling_a_point_ends_one_task_and_no_sibling(slurm_cluster, folder):
    (folder / "wait.py").write_text("import time; time.sleep(600)\n")
    one_rank = ("cluster.nodes=1", "cluster.ranks_per_node=1", "cluster.gpus_per_node=1")
    launch(
        slurm_cluster, folder, *one_rank, "task=script", "task.path=wait.py", "task.args=[a],[b],[c]",
        "launch.parallel_points=1", "cluster.sbatch.hold=''",
    )  # fmt: skip
    array = job_id_of(latest(folder))
    assert f"{array}_1" in ask_jobs(slurm_cluster, folder, "cancel", "latest/0001", "--wait=0")
    assert slurm_cluster.run("squeue", "-h", "--array", "-o", "%i", "-j", array).split() == [f"{array}_0", f"{array}_2"]
    ask_jobs(slurm_cluster, folder, "cancel", "latest", "--wait=0")  # though squeue writes its tasks as 12_[0,2%1]
    wait_for(slurm_cluster, array)


def launch_module(cluster, folder, *arguments, module="hpcmm.launch"):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=cluster.env, cwd=folder, capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


def test_a_run_after_another_starts_only_when_that_has_completed(slurm_cluster, folder):
    (folder / "fail.py").write_text("raise SystemExit(3)\n")
    (folder / "work.py").write_text("print('worked')\n")
    script = ("task=script", "cluster.nodes=1", "cluster.ranks_per_node=1", "cluster.gpus_per_node=1")
    launch(slurm_cluster, folder, *script, "task.path=work.py", "name=first", "cluster.sbatch.hold=''")
    first = latest(folder)
    launch(slurm_cluster, folder, *script, "task.path=fail.py", "name=second", f"after={first.name}")
    second = latest(folder)
    launch(slurm_cluster, folder, *script, "task.path=work.py", "name=third", f"after={job_id_of(second)}")
    third = latest(folder)
    reasons = slurm_cluster.run("squeue", "-h", "-o", "%j %r", "-j", f"{job_id_of(second)},{job_id_of(third)}")
    assert set(reasons.splitlines()) == {"second Dependency", "third Dependency"}
    slurm_cluster.run("scontrol", "release", job_id_of(first))
    wait_for(slurm_cluster, job_id_of(third))
    assert (first / "exit_status").read_text().endswith(" 0\n")
    assert (second / "exit_status").read_text().endswith(" 3\n")
    assert not (third / "exit_status").exists()
    after_failed = launch(slurm_cluster, folder, *script, "task.path=work.py", f"after={second.name}", expected=1)
    assert "ended as FAILED, so a job after it would never start" in after_failed.stderr
    after_completed = launch(slurm_cluster, folder, *script, "task.path=work.py", f"after={first.name}", "name=fourth")
    assert "nothing to wait for" in after_completed.stderr
    wait_for(slurm_cluster, job_id_of(latest(folder)))
    assert (latest(folder) / "exit_status").read_text().endswith(" 0\n")


def test_a_function_runs_as_a_task_and_sees_its_arguments(slurm_cluster, folder):
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "train.py").write_text("def main(lr, name):\n    print('called with', repr(lr), name)\n")
    function = ("task=function", "task.target=package.train:main", "task.kwargs={lr: 1e-4, name: '$(id)'}")
    launch(slurm_cluster, folder, *function, "cluster=local", "cluster.ranks_per_node=2", "wait=true")
    for rank in range(2):
        assert "called with 0.0001 $(id)" in (latest(folder) / "logs" / f"rank_{rank:04d}.log").read_text()


@pytest.mark.parametrize("command", [("-m", "tell"), pytest.param(("torchrun", "tell.py"), marks=pytest.mark.long)])
def test_a_command_is_run_as_it_was_typed_and_a_launcher_s_workers_meet_over_the_nodes(slurm_cluster, folder, command):
    (folder / "tell.py").write_text(TELLS_ITS_PLACE)
    words = ["--x", '{"a": [1]}', "${oc.env:HOME}", "???", "", "it's $HOME", "--", "cluster.nodes=9"]
    ranks = 1 if command[0] == "torchrun" else 2
    beside = {"PATH": f"{Path(sys.executable).parent}:{slurm_cluster.env['PATH']}"}
    shape = ("cluster.nodes=2", f"cluster.ranks_per_node={ranks}")
    launch(slurm_cluster, folder, *shape, "--", *command, *words, environment=beside)
    wait_for(slurm_cluster, job_id_of(latest(folder)), within_s=250)
    logs = [log.read_text() for log in sorted((latest(folder) / "logs").glob("rank_*.log"))]
    told = [json.loads(line) for log in logs for line in log.splitlines() if line.startswith('{"rank"')]
    copy = str(latest(folder) / "code" / "project" / "tell.py")
    expected = [{"rank": rank, "of": 4, "argv": [copy, *words]} for rank in range(4)]
    assert sorted(told, key=lambda each: each["rank"]) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.nodes=99"], "Asked for are 99 nodes"),
        (["cluster.time_limit_min=100000"], "cluster.time_limit_min is 100000"),
    ],
)
def test_a_job_that_is_accepted_but_cannot_start_is_told(slurm_cluster, folder, overrides, expected):
    done = launch(slurm_cluster, folder, *overrides)
    job_id = job_id_of(latest(folder))
    slurm_cluster.run("scancel", job_id)
    assert f"job {job_id} is queued but cannot start as it is" in done.stderr
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["after=99999999"], "Neither squeue nor sacct knows job 99999999"),
        (["cluster.constraint=none_such"], "cluster.constraint is none_such"),
        (["cluster.exclude=none_such"], "cluster.exclude is none_such"),
        (["cluster.gpu_type=h100"], "GPU"),
        (
            ["cluster.submit_environment.SLURM_CONF=/none/slurm.conf"],
            "SLURM_CONF is /none/slurm.conf, which is not a file",
        ),
    ],
)
def test_a_refusal_says_what_to_do(slurm_cluster, folder, overrides, expected):
    done = launch(slurm_cluster, folder, *overrides, expected=1)
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_whose_number_another_job_has_by_now_is_told_apart_from_it(slurm_cluster, folder):
    (folder / "tell.py").write_text(TELLS_WHERE_IT_IS)
    launch(
        slurm_cluster, folder, "task=script", "task.path=tell.py", "name=new", "cluster.sbatch.hold=''",
        "cluster.sbatch.clusters=hpcmm",
    )  # fmt: skip
    new = latest(folder)
    noted = json.loads((new / "submission.json").read_text())
    job_id = noted["job_id"]
    assert noted["jobs"][job_id]["cluster"] == "hpcmm"
    assert noted["jobs"][job_id]["slurm_submitted_unix_s"] > 0
    # A run from before the controller began to count anew.
    old = folder / "runs" / "old-20260101-000000-1a2b"
    old.mkdir()
    for name in ("config.yaml", "submission.sh"):
        (old / name).write_text((new / name).read_text())
    (old / "submission.json").write_text(json.dumps({"job_id": job_id, "submitted_unix_s": 1}))

    def jobs(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "hpcmm.jobs", *arguments],
            env=slurm_cluster.env, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    said = f"Slurm's job {job_id} is another job now (new, of "
    assert said in jobs("status", "old").stderr
    assert (
        said
        in launch(slurm_cluster, folder, "task=script", "task.path=tell.py", f"after={old.name}", expected=1).stderr
    )
    assert said in jobs("cancel", "old").stderr
    for asked in ("new", job_id):
        shown = json.loads(jobs("status", "--json", asked).stdout)["targets"][0]["jobs"]
        assert [(job["state"], job["cluster"], job["run_dir"]) for job in shown] == [("PENDING", "hpcmm", str(new))]
    assert jobs("cancel", "new").stdout == f"Cancelled job {job_id}.\n"
