"""An installed wheel in an empty folder, without a clone of hpcmm: each command, and a cluster of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a virtual environment with the wheel, and the tests' own packages but for DeepSpeed, which a
    script without it does not need, and whose ops would be compiled."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*wheel, "--wheel-dir", str(folder), str(ROOT)], ROOT)
    (built,) = folder.glob("hpcmm-*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(built)], folder)  # fmt: skip
    packages = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("hpcmm", "deepspeed", "__pycache__")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return python.parent


def run(command: list[str], folder: Path, status: int = 0, **environment: str) -> str:
    """What the command prints, which must end with ``status``."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_a_script_runs_from_an_empty_folder_and_its_run_lies_there(installed, tmp_path):
    (tmp_path / "hello.py").write_text("import os, hpcmm\nprint('rank', os.environ['RANK'], 'with', hpcmm.__file__)\n")
    words = ["cluster=local", "cluster.ranks_per_node=2", "task=script", "task.path=hello.py", "wait=true"]
    run([str(installed / "python"), "-m", "hpcmm.launch", *words], tmp_path)
    logs = sorted((tmp_path / "runs" / "latest" / "logs").glob("rank_*.log"))
    said = [line for log in logs for line in log.read_text().splitlines() if line.startswith("rank ")]
    assert [line.split()[1] for line in said] == ["0", "1"]
    assert str(ROOT / "hpcmm") not in " ".join(said)
    assert "COMPLETED" in run([str(installed / "hpcmm"), "jobs", "status", "latest"], tmp_path)


def test_a_sample_that_comes_with_it_is_analysed(installed, tmp_path):
    shown = run([str(installed / "hpcmm"), "analyze", "--help"], tmp_path)
    (sample,) = [word for word in shown.split() if word.endswith("/slow_data")]
    assert sample.startswith(str(installed.parent))
    said = run([str(installed / "hpcmm"), "analyze", sample, "--out", "out"], tmp_path)
    assert "data" in said.partition("\n")[0]
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_demos_configuration_and_the_scripts_template_come_with_it(installed, tmp_path):
    words = ["experiment=anomaly_demo", "cluster=slurm", "dry_run=true"]
    assert "#SBATCH --nodes=1" in run([str(installed / "hpcmm"), "launch", *words], tmp_path)
    assert "No node is bad" in run([str(installed / "hpcmm"), "doctor", "--no-nsys"], tmp_path)


@pytest.mark.long
@pytest.mark.slurm
def test_a_file_that_init_wrote_and_checked_is_a_cluster(installed, slurm_cluster, tmp_path):
    site = {"SLURM_CONF": str(slurm_cluster.conf), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    own_python = ["--python", str(installed.parent)]  # the folder of an environment
    said = run([str(installed / "hpcmm"), "init", "--yes", "--name", "lab", *own_python], tmp_path, **site)
    assert "The nodes met on eth0" in said
    written = yaml.safe_load((tmp_path / "config" / "hpcmm" / "conf" / "cluster" / "lab.yaml").read_text())
    assert (written["partition"], written["gpus_per_node"], written["nodes"]) == ("main", 2, 2)
    assert written["environment"]["NCCL_SOCKET_IFNAME"] == "eth0"
    words = ["cluster=lab", "task=function", "task.target=os:getcwd", "wait=true"]
    del site["SLURM_CONF"]
    assert "COMPLETED" in run([str(installed / "hpcmm"), "launch", *words], tmp_path, **site)
