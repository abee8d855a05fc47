"""What Slurm tells of a cluster: its partitions, the kinds of nodes in them, and the accounts of this user.

All of it is other people's text: of each answer only numbers and plain names are taken, and what is none is left out.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpcmm.errors import HpcmmError
from hpcmm.slurm.commands import SilentError, ask, new_separator
from hpcmm.text import printable

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,99}")
"""Of a partition, account, QOS or type of GPU, that a file may hold as it is."""
_FIELD = re.compile(r"(?:^|\s)([A-Za-z_:/]+)\s*=(\S*)")
_PARENTHESES = re.compile(r"\([^()]*\)")
_SLICE = re.compile(r"(?:^|[_.-])\d+g\.\d+gb", re.IGNORECASE)
"""In the type of a GPU that is a slice of one (MIG): ``1g.5gb``, ``a100_3g.20gb``."""
_OUT = frozenset(
    {
        *("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILED", "FAILING", "FUTURE", "UNKNOWN", "ERROR"),
        *("NOT_RESPONDING", "INVALID", "INVALID_REG"),
    }
)
"""States of a node that takes no jobs."""
_NO_LIMIT = frozenset({"", "NONE", "UNLIMITED", "INFINITE", "N/A", "(NULL)", "INVALID", "NOT_SET"})
_MOST_GPUS = 1024
"""Of a node; a larger number is none."""
_MOST = 10**9


@dataclass(frozen=True)
class Node:
    """A compute node, as Slurm is configured."""

    name: str
    partitions: tuple[str, ...]
    gpus: tuple[tuple[str, int], ...]
    """Each type, which is empty if Slurm names none, with how many of it there are."""
    cpus: int
    """That jobs can have: threads if a core has several."""
    sockets: int
    cores_per_socket: int
    memory_mb: int
    """That jobs can have."""
    is_usable: bool


@dataclass(frozen=True)
class Partition:
    """A partition, with what it refuses."""

    name: str
    is_default: bool = False
    is_up: bool = True
    max_time_min: int | None = None
    """None: no limit."""
    default_time_min: int | None = None
    max_nodes: int | None = None
    min_nodes: int = 1
    max_cpus_per_node: int | None = None
    cpus_per_gpu: int | None = None
    """What the site gives with each GPU by default."""
    max_memory_mb_per_node: int | None = None
    max_memory_mb_per_cpu: int | None = None
    accounts: frozenset[str] | None = None
    """Those that may use it; None: all."""
    denied_accounts: frozenset[str] = frozenset()
    qos: tuple[str, ...] | None = None
    own_qos: str = ""
    """Whose limits each job there has."""
    groups: frozenset[str] | None = None
    is_for_root: bool = False
    is_hidden: bool = False
    """The site's lists leave it out; whoever knows of it may name it."""


@dataclass(frozen=True)
class Association:
    """An account that this user may charge."""

    account: str
    partition: str = ""
    """Empty: any."""
    qos: tuple[str, ...] = ()
    default_qos: str = ""
    max_time_min: int | None = None


@dataclass(frozen=True)
class Accounting:
    """What Slurm knows of this user."""

    enforced: frozenset[str] = frozenset()
    """What the site requires: ``associations``, ``limits``, ``qos``."""
    associations: tuple[Association, ...] = ()
    default_account: str = ""
    max_time_min_of_qos: Mapping[str, int] = field(default_factory=dict)
    """Of those that have a limit."""
    problem: str = ""
    """Why nothing is known; empty if it is."""

    @property
    def is_required(self) -> bool:
        """Whether a job without an account that is this user's is refused."""
        return bool(self.enforced & {"associations", "limits", "qos", "wckeys", "safe"})


@dataclass(frozen=True)
class Site:
    """A cluster."""

    name: str = ""
    version: str = ""
    takes_gpus_per_node: bool = True
    """Whether ``--gpus-per-node`` is an option here; else GPUs are asked for by ``--gres``."""
    shares_memory: bool = True
    """Whether memory is handed out, so that a job has no more than it asks for."""
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    accounting: Accounting = Accounting()
    groups: frozenset[str] = field(default_factory=frozenset)
    """Of this user."""

    def nodes_of(self, partition: str) -> list[Node]:
        return [node for node in self.nodes if partition in node.partitions]

    def why_closed(self, partition: Partition) -> str | None:
        """Why this user's jobs cannot run in a partition; None if nothing is known to hinder them."""
        own = {each.account for each in self.accounting.associations}
        nodes = self.nodes_of(partition.name)
        if not partition.is_up:
            return "it is closed"
        if partition.is_for_root or (partition.groups is not None and not partition.groups & self.groups):
            return "it is not for your groups"
        if own and not any(partition_takes(partition, account) for account in own):
            return "it takes none of your accounts"
        if not any(node.is_usable for node in nodes):
            return "no node of it takes jobs at present" if nodes else "it has no nodes"
        return None


