"""The cache folder, and what is said where there can be none."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import another_user
import pytest

from hpcmm.config import config_file
from hpcmm.config.schema import ClusterConfig, RunConfig, TaskConfig
from hpcmm.errors import HpcmmError
from hpcmm.node.cache import cache_dir, check_cache_dir, one_at_a_time
from hpcmm.nsys.probe import nsys_facts
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.compiled_ops import ADAM, COMMUNICATION, build_ops, ops_are_built
from hpcmm.worker.prepare import prepare


@pytest.mark.parametrize("home", ["/dev/null/x", "/proc/nonexistent"])
def test_a_job_of_a_user_whose_home_cannot_be_written_says_what_to_set(tmp_path: Path, home: str) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    config_file.dump(RunConfig(name="run", cluster=ClusterConfig(name="local")), run.config)
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.worker", "prepare", str(run.root)],
        env=os.environ | {"HOME": home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"hpcmm: The cache folder {home}/.cache/hpcmm cannot be written (")
    assert "set cluster.cache_dir to a folder that all nodes share and can write." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_probe_of_nsys_that_cannot_be_noted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "nsys").write_text("")
    (tmp_path / "cache").write_text("a file if the folder should be")
    with pytest.raises(HpcmmError, match=r"set cluster\.cache_dir to"):
        nsys_facts(str(tmp_path / "nsys"), tmp_path / "cache" / "nsys")


def test_the_cache_folder_is_made_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a new home"))
    folder = cache_dir(RunConfig().cluster)
    assert folder == tmp_path / "a new home" / ".cache" / "hpcmm"
    with one_at_a_time(folder / "lock"):
        assert folder.is_dir()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def cluster(folder: Path) -> ClusterConfig:
    return ClusterConfig(name="x", cache_dir=str(folder))


@pytest.mark.parametrize("mode", [0o775, 0o2775, 0o1777, 0o777])
def test_in_a_folder_that_others_can_write_each_user_gets_a_folder_within(shared: Path, mode: int) -> None:
    folder = shared / "cache"
    assert cache_dir(cluster(folder)) == folder
    folder.mkdir()
    assert cache_dir(cluster(folder)) == folder
    folder.chmod(mode)
    assert cache_dir(cluster(folder)) == folder / f"hpcmm-{os.geteuid()}"


def test_the_folder_of_one_s_own_is_closed_to_others(shared: Path) -> None:
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o1777)
    with one_at_a_time(cache_dir(cluster(shared / "cache")) / "prepare.lock"):
        pass
    assert (shared / "cache" / f"hpcmm-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_a_folder_to_which_nobody_else_can_come_is_used_as_it_is(shared: Path) -> None:
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o775)
    shared.chmod(0o700)
    assert cache_dir(cluster(shared / "cache")) == shared / "cache"


def test_a_cache_folder_that_all_can_exchange_is_refused_before_anything_is_made(shared: Path) -> None:
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o777)
    with pytest.raises(HpcmmError, match=r"cache can be written by everybody.*run as you.*chmod \+t"):
        check_cache_dir(cluster(shared / "cache"))
    (shared / "cache").chmod(0o1777)
    check_cache_dir(cluster(shared / "cache"))
    assert [*(shared / "cache").iterdir()] == []


def test_another_user_s_cache_folder_is_refused(shared: Path) -> None:
    folder = shared / "cache"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / f"hpcmm-{os.geteuid()}").mkdir()
    another_user.give(folder / f"hpcmm-{os.geteuid()}")
    with pytest.raises(HpcmmError, match=rf"hpcmm-{os.geteuid()} is another user's"):
        check_cache_dir(cluster(folder))
    another_user.give(folder)
    with pytest.raises(HpcmmError, match="belongs to user 54321"):
        check_cache_dir(cluster(folder))


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_folder_behind_another_user_s_link_is_refused(shared: Path, below: str) -> None:
    (shared / "open").mkdir()
    (shared / "open").chmod(0o1777)
    (shared / "mine").mkdir()
    (shared / "open" / "cache").symlink_to(shared / "mine")
    check_cache_dir(cluster(shared / "open" / "cache" / below))
    another_user.give(shared / "open" / "cache")
    with pytest.raises(HpcmmError, match=r"open/cache is a link of user 54321, and what lies there would run as you"):
        check_cache_dir(cluster(shared / "open" / "cache" / below))


def test_nothing_is_compiled_where_another_user_s_link_leads(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmm.worker.prepare.build_ops", lambda folder, _: pytest.fail(f"{folder} was used"))
    (shared / "open").mkdir()
    (shared / "open").chmod(0o1777)
    (shared / "theirs").mkdir()
    config = RunConfig(name="run", cluster=cluster(shared / "open" / "new" / "cache"))
    check = [lambda: None, lambda: check_cache_dir(config.cluster)]

    def plant_after_the_first(_: ClusterConfig) -> None:
        check.pop(0)()
        if check:
            (shared / "open" / "new").symlink_to(shared / "theirs")
            another_user.give(shared / "open" / "new")

    monkeypatch.setattr("hpcmm.worker.prepare.check_cache_dir", plant_after_the_first)
    with pytest.raises(HpcmmError, match=r"open/new is a link of user 54321"):
        prepare(config)


def test_ops_are_compiled_in_a_closed_folder_by_its_real_path(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmm.worker.distributed.select_accelerator", lambda: "cpu")
    compiled: list[Path] = []
    monkeypatch.setattr("hpcmm.worker.compiled_ops._compile", lambda folder, _: compiled.append(folder))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    (shared / "cache").mkdir()
    (shared / "link").symlink_to("cache")
    build_ops(shared / "link" / "ops")
    assert compiled == [shared / "cache" / "ops"]
    assert compiled[0].stat().st_mode & 0o777 == 0o700
    (shared / "cache").chmod(0o777)
    with pytest.raises(HpcmmError, match="cache can be written by everybody, so no ops are compiled"):
        build_ops(shared / "link" / "ops", [COMMUNICATION, ADAM])


def test_an_op_that_a_script_may_need_is_compiled_beside_what_is_there(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcmm.worker.distributed.select_accelerator", lambda: "cpu")
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    compiled: list[str] = []

    def compile_one(folder: Path, op: str) -> None:
        compiled.append(op)
        (folder / op).mkdir()
        (folder / op / f"{op}.so").write_bytes(b"code")

    monkeypatch.setattr("hpcmm.worker.compiled_ops._compile", compile_one)
    build_ops(shared / "ops")
    assert ops_are_built(shared / "ops")
    assert not ops_are_built(shared / "ops", [COMMUNICATION, ADAM])
    (shared / "ops" / ADAM).mkdir()
    (shared / "ops" / ADAM / "lock").touch()  # which a rank that was killed has left
    build_ops(shared / "ops", [COMMUNICATION, ADAM])
    assert compiled == [COMMUNICATION, ADAM]
    assert ops_are_built(shared / "ops", [COMMUNICATION, ADAM])
    assert not (shared / "ops" / ADAM / "lock").exists()
    assert (shared / "ops" / COMMUNICATION / f"{COMMUNICATION}.so").exists()


def test_a_script_finds_the_optimizer_of_deepspeed_s_settings_compiled_and_a_workload_waits_for_none(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("hpcmm.worker.prepare.ops_are_built", lambda _, ops: asked.append(tuple(ops)) or True)
    script = RunConfig(name="run", cluster=cluster(shared / "cache"))
    prepare(script)
    workload = RunConfig(name="run", cluster=cluster(shared / "cache"), task=TaskConfig(_target_="some.workload"))
    monkeypatch.setattr("hpcmm.config.workload.load_workload", lambda _: NothingToPrepare())
    prepare(workload)
    assert asked == [(COMMUNICATION, ADAM), (COMMUNICATION,)]


class NothingToPrepare:
    def given_paths(self, config: RunConfig) -> dict[str, str | None]:  # noqa: ARG002
        return {}

    def prepare(self, config: RunConfig) -> None:
        pass


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who would wait for a lock gets BlockingIOError."""
    lock = fcntl.flock
    monkeypatch.setattr("fcntl.flock", lambda file, how: lock(file, how | fcntl.LOCK_NB))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())


