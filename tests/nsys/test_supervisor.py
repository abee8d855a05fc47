"""What a signal, and the death of the process in front, do to a rank that runs apart."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hpcmm.nsys import supervisor
from hpcmm.nsys.capture import run_under_nsys

PROGRAM = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from hpcmm.nsys.supervisor import run_supervised
folder = Path(sys.argv[1])
LOUD = "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'told\\\\n')); " + sys.argv[2]

def pid():
    try:
        return int((folder / "pid").read_text())
    except (OSError, ValueError):
        return None

def work(apart):
    rank = subprocess.Popen([sys.executable, "-c", LOUD])
    (folder / "pid").write_text(str(rank.pid))
    apart.say_ended(rank.wait())
    (folder / "finished").write_text(str(apart.in_a_hurry))

status = run_supervised(work, rank_pid=pid, ended=lambda end: print("ended", end.status, flush=True),
                        must_end=(folder / "must_end").exists)
print("status", status)
"""
FOR_EVER = "os.write(1, b'ready\\n')\nwhile True: time.sleep(0.1)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOR_EVER


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(rank):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), rank]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def gone(pid):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("rank", "status"), [(FOR_EVER, -signal.SIGTERM), (DEAF, -signal.SIGKILL)], ids=["heeds", "does not heed"]
)
def test_a_rank_that_is_told_to_end_leaves_time_to_finish(start, tmp_path, rank, status):
    process = start(rank)
    # All below it, as Slurm does where it follows processes by their parents: none of them is the rank.
    below = psutil.Process(process.pid).children(recursive=True)
    assert int((tmp_path / "pid").read_text()) not in {each.pid for each in below}
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == f"ended {status}\nstatus {status}\n"
    assert (tmp_path / "finished").read_text() == "True"


def test_a_rank_ends_when_it_must(start, tmp_path):
    process = start(FOR_EVER)
    (tmp_path / "must_end").touch()
    assert process.communicate(timeout=20)[0].endswith(f"status {-signal.SIGTERM}\n")


def test_a_rank_does_not_outlive_the_process_in_front(start, tmp_path):
    process = start(FOR_EVER)
    rank = int((tmp_path / "pid").read_text())
    apart = psutil.Process(rank).ppid()
    process.kill()
    assert gone(rank)
    assert gone(apart)


def test_the_living_below_a_process_are_found_and_no_other():
    tree = "import os, sys, time\nif os.fork() == 0: os._exit(0)\n"  # it stays a zombie
    tree += "living = os.fork() or os.fork()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", tree], stdout=subprocess.PIPE, text=True) as top:
        pids = {int(top.stdout.readline()) for _ in range(3)}  # a child, and a child of that
        until = time.monotonic() + 10
        while sum(each.status() == psutil.STATUS_ZOMBIE for each in psutil.Process(top.pid).children()) < 1:
            assert time.monotonic() < until
        assert supervisor._descendants(top.pid) == sorted(pids - {top.pid})
        assert {top.pid, *pids} <= set(supervisor._descendants(os.getpid()))
        for pid in pids - {top.pid}:
            os.kill(pid, signal.SIGKILL)
        top.kill()


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.mark.nsys
def test_a_capture_outlives_a_signal_to_everything_that_slurm_sees(nsys, tmp_path):
    ready, report = tmp_path / "ready", tmp_path / "rank_0000.nsys-rep"
    training = "\n".join(
        [
            "import nvtx, pathlib, time",
            f"with nvtx.annotate('x', domain='hpcmm'): pathlib.Path({str(ready)!r}).touch()",
            "time.sleep(600)",
        ]
    )
    profile = [nsys, "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none"]
    before = children()
    status = run_under_nsys(profile, [sys.executable, "-c", training], report, must_end=ready.exists)
    assert status == 128 + signal.SIGTERM
    assert report.stat().st_size > 10_000
    assert children() <= before
