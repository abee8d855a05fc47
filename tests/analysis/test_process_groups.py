"""Groups that the ranks have named: stages, what moves, and how tables and sentences speak of them."""

from dataclasses import replace

import pytest
from simulated import simulate_program, simulate_run
from test_bottlenecks import balanced, verdicts
from test_parallelism import pipeline

from hpcmm.analysis import parallelism, process_groups
from hpcmm.analysis.collectives import bytes_table, collectives_table, match_with_waits
from hpcmm.annotate.schema import GroupMark


def told(traces, *marks):
    """``traces`` whose ranks told what their groups are for: (group, name, ranks)."""
    named = [GroupMark(*mark) for mark in marks]
    return [replace(t, groups={mark.group: mark for mark in named if t.rank in mark.ranks}) for t in traces]


def work(rank, step, phase):
    return 0.0 if phase == "between" else balanced(rank, step, phase)


def tensor_and_data(slow=None):
    """Four ranks: pairs reduce in forward, and rows across the pairs in backward."""
    program = [
        "forward",
        ("forward", lambda rank: f"t{rank // 2}"),
        "backward",
        ("backward", lambda rank: f"d{rank % 2}"),
    ]
    traces = simulate_program(
        program, lambda r, s, p: work(r, s, p) + 80.0 * (r == slow and p == "forward"), ranks=4, steps=20
    )
    marks = [(f"t{n}", "tensor", (2 * n, 2 * n + 1)) for n in (0, 1)] + [(f"d{n}", "data", (n, n + 2)) for n in (0, 1)]
    return told(traces, *marks)


def exchanged(traces):
    """The table ``comm_bytes``."""
    rows = parallelism.with_axes(match_with_waits(traces, 1000.0), traces)
    return bytes_table(collectives_table(rows), warmup=0)


def test_tables_say_what_each_group_is_for_and_who_is_in_it() -> None:
    rows = match_with_waits(tensor_and_data(), 1000.0)
    table = collectives_table(rows)
    found = table[["group", "axis", "axis_basis", "group_ranks"]].drop_duplicates().sort_values("group")
    assert found.to_numpy().tolist() == [
        ["d0", "data", "told", "0,2"],
        ["d1", "data", "told", "1,3"],
        ["t0", "tensor", "told", "0-1"],
        ["t1", "tensor", "told", "2-3"],
    ]
    assert set(process_groups.labels(rows)) >= {"tensor group of ranks 0-1", "data group of ranks 1,3"}


def test_the_mesh_follows_from_the_groups() -> None:
    assert process_groups.mesh(tensor_and_data()) == {"data": 2, "tensor": 2}
    assert process_groups.mesh(simulate_run(balanced, ranks=2)) == {}


def test_the_run_directory_tells_what_a_report_does_not() -> None:
    trace = simulate_run(balanced, ranks=2)[0]
    noted = {0: {"0": GroupMark("0", "tensor", (0, 1))}}
    assert process_groups.with_record(trace, noted).groups == noted[0]
    named = told([trace], ("0", "data", (0, 1)))[0]
    assert process_groups.with_record(named, noted).groups["0"].name == "data"


def test_a_late_rank_is_late_in_a_group_that_is_named() -> None:
    first = verdicts(tensor_and_data(slow=3))[0]
    assert first.rank == 3
    assert "they wait in the tensor group of ranks 2-3" in first.evidence


def test_a_groups_name_goes_before_what_its_bytes_look_like() -> None:
    traces = told(simulate_run(balanced, ranks=2, transfer_ms=300.0), ("0", "tensor", (0, 1)))
    first = verdicts(traces)[0]
    assert first.cause.startswith("communication transfer of activations")
    assert "tensor group of all 2 ranks" in first.evidence


