"""What a login-node command imports, and what it says."""

import json
import os
import pwd
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_stand_in import parted_as_asked

from hpcmm.config.config_file import load

HEAVY = ("torch", "deepspeed", "transformers", "sklearn", "skimage", "gradio")


def run_python(*arguments, **keywords):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **keywords)


@pytest.mark.parametrize(
    "module",
    [
        "hpcmm.launch.__main__", "hpcmm.jobs.follow", "hpcmm.launch.submit", "hpcmm.analyze",
        "hpcmm.serve.__main__", "hpcmm.serve.address", "hpcmm.serve.job",
    ],
)  # fmt: skip
def test_login_node_commands_import_nothing_heavy(module):
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


def test_the_analysis_imports_no_scheduler():
    unwanted = ("submitit", "hydra", "hpcmm.launch")
    code = f"import hpcmm.analyze, sys; print([name for name in {unwanted} if name in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path):
    done = run_python("-m", "hpcmm.launch", "experiment=anomaly_demo", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_sentence_and_a_non_zero_exit(tmp_path):
    done = run_python("-m", "hpcmm.launch", "train.stepz=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("hpcmm: train.stepz is not a configuration key: did you mean train.steps?")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_the_launcher_says_what_to_do(tmp_path):
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    done = run_python("-m", "hpcmm.launch", "cluster=slurm", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "sbatch and srun not found" in done.stderr
    assert "cluster=local" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_groups_and_their_options():
    text = run_python("-m", "hpcmm.launch", "--help").stdout
    assert Path(__file__).parents[2].joinpath("conf/cluster/local_slurm.yaml").is_file()
    assert "cluster=     a30, h100_apptainer," in text
    assert "local_slurm, modules_conda, slurm" in text
    assert "exit status" in text
    assert "cluster.time_limit_min=60          Minutes after which Slurm ends the job." in text
    assert "task.args" in text


def test_a_dry_run_works_without_slurm_and_names_each_rank_s_command(tmp_path):
    (tmp_path / "train.py").write_text("")
    words = ("cluster=a30", "task=script", "task.path=train.py", "task.args=[--lr,1e-4]", "profile=nsys")
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = run_python(
        "-m", "hpcmm.launch", *words, "profile.ranks=one_per_node", "dry_run=true", cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "# srun starts 8 ranks, each as:\n" in done.stdout
    (script,) = (line for line in done.stdout.splitlines() if line.endswith(" --lr 1e-4"))
    assert shlex.split(script)[-3].endswith("/code/project/train.py")
    assert "on ranks 0, 2, 4, 6\n" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


def test_a_dry_run_of_a_sweep_lists_its_points(tmp_path):
    done = run_python("-m", "hpcmm.launch", "-m", "cluster=a30", "train.steps=5,6", "dry_run=true", cwd=tmp_path)
    assert done.stdout.startswith("# point 0: train.steps=5\n# point 1: train.steps=6\n#!/bin/bash\n")
    assert "#SBATCH --array=0-1\n" in done.stdout


def test_a_sweep_is_one_call_of_sbatch_and_a_ledger(tmp_path):
    done = launch_with_sbatch(tmp_path, ACCEPTING_SBATCH, "train.seed=range(0,30)")
    assert done.returncode == 0, done.stderr
    assert "an array of 30 tasks" in done.stdout
    sweep = (tmp_path / "runs" / "latest").resolve()
    points = json.loads((sweep / "ledger.json").read_text())["points"]
    assert [point["overrides"] for point in points] == [[f"train.seed={seed}"] for seed in range(30)]
    assert {point["run"]: load(sweep / point["run"] / "config.yaml").train.seed for point in points} == {
        f"{seed:04d}": seed for seed in range(30)
    }
    assert (sweep / "code" / "hpcmm" / "hpcmm" / "__init__.py").is_file()


ACCEPTING_SBATCH = "#!/bin/sh\necho 'sbatch: a warning' >&2\necho Submitted batch job 7\n"


def launch_with_sbatch(folder, text, *overrides, group=None):
    """Launch with stand-ins for sbatch and srun on the PATH, to see what is made of their answers."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct"):
        (binaries / name).write_text(parted_as_asked(text), encoding="utf-8")
        (binaries / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    return run_python(
        "-m", "hpcmm.launch", "cluster=slurm", *overrides, cwd=folder, env=environment, process_group=group,
        preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts():
    """As in a terminal: whoever starts the tests in the background has them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_accepted_job_s_id_is_told_whatever_stands_at_latest(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").write_text("precious", encoding="utf-8")
    done = launch_with_sbatch(tmp_path, ACCEPTING_SBATCH)
    assert done.returncode == 0
    assert "job id:         7" in done.stdout
    assert "sbatch: a warning" in done.stderr
    assert "latest does not point to this run" in done.stderr
    assert (tmp_path / "runs" / "latest").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("#!/bin/sh\nexit 1\n", "sbatch failed (sbatch said nothing), so the job may or may not be queued"),
        ("#!/bin/sh\nprintf 'error: \\033[31mInvalid \\377 qos' >&2; exit 1\n", "`sacctmgr show associations"),
        ("#!/bin/sh\necho 'Welcome, you are user 123'\n", "sbatch gave no job id"),
    ],
)
def test_what_sbatch_answers_becomes_one_clean_sentence(tmp_path, answer, expected):
    done = launch_with_sbatch(tmp_path, answer)
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "\033" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["cluster=slurm", "dry_run=true"]])
def test_a_reader_that_has_enough_is_no_error(tmp_path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hpcmm.launch", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("profile", "analysed"), [("off", False), ("nsys", True)])
def test_only_of_a_profiled_run_the_analysis_is_told(tmp_path, profile, analysed):
    done = launch_with_sbatch(tmp_path, ACCEPTING_SBATCH, "launch.snapshot=false", f"profile={profile}")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("run-*")
    assert (f"then, analyse:  python -m hpcmm.analyze {shlex.quote(str(run))}" in done.stdout) is analysed


def test_a_job_that_cannot_start_is_taken_back_without_slurm_s_environment(tmp_path):
    waits = squeue_row("PENDING", "PartitionTimeLimit")
    answers = f"case $0 in *squeue) echo '{waits}';; *) echo Submitted batch job 7;; esac"
    done = launch_with_sbatch(tmp_path, f"#!/bin/sh\n{answers}\n", "launch.snapshot=false")
    assert done.returncode == 0, done.stderr
    assert "To take it back: python -m hpcmm.jobs cancel 7\n" in done.stderr


@pytest.mark.few(5)
@pytest.mark.parametrize("swept", [(), ("train.seed=1,2",)])
@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1", False),
        (
            "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
            True,
        ),
        ("echo Submitted batch job; exit 0", True),
        ("kill -9 $$", True),
    ],
)
def test_a_refused_launch_leaves_no_run_unless_its_job_may_be_queued(tmp_path, answer, kept, swept):
    done = launch_with_sbatch(tmp_path, f"#!/bin/sh\n{answer}\n", "launch.snapshot=false", *swept)
    assert done.returncode == 1
    assert len(list((tmp_path / "runs").iterdir())) == kept


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("runs_root=/dev/null/runs", "cannot be written"),
        ("runs_root='/tmp/a\nb'", "without control characters"),
        ("cluster=null", "cluster needs an option: choose one of"),
        ("cluster.memory_gb=nan", "cluster.memory_gb is nan"),
        ("cluster.nodes=99999999999", "more ranks than any cluster has"),
        ("profile=nsys", None),
        ("experiment=null", "experiment needs an option"),
    ],
)
def test_odd_values_are_refused_in_a_sentence(tmp_path, override, expected):
    done = launch_with_sbatch(tmp_path, ACCEPTING_SBATCH, override)
    assert done.returncode == (1 if expected else 0)
    assert (expected or "") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_analysis_says_that_the_run_is_queued(tmp_path):
    sbatch = "#!/bin/sh\ncase $* in *analysis.sh) echo 'sbatch: error: Invalid qos' >&2; exit 1;; esac\n"
    done = launch_with_sbatch(tmp_path, sbatch + "echo Submitted batch job 7\n", "profile=nsys", "analyze=after")
    assert done.returncode == 1
    assert "Job 7 is submitted and stays, but its analysis is not. Slurm refused the job (Invalid qos)" in done.stderr
    assert json.loads((next((tmp_path / "runs").glob("run-*")) / "submission.json").read_text())["job_id"] == "7"


