"""Run commands to their end, and find and stop the processes of a host.

A process belongs to a host when it lives in the host's network namespace. That holds for daemons, job steps and
whatever they started, survives a lost pid file, and can never be true of a process that the cluster did not start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import ClusterError
from .layout import Host


def run(*command: str, timeout_s: float = 30, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed.

    Raises ClusterError with the command and its last words when it fails or takes longer than ``timeout_s``.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=env, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(command)}` did not end within {timeout_s:g} s.") from None
    except OSError as error:
        raise ClusterError(f"`{command[0]}` cannot be run: {error.strerror}.") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ClusterError(f"`{' '.join(command)}` failed: {words}")
    return done.stdout


def run_on(host: Host, command: str) -> str:
    """Run a command, given as words with blanks between them, in a host's network; as :func:`run`."""
    return run("nsenter", f"--net={host.namespace}", *command.split())


def wait_until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Return once ``condition`` holds. Raises ClusterError with ``otherwise`` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(otherwise)
        time.sleep(0.05)


def processes_of(host: Host) -> dict[int, list[str]]:
    """Process ids and argument lists of what lives in a host's namespace; zombies do not count."""
    if not host.is_there():
        return {}
    namespace = _identity(host.namespace)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if _identity(entry / "ns" / "net") == namespace:
                arguments = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
                found[int(entry.name)] = arguments
        except OSError:
            continue  # ended while we looked
    return {pid: arguments for pid, arguments in found.items() if arguments != [""]}


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may have ended meanwhile."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_processes_of(host: Host, timeout_s: float = 10) -> None:
    """Kill everything on a host and wait until it is gone, also what is started meanwhile."""

    def gone() -> bool:
        left = processes_of(host)
        signal_all(left, signal.SIGKILL)
        return not left

    wait_until(gone, timeout_s, f"Processes on {host.name} survive SIGKILL: {sorted(processes_of(host))}.")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
