"""From what Slurm tells to a cluster file: each key with the reason for its value. Pure."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcmm.config.schema import Executor, GpuOption
from hpcmm.errors import HpcmmError
from hpcmm.init.site import Association, Node, Partition, Site, is_slice, partition_takes
from hpcmm.text import printable

_USUAL_TIME_MIN = 240
_USUAL_NODES = 2
_WIDTH = 118
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+@-]*")
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"})
"""Words that YAML would not take for text."""


@dataclass(frozen=True)
class Wanted:
    """What the user has said; None: to be guessed."""

    name: str
    partition: str | None = None
    account: str | None = None
    """Empty: none is to be given."""
    qos: str | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    cpus_per_rank: int | None = None
    memory_gb: float | None = None
    time_limit_min: int | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    cache_dir: str | None = None
    about_cache: str = ""
    """Why that cache folder; of the usual one, what is known of it."""
    runs_root: str | None = None
    submit_environment: Mapping[str, str] | None = None
    interface: str | None = None
    about_interface: str = "As you said."


@dataclass(frozen=True)
class Line:
    """A key of the file. Without a value the reason alone is written."""

    key: str
    value: Any
    why: str = ""


def propose(site: Site, wanted: Wanted) -> list[Line]:
    """The lines of a cluster file. Raises HpcmmError if what is wanted is not there."""
    partition, why = choose_partition(site, wanted.partition)
    nodes = site.nodes_of(partition.name)
    kind = choose_kind(nodes, wanted.gpu_type)
    account, mine = _account(site, partition, wanted)
    return [
        Line("name", wanted.name),
        Line("executor", Executor.slurm),
        Line("partition", partition.name, why),
        *account,
        *_qos(partition, mine, wanted),
        *_sizes(site, partition, nodes, kind, wanted),
        _time(site, partition, wanted, mine),
        *_surroundings(wanted),
    ]


def choose_partition(site: Site, name: str | None) -> tuple[Partition, str]:
    """The partition that is meant, or the one to begin with, and why. Raises HpcmmError if there is no such."""
    known = {each.name: each for each in site.partitions}
    closed = {each.name: "it is hidden" for each in site.partitions if each.is_hidden}
    closed |= {each.name: why for each in site.partitions if (why := site.why_closed(each)) is not None}
    shown = "; ".join(f"{_shown(site, each)}{_reason(closed, each.name)}" for each in site.partitions)
    if name is not None:
        if name not in known:
            raise HpcmmError(f"{printable(name)} is not a partition here: choose one of {', '.join(known)}.")
        return known[name], f"As you said. Partitions: {shown}."
    may_be = [each for each in site.partitions if each.name not in closed] or list(site.partitions)
    gpus = {each.name: sum(_gpus(node) for node in site.nodes_of(each.name) if node.is_usable) for each in may_be}
    default = next((each for each in may_be if each.is_default), None)
    if default is not None and (gpus[default.name] or not any(gpus.values())):
        return default, f"The site's default. Partitions: {shown}."
    chosen = max(may_be, key=lambda each: gpus[each.name])
    why = "It has the most GPUs" if gpus[chosen.name] else "The first that takes your jobs"
    return chosen, f"{why}. Partitions: {shown}."


def _shown(site: Site, partition: Partition) -> str:
    nodes = site.nodes_of(partition.name)
    gpus = Counter[str]()
    for node in nodes:
        gpus.update(dict(node.gpus))
    of_type = ", ".join(f"{count} {gpu_type or 'GPUs'}" for gpu_type, count in gpus.most_common()) or "no GPU"
    return f"{partition.name}{' (default)' if partition.is_default else ''}: {_many(len(nodes), 'node')}, {of_type}"


def _reason(closed: Mapping[str, str], name: str) -> str:
    return f" [{closed[name]}]" if name in closed else ""


def _gpus(node: Node) -> int:
    return sum(count for gpu_type, count in node.gpus if not is_slice(gpu_type))


def choose_kind(nodes: Sequence[Node], gpu_type: str | None) -> list[Node]:
    """The nodes of a partition that are alike in GPUs and CPUs: those with whole GPUs first, then the most numerous.

    Raises HpcmmError if no node has GPUs of the type that is wanted.
    """
    kinds = kinds_of([node for node in nodes if gpu_type is None or gpu_type in dict(node.gpus)])
    if gpu_type is not None and not kinds:
        types = sorted({each for node in nodes for each, _ in node.gpus if each})
        choose = f"choose one of {', '.join(types)}" if types else "Slurm names no types there, so leave it out"
        raise HpcmmError(f"No node of the partition has GPUs of type {printable(gpu_type)}: {choose}.")
    usable = [[node for node in kind if node.is_usable] for kind in kinds]
    order = sorted(
        range(len(kinds)),
        key=lambda at: (_gpus(kinds[at][0]) == 0, not kinds[at][0].gpus, -len(usable[at]), -_gpus(kinds[at][0])),
    )
    return kinds[order[0]] if order else []


def kinds_of(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes that have the same GPUs and CPUs, together."""
    found: dict[object, list[Node]] = {}
    for node in nodes:
        found.setdefault((node.gpus, node.cpus), []).append(node)
    return list(found.values())


