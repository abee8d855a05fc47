"""The rendered sbatch script: its golden text, and that no value from outside can become a command."""

import shlex
import subprocess
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.doctor.runner import allocation_options
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


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], "gpus-per-node=2"),
        (["cluster.gpu_type=a30"], "gpus-per-node=a30:2"),
        (["cluster.gpu_option=gres"], "gres=gpu:2"),
        (["cluster.gpu_option=gres", "cluster.gpu_type=a30"], "gres=gpu:a30:2"),
    ],
)
def test_gpus_are_asked_for_by_the_option_that_the_cluster_takes_and_so_by_the_doctor(words, asked):
    sizes = ["cluster=slurm", "cluster.ranks_per_node=2", "cluster.gpus_per_node=2", *words]
    options = [line for line in rendered(*sizes).splitlines() if "gpu" in line and line.startswith("#SBATCH")]
    assert options == [f"#SBATCH --{asked}"]
    assert f"--{asked}" in allocation_options(compose_run(sizes).cluster, 8)


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
    by_module = {line.split(' "$start" ')[1].split()[0]: line for line in text.splitlines() if ' "$start" ' in line}
    assert {"hpcmm.doctor.preflight", "hpcmm.doctor.node"} <= by_module.keys()
    assert word in by_module["hpcmm.doctor.node"]
    assert word in by_module["hpcmm.doctor.preflight"]
    assert word in next(line for line in text.splitlines() if line.startswith("on_first_node="))


@pytest.mark.parametrize("preset", ["slurm", "h100_pyxis", "h100_apptainer"])
def test_data_is_copied_by_one_process_a_node_where_the_ranks_will_run_and_see_it(preset):
    given = [f"cluster={preset}", "cluster.cache_dir=/shared/cache", "cluster.nodes=3", "launch.preflight=true"]
    config = compose_run([*given, "launch.stage=[/data/set]", "cluster.scratch_dir=/local"])
    text = render_script(config, job_of())
    assert is_bash(text)
    step = text[text.index("coproc") : text.index("hpcmm.worker stage")]
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1" in step
    assert '--nodelist="$good_nodes"' in step
    shown = {"h100_pyxis": "/local:/local", "h100_apptainer": "--bind /local"}
    assert shown.get(preset, "") in step
    assert text.index("hpcmm.worker staged") < text.index("hpcmm.worker port") < text.index("hpcmm.worker rank")


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


def run_setup(folder, *setup):
    """Run the script's head, as Slurm would from a file, with these setup lines."""
    config = compose_run(["cluster=slurm"])
    config.cluster.setup[:] = setup
    text = render_script(config, job_of())
    script = folder / "slurm_script"
    script.write_text(text[: text.index("run_dir=")] + "echo reached the end; trap -p EXIT ERR", encoding="utf-8")
    return subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, check=False, cwd=folder,
        env={"PATH": "/bin:/usr/bin", "LC_ALL": "C"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "status", "said"),
    [
        (["true", "false"], 1, "cluster.setup line 2 (`false`) failed with status 1"),
        (
            ["source ./env.sh"],
            2,
            "cluster.setup line 1 (`source ./env.sh`) failed with status 2, at line 3 of ./env.sh",
        ),
        (["source ./fn.sh", "f"], 7, "cluster.setup line 2 (`f`) failed with status 7, at line 2 of ./fn.sh"),
        (
            ["true", "source ./ends.sh"],
            3,
            "cluster.setup line 2 (`source ./ends.sh`) failed with status 3, in ./ends.sh",
        ),
        (["true", "exit 3"], 3, "cluster.setup line 2 (`exit 3`) failed with status 3"),
        (["exit 0"], 1, "cluster.setup line 1 (`exit 0`) ended the job with status 0"),
        (["true | false"], 1, "cluster.setup line 1 (`true | false`) failed with status 1"),
        (["no_such_command x"], 127, "cluster.setup line 1 (`no_such_command x`) failed with status 127"),
        (["source ./absent.sh"], 1, "cluster.setup line 1 (`source ./absent.sh`) failed with status 1"),
        (["set -u; echo $UNKNOWN"], 1, "cluster.setup line 1 (`set -u; echo $UNKNOWN`) failed with status 1"),
        (["if true; then", "false", "fi"], 1, "cluster.setup line 2 (`false`) failed with status 1"),
        (["cat <<END", "text", "END", "false"], 1, "cluster.setup line 4 (`false`) failed with status 1"),
        (["exit 5", "true; exit 5"], 5, "cluster.setup at `exit 5` failed with status 5"),
        (["if ; then"], 2, "cluster.setup (its syntax, see above) failed with status 2"),
    ],
)
def test_a_setup_line_that_fails_or_ends_the_job_is_named_with_its_status(tmp_path, setup, status, said):
    (tmp_path / "env.sh").write_text("export A=1\nfalse || true\n(exit 2)\necho never\n")
    (tmp_path / "fn.sh").write_text("f() {\n    (exit 7)\n}\n")
    (tmp_path / "ends.sh").write_text("exit 3\n")
    done = run_setup(tmp_path, *setup)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == f"hpcmm: {said}"
    assert "reached" not in done.stdout


