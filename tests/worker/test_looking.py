"""Real ranks that are asked where they stand, and the watchdog that ends them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from hpcmm.node.recorder import is_still, moved
from hpcmm.runs import failures, stacks
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.stacks import Answer, Look
from hpcmm.worker.signal_forwarding import EXIT_STATUS_OF_HANG, Stillness, Watchdog

NO_MEMORY_FILES = """
import os
if "NO_MEMORY_FILES" in os.environ:
    del os.memfd_create
"""
WRAPPER = f"""{NO_MEMORY_FILES}
import sys
from pathlib import Path
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker import signal_forwarding
signal_forwarding._LOOK_S = signal_forwarding._BETWEEN_LOOKS_S = 0.05
run = RunDir(Path(sys.argv[1]))
watch = signal_forwarding.RankWatch(run, 3)
status = signal_forwarding.run_watched([sys.executable, "-c", sys.argv[2]], run, 3, watch)
watch.keep()
sys.exit(signal_forwarding.end_as(status))
"""
RANK = f"""{NO_MEMORY_FILES}
import ctypes, os, signal, threading, time
from pathlib import Path
from hpcmm.node.recorder import recording_failure
from hpcmm.runs.run_dir import RunDir
def wait_for_nothing():
    Path(os.environ["READY"]).touch()
    time.sleep(60)
def wait_with_pythons_lock():
    Path(os.environ["READY"]).touch()
    ctypes.PyDLL(None).sleep(60)
    Path(os.environ["WOKEN"]).touch()
with recording_failure(RunDir(Path(os.environ["RUN"]))):
    BODY
"""


class Rank:
    def __init__(self, folder):
        self.run = RunDir(folder / "run")
        self.run.create()
        self.ready, self.woken = folder / "ready", folder / "woken"
        self.environ = os.environ | {
            "RUN": str(self.run.root),
            "READY": str(self.ready),
            "WOKEN": str(self.woken),
            "SLURM_JOB_ID": "12",
            "SLURM_RESTART_COUNT": "0",
            "SLURM_PROCID": "3",
            "SLURMD_NODENAME": "node7",
        }
        self.folder = stacks.stacks_folder(self.run, self.environ)

    @contextmanager
    def running(self, program):
        process = subprocess.Popen(
            [sys.executable, "-c", WRAPPER, str(self.run.root), program], env=self.environ, stderr=subprocess.PIPE
        )
        try:
            wait_for(self.ready.exists)
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):  # it has ended, and all that it had started
                # Who only lost its parent would hold the pipe open, for which communicate() waits.
                for member in psutil.Process(process.pid).children(recursive=True):
                    member.kill()
            process.kill()
            process.communicate()

    def asked(self):
        (answer,) = stacks.ask(self.run, self.folder, 1, 30.0).values()
        return answer


def wait_for(condition):
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.fixture
def rank(tmp_path):
    return Rank(tmp_path)


def test_a_rank_tells_where_it_stands_and_goes_on(rank):
    with rank.running(RANK.replace("BODY", "wait_for_nothing()")) as process:
        answer = rank.asked()
        assert (answer.rank, answer.node, answer.why) == (3, "node7", "")
        assert "in wait_for_nothing" in answer.looks[-1].stack.splitlines()[1]
        assert is_still(answer)
        assert process.poll() is None


def test_a_rank_whose_c_code_holds_pythons_lock_tells_too_and_is_not_woken(rank):
    with rank.running(RANK.replace("BODY", "wait_with_pythons_lock()")) as process:
        answer = rank.asked()
        place = stacks.main_place(answer.looks[-1].stack)
        assert place is not None, answer
        assert "in wait_with_pythons_lock" in place.frames[0]
        assert "holds Python's lock" in answer.why
        assert process.poll() is None
        assert not rank.woken.exists()


def test_a_rank_that_is_stopped_is_said_to_be(rank):
    with rank.running(RANK.replace("BODY", "wait_for_nothing()")) as process:
        (child,) = psutil.Process(process.pid).children()
        rank.asked()
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
        answer = rank.asked()
        assert answer.why == "it is stopped (SIGSTOP)"
        assert answer.looks[-1].stack == ""


def test_a_program_that_does_not_listen_is_sent_no_signal(rank):
    program = "import os, pathlib, time; pathlib.Path(os.environ['READY']).touch(); time.sleep(60)"
    with rank.running(program) as process:
        assert "does not listen" in rank.asked().why
        assert process.poll() is None


def test_the_thread_that_answers_is_none_that_a_program_waits_for(rank):
    body = "wait_for_nothing() if len(threading.enumerate()) == 1 else None"
    with rank.running(RANK.replace("BODY", body)):
        assert "in wait_for_nothing" in rank.asked().looks[-1].stack


SLEEPS = """
import os, time
def wait_for_nothing():
    open(os.environ["READY"], "w").close()
    time.sleep(60)