def _described(kind: Sequence[Node]) -> str:
    node = kind[0]
    gpus = ", ".join(f"{count} {f'{gpu_type} GPUs' if gpu_type else 'GPUs'}" for gpu_type, count in node.gpus)
    out = sum(not each.is_usable for each in kind)
    memory_gb = min(each.memory_mb for each in kind) // 1024
    said = f"{_many(len(kind), 'node')} with {gpus or 'no GPU'}, {node.cpus} CPUs and {memory_gb} GB"
    return said + (f" ({out} of them down or drained)" if out else "")


def _account(site: Site, partition: Partition, wanted: Wanted) -> tuple[list[Line], list[Association]]:
    """The account, and what this user may do with it there."""
    known = site.accounting
    mine = [
        each
        for each in known.associations
        if each.partition in ("", partition.name) and partition_takes(partition, each.account)
    ]
    names = list(dict.fromkeys(each.account for each in mine))
    yours = f"Yours: {', '.join(names)}." if names else f"Yours are not known ({printable(known.problem)})."
    account, said = wanted.account, f"As you said. {yours}"
    if account is not None:
        if account and names and known.is_required and account not in names:
            raise HpcmmError(
                f"{printable(account)} is not an account of yours there: choose one of {', '.join(names)}."
            )
    elif names and (known.is_required or partition.accounts is not None):
        account = known.default_account if known.default_account in names else names[0]
        why = "Slurm requires one here" if known.is_required else "This partition takes some accounts only"
        said = f"{why}; this is {'your default' if account == known.default_account else 'the first of yours'}. {yours}"
    elif known.is_required:
        said = f"Slurm requires one here. {yours} Ask the site, and write it here."
    else:
        said = f"Slurm requires none here, though a site may have rules of its own. {yours}"
    charged = account or known.default_account
    of_it = [each for each in mine if each.account == charged] or mine
    return [Line("account", account or None, said)], of_it


def _qos(partition: Partition, mine: Sequence[Association], wanted: Wanted) -> Iterator[Line]:
    own = list(dict.fromkeys(name for each in mine for name in each.qos))
    default = next((each.default_qos for each in mine if each.default_qos), "")
    if wanted.qos is not None:
        yield Line("qos", wanted.qos, f"As you said. Yours: {', '.join(own) or 'not known'}.")
    elif partition.qos is not None and default not in partition.qos:
        both = [name for name in own if name in partition.qos] or ([] if own else list(partition.qos))
        takes = f"This partition takes QOS {', '.join(partition.qos)} only"
        yield Line("qos", both[0] if both else None, f"{takes}{'' if both else '; yours: ' + ', '.join(own)}.")


