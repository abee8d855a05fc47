"""Work of one rank alone, told apart from stalls, slow ranks and slow phases."""

from dataclasses import replace

import pandas as pd
import pytest
from simulated import everyone, simulate_program
from test_bottlenecks import verdicts

from hpcmm.analysis.suggestions import suggest

WORK = {"data": 5.0, "forward": 30.0, "backward": 60.0, "other": 1.0, "between": 1.0}
PROGRAM = ["data", "forward", "backward", ("backward", everyone), "other"]


def first_verdict(extra, *, program=PROGRAM, steps=40, ranks=4, seed=0, **options):
    traces = simulate_program(
        program,
        lambda r, s, p: WORK.get(p, 0.0) + extra(r, s, p),
        ranks=ranks,
        steps=steps,
        noise=0.05,
        seed=seed,
        **options,
    )
    return verdicts(traces)[0]


@pytest.mark.few(5)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rank", "when", "told"),
    [
        (0, lambda step: step % 10 == 0, "work of rank 0 alone in steps 10, 20, 30"),
        (3, lambda step: step % 7 == 6, "work of rank 3 alone in steps 6, 13, 20, 27, 34"),
        (1, lambda step: step % 2 == 1, "work of rank 1 alone in steps 1, 3, 5, 7, 9, ..."),
        (0, lambda step: step in {3, 4, 11, 25, 31}, "work of rank 0 alone in steps 3, 4, 11, 25, 31"),
    ],
    ids=["each tenth", "each seventh on rank 3", "each other", "irregular"],
)
def test_work_of_one_rank_at_intervals_is_called_that_with_its_steps(rank, when, told, seed) -> None:
    first = first_verdict(lambda r, s, p: 300.0 * (p == "other" and r == rank and when(s)), seed=seed)
    assert (first.kind, first.rank, first.cause) == ("solo", rank, told)
    assert "dmesg" not in suggest(first, {})


@pytest.mark.parametrize("seed", range(3))
def test_what_would_follow_the_last_step_is_not_missed_in_an_interval(seed) -> None:
    at = {9, 19, 29, 39, 49}  # what belongs to step 59 lies behind the capture's steps
    first = first_verdict(lambda r, s, p: 300.0 * (p == "other" and r == 0 and s in at), steps=60, seed=seed)
    assert first.cause == "work of rank 0 alone in steps 9, 19, 29, 39, 49"
    assert "5 times in 59 steps, every 10 steps" in first.evidence


def test_work_of_one_rank_between_steps_is_said_to_lie_before_them() -> None:
    first = first_verdict(lambda r, s, p: 300.0 * (p == "between" and r == 0 and s % 10 == 0))
    assert first.cause == "work of rank 0 alone before steps 10, 20, 30"


def test_two_times_at_round_steps_are_an_interval_and_at_odd_ones_a_stall() -> None:
    def kind(*at: int) -> str:
        return first_verdict(lambda r, s, p: 300.0 * (p == "other" and r == 2 and s in at), steps=26).kind

    assert kind(10, 20) == "solo"
    assert kind(6, 19) == "stall"


@pytest.mark.parametrize("lengths", [{5: 900.0}, {5: 300.0, 17: 1500.0, 22: 600.0, 30: 2500.0}], ids=["once", "unlike"])
def test_delays_that_nothing_orders_are_no_work_of_that_rank(lengths) -> None:
    first = first_verdict(lambda r, s, p: lengths.get(s, 0.0) * (p == "other" and r == 2))
    assert (first.kind, first.rank) in {("stall", 2), ("other", 2)}


def test_a_rank_that_is_slow_in_every_step_does_nothing_alone() -> None:
    assert first_verdict(lambda r, _s, p: 40.0 * (p == "forward" and r == 2)).kind == "compute"


def test_a_loading_that_takes_longer_now_and_then_is_loading() -> None:
    first = first_verdict(lambda r, s, p: 300.0 * (p == "data" and r == 2 and s % 5 == 0))
    assert (first.kind, first.rank, first.phase) == ("data", 2, "data")


def test_ranks_that_do_it_together_are_named_together() -> None:
    first = first_verdict(lambda r, s, p: 300.0 * (p == "other" and r % 2 == 0 and s % 8 == 7))
    assert (first.kind, first.rank, first.node) == ("solo", None, "")
    assert first.cause == "work of ranks 0, 2 alone in steps 7, 15, 23, 31, 39"
    assert first.blames


