import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, make_trace, simulate_run

from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.pop_metrics import EFFICIENCIES, Reference, efficiency, samples_per_step
from hpcmm.analysis.time_tables import phases_table


def table_of(traces, reference=None, samples=None) -> pd.DataFrame:
    rows = match_with_waits(traces, 1000.0)
    steps = step_times(traces)
    return efficiency(phases_table(traces, rows, steps.warmup_number), steps, reference, samples)


def hand_worked() -> list:
    """Two nodes of two ranks; useful 40, 60 | 80, 80 ms, then an all-reduce that takes 20 ms after the last arrival."""
    traces = []
    for rank, useful in enumerate((40, 60, 80, 80)):
        segments, comm = [], []
        for step in range(3):
            begin = step * 100 * MS
            segments.append((step, "forward", begin, begin + 100 * MS))
            comm.append(("all_reduce", step, 8, begin + useful * MS, begin + 100 * MS, step, "forward"))
        traces.append(make_trace(rank, f"node{rank // 2 + 1}", segments, comm))
    return traces


def test_the_hand_worked_example() -> None:
    table = table_of(hand_worked())
    assert table["scope"].tolist() == ["run", "warmup", "step", "step", "phase"]
    run = table.iloc[0]
    assert (run["ranks"], run["nodes"]) == (4, 2)
    assert run["runtime_s"] == pytest.approx(0.2)
    assert run["useful_mean_s"] == pytest.approx(2 * 0.065)
    assert run["useful_max_s"] == pytest.approx(2 * 0.080)
    assert run["parallel_efficiency"] == pytest.approx(0.65)
    assert run["load_balance"] == pytest.approx(65 / 80)
    assert run["load_balance_in_node"] == pytest.approx(1.0)
    assert run["load_balance_between_nodes"] == pytest.approx(65 / 80)
    assert run["communication_efficiency"] == pytest.approx(0.8)
    # The slowest rank waits for nobody: the runtime without transfer is its own 80 ms, so nothing is serialised.
    assert run["serialisation_efficiency"] == pytest.approx(1.0)
    assert run["transfer_efficiency"] == pytest.approx(0.8)
    assert np.isnan(run["computation_scaling"])


def test_dependencies_between_balanced_ranks_are_serialisation() -> None:
    """Each rank computes 50 ms, one before and the other after the all-reduces: nobody is unbalanced, all wait."""
    traces = []
    for rank in range(2):
        segments, comm = [], []
        for step in range(3):
            begin = step * 100 * MS
            segments.append((step, "forward", begin, begin + 100 * MS))
            half, end = begin + 50 * MS, begin + 100 * MS
            first, second = (begin, end) if rank == 0 else (half, half)
            comm.append(("all_reduce", 2 * step, 8, first, half + 1, step, "forward"))
            comm.append(("all_reduce", 2 * step + 1, 8, second, end + 1, step, "forward"))
        traces.append(make_trace(rank, "node1", segments, comm))
    run = table_of(traces).iloc[0]
    assert run["load_balance"] == pytest.approx(1.0)
    assert run["serialisation_efficiency"] == pytest.approx(0.5)
    assert run["transfer_efficiency"] == pytest.approx(1.0)


def test_a_reference_gives_scaling_and_global_efficiency() -> None:
    small, large = (
        table_of(simulate_run(lambda *_: 20.0, ranks=2, noise_ms=0)),
        simulate_run(lambda *_: 12.0, ranks=4, noise_ms=0),
    )
    reference = Reference.of(small, None)
    table = table_of(large, reference)
    for _, row in table[table["scope"] != "warmup"].iterrows():
        assert row["computation_scaling"] == pytest.approx(2 * 20 / (4 * 12), rel=1e-6)
        assert row["global_efficiency"] == pytest.approx(row["parallel_efficiency"] * row["computation_scaling"])
    assert table.loc[table["scope"] == "warmup", "computation_scaling"].isna().all()


def test_scaling_is_by_sample_where_both_runs_tell_their_batch() -> None:
    config = {
        "cluster": {"nodes": 2, "ranks_per_node": 2},
        "train": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    }
    assert samples_per_step(config) == 32
    assert samples_per_step({"cluster": {"nodes": 2}, "train": "?"}) is None
    assert samples_per_step(config | {"train": {"micro_batch_size": True}}) is None
    weak = simulate_run(lambda *_: 20.0, ranks=4, noise_ms=0)
    reference = Reference.of(table_of(simulate_run(lambda *_: 20.0, ranks=2, noise_ms=0)), 16)
    assert table_of(weak, reference, 32).iloc[0]["computation_scaling"] == pytest.approx(1.0)


def test_no_steps_no_rows() -> None:
    assert table_of([make_trace(0, "n", [], [])]).empty


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(2, 6),
    st.floats(0.0, 30.0),
    st.floats(0.0, 20.0),
    st.integers(0, 1000),
)
def test_the_identities_hold_and_everything_lies_between_0_and_1(ranks, per_node, steps, transfer, noise, seed) -> None:
    random = np.random.default_rng(seed)
    work = random.uniform(0, 40, size=(ranks, 3))
    order = {"data": 0, "forward": 1, "backward": 2}
    traces = simulate_run(
        lambda rank, _step, phase: work[rank, order[phase]],
        ranks=ranks,
        ranks_per_node=per_node,
        steps=steps,
        transfer_ms=transfer,
        noise_ms=noise,
        seed=seed,
    )
    table = table_of(traces)
    assert set(table["scope"]) == {"run", "warmup", "step", "phase"}
    assert ((table[EFFICIENCIES] > 0) & (table[EFFICIENCIES] <= 1)).all(axis=None)
    for whole, first, second in (
        ("parallel_efficiency", "load_balance", "communication_efficiency"),
        ("communication_efficiency", "serialisation_efficiency", "transfer_efficiency"),
        ("load_balance", "load_balance_in_node", "load_balance_between_nodes"),
    ):
        assert table[whole].to_numpy() == pytest.approx((table[first] * table[second]).to_numpy(), rel=1e-9)
