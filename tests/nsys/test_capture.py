"""nsys runs no code of others, and shows them nothing; the rank under it starts as it would without."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from hpcmm.nsys.capture import run_under_nsys
from hpcmm.nsys.probe import nsys_problem

NSYS = shutil.which("nsys")
pytestmark = [
    pytest.mark.nsys,
    pytest.mark.timeout(300),
    pytest.mark.skipif(NSYS is None, reason="nsys is not installed"),
]
FLAGS = ("--trace=none", "--sample=none", "--cpuctxsw=none")
TELLS = """\
import json, os, sys
umask = os.umask(0)
there = os.listdir(sys.argv[2])
told = {"folder": os.getcwd(), "umask": umask, "tmpdir": os.environ.get("TMPDIR"), "pwd": os.environ["PWD"]}
told["seen"] = sorted(name for name in there if not name.startswith("hpcmm-"))
open(sys.argv[1], "w").write(json.dumps(told))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that all can write, in which others left code for nsys' own Python."""
    place = tmp_path / "tmp"
    shared = tmp_path / "shared"
    for folder in (place, shared):
        folder.mkdir()
        folder.chmod(0o1777)
        plant(folder, tmp_path / "ran")
    monkeypatch.chdir(shared)
    monkeypatch.setenv("PWD", str(shared))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def plant(folder: Path, ran: Path) -> None:
    code = f"import os; os.close(os.open({str(ran)!r}, os.O_CREAT))\n"
    packages = folder / "lib/python3.8/site-packages"
    packages.mkdir(parents=True)
    (packages.parent / "os.py").touch()
    (packages / "planted.pth").write_text(code)
    (folder / "sitecustomize.py").write_text(code)


@pytest.mark.parametrize("tmpdir", ["set", "not set"])
def test_a_rank_starts_as_without_nsys_which_reads_and_leaves_nothing_that_others_can_reach(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpdir: str
):
    if tmpdir == "not set":
        monkeypatch.delenv("TMPDIR")
    told, umask = tmp_path / "told", os.umask(0o027)
    try:
        command = [sys.executable, "-P", "-c", TELLS, str(told), str(place)]
        assert run_under_nsys([str(NSYS), "profile", *FLAGS], command, tmp_path / "rank.nsys-rep") == 0
    finally:
        os.umask(umask)
    assert json.loads(told.read_text()) == {
        "folder": str(tmp_path / "shared"),
        "umask": 0o027,
        "tmpdir": str(place) if tmpdir == "set" else None,
        "pwd": str(tmp_path / "shared"),
        "seen": ["lib", "sitecustomize.py"],
    }
    assert (tmp_path / "rank.nsys-rep").exists()
    assert not list(place.glob("*.qdstrm"))
    assert not (tmp_path / "ran").exists()


def test_nor_does_the_look_whether_nsys_records_run_what_others_left(place: Path, tmp_path: Path):
    assert nsys_problem(str(NSYS)) is None
    assert not (tmp_path / "ran").exists()
