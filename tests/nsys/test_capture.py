"""nsys runs no code of others, and shows them nothing; the rank under it starts as it would without."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.errors import ProfilerUnusableError
from hpcmm.nsys.capture import one_start_at_a_time, run_under_nsys
from hpcmm.nsys.importer import find_importer
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
libraries = os.environ.get("LD_LIBRARY_PATH", "none")
told = {"folder": os.getcwd(), "umask": umask, "tmpdir": os.environ.get("TMPDIR"), "pwd": os.environ["PWD"]}
told["empty"] = "" in libraries.split(":")
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
        "empty": False,
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


@pytest.mark.parametrize(
    ("before", "after"), [(":/a::/b:", "/a:/b"), ("/a b/*:/c", "/a b/*:/c"), (":", None), ("", None), (None, None)]
)
def test_a_rank_takes_no_libraries_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before, after):
    """A stand-in for nsys that starts the command at once."""
    stand_in, told = tmp_path / "stand-in", tmp_path / "told"
    setting = "unset LD_LIBRARY_PATH" if before is None else f"export LD_LIBRARY_PATH='{before}'"
    stand_in.write_text(f'#!/bin/sh\nshift\n{setting}\nexec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    tells = [
        sys.executable,
        "-c",
        f"import os; open({str(told)!r}, 'w').write(repr(os.environ.get('LD_LIBRARY_PATH')))",
    ]
    # The output's flag is the first word, which the stand-in leaves out.
    assert run_under_nsys([str(stand_in)], tells, tmp_path / "rank.nsys-rep") == 0
    assert told.read_text() == repr(after)


def test_an_nsys_that_never_starts_the_rank_is_unusable_and_leaves_nothing(place: Path, tmp_path: Path):
    stand_in = tmp_path / "stand-in"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    ends: list[object] = []
    with pytest.raises(ProfilerUnusableError, match=r"did not start the rank; what it said stands above"):
        run_under_nsys([str(stand_in)], ["true"], tmp_path / "rank.nsys-rep", ended=ends.append)
    assert ends == []
    assert not [each for each in place.glob("hpcmm-nsys-*") if each.is_dir()]


@pytest.mark.parametrize("is_planted", [True, False])
def test_an_importer_that_another_user_put_beside_a_link_to_nsys_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_planted: bool
):
    tools = tmp_path / "tools"
    importer = tools / "host-linux-x64" / "QdstrmImporter"
    for path in (tools / "bin" / "nsys", importer):
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    tools.chmod(0o1777)
    if is_planted:
        another_user.give(importer.parent)
    monkeypatch.setenv("PATH", f"{tools / 'bin'}")
    assert find_importer() == (None if is_planted else importer)


@pytest.fixture
def injection(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder that stands for /dev/shm, the file by which CUDA's library is told of another one."""
    monkeypatch.setattr("hpcmm.nsys.capture._INJECTION_NAME", place / "injection")
    return place / "injection"


@pytest.mark.parametrize("planted", ["nothing", "hard link", "open to all"])
def test_before_nsys_starts_the_name_is_taken_by_which_others_could_name_a_library(injection: Path, planted: str):
    left_by_nsys = injection.with_name("left-by-nsys")
    left_by_nsys.write_text("evil.so")
    left_by_nsys.chmod(0o666)
    if planted == "hard link":
        injection.hardlink_to(left_by_nsys)
    elif planted == "open to all":
        left_by_nsys.rename(injection)
    with one_start_at_a_time():
        facts = injection.lstat()
    assert (facts.st_uid, facts.st_mode & 0o777, facts.st_nlink, facts.st_size) == (os.geteuid(), 0o600, 1, 0)
    with one_start_at_a_time():
        assert injection.lstat().st_ino == facts.st_ino


def test_the_name_is_taken_by_a_rank_under_nsys_and_by_the_probe(injection: Path, tmp_path: Path):
    nsys_problem(str(NSYS))
    assert injection.exists()
    injection.unlink()
    command = [
        sys.executable,
        "-c",
        f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(str(os.path.exists({str(injection)!r})))",
    ]
    run_under_nsys([str(NSYS), "profile", *FLAGS], command, tmp_path / "rank_0000.nsys-rep")
    assert (tmp_path / "seen").read_text() == "True"


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_what_another_user_has_by_that_name_stays_and_is_told(injection: Path, tmp_path: Path, kind: str, capsys):
    (tmp_path / "thesis").write_text("mine")
    if kind == "link":
        injection.symlink_to(tmp_path / "thesis")
    elif kind == "pipe":
        os.mkfifo(injection, 0o600)
    else:
        injection.touch()
    another_user.give(injection)
    with one_start_at_a_time():
        assert injection.lstat().st_uid == another_user.UID
    assert (tmp_path / "thesis").read_text() == "mine"
    assert f"is of user {another_user.UID}: see docs/security.md." in capsys.readouterr().err


def test_if_the_name_cannot_be_taken_nsys_starts_all_the_same(injection: Path, monkeypatch, capsys):
    too_long = injection.with_name("n" * 300)
    monkeypatch.setattr("hpcmm.nsys.capture._INJECTION_NAME", too_long)
    with one_start_at_a_time():
        assert f"{too_long} cannot be made (File name too long), so another user could: see" in capsys.readouterr().err
    monkeypatch.setattr("hpcmm.nsys.capture._INJECTION_NAME", injection / "no such folder")
    with one_start_at_a_time():
        assert capsys.readouterr().err == ""