def _sizes(
    site: Site, partition: Partition, nodes: Sequence[Node], kind: Sequence[Node], wanted: Wanted
) -> Iterator[Line]:
    """Nodes, ranks, GPUs, CPUs and memory."""
    if not kind:
        said = "Slurm shows no node of this partition, so this is a guess."
        yield Line("nodes", wanted.nodes or 1, said)
        yield Line("ranks_per_node", wanted.ranks_per_node or wanted.gpus_per_node or 1)
        yield Line("gpus_per_node", wanted.gpus_per_node or 0)
        yield Line("cpus_per_rank", wanted.cpus_per_rank or 1)
        return
    kinds = "; ".join(_described(each) for each in kinds_of(nodes))
    usable = max(1, sum(each.is_usable for each in kind))
    most = min(usable, partition.max_nodes or usable)
    limits = [f"at most {partition.max_nodes} a job"] if partition.max_nodes else []
    limits += [f"at least {partition.min_nodes}"] if partition.min_nodes > 1 else []
    if (wanted.nodes or 0) > min(len(nodes), partition.max_nodes or len(nodes)):
        of_a_job = f", {limits[0]}" if partition.max_nodes else ""
        raise HpcmmError(f"{wanted.nodes} nodes are too many: {partition.name} has {len(nodes)}{of_a_job}.")
    guessed = max(partition.min_nodes, min(_USUAL_NODES, most))
    why = f"Of {kinds}{' (' + ', '.join(limits) + ')' if limits else ''}. More nodes: cluster.nodes=N."
    yield Line("nodes", wanted.nodes or guessed, why)
    gpu_type, there = _gpus_of(kind[0], wanted.gpu_type)
    gpus = wanted.gpus_per_node if wanted.gpus_per_node is not None else 1 if is_slice(gpu_type) else there
    ranks, why = _ranks(kind[0], gpus, wanted)
    yield Line("ranks_per_node", ranks, why)
    yield from _gpu_lines(site, nodes, gpu_type, gpus, there)
    share = gpus / there if gpus and there else 1.0
    yield from _cpus_and_memory(site, partition, kind, (ranks, share, gpus), wanted)


def _gpus_of(node: Node, wanted: str | None) -> tuple[str, int]:
    """The type of GPU to use, and how many of it the node has."""
    if wanted is not None:
        return wanted, dict(node.gpus)[wanted]
    return node.gpus[0] if node.gpus else ("", 0)


def _ranks(node: Node, gpus: int, wanted: Wanted) -> tuple[int, str]:
    if wanted.ranks_per_node is not None:
        return wanted.ranks_per_node, "As you said."
    if gpus:
        return gpus, "One rank a GPU."
    if node.cores_per_socket > 1:
        return node.sockets, "No GPU, so one rank a processor."
    return 1, "No GPU, and Slurm does not tell how many processors a node has, so one rank a node."


def _gpu_lines(site: Site, nodes: Sequence[Node], gpu_type: str, gpus: int, there: int) -> Iterator[Line]:
    types = sorted({each for node in nodes for each, _ in node.gpus if each})
    if is_slice(gpu_type) and gpus:
        why = f"{there} slices of GPUs (MIG) a node. NCCL does not work between slices of a GPU, so one a node."
    else:
        why = "All of a node." if gpus == there else f"As you said, of {there}."
    counts = sorted({dict(node.gpus)[gpu_type] for node in nodes if gpu_type in dict(node.gpus)})
    if gpus and len(counts) > 1:
        why += f" Nodes of this partition have {', '.join(map(str, counts))} of them."
    yield Line("gpus_per_node", gpus, why if gpus or there else "Slurm knows no GPU there.")
    if not gpus:
        return
    if gpu_type and (len(types) > 1 or any("" in dict(node.gpus) for node in nodes)):
        yield Line("gpu_type", gpu_type, f"The partition has GPUs of several types: {', '.join(types)}.")
    if not site.takes_gpus_per_node:
        yield Line("gpu_option", GpuOption.gres, "This Slurm takes --gpus-per-node only with select/cons_tres.")


