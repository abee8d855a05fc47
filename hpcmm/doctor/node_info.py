"""What one node says of itself. No torch is imported; nothing here asks another node."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_GPU_FIELDS = (
    "index,name,uuid,temperature.gpu,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,"
    "pcie.link.width.current,pcie.link.width.max"
)
_TIMEOUT_S = 30


def node_facts(folders: list[Path]) -> dict[str, Any]:
    """Python, packages, CPUs, memory, network interfaces, GPUs and free disk of this node, as plain values."""
    return {
        "node": node_name(),
        "host_name": socket.gethostname(),
        "python": {"version": platform.python_version(), "prefix": sys.prefix, "machine": platform.machine()},
        "packages": packages(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "interfaces": interfaces(),
        "infiniband": infiniband_ports(),
        "gpus": gpus(),
        "nsys": shutil.which("nsys"),
        "disks": {str(folder): disk(folder) for folder in folders},
    }


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def packages() -> dict[str, str]:
    """Name and version of each installed Python package."""
    found: dict[str, str] = {}
    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return found


def packages_hash(found: dict[str, str]) -> str:
    """A short word that is the same where all packages are."""
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


def interfaces() -> dict[str, dict[str, Any]]:
    """Each network interface that is up: addresses, speed in Mbit/s (0 where the driver does not say), MTU, errors."""
    states, counters = psutil.net_if_stats(), psutil.net_io_counters(pernic=True)
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        state, count = states.get(name), counters.get(name)
        if state is None or not state.isup:
            continue
        found[name] = {
            "addresses": [each.address for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)],
            "mbit_per_s": state.speed,
            "mtu": state.mtu,
            "errors": count.errin + count.errout if count else 0,
        }
    return found


def infiniband_ports() -> dict[str, dict[str, str]]:
    """State and rate of each InfiniBand port, in the kernel's words."""
    ports = Path("/sys/class/infiniband").glob("*/ports/*")
    return {f"{port.parent.parent.name}/{port.name}": _port(port) for port in sorted(ports)}


def _port(port: Path) -> dict[str, str]:
    return {name: _line(port / name) for name in ("state", "rate")}


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def gpus() -> dict[str, Any]:
    """What nvidia-smi tells: ``gpus``, a list of its fields each, or ``problem``, why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"gpus": [], "problem": "nvidia-smi is not there"}
    query = [tool, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": [], "problem": f"nvidia-smi did not answer ({error})"}
    if done.returncode != 0:
        return {"gpus": [], "problem": f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[:200]}"}
    return {"gpus": parse_gpus(done.stdout), "problem": None}


def parse_gpus(listed: str) -> list[dict[str, str]]:
    """One dictionary a GPU, by nvidia-smi's names of the fields."""
    names = _GPU_FIELDS.split(",")
    rows = csv.reader(listed.splitlines(), skipinitialspace=True)
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def disk(folder: Path) -> dict[str, Any]:
    """Free and total bytes of a folder's file system, or of that of its nearest parent that exists."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    usage = shutil.disk_usage(there)
    inodes = os.statvfs(there)
    return {
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "free_inodes": inodes.f_favail if inodes.f_files else None,
        "writable": os.access(there, os.W_OK),
    }
