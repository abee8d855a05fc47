"""Verdicts on runs whose fault is known, with noise."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, everyone, simulate_program, simulate_run

from hpcmm.analysis import bottlenecks, host_calls
from hpcmm.analysis.collectives import match_with_waits
from hpcmm.analysis.findings import CAUSES, Finding, computation_has_phases, in_percent
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.phases import step_times
from hpcmm.analysis.statistics import chance_of_sum
from hpcmm.analysis.suggestions import suggest
from hpcmm.reports.run_record import RunRecord
from hpcmm.runs.metrics import RankStart


def verdicts(traces, clock_error_ns=100_000):
    rows = match_with_waits(traces, clock_error_ns)
    return bottlenecks.find(bottlenecks.gather(traces, rows, step_times(traces), len(traces)))


def named(findings):
    return [
        (finding.kind, finding.rank, finding.node) for finding in findings if finding.node or finding.rank is not None
    ]


BALANCED = {"data": 5.0, "forward": 30.0, "backward": 60.0}


def balanced(_rank, _step, phase):
    return BALANCED[phase]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
@pytest.mark.parametrize("noise_ms", [0.0, 2.0, 10.0, 40.0])
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_clean_run_blames_nobody(seed: int, noise_ms: float, ranks: int) -> None:
    assert named(verdicts(simulate_run(balanced, ranks=ranks, noise_ms=noise_ms, seed=seed))) == []


@pytest.mark.parametrize(("phase", "kind"), [("data", "data"), ("forward", "compute"), ("backward", "compute")])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_that_takes_longer_is_named_with_its_phase(phase: str, kind: str, ranks: int) -> None:
    def work(rank, _step, name):
        return BALANCED[name] + (50.0 if (rank, name) == (1, phase) else 0.0)

    first = verdicts(simulate_run(work, ranks=ranks, noise_ms=5.0))[0]
    assert (first.kind, first.rank, first.node, first.phase) == (kind, 1, "node1", phase)
    assert first.lost_s == pytest.approx(0.05, rel=0.25)
    assert first.confidence == "high"


def test_a_stall_in_one_step_is_named() -> None:
    def work(rank, step, phase):
        return BALANCED[phase] + (2000.0 if (rank, step, phase) == (5, 12, "forward") else 0.0)

    first = verdicts(simulate_run(work, noise_ms=3.0))[0]
    assert (first.kind, first.rank) == ("stall", 5)
    assert "1 of 29 steps" in first.evidence


def test_a_slow_node_is_one_finding() -> None:
    def work(rank, _step, phase):
        return BALANCED[phase] * (1.6 if rank in {4, 5} else 1.0)

    findings = verdicts(simulate_run(work, noise_ms=2.0))
    assert named(findings) == [("compute", None, "node3")]


def test_slow_transfer_is_not_a_rank() -> None:
    findings = verdicts(simulate_run(balanced, transfer_ms=300.0, noise_ms=3.0))
    assert findings[0].kind == "transfer"
    assert findings[0].lost_s == pytest.approx(0.3, rel=0.02)
    assert named(findings) == []


def test_blame_for_work_that_is_longer_in_some_steps_is_withheld_when_the_clock_cannot_tell() -> None:
    def work(rank, step, phase):
        return BALANCED[phase] + (50.0 if (rank, phase) == (1, "data") and step % 4 else 0.0)

    assert named(verdicts(simulate_run(work), clock_error_ns=80_000_000)) == []


def test_rows_do_not_count_a_second_twice() -> None:
    def work(rank, _step, phase):
        return BALANCED[phase] + (80.0 if (rank, phase) == (2, "data") else 0.0)

    traces = simulate_run(work, transfer_ms=40.0, noise_ms=5.0)
    assert sum(finding.lost_s for finding in verdicts(traces)) < step_times(traces).mean_s


def lost_share(traces) -> float:
    return sum(finding.lost_s for finding in verdicts(traces)) / step_times(traces).mean_s


@pytest.mark.few(4)
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_excess_of_nobody_in_particular_is_no_work_of_all_ranks_as_well(ranks: int, noise: float) -> None:
    """Loading is nearly all of the step: what one rank takes longer over it by turns is in the imbalance."""
    program = ["data", "forward", ("forward", everyone)]
    work = {"data": 100.0, "forward": 1.0, "between": 0.0}
    traces = simulate_program(program, lambda _r, _s, p: work[p], ranks=ranks, noise=noise, steps=40)
    found = {finding.kind: finding.lost_s for finding in verdicts(traces)}
    assert lost_share(traces) <= 1.0
    step_s = step_times(traces).mean_s
    # Nothing else is in the step: the rows share it out, but for the forward phase.
    assert found["data"] + found["imbalance"] == pytest.approx(step_s, rel=0.1)


PAIRS = ("forward", lambda rank: f"pair{rank // 2}")
COLUMNS = ("backward", lambda rank: f"column{rank % 2}")


@pytest.mark.parametrize(
    "program",
    [
        ["forward", PAIRS, COLUMNS],
        ["forward", PAIRS, "backward", PAIRS, "backward", COLUMNS],
        ["forward", PAIRS, "backward", COLUMNS, "other", ("other", everyone)],
        ["backward", PAIRS, "forward", COLUMNS],
    ],
    ids=["at once", "after more work", "in three groups", "of a step before"],
)
def test_one_piece_of_work_that_is_late_in_two_groups_is_lost_once(program) -> None:
    traces = simulate_program(
        program, lambda r, _s, p: 20 * (p != "between") + 15 * ((r, p) == (1, "forward")), noise=0.0, transfer_ms=0.1
    )
    blamed = sum(finding.lost_s for finding in verdicts(traces) if finding.blames)
    assert blamed == pytest.approx(0.015, rel=0.05)


def test_what_a_rank_works_too_long_between_two_groups_is_lost_as_well() -> None:
    work = {("forward", 1): 15, ("backward", 1): 8}
    traces = simulate_program(
        ["forward", PAIRS, "backward", COLUMNS],
        lambda r, _s, p: 20 * (p != "between") + work.get((p, r), 0),
        noise=0.0,
        transfer_ms=0.1,
    )
    blamed = sum(finding.lost_s for finding in verdicts(traces) if finding.blames)
    assert blamed == pytest.approx(0.023, rel=0.05)


_GROUPS = [everyone, lambda rank: f"pair{rank // 2}", lambda rank: f"column{rank % 2}"]
_ITEMS = st.one_of(
    st.sampled_from(["data", "forward", "backward", "checkpoint", "other"]),
    st.tuples(st.sampled_from(["backward", "other"]), st.sampled_from(_GROUPS)),
)


@given(
    program=st.lists(_ITEMS, min_size=1, max_size=6),
    ranks=st.sampled_from([1, 2, 4, 6]),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    pauses=st.sampled_from([0.0, 0.1]),
    slow=st.sampled_from([0.0, 30.0, 300.0]),
    between=st.sampled_from([0.0, 20.0]),
    transfer=st.sampled_from([0.1, 40.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=settings.default.max_examples // 4)  # each is an analysis
def test_rows_never_add_up_to_more_than_there_is(program, ranks, noise, pauses, slow, between, transfer, seed) -> None:
    def work(rank, _step, phase):
        return (between if phase == "between" else 20.0) + slow * ((rank, phase) == (0, "data"))

    program = ["forward", *program]
    traces = simulate_program(
        program, work, ranks=ranks, noise=noise, pauses=pauses, transfer_ms=transfer, seed=seed, steps=12
    )
    findings, steps = verdicts(traces), step_times(traces)
    assert sum(finding.lost_s for finding in findings) <= steps.mean_s + between / 1e3 + 1e-9
    assert all(finding.lost_s >= 0 for finding in findings)


ONLY_STEPS = ["data", "other", ("other", everyone)]


def test_computation_without_phases_is_no_loss() -> None:
    work = {"data": 1.0, "other": 100.0, "between": 0.0}
    traces = simulate_program(ONLY_STEPS, lambda _r, _s, p: work[p], ranks=2)
    assert not computation_has_phases(traces)
    assert "other" not in {finding.kind for finding in verdicts(traces)}
    late = simulate_program(ONLY_STEPS, lambda r, _s, p: work[p] + 50 * ((r, p) == (1, "other")), ranks=2)
    assert [(one.kind, one.rank) for one in verdicts(late) if one.blames] == [("other", 1)]


def test_what_phases_of_computation_leave_is_one() -> None:
    work = {"data": 1.0, "forward": 60.0, "other": 40.0, "between": 0.0}
    traces = simulate_program(["forward", *ONLY_STEPS], lambda _r, _s, p: work[p], ranks=2)
    assert computation_has_phases(traces)
    found = {finding.kind: finding.lost_s for finding in verdicts(traces)}
    assert found["other"] == pytest.approx(0.04, rel=0.1)


def test_the_rank_that_is_waited_for_most_often_is_told_though_chance_explains_it() -> None:
    def work(rank, step, phase):
        # Of two ranks one is late in two steps of three: that is not so rare by chance.
        return BALANCED[phase] + 20.0 * (phase == "forward" and rank == (step % 3 == 0))

    findings = verdicts(simulate_run(work, ranks=2, noise_ms=0.0, steps=16))
    assert named(findings) == []
    (imbalance,) = (finding for finding in findings if finding.kind == "imbalance")
    assert "most often for rank 0, in 10 of 15 steps, which chance can explain" in imbalance.evidence


def test_a_rank_whose_delays_are_too_small_to_name_it_is_not_said_to_be_chance() -> None:
    def work(rank, _step, phase):
        return BALANCED[phase] + 2.5 * ((rank, phase) == (1, "forward"))

    findings = verdicts(simulate_run(work, ranks=4, noise_ms=0.0))
    (imbalance,) = (finding for finding in findings if finding.kind == "imbalance")
    assert "for rank 1, in 29 of 29 steps, but in no kind of work by so much that it is named" in imbalance.evidence


def test_warm_up_is_kept_apart() -> None:
    def work(rank, step, phase):
        return BALANCED[phase] + (5000.0 if step == 0 and rank == 3 else 0.0)

    assert named(verdicts(simulate_run(work, noise_ms=2.0))) == []


def test_steps_without_any_collective() -> None:
    traces = [simulate_run(balanced, ranks=1)[0]]
    assert all(finding.rank is None for finding in verdicts(traces))
    assert np.isfinite([finding.lost_s for finding in verdicts(traces)]).all()


PROGRAM = ["data", "forward", "backward", ("backward", everyone), "optimizer", ("optimizer", everyone)]
BASE = {"data": 10.0, "forward": 60.0, "backward": 120.0, "optimizer": 20.0, "between": 2.0}


def verdicts_of(extra, **options):
    return verdicts(simulate_program(PROGRAM, lambda r, s, p: BASE[p] + extra(r, s, p), **options))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3, 4))])
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (lambda r, _s, p: 50 * ((r, p) == (5, "forward")), {("compute", 5)}),
        (
            lambda r, _s, p: 60 * ((r, p) == (1, "data")) + 60 * ((r, p) == (6, "backward")),
            {("data", 1), ("compute", 6)},
        ),
        (
            lambda r, _s, p: 60 * ((r, p) == (1, "forward")) + 50 * ((r, p) == (6, "forward")),
            {("compute", 1), ("compute", 6)},
        ),
        (lambda r, s, p: 400 * ((r, p) == (3, "forward") and s % 5 == 2), {("compute", 3)}),
        (lambda r, _s, p: 50 * ((r, p) == (3, "optimizer")), {("compute", 3)}),
        (lambda r, s, p: 80 * ((r, p) == (3, "forward") and s < 10), {("compute", 3)}),
        (lambda r, _s, p: 60 * ((r, p) == (0, "between")), {("between", 0)}),
        (lambda r, s, p: 500 * ((r, p, s) == (4, "backward", 9)), {("stall", 4)}),
        (lambda r, _s, p: 60 * (p in {"forward", "backward"} and r in {4, 5}), {("compute", None)}),
    ],
    ids=["steady", "two", "two alike", "now and then", "optimizer", "recovered", "between", "once", "node"],
)
def test_faults_of_many_shapes_are_named_and_nobody_else(extra, expected, seed: int) -> None:
    found = named(verdicts_of(extra, noise=0.05, seed=seed))
    assert {(kind, rank) for kind, rank, _ in found} == expected


def test_where_a_fault_was_is_said() -> None:
    first = verdicts_of(lambda r, s, p: 80 * ((r, p) == (3, "forward") and s < 10), noise=0.02)[0]
    assert "only from step 1 to 9" in first.evidence


# The only pause of a run, nearly as long as a step, is a stall in truth.
@pytest.mark.parametrize(
    ("runs", "without_pauses", "with_pauses"), [(30, 1, 3), pytest.param(100, 1, 6, marks=pytest.mark.long)]
)
def test_clean_runs_are_hardly_ever_blamed(runs: int, without_pauses: int, with_pauses: int) -> None:
    blamed: dict[float, list[int]] = {0.0: [], 0.05: []}
    for seed in range(runs):
        dice = np.random.default_rng(seed)
        noise, pauses = float(dice.choice([0.02, 0.1, 0.3])), float(dice.choice([0.0, 0.05]))
        ranks, steps = int(dice.choice([2, 4, 8])), int(dice.choice([6, 12, 20]))
        traces = simulate_program(
            PROGRAM, lambda _r, _s, p: BASE[p], seed=seed, noise=noise, pauses=pauses, ranks=ranks, steps=steps
        )
        blamed[pauses] += [seed] * bool(named(verdicts(traces)))
    assert len(blamed[0.0]) <= without_pauses, blamed
    assert len(blamed[0.05]) <= with_pauses, blamed


def test_pauses_on_ranks_by_turns_are_imbalance() -> None:
    findings = verdicts_of(lambda _r, _s, _p: 0.0, noise=0.05, pauses=0.04, steps=40)
    assert named(findings) == []
    assert findings[0].kind == "imbalance"


def test_sixty_four_ranks() -> None:
    findings = verdicts_of(lambda r, _s, p: 40 * ((r, p) == (37, "backward")), ranks=64, ranks_per_node=8, noise=0.05)
    assert named(findings) == [("compute", 37, "node5")]


def test_a_delay_passes_through_another_group_to_its_cause() -> None:
    """Rank 1 keeps rank 0 in their pair, and so rank 0 keeps all of its own column waiting."""
    pairs = ("forward", lambda rank: f"pair{rank // 2}")
    columns = ("backward", lambda rank: f"column{rank % 2}")
    program = ["data", "forward", pairs, "backward", columns]
    traces = simulate_program(program, lambda r, _s, p: BASE[p] + 60 * ((r, p) == (1, "forward")), noise=0.02)
    findings = verdicts(traces)
    assert named(findings) == [("compute", 1, "node1")]
    assert findings[0].phase == "forward"
    assert findings[0].lost_s == pytest.approx(0.06, rel=0.2)


def test_batches_tell_a_slow_rank_from_one_with_more_to_do() -> None:
    def work(rank, _step, phase):
        return BASE[phase] * (1.5 if rank == 2 and phase in {"forward", "backward"} else 1.0)

    equal = verdicts(simulate_program(PROGRAM, work, size=lambda _r, _s: 1000))
    longer = verdicts(simulate_program(PROGRAM, work, size=lambda r, _s: 1500 if r == 2 else 1000))
    assert [(first.kind, first.rank) for first in (equal[0], longer[0])] == [("compute", 2), ("batch", 2)]


@pytest.mark.parametrize("sizes_known", [True, False])
def test_batches_of_unequal_length_are_nobodys_fault(sizes_known: bool) -> None:
    length = np.random.default_rng(1).choice([1.0, 1.0, 1.5, 2.5], size=(8, 20))

    def work(rank, step, phase):
        return BASE[phase] * (length[rank, step] if phase in {"forward", "backward"} else 1.0)

    size = (lambda r, s: int(1000 * length[r, s])) if sizes_known else None
    findings = verdicts(simulate_program(PROGRAM, work, size=size))
    assert findings[0].kind == "uneven"
    assert named(findings) == []


def test_a_process_that_stands_still_in_a_collective_is_a_stall() -> None:
    traces = simulate_program(PROGRAM, lambda _r, _s, p: BASE[p], noise=0.02, steps=12)
    rows = traces[5].collectives
    row = rows[rows["step"] == 7].iloc[0]
    stop, length = int(row["end_ns"]) - 2_000_000, 1_500_000_000

    def later(times):
        return times + np.where(times > stop, length, 0)

    halted = [trace.on_clock(later) for trace in traces]
    halted[5] = replace(halted[5], stalled=IntervalSet(np.array([stop]), np.array([stop + length])))
    first = verdicts(halted)[0]
    assert (first.kind, first.rank, first.worst_step) == ("stall", 5, 7)
    assert first.lost_s == pytest.approx(1.5 / 11, rel=0.05)


def test_data_that_trickle_in_on_both_sides_of_a_node_name_it() -> None:
    calls = [100, 110, 105, 2600, 950, 1800, 1200, 90]
    traces = simulate_program(PROGRAM, lambda _r, _s, p: BASE[p], transfer_ms=500, noise=0.02)
    row = {"process_role": "worker", "thread_role": "other", "function": "recv"}
    for trace, count in zip(traces, calls, strict=True):
        object.__setattr__(trace, "osrt", pd.DataFrame([row | {"calls": count}]))
    first = verdicts(traces)[0]
    assert (first.kind, first.rank, first.node) == ("transfer", None, "node3")
    for trace in traces:  # two nodes: either may be the slow one
        object.__setattr__(trace, "node", "a" if trace.rank < 4 else "b")
    assert verdicts(traces)[0].node == ""


def test_waits_below_the_clocks_error_are_said_to_be_blamed_on_nobody() -> None:
    findings = verdicts(
        simulate_run(lambda r, s, p: BALANCED[p] + 50 * ((r, p) == (1, "data") and s % 4 > 0)),
        clock_error_ns=80_000_000,
    )
    assert named(findings) == []


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_chance_bounds_what_exchanging_ranks_gives(units: int, steps: int, seed: int) -> None:
    dice = np.random.default_rng(seed)
    delays = dice.exponential(1.0, (steps, units)) * (dice.random((steps, units)) < dice.uniform(0.1, 1))
    bound = chance_of_sum(delays, int(delays.sum(axis=0).argmax()))
    sums = np.array([dice.permuted(delays, axis=1).sum(axis=0).max() for _ in range(300)])
    assert (sums >= delays.sum(axis=0).max() - 1e-9).mean() <= bound + 0.1


@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("config", [{}, {"data": None, "train": {"checkpoint_every": "x"}}])
def test_every_kind_has_a_suggestion(kind: str, config) -> None:
    assert suggest(Finding(kind, "", 1.0, 3, "node2", "data", "", "high"), config)


@pytest.mark.few(41)
@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("node", ["node2", "", "a; rm -rf /", "n'ode,[1-2]"])
def test_overrides_compose_against_the_configuration(kind: str, node: str, tmp_path: Path) -> None:
    from hpcmm.config.compose import compose_run

    config = {"train": {"micro_batch_size": 4}, "cluster": {"exclude": "node7"}}
    suggestion = suggest(Finding(kind, "", 1.0, 3, node, "data", "", "high"), config)
    words = shlex.split(suggestion)
    if kind in {"stall", "subprocess", "interruption"} or (kind == "transfer" and node):
        assert words[0] in {"srun", "grep"}
        return
    in_words = {"gpu_copy", "gpu_wait", "experts", "gpu_os", "gpu_code", "gpu_mpi", "gpu_cuda", "gpu_gap"}
    in_words |= {"gpu_comm", "gpu_set", "gpu_unknown", "few", *host_calls.ADVICE}
    if kind in in_words:  # nothing that a key could change
        assert "=" not in words[0].partition("(")[0]
        return
    assert len(words) == 1
    key, value = words[0].split("=", 1)
    composed = compose_run(["experiment=anomaly_demo", *words])
    for name in key.split("."):
        composed = getattr(composed, name)
    assert str(composed) == (f"node7,{node}" if key == "cluster.exclude" else value)


@pytest.mark.parametrize("kind", CAUSES)
def test_without_a_run_record_no_key_of_ours_is_suggested(kind: str) -> None:
    suggestion = suggest(Finding(kind, "", 1.0, 3, "node2", "data", "", "high"), {})
    assert not any(f"{section}." in suggestion for section in ("train", "cluster", "parallel"))
    assert not suggestion.startswith("data.")


@pytest.mark.parametrize("kind", CAUSES)
def test_of_a_script_that_was_launched_only_the_clusters_keys_are_suggested(kind: str) -> None:
    config = {"task": {"name": "script"}, "train": {"log_every": 1}, "cluster": {"cpus_per_rank": 1}}
    finding = Finding(kind, "", 1.0, 3, "node2", "data", "", "high")
    suggestion = suggest(finding, RunRecord(config=config).tunable)
    expected = {
        "imbalance": "cluster.cpus_per_rank=2",
        "compute": "cluster.exclude=node2",
        "unseen": "profile.ranks=all",
    }.get(kind)
    if expected:
        assert suggestion == expected
    else:
        assert suggestion == suggest(finding, {})


@pytest.mark.parametrize(
    ("cpus", "told"),
    [
        (0, "cluster.cpus_per_rank=5"),
        (10, "cluster.cpus_per_rank=5"),
        (9, "fewer ranks a node, or nodes with more CPUs: 2 ranks share the 9 CPUs of a node"),
    ],
)
def test_no_rank_is_to_have_more_cpus_than_the_node_has(cpus: int, told: str) -> None:
    starts = {0: RankStart(0, "a", "1", 7, cpus), 1: RankStart(1, "b", "1", 7, cpus and 64)}
    record = RunRecord(config={"cluster": {"cpus_per_rank": 4, "ranks_per_node": 2}}, starts=starts)
    finding = Finding("imbalance", "", 1.0, None, "", "data", "", "low")
    assert suggest(finding, record.tunable, record.cpus) == told


def test_a_launcher_alone_on_its_node_shares_the_cpus_with_its_workers() -> None:
    record = RunRecord(config={"cluster": {"cpus_per_rank": 2, "ranks_per_node": 1}})
    told = suggest(Finding("imbalance", "", 1.0, None, "", "data", "", "low"), record.tunable, 2)
    assert told == "nodes with more CPUs, or fewer processes on each: all of them share the 2 CPUs of a node"


def test_a_hostile_node_name_cannot_leave_its_shell_word() -> None:
    finding = Finding("stall", "", 1.0, 3, "a; rm -rf /", "data", "", "high")
    assert "-w 'a; rm -rf /' " in suggest(finding, {})


def test_the_only_node_of_a_run_without_slurm_is_not_to_be_excluded() -> None:
    finding = Finding("compute", "", 1.0, 3, "vm", "forward", "", "high")
    local = {"cluster": {"executor": "local", "nodes": 1}}
    for config in (local, local | {"train": {}}):
        assert suggest(finding, config).endswith("see what else uses the cores of this machine: top")
    assert suggest(finding, {"cluster": {"executor": "slurm", "nodes": 1}}) == "cluster.exclude=vm"


def test_suggestions_start_from_the_runs_own_settings() -> None:
    finding = Finding("transfer", "", 1.0, None, "", "", "", "high")
    assert suggest(finding, {"train": {"gradient_accumulation_steps": 4}}) == "train.gradient_accumulation_steps=8"


@pytest.mark.parametrize(
    ("evaluated", "told"),
    [
        ([8, 16], ", 100% of it in steps 8, 16: 0.9 s each time"),
        ([15], ", 100% of it in step 15: 0.9 s"),
        (range(20), ""),
    ],
)
def test_what_all_ranks_do_in_few_steps_is_told_with_these_steps(evaluated, told: str) -> None:
    def work(_rank: int, step: int, phase: str) -> float:
        return 900.0 * (step in evaluated) if phase == "other" else BASE[phase]

    traces = simulate_program([*PROGRAM, "other"], work, noise=0.0)
    (row,) = (each for each in verdicts(traces) if each.phase == "other" and each.rank is None)
    assert row.cause == "work outside the phases on all ranks"
    assert row.evidence.partition("s a step in it")[2] == told
    assert suggest(row, {}) == (
        "log and evaluate less often; if it loads there, DataLoader(num_workers=N): ranges tell what it is"
        if told
        else "with annotate.phase(...) around each part of the step, the next capture tells which part it is"
    )
    if len(evaluated) == 1:
        assert row.worst_step == 15


def test_what_costs_everybody_most_goes_before_the_one_that_takes_longer_over_it() -> None:
    def work(rank: int, _step: int, phase: str) -> float:
        return {"data": 60.0 + 40.0 * (rank == 0)}.get(phase, 20.0)

    first, second = (
        (finding.cause, finding.rank)
        for finding in verdicts(simulate_run(work, noise_ms=1.0))
        if finding.kind == "data"
    )
    assert first == ("data loading on all ranks", None)
    assert second == ("data loading", 0)


@pytest.mark.parametrize(
    ("hit", "phase", "expected"),
    [
        ([], "backward", False),
        ([12], "backward", True),
        (range(0, 30, 2), "backward", False),
        ([12], "checkpoint", False),
    ],
    ids=["nowhere", "one step", "each other step", "what one step alone exchanges"],
)
def test_communication_that_stood_still_for_a_while_is_told_from_slow_transfer(hit, phase, expected: bool) -> None:
    traces = simulate_run(lambda _rank, _step, phase: BALANCED[phase], noise_ms=1.0)
    late = np.cumsum([2000 * MS if step in hit else 0 for step in range(30)])
    before = np.concatenate(([0], late[:-1]))

    def longer(frame: pd.DataFrame) -> pd.DataFrame:
        last = frame["phase"] == "backward" if "phase" in frame else True
        there = last & frame["step"].isin(hit)
        if "op" in frame:
            frame = frame.assign(phase=frame["phase"].where(~there, phase))
        return frame.assign(
            start_ns=frame["start_ns"] + before[frame["step"]],
            end_ns=frame["end_ns"] + np.where(last, late[frame["step"]], before[frame["step"]]),
        )

    traces = [
        replace(
            trace, steps=longer(trace.steps), segments=longer(trace.segments), collectives=longer(trace.collectives)
        )
        for trace in traces
    ]
    traces = [
        replace(t, blocked=IntervalSet.union_of(t.collectives["start_ns"], t.collectives["end_ns"])) for t in traces
    ]
    found = [finding for finding in verdicts(traces) if finding.kind == "interruption"]
    assert bool(found) == expected
    if expected:
        assert found[0].worst_step == 12
        assert found[0].lost_s == pytest.approx(2.0 / 29, rel=0.02)
        assert not found[0].blames


@pytest.mark.parametrize("config", [{}, {"cluster": {}}])
def test_a_rank_of_a_script_that_works_longer_because_it_writes_is_advised_to_write_less(config):
    writes = Finding("other", "", 1.0, 0, "node1", "other", "", "high", function="write")
    assert suggest(writes, config) == "print, log or save less often there, or from a thread of its own"
    assert "annotate.phase" in suggest(replace(writes, function="poll"), config)


def test_a_small_share_is_not_nothing() -> None:
    assert [in_percent(share) for share in (0.0, 0.004, 0.25, 1.0)] == ["0%", "under 1%", "25%", "100%"]
