"""``launch.stage``: what is copied to a node's own disk is whole, private, found by the ranks, and gone at the end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from another_user import give

from hpcmm.config import config_file
from hpcmm.config.compose import compose_run
from hpcmm.config.schema import LaunchConfig, RunConfig, StageCheck
from hpcmm.config.sweep import compose_points
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import plan
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker import stage as module
from hpcmm.worker.environment import scratch_dir, use_copies, with_local_paths
from hpcmm.worker.stage import _amount, collect, copy_all, own_folder


@pytest.fixture
def data(tmp_path):
    """A data set with folders and links."""
    root = tmp_path / "source" / "set"
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.bin").write_bytes(os.urandom(100_000))
    (root / "empty").touch()
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o755)
    return root


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def copied(data, place, check=StageCheck.sizes):
    copy_all([str(data)], place, check)
    return place / data.name


def link_at(path):
    return str(path.readlink())


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("check", StageCheck)
def test_the_copy_holds_what_the_source_does_and_is_closed_to_others(data, place, check):
    made = copied(data, place, check)
    assert tree(made) == tree(data)
    assert made.stat().st_mode & 0o777 == 0o700
    assert (made / "train" / "a.bin").stat().st_mode & 0o777 == 0o600
    assert (made / "tool").stat().st_mode & 0o777 == 0o700
    assert (made / "empty").stat().st_mtime_ns == (data / "empty").stat().st_mtime_ns


def test_a_single_file_can_be_staged(data, place):
    assert copied(data / "tool", place).read_text() == "#!/bin/sh\n"


def test_a_source_that_is_a_link_is_what_it_leads_to(data, place):
    (data.parent / "latest").symlink_to("set")
    assert tree(copied(data.parent / "latest", place)) == tree(data)


def test_links_within_the_source_stay_links_and_lead_into_the_copy(data, place):
    (data / "train" / "relative").symlink_to("../tool")
    (data / "absolute").symlink_to(data / "train")
    (data / "broken").symlink_to("nowhere")
    made = copied(data, place)
    assert link_at(made / "train" / "relative") == "../tool"
    assert link_at(made / "absolute") == "train"
    assert link_at(made / "broken") == "nowhere"


def test_of_links_that_lead_out_the_content_is_copied(data, place, tmp_path):
    (tmp_path / "blobs" / "deep").mkdir(parents=True)
    (tmp_path / "blobs" / "deep" / "x").write_text("out there")
    (tmp_path / "blobs" / "back").symlink_to(data / "tool")
    (data / "file").symlink_to(tmp_path / "blobs" / "deep" / "x")
    (data / "folder").symlink_to("../../blobs")
    made = copied(data, place)
    assert not (made / "file").is_symlink()
    assert not (made / "folder").is_symlink()
    assert (made / "file").read_text() == (made / "folder" / "deep" / "x").read_text() == "out there"
    assert link_at(made / "folder" / "back") == "../tool"


def test_links_that_go_round_in_a_circle_are_refused(data, place, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "again").symlink_to(tmp_path / "other" / "deeper")
    (tmp_path / "other" / "deeper").mkdir()
    (tmp_path / "other" / "deeper" / "up").symlink_to(tmp_path / "other")
    (data / "out").symlink_to(tmp_path / "other")
    with pytest.raises(HpcmmError, match="a link within it leads back to it"):
        copied(data, place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_named_and_never_opened(data, place, kind):
    if kind == "pipe":
        os.mkfifo(data / "special")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(data / "special"))
    with pytest.raises(HpcmmError, match=r"set/special: it is a pipe, a device or a socket"):
        copied(data, place)


def test_a_source_that_is_not_there_is_named(place):
    with pytest.raises(HpcmmError, match=r"launch.stage has /no/such/set, which cannot be read \(No such file"):
        copy_all(["/no/such/set"], place, StageCheck.sizes)


@pytest.mark.parametrize(
    ("blocks", "files", "said"),
    [
        (9, 1000, r"has 36.9 kB free, but launch.stage copies 100 kB: set cluster.scratch_dir"),
        (1000, 4, r"has room for 4 files, but launch.stage copies 5 files and folders: set cluster.scratch_dir"),
    ],
)
def test_without_room_for_all_nothing_is_copied(data, place, monkeypatch, blocks, files, said):
    facts = os.statvfs_result([4096, 4096, blocks, blocks, blocks, 1000, files, files, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda _: facts)
    with pytest.raises(HpcmmError, match=said):
        copied(data, place)
    assert list(place.iterdir()) == []


def test_a_disk_that_becomes_full_is_told(data, place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.Copier, "_copy_content", full)
    with pytest.raises(HpcmmError, match=r"is full .* set cluster\.scratch_dir"):
        copied(data, place)


CHANGES = {
    "grows": lambda data: (data / "train" / "a.bin").open("ab").write(b"more"),
    "is rewritten": lambda data: (data / "train" / "a.bin").write_bytes(bytes(100_000)),
    "goes": lambda data: (data / "empty").unlink(),
    "comes": lambda data: (data / "train" / "new").touch(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("check", StageCheck)
def test_a_source_that_changes_meanwhile_is_refused(data, place, monkeypatch, change, check):
    copy = module.Copier.copy

    def change_first(self, entries):
        CHANGES[change](data)
        copy(self, entries)

    monkeypatch.setattr(module.Copier, "copy", change_first)
    with pytest.raises(HpcmmError, match="changed while it was copied"):
        copied(data, place, check)


def test_a_source_that_changes_after_its_copy_is_refused_too(data, place, monkeypatch):
    copy = module.Copier.copy

    def change_last(self, entries):
        copy(self, entries)
        CHANGES["comes"](data)

    monkeypatch.setattr(module.Copier, "copy", change_last)
    with pytest.raises(HpcmmError, match="changed while it was copied"):
        copied(data, place)


def test_a_disk_that_does_not_hold_what_was_written_is_noticed_by_checksums_alone(data, place, monkeypatch):
    write = module.Copier._copy_content

    def damaged(self, source, made):
        digest = write(self, source, made)
        if os.fstat(made.fileno()).st_size > 1000:
            os.pwrite(made.fileno(), b"damage", 500)
        return digest

    monkeypatch.setattr(module.Copier, "_copy_content", damaged)
    (place / "sizes").mkdir()
    assert tree(copied(data, place / "sizes")) != tree(data)
    with pytest.raises(HpcmmError, match="does not hold what was written"):
        copied(data, place, StageCheck.checksum)


# Where it is copied to.


def test_scratch_is_the_first_folder_that_can_be_used(tmp_path):
    mine, absent = tmp_path / "mine", tmp_path / "absent"
    mine.mkdir(mode=0o700)
    assert scratch_dir(None, {"SLURM_TMPDIR": str(absent), "TMPDIR": str(mine)}) == mine
    assert scratch_dir(None, {"SLURM_TMPDIR": str(mine), "TMPDIR": str(absent)}) == mine
    assert scratch_dir("$BASE/${SUB}", {"BASE": str(tmp_path), "SUB": "mine"}) == mine


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("$UNKNOWN/x", "names a variable that the job does not have"),
        ("/no/such/folder", "is not there"),
        ("relative", "is not there"),
        ("{file}", "is not the absolute path of a folder"),
    ],
)
def test_scratch_that_cannot_be_used_is_named(tmp_path, given, said):
    (tmp_path / "file").touch()
    with pytest.raises(HpcmmError, match=said):
        scratch_dir(given.format(file=tmp_path / "file"), {})


def test_scratch_in_which_another_user_could_replace_the_copy_is_refused():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:  # in pytest's own folders nobody else can come in
        folder = Path(made)
        folder.chmod(0o777)
        with pytest.raises(HpcmmError, match=r"is not safe: .* can be written by everybody"):
            scratch_dir(made, {})
        folder.chmod(0o1777)
        assert scratch_dir(made, {}) == folder.resolve()


def test_the_folder_is_new_private_and_gone_at_the_end(tmp_path):
    with own_folder(tmp_path) as first, own_folder(tmp_path) as second:
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o700
        (first / "data" / "x").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_job_left_is_removed_and_what_is_used_or_not_a_folder_of_ours_stays(tmp_path):
    with own_folder(tmp_path) as used:
        left = tmp_path / f"{used.name[:-8]}leftover"
        left.mkdir(mode=0o700)
        (left / "lock").touch()
        moved = tmp_path / f"{used.name[:-8]}moved"  # by another user, who can write it
        moved.mkdir()
        moved.chmod(0o3775)
        (moved / "lock").touch()
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "lock").touch()
        link = tmp_path / f"{used.name[:-8]}link"
        link.symlink_to(precious)
        with own_folder(tmp_path):
            assert not left.exists()
            assert used.exists()
            assert moved.exists()
            assert (precious / "lock").exists()


def test_the_folder_stays_until_the_ranks_that_use_it_let_go(tmp_path, monkeypatch):
    waited = []
    with own_folder(tmp_path) as folder:
        rank = (folder / "lock").open()
        fcntl.flock(rank, fcntl.LOCK_SH)

        def end_of_the_rank(_):
            waited.append(folder.exists())
            rank.close()

        monkeypatch.setattr(module.time, "sleep", end_of_the_rank)
    assert waited == [True]
    assert not folder.exists()


# The process on a node, and what the ranks find.


@pytest.fixture
def run(tmp_path, data):
    made = RunDir(tmp_path / "run")
    made.create()
    config = compose_run(["cluster=slurm", "task=script", "task.path=/x.py"])
    config.launch.stage = [str(data)]
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    config.cluster.scratch_dir = str(scratch)
    config_file.dump(config, made.config)
    return made


def on_a_node(run, node="n1"):
    command = [sys.executable, "-m", "hpcmm.worker", "stage", str(run.root)]
    return subprocess.Popen(
        command, env=os.environ | {"SLURMD_NODENAME": node}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("ended_by", ["its input", "Slurm"])
def test_a_node_keeps_its_copy_until_the_job_ends(run, data, tmp_path, ended_by):
    with on_a_node(run) as node:
        said = json.loads(node.stdout.readline())
        copy = Path(said["places"][str(data)])
        assert (said["node"], said["files"], said["bytes"]) == ("n1", 3, 100_010)
        assert tree(copy) == tree(data)
        if ended_by == "Slurm":
            node.send_signal(signal.SIGTERM)
        node.stdin.close()
        assert node.wait(60) == (143 if ended_by == "Slurm" else 0)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_node_that_cannot_copy_says_its_name_and_leaves_nothing(run, data, tmp_path):
    os.mkfifo(data / "special")
    with on_a_node(run, "n7") as node:
        _, said = node.communicate(timeout=60)
    assert node.returncode == 1
    assert said.startswith(f"hpcmm: n7: launch.stage cannot copy {data}/special")
    assert list((tmp_path / "scratch").iterdir()) == []


def word(node, folder="/s/f", size=3_000_000_000, took_s=2.0):
    places = {"/data/set": f"{folder}/data/set"}
    return json.dumps(
        {"node": node, "folder": folder, "places": places, "bytes": size, "files": 7, "took_s": took_s}
    ) + "\n"  # fmt: skip


def test_the_batch_script_says_how_long_the_slowest_node_took(run, capsys):
    assert collect(run, 2, [word("n1"), "a line of the site's\n", word("n2", took_s=6.0), "never read"])
    assert capsys.readouterr().out == (
        "a line of the site's\nStaged 3.0 GB in 7 files on each of 2 nodes; the slowest, n2, took 6.0 s, 500 MB/s.\n"
    )
    assert set(json.loads(run.staged.read_text())["nodes"]) == {"n1", "n2"}


def test_a_single_node_is_named_and_is_not_the_slowest(run, capsys):
    assert collect(run, 1, [word("kd1", size=9, took_s=0.04)])
    assert capsys.readouterr().out == "Staged 9 bytes in 7 files on kd1, which took 0.0 s, 225 bytes/s.\n"
    assert not collect(run, 1, [])
    assert capsys.readouterr().out == "0 of 1 node has a copy of launch.stage.\n"


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (999.6, "1 kB"), (1234, "1.23 kB"), (999_499, "999 kB"),
        (999_501, "1 MB"), (999_499_999, "999 MB"), (999_500_000, "1.0 GB"), (12.5e9, "12.5 GB"), (2e13, "20,000.0 GB"),
    ],
)  # fmt: skip
def test_an_amount_is_said_in_the_unit_that_suits_it(size, said):
    assert _amount(size) == said


def test_nodes_that_see_other_data_are_told(run, capsys):
    assert collect(run, 2, [word("n1", took_s=5.0), word("n2", size=1_000_000_000)])
    assert "n2 sees other data there: 1.0 GB in 7 files." in capsys.readouterr().out


def test_without_all_nodes_there_is_no_start(run, capsys):
    assert not collect(run, 2, [word("n1")])
    assert capsys.readouterr().out == "1 of 2 nodes have a copy of launch.stage.\n"
    assert not run.staged.exists()


def test_a_rank_finds_its_node_s_copy_and_holds_it(run, tmp_path):
    with own_folder(tmp_path) as folder:
        collect(run, 2, [word("n1", "/elsewhere"), word("n2", str(folder))])
        environ = {"SLURMD_NODENAME": "n2"}
        use_copies(run, environ)
        assert environ["HPCMM_STAGE_DIR"] == f"{folder}/data"
        assert json.loads(environ["HPCMM_STAGED"]) == {"/data/set": f"{folder}/data/set"}
        with (folder / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        from hpcmm.worker import environment

        environment._held.pop().close()


@pytest.mark.parametrize("node", ["n1", "n9"])
def test_a_rank_without_a_copy_does_not_start(run, node):
    collect(run, 1, [word("n1", "/no/such/folder")])
    with pytest.raises(HpcmmError, match=f"copy of launch.stage .*{node}"):
        use_copies(run, {"SLURMD_NODENAME": node})


@pytest.mark.parametrize(
    ("root", "expected"),
    [("/data/set", "{copy}"), ("/data/set/train", "{copy}/train"), ("/data/set2", "/data/set2"), (None, None)],
)
def test_a_workload_reads_the_copy_of_what_the_user_named(root, expected, tmp_path):
    given = [] if root is None else [f"data.root={root}"]
    config = compose_run(["cluster=slurm", *given])
    config.launch.stage = ["/data/set"]
    with own_folder(tmp_path) as folder:
        local = with_local_paths(config, told(folder))
    assert local.data.root == (expected and expected.replace("{copy}", f"{folder}/data/set"))


def told(folder):
    """What a rank's environment says of copies in a folder."""
    return {"HPCMM_STAGE_DIR": f"{folder}/data", "HPCMM_STAGED": json.dumps({"/data/set": f"{folder}/data/set"})}


