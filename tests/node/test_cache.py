"""The cache folder, and what is said where there can be none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config import config_file
from hpcmm.config.schema import ClusterConfig, RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.node.cache import cache_dir, one_at_a_time
from hpcmm.nsys.probe import nsys_facts
from hpcmm.runs.run_dir import RunDir


@pytest.mark.parametrize("home", ["/dev/null/x", "/proc/nonexistent"])
def test_a_job_of_a_user_whose_home_cannot_be_written_says_what_to_set(tmp_path: Path, home: str) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    config_file.dump(RunConfig(name="run", cluster=ClusterConfig(name="local")), run.config)
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.worker", "prepare", str(run.root)],
        env=os.environ | {"HOME": home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"hpcmm: The cache folder {home}/.cache/hpcmm cannot be written (")
    assert "set cluster.cache_dir to a folder that all nodes share and can write." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_probe_of_nsys_that_cannot_be_noted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "nsys").write_text("")
    (tmp_path / "cache").write_text("a file if the folder should be")
    with pytest.raises(HpcmmError, match=r"set cluster\.cache_dir to"):
        nsys_facts(str(tmp_path / "nsys"), tmp_path / "cache" / "nsys")


def test_the_cache_folder_is_made_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a new home"))
    folder = cache_dir(RunConfig().cluster)
    assert folder == tmp_path / "a new home" / ".cache" / "hpcmm"
    with one_at_a_time(folder / "lock"):
        assert folder.is_dir()
