"""What the shell that one launches from may change of a job: nothing that is not in the configuration."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from hpcmm.slurm.commands import job_variables, outside_of_jobs
from hpcmm.slurm.sbatch import _say_what_is_ignored

SHELL = {"SBATCH_PARTITION": "other", "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "3", "SRUN_CPU_BIND": "none"}
CLUSTER = {"SLURM_CONF": "/site/slurm.conf", "HOME": "/home/me"}


def test_what_belongs_to_jobs_is_told_from_what_finds_the_cluster():
    assert job_variables(SHELL | CLUSTER) == sorted(SHELL)
    assert outside_of_jobs(SHELL | CLUSTER) == CLUSTER


def test_sbatch_sees_no_option_of_the_shell_and_the_user_is_told(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    seen = tmp_path / "seen.json"
    dump = (
        f"import json, os, sys; json.dump(dict(os.environ), open({str(seen)!r}, 'w')); print('Submitted batch job 1')"
    )
    for name in ("sbatch", "srun", "squeue"):
        body = f'exec {sys.executable} -c "$CODE"' if name == "sbatch" else "exit 1"
        (binaries / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (binaries / name).chmod(0o755)
    environment = os.environ | SHELL | {"PATH": f"{binaries}:{os.environ['PATH']}", "CODE": dump}
    environment.pop("SLURM_CONF", None)
    command = [sys.executable, "-m", "hpcmm.launch", "cluster=slurm", "launch.snapshot=false"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    given = json.loads(seen.read_text())
    assert [name for name in SHELL if name in given] == []
    assert "SBATCH_PARTITION" in done.stderr
    assert "SRUN_CPU_BIND" in done.stderr
    assert "SLURM_JOB_ID" not in done.stderr


def test_what_srun_sets_by_itself_is_told_of_only_outside_of_a_job(capsys):
    by_srun = {"SRUN_DEBUG": "3", "SRUN_CPUS_PER_TASK": "2", "SBATCH_MEM_BIND_TYPE": "local"}
    _say_what_is_ignored(job_variables({"SLURM_JOB_ID": "5"} | by_srun))
    assert capsys.readouterr().err == ""
    _say_what_is_ignored(job_variables({"SLURM_JOB_ID": "5", "SBATCH_PARTITION": "other"} | by_srun))
    assert capsys.readouterr().err.startswith("hpcmm: SBATCH_PARTITION of your environment is not used")
    _say_what_is_ignored(job_variables({"SRUN_DEBUG": "3"}))
    assert "SRUN_DEBUG" in capsys.readouterr().err


VALUE = secrets.token_hex(16)


@pytest.fixture
def with_a_token(tmp_path):
    """A launch from a shell that has MY_TOKEN: what it prints, and the environment of each call of sbatch."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    dump = (
        "import json, os, sys; name = os.path.basename(sys.argv[-1]); "
        f"json.dump(dict(os.environ), open(os.path.join({str(tmp_path)!r}, name + '.json'), 'w')); "
        "print('Submitted batch job 1')"
    )
    (binaries / "sbatch").write_text(f"#!{sys.executable}\n{dump}\n", encoding="utf-8")
    for name in ("srun", "squeue", "sacct"):
        (binaries / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    for name in binaries.iterdir():
        name.chmod(0o755)
    (tmp_path / "train.py").write_text("", encoding="utf-8")

    def launched(*overrides, token=VALUE):
        environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"} | ({"MY_TOKEN": token} if token else {})
        environment.pop("SLURM_CONF", None)
        command = [sys.executable, "-m", "hpcmm.launch", "task=script", "task.path=train.py", *overrides]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return launched


def test_a_variable_that_is_passed_by_name_reaches_the_job_alone_and_is_written_nowhere(tmp_path, with_a_token):
    passed = ["cluster=slurm", "cluster.environment_from=[MY_TOKEN]", "profile=nsys", "analyze=after"]
    done = with_a_token(*passed)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "submission.sh.json").read_text())["MY_TOKEN"] == VALUE
    assert "MY_TOKEN" not in json.loads((tmp_path / "analysis.sh.json").read_text())
    assert "MY_TOKEN may be in them" in done.stderr  # nsys' raw reports hold the environment
    written = [
        path for path in (tmp_path / "runs").rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()
    ]
    assert written == []
    assert VALUE not in done.stdout + done.stderr + with_a_token(*passed, "dry_run=true").stdout