def test_a_module_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "module.sh").write_text("module() { return 4; }\nexport -f module\n")
    config = compose_run(["cluster=slurm"])
    config.cluster.modules.append("cuda/12")
    text = render_script(config, job_of())
    script = tmp_path / "slurm_script"
    script.write_text(text[: text.index("run_dir=")], encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f". {tmp_path}/module.sh && exec bash {script}"], capture_output=True, text=True, check=False,
        env={"PATH": "/bin:/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.startswith("hpcmm: cluster.modules (`module load cuda/12`) failed with status 4")


def test_setup_lines_that_only_ask_go_on_and_leave_no_trap(tmp_path):
    asking = [
        "[ -e absent ] && source absent",
        "false || true",
        "if false; then",
        "false",
        "fi",
        "export A=1 \\",
        "B=2",
    ]
    done = run_setup(tmp_path, *asking)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reached the end\n", "")


def test_a_trap_of_the_site_s_own_stays(tmp_path):
    done = run_setup(tmp_path, "trap 'echo cleaned up' EXIT")
    assert done.stdout.splitlines() == ["reached the end", "trap -- 'echo cleaned up' EXIT", "cleaned up"]


def test_each_srun_passes_the_script_s_environment_on_unless_the_site_says_otherwise():
    for overrides in ([], ["launch.preflight=true", "requeue=on_node_failure"], ["cluster=h100_pyxis"]):
        text = rendered(*overrides, 'cluster.srun=["--export=ALL,MINE=1"]')
        calls = [line for line in text.splitlines() if "srun --" in line and not line.lstrip().startswith("#")]
        assert calls
        assert all("srun --export=ALL " in line for line in calls)
        assert text.rindex("--export=ALL,MINE=1") > text.rindex("srun --export=ALL --kill-on-bad-exit")


def test_no_node_needs_scontrol_before_its_ranks_start():
    text = rendered("launch.preflight=true")
    assert "scontrol show" not in text
    before_the_ranks = text[: text.index("srun --export=ALL --kill-on-bad-exit")]
    commands = [line for line in before_the_ranks.splitlines() if not line.startswith(("#", "unset "))]
    assert "scontrol" not in "\n".join(commands).replace("insist scontrol", "")  # which bears its failure


@pytest.mark.parametrize(
    ("export", "line"),
    [
        (None, None),
        ("NONE", "#SBATCH --export=A,B"),
        ("NIL", "#SBATCH --export=A,B"),
        ("ALL", "#SBATCH --export=ALL,A,B"),
        ("C,D=1", "#SBATCH --export=C,D=1,A,B"),
    ],
)
def test_variables_that_are_passed_by_name_are_added_to_the_site_s_export(export, line):
    given = [] if export is None else [f'cluster.sbatch.export="{export}"']
    text = rendered("cluster.environment_from=[A,B]", *given)
    assert [each for each in text.splitlines() if each.startswith("#SBATCH --export")] == ([line] if line else [])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"A": "x"}, "hpcmm: B of cluster.environment_from did not reach the job"),
        ({"A": "x", "B": ""}, ""),
        ({"A": "x", "B": "y", "SLURM_HET_SIZE": "2"}, "hpcmm: job 7 is a heterogeneous job"),
    ],
)
def test_a_job_without_its_variables_or_of_several_components_ends_before_anything_runs(tmp_path, environment, said):
    text = rendered("cluster.environment_from=[A,B]")
    head = text[text.index('if [ -n "${SLURM_HET_SIZE') : text.index("# Compiled ops")]
    done = subprocess.run(
        ["bash", "-euc", head], env={"PATH": "/bin:/usr/bin", "SLURM_JOB_ID": "7", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if said else 0)
    assert done.stderr.startswith(said)


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
