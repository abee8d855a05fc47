"""A script or function of the user's as a rank: as ``python`` would run it, with what a launcher would tell it."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump
from hpcmm.resources import own_module
from hpcmm.runs import failures
from hpcmm.runs.attempts import begin_attempt
from hpcmm.runs.run_dir import RunDir

SLURM = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "42", "SLURMD_NODENAME": "node2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "23456",
}  # fmt: skip
RUNS_THE_TASK = "import sys; from hpcmm.worker.entrypoint import run_rank; print('returned', run_rank(sys.argv[1]))"


def run_task(tmp_path, *overrides, **environment):
    run = RunDir(tmp_path / "run")
    run.create()
    dump(compose_run(["cluster=slurm", *overrides]), run.config)
    return run, subprocess.run(
        [sys.executable, "-c", RUNS_THE_TASK, str(run.root)], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | SLURM | environment,
    )  # fmt: skip


def test_a_script_runs_as_main_with_its_words_and_its_neighbours(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "helper.py").write_text("NAME = 'helper'\n")
    (tmp_path / "scripts" / "train.py").write_text(
        "import os, sys, pickle\nfrom helper import NAME\n"
        "class Config: pass\n"
        "pickle.loads(pickle.dumps(Config()))\n"
        "names = ('RANK', 'LOCAL_WORLD_SIZE', 'OMP_NUM_THREADS')\n"
        "print(__name__, NAME, sys.argv, *map(os.environ.get, names))\n"
    )
    script = tmp_path / "scripts" / "train.py"
    run, done = run_task(tmp_path, "task=script", f"task.path={script}", "task.args=[--lr,1e-4]", OMP_NUM_THREADS="7")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"__main__ helper {[str(script), '--lr', '1e-4']} 3 2 7\nreturned None\n"
    start, end = map(json.loads, run.rank_metrics(3).read_text().splitlines())
    assert (start["event"], start["rank"], start["node"], end["event"]) == ("start", 3, "node2", "end")


def run_rank(tmp_path, *overrides, starts=1):
    """As the batch script and srun start a rank: hpcmm's wrapper, the task. Returns what it left."""
    run = RunDir(tmp_path / "run")
    run.create()
    dump(compose_run(["cluster=slurm", *overrides]), run.config)
    for _ in range(starts):
        begin_attempt(run, SLURM)
    outer = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "SUBMITIT_EXECUTOR": "slurm"}
    command = [*own_module("hpcmm.worker"), "rank", str(run.root)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | SLURM | outer
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    return run, done


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("command", "marks"), [("true", ["3_of_4"]), ("false", []), ("kill -9 $$", [])])
def test_a_rank_that_ends_well_leaves_a_mark_whatever_it_runs(tmp_path, command, marks, links):
    run = RunDir(tmp_path / "run")
    run.create()
    dump(compose_run(["cluster=slurm"]), run.config)
    folder = run.ended / f"{SLURM['SLURM_JOB_ID']}.0"
    folder.mkdir(parents=True)
    if links:
        (folder / "mark").touch()
    words = [sys.executable, "-m", "hpcmm.worker", "rank", str(run.root), "--", "sh", "-c", command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | SLURM
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode == 0, done.stderr) == (bool(marks), "")
    assert [path.name for path in folder.glob("*_of_*")] == marks


