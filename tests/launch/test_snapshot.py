"""The code of a run is what git would track, as it lies on disk; nothing else is copied, and nothing without bound."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.launch.interpreter import Interpreter, installed_packages
from hpcmm.launch.plan import plan
from hpcmm.launch.project_files import files_of
from hpcmm.launch.snapshot import plan_code, take_snapshot
from hpcmm.launch.write import write, write_provenance
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


def test_tracked_changed_and_new_files_are_copied_and_ignored_ones_and_runs_are_not(project, capsys):
    config, run, code = planned(project)
    take_snapshot(config, run, code)
    copied = run.code / "project"
    assert {str(path.relative_to(copied)) for path in copied.rglob("*") if not path.is_dir()} == {
        "train.py", "lib/helper.py", ".gitignore", "new.py", "link.py", "data.bin",
    }  # fmt: skip
    assert (copied / "data.bin").readlink() == project / "data.bin"
    assert capsys.readouterr().err == (
        "hpcmm: not copied, but linked, so that the job reads them as they are when it runs: 'data.bin'. "
        "launch.include=[...] copies what the job needs as it is now.\n"
    )
    assert (copied / "lib" / "helper.py").read_text() == "VERSION = 2\n"
    assert (copied / "link.py").is_symlink()
    assert code.script == str(copied / "train.py")


def test_the_copy_of_hpcmm_launches_by_itself(project):
    config, run, code = planned(project)
    take_snapshot(config, run, code)
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
    first = take_snapshot(config, run, code)
    again = RunDir(project / "runs" / "again")
    (project / "results.bin").write_text("")  # only linked
    assert take_snapshot(config, again, code) == first
    (project / "train.py").write_text("import helper  # changed\n")
    assert take_snapshot(config, RunDir(project / "runs" / "third"), code) != first


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
    take_snapshot(config, run, code)
    copied = run.code / "project"
    assert {str(path.relative_to(copied)) for path in copied.rglob("*.*") if not path.is_symlink()} == {
        "train.py", "helper.py", "package/__init__.py", "package/a.py",
    }  # fmt: skip


def test_too_much_code_is_refused_with_its_largest_file(project):
    (project / "weights.pt").write_bytes(b"0" * 2_000_000)
    config, run, code = planned(project, "launch.snapshot_limit_mb=1")
    with pytest.raises(HpcmmError, match=r"has 2 MB, above .* largest file is weights.pt \(2 MB\)"):
        take_snapshot(config, run, code)


def test_a_script_that_is_not_there_is_named(project):
    with pytest.raises(HpcmmError, match=r"task\.path is none\.py, but there is no such file"):
        planned(project, "task.path=none.py")


def test_the_provenance_names_commit_changes_packages_and_hashes(project, monkeypatch):
    monkeypatch.setenv("LOADEDMODULES", "gcc/12:cuda/12.4")
    site = project / "site"
    for name in ("nvtx-0.2.11.dist-info", "six-1.17.0-py3.9.egg-info"):
        (site / name).mkdir(parents=True)
    config, run, code = planned(project)
    run.submission_script.write_text("#!/bin/bash\n")
    interpreter = Interpreter("/env/bin/python", (3, 9, 18), (str(site),))
    planned_run = SimpleNamespace(config=config, run=run, code=code, overrides=["a=b"], interpreter=interpreter)
    write_provenance(planned_run, "abc")
    record = json.loads(run.provenance.read_text())
    head = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["code"]["project"]["commit"] == head.stdout.strip()
    assert "+VERSION = 2" in (run.root / record["code"]["project"]["uncommitted_changes"]).read_text()
    assert record["modules"] == ["gcc/12", "cuda/12.4"]
    assert record["overrides"] == ["a=b"]
    assert record["code_sha256"] == "abc"
    assert (record["packages"], record["python"]["version"]) == ({"nvtx": "0.2.11", "six": "1.17.0"}, "3.9.18")
    assert record["python"]["launcher"] == sys.executable


def test_the_packages_are_those_that_importlib_finds():
    from importlib.metadata import version

    found = installed_packages(sys.path)
    for name in ("numpy", "pytest", "hydra_core", "omegaconf"):
        assert found[name] == version(name.replace("_", "-"))
    assert Path(sys.prefix).is_dir()


def test_new_files_with_credentials_are_not_copied_and_are_named(project, capsys):
    (project / ".env").write_text("TOKEN=1")
    (project / "id_rsa").write_text("1")
    config, run, code = planned(project)
    take_snapshot(config, run, code)
    git(project, "add", "id_rsa")
    assert not {".env", "id_rsa"} & {path.name for path in run.code.rglob("*")}
    assert "not copied, for they look like credentials: '.env', 'id_rsa'." in capsys.readouterr().err


def test_links_within_the_project_lead_to_the_copy_and_others_are_named(project, tmp_path, capsys):
    (tmp_path / "outside").mkdir()
    links = {
        "lib/up.py": "../train.py", "whole.py": str(project / "lib" / "helper.py"), "folder": "lib",
        "lib/data": str(tmp_path / "outside"), "to_ignored": "data.bin",
    }  # fmt: skip
    for name, target in links.items():
        (project / name).symlink_to(target)
    config, run, code = planned(project)
    take_snapshot(config, run, code)
    copied = run.code / "project"
    assert (copied / "lib" / "up.py").resolve() == copied / "train.py"
    assert (copied / "whole.py").resolve() == copied / "lib" / "helper.py"
    assert (copied / "folder").resolve() == copied / "lib"
    assert (copied / "lib" / "data").resolve() == tmp_path / "outside"
    assert (copied / "to_ignored").resolve() == project / "data.bin"
    assert "'data.bin', 'lib/data'." in capsys.readouterr().err


def test_what_a_script_opens_by_a_relative_path_is_named_since_the_job_reads_it_where_it_lies(project, capsys):
    (project / "config").mkdir()
    for name in ("configurator.py", "config/train_small.py", "beside.yaml", "joined.json", "words.txt"):
        (project / name).write_text("")
    (project / "train.py").write_text(
        "import sys, os\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        "exec(open('configurator.py').read())\n"
        "open(here / 'beside.yaml'), open(os.path.join(here, 'joined.json')), open('results.json', 'w')\n"
        "sys.path.insert(0, 'lib')\nsys.path.append(str(here / 'lib'))\n"
    )
    config, run, code = planned(project, "task.args=[config/train_small.py,--words=words.txt]")
    take_snapshot(config, run, code.joined([code], [config.task]))
    assert (
        f"hpcmm: the job runs in {project}, so a relative path leads to what lies there when it runs, and not to the "
        "copy: 'config/train_small.py', 'configurator.py', 'lib/', 'words.txt'.\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("exchanged_for", [None, os.mkfifo])
def test_a_file_that_vanishes_or_becomes_a_pipe_is_named_and_the_launch_goes_on(
    project, monkeypatch, capsys, exchanged_for
):
    def exchanged(*arguments):
        found = files_of(*arguments)
        (project / "new.py").unlink()
        if exchanged_for:
            exchanged_for(project / "new.py")
        return found

    monkeypatch.setattr("hpcmm.launch.snapshot.files_of", exchanged)
    config, run, code = planned(project)
    take_snapshot(config, run, code)
    assert "hpcmm: not copied, for they cannot be read: 'new.py'.\n" in capsys.readouterr().err
    assert (run.code / "project" / "train.py").is_file()


def test_too_many_files_are_refused_with_the_folder_that_holds_them(project, monkeypatch):
    monkeypatch.setattr("hpcmm.launch.snapshot._MOST_FILES", 20)
    (project / "notes").mkdir()
    for number in range(30):
        (project / "notes" / f"{number}.md").write_text("")
    config, run, code = planned(project)
    with pytest.raises(HpcmmError, match=r"has 35 files, above 20; notes has 30 of them: list data in \.gitignore"):
        take_snapshot(config, run, code)


def test_included_files_are_copied(project):
    config, run, code = planned(project, "launch.include=[data.bin]")
    take_snapshot(config, run, code)
    assert not (run.code / "project" / "data.bin").is_symlink()
    assert (run.code / "project" / "data.bin").stat().st_size == 1000


def test_files_cannot_be_included_of_a_task_without_a_project(project):
    with pytest.raises(HpcmmError, match=r"launch\.include names files of a project, but this task runs none of yours"):
        planned(project, "launch.include=[data.bin]", task=())


def test_links_that_lead_in_a_circle_are_copied_as_they_are(project):
    (project / "circle").symlink_to("circle")
    config, run, code = planned(project)
    take_snapshot(config, run, code)
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
    take_snapshot(config, run, code)
    assert {path.name: path.is_symlink() for path in (run.code / "project").iterdir()} == {
        "train.py": False,
        "folder.py": True,
    }


def test_a_file_in_very_deep_folders_is_copied(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("")
    deep = str(tmp_path / "d")
    for _ in range(1100):
        os.mkdir(deep)  # noqa: PTH102 -- shorter
        deep += "/d"
    Path(deep).write_text("")
    config, run, code = planned(tmp_path, "launch.include=[d]")
    try:
        take_snapshot(config, run, code)
        assert (run.code / "project" / Path(deep).relative_to(tmp_path)).is_file()
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d", run.root], check=True)  # which shutil cannot


def test_what_others_could_have_written_is_named_and_so_is_that_git_is_not_asked(
    project, tmp_path, monkeypatch, capsys
):
    config, run, code = planned(project)

    def left_out(*arguments):
        found = files_of(*arguments)
        found.copied.remove(project / "new.py")
        found.foreign, found.not_for_git = {project / "new.py"}, project / ".git" / "config"
        return found

    monkeypatch.setattr("hpcmm.launch.snapshot.files_of", left_out)
    take_snapshot(config, run, code)
    said = capsys.readouterr().err
    assert "users who cannot change the script could have written them: 'new.py'. Take over what the job needs" in said
    assert f"git is not asked about {ascii(str(project))[1:-1]}, for other users can write" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "full"),
            r"cannot be written \(No space left on device\): free some space there, or set",
        ),
        (OSError("odd"), r"cannot be written \(odd\): put that right, or set runs_root\.$"),
        (PermissionError(errno.EACCES, "closed", "x.py"), r"cannot be written \(.*closed: 'x.py'\): put that right"),
    ],
)
def test_what_keeps_a_run_from_being_written_is_named(tmp_path, monkeypatch, error, said):
    def refuse(*arguments):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpcmm.launch.write.take_snapshot", refuse)
    overrides = ["cluster=local", f"runs_root={tmp_path / 'runs'}", f"cluster.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(HpcmmError, match=said):
        write(plan(compose_points(overrides), overrides))


@pytest.mark.parametrize("placeholder", [".gitkeep", ".gitignore", ".keep", "README.md", None])
def test_what_a_script_writes_beside_itself_into_a_folder_to_fill_lies_where_the_project_does(project, placeholder):
    (project / "data" / "raw").mkdir(parents=True)
    if placeholder:
        (project / "data" / "raw" / placeholder).write_text("*\n!.gitignore\n")
    config, run, code = planned(project)
    take_snapshot(config, run, code)
    (project / "data" / "later.txt").write_text("seen")
    copy = Path(code.script).parent
    (copy / "data" / "raw" / "model.pt").write_text("kept")
    assert (project / "data" / "raw" / "model.pt").read_text() == "kept"
    assert (copy / "data" / "later.txt").read_text() == "seen"


@pytest.fixture
def launched(project, monkeypatch):
    """Plan a command behind ``--`` in the project's folder; returns the task as the ranks read it, and the folder."""
    monkeypatch.chdir(project)
    (project / "run.sh").write_text("#!/bin/sh\nexec python new.py\n")
    (project / "run.sh").chmod(0o755)
    (project / "lib" / "__main__.py").write_text("")
    (project / "bin").mkdir()
    (project / "bin" / "torchrun").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def of(*command):
        words = ["cluster=slurm", "dry_run=true", "--", *command]
        made = plan(compose_points(words), words)
        return made.config.task, made.code, made.run.code / "project"

    return of


