"""Jobs that fail in every way that can be made here, on the real local Slurm, and what ``hpcmm.jobs why`` says of them.

All jobs run at once: the fixture starts them, breaks them, and waits until all are over. ``make test`` has a few.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

LIGHT = [
    "cluster=local_slurm",
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.gpus_per_node=0",
    "cluster.kill_wait_s=20",
    "cluster.stop_warning_s=0",
    "train.evaluate=false",
    "train.micro_batch_size=1",
    "train.steps=100000",
    "data.image_size=64",
    "model.decoder_width=32",
    "data.slow_rank=0",
    "data.slow_s=0.5",
]
ALONE = "cluster.nodes=1"
COLLECTIVE_TIMEOUT_S = 15
SITECUSTOMIZE = """
import os, signal, sys

def fail(number, frame):
    if os.environ["FAULT"] == "raise":
        raise ArithmeticError("the loss is not a number")
    import torch
    torch.empty(1 << 60)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")

if os.environ.get("FAULT") in {"raise", "memory"}:
    signal.signal(signal.SIGHUP, fail)
elif os.environ.get("FAULT") == "import" and os.environ.get("SLURM_PROCID") == "1":
    sys.meta_path.insert(0, Missing())
"""


@dataclass
class Faulty:
    """A job that is broken on purpose."""

    name: str
    job_id: str
    run: Path
    broken_at: float = 0.0
    over_at: float = 0.0

    @property
    def seconds_to_end(self) -> float:
        return self.over_at - self.broken_at


class Jobs:
    """Starts, breaks and asks about jobs, all of which run under ``profile``."""

    def __init__(self, cluster, folder, profile):
        self.cluster = cluster
        self.profile = profile
        self.nodes = cluster.nodes
        self.folder = folder
        self.all: dict[str, Faulty] = {}
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")

    def module(self, module, *arguments, **environment):
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=self.cluster.env | {"PYTHONPATH": path} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def start(self, name, *overrides, fault=""):
        launched = self.module(
            "hpcmm.launch", *LIGHT, f"profile={self.profile}", f"name={name}", *overrides, FAULT=fault
        )
        assert launched.returncode == 0, launched.stderr
        said = dict(line.split(":", 1) for line in launched.stdout.splitlines())
        self.all[name] = Faulty(name, said["job id"].strip(), Path(said["run directory"].strip()), time.monotonic())

    def broken(self, name):
        self.all[name].broken_at = time.monotonic()

    def rank_pid(self, name, rank):
        start = self.records(name, rank)[0]
        assert start["event"] == "start"
        return start["pid"]

    def records(self, name, rank):
        path = self.all[name].run / "metrics" / f"rank_{rank:04d}.jsonl"
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return []

    def await_rank(self, name, rank, part):
        """Wait until a rank has finished a part of its start, or ``step``, its first step."""
        wait_until(lambda: any(part in (r["event"], r.get("part")) for r in self.records(name, rank)), 120)

    def signal_rank(self, name, rank, number):
        self.broken(name)
        os.kill(self.rank_pid(name, rank), number)

    def note_those_over(self):
        """Ask once for all; a job that Slurm requeued, or that still completes, has ended as far as its ranks go."""
        listed = self.cluster.run("squeue", "--noheader", "--states=all", "--format=%A %T").splitlines()
        states = dict(line.split() for line in listed)
        for job in self.all.values():
            if not job.over_at and states.get(job.job_id) not in {"RUNNING", "CONFIGURING"}:
                if states.get(job.job_id) == "PENDING" and job.name != "node_failure":
                    continue
                job.over_at = time.monotonic()

    def are_over(self):
        self.note_those_over()
        return all(job.over_at for job in self.all.values())

    def wait_for_the_last_words(self):
        """Of ranks that are told to end: until no job completes any more, but for that of a lost node."""
        asked = {job.job_id for job in self.all.values() if job.name != "node_failure"}
        until = time.monotonic() + 60
        while time.monotonic() < until:
            listed = self.cluster.run("squeue", "--noheader", "--states=COMPLETING", "--format=%A").split()
            if not asked & set(listed):
                return
            time.sleep(0.3)

    def reports(self, name):
        """Ranks that left a report that the analysis can read."""
        return {path.stem for path in (self.all[name].run / "nsys").glob("rank_*.*") if path.stat().st_size > 50_000}

    def why(self, name):
        done = self.module("hpcmm.jobs", "why", str(self.all[name].run), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def wait_until(condition, within_s):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.3)
    pytest.fail(f"not within {within_s} s")


ALL = [pytest.param("off", marks=pytest.mark.long), pytest.param("nsys", marks=[pytest.mark.nsys, pytest.mark.long])]
"""Profiles under which all jobs are started."""
with_all_jobs = pytest.mark.parametrize("jobs", ALL, indirect=True, scope="module")


@pytest.fixture(scope="module", params=["few", *ALL])
def jobs(request, slurm_cluster, tmp_path_factory):
    if request.param == "nsys":
        request.getfixturevalue("nsys")
    jobs = Jobs(slurm_cluster, tmp_path_factory.mktemp("faulty jobs"), "nsys" if request.param == "nsys" else "off")
    has_all = request.param != "few"
    first, second, third, fourth = jobs.nodes
    elsewhere = f"cluster.exclude='{third},{fourth}'"  # keeps a job off the nodes that are broken
    timeout = f"parallel.collective_timeout_s={COLLECTIVE_TIMEOUT_S}"
    if has_all:
        jobs.start("link_cut", "cluster.nodes=3", f"cluster.sbatch.nodelist='{first},{second},{third}'", timeout)
    jobs.start("node_failure", f"cluster.sbatch.nodelist='{first},{fourth}'")
    if has_all:
        jobs.start("time_limit", elsewhere, ALONE, "cluster.time_limit_min=1")
    try:
        jobs.await_rank("node_failure", 1, "step")
        slurm_cluster.fault("stop", fourth)
        jobs.broken("node_failure")
        if has_all:
            jobs.await_rank("link_cut", 2, "step")
            slurm_cluster.fault("cut", third)
            jobs.broken("link_cut")
            jobs.start("memory", elsewhere, ALONE, fault="memory")
            jobs.start("import", elsewhere, fault="import")
        jobs.start("hang", elsewhere, timeout, "data.slow_rank=1", "data.slow_s=600")
        jobs.start("sigkill", elsewhere)
        jobs.start("raise", elsewhere, fault="raise")
        jobs.start("cancel", elsewhere, ALONE)
        jobs.start("data", elsewhere, ALONE, "data.generate=false", "data.root=/none/such")
        jobs.start("setup", elsewhere, ALONE, "cluster.setup=[no_such_command]")
        jobs.await_rank("sigkill", 1, "step")
        jobs.signal_rank("sigkill", 1, signal.SIGKILL)
        # Not before the first step: within a lazy import, transformers makes an ImportError of any exception.
        jobs.await_rank("raise", 1, "step")
        jobs.signal_rank("raise", 1, signal.SIGHUP)
        if has_all:
            jobs.await_rank("memory", 0, "step")
            jobs.signal_rank("memory", 0, signal.SIGHUP)
        jobs.await_rank("cancel", 0, "imports")
        jobs.broken("cancel")
        assert jobs.module("hpcmm.jobs", "cancel", "cancel", "--wait=0").returncode == 0
        if has_all:
            failures = jobs.all["link_cut"].run / "failures"
            wait_until(lambda: len(list(failures.glob("*/rank_*.error.json"))) >= 2, 60)
            slurm_cluster.fault("restore", third)

        wait_until(jobs.are_over, 180)
        jobs.node_failure = jobs.why("node_failure")  # while the node is down
        jobs.wait_for_the_last_words()
        yield jobs
    finally:
        slurm_cluster.run("scancel", *(job.job_id for job in jobs.all.values()))
        for node in (third, fourth):
            slurm_cluster.fault("restore", node)


def test_a_rank_that_raises_is_named_with_its_traceback(jobs):
    told = jobs.why("raise")
    assert told["class"] == "exception"
    assert (told["first"]["rank"], told["first"]["node"]) == (1, jobs.nodes[1])
    assert told["first"]["what"] == "ArithmeticError: the loss is not a number"
    assert "sitecustomize.py" in "".join(told["first"]["traceback"])
    assert told["state"] == "FAILED"
    assert told["exit_code"] != "0:0"
    first, *others = told["events"]
    assert (first["rank"], first["kind"]) == (1, "exception")
    assert {event["kind"] for event in others} <= {"peer lost"}


def test_a_rank_that_is_killed_is_named_though_the_others_only_lose_it(jobs):
    told = jobs.why("sigkill")
    assert told["class"] == "killed"
    assert (told["first"]["rank"], told["first"]["node"]) == (1, jobs.nodes[1])
    assert told["first"]["what"] == "SIGKILL"
    assert told["first"]["last_step"] >= 0


def test_the_rank_that_others_wait_for_in_vain_is_named_with_its_place(jobs):
    told = jobs.why("hang")
    assert told["class"] == "collective timeout"
    assert (told["first"]["rank"], told["first"]["node"]) == (1, jobs.nodes[1])
    assert "workloads/anomaly/training.py" in told["first"]["what"]
    assert told["first"]["last_step"] is None


@with_all_jobs
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("memory", "out of memory", "can't allocate memory"),
        ("import", "import", "No module named 'deepspeed'"),
    ],
)
def test_the_kind_of_an_exception_is_told(jobs, name, kind, said):
    told = jobs.why(name)
    assert told["class"] == kind
    assert said in told["first"]["what"]
    assert told["first"]["rank"] == {"memory": 0, "import": 1}[name]


def test_data_that_are_missing_are_told_of_the_preparation_and_of_no_rank(jobs):
    told = jobs.why("data")
    assert told["class"] == "data"
    assert "/none/such" in told["first"]["what"]
    assert told["first"]["rank"] is None


def test_what_ended_the_script_before_its_ranks_is_quoted_from_its_log(jobs):
    told = jobs.why("setup")
    assert told["class"] == "setup"
    assert "before any rank started" in told["first"]["what"]
    assert "no_such_command" in told["first"]["what"]
    assert told["exit_code"] == "127:0"


def test_a_dead_node_is_named_with_the_line_that_leaves_it_out(jobs):
    told = jobs.node_failure
    assert told["class"] == "node failure"
    assert told["first"]["node"] == jobs.nodes[3]
    assert told["first"]["rank"] == 1
    assert told["exclude"] == [jobs.nodes[3]]
    assert any(f"--exclude={jobs.nodes[3]}" in line for line in told["advice"])


@with_all_jobs
def test_a_cut_link_is_named(jobs):
    told = jobs.why("link_cut")
    assert told["class"] == "node failure"
    assert told["first"]["node"] == jobs.nodes[2]
    assert told["first"]["rank"] == 2
    assert told["exclude"] == [jobs.nodes[2]]


def test_a_cancelled_job_is_nobody_s_failure(jobs):
    told = jobs.why("cancel")
    assert told["class"] == "cancelled"
    assert told["first"]["rank"] is None


@with_all_jobs
def test_a_job_out_of_time_is_nobody_s_failure(jobs):
    told = jobs.why("time_limit")
    assert told["class"] == "time limit"
    assert told["first"]["rank"] is None


def test_no_failed_job_lasts_until_its_time_limit(jobs):
    half = 600  # of the cluster's time limit of 20 minutes; on idle cores each takes less than three
    took = {name: job.seconds_to_end for name, job in jobs.all.items()}
    assert {name: seconds for name, seconds in took.items() if seconds >= half} == {}


def test_the_reports_of_ranks_that_did_not_fail_outlive_the_job(jobs):
    if jobs.profile == "off":
        assert not any(jobs.reports(name) for name in jobs.all)
        return
    both = {"rank_0000", "rank_0001"}
    for name in ("raise", "sigkill", "hang", "import"):
        assert jobs.reports(name) == both, name
    for name in ("cancel", "time_limit", "memory"):
        assert jobs.reports(name) == {"rank_0000"}, name
    assert "rank_0000" in jobs.reports("node_failure")
    assert both <= jobs.reports("link_cut")


def test_why_reads_well_in_a_terminal_and_without_accounting(jobs):
    job = jobs.all["sigkill"]
    bare = jobs.folder / "bin"
    bare.mkdir()
    (bare / "sacct").write_text("#!/bin/sh\necho 'sacct: error: Connection refused' >&2\nexit 1\n", encoding="utf-8")
    (bare / "sacct").chmod(0o755)
    done = jobs.module("hpcmm.jobs", "why", job.job_id, PATH=f"{bare}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^first:    rank 1 on {jobs.nodes[1]} at 20", done.stdout, re.MULTILINE)
    assert re.search(r"^what:     SIGKILL$", done.stdout, re.MULTILINE)
    assert "sacct gives no answer" in done.stdout
    listed = jobs.module("hpcmm.jobs", "list", "--since", "now-1hour", PATH=f"{bare}:{os.environ['PATH']}")
    assert listed.returncode == 0
    assert "sacct gives no answer" in listed.stderr
    assert str(job.run) in listed.stdout


def test_logs_carry_their_rank_in_front(jobs):
    done = jobs.module("hpcmm.jobs", "logs", "raise", "-n", "1000")
    assert done.returncode == 0
    assert any(line.startswith("[1] ") and "ArithmeticError" in line for line in done.stdout.splitlines())
    assert any(line.startswith(f"[batch] srun: error: {jobs.nodes[1]}: task 1") for line in done.stdout.splitlines())
    followed = jobs.module("hpcmm.jobs", "logs", "raise", "--follow", "--ranks=1")
    assert followed.returncode == 0
    assert all(line.startswith("[1] ") for line in followed.stdout.splitlines())


def test_cancelling_what_is_over_says_so(jobs):
    done = jobs.module("hpcmm.jobs", "cancel", "raise")
    assert done.returncode == 1
    assert re.search(r"Nothing to cancel: job \d+ of raise is over \(FAILED since ", done.stderr)
