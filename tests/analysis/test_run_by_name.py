"""A run is named on the command line as for the other commands: by its name in the folder of runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpcmm.analyze.__main__ import main
from hpcmm.runs.run_dir import RunDir

SAMPLE = Path(__file__).parents[2] / "profiles" / "samples" / "clean"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``./runs`` with an older and a newer run, the newer one with reports, and ``latest``."""
    folder = tmp_path / "runs"
    for age, name in enumerate(("demo-2", "demo-1")):
        run = RunDir(folder / name)
        run.create()
        run.config.write_text("cluster: {nodes: 2, ranks_per_node: 2}\n", encoding="utf-8")
        run.submission_script.touch()
        os.utime(run.submission_script, (1000 - age, 1000 - age))
    shutil.copytree(SAMPLE, folder / "demo-2" / "nsys", dirs_exist_ok=True)
    (folder / "latest").symlink_to("demo-2")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["latest", "demo-2", "demo"])
def test_a_name_is_the_run_in_the_folder_of_runs(runs: Path, name: str) -> None:
    assert main([name, "--tables", "osrt"]) == 0
    assert (runs / "demo-2" / "analysis" / "osrt.csv").is_file()


def test_a_path_that_exists_comes_first(runs: Path) -> None:
    shutil.copytree(SAMPLE, runs.parent / "demo")
    assert main(["demo", "--tables", "osrt"]) == 0
    assert (runs.parent / "analysis" / "osrt.csv").is_file()


def test_a_run_is_compared_by_name(runs: Path) -> None:
    assert main(["compare", "demo", "latest"]) == 0
    assert (runs / "demo-2" / "analysis" / "compare.csv").is_file()


def test_a_name_of_no_run_says_where_it_was_looked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["other"]) == 1
    assert f"other does not exist, and is not a run in {runs}" in capsys.readouterr().err
