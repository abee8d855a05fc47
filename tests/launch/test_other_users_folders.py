"""What another user planted where a command writes or looks is not followed, truncated or overwritten."""

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.sweep import compose_points
from hpcmm.doctor.node import _leave_token, _sees, token_file
from hpcmm.errors import HpcmmError
from hpcmm.launch.plan import plan, run_to_start_from
from hpcmm.launch.submit import _link_latest
from hpcmm.launch.write import write
from hpcmm.nsys.capture import one_start_at_a_time
from hpcmm.reports.convert import Converter
from hpcmm.reports.find import ReportSource
from hpcmm.runs.ownership import own_output_folder, refuse_folder_of_others
from hpcmm.runs.run_dir import RunDir

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def shared():
    """A folder that other users can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def run_in(root: Path, name: str) -> RunDir:
    run = RunDir(root / name)
    run.create()
    run.config.write_text("name: x\n")
    run.newest_checkpoint.write_text("step_000001")
    return run


def test_a_launch_into_a_folder_where_anybody_can_exchange_the_run_is_refused(shared):
    (shared / "runs").mkdir()
    (shared / "runs").chmod(0o777)
    overrides = ["cluster=local", f"runs_root={shared / 'runs'}", "dry_run=true"]
    with pytest.raises(HpcmmError, match=r"^runs_root is .* can be written by everybody"):
        plan(compose_points(overrides), overrides)
    (shared / "runs").chmod(0o1777)
    plan(compose_points(overrides), overrides)


def test_a_launch_with_a_cache_that_anybody_can_exchange_is_refused(shared):
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o777)
    overrides = ["cluster=local", f"runs_root={shared / 'runs'}", f"cluster.cache_dir={shared / 'cache'}"]
    with pytest.raises(HpcmmError, match=r"^The cache folder is .* can be written by everybody"):
        plan(compose_points(overrides), overrides)


def test_a_launch_through_another_user_s_link_is_refused(shared, monkeypatch):
    (shared / "open").mkdir()
    (shared / "open").chmod(0o1777)
    (shared / "mine").mkdir()
    (shared / "open" / "runs").symlink_to(shared / "mine")
    another_user.give(shared / "open" / "runs")
    monkeypatch.chdir(shared / "open")
    for overrides in (["cluster=local"], ["cluster=local", "runs_root=../mine", "cluster.cache_dir=runs/cache"]):
        with pytest.raises(HpcmmError, match=r"open/runs is a link of user 54321"):
            plan(compose_points(overrides), overrides)
    assert [*(shared / "mine").iterdir()] == []


@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_nothing_is_written_if_another_user_made_a_missing_folder_first(shared, mode):
    (shared / "open").mkdir()
    (shared / "open").chmod(0o1777)
    overrides = ["cluster=local", f"runs_root={shared / 'open' / 'new' / 'runs'}", "dry_run=true"]
    planned = plan(compose_points(overrides), overrides)
    (shared / "open" / "new").mkdir()
    (shared / "open" / "new").chmod(mode)
    another_user.give(shared / "open" / "new")
    with pytest.raises(HpcmmError, match=r"^runs_root is .*open/new .*another user could put a run"):
        write(planned)
    assert not planned.run.root.exists()


def test_a_planted_latest_is_neither_followed_nor_in_the_way(tmp_path):
    run = run_in(tmp_path, "demo-1")
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / ".latest-demo-1").symlink_to("thesis")
    (tmp_path / "latest").symlink_to("thesis")
    assert _link_latest(run)
    assert (tmp_path / "latest").readlink() == Path("demo-1")
    assert (tmp_path / "thesis").read_text() == "mine"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert not _link_latest(run)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".latest-demo-1", "demo-1", "latest", "thesis"]


def test_training_starts_from_one_s_own_run_if_another_user_left_one_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, mine = run_in(tmp_path / "runs", "base"), run_in(tmp_path, "base")
    another_user.give(theirs.root)
    config = compose_run(["cluster=local", "train.init_from=base", "runs_root=runs"])
    assert run_to_start_from(config) == str(mine.root)
    another_user.give(mine.root)
    with pytest.raises(HpcmmError, match=r"train\.init_from=base: .*base can be written by another user"):
        run_to_start_from(config)


def test_a_node_s_token_goes_through_no_planted_link(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    tokens = {node: token_file(tmp_path, "ab", "secret", node) for node in ("n1", "n2", "n3", "n4")}
    tokens["n1"].symlink_to("thesis")
    os.mkfifo(tokens["n2"])
    found: dict[str, object] = {}
    for node in ("n1", "n2", "n3"):
        _leave_token(tokens[node], node, found)
    assert found == {"unwritable": {str(tmp_path): "File exists"}}
    assert (tmp_path / "thesis").read_text() == "mine"
    tokens["n4"].write_text("n4")
    another_user.give(tokens["n4"])
    assert [node for node, token in tokens.items() if _sees(token, node)] == ["n3"]


def test_the_name_of_a_node_s_token_tells_neither_the_secret_nor_another_node_s(tmp_path):
    names = {token_file(tmp_path, "ab", secret, node).name for secret in ("s", "t") for node in ("n1", "n2")}
    assert len(names) == 4
    assert all(name.startswith(".hpcmm-doctor-ab-") and "n1" not in name for name in names)


@pytest.mark.parametrize("planted", ["link", "pipe", "file", "hard link"])
def test_nsys_starts_though_another_user_took_the_lock_s_name(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = tmp_path / f"hpcmm-nsys-start-{os.geteuid()}.lock"
    (tmp_path / "thesis").write_text("mine")
    if planted == "link":
        lock.symlink_to("thesis")
    elif planted == "pipe":
        os.mkfifo(lock)
    elif planted == "hard link":  # to a file of one's own that others can open, and so hold a lock of
        (tmp_path / "thesis").chmod(0o666)
        lock.hardlink_to(tmp_path / "thesis")
    else:
        lock.touch()
        another_user.give(lock)
    with lock.open("r") if planted == "hard link" else contextlib.nullcontext() as theirs:
        if theirs is not None:
            fcntl.flock(theirs, fcntl.LOCK_EX)
        with one_start_at_a_time():
            assert (tmp_path / "thesis").read_text() == "mine"


def test_nothing_is_written_beside_another_user_s_run_unless_a_folder_is_named(tmp_path):
    run = run_in(tmp_path, "demo-1")
    (run.nsys / "rank_0000.sqlite").touch()
    (tmp_path / "site").mkdir()
    run.analysis.symlink_to(tmp_path / "site")
    another_user.give(run.root)
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.analyze", str(run.root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "is another user's (54321), and nothing is written there: name a folder with --out." in done.stderr
    assert [*(tmp_path / "site").iterdir()] == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_a_folder_that_another_user_made_or_linked_by_the_name_of_out_is_refused(tmp_path, kind):
    (tmp_path / "thesis").mkdir()
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    else:
        out.symlink_to("thesis" if kind == "link" else "nowhere")
    another_user.give(out)
    tmp_path.chmod(0o1777)
    with pytest.raises(HpcmmError, match=r"is another user's .* name a folder of your own with --out"):
        refuse_folder_of_others(out)
    with pytest.raises(HpcmmError, match="is another user's"):
        own_output_folder(out)
    assert own_output_folder(tmp_path / "mine") == tmp_path / "mine"
    assert [*(tmp_path / "thesis").iterdir()] == []


def test_exports_which_hold_the_environment_go_into_no_folder_of_another_user(tmp_path):
    (tmp_path / "cache").mkdir()
    another_user.give(tmp_path / "cache")
    report = tmp_path / "rank_0000.nsys-rep"
    report.write_bytes(b"x")
    with pytest.raises(HpcmmError, match="cache is another user's"):
        Converter(tmp_path / "cache", Path("/bin/true")).to_sqlite(ReportSource((report,)))


def test_scores_go_into_no_folder_of_another_user(tmp_path):
    own_output_folder(tmp_path / "evaluation")
    another_user.give(tmp_path / "evaluation")
    with pytest.raises(HpcmmError, match=r"evaluation is another user's \(54321\)"):
        own_output_folder(tmp_path / "evaluation")
