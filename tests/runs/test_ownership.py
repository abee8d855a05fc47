"""Folders of other users are told from one's own, and so is a place where others could exchange one's own."""

import itertools
import os
import resource
import struct
import tempfile
from functools import partial
from pathlib import Path

import another_user
import pytest

from hpcmm.errors import HpcmmError
from hpcmm.node.cache import private_folder
from hpcmm.runs.ownership import (
    Reach,
    check_runs_root,
    exchangeable,
    is_closed,
    is_mine,
    is_trusted,
    other_user,
    reach_beyond,
    real_and_trusted,
    require_mine,
    settle,
)


@pytest.fixture
def open_place():
    """A folder that others can enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_one_s_own_folder_is_told_from_another_user_s(tmp_path):
    (tmp_path / "mine").mkdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    another_user.give(theirs)
    assert is_mine(tmp_path / "mine")
    assert not is_mine(theirs)
    assert other_user(theirs) == str(another_user.UID)
    assert other_user(tmp_path / "mine") is None
    assert not is_mine(tmp_path / "none")
    require_mine(tmp_path / "mine", "do it yourself")
    with pytest.raises(HpcmmError, match=r"theirs is another user's \(54321\): do it yourself\."):
        require_mine(theirs, "do it yourself")


def test_another_user_s_link_to_one_s_own_folder_is_theirs(tmp_path):
    (tmp_path / "mine").mkdir()
    link = tmp_path / "link"
    link.symlink_to("mine")
    assert is_mine(link)
    another_user.give(link)
    assert not is_mine(link)
    assert not is_trusted(link)
    (tmp_path / "mine" / "0000").mkdir()
    assert not is_mine(link / "0000")


def exchange(one, other):
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def ask(question, count, moments, before, *args, **kwargs):
    if next(count) in moments:
        before()
    return question(*args, **kwargs)


@pytest.mark.parametrize("below", [".", "0000", "../x/0000"])
@pytest.mark.parametrize("first", ["folder", "link"])
def test_what_is_exchanged_while_it_is_asked_about_is_never_one_s_own(open_place, monkeypatch, below, first):
    shared, mine = open_place / "shared", open_place / "mine"
    (mine / "0000").mkdir(parents=True)
    (shared / "x" / "0000").mkdir(parents=True)
    (shared / "y").symlink_to(mine)
    shared.chmod(0o1777)
    another_user.give(shared / "x")
    another_user.give(shared / "y")
    if first == "link":
        exchange(shared / "x", shared / "y")
    asked, most = shared / "x" / below, 40  # questions to the system, before any two of which it is exchanged
    for moments in itertools.combinations(range(most), 2):
        count = itertools.count()
        with monkeypatch.context() as during:
            for name in ("open", "lstat", "stat", "fstat", "readlink"):
                asking = partial(ask, getattr(os, name), count, moments, lambda: exchange(shared / "x", shared / "y"))
                during.setattr(os, name, asking)
            found = is_mine(asked)
        assert not found, moments


def test_what_is_done_with_a_folder_is_done_with_its_real_path(open_place):
    (open_place / "mine").mkdir()
    (open_place / "latest").symlink_to("mine")
    assert require_mine(open_place / "latest", "x") == open_place / "mine"
    assert real_and_trusted(open_place / "latest") == (open_place / "mine", "")


def test_one_s_own_folder_where_everybody_could_exchange_it_is_not_acted_upon(open_place):
    (open_place / "shared" / "mine").mkdir(parents=True)
    (open_place / "shared").chmod(0o777)
    assert is_mine(open_place / "shared" / "mine")
    with pytest.raises(HpcmmError, match=r"shared can be written by everybody.*not acted upon: chmod \+t .*shared"):
        require_mine(open_place / "shared" / "mine", "x")
    assert "can be written by everybody" in real_and_trusted(open_place / "shared" / "mine")[1]
    (open_place / "shared").chmod(0o1777)
    require_mine(open_place / "shared" / "mine", "x")


def test_two_dots_behind_a_link_lead_to_where_the_system_goes(open_place):
    (open_place / "theirs" / "inner").mkdir(parents=True)
    (open_place / "theirs" / "run").mkdir()
    (open_place / "run").mkdir()
    another_user.give(open_place / "theirs" / "run")
    (open_place / "link").symlink_to("theirs/inner")
    assert not is_mine(open_place / "link" / ".." / "run")
    assert is_mine(open_place / "link" / ".." / ".." / "run")


def test_a_folder_that_is_not_there_is_not_acted_upon(open_place):
    for question in (require_mine, real_and_trusted):
        with pytest.raises(HpcmmError, match="none is not there, or closed to you"):
            question(open_place / "none", "x")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_folder_that_cannot_be_looked_into_is_told(open_place, monkeypatch, error):
    def fail(*_):
        raise error

    (open_place / "mine" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("hpcmm.runs.ownership.other_writer", fail)
    with pytest.raises(HpcmmError, match=rf"mine cannot be looked into \({error.strerror}\)\.$"):
        real_and_trusted(open_place / "mine", "checkpoints")


def test_what_others_can_write_is_not_acted_upon(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o770)
    with pytest.raises(HpcmmError, match=r"mine can be written by other users.*chmod go-w"):
        require_mine(tmp_path / "mine", "x")


@pytest.mark.parametrize(
    ("mode", "reach"),
    [(0o755, None), (0o1777, None), (0o777, Reach.everybody), (0o2775, Reach.group), (0o3775, None)],
)
def test_the_folder_above_decides_who_can_exchange_one(open_place, mode, reach):
    above = open_place / "above"
    (above / "runs").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(above, 0, another_user.UID)
    elif reach is Reach.group:
        pytest.skip("a group of one's own has no other members")
    above.chmod(mode)
    found = exchangeable(above / "runs" / "demo-1")
    assert (found and found.reach) == reach


def give_by_access_list(folder, uid):
    """What ``setfacl -m u:UID:rwx`` does, in the kernel's form: version, then tag, rights and id of each entry."""
    owner, user, group, mask, other, nobody = 1, 2, 4, 16, 32, 2**32 - 1
    entries = [(owner, 7, nobody), (user, 7, uid), (group, 5, nobody), (mask, 7, nobody), (other, 5, nobody)]
    written = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, "system.posix_acl_access", written)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")