def test_ctrl_c_while_sbatch_runs_leaves_no_job_that_is_not_noted(tmp_path):
    # The launcher is interrupted, as by a terminal with all its group, while sbatch is at work.
    sbatch = "#!/bin/sh\nkill -INT -$(ps -o pgid= -p $PPID | tr -d ' ')\nsleep 0.2\necho Submitted batch job 7\n"
    done = launch_with_sbatch(tmp_path, sbatch, group=0)
    assert done.returncode == 130
    assert "hpcmm: interrupted; what is submitted stays; to take it back: python -m hpcmm.jobs cancel 7." in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((next((tmp_path / "runs").glob("run-*")) / "submission.json").read_text())["job_id"] == "7"


@pytest.mark.parametrize("command", [["hpcmm.launch", "dry_run=true"], ["hpcmm.jobs", "status", "x"], ["hpcmm.doctor"]])
def test_a_working_directory_that_is_gone_is_said_to_be_gone(tmp_path, command):
    shell = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", str(tmp_path), sys.executable, "-P", "-m", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "The working directory is gone" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_pythonpath_cannot_hold_is_refused(tmp_path):
    done = launch_with_sbatch(tmp_path, ACCEPTING_SBATCH, "runs_root='a:b'")
    assert done.returncode == 1
    assert "holds a colon, at which PYTHONPATH is split" in done.stderr