def partition_takes(partition: Partition, account: str) -> bool:
    """Whether jobs of an account may run there."""
    return (partition.accounts is None or account in partition.accounts) and account not in partition.denied_accounts


def is_slice(gpu_type: str) -> bool:
    """Whether a type of GPU is a slice of one (MIG)."""
    return _SLICE.search(gpu_type) is not None


def is_name(text: str) -> bool:
    """Whether this can be a name of Slurm's that a file may hold as it is."""
    return _NAME.fullmatch(text) is not None


def ask_site(environ: Mapping[str, str] = os.environ) -> Site:
    """Ask scontrol, sinfo if that refuses, and sacctmgr or sshare for the accounts.

    Raises HpcmmError if Slurm does not answer, shows no partition, or several clusters are asked at once.
    """
    clusters = environ.get("SLURM_CLUSTERS", "")
    if "," in clusters or clusters.strip().lower() == "all":
        raise HpcmmError(f"SLURM_CLUSTERS is {printable(clusters)}, but a file describes one cluster: set it to one.")
    try:
        shown = ask("scontrol", "show", "config", environ=environ)
    except SilentError as error:
        raise HpcmmError(
            f"Slurm does not answer ({error.reason}): run this on a login node of the cluster. Without Slurm, "
            "cluster=local needs no file."
        ) from error
    config = dict(read_fields(line) for line in shown.splitlines())
    listed = ("scontrol", "--all", "--oneliner", "show")
    try:
        nodes = parse_nodes(ask(*listed, "node", environ=environ))
        partitions = parse_partitions(ask(*listed, "partition", environ=environ))
    except HpcmmError:
        nodes, partitions = [], []
    if not nodes or not partitions:
        separator = new_separator()
        columns = separator.join(["", *(f"%{letter}" for letter in _COLUMNS), ""])
        nodes, partitions = parse_sinfo(
            ask("sinfo", "--noheader", "--Node", f"--format={columns}", environ=environ), separator
        )
    if not partitions:
        raise HpcmmError("Slurm shows you no partition: see `sinfo -s`, and ask the site which you may use.")
    select, parameters = config.get("SelectType", ""), config.get("SelectTypeParameters", "").upper()
    return Site(
        name=_name(config.get("ClusterName", "").lower()),
        version=_name(config.get("SLURM_VERSION", "")),
        takes_gpus_per_node=not select.endswith(("/cons_res", "/linear")),
        shares_memory="MEMORY" in parameters,
        partitions=tuple(_with_site_s(each, config) for each in partitions),
        nodes=tuple(nodes),
        accounting=ask_accounting(config, environ),
        groups=_own_groups(),
    )


def read_fields(line: str) -> tuple[str, str]:
    """Key and value of a line of ``scontrol show config``."""
    key, _, value = line.partition("=")
    return key.strip(), value.strip()


def _fields(line: str) -> dict[str, str]:
    """Key and value of a line of ``scontrol --oneliner show``. What comes first counts: a reason, which an operator
    writes, stands at the end, and may hold anything."""
    found: dict[str, str] = {}
    for key, value in _FIELD.findall(line):
        found.setdefault(key, value)
    return found


def parse_nodes(listed: str) -> list[Node]:
    """Each line of ``scontrol --oneliner show node``."""
    found = []
    for line in listed.splitlines():
        facts = _fields(line)
        if not is_name(facts.get("NodeName", "")):
            continue
        threads = _count(facts.get("ThreadsPerCore", "")) or 1
        cpus = _count(facts.get("CPUTot", "")) or 1
        kept = (_count(facts.get("CoreSpecCount", "")) or 0) * threads
        cpus = min(cpus, _count(facts.get("CPUEfctv", "")) or cpus - kept)
        found.append(
            Node(
                name=facts["NodeName"],
                partitions=tuple(filter(is_name, facts.get("Partitions", "").split(","))),
                gpus=parse_gpus(facts.get("Gres", "")),
                cpus=max(1, cpus),
                sockets=_count(facts.get("Sockets", "")) or 1,
                cores_per_socket=_count(facts.get("CoresPerSocket", "")) or 1,
                memory_mb=max(
                    0, (_count(facts.get("RealMemory", "")) or 0) - (_count(facts.get("MemSpecLimit", "")) or 0)
                ),
                is_usable=is_usable(facts.get("State", "")),
            )
        )
    return found


