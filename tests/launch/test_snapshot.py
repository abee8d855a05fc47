"""The code of a run is what git would track, as it lies on disk; nothing else is copied, and nothing without bound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.launch.snapshot import plan_code, take_snapshot
from hpcmm.launch.write import installed_packages, write_provenance
from hpcmm.runs.run_dir import RunDir


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def project(tmp_path):
    """A repository with a committed script and module, changed since, a new file, and things that git ignores."""
    folder = tmp_path / "it's a project"
    (folder / "lib").mkdir(parents=True)
    (folder / "train.py").write_text("import helper\n")
    (folder / "lib" / "helper.py").write_text("VERSION = 1\n")
    (folder / ".gitignore").write_text("*.bin\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    (folder / "lib" / "helper.py").write_text("VERSION = 2\n")
    (folder / "new.py").write_text("")
    (folder / "data.bin").write_bytes(b"0" * 1000)
    (folder / "link.py").symlink_to("new.py")
    (folder / "runs" / "older").mkdir(parents=True)
    (folder / "runs" / "older" / "config.yaml").write_text("")
    return folder


def planned(project, *overrides, task=("task=script", "task.path=train.py")):
    config = compose_run([*task, f"runs_root='{project / 'runs'}'".replace("it's", "it\\'s"), *overrides])
    run = RunDir(project / "runs" / "new")
    run.create()
    return config, run, plan_code(config, run, project)


def test_tracked_changed_and_new_files_are_copied_and_ignored_ones_and_runs_are_not(project):
    config, run, code = planned(project)
    take_snapshot(config, run, code.project)
    copied = run.code / "project"
    assert {str(path.relative_to(copied)) for path in copied.rglob("*") if not path.is_dir()} == {
        "train.py", "lib/helper.py", ".gitignore", "new.py", "link.py",
    }  # fmt: skip
    assert (copied / "lib" / "helper.py").read_text() == "VERSION = 2\n"
    assert (copied / "link.py").is_symlink()
    assert code.script == str(copied / "train.py")


def test_the_copy_of_hpcmm_launches_by_itself(project):
    config, run, code = planned(project)
    take_snapshot(config, run, code.project)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code_of_a_copy = (
        "import hpcmm.launch.plan, hpcmm.resources as r; "
        "print(hpcmm.__file__, r.resource('conf/config.yaml').is_file())"
    )
    origin = subprocess.run(
        [sys.executable, "-P", "-c", code_of_a_copy],
        env=environment | {"PYTHONPATH": code.python_path[0]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert origin.stdout == f"{run.code / 'hpcmm/hpcmm/__init__.py'} True\n"


def test_the_hash_follows_the_code(project):
    config, run, code = planned(project)
    first = take_snapshot(config, run, code.project)
    again = RunDir(project / "runs" / "again")
    assert take_snapshot(config, again, code.project) == first
    (project / "train.py").write_text("import helper  # changed\n")
    assert take_snapshot(config, RunDir(project / "runs" / "third"), code.project) != first


def test_folders_that_python_imports_from_are_those_of_the_copy(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project / "lib"))
    _, run, code = planned(project, task=("task=function", "task.target=helper:main"))
    assert code.python_path == (str(run.code / "hpcmm"), str(run.code / "project"), str(run.code / "project" / "lib"))


def test_without_a_snapshot_the_code_is_where_it_is(project):
    _, run, code = planned(project, "launch.snapshot=false")
    assert code.script == str(project / "train.py")
    assert code.project is None
    assert str(run.code) not in " ".join(code.python_path)


def test_without_git_the_modules_beside_the_script_are_copied(tmp_path):
    (tmp_path / "package").mkdir()
    for name in ("train.py", "helper.py", "package/__init__.py", "package/a.py", "data.csv"):
        (tmp_path / name).write_text("")
    config, run, code = planned(tmp_path)
    take_snapshot(config, run, code.project)
    copied = run.code / "project"
    assert {str(path.relative_to(copied)) for path in copied.rglob("*.*")} == {
        "train.py", "helper.py", "package/__init__.py", "package/a.py",
    }  # fmt: skip


def test_too_much_code_is_refused_with_its_largest_file(project):
    (project / "weights.pt").write_bytes(b"0" * 2_000_000)
    config, run, code = planned(project, "launch.snapshot_limit_mb=1")
    with pytest.raises(HpcmmError, match=r"has 2 MB, above .* largest file is weights.pt \(2 MB\)"):
        take_snapshot(config, run, code.project)


def test_a_script_that_is_not_there_is_named(project):
    with pytest.raises(HpcmmError, match=r"task\.path is none\.py, but there is no such file"):
        planned(project, "task.path=none.py")


def test_the_provenance_names_commit_changes_packages_and_hashes(project, monkeypatch):
    monkeypatch.setenv("LOADEDMODULES", "gcc/12:cuda/12.4")
    config, run, code = planned(project)
    run.submission_script.write_text("#!/bin/bash\n")
    write_provenance(config, run, overrides=["a=b"], project=code.project, code_sha256="abc")
    record = json.loads(run.provenance.read_text())
    head = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["code"]["project"]["commit"] == head.stdout.strip()
    assert "+VERSION = 2" in (run.root / record["code"]["project"]["uncommitted_changes"]).read_text()
    assert record["modules"] == ["gcc/12", "cuda/12.4"]
    assert record["overrides"] == ["a=b"]
    assert record["code_sha256"] == "abc"
    assert record["packages"]["submitit"] == installed_packages()["submitit"]


def test_the_packages_are_those_that_importlib_finds():
    from importlib.metadata import version

    found = installed_packages()
    for name in ("numpy", "pytest", "hydra_core", "omegaconf"):
        assert found[name] == version(name.replace("_", "-"))
    assert Path(sys.prefix).is_dir()


def test_new_files_with_credentials_are_not_copied_and_are_named(project, capsys):
    (project / ".env").write_text("TOKEN=1")
    (project / "id_rsa").write_text("1")
    config, run, code = planned(project)
    take_snapshot(config, run, code.project)
    assert not {".env", "id_rsa"} & {path.name for path in run.code.rglob("*")}
    assert "not copied, for they look like credentials: '.env', 'id_rsa'." in capsys.readouterr().err


def test_links_that_lead_in_a_circle_are_copied_as_they_are(project):
    (project / "circle").symlink_to("circle")
    config, run, code = planned(project)
    take_snapshot(config, run, code.project)
    assert (run.code / "project" / "circle").is_symlink()


@pytest.mark.parametrize("path", ["~nobody-here/train.py", "a" * 5000])
def test_a_script_that_cannot_be_looked_up_is_refused(project, path):
    with pytest.raises(HpcmmError, match="cannot be looked up"):
        planned(project, f"task.path='{path}'")


def test_what_is_named_like_a_module_and_is_no_file_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    config, run, code = planned(tmp_path, f"runs_root='{tmp_path}/runs'")
    take_snapshot(config, run, code.project)
    assert [path.name for path in (run.code / "project").iterdir()] == ["train.py"]
