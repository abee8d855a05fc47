from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated import everyone, simulate_program, simulate_run

from hpcmm.analysis import bottlenecks, time_tables
from hpcmm.analysis.collectives import bus_bandwidth, estimate_waits, expose, match
from hpcmm.analysis.compare import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE, RunTables, compare
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.pop_metrics import EFFICIENCIES, efficiency
from hpcmm.analysis.statistics import half_widths
from hpcmm.analysis.time_tables import phases_table
from hpcmm.analyze import analyze
from hpcmm.analyze import compare as compare_runs
from hpcmm.errors import HpcmmError


def run_of(traces, name: str = "run", config: dict | None = None) -> RunTables:
    rows = estimate_waits(match(traces), 1000.0)
    rows = expose(rows.assign(bus_bytes_per_s=bus_bandwidth(rows)), traces)
    steps = step_times(traces)
    phases = phases_table(traces, rows, steps.warmup_number)
    evidence = bottlenecks.gather(traces, rows, steps, len(traces))
    findings = bottlenecks.find(evidence)
    made = {
        "steps": time_tables.steps_table(traces, steps.warmup_number),
        "phases": phases,
        "efficiency": efficiency(phases, steps),
        "delays": time_tables.delays_table(evidence),
        "bottlenecks": bottlenecks.table(findings, steps.mean_s, [""] * len(findings)),
    }
    return RunTables(name, made, config or {})


def plain_work(_rank: int, _step: int, phase: str) -> float:
    return {"data": 10.0, "forward": 20.0, "backward": 30.0}[phase]


def straggler(rank: int, step: int, phase: str) -> float:
    return plain_work(rank, step, phase) + (25.0 if (rank, phase) == (5, "forward") else 0.0)


def verdicts(table: pd.DataFrame) -> dict[tuple, str]:
    return {(row["kind"], row["metric"], row["phase"]): row["verdict"] for row in table.to_dict("records")}


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_of_the_same_thing_show_no_difference(seed: int) -> None:
    first, second = (run_of(simulate_run(plain_work, noise_ms=3, seed=s)) for s in (2 * seed, 2 * seed + 1))
    assert set(compare(first, second).table["verdict"]) == {NO_DIFFERENCE}


def test_a_straggler_is_found_and_the_other_way_round_it_is_gone() -> None:
    clean, slow = run_of(simulate_run(plain_work, seed=1)), run_of(simulate_run(straggler, seed=2))
    worse, better = compare(clean, slow), compare(slow, clean)
    for comparison, verdict, sign in ((worse, WORSE, 1), (better, BETTER, -1)):
        found = verdicts(comparison.table)
        assert found["step", "step time", ""] == verdict
        assert found["communication", "waiting", ""] == verdict
        assert found["communication", "transfer", ""] == NO_DIFFERENCE
        assert found["phase", "useful time", "data"] == NO_DIFFERENCE
        assert found["efficiency", "load balance", ""] == verdict
        blamed = comparison.table[comparison.table["kind"] == "bottleneck"].iloc[0]
        assert (blamed["rank"], blamed["phase"], blamed["verdict"]) == (5, "forward", verdict)
        assert blamed["change"] == pytest.approx(sign * 0.025, abs=0.002)
        assert blamed["low"] <= blamed["change"] <= blamed["high"]
        assert comparison.table.iloc[0]["step_share"] == pytest.approx(
            sign * 0.025 / (0.064 if sign > 0 else 0.089), abs=0.06
        )


def test_a_change_that_is_certain_but_small_counts_as_none() -> None:
    first = run_of(simulate_run(plain_work, noise_ms=0.01, seed=1))
    second = run_of(simulate_run(lambda *a: plain_work(*a) * 1.01, noise_ms=0.01, seed=2))
    step = compare(first, second).table.iloc[0]
    assert step["low"] > 0
    assert step["verdict"] == NO_DIFFERENCE


def test_few_steps_say_so() -> None:
    first, second = (run_of(simulate_run(plain_work, steps=6, seed=seed)) for seed in (1, 2))
    table = compare(first, second).table
    assert set(table["verdict"]) == {TOO_FEW}
    assert table["low"].isna().all()