def test_whom_an_access_control_list_lets_write_could_exchange_a_folder(open_place):
    above = open_place / "above"
    (above / "runs").mkdir(parents=True)
    give_by_access_list(above, another_user.UID)
    found = exchangeable(above / "runs" / "demo-1")
    assert found is not None
    assert found.reach is Reach.group
    assert found.why == f"{above} can be written by its group, or by those that its access control list names"
    assert reach_beyond(above, above / "runs") is Reach.group


def test_within_a_closed_folder_nothing_can_be_exchanged(open_place):
    closed = open_place / "closed"
    (closed / "open" / "runs").mkdir(parents=True)
    (closed / "open").chmod(0o777)
    assert exchangeable(closed / "open" / "runs") is not None
    assert not is_closed(closed / "open")
    closed.chmod(0o700)
    assert exchangeable(closed / "open" / "runs") is None
    assert is_closed(closed / "open")


def test_the_folder_of_a_link_counts_too(open_place):
    (open_place / "shared").mkdir()
    (open_place / "mine").mkdir()
    (open_place / "shared" / "runs").symlink_to(open_place / "mine")
    (open_place / "shared").chmod(0o777)
    found = exchangeable(open_place / "shared" / "runs" / "demo-1")
    assert found is not None
    assert found.above == open_place / "shared"


@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.parametrize("place", ["the folder itself", "a folder above", "behind a link of one's own"])
def test_whose_link_leads_to_a_folder_could_exchange_it(open_place, place, namespace, monkeypatch):
    if namespace:  # nobody that is known there may be anybody
        monkeypatch.setattr("hpcmm.files._has_no_name_here", lambda uid: uid == another_user.UID)
    shared, mine = open_place / "shared", open_place / "mine"
    shared.mkdir()
    shared.chmod(0o1777)
    (mine / "runs" / "demo-1").mkdir(parents=True)
    link = shared / "link"
    link.symlink_to(mine if place == "a folder above" else mine / "runs")
    (open_place / "own").symlink_to("shared/link")
    runs = {"a folder above": link / "runs", "the folder itself": link}.get(place, open_place / "own")
    check_runs_root(runs / "demo-2")
    require_mine(runs / "demo-1", "x")
    another_user.give(link)
    found = exchangeable(runs / "demo-2")
    assert found is not None
    assert (found.reach, found.above, found.uid) == (Reach.link, link, another_user.UID)
    with pytest.raises(HpcmmError, match=r"shared/link is a link of user 54321.*folder of your own\.$"):
        check_runs_root(runs / "demo-2")
    assert not is_mine(runs / "demo-1")
    assert other_user(runs / "demo-1") == str(another_user.UID)
    with pytest.raises(HpcmmError, match="is another user's"):
        require_mine(runs / "demo-1", "x")


