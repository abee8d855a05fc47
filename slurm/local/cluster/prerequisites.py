"""What the machine must offer before a cluster can start."""

from __future__ import annotations

import os
import shutil

from .daemons import SYSTEM_PATH
from .errors import ClusterError, MissingPrerequisiteError
from .processes import run

PACKAGE_OF_PROGRAM = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "munged": "munge",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "hostname": "hostname",
}
"""Debian's names of the packages."""


def require_root(command: str) -> None:
    """Raises MissingPrerequisiteError for anyone but root."""
    if os.geteuid() != 0:
        raise MissingPrerequisiteError(f"`{command}` needs root, to make network namespaces; run it with sudo.")


def require_packages() -> None:
    """Raises MissingPrerequisiteError that names the missing packages."""
    missing = [program for program in PACKAGE_OF_PROGRAM if not shutil.which(program, path=SYSTEM_PATH)]
    if missing:
        packages = ", ".join(sorted({PACKAGE_OF_PROGRAM[program] for program in missing}))
        raise MissingPrerequisiteError(f"Not installed: {packages}; run scripts/setup.sh as root.")


def require_namespaces() -> None:
    """Raises MissingPrerequisiteError where kernel or container forbids namespaces, veth pairs or host names."""
    trial = "ip link add hpcmm-a type veth peer name hpcmm-b && ip link add hpcmm-c type bridge && hostname trial"
    try:
        run("unshare", "--net", "--uts", "sh", "-c", trial)
    except ClusterError as error:
        raise MissingPrerequisiteError(
            "This machine does not let root make network namespaces with veth pairs and a bridge "
            f"(in a container, start it privileged). {error}"
        ) from None
