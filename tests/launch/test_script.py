"""The rendered sbatch script: its golden text, and that no value from outside can become a command."""

import shlex
import subprocess
from pathlib import Path

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.launch.compose import compose_run
from hpcmm.launch.script import render_script
from hpcmm.run_dir import RunDir

GOLDEN = Path(__file__).parent / "golden"


def rendered(*overrides, root="/shared/runs/demo-1"):
    return render_script(
        compose_run(["experiment=anomaly_demo", *overrides]), RunDir(Path(root)), python="/env/bin/python"
    )


def test_the_demo_script_is_as_recorded():
    assert rendered() == (GOLDEN / "anomaly_demo.sh").read_text(encoding="utf-8")


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
    script = render_script(run, RunDir(tmp_path / 'it\'s a "run"'))
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
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_line_break_in_a_directive_is_refused():
    with pytest.raises(HpcmmError, match="cannot hold a line break"):
        rendered(root="/shared/a\n#SBATCH --wrap=pwn")
