"""From what the nodes found to findings, and to the doctor's word: which node is bad, why, and what to do. Pure."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcmm.doctor.rendezvous import best_of_each
from hpcmm.text import StrEnum, visible

SLOW_SHARE = 0.5
"""A node whose best all-reduce is below this share of the median of the nodes is bad."""

MOST_OFFSET_S = 0.1
LEAST_FREE_BYTES = 2 * 1024**3
_HOT_C = 90


class Weight(StrEnum):
    """How much a finding counts."""

    bad = "bad"
    """The node, or the set-up, is not fit to train on."""
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    node: str
    check: str
    weight: Weight
    said: str
    remedy: str = ""


Found = Mapping[str, dict[str, Any]]


def check_findings(nodes: Sequence[str], found: Found, gpus_per_node: int = 0) -> list[Finding]:
    """All findings about ``nodes``, the bad ones first. ``gpus_per_node``: what the configuration counts on."""
    there = {node: found[node] for node in nodes if found.get(node)}
    silent = [node for node in nodes if node not in there]
    checks: tuple[Callable[[Found], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _names,
        _rendezvous,
        _shared,
        _interfaces,
        _clocks,
        _bandwidth,
        _disks,
        _nsys,
    )
    findings = [_silent(node) for node in silent]
    findings += [finding for check in checks for finding in check(there)]
    findings += [finding for node, facts in there.items() for finding in _gpus(node, facts, gpus_per_node)]
    order = list(Weight)
    return sorted(findings, key=lambda finding: order.index(finding.weight))


def bad_nodes(findings: Sequence[Finding], nodes: Sequence[str]) -> list[str]:
    """The nodes with a bad finding, in the order of ``nodes``."""
    bad = {finding.node for finding in findings if finding.weight is Weight.bad}
    return [node for node in nodes if node in bad]


def packages_hash(found: dict[str, str]) -> str:
    """A short word that is the same if all packages are."""
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


def _silent(node: str) -> Finding:
    return Finding(node, "answer", Weight.bad, "it left no word", f"see `scontrol show node {node}`; leave it out")


def _odd_ones(values: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """What most nodes have, and the nodes that have something else; nobody is odd if there is no majority."""
    if not values:
        return None, []
    (common, count), *_ = Counter(values.values()).most_common(1)
    if count * 2 <= len(values) and count < len(values):
        return None, []
    return common, [node for node, value in values.items() if value != common]


def _differing(
    check: str, values: Mapping[str, str], said: Callable[[str, str], str], remedy: str
) -> Iterator[Finding]:
    common, odd = _odd_ones(values)
    if common is not None:
        for node in odd:
            yield Finding(node, check, Weight.bad, said(values[node], common), remedy)
    elif len(set(values.values())) > 1:
        for node, value in values.items():
            yield Finding(node, check, Weight.bad, f"the nodes differ: here it is {value}", remedy)


def _python(found: Found) -> Iterator[Finding]:
    values = {node: " ".join(str(each) for each in facts["python"].values()) for node, facts in found.items()}
    yield from _differing(
        "Python",
        values,
        lambda own, common: f"Python is {own}, but {common} on the other nodes",
        "use one environment on a shared file system",
    )


def _packages(found: Found) -> Iterator[Finding]:
    hashes = {node: packages_hash(facts["packages"]) for node, facts in found.items()}
    common, odd = _odd_ones(hashes)
    if common is None:
        odd = list(hashes) if len(set(hashes.values())) > 1 else []
    model: dict[str, str] = next((found[node]["packages"] for node, value in hashes.items() if value == common), {})
    for node in odd:
        own = found[node]["packages"]
        differ = [name for name in sorted(set(own) | set(model)) if own.get(name) != model.get(name)]
        shown = ", ".join(f"{name} {own.get(name, 'missing')} not {model.get(name, 'there')}" for name in differ[:5])
        said = f"{len(differ)} packages differ from the other nodes': {shown}"
        yield Finding(node, "packages", Weight.bad, said, "use one environment on a shared file system")


def _names(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        unknown = [name for name, address in facts.get("names", {}).items() if address is None]
        if unknown:
            said = f"the names {', '.join(unknown[:5])} do not resolve here"
            yield Finding(node, "name resolution", Weight.bad, said, "tell the site: DNS or /etc/hosts of the node")
        address = str(facts.get("names", {}).get(node) or "")
        if address.startswith("127.") or address == "::1":
            said = f"its own name resolves to {address}"
            yield Finding(node, "name resolution", Weight.warning, said, "set NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME")


def _rendezvous(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        if "problem" in facts:
            remedy = "check its link and firewall; leave it out"
            yield Finding(node, "network", Weight.bad, str(facts["problem"]), remedy)


def _shared(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        for folder, reason in facts.get("unwritable", {}).items():
            said = f"{folder} cannot be written ({reason})"
            yield Finding(node, "shared file system", Weight.bad, said, "is it mounted, and are you its owner?")
    met = {node: facts for node, facts in found.items() if "shared" in facts}
    for folder in sorted({folder for facts in met.values() for folder in facts["shared"]}):
        blind = {node: [n for n in facts["shared"].get(folder, []) if n != node] for node, facts in met.items()}
        votes = Counter(other for unseen in blind.values() for other in unseen)
        for node, unseen in blind.items():
            # A node with a folder of its own sees nobody, and nobody sees it; with two nodes each blames the other.
            if unseen and (len(unseen) == len(met) - 1 or votes[node] * 2 >= len(met) > 2):
                said = f"{folder} is not the other nodes': it lacks the files that {', '.join(unseen[:5])} wrote there"
                remedy = "set runs_root and cluster.cache_dir to a file system that all nodes share"
                yield Finding(node, "shared file system", Weight.bad, said, remedy)


def _interfaces(found: Found) -> Iterator[Finding]:
    speeds = {}
    for node, facts in found.items():
        interface = facts.get("interfaces", {}).get(facts.get("interface"))
        if interface and interface["mbit_per_s"] > 0:
            speeds[node] = interface["mbit_per_s"]
    if len(speeds) > 1:
        median = statistics.median(speeds.values())
        for node, speed in speeds.items():
            if speed < SLOW_SHARE * median:
                said = f"{found[node]['interface']} runs at {speed} Mbit/s, the other nodes' at {median:g}"
                yield Finding(node, "network interface", Weight.bad, said, "tell the site: cable, port or driver")
    for node, facts in found.items():
        for port, state in facts.get("infiniband", {}).items():
            if "ACTIVE" not in state["state"]:
                said = f"InfiniBand port {port} is {state['state'] or 'unreadable'}"
                yield Finding(node, "network interface", Weight.warning, said, "tell the site if it should be in use")


def _clocks(found: Found) -> Iterator[Finding]:
    offsets = {node: facts["clock"] for node, facts in found.items() if "clock" in facts}
    if not offsets:
        return
    median = statistics.median(clock["offset_s"] for clock in offsets.values())
    for node, clock in offsets.items():
        apart = clock["offset_s"] - median
        if abs(apart) - clock["error_s"] > MOST_OFFSET_S:
            said = f"its clock is {apart:+.3f} s ± {clock['error_s']:.3f} s from the other nodes'"
            yield Finding(node, "clock", Weight.warning, said, "tell the site: chrony or ntpd does not run on it")


def bandwidths(found: Found) -> dict[str, float]:
    """Each node's best all-reduce bandwidth over its partners, in bytes a second."""
    nodes = list(found)
    pairs = {
        (first, second): rate
        for facts in found.values()
        for first, second, rate in facts.get("all_reduce", {}).get("pairs", [])
        if first in found and second in found
    }
    measured = [(nodes.index(first), nodes.index(second), rate) for (first, second), rate in pairs.items()]
    best = best_of_each(len(nodes), measured)
    return {node: rate for node, rate in zip(nodes, best) if rate is not None}