wait_for_nothing()
"""
STARTS = """
import subprocess, sys
from hpcmm.annotate.auto_instrument import annotate_children
annotate_children()
WHAT
"""
STARTS_PYTHON = (
    "subprocess.run([sys.executable, '-c', os.environ['SLEEPS']], env=os.environ | {'RANK': '5', 'WORLD_SIZE': '8'})"
)
FORKS = """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=wait_for_nothing, name="loader")
child.start()
child.join()
time.sleep(60)
"""


def rank_that_runs(starts):
    return RANK.replace("BODY", "exec(os.environ['STARTS'])"), {
        "STARTS": STARTS.replace("WHAT", starts),
        "SLEEPS": SLEEPS,
    }


@pytest.mark.parametrize("without", [{}, {"NO_MEMORY_FILES": "1"}], ids=["", "as built for an old C library"])
def test_a_python_that_a_rank_starts_tells_where_it_stands(rank, without):
    program, more = rank_that_runs(STARTS_PYTHON)
    rank.environ |= more | without
    with rank.running(program) as process:
        (worker,) = rank.asked().workers
        assert (worker.rank, worker.world, worker.joined, worker.why) == (5, 8, False, "")
        assert "in wait_for_nothing" in worker.looks[-1].stack.splitlines()[1]
        assert not moved(*worker.looks)
        assert process.poll() is None


def test_a_process_that_a_rank_forks_tells_by_itself_and_leaves_the_stacks_of_the_rank_alone(rank):
    program, more = rank_that_runs(FORKS)
    rank.environ |= more
    with rank.running(program):
        answer = rank.asked()
        (worker,) = answer.workers
        assert worker.name == "loader"
        assert "in wait_for_nothing" in worker.looks[-1].stack.splitlines()[1]
        assert "in join" in answer.looks[-1].stack
        os.kill(worker.pid, signal.SIGTERM)
        wait_for(lambda: not rank.asked().workers)
        assert failures.stacks_file(rank.run.failures / "12.0", 3).read_text(encoding="utf-8") == ""


def test_a_program_that_is_no_python_is_named_with_what_it_does(rank):
    program, more = rank_that_runs("""subprocess.run(["sh", "-c", ': > "$READY"; sleep 60; true'])""")
    rank.environ |= more
    with rank.running(program):
        wait_for(lambda: [worker.name for worker in rank.asked().workers] == ["sleep"])
        (worker,) = rank.asked().workers
        assert worker.why.startswith("it sleeps")
        assert (worker.rank, worker.looks[-1].stack) == (None, "")


def test_what_a_rank_has_started_leaves_its_stacks_when_all_are_told_to_end(rank):
    program, more = rank_that_runs(STARTS_PYTHON)
    rank.environ |= more
    with rank.running(program) as process:
        (worker,) = rank.asked().workers
        os.kill(worker.pid, signal.SIGTERM)
        process.terminate()
        process.wait(30)
    answer = stacks.read_answers(rank.run, rank.folder)[3]
    assert (answer.key, [each.rank for each in answer.workers]) == (stacks.AT_END, [5])
    assert "in wait_for_nothing" in answer.workers[0].looks[-1].stack


def test_a_rank_ends_when_the_watchdog_orders_it(rank):
    with rank.running(RANK.replace("BODY", "wait_for_nothing()")) as process:
        rank.asked()
        stacks.post(rank.folder, ends=True)
        assert process.wait(30) == -signal.SIGTERM
    ended = failures.read(failures.exit_file(rank.run.failures / "12.0", 3), failures.RankExit)
    assert ended is not None
    assert ended.signal == signal.SIGTERM


STACK = 'Stack (most recent call first):\n  File "/home/me/train.py", line {} in <module>\n'


def answers(*looks, why=""):
    return {rank: Answer(rank, "n", "k", [look], why) for rank, look in enumerate(looks)}


def at(line, **more):
    return Look(0, STACK.format(line), **more)


def test_ranks_that_stand_still_for_long_enough_hang():
    still = Stillness(60.0)
    assert [still.hear(now_s, answers(at(3), at(4)), 0) for now_s in (100, 115, 130, 145)] == [None] * 4
    assert still.hear(160, answers(at(3), at(4)), 0) == 60


def test_one_rank_that_moves_is_enough_such_as_in_an_evaluation_of_its_own():
    still = Stillness(60.0)
    for second in range(0, 600, 15):
        assert still.hear(second, answers(at(3, groups={"0": 9}), at(second, groups={"0": 9})), 0) is None


@pytest.mark.parametrize(
    "now",
    [{"children_s": 200.0}, {"own_s": 9.0}, {"io_bytes": 1 << 30}, {"step": 8}, {"groups": {"0": 8}}],
    ids=["a compiler that it waits for", "a long step", "a checkpoint that it writes", "a step", "a collective"],
)
def test_what_else_moves_begins_the_time_anew(now):
    still = Stillness(60.0)
    begun = Look(0, STACK.format(3), 7, {"0": 7})
    later = Look(45_000_000_000, STACK.format(3), **({"step": 7, "groups": {"0": 7}} | now))
    for second in (0, 15, 30):
        still.hear(second, answers(begun), 0)
    assert still.hear(45, answers(later), 0) is None
    assert [still.hear(second, answers(later), 0) for second in (60, 75, 90)] == [None] * 3
    assert still.hear(105, answers(later), 0) == 60


def test_a_loop_that_sleeps_at_one_line_has_three_times_as_long():
    still, ended_s = Stillness(60.0), None
    for second in range(0, 300, 15):
        sleepy = Look(second * 1_000_000_000, STACK.format(3), wakes=second)
        ended_s = ended_s or still.hear(second, answers(sleepy), 0)
    assert ended_s == 180


def test_a_loader_that_is_waited_for_wakes_too_seldom_to_count():
    still, ended_s = Stillness(60.0), None
    for second in range(0, 300, 15):
        waiting = Look(second * 1_000_000_000, STACK.format(3), wakes=second // 5)
        ended_s = ended_s or still.hear(second, answers(waiting), 0)
    assert ended_s == 60


def test_output_counts_only_of_a_program_that_tells_of_no_steps_or_collectives():
    silent, telling = Stillness(60.0), Stillness(60.0)
    for second in range(0, 75, 15):
        without = silent.hear(second, answers(at(3)), output=second)
        by_number = telling.hear(second, answers(at(3, groups={"0": 4})), output=second)
    assert without is None
    assert by_number == 60


def test_a_rank_that_is_stopped_does_not_move_and_one_that_wakes_does():
    still = Stillness(30.0)
    for second in (0, 15):
        still.hear(second, answers(at(3), Look(0), why="it is stopped (SIGSTOP)"), 0)
    assert still.hear(30, answers(at(3), Look(0), why="it is stopped (SIGSTOP)"), 0) == 30
    assert still.hear(45, answers(at(3), Look(0)), 0) is None


def test_nothing_is_said_if_no_rank_answers():
    still = Stillness(30.0)
    assert [still.hear(second, {}, 0) for second in range(0, 300, 15)] == [None] * 20


def test_two_looks_are_too_few_however_far_apart():
    still = Stillness(30.0)
    still.hear(0, answers(at(3)), 0)
    assert still.hear(500, answers(at(3)), 0) is None
    assert still.hear(515, answers(at(3)), 0) == 515


def test_the_watchdog_notes_what_it_saw_and_has_all_ranks_ended_with_a_status_of_its_own(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    run.create()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    folder, attempt = stacks.stacks_folder(run), run.failures / "12.0"
    folder.mkdir(parents=True)
    dog = Watchdog(run, folder, hang_s=20.0, ranks=2)
    for second in range(0, 60, 2):
        dog.watch(float(second))
        request = stacks.read_request(run, folder)
        if request.ends:
            break
        for rank in range(2):
            stacks.write_answer(folder, Answer(rank, "n", request.key, [at(rank)]))
    assert request.ends
    note = stacks.read_hang(run, attempt)
    assert note is not None
    assert note.still_s >= 20
    assert failures.status_file(attempt).read_text(encoding="utf-8") == f"{EXIT_STATUS_OF_HANG}\n"
    assert failures.failed_file(attempt).exists()