def test_the_doctor_refuses_a_folder_of_nobody(tmp_path):
    done = run_python("-m", "hpcmm.doctor", "runs_root='~nobody-here/x'", cwd=tmp_path)
    assert done.returncode == 1
    assert "no such user's home" in done.stderr


USER = pwd.getpwuid(os.geteuid()).pw_name


def squeue_row(state, reason, user=USER, command="(null)"):
    """Job 7 as squeue lists it."""
    return "\x1f".join(["7", "7", "run", user, state, reason, *["N/A"] * 3, "0:10", "n1", "1", command])


FAILING_JOB = f"""\
#!/bin/sh
case $0 in *squeue) echo '{squeue_row("FAILED", "NonZeroExitCode")}';; *sacct) printf 'JobID\\tState\\n7\\tFAILED\\n';;
*) echo Submitted batch job 7;; esac
"""


def test_a_followed_job_that_fails_ends_with_why(tmp_path):
    done = launch_with_sbatch(tmp_path, FAILING_JOB, "launch.snapshot=false", "wait=true")
    (run,) = (tmp_path / "runs").glob("run-*")
    assert done.returncode == 1
    assert "job 7: FAILED" in done.stderr
    assert json.loads((run / "job.json").read_text())["sacct"] == [{"JobID": "7", "State": "FAILED"}]
    assert f"job 7 ({run.name}): " in done.stderr
    assert done.stderr.splitlines()[-1] == f"this again: python -m hpcmm.jobs why {shlex.quote(str(run))}"


def test_a_followed_job_survives_a_slurm_that_does_not_answer_for_a_while(tmp_path):
    """The controller is silent in the middle, and there is no accounting at all."""
    slurm = f"""#!/bin/sh
count=$(cat {tmp_path}/count 2>/dev/null || echo 0)
case $0 in
*squeue) echo $((count + 1)) > {tmp_path}/count
    case $count in
    0|1) echo '{squeue_row("RUNNING", "None")}' ;;
    2) echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1 ;;
    *) echo '{squeue_row("COMPLETED", "None")}' ;;
    esac ;;
*sacct) echo 'Slurm accounting storage is disabled' >&2; exit 1 ;;
*) echo Submitted batch job 7 ;;
esac
"""
    done = launch_with_sbatch(tmp_path, slurm, "launch.snapshot=false", "wait=true")
    (run,) = (tmp_path / "runs").glob("run-*")
    assert done.returncode == 0, done.stderr
    assert "Unable to contact slurm controller); the job itself is not affected. It is asked again." in done.stderr
    assert "job 7: RUNNING" in done.stderr
    assert "job 7: COMPLETED" in done.stderr
    assert "storage is disabled" in done.stderr
    assert json.loads((run / "job.json").read_text())["state"] == "COMPLETED"


def test_a_followed_run_whose_folder_is_deleted_is_one_sentence(tmp_path):
    deleting = FAILING_JOB.replace("*sacct)", f"*sacct) rm -r {shlex.quote(str(tmp_path))}/runs;")
    done = launch_with_sbatch(tmp_path, deleting, "launch.snapshot=false", "wait=true")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(" is gone, so job 7 cannot be followed.")
    assert "Traceback" not in done.stderr


def test_a_damaged_line_of_the_metrics_does_not_end_the_following(tmp_path):
    lines = r'cut {\n[1]\n{"event": "step"}\n{"event": "step", "step": 0, "loss": 0.5, "step_s": 2}\n'
    writing = FAILING_JOB.replace(
        "*squeue)",
        f"*squeue) cd {shlex.quote(str(tmp_path))}/runs/run-*; printf '{lines}' > metrics/rank_0000.jsonl;",
    )
    done = launch_with_sbatch(tmp_path, writing, "launch.snapshot=false", "wait=true")
    assert "job 7: FAILED" in done.stderr
    assert "step 1/100: loss 0.5000, 2.000 s a step" in done.stderr
    assert "Traceback" not in done.stderr