def test_a_module_runs_from_the_copy_of_its_project(launched, project):
    for module in ("lib.helper", "lib"):
        task, code, copy = launched("-m", module, "train.py")
        assert (task.module, task.args, code.project) == (module, ["train.py"], project)
        assert str(copy) in code.python_path
    for module, said in (("lib.none", "has lib, but not that module"), ("nosuch.one", "Python has nosuch")):
        with pytest.raises(HpcmmError, match=said):
            launched("-m", module)


@pytest.mark.parametrize("imported", ["torch", "deepspeed"])
def test_a_module_in_src_tells_what_it_imports(launched, project, monkeypatch, imported):
    (project / "src" / "package").mkdir(parents=True)
    (project / "src" / "package" / "train.py").write_text(f"import {imported}\n")
    words = ["cluster=slurm", "dry_run=true", "--", "-m", "package.train"]
    made = plan(compose_points(words), words)
    assert made.code.scripts == (project / "src" / "package" / "train.py",)
    assert made.packages is not None
    assert ("deepspeed" in made.packages) is (imported == "deepspeed")


def test_of_a_launcher_and_a_shell_the_script_runs_from_the_copy_and_all_other_words_stay(launched, project):
    for command, place in ((["torchrun", "train.py", "new.py"], 0), (["bash", "-x", "run.sh", "train.py"], 1)):
        task, code, copy = launched(*command)
        assert task.program == command[0]
        assert task.args == [*command[1 : place + 1], str(copy / command[place + 1]), *command[place + 2 :]]
        assert code.project == project


def test_a_shell_script_of_the_project_runs_from_the_copy_and_what_it_reads_live_is_named(launched, project, capsys):
    task, code, copy = launched("./run.sh", "train.py")
    assert (task.program, task.args, code.project) == (str(copy / "run.sh"), ["train.py"], project)
    run = RunDir(project / "runs" / "shell")
    run.create()
    take_snapshot(compose_run(["cluster=slurm"]), run, code)
    assert os.access(run.code / "project" / "run.sh", os.X_OK)
    assert "a relative path leads to what lies there when it runs, and not to the copy: 'new.py', 'train.py'" in (
        capsys.readouterr().err
    )


def test_a_program_of_the_machine_stays_where_it_is(launched, project):
    task, code, _ = launched("/bin/echo", "train.py")
    assert (task.program, task.args, code.scripts) == ("/bin/echo", ["train.py"], ())
