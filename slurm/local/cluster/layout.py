"""Where every file of the cluster lies, and its hosts' names and addresses."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

NODE_COUNT = 4
GPUS_PER_NODE = 2


@dataclass(frozen=True)
class Host:
    """One simulated machine: a network namespace with a host name and an address of its own."""

    name: str
    address: IPv4Address
    namespace: Path
    """File on which the namespace is mounted; `nsenter --net=FILE COMMAND` runs a command there."""

    def is_there(self) -> bool:
        """Whether the namespace exists; after a reboot the file is a plain one."""
        try:
            return self.namespace.stat().st_dev != self.namespace.parent.stat().st_dev
        except FileNotFoundError:
            return False

    @property
    def port(self) -> str:
        """The host's end at the switch, an interface in the controller's namespace."""
        return f"to-{self.name}"


@dataclass(frozen=True)
class Layout:
    """The files, hosts and addresses of one cluster.

    The first host is the controller: it runs slurmctld, slurmdbd, MariaDB and munge, and its namespace holds the
    bridge that joins all hosts. The others are the compute nodes.
    """

    root: Path
    prefix: str
    subnet: IPv4Network

    @property
    def controller(self) -> Host:
        return self._host(0)

    @property
    def nodes(self) -> tuple[Host, ...]:
        return tuple(self._host(number) for number in range(1, NODE_COUNT + 1))

    @property
    def hosts(self) -> tuple[Host, ...]:
        return (self.controller, *self.nodes)

    def _host(self, number: int) -> Host:
        name = f"{self.prefix}{number}"
        return Host(name, self.subnet[10 + number], self.namespaces / name)

    @property
    def machine_address(self) -> IPv4Address:
        """The real machine's own address in the cluster's network."""
        return self.subnet[1]

    @property
    def machine_interface(self) -> str:
        """The one interface that the cluster adds to the real machine."""
        return f"hpcmm-{self.prefix}"

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def munge_key(self) -> Path:
        return self.etc / "munge.key"

    @property
    def namespaces(self) -> Path:
        """A mount point for each host."""
        return self.root / "netns"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def run(self) -> Path:
        """Sockets and pid files."""
        return self.root / "run"

    @property
    def munge_socket(self) -> Path:
        return self.run / "munge.socket"

    @property
    def database(self) -> Path:
        return self.root / "mariadb"

    @property
    def database_socket(self) -> Path:
        """Behind a closed folder: who can open it is the database's administrator."""
        return self.root / "private" / "mariadb.socket"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def controller_spool(self) -> Path:
        return self.spool / "slurmctld"

    @property
    def gpus(self) -> Path:
        """Files that stand for GPU devices; every node has its own count of the same ones."""
        return self.root / "gpu"

    def create(self) -> None:
        """Make the folders; those with secrets are closed to other users."""
        for folder in (self.root, self.etc, self.namespaces, self.logs, self.run, self.spool, self.gpus):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        for folder in (self.database_socket.parent, self.controller_spool):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)
        for gpu in range(GPUS_PER_NODE):
            device = self.gpus / f"gpu{gpu}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")  # Slurm insists on a character device
