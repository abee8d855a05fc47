"""The doctor's last line: which nodes are bad, and the option that leaves them out."""

from __future__ import annotations

import pytest

from hpcmm.doctor.checks import HERE, Finding, Weight, report_lines


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ([], "No node is bad."),
        (["node2"], "Bad: node2. Leave out: --exclude=node2"),
        ([f"login {HERE}", "node2"], f"Bad: login {HERE}, node2. Leave out: --exclude=node2"),
        ([f"login {HERE}"], f"Bad: login {HERE}."),
        (["node1", "node2"], "Bad: node1, node2. All nodes are, so it helps nothing to leave some out."),
    ],
)
def test_only_nodes_can_be_left_out(bad: list[str], told: str):
    nodes = [f"login {HERE}", "node1", "node2"]
    findings = [Finding(node, "nsys", Weight.bad, "left no report") for node in bad]
    assert report_lines(nodes, dict.fromkeys(nodes), findings)[-1] == told


def test_what_several_nodes_have_is_one_line():
    nodes = ["node1", "node2"]
    findings = [Finding(node, "nsys", Weight.bad, "left no report", "mend it") for node in nodes]
    lines = report_lines(nodes, dict.fromkeys(nodes), findings)
    assert lines[-2] == "bad: node1, node2: nsys: left no report. Do: mend it."
