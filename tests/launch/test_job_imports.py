"""Editable installs: the copy comes before them, or they are named as read live. Found in files, and nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.launch.job_imports import importable, read_editable, site_folders
from hpcmm.launch.snapshot import plan_code, take_snapshot
from hpcmm.runs.run_dir import RunDir

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
SETUPTOOLS_FINDER = """\
from __future__ import annotations
import sys
from importlib.util import spec_from_file_location
from pathlib import Path
MAPPING: dict[str, str] = {mapping!r}
NAMESPACES: dict[str, list[str]] = {{}}
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in MAPPING:
            return spec_from_file_location(name, Path(MAPPING[name], "__init__.py"))
def install():
    sys.meta_path.append(Finder)
"""


class Python:
    """A virtual environment with nothing in it but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bin" / "python"
        self.site = folder / "lib" / VERSION / "site-packages"
        for made in (self.path.parent, self.site):
            made.mkdir(parents=True)
        self.path.symlink_to(os.path.realpath(sys.executable))
        home = Path(os.path.realpath(sys.executable)).parent
        (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\nversion = 3.11.7\n")

    def map(self, **packages: Path) -> None:
        """As setuptools does for a flat layout."""
        finder = SETUPTOOLS_FINDER.format(mapping={name: str(path) for name, path in packages.items()})
        (self.site / "__editable___mine_finder.py").write_text(finder)
        line = "import __editable___mine_finder; __editable___mine_finder.install()\n"
        (self.site / "__editable__.mine.pth").write_text(line)

    def add_folder(self, folder: Path) -> None:
        """As hatch, flit and poetry do, and setuptools for ``src/``."""
        (self.site / "mine.pth").write_text(f"# made by a build backend\n\n{folder}")


@pytest.fixture
def python(tmp_path: Path) -> Python:
    return Python(tmp_path / "environment")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without git, with a script in a folder and a package in ``src/``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" in entry or "/lib/" in entry])
    folder = tmp_path / "project"
    for name in ("pyproject.toml", "scripts/train.py", "src/mine/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("WHAT = 'submitted'\n" if name.endswith("__init__.py") else "")
    return folder


def frozen(project: Path, python: Python, *overrides: str, here: Path | None = None, script: str = "scripts/train.py"):
    """The run directory and the names of the folders that the job searches first, in the copy."""
    task = [] if any("task.target" in word for word in overrides) else ["task=script", f"task.path={project / script}"]
    config = compose_run(
        [*task, f"cluster.python={python.path}", f"runs_root={project.parent / 'runs'}", *overrides],
    )
    run = RunDir(project.parent / "runs" / f"run{len(list(project.parent.glob('runs/*')))}")
    run.create()
    code = plan_code(config, run, here or project)
    take_snapshot(config, run, code)
    return run, [str(Path(folder).relative_to(run.code)) for folder in code.python_path[1:]]


def imported(run: RunDir, python: Python, folders: list[str], name: str = "mine") -> Path:
    """The file that the job's own Python imports ``name`` from."""
    done = subprocess.run(
        [str(python.path), "-P", "-c", f"import {name}; print({name}.__file__)"],
        env={"PYTHONPATH": os.pathsep.join(str(run.code / folder) for folder in folders)},
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    return Path(done.stdout.strip()).resolve()


# What comes first.


@pytest.mark.parametrize("here", [".", "scripts", "/"])
def test_the_copy_comes_before_a_package_that_a_finder_maps_from_wherever_it_is_launched(
    project: Path, python: Python, here: str, capsys: pytest.CaptureFixture[str]
):
    python.map(mine=project / "src" / "mine")
    run, folders = frozen(project, python, here=project / here)
    assert imported(run, python, folders) == run.code / "project/src/mine/__init__.py"
    assert folders == ["project/src", "project"]
    assert "mine" not in capsys.readouterr().err


def test_the_copy_comes_before_a_folder_of_a_path_file(project: Path, python: Python):
    python.add_folder(project / "src")
    run, folders = frozen(project, python)
    assert imported(run, python, folders) == run.code / "project/src/mine/__init__.py"


def test_a_package_in_src_is_imported_from_the_copy_though_it_is_not_installed(project: Path, python: Python):
    run, folders = frozen(project, python)
    assert imported(run, python, folders) == run.code / "project/src/mine/__init__.py"


def test_a_mapped_package_whose_folder_has_another_name_is_imported_from_the_copy(project: Path, python: Python):
    (project / "code").mkdir()
    (project / "code" / "__init__.py").write_text("")
    python.map(other=project / "code")
    run, folders = frozen(project, python)
    assert folders[0] == "imports"
    assert imported(run, python, folders, "other") == run.code / "project/code/__init__.py"


def test_a_project_s_folder_hides_no_installed_package_and_no_module_of_python(project: Path, python: Python):
    (python.site / "datasets").mkdir()
    (python.site / "datasets" / "__init__.py").write_text("")
    for name in ("datasets/__init__.py", "queue.py", "plain.py", "mapped/__init__.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("")
    python.map(mapped=project / "mapped")
    run, folders = frozen(project, python)
    assert folders == ["imports", "project/src"]
    assert imported(run, python, folders, "datasets") == python.site / "datasets/__init__.py"
    assert run.code not in imported(run, python, folders, "queue").parents
    for name in ("plain.py", "mapped/__init__.py"):
        assert imported(run, python, folders, name.split("/")[0].removesuffix(".py")) == run.code / "project" / name


def test_folders_of_pythonpath_come_in_their_order(project: Path, python: Python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{project / 'scripts'}:src")
    _, folders = frozen(project, python, "cluster.environment.PYTHONPATH=tools")
    assert folders == ["project/scripts", "project/src", "project"]


def test_a_function_s_project_is_found_by_its_package_from_wherever_it_is_launched(project: Path, python: Python):
    python.map(mine=project / "src" / "mine")
    run, folders = frozen(project, python, "task=function", "task.target=mine:main", here=Path("/"))
    assert imported(run, python, folders) == run.code / "project/src/mine/__init__.py"


# What is read live.


def test_editable_packages_of_other_projects_are_named(
    project: Path, python: Python, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("a/src/first/__init__.py", "a/src/second.py", "b/third/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    python.add_folder(tmp_path / "a" / "src")
    python.map(third=tmp_path / "b" / "third")
    frozen(project, python)
    assert capsys.readouterr().err.splitlines() == [
        f"hpcmm: package third is read live from {tmp_path / 'b' / 'third'} when the job runs.",
        f"hpcmm: packages first, second are read live from {tmp_path / 'a' / 'src'} when the job runs.",
    ]


def test_a_package_whose_finder_is_unknown_is_named_though_it_is_of_the_project(
    project: Path, python: Python, capsys: pytest.CaptureFixture[str]
):
    record = python.site / "mine-1.0.dist-info" / "direct_url.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}))
    frozen(project, python)
    assert capsys.readouterr().err == f"hpcmm: package mine is read live from {project} when the job runs.\n"


def test_a_package_of_the_project_that_is_not_in_the_copy_is_named(
    project: Path, python: Python, capsys: pytest.CaptureFixture[str]
):
    (project / "build" / "lib" / "made").mkdir(parents=True)
    (project / "build" / "lib" / "made" / "__init__.py").write_text("")
    (project / ".gitignore").write_text("build/\n")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    python.map(made=project / "build" / "lib" / "made")
    frozen(project, python)
    assert f"package made is read live from {project}/build/lib/made when the job runs." in capsys.readouterr().err


def test_nothing_is_said_of_a_python_that_cannot_be_looked_into(
    project: Path, python: Python, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "other").mkdir()
    python.map(third=tmp_path / "other")
    for overrides in (["cluster.python=python", "cluster.setup=[x]"], ["cluster.python=/nowhere/bin/python"]):
        frozen(project, python, *overrides)
    assert capsys.readouterr().err == ""


def test_without_a_snapshot_nothing_is_said(project: Path, python: Python, capsys: pytest.CaptureFixture[str]):
    python.map(third=project)
    config = compose_run([
        "task=script", f"task.path={project}/scripts/train.py", "launch.snapshot=false", f"cluster.python={python.path}"
    ])  # fmt: skip
    plan_code(config, RunDir(project / "run"), project)
    assert capsys.readouterr().err == ""


# How it is found.


def test_finders_of_the_package_editables_are_read(tmp_path: Path):
    (tmp_path / "_editable_impl_x.pth").write_text("import _editable_impl_x\n")
    (tmp_path / "_editable_impl_x.py").write_text(
        "from editables.redirector import RedirectingFinder as F\nF.install()\n"
        f"F.map_module('x', {str(tmp_path / 'x' / '__init__.py')!r})\n"
    )
    (tmp_path / "x").mkdir()
    assert dict(read_editable([tmp_path]).packages) == {"x": tmp_path / "x"}


def test_folders_that_a_path_file_adds_are_read_as_well(tmp_path: Path):
    for name in ("one", "two", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "base.pth").write_text(f"import site; site.addsitedir('{tmp_path / 'two'}')\n")
    (tmp_path / "two" / "easy-install.pth").write_text("../source\n/not/there\n")
    found = read_editable([tmp_path / "one"])
    assert found.roots == (tmp_path / "source",)
    assert found.sites == (tmp_path / "one", tmp_path / "two")


def test_packages_of_another_python_that_a_path_file_names_are_known(tmp_path: Path):
    other, own = tmp_path / "other" / "site-packages", tmp_path / "own" / "site-packages"
    (other / "torch").mkdir(parents=True)
    own.mkdir(parents=True)
    (own / "other.pth").write_text(f"{other}\n")
    found = read_editable([own])
    assert "torch" in found.names
    assert found.roots == ()


def test_files_that_cannot_be_read_as_text_or_python_are_passed_over(tmp_path: Path):
    (tmp_path / "a.pth").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.pth").write_text("import broken\n")
    (tmp_path / "broken.py").write_text("MAPPING = {")
    (tmp_path / "c.dist-info").mkdir()
    (tmp_path / "c.dist-info" / "direct_url.json").write_text("[")
    found = read_editable([tmp_path, tmp_path / "none"])
    assert (found.roots, dict(found.packages)) == ((), {})


@pytest.mark.timeout(120)
def test_pipes_among_the_files_of_a_python_are_not_waited_for(project: Path, python: Python):
    record = python.site / "mine-1.dist-info" / "direct_url.json"
    record.parent.mkdir()
    settings = python.path.parent.parent / "pyvenv.cfg"
    settings.unlink()
    for pipe in (python.site / "mine.pth", python.site / "__editable___mine_finder.py", record, settings):
        os.mkfifo(pipe)
    (python.site / "other.pth").write_text("import __editable___mine_finder\n")
    _, folders = frozen(project, python)
    assert folders[0] == "project"


def test_the_folders_of_a_python_are_known_by_its_layout(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    conda, user = tmp_path / "conda", tmp_path / ".local" / "lib" / "python3.9" / "site-packages"
    for folder in (conda / "lib" / "python3.9" / "site-packages", conda / "bin", tmp_path / "bin", user):
        folder.mkdir(parents=True)
    (conda / "lib64").symlink_to("lib")
    (conda / "bin" / "python3.9").touch()
    (tmp_path / "bin" / "python").symlink_to(conda / "bin" / "python3.9")
    cluster = compose_run([f"cluster.python={tmp_path / 'bin' / 'python'}"]).cluster
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    assert site_folders(cluster, tmp_path) == [conda / "lib" / "python3.9" / "site-packages", user]
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert site_folders(cluster, tmp_path) == [conda / "lib" / "python3.9" / "site-packages"]


def test_modules_are_known_by_their_names(tmp_path: Path):
    for name in ("a.py", "b.cpython-311-x86_64-linux-gnu.so", "c/__init__.py", "space/in/d.py", "e/data.txt", "f-g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(importable(tmp_path)) == ["a", "b", "c", "space"]
