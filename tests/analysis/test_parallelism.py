"""Pipelines made of arithmetic: stages, bubbles, and what is neither; what moves, and what bounds it."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated import MS, make_trace, simulate_program, simulate_run
from test_bottlenecks import balanced, verdicts

from hpcmm.analysis.collectives import bound_by, in_words, match_with_waits, start_up_s
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.parallelism import ACTIVATIONS, GRADIENTS, PARAMETERS, find_stages, what_moves
from hpcmm.analysis.suggestions import suggest
from hpcmm.annotate.schema import CollectiveName

GRADIENT_BYTES = 4_000_000


def pipeline(
    work_ms, *, node_of=lambda rank: f"node{rank // 2 + 1}", batches=4, steps=20, peers=True, slow=None, load_ms=0.0
):
    """Two stages of two ranks, GPipe: all forward passes, all backward passes, then each stage's own all-reduce.

    ``work_ms`` of a stage is for one forward pass; a backward pass takes as long. ``slow`` are ms that
    a rank takes longer. The first stage begins a step by loading for ``load_ms``.
    """
    dice = np.random.default_rng(0)
    at = np.zeros(4)
    segments, comm = [[] for _ in range(4)], [[] for _ in range(4)]
    slow = slow or {}

    def compute(rank: int) -> None:
        at[rank] += (work_ms[rank // 2] + slow.get(rank, 0.0)) * MS * dice.lognormal(0.0, 0.03)

    def exchange(sender: int, receiver: int, step: int) -> None:
        done = max(at[sender], at[receiver]) + 1.0 * MS
        for rank, op, peer in ((sender, "send", receiver), (receiver, "recv", sender)):
            comm[rank].append((op, "0", 0, 65_536, int(at[rank]), int(done), step, peer))
            at[rank] = done

    for step in range(steps):
        begin = at.copy()
        at[:2] += load_ms * MS
        for first in (0, 1):
            last = first + 2
            for _ in range(batches):
                compute(first)
                exchange(first, last, step)
                compute(last)
            for _ in range(batches):
                compute(last)
                exchange(last, first, step)
                compute(first)
        for stage in (0, 1):
            members = [2 * stage, 2 * stage + 1]
            done = max(at[members]) + 5 * MS
            for rank in members:
                comm[rank].append(
                    ("all_reduce", f"stage{stage}", step, GRADIENT_BYTES, int(at[rank]), int(done), step, -1)
                )
            at[members] = done
        done = max(at) + 1 * MS
        for rank in range(4):
            comm[rank].append(("all_reduce", "0", step + 1, 4, int(at[rank]), int(done), step, -1))
            loaded = int(begin[rank] + (load_ms * MS if rank < 2 else 0))
            segments[rank] += [(step, "data", int(begin[rank]), loaded)] if loaded > begin[rank] else []
            segments[rank].append((step, "other", loaded, int(done)))
        at[:] = done
    traces = []
    for rank in range(4):
        rows = [(op, seq, size, start, end, step, "other") for op, _, seq, size, start, end, step, _ in comm[rank]]
        trace = make_trace(rank, node_of(rank), segments[rank], rows)
        trace.collectives["group"] = [row[1] for row in comm[rank]]
        trace.collectives["occurrence"] = trace.collectives.groupby(["group", "op", "sequence"]).cumcount()
        if peers:
            trace.collectives["peer"] = [row[7] for row in comm[rank]]
        traces.append(trace)
    return traces


def by_cause(findings):
    return [(finding.cause, finding.rank, finding.node) for finding in findings]


@pytest.mark.parametrize("peers", [True, False], ids=["sends tell to whom", "sends do not"])
@pytest.mark.parametrize("heavy", [0, 1])
def test_a_heavier_stage_is_a_stage_and_not_a_slow_node(heavy: int, peers: bool) -> None:
    first = verdicts(pipeline([30.0, 20.0] if heavy == 0 else [20.0, 30.0], peers=peers))[0]
    assert first.cause.startswith(f"pipeline stage {heavy} is heavier than stage {1 - heavy} by ")
    assert (first.rank, first.node) == (None, "")
    assert float(first.cause.split()[-4]) == pytest.approx(80.0, rel=0.05), "8 passes of 10 ms"
    assert "runs this stage alone" in first.evidence
    assert f"of the work of stage {heavy} to stage {1 - heavy}" in suggest(first, {})


def test_data_loading_of_a_stage_is_no_work_that_could_move_to_another_one() -> None:
    found = verdicts(pipeline([20.0, 20.0], load_ms=60.0))
    causes = {finding.cause: finding for finding in found}
    assert not any("heavier" in cause for cause in causes)
    loading = causes["data loading of pipeline stage 0"]
    assert loading.lost_s == pytest.approx(0.060, rel=0.05)
    assert suggest(loading, {"train": {}, "data": {"num_workers": 0}}) == "data.num_workers=2"
    without = {finding.cause: finding for finding in verdicts(pipeline([20.0, 20.0]))}
    assert causes["pipeline bubble"].lost_s == pytest.approx(without["pipeline bubble"].lost_s, rel=0.1)


def test_a_stage_on_several_nodes_is_no_node_of_its_own() -> None:
    first = verdicts(pipeline([30.0, 20.0], node_of=lambda rank: f"node{rank % 2 + 1}"))[0]
    assert first.cause.startswith("pipeline stage 0 is heavier")
    assert "alone" not in first.evidence


def test_a_bubble_is_no_stages_fault() -> None:
    found = verdicts(pipeline([20.0, 20.0]))
    assert by_cause(found)[0] == ("pipeline bubble", None, "")
    assert not any(finding.blames for finding in found)
    assert "as many micro-batches leave 20% idle at best, and " in found[0].evidence
    measured = float(re.search(r"(\d+)% of a step were measured", found[0].evidence)[1]) / 100
    assert measured == pytest.approx(found[0].lost_s / 0.2, abs=0.1)
    assert 0.15 < measured < 0.4
    assert "micro-batches" in suggest(found[0], {})


def test_shapes_and_labels_beside_activations_are_no_micro_batches() -> None:
    with_shapes = []
    for trace in pipeline([20.0, 20.0]):
        sends = trace.collectives[trace.collectives["op"].isin(["send", "recv"])]
        small = sends.assign(bytes=16, start_ns=sends["start_ns"] - 2, end_ns=sends["start_ns"] - 1)
        joined = pd.concat([trace.collectives, small]).sort_values("start_ns", ignore_index=True)
        with_shapes.append(replace(trace, collectives=joined))
    bubble = next(finding for finding in verdicts(with_shapes) if finding.kind == "bubble")
    assert "receives 4 times a step: as many micro-batches leave 20% idle" in bubble.evidence


def test_a_slow_rank_of_a_stage_is_that_rank() -> None:
    found = verdicts(pipeline([20.0, 20.0], slow={1: 15.0}))
    assert [finding.rank for finding in found if finding.rank is not None] == [1]
    assert not any("heavier" in finding.cause for finding in found)


def test_the_rows_of_a_pipeline_add_up_to_no_more_than_the_step() -> None:
    for work in ([20.0, 20.0], [40.0, 10.0], [10.0, 40.0]):
        found = verdicts(pipeline(work))
        assert sum(finding.lost_s for finding in found) < 0.5


def test_the_order_of_the_stages_is_that_of_the_first_send() -> None:
    traces = pipeline([20.0, 30.0])
    assert find_stages(match_with_waits(traces, 1000.0), traces) == ((0, 1), (2, 3))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_is_no_pipeline(ranks: int) -> None:
    traces = simulate_run(balanced, ranks=ranks)
    with_ring = []
    for trace in traces:
        rows = trace.collectives.assign(peer=-1)
        ring = [
            rows.assign(op=op, bytes=65_536, peer=(trace.rank + way) % ranks, start_ns=rows["start_ns"] - after)
            for op, way, after in (("send", 1, 5000 - trace.rank % 2 * 2000), ("recv", -1, 4000))
        ]
        joined = pd.concat([rows, *ring]).sort_values("start_ns", ignore_index=True)
        with_ring.append(replace(trace, collectives=joined))
    assert find_stages(match_with_waits(with_ring, 1000.0), with_ring) == ()


def moved(ops):
    """What moves in a run whose rank 0 and 1 do ``ops``: (op, phase, bytes) in each step."""
    traces = simulate_run(balanced, ranks=2, steps=4)
    made = []
    for trace in traces:
        base = trace.collectives
        frames = [
            base.assign(op=op, phase=phase, bytes=size, sequence=base["sequence"] + 10 * at)
            for at, (op, phase, size) in enumerate(ops)
        ]
        made.append(replace(trace, collectives=pd.concat(frames, ignore_index=True)))
    return set(what_moves(match_with_waits(made, 1000.0), ()))


MB = 1_000_000


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ([("all_reduce", "backward", MB)], GRADIENTS),
        ([("reduce_scatter", "backward", MB), ("all_gather", "optimizer", MB)], GRADIENTS),
        (
            [("all_gather", "forward", MB), ("all_gather", "backward", MB), ("reduce_scatter", "backward", MB)],
            PARAMETERS,
        ),
        ([("all_gather", "other", MB), ("all_gather", "other", MB), ("reduce_scatter", "other", MB)], PARAMETERS),
        ([("all_gather", "other", MB), ("reduce_scatter", "backward", MB)], PARAMETERS),
        ([("all_gather", "other", MB), ("all_reduce", "backward", MB)], GRADIENTS),
        ([("all_reduce", "forward", MB), ("all_reduce", "backward", MB)], ACTIVATIONS),
        (
            [("all_gather", "forward", MB), ("reduce_scatter", "forward", MB), ("reduce_scatter", "backward", MB)],
            ACTIVATIONS,
        ),
        (
            [
                *[("reduce_scatter", "forward", MB)] * 2,
                *[("all_gather", "forward", MB), ("all_gather", "forward", 100 * MB)],
                *[("all_gather", "backward", MB), ("reduce_scatter", "backward", MB)],
            ],
            ACTIVATIONS,
        ),
        ([("all_reduce", "other", MB)], ""),
        ([("all_reduce", "backward", 84)], GRADIENTS),
        ([("broadcast", "forward", MB)], "module buffers"),
        ([("all_reduce", "forward", 4)], "small messages"),
        ([("all_to_all", "forward", MB)], "tokens of experts or sequence parts"),
    ],
)
def test_operations_and_phases_tell_what_moves(ops, expected: str) -> None:
    assert moved(ops) == {expected}


def messages(sizes, start_us: float, bytes_per_us: float):
    """Matched messages that take a start-up time and one for their bytes."""
    traces = simulate_run(balanced, ranks=2, steps=len(sizes))
    made = []
    for trace in traces:
        rows = trace.collectives.assign(bytes=sizes)
        begin = np.maximum(rows["end_ns"] - 4 * MS, 0)
        length = (start_us + np.array(sizes) / bytes_per_us) * 1000
        rows = rows.assign(start_ns=begin, end_ns=(begin + length).astype(np.int64))
        made.append(replace(trace, collectives=rows, blocked=IntervalSet.union_of(rows["start_ns"], rows["end_ns"])))
    return match_with_waits(made, 1000.0)


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [
        ([4] * 20, "latency"),
        ([4] * 8 + [20_000] * 20, "latency"),
        ([4] * 8 + [20_000_000] * 20, "bandwidth"),
        ([20_000] * 20, "latency"),
        ([200_000_000] * 20, "bandwidth"),
        ([300_000] * 20, ""),
    ],
)
def test_latency_and_bandwidth_are_told_apart(sizes, bound: str) -> None:
    rows = messages(sizes, start_us=50.0, bytes_per_us=1000.0)
    bulk = rows[rows["bytes"] > 4] if max(sizes) > 4 else rows
    assert bound_by(bulk, start_up_s(rows)) == bound


def test_messages_that_start_up_longer_than_they_move_tell_of_no_bandwidth() -> None:
    assert "bus bandwidth" not in in_words(messages([4_100] * 20, 500.0, 1000.0), 40)
    assert "bus bandwidth" in in_words(messages([4_100] * 10 + [2_000_000] * 11, 500.0, 1000.0), 42)


def test_messages_of_few_steps_are_no_part_of_a_message() -> None:
    rows = messages([4_100] * 20, 500.0, 1000.0)
    assert " a step and rank in 1 message, " in in_words(rows, len(rows))
    assert " a step and rank in a message every 4 steps, " in in_words(rows, 4 * len(rows))


def test_a_script_is_advised_no_key_for_a_transfer_and_a_workload_is() -> None:
    finding = verdicts(simulate_run(balanced, transfer_ms=300.0))[0]
    assert (finding.kind, finding.moves, finding.bound) == ("transfer", GRADIENTS, "bandwidth")
    assert finding.cause == "communication transfer of gradients, bound by bandwidth"
    assert "no_sync" in suggest(finding, {"cluster": {}})
    assert suggest(finding, {"train": {}}) == "train.gradient_accumulation_steps=2"
    latency = replace(finding, bound="latency")
    single = replace(latency, is_single=True)
    assert "larger batch" in suggest(single, {"cluster": {}})
    assert suggest(single, {"train": {}}) == "train.gradient_accumulation_steps=2"
    assert "bucket" not in suggest(replace(single, moves="small messages"), {})

    assert "bucket" in suggest(latency, {"cluster": {}})
    own = {"zero_stage": 1, "reduce_bucket_size": 5}
    assert suggest(latency, {"parallel": own}) == "parallel.reduce_bucket_size=20"
    own["reduce_bucket_size"] = 10**12  # which holds all of them already
    assert suggest(latency, {"parallel": own}) == "train.gradient_accumulation_steps=2"
    sharded = replace(finding, moves=PARAMETERS)
    assert "reshard_after_forward" in suggest(sharded, {"train": {}})


def test_what_is_advised_for_a_transfer_fits_the_stage_of_zero() -> None:
    finding = verdicts(simulate_run(balanced, transfer_ms=300.0))[0]
    # From stage 2 on each micro-batch has its own exchange of gradients, so that more of them save none.
    advised = [
        suggest(finding, {"train": {"micro_batch_size": 4}, "parallel": {"zero_stage": zero}}) for zero in (1, 2)
    ]
    assert advised == ["train.gradient_accumulation_steps=2", "train.micro_batch_size=8"]
    sharded = replace(finding, moves=PARAMETERS)
    assert suggest(sharded, {"train": {}, "parallel": {"zero_stage": 3}}) == "parallel.zero_stage=2"
    for moved in (finding, sharded, replace(finding, bound="latency"), replace(sharded, bound="latency")):
        told = suggest(moved, {"cluster": {}}, framework="deepspeed")
        assert not re.search("no_sync|compress_hook|reshard_after_forward|fully_shard|bucket_cap_mb", told)
        assert re.search("stage3_|train_micro_batch_size_per_gpu|reduce_bucket_size", told)


@pytest.mark.few(5)
@pytest.mark.parametrize("bound", ["", "latency", "bandwidth"])
@pytest.mark.parametrize("moves", [ACTIVATIONS, PARAMETERS, "pipeline sends", "tokens of experts or sequence parts"])
def test_groups_that_lie_within_a_node_are_not_advised_to(moves, bound: str) -> None:
    finding = replace(verdicts(simulate_run(balanced, transfer_ms=300.0))[0], moves=moves, bound=bound)
    assert "within a node" not in suggest(replace(finding, is_in_node=True), {})


def test_whether_groups_lie_within_a_node_is_told_to_the_advice() -> None:
    assert not verdicts(simulate_run(balanced, transfer_ms=300.0))[0].is_in_node


def test_ranks_that_wait_for_a_broadcasts_root_wait_for_that_rank() -> None:
    def work(rank, step, phase):
        return balanced(rank, step, phase) + 200.0 * (rank == 0 and phase == "forward")

    everyone = lambda _rank: "0"  # noqa: E731
    traces = simulate_program(
        ["forward", "backward", ("backward", everyone)],
        lambda r, s, p: work(r, s, p) if p != "between" else 0.0,
        ranks=4,
    )
    told = [replace(t, collectives=t.collectives.assign(op="broadcast", peer=0)) for t in traces]
    first = verdicts(told)[0]
    assert (first.kind, first.rank) == ("compute", 0)
    other_root = [replace(t, collectives=t.collectives.assign(op="broadcast", peer=2)) for t in traces]
    assert verdicts(other_root)[0].kind == "transfer"


def test_a_sends_name_tells_its_peer() -> None:
    assert CollectiveName("send", "0", 1, 2, 3).format() == "send group=0 seq=1 bytes=2 peer=3"
