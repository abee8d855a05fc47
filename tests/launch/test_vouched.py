"""What users could have written who cannot change the script: it is not copied, and git runs none of its programs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import another_user
import pytest

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.launch import vouched as module
from hpcmm.launch.job_imports import open_links
from hpcmm.launch.project_files import files_of, marked_root, revision
from hpcmm.launch.snapshot import plan_code, take_snapshot
from hpcmm.launch.vouched import Vouched, not_vouched_for
from hpcmm.runs.run_dir import RunDir

NO_RUNS = Path("/nowhere/runs")

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files"),
]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that other users can enter, unlike those of pytest, with a script in a folder; a home elsewhere."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        monkeypatch.setenv("HOME", f"{made}/home")
        monkeypatch.delenv("SUDO_UID", raising=False)
        folder = Path(made) / "project"
        write(folder, "sub/train.py", "lib/helper.py", "near.py")
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)
        yield folder


def write(folder: Path, *names: str, text: str = "") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / names[-1]


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "safe.directory=*")
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")


def open_to_group(folder: Path, mode: int) -> None:
    os.chown(folder, 0, another_user.UID)
    folder.chmod(mode)


def sorted_out(project: Path, *include: str) -> tuple[set[str], set[str]]:
    """The names of what is copied or linked, and of what is left out as others'."""
    files = files_of(project, [project / "sub/train.py"], include, project, NO_RUNS)
    taken, foreign = files.copied | files.linked, files.foreign
    return {str(each.relative_to(project)) for each in taken}, {str(each.relative_to(project)) for each in foreign}


# Which files count.


@pytest.fixture(params=["with git", "without git"])
def kind(request: pytest.FixtureRequest, project: Path) -> str:
    if request.param == "with git":
        commit(project)
    return request.param


def test_in_a_sticky_folder_of_a_group_the_files_of_its_members_are_left_out(project: Path, kind: str):
    open_to_group(project, 0o3775)
    another_user.give(write(project, "sitecustomize.py"))
    another_user.give(write(project, "theirs/__init__.py").parent)
    write(project, "own.py")
    taken, foreign = sorted_out(project)
    assert foreign == {"sitecustomize.py", "theirs"}
    assert taken == {"sub/train.py", "lib/helper.py", "near.py", "own.py"}


def test_in_a_group_s_folder_without_the_sticky_bit_nothing_can_be_vouched_for(project: Path, kind: str):
    open_to_group(project / "lib", 0o2775)
    taken, foreign = sorted_out(project)
    assert taken == {"sub/train.py", "near.py"}
    assert foreign & {"lib", "lib/helper.py"}


def test_above_the_script_s_folder_what_is_one_s_own_counts(project: Path, kind: str):
    open_to_group(project, 0o2775)
    another_user.give(write(project, "sitecustomize.py"))
    taken, foreign = sorted_out(project)
    assert taken == {"sub/train.py", "lib/helper.py", "near.py"}
    assert foreign == {"sitecustomize.py"}


def test_of_a_folder_with_an_included_file_the_others_are_named(project: Path, kind: str):
    (project / "drop").mkdir()
    (project / "drop").chmod(0o777)
    write(project, "drop/a.py", "drop/b.py")
    taken, foreign = sorted_out(project, "drop/a.py")
    assert "drop/a.py" in taken
    assert foreign == {"drop/b.py"}


def test_however_much_members_leave_there_one_s_own_files_are_found(project: Path, kind: str, monkeypatch):
    monkeypatch.setattr("hpcmm.launch.project_files._MOST_ENTRIES", 4)
    monkeypatch.setattr(module, "_MOST_FOLDERS", 4)
    open_to_group(project, 0o3775)
    for number in range(20):
        another_user.give(write(project, f"theirs{number}.py"))
        (project / f"folder{number}").mkdir()
        another_user.give(project / f"folder{number}")
    assert {"sub/train.py", "lib/helper.py", "near.py"} <= sorted_out(project)[0]
    if kind == "with git":
        git_open = module.Repository(project, Vouched(project, [project / "sub/train.py"])).open_folders
        assert {each.name for each in git_open} == {f"folder{number}" for number in range(20)}


