"""The environment that every test finds; for those that need them the real Slurm, the real nsys and a kept run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import kept_run
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = REPOSITORY / "slurm" / "local"
CANNOT_RUN_HERE = 3
"""Exit status of ``slurm/local/up`` on a machine that lacks a prerequisite."""

CACHE = REPOSITORY / ".cache" / "tests"
"""Where the tests keep what takes a minute to make, such as compiled ops, from one session to the next."""
ENVIRONMENT = {
    "TERM": "xterm",
    "COLUMNS": "80",
    "LINES": "24",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "GIT_AUTHOR_NAME": "A. Tester",
    "GIT_AUTHOR_EMAIL": "tester@example.org",
    "GIT_COMMITTER_NAME": "A. Tester",
    "GIT_COMMITTER_EMAIL": "tester@example.org",
}
"""What tests and the commands that they start find set; a test that needs another value sets it itself."""
OF_A_WORKER = {"OMP_NUM_THREADS": "1"}
"""The same of one of several workers, which share the cores: threads of its own would spin while another's compute."""
UNSET = {
    "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM",
    "LANGUAGE", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "PYTHONWARNINGS", "PYTHONOPTIMIZE",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCH_EXTENSIONS_DIR",
    "HPCMM_CONFIG_DIR",
}  # fmt: skip
UNSET_PREFIXES = (
    "LC_", "XDG_", "GIT_", "SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "PMI",
    "SUBMITIT_", "HYDRA_", "NSYS_", "NCCL_",
)  # fmt: skip


def is_a_worker(config: pytest.Config) -> bool:
    """Whether this process is one of those that ``-n`` starts."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Put the environment into a known state before any module of tests, or what it imports, looks at it."""
    patch = pytest.MonkeyPatch()
    home = Path(tempfile.mkdtemp(prefix="hpcmm-tests-home-"))
    CACHE.mkdir(parents=True, exist_ok=True)
    (home / ".cache").symlink_to(CACHE)
    umask = os.umask(0o022)

    def restore() -> None:
        patch.undo()
        time.tzset()
        os.umask(umask)
        shutil.rmtree(home, ignore_errors=True)

    config.add_cleanup(restore)
    for name in list(os.environ):
        if name in UNSET or name.startswith(UNSET_PREFIXES):
            patch.delenv(name)
    for name, value in {**ENVIRONMENT, "HOME": str(home), **(OF_A_WORKER if is_a_worker(config) else {})}.items():
        patch.setenv(name, value)
    time.tzset()


LONGEST = ("workloads", "annotate", "serve", "compatibility", "worker", "train")
"""Folders of the tests that take longest. They start first: a long one that starts last leaves other workers idle."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_as_long(items)
    items.sort(key=lambda item: item.path.relative_to(REPOSITORY / "tests").parts[0] not in LONGEST)


def mark_the_rest_as_long(items: list[pytest.Item]) -> None:
    """Of a test that is marked ``few(count)`` so many of its parameters stay in ``make test``, evenly among all."""
    tests: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few"):
            tests.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
    for cases in tests.values():
        (count,) = cases[0].get_closest_marker("few").args
        kept = {place * len(cases) // count for place in range(count)}
        for place, case in enumerate(cases):
            if place not in kept:
                case.add_marker(pytest.mark.long)


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster: how to reach it, and how to break it."""

    directory: Path

    @property
    def conf(self) -> Path:
        """``SLURM_CONF`` of every Slurm command."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with the cluster in it."""
        return os.environ | {"HPCMM_CLUSTER_DIR": str(self.directory), "SLURM_CONF": str(self.conf)}

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes, in order."""
        return self.run("sinfo", "-hN", "-o", "%N").split()

    def command(self, name: str, *arguments: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """Run ``up``, ``down``, ``status`` or ``fault`` of this cluster."""
        return _run((str(COMMANDS / name), *arguments), self.env, timeout_s)

    def run(self, *command: str, timeout_s: float = 120) -> str:
        """Standard output of a command such as ``srun hostname``, which must succeed."""
        done = _run(command, self.env, timeout_s)
        assert done.returncode == 0, f"{command} exited with {done.returncode}: {done.stderr}"
        return done.stdout

    def fault(self, *arguments: str) -> str:
        """``slurm/local/fault``, such as ``fault("throttle", "node2", "30mbit")``; undo it with ``restore``."""
        done = self.command("fault", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


def _run(command: Sequence[str], env: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, timeout=timeout_s, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of the tests' own, which nobody else's jobs hold up: new, and purged at the end.

    That of ``HPCMM_CLUSTER_DIR`` where it is set: faster to try one test again, and stopped only when it was not up.
    """
    if os.geteuid() != 0:
        pytest.skip("the local Slurm cluster needs root")
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("slurmctld is not installed")
    given = os.environ.get("HPCMM_CLUSTER_DIR")
    cluster = SlurmCluster(Path(given)) if given else _new_cluster()
    was_up = cluster.command("status").returncode == 0
    try:
        started = cluster.command("up")
        if started.returncode == CANNOT_RUN_HERE:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        if not given:
            _remove(cluster)
        elif not was_up:
            stopped = cluster.command("down")
            assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="module")
def spare_clusters(slurm_cluster: SlurmCluster) -> Iterator[Callable[[], SlurmCluster]]:
    """Makes state directories of further clusters, which may be started and stopped beside the first."""
    made: list[SlurmCluster] = []

    def make() -> SlurmCluster:
        made.append(_new_cluster())
        return made[-1]

    yield make
    for cluster in made:
        _remove(cluster)


@pytest.fixture
def spare_cluster(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The state directory of a second cluster, for one test."""
    cluster = _new_cluster()
    yield cluster
    _remove(cluster)


def _new_cluster() -> SlurmCluster:
    """One that was never started, in a folder of its own; undone by :func:`_remove`."""
    return SlurmCluster(Path(tempfile.mkdtemp(prefix="hpcmm-", dir="/tmp")))


def _remove(cluster: SlurmCluster) -> None:
    if cluster.directory.exists():
        stopped = cluster.command("down", "--purge") if any(cluster.directory.iterdir()) else None
        shutil.rmtree(cluster.directory, ignore_errors=True)
        assert stopped is None or stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="session")
def compiled_ops() -> None:
    """The compiled op that each rank with DeepSpeed loads: built here, by one process, if no session has left it."""
    build = (
        "from hpcmm.config.schema import ClusterConfig as C; from hpcmm.node import cache; "
        "from hpcmm.worker.compiled_ops import build_ops, ops_are_built; folder = cache.extensions_dir(C())\n"
        "with cache.one_at_a_time(cache.cache_dir(C()) / f'{folder.name}.lock'):\n"
        "    ops_are_built(folder) or build_ops(folder)"
    )
    done = _run((sys.executable, "-c", build), dict(os.environ), timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def nsys() -> str:
    """Path of the real nsys."""
    path = shutil.which("nsys")
    if path is None:
        pytest.skip("nsys is not on the PATH")
    return path


@pytest.fixture
def run_v1(tmp_path: Path) -> Path:
    """Directory of a finished run that an earlier version made, in a folder ``runs`` with a finished sweep.

    See ``tests/fixtures/run_v1/README.md``.
    """
    return kept_run.unpack(tmp_path / "project")