def _bandwidth(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        if problem := facts.get("all_reduce", {}).get("problem"):
            said = f"the all-reduce failed: {problem}"
            yield Finding(node, "all-reduce", Weight.bad, said, "see the node's torch, network interface and firewall")
    without = [node for node, facts in found.items() if facts.get("all_reduce", {}).get("not_measured")]
    if without:
        of = f"of {len(without)} nodes" if len(without) > 1 else "of it"
        why = found[without[0]]["all_reduce"]["not_measured"]
        yield Finding(without[0], "all-reduce", Weight.note, f"no link {of} is measured: {why}")
    rates = bandwidths(found)
    if len(rates) < 3:
        return  # of two, none can be said to be the slow one
    median = statistics.median(rates.values())
    for node, rate in rates.items():
        if rate < SLOW_SHARE * median:
            said = f"its all-reduce moves {rate / 1e6:.1f} MB/s, the median of the nodes is {median / 1e6:.1f} MB/s"
            yield Finding(node, "all-reduce", Weight.bad, said, "leave it out and tell the site: its link is slow")


def _disks(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        for folder, disk in facts.get("disks", {}).items():
            if disk["free_bytes"] < LEAST_FREE_BYTES:
                said = f"{disk['free_bytes'] / 1024**3:.2f} GiB are free for {folder}"
                yield Finding(node, "disk", Weight.bad, said, "free some space, or choose another folder")
            elif disk.get("free_inodes") is not None and disk["free_inodes"] < 1000:
                said = f"{disk['free_inodes']} files can still be made in {folder}"
                yield Finding(node, "disk", Weight.bad, said, "remove files there, or choose another folder")


def _nsys(found: Found) -> Iterator[Finding]:
    for node, facts in found.items():
        if facts.get("nsys") is None:
            remedy = "load its module with cluster.modules, or train with profile=off"
            yield Finding(node, "nsys", Weight.warning, "nsys is not on the PATH", remedy)
        elif "nvtx" not in facts.get("packages", {"nvtx": ""}):
            said = "its Python has no nvtx, without which nsys records no step and no collective"
            yield Finding(node, "nsys", Weight.warning, said, "install nvtx there, or train with profile=off")
        elif problem := facts.get("nsys_problem"):
            yield Finding(node, "nsys", Weight.bad, str(problem), "mend it, or train with profile=off")


def _gpus(node: str, facts: Mapping[str, Any], expected: int) -> Iterator[Finding]:
    told = facts.get("gpus", {"gpus": [], "problem": None})
    count = len(told["gpus"])
    if expected and told["problem"]:
        said = f"{expected} GPUs are configured, but {told['problem']}; torch would train on the CPU"
        missing = "not there" in told["problem"]
        yield Finding(node, "GPU", Weight.warning if missing else Weight.bad, said, "see the driver on the node")
    elif count < expected:
        said = f"nvidia-smi shows {count} GPUs, {expected} are configured"
        yield Finding(node, "GPU", Weight.bad, said, "leave it out and tell the site")
    for gpu in told["gpus"]:
        errors = gpu["ecc.errors.uncorrected.volatile.total"]
        if errors.isdecimal() and int(errors) > 0:
            said = f"GPU {gpu['index']} counts {errors} uncorrectable memory errors"
            yield Finding(node, "GPU", Weight.bad, said, "leave it out and tell the site: the GPU needs a reset")
        if gpu["clocks_throttle_reasons.hw_slowdown"] == "Active":
            said = f"GPU {gpu['index']} is slowed down by its hardware"
            yield Finding(node, "GPU", Weight.bad, said, "leave it out and tell the site: power or cooling")
        temperature = gpu["temperature.gpu"]
        if temperature.isdecimal() and int(temperature) >= _HOT_C:
            said = f"GPU {gpu['index']} has {temperature} degrees Celsius"
            yield Finding(node, "GPU", Weight.warning, said, "tell the site: cooling")


HERE = "(here)"
"""Ends the name of the machine where the doctor was called."""
_COLUMNS = ("node", "Python", "packages", "interface", "clock", "all-reduce", "GPUs", "nsys", "least free disk")


def report_lines(nodes: Sequence[str], found: Found, findings: Sequence[Finding]) -> list[str]:
    """A line a node with what was measured, then each finding with what to do, then the verdict."""
    rates = bandwidths({node: found[node] for node in nodes if found.get(node)})
    rows = [_COLUMNS, *(_row(node, found.get(node) or {}, rates) for node in nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        alike.setdefault((finding.weight, finding.check, finding.said, finding.remedy), []).append(finding.node)
    for (weight, check, said, do), which in alike.items():
        remedy = f" Do: {do}." if do else ""
        lines.append(f"{weight}: {', '.join(which)}: {check}: {said}.{remedy}")
    lines.append(_verdict(bad_nodes(findings, nodes), nodes))
    return [visible(line) for line in lines]


def _verdict(bad: Sequence[str], asked: Sequence[str]) -> str:
    if not bad:
        return "No node is bad."
    # The machine where the doctor was called is no node.
    nodes, of_the_job = ([each for each in names if not each.endswith(HERE)] for names in (bad, asked))
    if nodes and nodes == of_the_job and len(nodes) > 1:
        return f"Bad: {', '.join(bad)}. All nodes are, so it helps nothing to leave some out."
    remedy = f" Leave out: --exclude={','.join(nodes)}" if nodes else ""
    return f"Bad: {', '.join(bad)}.{remedy}"


def report_values(nodes: Sequence[str], found: Found, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same with all facts; packages as one hash a node."""
    facts = {node: dict(found.get(node) or {}) for node in nodes}
    for each in facts.values():
        if "packages" in each:
            each["packages"] = packages_hash(each["packages"])
    rates = bandwidths({node: found[node] for node in nodes if found.get(node)})
    return {
        "nodes": facts,
        "all_reduce_bytes_per_s": rates,
        "findings": [asdict(finding) for finding in findings],
        "bad_nodes": bad_nodes(findings, nodes),
        "good_nodes": [node for node in nodes if node not in bad_nodes(findings, nodes)],
        "fit": not any(finding.weight is Weight.bad for finding in findings),
    }


def _row(node: str, facts: Mapping[str, Any], rates: Mapping[str, float]) -> tuple[str, ...]:
    if not facts:
        return (node, *["-"] * (len(_COLUMNS) - 1))
    interface = facts.get("interfaces", {}).get(facts.get("interface")) or {}
    speed = f" {interface['mbit_per_s']} Mbit/s" if interface.get("mbit_per_s") else ""
    clock = facts.get("clock")
    told = facts.get("gpus", {"gpus": []})
    free = min((disk["free_bytes"] for disk in facts.get("disks", {}).values()), default=0)
    recorded = "no" if not facts.get("nsys") else "not recording" if facts.get("nsys_problem") else "found"
    if facts.get("nsys_checked") and recorded == "found":
        recorded = "records"
    return (
        node,
        facts["python"]["version"],
        packages_hash(facts["packages"])[:8],
        f"{facts.get('interface') or '-'}{speed}",
        f"{clock['offset_s'] * 1e3:+.2f} ± {clock['error_s'] * 1e3:.2f} ms" if clock else "-",
        f"{rates[node] / 1e6:.0f} MB/s" if node in rates else "-",
        str(len(told["gpus"])),
        recorded,
        f"{free / 1024**3:.0f} GiB",
    )
