"""The node behind a slow link, and transfer against what the network can do."""

from dataclasses import replace

import pandas as pd
import pytest
from simulated import simulate_run

from hpcmm.analysis import bottlenecks
from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.network import Standing, slow_link, standing
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.suggestions import suggest
from hpcmm.runs.links import LinkUse, Network

USUAL_MS = {"data": 1.0, "forward": 5.0, "backward": 10.0}


def run_of(ranks=4, ranks_per_node=2, receives=None, transfer_ms=400.0):
    """``receives``: how often each rank's background threads call recv."""
    shape = {"ranks": ranks, "ranks_per_node": ranks_per_node, "steps": 12, "transfer_ms": transfer_ms}
    traces = simulate_run(lambda _rank, _step, phase: USUAL_MS[phase], **shape)
    calls = receives or [50] * ranks
    columns = ["process_role", "thread_role", "function", "calls"]
    return [
        replace(trace, osrt=pd.DataFrame([("worker", "other", "recv", count)], columns=columns))
        for trace, count in zip(traces, calls, strict=True)
    ]


def link(mbit_per_s=0, held_back=0):
    return LinkUse("eth0", mbit_per_s, 1 << 30, 0, held_back, "tbf" if held_back else "mq")


def links(**of_nodes):
    return Network(of_nodes)


def test_of_two_nodes_the_one_whose_own_queue_holds_back_is_named() -> None:
    traces = run_of(receives=[40, 900, 50, 600])
    found = slow_link(traces, links(node1=link(), node2=link(held_back=5000)), is_ring=True)
    assert found.node == "node2"
    assert "slow from node1 to node2, from node2 to node1" in found.about


@pytest.mark.parametrize("sender", ["node1", "node2"])
def test_a_link_that_is_slow_in_one_direction_is_named_by_the_queue_of_its_sender(sender) -> None:
    traces = run_of(receives=[40, 900, 50, 60] if sender == "node2" else [40, 50, 60, 900])
    counted = {"node1": link(), "node2": link()} | {sender: link(held_back=5000)}
    assert slow_link(traces, Network(counted), is_ring=True).node == sender


def test_a_queue_that_holds_back_is_confirmed_by_a_weaker_sign_at_its_hop() -> None:
    traces = run_of(receives=[40, 110, 50, 100])
    assert slow_link(traces, links(node1=link(), node2=link(held_back=5000)), is_ring=True).node == "node2"
    assert slow_link(traces, links(node1=link(), node2=link()), is_ring=True) == ("", "")


def test_of_two_nodes_nothing_tells_which_if_no_counter_does() -> None:
    traces = run_of(receives=[40, 900, 50, 600])
    found = slow_link(traces, links(node1=link(), node2=link()), is_ring=True)
    assert found.node == ""
    assert "slow from node1 to node2, from node2 to node1" in found.about


def test_of_four_nodes_the_one_at_both_slow_hops_is_named_without_counters() -> None:
    traces = run_of(ranks_per_node=1, receives=[40, 900, 700, 50])
    assert slow_link(traces, Network(), is_ring=True).node == "node3"


def test_a_ring_is_not_guessed() -> None:
    traces = run_of(receives=[40, 900, 50, 60])
    assert slow_link(traces, Network(), is_ring=False) == ("", "")


def test_a_queue_far_from_the_slow_hop_is_not_the_reason() -> None:
    traces = run_of(ranks_per_node=1, receives=[900, 50, 40, 50])
    counted = {f"node{number}": link() for number in (1, 2, 4)} | {"node3": link(held_back=5000)}
    assert slow_link(traces, Network(counted), is_ring=True).node == ""


@pytest.mark.parametrize(
    "counted",
    [
        {"node1": link(), "node2": link()},
        {"node1": link(held_back=5000), "node2": link(held_back=4000)},
        {"node1": link(held_back=90), "node2": link()},
        {"node1": link(10_000), "node2": link(10_000)},
        {"node1": link(1_000), "node2": link(0)},
        {"node2": link(held_back=5000)},
        {},
    ],
)
def test_nobody_is_named_if_links_are_alike_or_little_is_known(counted) -> None:
    assert slow_link(run_of(receives=[1, 2, 3, 4]), Network(counted), is_ring=True) == ("", "")