def test_a_variable_that_the_shell_does_not_have_is_named_before_anything_is_written(tmp_path, with_a_token):
    for cluster in ("slurm", "local"):
        done = with_a_token(f"cluster={cluster}", "cluster.environment_from=[MY_TOKEN]", token=None)
        assert done.returncode == 1
        assert done.stderr.startswith("hpcmm: MY_TOKEN of cluster.environment_from is not set in this shell")
    assert not (tmp_path / "runs").exists()


def test_a_value_in_place_of_a_name_is_refused_and_not_repeated(with_a_token):
    done = with_a_token("cluster=slurm", f'cluster.environment_from=["MY_TOKEN={VALUE}"]')
    assert done.returncode == 1
    assert "give the name alone" in done.stderr
    assert VALUE not in done.stdout + done.stderr


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.environment_from=[MY_TOKEN]", "+cluster.environment.MY_TOKEN=x"], "leave it out of one of them"),
        (["cluster.environment_from=['a b']"], "is not a name of an environment variable"),
        (["cluster.environment_from=[SLURM_JWT]"], "Slurm's own variables"),
        (["cluster.environment_from=[MASTER_ADDR]"], "which the job's script sets itself"),
        (["+cluster.sbatch.hetjob=''"], "launch one run for each"),
        (['cluster.srun=["--mpi=none",":","-n1"]'], "heterogeneous job"),
        (['cluster.srun=["--het-group=0"]'], "heterogeneous job"),
        (['cluster.srun=["--export=MINE"]'], "no rank would see MASTER_ADDR"),
    ],
)
def test_what_no_rank_could_run_with_is_refused(with_a_token, overrides, said):
    done = with_a_token("cluster=slurm", *overrides, "dry_run=true")
    assert done.returncode == 1
    assert said in done.stderr


def test_what_a_local_run_starts_does_not_keep_the_launch_s_output_open(tmp_path):
    code = (
        "import subprocess, sys, pathlib\n"
        "from hpcmm.launch.submit import _output_to\n"
        "with _output_to(pathlib.Path('batch.log')):\n"
        "    started = subprocess.Popen(['sh', '-c', 'echo said; exec sleep 300'])\n"
        "print(started.pid)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    until = time.monotonic() + 60
    while (tmp_path / "batch.log").read_text() != "said\n" and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(int(done.stdout), signal.SIGTERM)  # it runs still, though all that the launch wrote has been read
    assert (tmp_path / "batch.log").read_text() == "said\n"


def test_a_local_run_imports_nothing_from_the_current_folder(tmp_path):
    planted = "import os\nopen(os.environ['RAN'], 'a').write(__name__)\nraise ImportError\n"
    for name in ("cloudpickle", "submitit", "getpass"):
        (tmp_path / f"{name}.py").write_text(planted)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "helper.py").write_text("WORD = 'helped'\n")
    (tmp_path / "own" / "other.py").write_text("import helper\nprint(helper.WORD, 'again')\n")
    script = "import helper, os, pathlib, subprocess, sys\nprint(helper.WORD, 'PYTHONSAFEPATH' in os.environ)\n"
    script += "subprocess.run([sys.executable, pathlib.Path(__file__).parent / 'other.py'], check=True)\n"
    (tmp_path / "own" / "script.py").write_text(script)
    words = ["cluster=local", "cluster.ranks_per_node=1", "task=script", "task.path=own/script.py", "wait=true"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["RAN"] = str(tmp_path / "ran")
    command = [sys.executable, "-P", "-m", "hpcmm.launch", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    log = next((tmp_path / "runs").glob("run-*/logs/rank_0000.log")).read_text()
    assert "helped False" in log
    assert "helped again" in log