def parse_partitions(listed: str) -> list[Partition]:
    """Each line of ``scontrol --oneliner show partition``."""
    found = []
    for line in listed.splitlines():
        facts = _fields(line)
        if not is_name(facts.get("PartitionName", "")):
            continue
        found.append(
            Partition(
                name=facts["PartitionName"],
                is_default=facts.get("Default", "").upper() == "YES",
                is_up=facts.get("State", "UP").upper() == "UP",
                max_time_min=parse_minutes(facts.get("MaxTime", "")),
                default_time_min=parse_minutes(facts.get("DefaultTime", "")),
                max_nodes=_limit(facts.get("MaxNodes", "")),
                min_nodes=_limit(facts.get("MinNodes", "")) or 1,
                max_cpus_per_node=_limit(facts.get("MaxCPUsPerNode", "")),
                cpus_per_gpu=_job_defaults(facts.get("JobDefaults", "")),
                max_memory_mb_per_node=_limit(facts.get("MaxMemPerNode", "")),
                max_memory_mb_per_cpu=_limit(facts.get("MaxMemPerCPU", "")),
                accounts=_set(_names(facts.get("AllowAccounts", "ALL"))),
                denied_accounts=frozenset(_names(facts.get("DenyAccounts", "(null)")) or ()),
                qos=_names(facts.get("AllowQos", "ALL")),
                own_qos=_name(facts.get("QoS", "")),
                groups=_set(_names(facts.get("AllowGroups", "ALL"))),
                is_for_root=facts.get("RootOnly", "").upper() == "YES",
                is_hidden=facts.get("Hidden", "").upper() == "YES",
            )
        )
    return found


_COLUMNS = "NPGcXYmTalL"
"""sinfo's: node, partition, GPUs, CPUs, sockets, cores, memory, state, whether it is up, time limits."""


def parse_sinfo(listed: str, separator: str) -> tuple[list[Node], list[Partition]]:
    """Rows of ``sinfo --Node`` with ``separator`` around each of :data:`_COLUMNS`: one a node and partition."""
    fields = listed.split(separator)
    width = len(_COLUMNS) + 1
    nodes: dict[str, Node] = {}
    partitions: dict[str, Partition] = {}
    for start in range(1, len(fields) - width + 1, width):
        name, partition, gres, cpus, sockets, cores, memory, state, up, most, usual = fields[start : start + width - 1]
        is_default, partition = partition.endswith("*"), partition.removesuffix("*")
        if not is_name(name) or not is_name(partition):
            continue
        nodes[name] = Node(
            name=name,
            partitions=(*(nodes[name].partitions if name in nodes else ()), partition),
            gpus=parse_gpus(gres),
            cpus=_count(cpus.rstrip("+")) or 1,
            sockets=_count(sockets.rstrip("+")) or 1,
            cores_per_socket=_count(cores.rstrip("+")) or 1,
            memory_mb=_count(memory.rstrip("+")) or 0,
            is_usable=is_usable(state),
        )
        partitions[partition] = Partition(
            partition, is_default, up.lower() == "up", parse_minutes(most), parse_minutes(usual)
        )
    return list(nodes.values()), list(partitions.values())


def parse_gpus(gres: str) -> tuple[tuple[str, int], ...]:
    """GPUs by type, of a node's Gres such as ``gpu:a100:4(S:0-1),gpu:1g.5gb:7`` or ``gpu:2``; the most first."""
    found: dict[str, int] = {}
    for each in _PARENTHESES.sub("", gres).split(","):
        name, *words = each.strip().removeprefix("gres:").removeprefix("gres/").split(":")
        words = [word for word in words if word != "no_consume"]
        count = int(words.pop()) if words and re.fullmatch(r"[0-9]{1,9}", words[-1]) else 1
        gpu_type = ":".join(words)
        if name == "gpu" and 0 < count <= _MOST_GPUS and (not gpu_type or is_name(gpu_type)):
            found[gpu_type] = found.get(gpu_type, 0) + count
    return tuple(sorted(found.items(), key=lambda pair: (is_slice(pair[0]), -pair[1], pair[0])))


def parse_minutes(text: str) -> int | None:
    """Minutes of a time of Slurm's: ``1-00:00:00``, ``12:00:00``, ``30:00`` (half an hour), ``60``; None for no limit,
    and for what is no time."""
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,9})(?::([0-9]{1,4}))?(?::([0-9]{1,4}))?", text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(each) for each in parts if each is not None]
    if days is not None:
        hours, minutes, _ = [*numbers, 0, 0][:3]
        return (int(days) * 24 + hours) * 60 + minutes
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1]
    return max(1, numbers[0])


