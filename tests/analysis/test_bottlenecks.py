"""Verdicts on runs whose fault is known, with noise."""

import numpy as np
import pytest
from simulated import simulate_run

from hpcmm.analysis import bottlenecks, collectives
from hpcmm.analysis.findings import CAUSES, Finding
from hpcmm.analysis.steps import step_times
from hpcmm.analysis.suggestions import suggest


def verdicts(traces, clock_error_ns=100_000):
    rows = collectives.estimate_waits(collectives.match(traces), clock_error_ns)
    rows = rows.assign(bus_bytes_per_s=collectives.bus_bandwidth(rows))
    rows = collectives.expose(rows, traces)
    return bottlenecks.find(bottlenecks.gather(traces, rows, step_times(traces), len(traces)))


def named(findings):
    return [
        (finding.kind, finding.rank, finding.node) for finding in findings if finding.node or finding.rank is not None
    ]


BALANCED = {"data": 5.0, "forward": 30.0, "backward": 60.0}


def balanced(_rank, _step, phase):
    return BALANCED[phase]


@pytest.mark.parametrize("seed", range(4))
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


def test_blame_is_withheld_when_the_clock_cannot_tell() -> None:
    def work(rank, _step, phase):
        return BALANCED[phase] + (50.0 if (rank, phase) == (1, "data") else 0.0)

    assert named(verdicts(simulate_run(work), clock_error_ns=80_000_000)) == []


def test_rows_do_not_count_a_second_twice() -> None:
    def work(rank, _step, phase):
        return BALANCED[phase] + (80.0 if (rank, phase) == (2, "data") else 0.0)

    traces = simulate_run(work, transfer_ms=40.0, noise_ms=5.0)
    assert sum(finding.lost_s for finding in verdicts(traces)) < step_times(traces).mean_s


def test_warm_up_is_kept_apart() -> None:
    def work(rank, step, phase):
        return BALANCED[phase] + (5000.0 if step == 0 and rank == 3 else 0.0)

    assert named(verdicts(simulate_run(work, noise_ms=2.0))) == []


def test_steps_without_any_collective() -> None:
    traces = [simulate_run(balanced, ranks=1)[0]]
    assert all(finding.rank is None for finding in verdicts(traces))
    assert np.isfinite([finding.lost_s for finding in verdicts(traces)]).all()


@pytest.mark.parametrize("kind", CAUSES)
def test_every_kind_has_a_suggestion(kind: str) -> None:
    finding = Finding(kind, "", 1.0, 3, "node2", "data", "", "high")
    assert suggest(finding, {})
    assert suggest(finding, {"data": None, "train": {"checkpoint_every": "x"}})


def test_a_hostile_node_name_cannot_leave_its_shell_word() -> None:
    finding = Finding("stall", "", 1.0, 3, "a; rm -rf /", "data", "", "high")
    assert "-w 'a; rm -rf /' " in suggest(finding, {})


def test_suggestions_start_from_the_runs_own_settings() -> None:
    finding = Finding("transfer", "", 1.0, None, "", "", "", "high")
    assert suggest(finding, {"train": {"gradient_accumulation_steps": 4}}) == "train.gradient_accumulation_steps=8"
