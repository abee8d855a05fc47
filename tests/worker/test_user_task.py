"""A script or function of the user's as a rank: as ``python`` would run it, with what a launcher would tell it."""

import json
import os
import subprocess
import sys

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump
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


@pytest.mark.parametrize(("last_line", "status"), [("sys.exit()", 0), ("sys.exit('no')", 1)])
def test_the_script_s_exit_status_decides(tmp_path, last_line, status):
    (tmp_path / "train.py").write_text(f"import sys\n{last_line}\n")
    _, done = run_task(tmp_path, "task=script", f"task.path={tmp_path / 'train.py'}")
    assert done.returncode == status
    assert ("train.py exited with status" in done.stderr) == (status == 1)


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
