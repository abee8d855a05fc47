"""Longer work is named by each rank's own clock, whatever the clocks of the nodes are against one another."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sends_gpu import SendsRun, alike
from simulated import MS, make_trace, simulate_run
from test_bottlenecks import named, verdicts

from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.process_groups import chain_of_pairs
from hpcmm.analyze import analyze

USUAL_MS = {"data": 5.0, "forward": 30.0, "backward": 60.0}
VAGUE_NS = 400_000_000
"""Clocks that agree no better than this, as of nodes behind a slow link."""


def usual(_rank, _step, phase):
    return USUAL_MS[phase]


def longer(rank_named: int, phase_named: str, by_ms: float):
    def work(rank, _step, phase):
        return USUAL_MS[phase] + (by_ms if (rank, phase) == (rank_named, phase_named) else 0.0)

    return work


@pytest.mark.parametrize(("phase", "kind"), [("data", "data"), ("forward", "compute")])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_loads_longer_beside_a_slow_link_is_named_without_a_clock(rank, ranks_per_node, phase, kind):
    traces = simulate_run(
        longer(rank, phase, 60.0), ranks=4, ranks_per_node=ranks_per_node, steps=16, transfer_ms=800.0, noise_ms=3.0
    )
    findings = verdicts(traces, VAGUE_NS)
    assert [(one.kind, one.rank) for one in findings if one.kind != "imbalance"] == [("transfer", None), (kind, rank)]
    (found,) = [one for one in findings if one.rank is not None]
    assert found.phase == phase
    assert found.lost_s == pytest.approx(0.06, rel=0.1)
    assert "at most" in found.evidence
    assert found.confidence == "medium"


def test_with_good_clocks_a_tenth_of_the_transfer_is_not_asked_of_work():
    traces = simulate_run(longer(1, "data", 60.0), ranks=4, steps=16, transfer_ms=800.0, noise_ms=3.0)
    findings = verdicts(traces)
    (found,) = [one for one in findings if one.rank is not None]
    assert (found.kind, found.rank) == ("data", 1)
    assert found.lost_s == pytest.approx(0.06, rel=0.1)
    assert "at most" not in found.evidence


@pytest.mark.few(13)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise_ms", [0.0, 10.0, 40.0])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_nobody_is_named_if_nobody_works_longer(ranks, noise_ms, seed):
    traces = simulate_run(usual, ranks=ranks, steps=16, transfer_ms=800.0, noise_ms=noise_ms, seed=seed)
    assert named(verdicts(traces, VAGUE_NS)) == []


def test_work_that_costs_the_others_nothing_is_not_lost():
    """One rank loads longer and computes for a shorter time, so that it communicates for as long as the others."""

    def work(rank, _step, phase):
        return USUAL_MS[phase] + (0.0 if rank != 1 else {"data": 50.0, "forward": -25.0, "backward": -25.0}[phase])

    traces = simulate_run(work, ranks=4, steps=16, transfer_ms=800.0, noise_ms=0.5)
    assert named(verdicts(traces, VAGUE_NS)) == []


def test_a_node_whose_ranks_all_load_longer_is_one_finding():
    def work(rank, _step, phase):
        return USUAL_MS[phase] + (80.0 if rank in {4, 5} and phase == "data" else 0.0)

    traces = simulate_run(work, ranks=8, steps=16, transfer_ms=800.0, noise_ms=3.0)
    assert named(verdicts(traces, VAGUE_NS)) == [("data", None, "node3")]


def test_long_work_in_few_steps_alone_is_not_longer_work():
    def work(rank, step, phase):
        return USUAL_MS[phase] + (300.0 if (rank, phase) == (2, "data") and step % 4 == 0 else 0.0)

    traces = simulate_run(work, ranks=4, steps=16, transfer_ms=800.0, noise_ms=3.0)
    assert named(verdicts(traces, VAGUE_NS)) == []


def test_two_ranks_alone_cannot_tell_whose_work_is_the_usual():
    traces = simulate_run(longer(1, "data", 60.0), ranks=2, steps=16, transfer_ms=800.0, noise_ms=3.0)
    assert named(verdicts(traces, VAGUE_NS)) == []
    assert np.isfinite([one.lost_s for one in verdicts(traces, VAGUE_NS)]).all()


def test_of_two_ranks_one_is_named_if_it_works_longer_than_the_transfer_takes():
    traces = simulate_run(longer(1, "data", 60.0), ranks=2, ranks_per_node=1, steps=16, transfer_ms=8.0, noise_ms=3.0)
    (found,) = [one for one in verdicts(traces, VAGUE_NS) if one.rank is not None]
    assert (found.kind, found.rank, found.confidence) == ("data", 1, "medium")
    assert found.lost_s == pytest.approx(0.06, rel=0.1)


def test_waiting_for_whom_the_clocks_do_not_tell_is_in_the_row_that_blames_nobody():
    traces = simulate_run(longer(1, "data", 60.0), ranks=2, ranks_per_node=1, steps=16, transfer_ms=800.0, noise_ms=3.0)
    (rest,) = [one for one in verdicts(traces, VAGUE_NS) if one.kind == "imbalance"]
    assert rest.lost_s == pytest.approx(0.03, rel=0.1)
    assert "of it is not known, as the clocks agree within 0.4 s only" in rest.evidence


@pytest.mark.parametrize("steps", [5, 12])
def test_a_window_s_first_step_lacks_the_time_before_it_and_is_not_counted(steps):
    """Rank 1 loads between its steps, and the others wait for it in their next one; no communication is recorded."""
    traces = []
    for rank in range(2):
        before_ms, inside_ms = (100, 20) if rank == 1 else (1, 119)
        begins = [number * 120 + before_ms for number in range(steps)]
        segments = [(number, "forward", at * MS, (at + inside_ms) * MS) for number, at in enumerate(begins)]
        blocked = IntervalSet.union_of(*([(at + edge) * MS for at in begins] for edge in (20, inside_ms)))
        traces.append(replace(make_trace(rank, "node1", segments, []), is_warm=True, blocked=blocked))
    (found,) = [one for one in verdicts(traces) if one.rank is not None]
    assert (found.kind, found.rank) == ("between", 1)
    assert f"in {steps - 1} of {steps - 1} steps" in found.evidence
    assert "its work between steps takes 0.099 s" in found.evidence


def in_sends(rank_named: int, phases: tuple[str, ...], by_ms: float):
    """Milliseconds of a phase, of which one rank takes more."""
    return lambda rank, step, phase: alike(rank, step, phase) + by_ms * (rank == rank_named and phase in phases)


@pytest.mark.parametrize(
    ("is_pipeline", "rank", "phases", "by_ms", "lost_ms"),
    [
        (True, 0, ("forward", "backward"), 3.0, 24.0),
        (True, 2, ("forward", "backward"), 3.0, 24.0),
        (False, 3, ("forward", "backward"), 3.0, 24.0),
        (True, 0, ("data",), 20.0, 20.0),
        (False, 1, ("data",), 20.0, 20.0),
    ],
)
def test_the_rank_that_works_longest_is_named_though_sends_do_not_tell_whom_they_wait_for(
    is_pipeline, rank, phases, by_ms, lost_ms, tmp_path
):
    table = analyze(SendsRun(in_sends(rank, phases, by_ms), is_pipeline).write(tmp_path / "run")).bottlenecks()
    row = table.iloc[0]
    cause = "data loading" if phases == ("data",) else "computation"
    assert (row["cause"], row["rank"], row["confidence"]) == (cause, rank, "medium")
    assert row["lost_s_per_step"] * 1e3 == pytest.approx(lost_ms, rel=0.1)
    assert "do not tell who waits for whom" in row["evidence"]
    assert table["rank"].notna().sum() == 1
    assert table["step_share"].sum() <= 1.0


def test_what_a_stage_loads_while_the_pipeline_is_filled_keeps_nobody_waiting(tmp_path):
    table = analyze(SendsRun(in_sends(3, ("data",), 12.0)).write(tmp_path / "run")).bottlenecks()
    assert table["rank"].isna().all()


@pytest.mark.parametrize("is_pipeline", [True, False], ids=["stages", "experts"])
def test_nobody_is_named_if_gpus_that_exchange_by_sends_compute_alike(is_pipeline, tmp_path):
    table = analyze(SendsRun(is_pipeline=is_pipeline).write(tmp_path / "run")).bottlenecks()
    (row,) = [row for _, row in table.iterrows() if "sends and receives" in row["evidence"]]
    assert table["rank"].isna().all()
    assert row["confidence"] == "low"
    assert "none has more to do" in row["evidence"]
    assert row["cause"] == ("pipeline bubble" if is_pipeline else "communication, transfer or waiting")
    assert ("4 to 8 micro-batches" in row["evidence"]) is is_pipeline


def test_experts_that_are_busy_by_turns_name_nobody(tmp_path):
    run = SendsRun(lambda r, s, p: alike(r, s, p) * (3 if r == s % 4 and p != "data" else 1), is_pipeline=False)
    table = analyze(run.write(tmp_path / "run")).bottlenecks()
    assert table["rank"].isna().all()
    assert "by turns on 4 ranks" in table.iloc[0]["evidence"]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(0, 1), (1, 2), (2, 3)], (4, 2.0)),
        ([(0, 2), (2, 4), (1, 3), (3, 5)], (3, 2.0)),
        ([(0, 1), (1, 2), (2, 0)], (0, 0.0)),
        ([(0, 1), (2, 3)], (0, 0.0)),
        ([(0, 1, 2), (2, 3)], (0, 0.0)),
        ([(0, 1), (1, 2), (1, 3)], (0, 0.0)),
        ([(0, 1), (1, 2), (3, 4), (4, 5), (5, 3)], (0, 0.0)),
    ],
)
def test_pairs_of_ranks_make_chains_or_not(pairs, expected):
    rows = [
        (str(number), trace, step, f"{number} {step} {turn}")
        for number, pair in enumerate(pairs)
        for step in range(3)
        for turn in range(2)
        for trace in pair
    ]
    assert chain_of_pairs(pd.DataFrame(rows, columns=["group", "trace", "step", "instance"])) == expected


def test_who_comes_last_to_a_broadcast_whose_root_is_not_known_is_waited_for(tmp_path: Path) -> None:
    folder = SendsRun(in_sends(0, ("data",), 12.0), is_pipeline=False).write(tmp_path / "run")
    for report in folder.iterdir():
        with closing(sqlite3.connect(report)) as connection:
            connection.execute("UPDATE StringIds SET value = replace(value, 'SendRecv', 'Broadcast_RING_LL')")
            connection.execute("UPDATE NVTX_EVENTS SET text = 'ncclBroadcast' WHERE text LIKE 'nccl%'")
            connection.commit()
    analysis = analyze(folder)
    assert set(analysis.collectives()["op"]) == {"broadcast"}
    first = analysis.bottlenecks().iloc[0]
    assert (first["cause"], first["rank"]) == ("data loading", 0)
    assert not analysis.bottlenecks()["evidence"].str.contains("all ranks are there").any()