def test_folders_that_others_can_write_are_found_at_any_depth_but_not_in_an_environment(project: Path):
    for name in ("a/b/open", "a/group", ".venv/lib/open"):
        (project / name).mkdir(parents=True)
    (project / ".venv" / "pyvenv.cfg").touch()
    (project / "a/b/open").chmod(0o777)
    (project / ".venv/lib/open").chmod(0o777)
    open_to_group(project / "a/group", 0o2775)
    commit(project)
    found = module.Repository(project, Vouched(project, [project / "sub/train.py"])).open_folders
    assert found == {project / "a/b/open", project / "a/group"}


@pytest.mark.parametrize("theirs", ["setup.cfg", "setup.py"])
def test_a_marker_that_a_member_adds_takes_no_project_away(project: Path, theirs: str):
    write(project, "pyproject.toml")
    open_to_group(project, 0o3775)
    another_user.give(write(project, theirs))
    assert marked_root(project / "sub") == project


@pytest.mark.parametrize("member_s", [True, False])
def test_who_can_write_the_script_s_folder_is_trusted_with_all_of_the_project(project: Path, kind: str, member_s: bool):
    for folder in (project, project / "sub", project / "lib", *project.glob(".git")):
        open_to_group(folder, 0o2775)
    if member_s:
        another_user.give(write(project, "lib/more.py"))
        another_user.give(write(project, "theirs/__init__.py").parent)
    taken, foreign = sorted_out(project)
    more = {"lib/more.py", "theirs/__init__.py"} if member_s else set()
    assert taken == {"sub/train.py", "near.py", "lib/helper.py", *more}
    assert not foreign


def test_who_can_write_the_script_s_folder_but_not_the_script_is_not(project: Path, kind: str):
    open_to_group(project / "sub", 0o3775)
    another_user.give(write(project, "sub/sitecustomize.py"))
    taken, foreign = sorted_out(project)
    assert "sub/sitecustomize.py" not in taken
    assert foreign & {"sub", "sub/sitecustomize.py"}


@pytest.mark.parametrize(("mode", "owner"), [(0o666, 0), (0o664, 0), (0o644, another_user.UID)])
def test_a_file_that_others_can_write_is_left_out(project: Path, kind: str, mode: int, owner: int):
    os.chown(project / "lib/helper.py", owner, another_user.UID)
    (project / "lib/helper.py").chmod(mode)
    assert sorted_out(project) == ({"sub/train.py", "near.py"}, {"lib/helper.py"})


def test_the_owner_of_the_script_is_trusted_and_so_are_all_if_nobody_else_comes_there(project: Path):
    another_user.give(project)
    assert sorted_out(project)[0] == {"sub/train.py", "near.py", "lib/helper.py"}
    os.chown(project / "sub", 0, 0)
    os.chown(project / "sub/train.py", 0, 0)
    assert sorted_out(project)[0] == {"sub/train.py"}
    project.parent.chmod(0o700)
    assert sorted_out(project)[0] == {"sub/train.py", "near.py", "lib/helper.py"}


