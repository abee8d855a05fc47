"""Expert imbalance: whose experts got more tokens, and what only looks like it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated import MS, make_trace
from test_bottlenecks import verdicts

from hpcmm.analysis.bottlenecks import gather
from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.experts import expert_groups
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.suggestions import suggest
from hpcmm.annotate.schema import GroupMark

RANKS, STEPS, TOKEN_BYTES, EACH = 4, 20, 2_000, 1_000
EQUAL = np.ones(RANKS)
"""Share of the tokens that the experts of each rank get, times the ranks."""


def moe(share, *, slow=None, dense_ms=10.0, told=False, equal_parts=False, seed=0):
    """A step: dense layers, then twice (forward, backward) tokens to experts, their work, tokens back; gradients.

    ``share(step)``: of each rank. ``slow``: how many times as long a rank computes, by rank. ``equal_parts``: all ranks
    exchange as much, as those that divide sequences do, whatever they compute.
    """
    dice = np.random.default_rng(seed)
    at = np.zeros(RANKS)
    segments, comm, marks = ([[] for _ in range(RANKS)] for _ in range(3))
    slow = slow or {}
    sequence = 0

    def compute(length_ms) -> None:
        for rank in range(RANKS):
            at[rank] += length_ms[rank] * slow.get(rank, 1.0) * dice.lognormal(0.0, 0.03) * MS

    def together(op, group, sizes, step, phase) -> None:
        nonlocal sequence
        sequence += 1
        done = at.max() + 1.0 * MS
        for rank in range(RANKS):
            sent, received = sizes[rank]
            uneven = (
                (sent, received)
                if any(a != b for a, b in sizes) and op == "all_to_all" and sent != received
                else (-1, -1)
            )
            comm[rank].append(
                (op, group, sequence, max(sent, received), int(at[rank]), int(done), step, phase, *uneven)
            )
        at[:] = done

    for step in range(STEPS):
        load = np.full(RANKS, EACH) if equal_parts else (share(step) * EACH).astype(int)
        own = [(EACH * TOKEN_BYTES, int(n) * TOKEN_BYTES) for n in load]
        back = [(b, a) for a, b in own]
        for phase in ("forward", "backward"):
            begin = at.copy()
            compute([dense_ms] * RANKS)
            together("all_to_all", "e", own, step, phase)
            compute(20.0 * share(step))
            together("all_to_all", "e", back, step, phase)
            if phase == "backward":
                together("all_reduce", "0", [(4_000_000, 4_000_000)] * RANKS, step, phase)
            for rank in range(RANKS):
                segments[rank].append((step, phase, int(begin[rank]), int(at[rank])))
                marks[rank].append((step, float(load[rank])))
    traces = []
    for rank in range(RANKS):
        rows = [
            (op, seq, size, start, end, step, phase) for op, _, seq, size, start, end, step, phase, *_ in comm[rank]
        ]
        trace = make_trace(rank, f"node{rank // 2 + 1}", segments[rank], rows)
        for name, column in (("group", 1), ("sent", 8), ("received", 9)):
            trace.collectives[name] = [row[column] for row in comm[rank]]
        trace = replace(
            trace, groups={"e": GroupMark("e", "sequence" if equal_parts else "expert", tuple(range(RANKS)))}
        )
        traces.append(
            replace(trace, expert_tokens=pd.DataFrame(marks[rank], columns=["step", "tokens"])) if told else trace
        )
    return traces


def hot(rank, times):
    """The experts of one rank get so many times the mean, and the others share the rest."""
    share = np.full(RANKS, (RANKS - times) / (RANKS - 1))
    share[rank] = times
    return lambda _step: share


def test_the_rank_whose_experts_get_more_tokens_is_named() -> None:
    first = verdicts(moe(hot(2, 2.0)))[0]
    assert (first.kind, first.cause, first.rank, first.confidence) == ("experts", "expert imbalance", 2, "high")
    assert "the experts of rank 2 get 2.00 times the mean of the group of ranks 0-3 (bytes of" in first.evidence
    # Of 40 ms that the hot rank's experts take, the others' take 13; and that twice.
    assert first.lost_s == pytest.approx(2 * 0.0267, rel=0.15)
    assert "router_aux_loss_coef" in suggest(first, {"train": {}})


def test_tokens_that_the_program_told_are_certain() -> None:
    first = verdicts(moe(hot(1, 1.5), told=True))[0]
    assert (first.kind, first.rank) == ("experts", 1)
    assert "1.50 times the mean of the group of ranks 0-3 (tokens that the program told)" in first.evidence


def test_a_slow_rank_is_slow_whatever_its_experts_get() -> None:
    even = verdicts(moe(lambda _step: EQUAL, slow={3: 2.5}))[0]
    assert (even.kind, even.rank) == ("compute", 3)
    more = verdicts(moe(hot(3, 1.2), slow={3: 2.5}))[0]
    assert (more.kind, more.rank) == ("compute", 3)


def test_equal_parts_of_sequences_are_no_experts() -> None:
    found = verdicts(moe(hot(2, 2.0), equal_parts=True))
    assert found[0].rank == 2
    assert not any(finding.kind == "experts" for finding in found)


def test_loads_that_differ_by_turns_blame_no_rank() -> None:
    dice = np.random.default_rng(1)
    shares = [4 * dice.dirichlet([3.0] * RANKS) for _ in range(STEPS)]
    found = verdicts(moe(lambda step: shares[step]))
    mine = [finding for finding in found if finding.kind == "experts"]
    assert [(finding.rank, finding.cause) for finding in mine] == [(None, "expert imbalance")]
    assert found[0] is mine[0]
    assert "computation follows the load" in mine[0].evidence
    assert sum(finding.lost_s for finding in found) < 0.25, "no more than a step"


def test_balanced_experts_are_no_finding() -> None:
    assert not any(finding.kind == "experts" for finding in verdicts(moe(lambda _step: EQUAL)))


def test_the_load_is_what_lies_between_the_exchanges_and_not_what_is_exchanged_most() -> None:
    traces = moe(hot(0, 2.5))
    rows = match_with_waits(traces, 1000.0)
    (group,) = expert_groups(gather(traces, rows, step_times(traces), RANKS))
    assert group.times_mean() == pytest.approx([2.5, 0.5, 0.5, 0.5])
    assert group.unit == "bytes"
    assert group.busy_s.mean(axis=0)[0] == pytest.approx(2 * 0.050, rel=0.1), "the experts' own time, in both passes"