SLOWER = {"node1": link(10_000), "node2": link(1_000)}
LOWER_RATE = ("node2", "eth0 of node2 runs at 1000 Mbit/s, the others' at 10000")


@pytest.mark.parametrize(
    "traces",
    [run_of(receives=[1, 2, 3, 4]), run_of(ranks=2, ranks_per_node=1, receives=[900, 900])],
    ids=["no receives are seen", "all hops are between the two nodes"],
)
def test_a_link_that_came_up_at_a_lower_rate_is_named(traces) -> None:
    assert slow_link(traces, Network(SLOWER), is_ring=True) == LOWER_RATE


def test_a_lower_rate_that_nobody_is_seen_to_feel_is_not_the_reason() -> None:
    assert slow_link(run_of(), Network(SLOWER), is_ring=True) == ("", "")
    few = run_of(receives=[1, 2, 3, 4])
    assert slow_link(few, Network(SLOWER), is_ring=True, is_bound_by_bandwidth=False) == ("", "")


def verdict(traces, network):
    rows = match_with_waits(traces, 100_000)
    return next(
        one
        for one in bottlenecks.find(bottlenecks.gather(traces, rows, step_times(traces), len(traces), None, network))
        if one.kind == "transfer"
    )


@pytest.mark.parametrize(
    ("mbit_per_s", "said", "is_slow"), [(10_000, "1.25 GB", True), (1_000, "125 MB", False), (200, "25 MB", False)]
)
def test_far_below_the_links_rate_the_network_is_slow_and_near_it_bytes_are_too_many(
    mbit_per_s: int, said: str, is_slow: bool
) -> None:
    """4 MB in 400 ms among four ranks are 15 MB/s, or 120 Mbit/s."""
    found = verdict(run_of(), links(node1=link(mbit_per_s), node2=link(mbit_per_s)))
    assert found.is_slow == is_slow
    assert ("far below what the network can do" in found.cause) == is_slow
    assert ("ip -s link" in suggest(found, {})) == is_slow
    assert f"of the {said}/s of the slowest link" in found.evidence


def test_the_remedy_is_the_check_of_the_nodes_if_it_can_tell_them_apart() -> None:
    found = verdict(run_of(ranks=8), Network(measured_bytes_per_s={f"node{number}": 1e9 for number in range(1, 5)}))
    assert found.is_slow
    config = {"cluster": {"name": "big", "executor": "slurm", "nodes": 4}}
    assert suggest(found, config) == "python -m hpcmm.doctor cluster=big --nodes 4"
    assert suggest(found, {"cluster": {**config["cluster"], "nodes": 2}}).startswith("srun ")


def test_what_the_check_measured_goes_before_the_links_rate() -> None:
    known = Network({f"node{each}": link(10_000) for each in (1, 2)}, {"node1": 16e6, "node2": 18e6})
    found = verdict(run_of(), known)
    assert not found.is_slow
    assert "of the 17 MB/s that the check before the run measured: the network is used well" in found.evidence


def test_nothing_is_judged_if_nothing_is_known() -> None:
    found = verdict(run_of(), Network())
    assert not found.is_slow
    assert "what the network can do is not known: python -m hpcmm.doctor cluster=... --nodes 2" in found.evidence
    assert "of two nodes nothing tells which one is slow" in found.evidence
    assert "of two nodes" not in verdict(run_of(ranks=8), Network()).evidence
    assert "no_sync" in suggest(found, {})


def test_ranks_of_one_node_use_no_network() -> None:
    traces = run_of(ranks_per_node=4)
    rows = match_with_waits(traces, 100_000)
    assert standing(rows, links(node1=link(10_000)), traces) == Standing(False, "")
    assert "not known" not in verdict(traces, Network()).evidence