def test_in_a_container_s_namespace_a_file_of_nobody_that_is_known_may_be_anybody_s(
    project: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hpcmm.files._has_no_name_here", lambda uid: uid == another_user.UID)
    open_to_group(project, 0o3775)
    another_user.give(write(project, "sitecustomize.py"))
    assert sorted_out(project) == ({"sub/train.py", "lib/helper.py", "near.py"}, {"sitecustomize.py"})


def test_a_link_counts_as_its_owner_s(project: Path, kind: str):
    (project / "mine.py").symlink_to("near.py")
    (project / "theirs.py").symlink_to("near.py")
    another_user.give(project / "theirs.py")
    taken, foreign = sorted_out(project)
    assert "mine.py" in taken
    assert foreign == {"theirs.py"}


def test_what_lies_beside_another_s_file_is_linked_by_itself(project: Path):
    (project / "data").mkdir()
    (project / "data").chmod(0o1777)
    write(project, "data/own.bin")
    another_user.give(write(project, "data/evil.py"))
    assert sorted_out(project)[1] == {"data/evil.py"}
    assert "data/own.bin" in sorted_out(project)[0]


def test_of_an_included_folder_the_same_files_count_and_a_file_that_is_named_itself_is_copied(project: Path, kind: str):
    (project / "drop").mkdir()
    (project / "drop").chmod(0o1777)
    another_user.give(write(project, "drop/evil.py"))
    another_user.give(write(project, "drop/deep/evil.py").parent)
    taken, foreign = sorted_out(project, "drop", "drop/*.py")
    assert not any(name.startswith("drop") for name in taken)
    assert {"drop/evil.py", "drop/deep"} <= foreign
    assert "drop/evil.py" in sorted_out(project, "drop/evil.py")[0]


def test_a_file_of_others_that_is_named_like_a_pattern_does_not_take_its_place(project: Path, kind: str):
    (project / "drop").mkdir()
    (project / "drop").chmod(0o1777)
    write(project, "drop/a.weights", "drop/[b].weights")
    another_user.give(write(project, "drop/*.weights"))
    files = files_of(project, [project / "sub/train.py"], ["drop/*.weights", "drop/[[]b].weights"], project, NO_RUNS)
    assert {project / "drop/a.weights", project / "drop/[b].weights"} <= files.copied
    assert project / "drop/*.weights" not in files.copied | files.linked
    assert project / "drop/[b].weights" in files_of(project, [], ["drop/[b].weights"], project, NO_RUNS).copied


def test_nothing_is_looked_for_in_folders_that_another_user_put_into_each_other(project: Path, kind: str):
    (project / "drop").mkdir()
    deep = str(project / "drop")
    for _ in range(1200):
        deep += "/d"
        os.mkdir(deep)  # noqa: PTH102 -- shorter
    os.chown(project / "drop/d", another_user.UID, another_user.UID)
    (project / "drop").chmod(0o1777)
    try:
        assert sorted_out(project, "drop")[0] == {"sub/train.py", "near.py", "lib/helper.py"}
        with pytest.raises(HpcmmError, match=r"drop/\*\*/\*\.py, but .* too deep to be searched: name a folder\.$"):
            sorted_out(project, "drop/**/*.py")
    finally:
        subprocess.run(["rm", "-r", project / "drop"], check=True)  # which shutil cannot


@pytest.mark.parametrize("folder", ["", "lib"])
def test_what_comes_and_goes_while_it_is_looked_at_is_not_copied(project: Path, kind: str, folder: str, monkeypatch):
    open_to_group(project / folder, 0o3775)
    another_user.give(write(project, f"{folder}/sitecustomize.py"))
    lstat = Path.lstat

    def flicker(path: Path) -> os.stat_result:
        if path.name != "sitecustomize.py":
            return lstat(path)
        path.rename(path.with_name("hidden"))
        try:
            return lstat(path)
        finally:
            path.with_name("hidden").rename(path)

    monkeypatch.setattr(Path, "lstat", flicker)
    assert sorted_out(project)[0] == {"sub/train.py", "lib/helper.py", "near.py"}


def test_a_folder_in_which_others_can_put_a_package_s_file_later_is_no_link_in_the_copy(project: Path, kind: str):
    write(project, "datasets/a.npz", "datasets/deep/b.npz", "closed/c.npz")
    (project / "datasets").chmod(0o1777)
    taken, foreign = sorted_out(project)
    if kind == "with git":  # which does not look into such a folder, and tracked none of this
        assert "datasets" in foreign
        assert not [name for name in taken if name.startswith("datasets")]
    else:
        assert {"datasets/a.npz", "datasets/deep"} <= taken
        assert "datasets" not in taken
        assert "closed" in taken


def test_nor_is_one_with_such_a_folder_deeper_in_it(project: Path, kind: str):
    write(project, "closed/a/open/w.npz", "closed/a/open/model.bin", "closed/a/b/c.npz", "closed/d/e.npz")
    for folder in (project / "closed", *(each for each in (project / "closed").rglob("*") if each.is_dir())):
        folder.chmod(0o755)
    (project / "closed/a/open").chmod(0o1777)
    if kind == "with git":
        write(project, ".gitignore", text="closed/\n")
    taken, _ = sorted_out(project)
    assert not taken & {"closed", "closed/a", "closed/a/open"}
    assert "closed/d" in taken
    assert "closed/a/b" in taken


@pytest.mark.parametrize("name", ["outputs", "lib/outputs"])
def test_nor_is_one_that_is_empty_yet(project: Path, kind: str, name: str):
    (project / name).mkdir()
    (project / name).chmod(0o1777)
    assert name not in sorted_out(project)[0]


def test_of_a_folder_with_more_files_than_are_linked_the_rest_is_named(project: Path, monkeypatch):
    monkeypatch.setattr("hpcmm.launch.project_files._MOST_LINKS", 3)
    write(project, *(f"datasets/{number}.npz" for number in range(5)))
    (project / "datasets").chmod(0o1777)
    taken, foreign = sorted_out(project)
    assert "datasets" in foreign
    assert "datasets" not in taken


IMPORTS = """\
import named_by_the_script.a, torch.utils.data
from of_a_package.b import c
from lib import beside
from .relative import d
"""


@pytest.mark.parametrize(
    ("name", "mode", "is_left_out"),
    [
        ("sub/pytest", 0o1777, True),  # which is installed
        ("json", 0o1777, True),
        ("sub/named_by_the_script", 0o1777, True),
        ("of_a_package", 0o1777, True),
        ("lib/beside", 0o1777, True),
        ("sub/relative", 0o1777, True),
        ("near", 0o1777, True),  # beside near.py
        ("lib/imported_there", 0o1777, True),
        ("data", 0o1777, False),
        ("lib/json", 0o1777, False),
        ("sub/pytest", 0o755, False),
        ("a-b", 0o1777, False),
    ],
)
def test_a_link_to_a_folder_of_others_is_left_out_if_the_job_may_import_something_else_by_its_name(
    project: Path, name: str, mode: int, *, is_left_out: bool
):
    script = write(project, "sub/train.py", text=IMPORTS)
    helper = write(project, "lib/helper.py", text="import imported_there\n")
    shared = project.parent / "shared"
    shared.mkdir()
    shared.chmod(mode)
    link = project / name
    link.symlink_to(shared)
    copied = {link, script, helper, project / "near.py"}
    assert open_links(copied, project, [script])[1] == ({link} if is_left_out else set())


def test_the_owner_of_the_folder_to_which_one_s_link_leads_is_trusted_with_it(project: Path):
    theirs = project.parent / "theirs"
    theirs.mkdir(mode=0o755)
    another_user.give(theirs)
    link = project / "near"
    link.symlink_to(theirs)
    copied = {link, project / "near.py", project / "sub/train.py"}
    assert open_links(copied, project, [project / "sub/train.py"]) == (set(), set())


@pytest.mark.parametrize("kind", ["deeper", "another user's link", "not there yet", "exchangeable"])
def test_so_is_one_that_others_can_lead_elsewhere_or_fill_deeper(project: Path, kind: str):
    shared = project.parent / "shared"
    (shared / "a/b").mkdir(parents=True)
    for folder in (shared, shared / "a", shared / "a/b"):
        folder.chmod(0o755)
    link, end = project / "json", shared / "a"
    if kind == "deeper":
        (shared / "a/b").chmod(0o1777)
    elif kind == "another user's link":
        shared.chmod(0o1777)
        end = shared / "latest"
        end.symlink_to("a")
        another_user.give(end)
    elif kind == "not there yet":
        end = shared / "nothing"
        shared.chmod(0o1777)
    else:
        shared.chmod(0o777)
    link.symlink_to(end)
    script = project / "sub/train.py"
    assert open_links({link, script}, project, [script]) == ({link}, {link})


def test_of_any_other_such_link_the_data_that_is_there_is_linked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    shared = project.parent / "shared"
    write(shared, "a.npz", "sub/b.npz", "__init__.py", "code.py")
    shared.chmod(0o1777)
    for name in ("json", "data"):
        (project / name).symlink_to(shared)
    commit(project)
    monkeypatch.chdir(project)
    config = compose_run(["task=script", "task.path=sub/train.py", f"runs_root={project.parent / 'runs'}"])
    run = RunDir(project.parent / "runs" / "run")
    take_snapshot(config, run, plan_code(config, run, project))
    copy = run.code / "project"
    assert sorted(path.name for path in copy.iterdir()) == ["data", "lib", "near.py", "sub"]
    assert not (copy / "data").is_symlink()
    assert sorted(path.name for path in (copy / "data").iterdir()) == ["a.npz", "sub"]
    assert (copy / "data" / "sub" / "b.npz").exists()
    assert "could have written them: 'json/'." in capsys.readouterr().err


# What git reads.


@pytest.fixture
def ran(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a program leaves behind that git ran; the project is a repository, and a tracked file seems changed."""
    commit(project)
    ran = project.parent / "ran"
    program = write(project.parent, "program", text=f"#!/bin/sh\ntouch {ran}\ncat\n")
    program.chmod(0o755)
    return ran


def stat_dirty(*files: Path) -> None:
    for file in files:
        os.utime(file, (1, 1))


def test_no_program_runs_that_the_settings_of_a_repository_name(project: Path, ran: Path):
    program = str(project.parent / "program")
    for kind in ("clean", "smudge", "process"):
        git(project, "config", f"filter.x y.{kind}", program)
    git(project, "config", "filter.x y.required", "true")
    for name in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.gitProxy",
        "core.pager",
        "diff.external",
        "diff.x.textconv",
    ):
        git(project, "config", name, program)
    git(project, "config", "core.hooksPath", str(project.parent / "hooks"))
    for hook in ("post-index-change", "fsmonitor-watchman"):
        write(project.parent, f"hooks/{hook}").write_text(f"#!/bin/sh\ntouch {ran}\n")
        (project.parent / "hooks" / hook).chmod(0o755)
    write(project, ".gitattributes", text='*.py filter="x y" diff=x\n*.txt filter=x\n')
    git(project, "config", "filter.x.clean", program)
    stat_dirty(project / "near.py", project / "lib/helper.py")
    (project / "lib/helper.py").write_text("changed = 1\n")
    assert b"+changed" in revision(project).changes
    assert sorted_out(project)[0] >= {"sub/train.py", "near.py", "lib/helper.py"}
    assert not ran.exists()


def test_nor_one_that_those_of_a_submodule_name(project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch):
    write(project.parent / "inner", "inner.py")
    commit(project.parent / "inner")
    git(project, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(project.parent / "inner"), "in")
    git(project, "commit", "-qm", "inner")
    git(project / "in", "config", "filter.x.clean", str(project.parent / "program"))
    write(project, "in/.gitattributes", text="*.py filter=x\n")
    stat_dirty(project / "in/inner.py")
    assert b"-dirty" not in revision(project).changes
    (project / "in/inner.py").write_text("changed = 1\n")
    assert b"-dirty" in revision(project).changes
    assert "in/inner.py" in sorted_out(project)[0]
    assert not ran.exists()


def test_the_user_s_own_filter_stays_so_that_no_file_of_git_lfs_counts_as_changed(project: Path, ran: Path):
    write(project, ".gitattributes", text="*.bin filter=own\n")
    home = project.parent / "home"
    write(home, ".gitconfig", text='[filter "own"]\nclean = echo pointer\nrequired = true\n')
    write(project, "weights.bin", text="many\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "weights")
    stat_dirty(project / "weights.bin")
    assert revision(project).changes == b""


@pytest.mark.parametrize("what", [".git", ".git/config", ".git/HEAD", ".git/info"])
def test_git_is_not_asked_if_others_can_write_its_settings(project: Path, ran: Path, what: str):
    open_to_group(project / what, 0o775 if (project / what).is_dir() else 0o664)
    write(project, ".gitignore", text="near.py\n")
    assert not_vouched_for(project, Vouched(project, [project / "sub/train.py"])) in {project / what, project / ".git"}
    assert sorted_out(project)[0] == {"sub/train.py", "near.py", "lib/helper.py"}
    with pytest.raises(HpcmmError, match=r"git is not asked, for others can write .*\.git"):
        revision(project)


def test_git_is_asked_if_those_can_change_the_script_as_well(project: Path, ran: Path):
    for each in (project, project / "sub", project / ".git", project / ".git/config"):
        open_to_group(each, 0o2775 if each.is_dir() else 0o664)
    assert not_vouched_for(project, Vouched(project, [project / "sub/train.py"])) is None
    assert revision(project, [project / "sub/train.py"]).commit


def test_of_a_second_work_tree_the_repository_elsewhere_is_asked_for_too(project: Path, ran: Path):
    tree = project.parent / "tree"
    git(project, "worktree", "add", "-q", str(tree))
    assert revision(tree).commit
    open_to_group(project / ".git/config", 0o664)
    with pytest.raises(HpcmmError, match=r"others can write .*project/\.git/config"):
        revision(tree)


@pytest.mark.parametrize("of", [another_user.UID, 0])
def test_a_repository_of_others_within_is_passed_over(project: Path, ran: Path, of: int, monkeypatch):
    write(project.parent / "home", ".gitconfig", text="[safe]\ndirectory = *\n")
    evil = project / "drop/evil"
    write(evil, "evil.py", ".gitattributes", text="*.py filter=x\n")
    (project / "drop").chmod(0o1777)
    commit(evil)
    git(evil, "config", "filter.x.clean", str(project.parent / "program"))
    stat_dirty(evil / "evil.py")
    if of:
        another_user.give(evil)
    taken, foreign = sorted_out(project)
    assert taken == {"sub/train.py", "near.py", "lib/helper.py"}
    assert foreign == {"drop"}
    assert not ran.exists()


def test_a_repository_within_whose_settings_others_can_write_is_passed_over(project: Path, ran: Path):
    write(project, "clone/a.py")
    commit(project / "clone")
    open_to_group(project / "clone/.git/config", 0o664)
    assert sorted_out(project)[1] == {"clone"}


@pytest.mark.parametrize("name", [".gitignore", ".gitattributes"])
def test_a_pipe_in_a_folder_that_others_can_write_makes_git_wait_for_nothing(
    project: Path, ran: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_TIMEOUT_S", 20)
    write(project, "a/drop/own.py", "a/b.py")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "more")
    (project / "a/drop").chmod(0o1777)
    os.mkfifo(project / "a/drop" / name)
    stat_dirty(project / "a/drop/own.py", project / "a/b.py")
    write(project, "a/new.py", "c/new.py", ".gitignore", text="")
    write(project, ".gitignore", text="*.log\n")
    write(project, "x.log")
    taken, foreign = sorted_out(project)
    assert taken == {
        "sub/train.py", "near.py", "lib/helper.py", "a/b.py", "a/new.py", "c/new.py", ".gitignore", "a/drop/own.py",
        "x.log",
    }  # fmt: skip
    assert foreign == {"a/drop"}
    assert revision(project).commit


def test_a_pipe_beside_the_repository_is_not_given_to_git(project: Path, ran: Path):
    open_to_group(project, 0o3775)
    os.mkfifo(project / ".gitignore")
    another_user.give(project / ".gitignore")
    assert sorted_out(project)[0] == {"sub/train.py", "near.py", "lib/helper.py"}


# Folders that the job's Python searches.


def searched(project: Path, *overrides: str) -> tuple[str, ...]:
    config = compose_run([f"runs_root={project.parent / 'runs'}", *overrides])
    return plan_code(config, RunDir(project.parent / "runs" / "new"), project).python_path


@pytest.fixture
def function(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return ["task=function", "task.target=near:main"]


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o3775])
def test_without_a_snapshot_a_folder_is_refused_where_others_could_put_a_module_beside_the_function_s(
    project: Path, function: list[str], mode: int
):
    open_to_group(project, mode)
    refused = rf"^The job would import from {project}, which other users can write, .*leave out launch\.snapshot=false"
    with pytest.raises(HpcmmError, match=refused):
        searched(project, "launch.snapshot=false", *function)
    with pytest.raises(HpcmmError, match=refused):
        searched(project, "launch.snapshot=false", "task=script", "task.path=near.py")
    assert searched(project, *function)


@pytest.mark.parametrize("mode", [0o755, 0o2775])
def test_it_is_not_if_they_can_change_the_function_itself_or_can_write_nothing(
    project: Path, function: list[str], mode: int
):
    open_to_group(project, mode)
    assert str(project) in searched(project, "launch.snapshot=false", *function)


@pytest.mark.parametrize("entries", ["{folder}", ":/usr", "/usr:{folder}/lib"])
@pytest.mark.parametrize("snapshot", ["true", "false"])
def test_a_folder_of_pythonpath_that_everybody_can_write_is_refused(
    project: Path, function: list[str], entries: str, snapshot: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", entries.format(folder=project))
    words = ["task=script", "task.path=sub/train.py", f"launch.snapshot={snapshot}"]
    assert searched(project, *words)
    for folder in (project, project / "lib"):
        folder.chmod(0o1777)
    with pytest.raises(HpcmmError, match=r"^The job would import from .* take it out of PYTHONPATH, in which an empty"):
        searched(project, *words)
