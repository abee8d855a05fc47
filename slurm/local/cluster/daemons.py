"""The cluster's daemons: on which host each runs, with which command, and how it is started and stopped."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError
from .layout import Host, Layout
from .processes import processes_of, signal_all, wait_until

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Daemon:
    """A process that stays, on one of the cluster's hosts."""

    program: str
    host: Host
    command: tuple[str, ...]
    output: Path
    """What it prints, where that is not in its own log: complaints about its configuration."""

    @property
    def title(self) -> str:
        return f"{self.program} on {self.host.name}"

    def pids(self) -> list[int]:
        """The daemon's process, when it lives; found by its host and its program, not by a pid file."""
        return [pid for pid, arguments in processes_of(self.host).items() if arguments[0] == self.command[0]]


def environment(layout: Layout) -> dict[str, str]:
    """Environment of daemons and of Slurm's commands: nothing of the caller's leaks into jobs."""
    return {
        "PATH": SYSTEM_PATH,
        "LC_ALL": "C.UTF-8",
        "SLURM_CONF": str(layout.slurm_conf),
        "MYSQL_UNIX_PORT": str(layout.database_socket),
    }


def munged(layout: Layout) -> Daemon:
    """Signs and checks the messages of all other daemons, with a key of the cluster's own."""
    options = {
        "key-file": layout.munge_key,
        "socket": layout.munge_socket,
        "pid-file": layout.run / "munged.pid",
        "seed-file": layout.run / "munge.seed",
        "log-file": layout.logs / "munged.log",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return _daemon(layout, layout.controller, "munged", "--foreground", *arguments)


def mariadbd(layout: Layout) -> Daemon:
    """The accounting database, reachable by a socket in a closed folder and by nothing else."""
    options = {
        "datadir": layout.database,
        "socket": layout.database_socket,
        "pid-file": layout.run / "mariadbd.pid",
        "log-error": layout.logs / "mariadbd.log",
        "innodb-buffer-pool-size": "128M",
        "innodb-lock-wait-timeout": 900,
        "innodb-flush-log-at-trx-commit": 0,
        "max-allowed-packet": "16M",
        "user": "root",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return _daemon(layout, layout.controller, "mariadbd", "--no-defaults", "--skip-networking", *arguments)


def slurmdbd(layout: Layout) -> Daemon:
    """Keeps the record of jobs, which `sacct` reads."""
    return _daemon(layout, layout.controller, "slurmdbd", "-D")


def slurmctld(layout: Layout) -> Daemon:
    """Slurm's controller."""
    return _daemon(layout, layout.controller, "slurmctld", "-D", "-f", str(layout.slurm_conf))


def slurmd(layout: Layout, node: Host) -> Daemon:
    """Slurm's daemon on a compute node."""
    return _daemon(layout, node, "slurmd", "-D", "-N", node.name, "-f", str(layout.slurm_conf))


def all_daemons(layout: Layout) -> list[Daemon]:
    """In the order in which they start."""
    control = [daemon(layout) for daemon in (munged, mariadbd, slurmdbd, slurmctld)]
    return control + [slurmd(layout, node) for node in layout.nodes]


def create_munge_key(layout: Layout) -> None:
    """Make the cluster's own key, once."""
    if not layout.munge_key.exists():
        layout.munge_key.touch(mode=0o600)
        layout.munge_key.write_bytes(secrets.token_bytes(128))


def start(layout: Layout, daemon: Daemon) -> None:
    """Start a daemon that does not run, on its host and under its host's name."""
    if daemon.pids():
        return
    # Not `ip netns exec`, which hides the cgroup mount that slurmd wants to see.
    enter = ("nsenter", f"--net={daemon.host.namespace}", "unshare", "--uts")
    named = ("sh", "-c", 'hostname "$0" && exec "$@"', daemon.host.name, *daemon.command)
    with daemon.output.open("wb") as output:
        process = subprocess.Popen(
            enter + named,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(layout),
            cwd="/",
            start_new_session=True,
        )
    wait_until(lambda: process.poll() is not None or bool(daemon.pids()), 10, f"{daemon.title} does not start.")
    require_alive(daemon)


def require_alive(daemon: Daemon) -> None:
    """Raises ClusterError with the daemon's last words when it has died."""
    if not daemon.pids():
        words = daemon.output.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise ClusterError(f"{daemon.title} ended at once; it said: {words[0]} (see {daemon.output.parent}).")


def stop(daemon: Daemon, patience_s: float = 10) -> None:
    """Ask a daemon to end, and kill it when it does not."""
    signal_all(daemon.pids(), signal.SIGTERM)
    try:
        wait_until(lambda: not daemon.pids(), patience_s, "")
    except ClusterError:
        signal_all(daemon.pids(), signal.SIGKILL)
        wait_until(lambda: not daemon.pids(), patience_s, f"{daemon.title} survives SIGKILL.")


def _daemon(layout: Layout, host: Host, program: str, *arguments: str) -> Daemon:
    command = (_absolute(program), *arguments)
    return Daemon(program, host, command, layout.logs / f"{program}-{host.name}.out")


def _absolute(program: str) -> str:
    for folder in SYSTEM_PATH.split(":"):
        path = Path(folder) / program
        if os.access(path, os.X_OK):
            return str(path)
    raise ClusterError(f"{program} is not installed; run scripts/setup.sh as root.")