def test_a_run_that_stages_nothing_reads_no_copies(tmp_path):
    config = compose_run(["cluster=slurm", "data.root=/data/set"])
    assert with_local_paths(config, told(tmp_path)).data.root == "/data/set"
    assert with_local_paths(config, {"HPCMM_STAGED": "garbage"}).data.root == "/data/set"


def test_copies_that_another_user_could_have_made_are_not_read(tmp_path):
    config = compose_run(["cluster=slurm", "data.root=/data/set"])
    config.launch.stage = ["/data/set"]
    with pytest.raises(HpcmmError, match="is gone from"):
        with_local_paths(config, told(tmp_path / "gone"))
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(HpcmmError, match="is not yours alone"):
        with_local_paths(config, told(folder))
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(HpcmmError, match="is not yours alone"):
        with_local_paths(config, told(tmp_path / "link"))
    give(folder)
    with pytest.raises(HpcmmError, match="is not yours alone"):
        with_local_paths(config, told(folder))


# What is refused at launch.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.stage=[/a/set,/b/set]"], "launch.stage has /a/set and /b/set, whose copies would both be named set"),
        (["launch.stage=[/]"], "name a file or a folder that has a name"),
        (["launch.stage=[/a/..]"], "name a file or a folder that has a name"),
        (["cluster=local", "launch.stage=[/a]"], "cluster=local has none"),
        (["cluster=h100_pyxis", "launch.stage=[/a]"], "set cluster.scratch_dir"),
        (["launch.stage=[/a]", "cluster.scratch_dir=scratch"], "must be an absolute path"),
    ],
)
def test_what_cannot_be_staged_is_refused(overrides, said):
    words = ["cluster=slurm", "dry_run=true", *overrides]
    with pytest.raises(HpcmmError, match=said):
        plan(compose_points(words), words)


def test_sources_are_named_from_the_folder_of_the_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["cluster=slurm", "dry_run=true", "launch.stage=[set/,~/other]"]
    stage = plan(compose_points(words), words).config.launch.stage
    assert stage == [str(tmp_path / "set"), str(Path.home() / "other")]


def test_nothing_is_staged_by_default():
    assert LaunchConfig().stage == RunConfig().launch.stage == []
