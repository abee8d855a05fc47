"""The doctor's word for a terminal and for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hpcmm.doctor.checks import Finding, Found, Weight, bad_nodes, bandwidths, packages_hash
from hpcmm.text import visible

HERE = "(here)"
"""Ends the name of the machine where the doctor was called."""
_COLUMNS = ("node", "Python", "packages", "interface", "clock", "all-reduce", "GPUs", "nsys", "least free disk")


def report_lines(nodes: Sequence[str], found: Found, findings: Sequence[Finding]) -> list[str]:
    """A line a node with what was measured, then each finding with what to do, then the verdict."""
    rates = bandwidths({node: found[node] for node in nodes if found.get(node)})
    rows = [_COLUMNS, *(_row(node, found.get(node) or {}, rates) for node in nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for finding in findings:
        cure = f" Do: {finding.cure}." if finding.cure else ""
        lines.append(f"{finding.weight}: {finding.node}: {finding.check}: {finding.said}.{cure}")
    bad = bad_nodes(findings, nodes)
    lines.append(_verdict(bad))
    return [visible(line) for line in lines]


def _verdict(bad: Sequence[str]) -> str:
    if not bad:
        return "No node is bad."
    nodes = [node for node in bad if not node.endswith(HERE)]  # the machine where the doctor was called is no node
    cure = f" Leave out: --exclude={','.join(nodes)}" if nodes else ""
    return f"Bad: {', '.join(bad)}.{cure}"


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
