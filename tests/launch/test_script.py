"""The rendered sbatch script: its golden text, and that no value from outside can become a command."""

import shlex
import subprocess
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.launch.script import Job, render_analysis_script, render_script
from hpcmm.resources import resource
from hpcmm.runs.run_dir import RunDir

GOLDEN = Path(__file__).parent / "golden"


PRESETS = sorted(path.stem for path in resource("conf/cluster").glob("*.yaml") if path.stem != "local")


def job_of(root="/shared/runs/demo-1", **values):
    return Job(
        RunDir(Path(root)), (f"{root}/code/hpcmm",), launcher="/env/bin/python",
        working_directory=Path("/home/me/project"), **values,
    )  # fmt: skip


def rendered(*overrides, root="/shared/runs/demo-1", **values):
    return render_script(compose_run(["experiment=anomaly_demo", *overrides]), job_of(root, **values))


def is_bash(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_demo_script_is_as_recorded():
    assert rendered() == (GOLDEN / "anomaly_demo.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_script_of_each_preset_is_as_recorded(preset):
    config = compose_run([f"cluster={preset}", "cluster.cache_dir=/shared/cache"])
    text = render_script(config, job_of())
    assert is_bash(text)
    assert text == (GOLDEN / f"{preset}.sh").read_text(encoding="utf-8")


def test_a_sweep_s_script_is_as_recorded():
    text = rendered("launch.parallel_points=4", points=100, after="17")
    assert is_bash(text)
    assert text == (GOLDEN / "sweep.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("engine", ["pyxis", "apptainer"])
def test_the_nodes_are_checked_and_the_port_is_held_where_the_ranks_run(engine):
    config = compose_run([f"cluster=h100_{engine}", "cluster.cache_dir=/shared/cache", "launch.preflight=true"])
    text = render_script(config, job_of())
    assert is_bash(text)
    word = {"pyxis": "--container-image=", "apptainer": "apptainer exec "}[engine]
    by_module = {line.split(" -m ")[1].split()[0]: line for line in text.splitlines() if " -m hpcmm." in line}
    assert {"hpcmm.doctor.preflight", "hpcmm.doctor.node"} <= by_module.keys()
    assert word in by_module["hpcmm.doctor.node"]
    assert word in by_module["hpcmm.doctor.preflight"]
    assert word in next(line for line in text.splitlines() if line.startswith("on_first_node="))


def test_the_analysis_script_is_as_recorded():
    text = render_analysis_script(compose_run(["cluster=a30", "profile=nsys"]), job_of())
    assert is_bash(text)
    assert text == (GOLDEN / "analysis.sh").read_text(encoding="utf-8")


def test_the_setup_lines_run_before_all_else(tmp_path):
    text = rendered("cluster.setup=['export FROM_SITE=1', 'echo $UNSET_VARIABLE']", "cluster.environment.MINE=2")
    head = text[: text.index("run_dir=")]
    assert is_bash(head)
    shown = subprocess.run(
        ["bash", "-c", f"{head}echo $FROM_SITE $MINE $PYTHONPATH"], capture_output=True, text=True, check=True,
        env={"PATH": "/bin:/usr/bin", "PYTHONPATH": "/already"},
    )  # fmt: skip
    assert shown.stdout.split() == ["1", "2", "/shared/runs/demo-1/code/hpcmm:/already"]


@pytest.mark.parametrize(
    ("ending", "noted"), [("exit 3", "3"), ("true; kill -TERM $$; sleep 1", "143"), ("outcome=stopped", "stopped")]
)
def test_the_script_notes_how_it_ended_also_when_it_is_cancelled(tmp_path, ending, noted):
    text = rendered(root=str(tmp_path))
    head = text[text.index("run_dir=") : text.index("\n# USR1")]
    subprocess.run(["bash", "-c", head + ending], env={"SLURM_JOB_ID": "7", "PATH": "/bin:/usr/bin"}, check=False)
    assert (tmp_path / "exit_status").read_text() == f"7 {noted}\n"


def test_every_site_option_reaches_the_script():
    text = rendered(
        "cluster.partition=gpu", "cluster.account=proj", "cluster.qos=high", "cluster.constraint=a30",
        "cluster.memory_gb=1.5", "cluster.exclude='n[1-2]'", "cluster.sbatch.reservation=maint",
        "cluster.modules=[cuda/12]", "cluster.srun=['--mpi=none']",
    )  # fmt: skip
    for line in (
        "#SBATCH --partition=gpu", "#SBATCH --account=proj", "#SBATCH --qos=high", "#SBATCH --constraint=a30",
        "#SBATCH --mem=1536M", '#SBATCH --exclude="n[1-2]"', "#SBATCH --reservation=maint", "module load cuda/12",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert " --mpi=none " in text


@pytest.mark.parametrize("value", ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "a'b\"c", "a\nb", "*"])
def test_an_environment_value_arrives_unchanged_and_runs_nothing(tmp_path, value):
    run = compose_run(["experiment=anomaly_demo"])
    run.cluster.environment["VALUE"] = value
    script = render_script(run, job_of(str(tmp_path / 'it\'s a "run"')))
    export = script[script.index("export VALUE=") : script.index("export SUBMITIT_EXECUTOR")]
    done = subprocess.run(
        ["bash", "-c", export + 'printf %s "$VALUE"'], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == value
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_blanks_quotes_and_percent_signs_stays_one_word():
    root = '/shared/it\'s a "50%" run'
    text = rendered(root=root)
    assert f"run_dir={shlex.quote(root)}\n" in text
    assert '#SBATCH --output="/shared/it\'s a \\"50%%\\" run/logs/batch.log"' in text
    assert is_bash(text)


def test_a_line_break_in_a_directive_is_refused():
    with pytest.raises(HpcmmError, match="cannot hold a line break"):
        rendered(root="/shared/a\n#SBATCH --wrap=pwn")


def test_a_folder_that_slurm_cannot_write_logs_in_is_refused():
    with pytest.raises(HpcmmError, match=r"Slurm cannot write logs below /shared/a\\b/.*: set runs_root to a folder"):
        rendered(root="/shared/a\\b")
