"""The wheel holds what git tracks of hpcmm, and the files that it reads: no module is left out, none slips in."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = ("conf", "slurm", "profiles")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")


def in_git(*folders: str) -> set[str]:
    """Files that git tracks in these folders, or would: a new module counts before it is committed."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def in_wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the built wheel's files, but for its metadata."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("hpcmm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_every_module_in_git_is_in_the_wheel_and_no_other(in_wheel: set[str]) -> None:
    assert {name for name in in_wheel if not name.startswith("hpcmm/_resources/")} == in_git("hpcmm")


def test_the_files_that_hpcmm_reads_are_in_the_wheel(in_wheel: set[str]) -> None:
    resources = {name for name in in_wheel if name.startswith("hpcmm/_resources/")}
    assert resources == {f"hpcmm/_resources/{name}" for name in in_git(*RESOURCES)}


@pytest.mark.parametrize("name", ["runs", "outputs", "evaluation"])
def test_a_package_may_be_called_like_a_folder_of_output(name: str) -> None:
    """Git and the wheel leave out what .gitignore names, which is the folder at the top alone."""
    files = [f"{name}/module.py", f"hpcmm/{name}/module.py"]
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *files], capture_output=True, text=True, check=False
    )
    assert ignored.stdout.splitlines() == files[:1], ignored.stderr