def _cpus_and_memory(
    site: Site, partition: Partition, kind: Sequence[Node], asked: tuple[int, float, int], wanted: Wanted
) -> Iterator[Line]:
    """``asked``: ranks, the share of the node that its GPUs are, and GPUs."""
    ranks, share, gpus = asked
    node = kind[0]
    cpus = min(int(node.cpus * share), partition.max_cpus_per_node or node.cpus)
    each, why = max(1, cpus // ranks), f"{cpus} CPUs of a node, over {ranks} {'rank' if ranks == 1 else 'ranks'}."
    if partition.max_cpus_per_node and partition.max_cpus_per_node < node.cpus:
        why += f" The partition gives at most {partition.max_cpus_per_node} CPUs a node."
    if gpus and partition.cpus_per_gpu and gpus * partition.cpus_per_gpu <= cpus:
        each, why = max(1, gpus * partition.cpus_per_gpu // ranks), f"The site gives {partition.cpus_per_gpu} a GPU."
    if wanted.cpus_per_rank is not None:
        each, why = wanted.cpus_per_rank, "As you said."
    yield Line("cpus_per_rank", each, why)
    if wanted.memory_gb is not None:
        yield Line("memory_gb", wanted.memory_gb, "As you said.")
        return
    if not site.shares_memory:
        yield Line("memory_gb", None, "Slurm does not hand out memory here, so a job has all of a node's.")
        return
    memory_mb = int(min(each_node.memory_mb for each_node in kind) * share)
    limits = [partition.max_memory_mb_per_node or memory_mb]
    if partition.max_memory_mb_per_cpu:
        limits.append(partition.max_memory_mb_per_cpu * each * ranks)
    memory_gb = min(memory_mb, *limits) // 1024
    why = "The memory of such a node" if share == 1 else "The node's memory, in proportion to its GPUs"
    why += ", as far as the partition gives it." if min(limits) < memory_mb else "."
    yield Line("memory_gb", memory_gb or None, f"{why} Without it the site's default applies, which may be little.")


def _time(site: Site, partition: Partition, wanted: Wanted, mine: Sequence[Association]) -> Line:
    limits = {f"partition {partition.name}": partition.max_time_min}
    limits |= {f"account {each.account}": each.max_time_min for each in mine[:1]}
    qos = next((line.value for line in _qos(partition, mine, wanted)), mine[0].default_qos if mine else "")
    for name in dict.fromkeys(filter(None, (partition.own_qos, qos))):
        limits[f"QOS {name}"] = site.accounting.max_time_min_of_qos.get(name)
    known = {whose: minutes for whose, minutes in limits.items() if minutes}
    most = min(known.values(), default=None)
    usual = partition.default_time_min
    said = f"Most: {', '.join(f'{known[whose]} by {whose}' for whose in known) or 'no limit'}. "
    said += f"The partition's default: {usual or 'none'}."
    if wanted.time_limit_min is not None:
        if most and wanted.time_limit_min > most:
            raise HpcmmError(f"A time limit of {wanted.time_limit_min} min is too long. {said}")
        return Line("time_limit_min", wanted.time_limit_min, f"As you said. {said}")
    guessed = usual or _USUAL_TIME_MIN
    return Line("time_limit_min", min(guessed, most or guessed), said)


def _surroundings(wanted: Wanted) -> Iterator[Line]:
    if wanted.python is not None:
        yield Line("python", wanted.python, "The Python that runs the ranks, as you said.")
    if wanted.modules:
        yield Line("modules", list(wanted.modules), "Those that are loaded where this file was made.")
    yield Line("cache_dir", wanted.cache_dir, wanted.about_cache)
    if wanted.submit_environment:
        why = "By these the Slurm commands found the cluster."
        yield Line("submit_environment", dict(wanted.submit_environment), why)
    if wanted.interface:
        why = f"The network interface on which the ranks meet. {wanted.about_interface}"
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        yield Line("environment", dict.fromkeys(names, wanted.interface), why)
    else:
        yield Line("environment", None, "The network interface is not set, so NCCL and gloo choose it by themselves.")


def written(lines: Sequence[Line], heading: str, runs_root: str | None) -> str:
    """The text of the file, with each reason above its key."""
    said = ["# @package _global_"] if runs_root is not None else []  # which Hydra reads in the first line alone
    said += _comment(heading)
    said += [f"runs_root: {_value(runs_root)}", "cluster:"] if runs_root is not None else []
    inside = "  " if runs_root is not None else ""
    for line in lines:
        given = line.value is not None
        why = line.why if given else f"{line.key}: {line.why}"
        said += [f"{inside}{each}" for each in (_comment(why) if line.why else [])]
        if given:
            said += [f"{inside}{each}" for each in _key(line.key, line.value)]
    return "\n".join(said) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(printable(text), _WIDTH, break_long_words=False)]


def _key(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}:", *(f"  {name}: {_value(each)}" for name, each in value.items())]
    return [f"{key}: {_value(value)}"]


def _value(value: Any) -> str:
    """A value as YAML; OmegaConf would take ``${`` for a reference."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT
        return value if is_plain else json.dumps(value.replace("${", r"\${"))
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