@pytest.mark.parametrize(
    ("name", "op", "moves"),
    [
        ("sequence", "all_to_all", "sequence parts"),
        ("expert", "all_to_all", "tokens of experts"),
        ("replicas of experts", "all_reduce", "gradients"),
        ("data x sequence", "all_reduce", "gradients"),
        ("data", "all_reduce", "gradients"),
        ("rows of a grid", "all_reduce", "gradients"),
    ],
)
def test_what_moves_follows_from_the_name(name: str, op: str, moves: str) -> None:
    traces = told(simulate_run(balanced, ranks=2, steps=4), ("0", name, (0, 1)))
    traces = [replace(t, collectives=t.collectives.assign(op=op)) for t in traces]
    assert set(parallelism.what_moves(match_with_waits(traces, 1000.0), ())) == {moves}


def test_unequal_parts_tell_experts_from_sequence_parts() -> None:
    traces = simulate_run(balanced, ranks=2, steps=4)
    equal = [replace(t, collectives=t.collectives.assign(op="all_to_all")) for t in traces]
    uneven = [replace(t, collectives=t.collectives.assign(sent=4_000_000, received=3_000_000)) for t in equal]
    assert set(parallelism.what_moves(match_with_waits(equal, 1e3), ())) == {"tokens of experts or sequence parts"}
    assert set(parallelism.what_moves(match_with_waits(uneven, 1e3), ())) == {"tokens of experts"}


def test_stages_are_those_that_are_named_also_if_sends_tell_nothing() -> None:
    traces = told(pipeline([20.0, 30.0], peers=False), ("p0", "pipeline", (0, 2)), ("p1", "pipeline", (1, 3)))
    rows = match_with_waits(traces, 1000.0)
    assert parallelism.find_stages(rows, traces) == ((0, 1), (2, 3))
    # Ranks without a report leave the others in their stages.
    assert parallelism.find_stages(rows, [traces[0], traces[3]]) == ((0,), (1,))


def test_a_named_ring_is_no_pipeline() -> None:
    traces = told(pipeline([20.0, 30.0]), ("0", "sequence", (0, 1, 2, 3)))
    rows = match_with_waits(traces, 1000.0)
    assert parallelism.find_stages(rows, traces) == ()
    moves = parallelism.what_moves(rows, ())
    assert set(moves[rows["op"].isin(["send", "recv"])]) == {"sequence parts"}


def test_a_slow_rank_is_told_with_its_stage() -> None:
    traces = told(pipeline([20.0, 20.0], slow={3: 15.0}), ("p0", "pipeline", (0, 2)), ("p1", "pipeline", (1, 3)))
    late = next(finding for finding in verdicts(traces) if finding.rank == 3)
    assert "rank 3 is in pipeline stage 1" in late.evidence


def test_bytes_of_a_step_are_those_of_the_textbook() -> None:
    traces = tensor_and_data()
    table = exchanged(traces)
    assert len(table) == 4 * 20 * 2, "a row a rank, step and group"
    row = table[(table["axis"] == "data") & (table["step"] == 3) & (table["rank"] == 2)].iloc[0]
    assert (row["op"], row["messages"], row["bytes"], row["warmup"]) == ("all_reduce", 1, 4_000_000, False)
    assert row["bus_bytes"] == pytest.approx(4_000_000 * 2 * (2 - 1) / 2)


def test_the_size_of_a_group_counts_ranks_without_a_report() -> None:
    traces = told(simulate_run(balanced, ranks=2), ("0", "data", (0, 1, 2, 3)))
    table = exchanged(traces)
    assert (table["bus_bytes"] / table["bytes"]).unique() == pytest.approx([1.5])
    assert set(table["group_ranks"]) == {"0-3"}


def test_groups_without_a_name_are_named_by_what_they_exchange() -> None:
    traces = simulate_run(balanced, ranks=2, steps=4)
    seen = parallelism.with_axes(match_with_waits(traces, 1000.0), traces)
    assert set(zip(seen["axis"], seen["axis_basis"], strict=True)) == {("data", "seen")}


def test_a_run_that_exchanges_nothing_has_an_empty_table() -> None:
    alone = [replace(t, collectives=t.collectives.iloc[:0]) for t in simulate_run(balanced, ranks=2, steps=4)]
    assert exchanged(alone).empty