def is_usable(state: str) -> bool:
    """Whether a node in this state takes jobs, such as ``IDLE+CLOUD`` and ``mixed``, but not ``down*``."""
    return bool(state) and "*" not in state and not _OUT & set(re.split(r"[^A-Z_]+", state.upper()))


def ask_accounting(config: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Accounting:
    """The accounts that this user may charge, by sacctmgr, or by sshare if that refuses."""
    enforced = frozenset(config.get("AccountingStorageEnforce", "").lower().replace(",", " ").split()) - {"none"}
    if not config.get("AccountingStorageType", "").startswith("accounting_storage/slurm"):
        return Accounting(enforced, problem="this cluster keeps no accounts")
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return Accounting(enforced, problem="your user has no name here")
    cluster = _name(config.get("ClusterName", ""))
    where = ["where", f"user={user}", *([f"cluster={cluster}"] if cluster else [])]
    command = ["sacctmgr", "--noheader", "--parsable2", "--readonly", "show"]
    try:
        listed = ask(*command, "associations", *where, f"format={_OF_AN_ASSOCIATION}", environ=environ)
        limits = ask(*command, "qos", "format=name,maxwall", environ=environ)
        default = ask(*command, "user", "where", f"name={user}", "format=defaultaccount", environ=environ)
        found, problem = list(parse_associations(listed)), ""
    except HpcmmError as error:
        found, limits, default, problem = [], "", "", str(error)
    if not found:
        try:
            listed = ask("sshare", "--noheader", "--parsable2", "-U", "--format=account", environ=environ)
            found = list(parse_associations(listed))
        except HpcmmError as error:
            problem = problem or str(error)
    problem = "" if found else problem or f"Slurm shows no account of user {user}"
    default = _name(default.strip().partition("\n")[0].strip())
    return Accounting(enforced, tuple(found), default, parse_qos(limits), problem)


_OF_AN_ASSOCIATION = "account,partition,qos,defaultqos,maxwall"


def parse_associations(listed: str) -> Iterator[Association]:
    """Rows of account, partition, QOS, default QOS and longest time; what is missing is empty."""
    for line in dict.fromkeys(listed.splitlines()):
        account, partition, qos, default, most, *_ = [*(each.strip() for each in line.split("|")), "", "", "", ""]
        if is_name(account) and (not partition or is_name(partition)):
            names = tuple(filter(is_name, qos.split(",")))
            yield Association(account, partition, names, _name(default), parse_minutes(most))


def parse_qos(listed: str) -> dict[str, int]:
    """Rows of a QOS and its longest time: those in minutes that have one."""
    found = {}
    for line in listed.splitlines():
        name, _, most = line.partition("|")
        if is_name(name.strip()) and (minutes := parse_minutes(most.strip())) is not None:
            found[name.strip()] = minutes
    return found


def _with_site_s(partition: Partition, config: Mapping[str, str]) -> Partition:
    """With what holds for all partitions that say nothing else."""
    cpus_per_gpu = partition.cpus_per_gpu
    if cpus_per_gpu is None:
        cpus_per_gpu = _job_defaults(config.get("JobDefaults", ""))
    per_node, per_cpu = partition.max_memory_mb_per_node, partition.max_memory_mb_per_cpu
    if not (per_node or per_cpu):  # a partition has one of the two
        per_node, per_cpu = _limit(config.get("MaxMemPerNode", "")), _limit(config.get("MaxMemPerCPU", ""))
    return replace(partition, cpus_per_gpu=cpus_per_gpu, max_memory_mb_per_node=per_node, max_memory_mb_per_cpu=per_cpu)


def _job_defaults(text: str) -> int | None:
    found = re.search(r"DefCpuPerGPU=([0-9]{1,4})\b", text, re.IGNORECASE)
    return int(found[1]) or None if found else None


def _own_groups() -> frozenset[str]:
    found = set()
    for number in {os.getegid(), *os.getgroups()}:
        try:
            found.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return frozenset(found)


def _name(text: str) -> str:
    return text if is_name(text) else ""


def _names(text: str) -> tuple[str, ...] | None:
    """The names of a list with commas; None for all."""
    if text.upper() == "ALL" or text.upper() in _NO_LIMIT:
        return None
    return tuple(filter(is_name, text.split(",")))


def _set(names: Sequence[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _count(text: str) -> int | None:
    """A number that is not out of all bounds; None for another text."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < _MOST else None


def _limit(text: str) -> int | None:
    """A number, or None for no limit and for what is none."""
    return None if text.upper() in _NO_LIMIT else _count(text) or None