@pytest.mark.parametrize("at", [{20}, {10, 20, 30}, set(range(40))], ids=["once", "at intervals", "always"])
def test_a_phase_that_one_rank_has_alone_gives_the_work_its_name(at) -> None:
    first = first_verdict(
        lambda r, s, p: 400.0 * (p == "evaluation" and r == 0 and s in at),
        program=[*PROGRAM[:-1], "evaluation"],
    )
    assert first.kind == ("stall" if len(at) == 1 else "compute"), "all have the phase: it takes longer on this rank"
    traces = simulate_program(
        [*PROGRAM[:-1], "evaluation"],
        lambda r, s, p: WORK.get(p, 0.0) + 400.0 * (p == "evaluation" and r == 0 and s in at),
        ranks=4,
        steps=40,
    )
    alone = [
        replace(trace, segments=trace.segments[(trace.segments["phase"] != "evaluation") | (trace.rank == 0)])
        for trace in traces
    ]
    alone = [
        replace(t, segments=t.segments[(t.segments["phase"] != "evaluation") | t.segments["step"].isin(at)])
        for t in alone
    ]
    first = verdicts(alone)[0]
    steps = {1: "step 20", 3: "steps 10, 20, 30", 40: "every step"}[len(at)]
    assert (first.rank, first.cause) == (0, f"evaluation of rank 0 alone in {steps}")
    assert suggest(first, {}).startswith("evaluate on all ranks")


def test_a_model_that_one_rank_calls_more_often_is_not_slower_computation() -> None:
    traces = simulate_program(
        PROGRAM,
        lambda r, s, p: WORK[p] + 400.0 * (p == "forward" and r == 0 and s % 10 == 0),
        ranks=4,
        steps=40,
    )
    assert verdicts(traces)[0].kind == "compute"

    def called_often(segments: pd.DataFrame) -> pd.DataFrame:
        long = (segments["phase"] == "forward") & (segments["end_ns"] - segments["start_ns"] > 200e6)
        middle = (segments["start_ns"] + segments["end_ns"]) // 2
        first, second = segments[long].assign(end_ns=middle[long]), segments[long].assign(start_ns=middle[long])
        return pd.concat([segments[~long], first, second]).sort_values("start_ns", ignore_index=True)

    first = verdicts([replace(trace, segments=called_often(trace.segments)) for trace in traces])[0]
    assert (first.kind, first.cause) == ("solo", "work of rank 0 alone in steps 10, 20, 30")


def test_pauses_that_hit_any_rank_are_nobodys_work() -> None:
    first = first_verdict(lambda _r, _s, _p: 0.0, pauses=0.05)
    assert first.kind != "solo"


SAVES_AT = {5, 10, 15, 20, 25, 30, 35}


def without_record(*, save_at: int, waits: bool = True, name: str = "save", evaluation_ms: float = 0.0):
    """A loop of two ranks whose communication was not recorded; rank 0 saves as the part ``save_at`` of its step.

    ``evaluation_ms``: what both do in the step after it. Without ``waits`` each rank trains for itself.
    """
    program: list = ["data", "forward", "backward", *[("backward", everyone)] * waits, "evaluation"]
    program.insert(save_at, name)
    extra = {name: lambda r, s: 400.0 * (r == 0 and s in SAVES_AT)}
    extra["evaluation"] = lambda _r, s: evaluation_ms * (s - 1 in SAVES_AT)
    traces = simulate_program(
        program, lambda r, s, p: WORK.get(p, 0.0) + extra.get(p, lambda _r, _s: 0.0)(r, s), ranks=2, steps=40
    )
    return [
        replace(
            trace,
            collectives=trace.collectives[:0],
            segments=trace.segments[
                ~trace.segments["phase"].isin([name, "evaluation"])
                | (trace.segments["end_ns"] - trace.segments["start_ns"] > 1e6)
            ],
        )
        for trace in traces
    ]


@pytest.mark.parametrize(
    ("save_at", "told"),
    [(0, "of these steps all are as much longer"), (5, "the others' steps after these are as much longer")],
    ids=["at the start", "at the end"],
)
def test_who_waits_for_a_save_without_a_record_does_so_in_that_step_or_the_next(save_at, told) -> None:
    first = verdicts(without_record(save_at=save_at))[0]
    assert (first.kind, first.rank, first.confidence) == ("solo", 0, "medium")
    assert first.cause == "save of rank 0 alone in steps 5, 10, 15, 20, 25, ..."
    assert first.lost_s == pytest.approx(0.4 * 7 / 39, rel=0.1)
    assert f"{told}, for communication that was not recorded" in first.evidence


@pytest.mark.parametrize("save_at", [0, 4])
@pytest.mark.parametrize("evaluation_ms", [0.0, 900.0])
def test_a_save_that_nobody_waits_for_costs_the_others_nothing(save_at, evaluation_ms) -> None:
    found = verdicts(without_record(save_at=save_at, waits=False, evaluation_ms=evaluation_ms))
    assert "solo" not in {each.kind for each in found}


def test_a_wait_that_is_named_is_no_work_of_the_rank_that_waits() -> None:
    found = verdicts(without_record(save_at=0, name="barrier"))
    assert "solo" not in {each.kind for each in found}
