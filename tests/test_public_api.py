"""What ``import hpcmm`` gives, and that it costs nothing until it is used."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hpcmm
from hpcmm.errors import HpcmmError

SAMPLES = Path(__file__).parents[1] / "profiles" / "samples"
HEAVY = ("pandas", "numpy", "torch", "hydra", "omegaconf", "submitit", "nvtx", "rich", "argparse", "hpcmm.api")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_alone_loads_nothing_heavy() -> None:
    assert python(f"import sys, hpcmm; print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    ("name", "loaded"), [("launch_run", "hpcmm.launch"), ("analyze_reports", "pandas"), ("compare_runs", "pandas")]
)
def test_a_function_that_is_not_called_loads_nothing_either(name: str, loaded: str) -> None:
    assert python(f"import sys, hpcmm; hpcmm.{name}; print({loaded!r} in sys.modules)") == "False\n"


def test_the_names_are_listed_documented_and_typed() -> None:
    assert set(hpcmm.__all__) == {"analyze_reports", "annotate", "compare_runs", "launch_run"}
    assert set(hpcmm.__all__) <= set(dir(hpcmm))
    for name in ("analyze_reports", "compare_runs", "launch_run"):
        function = getattr(hpcmm, name)
        assert "Raises HpcmmError" in inspect.getdoc(function)
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    with pytest.raises(AttributeError, match="module 'hpcmm' has no attribute 'nonsense'"):
        hpcmm.nonsense  # noqa: B018
    assert python("from hpcmm import *; print(launch_run.__name__, annotate.step.__name__)") == "launch_run step\n"


def test_the_types_are_for_users_too() -> None:
    assert Path(hpcmm.__file__).with_name("py.typed").is_file()


def test_the_functions_work_beside_the_packages_of_similar_names(tmp_path: Path) -> None:
    sample = SAMPLES / "clean"
    found = []
    for package in ("hpcmm.launch", "hpcmm.analyze", "hpcmm.annotate"):
        importlib.import_module(package)
        run = hpcmm.analyze_reports(sample)
        same = hpcmm.compare_runs(run, run)
        found.append((len(run.bottlenecks()), set(same.table["verdict"])))
        with pytest.raises(HpcmmError, match=r"train\.stepz"):
            hpcmm.launch_run(["train.stepz=1", f"runs_root={tmp_path}"])
        with hpcmm.annotate.step(0), hpcmm.annotate.phase("forward"):
            pass
    assert inspect.ismodule(hpcmm.launch)
    assert inspect.ismodule(hpcmm.analyze)
    assert inspect.isfunction(hpcmm.analyze.analyze)
    assert found[0][0] > 0
    assert found[0] == found[1] == found[2]


def test_the_reports_are_analysed_into_a_folder_and_some_tables_alone(tmp_path: Path) -> None:
    from hpcmm.analyze import analyze

    run = hpcmm.analyze_reports(SAMPLES / "clean", tmp_path / "out", tables=["osrt"])
    assert list(run.tables) == ["osrt"]
    assert (tmp_path / "out" / "osrt.csv").is_file()
    assert run.osrt().equals(analyze(SAMPLES / "clean", tables=["osrt"]).osrt())


def test_a_launch_is_queued_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct"):
        (binaries / name).write_text("#!/bin/sh\necho Submitted batch job 7\n", encoding="utf-8")
        (binaries / name).chmod(0o755)
    code = "import hpcmm\noverrides = ['cluster=slurm', 'launch.snapshot=false']\n"
    code += "first, second = hpcmm.launch_run(overrides), hpcmm.launch_run(overrides)\n"
    code += "print(first.job_id, second.job_id, first.run.root != second.run.root, first.run.config.is_file())"
    monkeypatch.setenv("PATH", str(binaries), prepend=":")
    monkeypatch.chdir(tmp_path)
    assert python(code) == "7 7 True True\n"
    assert len(list((tmp_path / "runs").glob("run-*"))) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.steps=1", r'\["train\.steps=1"\]'),
        (["cluster=slurm", "dry_run=true"], "dry_run=true is for the command line"),
        (["cluster=slurm", "wait=true"], "wait=true is for the command line"),
        (["cluster=slurm", "train.steps=1,2"], "sweep|train.steps"),
    ],
)
def test_what_is_the_command_s_is_refused(overrides, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HpcmmError, match=message):
        hpcmm.launch_run(overrides)
    assert list(tmp_path.iterdir()) == []
