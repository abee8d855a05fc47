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
    ],
)
def test_only_nodes_can_be_left_out(bad: list[str], told: str):
    nodes = [f"login {HERE}", "node1", "node2"]
    findings = [Finding(node, "nsys", Weight.bad, "left no report") for node in bad]
    assert report_lines(nodes, dict.fromkeys(nodes), findings)[-1] == told