def test_how_a_run_was_launched_is_no_difference() -> None:
    def launched(name: str, script: str, **keys: bool) -> dict:
        return {
            "name": name,
            "task": {"path": f"/code/runs/{name}-20260102-030405-1a2b/code/project/{script}"},
            "lr": 0.1,
            **keys,
        }

    traces = simulate_run(plain_work)
    first = run_of(traces, config=launched("a", "train.py", wait=True))
    assert compare(first, run_of(traces, config=launched("b", "train.py", wait=False, dry_run=False))).notes == ()
    (note,) = compare(first, run_of(traces, config=launched("b", "other.py"))).notes
    assert note.startswith("task.path: /code/runs/a-20260102-030405-1a2b/code/project/train.py in A, ")


def test_what_differs_between_the_runs_is_named() -> None:
    config = {
        "cluster": {"nodes": 2, "ranks_per_node": 2},
        "train": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    }
    other = {"cluster": {"nodes": 4, "ranks_per_node": 2}, "train": config["train"] | {"lr": 0.1}}
    first = run_of(simulate_run(plain_work, ranks=4), config=config)
    second = run_of(simulate_run(plain_work, ranks=8), config=other)
    notes = "\n".join(compare(first, second).notes)
    assert "ranks: 4 in A, 8 in B" in notes
    assert "nodes: 2 in A, 4 in B" in notes
    assert "16 samples in A and on 32 in B" in notes
    assert "train.lr: (not set) in A, 0.1 in B" in notes
    assert "micro_batch_size" not in notes


def test_a_phase_that_only_one_run_has_is_compared_with_none() -> None:
    first = run_of(simulate_run(plain_work))
    renamed = run_of(simulate_run(plain_work))
    renamed.tables["phases"].replace({"phase": {"data": "load"}}, inplace=True)
    rows = compare(first, renamed).table.set_index("phase")
    assert rows.loc["data", ["run_b", "verdict"]].tolist() == [0.0, BETTER]
    assert rows.loc["load", ["run_a", "verdict"]].tolist() == [0.0, WORSE]


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(HpcmmError, match="empty has no steps"):
        compare(run_of(simulate_run(plain_work, steps=10)), run_of(simulate_run(plain_work, steps=1), "empty"))


@pytest.mark.parametrize(("steps", "correlation", "limit"), [(30, 0.0, 0.05), (30, 0.5, 0.1), (200, 0.5, 0.05)])
def test_alike_series_rarely_differ_anywhere_even_where_neighbours_resemble_one_another(
    steps: int, correlation: float, limit: float
) -> None:
    random = np.random.default_rng(7)
    trials, wrong = 60, 0
    for _ in range(trials):
        series = []
        for _run in range(2):
            noise = random.normal(size=(steps + 50, 10))
            for step in range(1, len(noise)):
                noise[step] += correlation * noise[step - 1]
            series.append(noise[50:])
        wrong += bool((np.abs(series[1].mean(axis=0) - series[0].mean(axis=0)) > half_widths(*series)).any())
    assert wrong / trials <= limit


def test_a_real_shift_is_seen() -> None:
    random = np.random.default_rng(3)
    first, second = random.normal(size=(60, 10)), random.normal(size=(60, 10))
    second[:, 4] += 2.0
    seen = np.abs(second.mean(axis=0) - first.mean(axis=0)) > half_widths(first, second)
    assert seen.tolist() == [index == 4 for index in range(10)]


def test_efficiencies_are_those_that_the_analysis_prints() -> None:
    run = analyze(Path(__file__).parents[2] / "profiles" / "samples" / "slow_data")
    table = compare_runs(run, run).table
    whole = run.efficiency().set_index("scope").loc["run"]
    rows = table[table["kind"] == "efficiency"]
    assert len(rows) == 7
    for row in rows.to_dict("records"):
        assert row["run_a"] == row["run_b"] == pytest.approx(whole[row["metric"].replace(" ", "_")])
    assert set(table["verdict"]) == {"no difference seen"}


def test_what_lies_between_steps_counts_if_one_of_the_runs_has_it_there() -> None:
    def between(rank: int, step: int, phase: str) -> float:
        return 40.0 if phase == "between" else plain_work(rank, step, phase)

    program = ["data", "forward", ("forward", everyone), "backward"]
    first, second = (run_of(simulate_program(program, work, seed=seed)) for seed, work in enumerate((between, zero)))
    row = compare(first, second).table.iloc[0]
    assert (row["metric"], row["verdict"]) == ("time from step to step", BETTER)
    assert row["change"] == pytest.approx(-0.04, rel=0.1)
    assert compare(second, second).table.iloc[0]["metric"] == "step time"


