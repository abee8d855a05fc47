"""Real processes that fail, and the records that they and their parent leave."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback

import psutil
import pytest

from hpcmm.config.schema import SCRIPT, TaskConfig
from hpcmm.node.recorder import frames_of_program
from hpcmm.runs import failures
from hpcmm.runs.failures import RankError, RankExit
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.entrypoint import _run_script

WRAPPER = """
import sys
from pathlib import Path
from hpcmm.worker.signal_forwarding import end_as, run_watched
from hpcmm.runs.run_dir import RunDir
sys.exit(end_as(run_watched([sys.executable, "-c", sys.argv[2]], RunDir(Path(sys.argv[1])), 3)))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from hpcmm.node.recorder import recording_failure
from hpcmm.runs.run_dir import RunDir
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as submitit has it
def waiting_for_nothing():
    Path(os.environ["READY"]).touch()
    time.sleep(60)
with recording_failure(RunDir(Path(os.environ["RUN"]))):
    BODY
"""


@pytest.fixture
def job(tmp_path):
    return Started(tmp_path)


class Started:
    def __init__(self, folder):
        self.run = RunDir(folder / "a run's directory")
        self.ready = folder / "ready"
        self.environ = os.environ | {
            "RUN": str(self.run.root),
            "READY": str(self.ready),
            "SLURM_JOB_ID": "12",
            "SLURM_RESTART_COUNT": "1",
            "SLURM_PROCID": "3",
            "SLURMD_NODENAME": "node7",
        }
        self.environ.pop("SLURM_JOB_NODELIST", None)
        self.attempt = self.run.failures / "12.1"

    def start(self, body):
        program = RANK.replace("BODY", body)
        return subprocess.Popen(
            [sys.executable, "-c", WRAPPER, str(self.run.root), program], env=self.environ, stderr=subprocess.PIPE
        )

    def child_of(self, process):
        until = time.monotonic() + 10
        while not self.ready.exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        return psutil.Process(process.pid).children()[0].pid

    def error(self):
        return failures.read(failures.error_file(self.attempt, 3), RankError)

    def exit(self):
        return failures.read(failures.exit_file(self.attempt, 3), RankExit)


def test_an_exception_is_recorded_by_the_rank_and_its_status_by_the_parent(job):
    before = time.time_ns()
    process = job.start("raise ArithmeticError('no number')")
    assert process.wait(20) == 1
    error = job.error()
    assert (error.rank, error.node, error.kind, error.message) == (3, "node7", "ArithmeticError", "no number")
    assert error.traceback[-1] == "ArithmeticError: no number"
    assert "recorder.py" not in "".join(error.traceback)
    assert before < error.unix_ns <= job.exit().unix_ns < time.time_ns()
    assert (job.exit().status, job.exit().signal) == (1, None)
    process.stderr.close()


def test_of_a_long_traceback_the_end_and_the_causes_are_kept(job):
    source = "def f0(): 1 / 0\n" + "".join(f"def f{n}(): f{n - 1}()\n" for n in range(1, 80))
    source += "try:\n    raise MemoryError(1)\nexcept MemoryError:\n    f79()\n"
    body = f"exec({source!r})"
    process = job.start(body)
    assert process.wait(20) == 1
    lines = job.error().traceback
    assert "MemoryError: 1" in lines
    assert len(lines) < 80
    assert not any("in f79" in line for line in lines)
    assert lines[-1] == "ZeroDivisionError: division by zero"
    process.stderr.close()


def test_the_annotated_step_in_which_an_exception_came_is_recorded(job):
    loop = "from hpcmm import annotate\nfor n in annotate.steps(range(9)):\n    if n == 4: raise ValueError(n)"
    process = job.start(f"exec({loop!r})")
    assert process.wait(20) == 1
    assert job.error().step == 4
    process.stderr.close()


def test_a_rank_that_ends_well_leaves_nothing(job):
    process = job.start("pass")
    assert process.wait(20) == 0
    assert not job.run.failures.exists()
    process.stderr.close()


def test_a_killed_rank_is_recorded_and_its_parent_ends_the_same_way(job):
    process = job.start("waiting_for_nothing()")
    os.kill(job.child_of(process), signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert (job.exit().status, job.exit().signal) == (None, signal.SIGKILL)
    assert job.error() is None
    process.stderr.close()


def test_a_rank_that_is_told_to_end_leaves_its_stacks(job):
    process = job.start("waiting_for_nothing()")
    job.child_of(process)
    process.send_signal(signal.SIGTERM)  # the parent passes it on
    assert process.wait(20) == -signal.SIGTERM
    assert "in waiting_for_nothing" in failures.stacks_file(job.attempt, 3).read_text()
    assert job.exit().signal == signal.SIGTERM
    process.stderr.close()


def test_a_rank_that_is_told_to_end_after_its_exception_has_the_status_of_that(job):
    body = "import atexit\n    atexit.register(waiting_for_nothing)\n    raise ValueError('no')"
    process = job.start(body)
    os.kill(job.child_of(process), signal.SIGTERM)
    process.wait(20)
    assert job.error().kind == "ValueError"
    assert (job.exit().status, job.exit().signal) == (1, None)
    process.stderr.close()


def test_a_rank_does_not_outlive_its_parent(job):
    process = job.start("waiting_for_nothing()")
    child = job.child_of(process)
    process.kill()
    process.wait(20)
    process.stderr.close()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:  # dead, and not yet buried
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    pytest.fail("the rank lives on")


def test_a_run_directory_that_cannot_be_written_does_not_stop_the_rank(job):
    job.run.root.parent.mkdir(exist_ok=True)
    job.run.root.write_text("a file stands here")
    process = job.start("raise ArithmeticError('no number')")
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"cannot be written" in complaint
    assert b"ArithmeticError: no number" in complaint


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"rank": 1}', '{"rank": "1", "node": "n", "unix_ns": 1, "status": 1, "signal": null}', "[" * 9999],
)
def test_what_is_no_record_is_read_as_none(tmp_path, text):
    path = tmp_path / "rank_0001.exit.json"
    path.write_text(text)
    assert failures.read(path, RankExit) is None


def test_a_record_of_a_later_version_is_read(tmp_path):
    path = tmp_path / "rank_0001.exit.json"
    path.write_text(json.dumps({"rank": 1, "node": "n", "unix_ns": 1, "status": 1, "signal": None, "new": 1}))
    assert failures.read(path, RankExit) == RankExit(1, "n", 1, 1, None)


def test_the_traceback_is_that_of_a_script_that_python_itself_runs(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("def step():\n    raise RuntimeError('no')\n\nstep()\n")
    with pytest.raises(RuntimeError) as raised:
        _run_script(TaskConfig(SCRIPT, path=str(script)))
    raised.value.__traceback__ = raised.value.__traceback__.tb_next  # without this test's own frame
    told = [frame.name for frame in traceback.extract_tb(frames_of_program(raised.value))]
    assert told == ["<module>", "step"]
    assert [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)][-2:] == told


def test_a_process_that_the_program_forks_leaves_no_record_of_the_rank(job):
    body = "pid = os.fork()\n    if not pid: raise ValueError('of the child')\n    os.waitpid(pid, 0)"
    process = job.start(body)
    assert process.wait(20) == 0
    assert not failures.error_file(job.attempt, 3).exists()
    process.stderr.close()


def test_a_program_may_close_what_it_has_not_opened_and_its_own_error_is_told(job):
    process = job.start("os.closerange(3, 4096)\n    raise MemoryError('mine')")
    assert process.wait(20) == 1
    assert job.error().kind == "MemoryError"
    process.stderr.close()