def test_a_link_that_its_owner_could_not_make_anew_is_no_danger(open_place):
    (open_place / "data").mkdir()
    (open_place / "link").symlink_to("data")
    another_user.give(open_place / "link")
    assert exchangeable(open_place / "link" / "demo-1") is None


def test_a_long_way_of_another_user_s_link_is_walked_with_few_open_files(open_place):
    shared, theirs = open_place / "shared", open_place / "shared" / "theirs"
    (theirs / "d").mkdir(parents=True)
    (theirs / "run").mkdir()
    shared.chmod(0o1777)
    (theirs / "link").symlink_to("d/../" * 700 + "run")
    (shared / "latest").symlink_to("theirs/link")
    for each in (theirs, shared / "latest"):
        another_user.give(each)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        place = settle(shared / "latest")
        assert other_user(shared / "latest") == str(another_user.UID)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert place is not None
    assert place.real == theirs / "run"


@pytest.mark.parametrize("end", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_its_owner_s(open_place, end):
    link = open_place / "link"
    link.symlink_to("link" if end == "itself" else end)
    assert other_user(link) is None
    another_user.give(link)
    assert other_user(link) == str(another_user.UID)
    assert other_user(open_place / "nothing") is None


def test_links_that_lead_in_a_circle_come_to_an_end(open_place):
    (open_place / "a").symlink_to("b/x")
    (open_place / "b").symlink_to("a")
    assert exchangeable(open_place / "a" / "demo-1") is None
    assert not is_mine(open_place / "a")


def test_runs_are_not_made_where_everybody_could_exchange_them(open_place, capsys):
    shared = open_place / "shared"
    shared.mkdir()
    check_runs_root(shared / "demo-1")
    shared.chmod(0o1777)
    check_runs_root(shared / "demo-1")
    shared.chmod(0o777)
    with pytest.raises(HpcmmError, match=r"shared can be written by everybody.*own, or chmod \+t .*shared\.$"):
        check_runs_root(shared / "demo-1")
    assert capsys.readouterr().err == ""


def test_runs_are_not_made_in_another_user_s_folder(open_place):
    shared = open_place / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    another_user.give(shared)
    with pytest.raises(HpcmmError, match="it belongs to user 54321"):
        check_runs_root(shared / "demo-1")


def test_who_became_root_by_sudo_may_use_a_folder_of_theirs(open_place, monkeypatch):
    shared = open_place / "shared"
    shared.mkdir()
    another_user.give(shared)
    monkeypatch.setenv("SUDO_UID", str(another_user.UID))
    check_runs_root(shared / "demo-1")


def test_a_group_that_could_exchange_a_run_is_said_with_what_prevents_it(open_place, capsys):
    project = open_place / "project"
    project.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a group of one's own has no other members")
    os.chown(project, 0, another_user.UID)
    project.chmod(0o2775)
    check_runs_root(project / "runs" / "demo-1")
    said = capsys.readouterr().err
    assert said.startswith(f"hpcmm: {project} can be written by its group")
    assert said.endswith(f"chmod +t {project} prevents it.\n")
    project.chmod(0o3775)
    check_runs_root(project / "runs" / "demo-1")
    assert capsys.readouterr().err == ""


def test_a_temporary_folder_that_others_could_exchange_is_not_made(open_place, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(open_place))
    open_place.chmod(0o777)
    why = "can be written by everybody without the sticky bit"
    said = rf"^TMPDIR is {open_place}, but {open_place} {why}, so .*: set it to a folder of your own\.$"
    with pytest.raises(HpcmmError, match=said), private_folder("hpcmm-"):
        pass
    assert not list(open_place.iterdir())
    open_place.chmod(0o1777)
    with private_folder("hpcmm-") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