def zero(rank: int, step: int, phase: str) -> float:
    return 0.0 if phase == "between" else plain_work(rank, step, phase)


def without_records(run: RunTables, *bottlenecks: tuple) -> RunTables:
    """``run`` as its tables are if no collective was recorded; ``bottlenecks``: (cause, loss, rank, phase)."""
    phases = run.tables["phases"]
    outer = phases["within"].where(phases["within"] != "", phases["phase"])
    whole = phases.assign(phase=outer, within="", useful_s=phases["duration_s"], wait_s=0.0, transfer_s=0.0)
    found = pd.DataFrame(bottlenecks, columns=["cause", "lost_s_per_step", "rank", "phase"]).assign(node="node1")
    tables = {
        "phases": whole,
        "delays": run.tables["delays"].iloc[:0],
        "efficiency": run.tables["efficiency"].assign(**dict.fromkeys(EFFICIENCIES, np.nan)),
        "bottlenecks": found,
    }
    return RunTables(run.name, {**run.tables, **tables}, run.config)


def test_a_rank_that_is_blamed_without_collectives_is_compared_by_its_own_time() -> None:
    clean = without_records(run_of(simulate_run(plain_work, seed=1)))
    slow = without_records(run_of(simulate_run(straggler, seed=2)), ("computation", 0.025, 5, "forward"))
    for comparison, verdict, sign in ((compare(clean, slow), WORSE, 1), (compare(slow, clean), BETTER, -1)):
        (blamed,) = comparison.table[comparison.table["kind"] == "bottleneck"].to_dict("records")
        assert (blamed["rank"], blamed["phase"], blamed["verdict"]) == (5, "forward", verdict)
        assert blamed["change"] == pytest.approx(sign * 0.025, abs=0.002)
        told = "\n".join(comparison.notes)
        assert "its time in that phase beyond that of the others stands for the delays by rank 5: computation" in told


@pytest.mark.parametrize("of_both", [True, False])
def test_what_was_not_recorded_has_no_row_and_a_note_says_so(of_both: bool) -> None:
    seen = run_of(simulate_run(plain_work, seed=1))
    unseen = without_records(run_of(simulate_run(plain_work, seed=2)))
    comparison = compare(unseen if of_both else seen, unseen)
    assert not {"communication", "efficiency"} & set(comparison.table["kind"])
    where = "either run" if of_both else "B"
    assert comparison.notes[0].startswith(
        f"waiting, transfer and efficiencies are not compared: no collective was recorded in {where}, "
    )
    # A wait that only one of the runs tells apart from its phase is no change of the phase.
    assert verdicts(comparison.table)["phase", "time", "backward"] == NO_DIFFERENCE


def test_a_rank_that_no_table_shows_step_by_step_is_named_and_not_compared() -> None:
    clean = run_of(simulate_run(plain_work, seed=1))
    stalled = run_of(simulate_run(plain_work, seed=2))
    row = {"cause": "stall", "lost_s_per_step": 0.03, "rank": 3, "node": "node2", "phase": ""}
    stalled.tables["bottlenecks"] = pd.DataFrame([row])
    comparison = compare(clean, stalled)
    assert "bottleneck" not in set(comparison.table["kind"])
    told = "not compared, as no table tells them by step (30.00 ms in B): delays by rank 3: stall"
    assert told in comparison.notes


def test_work_between_the_steps_of_one_rank_is_compared_by_its_time_there() -> None:
    def saves(rank: int, step: int, phase: str) -> float:
        return 40.0 * (rank == 0) if phase == "between" else plain_work(rank, step, phase)

    program = ["data", "forward", ("forward", everyone), "backward"]
    first = without_records(run_of(simulate_program(program, zero, seed=1)))
    between = ("save of rank 0 alone in every step", 0.04, 0, "between steps")
    second = without_records(run_of(simulate_program(program, saves, seed=2)), between)
    (row,) = compare(first, second).table.query("kind == 'bottleneck'").to_dict("records")
    assert (row["rank"], row["verdict"]) == (0, WORSE)
    assert row["change"] == pytest.approx(0.04, rel=0.1)


def test_one_rank_alone_has_no_rows_of_waiting() -> None:
    alone = run_of(simulate_run(plain_work, ranks=1, transfer_ms=0.0))
    assert "communication" not in set(compare(alone, alone).table["kind"])