def compile_by(monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], None]) -> None:
    def build_whole(folder: Path, _: object) -> None:
        build(folder)
        folder.mkdir(parents=True)
        for stamp in ("hpcmm-ops-built", "hpcmm-adam-built"):
            (folder / stamp).touch()

    monkeypatch.setattr("hpcmm.worker.prepare.build_ops", build_whole)


@pytest.mark.usefixtures("nobody_waits")
def test_a_job_waits_for_no_ops_that_are_compiled_for_another_environment(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(name="run", cluster=cluster(shared / "cache"))
    built: list[Path] = []

    def build_while_another_job_prepares(folder: Path) -> None:
        built.append(folder)
        if len(built) == 1:
            monkeypatch.setattr("sys.prefix", "/another/environment")
            prepare(config)

    compile_by(monkeypatch, build_while_another_job_prepares)
    prepare(config)
    assert len(set(built)) == 2
    assert built[0].parent == built[1].parent == shared / "cache" / "torch_extensions"


@pytest.mark.usefixtures("nobody_waits")
def test_a_job_waits_for_what_another_one_compiles_for_the_same_environment_and_for_nothing_once_it_is_there(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(name="run", cluster=cluster(shared / "cache"))

    def build_while_another_job_prepares(_: Path) -> None:
        with pytest.raises(BlockingIOError):
            prepare(config)

    compile_by(monkeypatch, build_while_another_job_prepares)
    prepare(config)
    for lock in (shared / "cache").glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # which nobody can hold
    prepare(config)


def test_a_lock_that_is_a_link_truncates_nothing(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "prepare.lock").symlink_to("thesis")
    with pytest.raises(HpcmmError, match="cannot be written"), one_at_a_time(tmp_path / "prepare.lock"):
        pass
    (tmp_path / "prepare.lock").unlink()
    (tmp_path / "prepare.lock").hardlink_to(tmp_path / "thesis")
    with one_at_a_time(tmp_path / "prepare.lock"):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(HpcmmError, match="cannot be written"), one_at_a_time(tmp_path / "lock"):
        pass


_LOAD = """
import sys
from pathlib import Path
from hpcmm.errors import HpcmmError
from hpcmm.worker.compiled_ops import load_ops
try:
    load_ops(Path(sys.argv[1]))
except HpcmmError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["writable", "link", "foreign"])
def test_an_op_that_another_user_could_have_written_is_not_loaded(shared: Path, mode: str) -> None:
    library = shared / "ops" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"code")
    if mode == "writable":
        library.chmod(0o777)
    elif mode == "link":
        library.rename(shared / "elsewhere.so")
        library.symlink_to(shared / "elsewhere.so")
    else:
        another_user.give(library)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(shared / "ops")], capture_output=True, text=True, check=True, timeout=120
    )
    said = {"writable": "another user could have written", "link": "no symbolic links", "foreign": "another user than"}
    assert said[mode] in done.stdout
    assert f"remove {shared / 'ops'}, and the next run builds it anew" in done.stdout


_LOAD_TWO = """
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from hpcmm.worker import compiled_ops
fake = ModuleType("deepspeed.ops.op_builder.builder")
fake.OpBuilder = SimpleNamespace(_loaded_ops={})
for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.op_builder"):
    sys.modules[name] = ModuleType(name)
sys.modules["deepspeed.ops.op_builder.builder"] = fake
compiled_ops.COMMUNICATION, compiled_ops.ADAM = sys.argv[2:]
compiled_ops._STAMPS = {compiled_ops.ADAM: "stamp"}
compiled_ops.load_ops(Path(sys.argv[1]))
print(*(module.__name__ for module in fake.OpBuilder._loaded_ops.values()))
"""


def test_each_op_is_loaded_from_its_own_file(shared: Path) -> None:
    names = ("_heapq", "_bisect")
    folder = shared / "ops"
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not str(spec.origin).endswith(".so"):
            pytest.skip(f"{name} is part of this Python's program, and no file to load")
        (folder / name).mkdir(parents=True)
        shutil.copy(spec.origin, folder / name / f"{name}.so")
    (folder / "stamp").touch()
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_TWO, str(folder), *names], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == list(names)