@pytest.mark.parametrize("staged", ['{"/data": "/tmp/of-another-user"}', "garbage"])
def test_a_run_that_a_rank_launches_takes_nothing_from_the_run_around_it(tmp_path, monkeypatch, staged):
    for name in ("RUN_DIR", "RESTART_COUNT", "STAGE_DIR", "CAPTURE_BEGAN_S", "COMMAND_BEGAN_S"):
        monkeypatch.setenv(f"HPCMM_{name}", "of-the-outer-run")
    monkeypatch.setenv("HPCMM_STAGED", staged)
    for name in ("SCRIPT", "SRUN"):
        monkeypatch.setenv(f"HPCMM_{name}_BEGAN_S", "12.5")  # as the run's own script sets it
    (tmp_path / "train.py").write_text(
        "import json, os\n"
        "told = {name: value for name, value in os.environ.items() if name.startswith('HPCMM_')}\n"
        "json.dump(told, open('told.json', 'w'))\n"
    )
    run, done = run_rank(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told.pop("HPCMM_RUN_DIR") == str(run.root)
    assert told.pop("HPCMM_RESTART_COUNT") == "0"
    assert float(told.pop("HPCMM_CAPTURE_BEGAN_S")) <= float(told.pop("HPCMM_COMMAND_BEGAN_S"))
    assert (told.pop("HPCMM_SCRIPT_BEGAN_S"), told.pop("HPCMM_SRUN_BEGAN_S")) == ("12.5", "12.5")
    assert not {"HPCMM_STAGED", "HPCMM_STAGE_DIR"} & set(told)


ENDS = [
    ("sys.exit()", 0, ""),
    ("sys.exit(0)", 0, ""),
    ("sys.exit(42)", 42, ""),
    ("sys.exit('no such data')", 1, "no such data\n"),
    ("sys.exit(300)", 44, ""),
    ("sys.exit(256)", 0, ""),
    ("sys.exit(-1)", 255, ""),
    ("sys.exit(2**70)", 255, ""),
    ("sys.exit(True)", 1, ""),
    ("raise SystemExit(3, 4)", 1, "(3, 4)\n"),
    ("os._exit(42)", 42, ""),
    ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
]


@pytest.mark.few(5)
@pytest.mark.parametrize(("last_line", "status", "words"), ENDS, ids=lambda value: str(value)[:40].strip())
def test_a_rank_ends_as_the_script_would_end_by_itself(tmp_path, last_line, status, words):
    script = tmp_path / "train.py"
    script.write_text(f"import os, signal, sys\nprint('last words', flush=True)\n{last_line}\n")
    alone = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    run, done = run_rank(tmp_path, "task=script", f"task.path={script}")
    assert (done.returncode, done.stderr) == (alone.returncode, alone.stderr) == (status, words)
    record = failures.read(failures.exit_file(run.failures / "42.0", 3), failures.RankExit)
    told = run.failures / "42.0" / "status"
    assert (
        (record.status, record.signal) == ((status, None) if status > 0 else (None, -status)) if status else not record
    )
    assert not record or record.said == words.strip()
    assert (told.read_text() if status else "0\n") == f"{status if status >= 0 else 128 - status}\n"


def test_who_waits_for_a_script_s_result_learns_of_its_exit(tmp_path):
    (tmp_path / "train.py").write_text("import sys; sys.exit(42)\n")
    run, _ = run_rank(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    kind, words = pickle.loads((run.submitit / "42_3_result.pkl").read_bytes())  # noqa: S301 -- our own
    assert kind == "error"
    assert words.endswith(f"{tmp_path / 'train.py'} exited with status 42.\n")


def test_a_function_s_exit_status_is_the_rank_s(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\n\ndef main(status):\n    sys.exit(status)\n")
    run, done = run_rank(tmp_path, "task=function", "task.target=mine:main", "task.kwargs.status=7")
    assert (done.returncode, done.stderr) == (7, "")
    assert not failures.error_file(run.failures / "42.0", 3).exists()


def test_a_script_s_own_exception_keeps_its_traceback_and_status_1(tmp_path):
    (tmp_path / "train.py").write_text("raise ArithmeticError('no number')\n")
    run, done = run_rank(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    assert done.returncode == 1
    assert done.stderr.endswith("ArithmeticError: no number\n")
    assert failures.read(failures.error_file(run.failures / "42.0", 3), failures.RankError).kind == "ArithmeticError"


def test_a_script_gets_the_signals_of_the_site_and_no_handler_of_others(tmp_path):
    (tmp_path / "train.py").write_text(
        "import signal\nfor name in ('SIGUSR1', 'SIGUSR2', 'SIGCONT'):\n"
        "    assert signal.getsignal(getattr(signal, name)) is signal.SIG_DFL, name\n"
    )
    _, done = run_rank(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    assert done.returncode == 0, done.stderr


def test_a_script_finds_its_run_directory_stops_and_is_not_over(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os\nfrom pathlib import Path\nfrom hpcmm import annotate\n"
        "assert os.environ['HPCMM_RESTART_COUNT'] == '1'\nos.environ['RANK'] = '0'\n"
        "Path(os.environ['HPCMM_RUN_DIR'], 'stop').touch()\nassert annotate.should_stop()\nannotate.stopped()\n"
    )
    run, done = run_rank(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}", starts=2)
    assert done.returncode == 0, done.stderr
    assert run.stopped.exists()
    events = [json.loads(line)["event"] for line in run.rank_metrics(3).read_text().splitlines()]
    assert (events[0], set(events[1:])) == ("start", {"startup"})


def test_a_function_gets_its_arguments_and_its_result_is_kept(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Trainer:\n    @staticmethod\n    def main(lr, name='x'):\n        return [lr, name]\n"
    )
    wanted = ("task=function", "task.target=mine:Trainer.main", "task.kwargs.lr=1e-4")
    _, done = run_task(tmp_path, *wanted, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.stdout == "returned [0.0001, 'x']\n", done.stderr


def test_a_function_that_is_not_there_is_named(tmp_path):
    _, done = run_task(tmp_path, "task=function", "task.target=json:no_such")
    assert done.returncode == 1
    assert "task.target is json:no_such, but json has no no_such." in done.stderr


@pytest.mark.parametrize(("visible", "local_rank"), [("3", "0"), ("0,1", "1")])
def test_a_rank_that_sees_one_gpu_alone_calls_it_number_0(tmp_path, visible, local_rank):
    (tmp_path / "train.py").write_text("import os; print('local rank', os.environ['LOCAL_RANK'])\n")
    _, done = run_task(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}", CUDA_VISIBLE_DEVICES=visible)
    assert f"local rank {local_rank}\n" in done.stdout


@pytest.mark.parametrize("ends", ["sys.exit(0)", "sys.exit()", "raise SystemExit"])
def test_a_script_that_exits_well_leaves_a_word_of_its_end(tmp_path, ends):
    (tmp_path / "train.py").write_text(f"import sys\n{ends}\n")
    run, done = run_task(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    assert done.returncode == 0, done.stderr
    assert json.loads(run.rank_metrics(3).read_text().splitlines()[-1])["event"] == "end"


def test_a_function_that_exits_well_leaves_a_word_of_its_end(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\ndef train(): sys.exit(0)\n")
    python_path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    run, done = run_task(tmp_path, "task=function", "task.target=mine:train", PYTHONPATH=python_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(run.rank_metrics(3).read_text().splitlines()[-1])["event"] == "end"


@pytest.mark.parametrize(("name", "spec"), [("pkg.train", "pkg.train"), ("pkg", "pkg.__main__")])
def test_a_module_runs_as_by_python_m(tmp_path, name, spec):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "helper.py").write_text("NAME = 'helper'\n")
    text = "import sys\nfrom .helper import NAME\nprint(__name__, __package__, __spec__.name, NAME, sys.argv)\n"
    file = tmp_path / "pkg" / f"{spec.partition('.')[2]}.py"
    file.write_text(text)
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    _, done = run_task(tmp_path, "task=script", f"task.module={name}", "task.args=[--lr,1e-4]", **path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"__main__ pkg {spec} helper {[str(file), '--lr', '1e-4']}\nreturned None\n"


PRINTS_ITS_WORDS = 'printf "[%s]" "$@" "$RANK"'


@pytest.mark.parametrize("first_line", ["#!/bin/sh\n", ""])
def test_an_executable_gets_its_words_and_the_rank_and_ends_the_rank_with_its_status(tmp_path, first_line):
    program = tmp_path / "job"
    program.write_text(f"{first_line}{PRINTS_ITS_WORDS}\nexit 7\n")
    program.chmod(0o755)
    run, done = run_rank(tmp_path, "task=script", f"task.program={program}", "task.args=['a b','','$HOME']")
    assert done.returncode == 7
    assert "[a b][][$HOME][3]" in done.stdout
    record = json.loads(failures.exit_file(failures.attempt_folder(run, SLURM), 3).read_text())
    assert (record["status"], record["signal"]) == (7, None)


def test_an_executable_of_the_path_that_a_signal_ends_ends_the_rank_as_in_a_shell(tmp_path):
    _, done = run_rank(tmp_path, "task=script", "task.program=sh", "task.args=[-c,'kill -KILL $$']")
    assert done.returncode == 128 + signal.SIGKILL


def test_an_executable_that_the_node_does_not_have_is_named(tmp_path):
    _, done = run_task(tmp_path, "task=script", "task.program=no-such-program")
    assert "no-such-program is not an executable on the PATH of" in done.stderr


SIGNALLED_AT_ONCE = """
import subprocess, sys, threading, time
from pathlib import Path
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker import signal_forwarding
class SlowToReturn(subprocess.Popen):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.stdout.readline()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # which no mask of the main thread covers
signal_forwarding.subprocess.Popen = lambda *given, **named: SlowToReturn(*given, stdout=subprocess.PIPE, **named)
program = "trap 'exit 5' USR1; kill -USR1 $PPID; echo; while :; do sleep 0.05; done"
sys.exit(signal_forwarding.run_watched(["sh", "-c", program], RunDir(Path(sys.argv[1])), 0))
"""


def test_a_signal_that_comes_while_the_executable_starts_reaches_it_too(tmp_path):
    done = subprocess.run([sys.executable, "-c", SIGNALLED_AT_ONCE, str(tmp_path)], env=os.environ | SLURM, check=False)
    assert done.returncode == 5


CAUGHT_BY_ANOTHER_THREAD = """
import signal, sys, threading, time
from pathlib import Path
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker import signal_forwarding
ready = Path(sys.argv[1]) / "ready"
def catch():
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(0.3)  # the main thread waits for the executable by now, most likely
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
threading.Thread(target=catch, daemon=True).start()
program = f"trap 'exit 5' USR1; : >{ready}; while :; do sleep 0.05; done"
sys.exit(signal_forwarding.run_watched(["sh", "-c", program], RunDir(ready.parent), 0))
"""


def test_a_signal_that_another_thread_of_the_rank_catches_reaches_the_executable(tmp_path):
    made = [sys.executable, "-c", CAUGHT_BY_ANOTHER_THREAD, str(tmp_path)]
    done = subprocess.run(made, env=os.environ | SLURM, check=False, timeout=60)
    assert done.returncode == 5


def test_a_signal_to_the_rank_reaches_the_executable(tmp_path):
    program = tmp_path / "run.sh"
    program.write_text("#!/bin/sh\ntrap 'echo told; exit 0' USR1\nkill -USR1 $PPID\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    _, done = run_rank(tmp_path, "task=script", f"task.program={program}")
    assert (done.returncode, "told" in done.stdout) == (0, True)
