"""The real Slurm cluster of ``slurm/local``, the real nsys and a run that is kept, for tests that need them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import kept_run
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

COMMANDS = Path(__file__).resolve().parents[1] / "slurm" / "local"
CANNOT_RUN_HERE = 3
"""Exit status of ``slurm/local/up`` on a machine that lacks a prerequisite."""


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
