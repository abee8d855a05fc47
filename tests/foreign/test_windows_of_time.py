"""Analyses of a part of a run alone, however few steps that leaves."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from changed_inputs import INPUTS, LOADING, changed, first

from hpcmm.analysis import gpu_trace
from hpcmm.analyze import Choice, analyze
from hpcmm.errors import HpcmmError
from hpcmm.page import headlines
from hpcmm.page.headlines import ranges_line


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        (Choice(between="training_step_[5-9]"), range(5, 10)),
        (Choice(from_s=0.5, to_s=1.0), range(5, 10)),
        (Choice(from_s=1.0), range(10, 20)),
        (Choice(to_s=0.5), range(5)),
    ],
)
def test_a_window_leaves_out_what_lies_beyond(choice: Choice, steps: range) -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=choice)
    assert list(analysis.steps()["step"].unique()) == list(steps)
    assert first(analysis) == LOADING


@pytest.mark.parametrize(
    "choice", [Choice(between="training_step_5"), Choice(steps="training_step_5"), Choice(from_s=0.5, to_s=0.6)]
)
def test_one_step_alone_is_no_warm_up_and_tells_only_of_itself(choice: Choice) -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=choice)
    study = analysis.study
    assert list(analysis.steps()["step"]) == [5, 5]
    assert not analysis.steps()["warmup"].any()
    assert study.steps.mean_s == pytest.approx(0.095)
    assert headlines.steps_line(study) == "step 5 alone, of 95 ms: one step cannot tell a straggler from chance"
    assert "of each 95 ms step (42%)" in headlines.headline(study)
    assert first(analysis) == LOADING
    row = analysis.bottlenecks().iloc[0]
    assert (row["confidence"], "one step cannot tell" in row["evidence"]) == ("low", True)
    assert "by chance" not in row["evidence"]
    assert set(analysis.idle()["scope"]) <= {"steps", "outside"}


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("source", ["steps_megatron_bridge", "cpu_torchrun_plain"])
def test_whoever_takes_long_in_all_of_a_few_steps_is_named_with_little_confidence(source: str, steps: int) -> None:
    """With collectives, and without any."""
    analysis = analyze(INPUTS / source, choice=Choice(between=f"(training_step_|iteration )[5-{4 + steps}]"))
    row = analysis.bottlenecks().iloc[0]
    assert len(analysis.study.steps.numbers) == steps
    assert row["cause"] == "data loading"
    assert row["confidence"] == ("low" if steps < 4 else "medium")
    assert ("steps cannot tell whether it is so in others" in row["evidence"]) == (steps in {2, 3})


AFTER_LOADING = """
    UPDATE NVTX_EVENTS AS step SET start = 1000 + (
        SELECT data."end" FROM NVTX_EVENTS AS data JOIN StringIds ON id = data.textId
        WHERE value = 'data' AND data.globalTid = step.globalTid AND data.start BETWEEN step.start AND step."end")
    WHERE textId IN (SELECT id FROM StringIds WHERE value LIKE 'iteration %')
"""
"""Steps that begin once their batch is there, as those of Lightning."""


DATA = "textId IN (SELECT id FROM StringIds WHERE value = 'data')"


@pytest.mark.parametrize("choice", [Choice(), *(Choice(between=f"iteration [5-{last}]") for last in (6, 7, 9))])
def test_ranges_between_steps_are_phases(tmp_path: Path, choice: Choice) -> None:
    whole = analyze(INPUTS / "cpu_torchrun_plain")
    analysis = analyze(changed(tmp_path, "cpu_torchrun_plain", AFTER_LOADING), choice=choice)
    row, expected = (each.bottlenecks().iloc[0] for each in (analysis, whole))
    assert (row["cause"], row["phase"], row["rank"]) == ("data loading", "data", expected["rank"])
    assert row["lost_s_per_step"] == pytest.approx(expected["lost_s_per_step"], rel=0.05)
    assert analysis.study.steps.period_s == pytest.approx(whole.study.steps.period_s, rel=0.05)
    assert "data" in analysis.study.ranges


def test_a_range_that_reaches_from_between_steps_into_one_is_no_phase_of_both(tmp_path: Path) -> None:
    longer = f'UPDATE NVTX_EVENTS SET "end" = "end" + 5000000 WHERE {DATA} AND start > 5400000000'  # noqa: S608
    analysis = analyze(changed(tmp_path, "cpu_torchrun_plain", AFTER_LOADING, longer))
    assert len(analysis.steps()) == 40
    phases = analysis.phases()
    assert (phases.groupby(["rank", "step"])["duration_s"].sum() <= analysis.steps()["duration_s"].max() + 1e-9).all()


def test_the_call_of_who_loads_longer_is_named_and_no_efficiency_is_claimed() -> None:
    analysis = analyze(INPUTS / "cpu_torchrun_plain")
    assert "s a step more than its peers in " in analysis.bottlenecks()["evidence"].iloc[0]
    assert analysis.efficiency()[["parallel_efficiency", "load_balance", "transfer_efficiency"]].isna().all(axis=None)
    assert (analysis.efficiency()["runtime_s"] > 0).all()
    assert headlines.efficiency_line(analysis.study) == ""


@pytest.mark.parametrize(("choice", "length_s"), [(Choice(from_s=0, to_s=30), 30.0), (Choice(to_s=59.5), 59.5)])
def test_a_window_in_which_the_gpu_does_next_to_nothing_is_as_long_as_it_was_asked_for(
    choice: Choice, length_s: float
) -> None:
    analysis = analyze(INPUTS / "startup_gap", choice=choice)
    row = analysis.bottlenecks().iloc[0]
    assert (row["cause"], round(row["step_share"], 3)) == ("one long GPU gap", 1.0)
    assert analysis.gpu()["span_s"].sum() == pytest.approx(length_s)
    assert f"of {length_s:.3g} s on one GPU 100% are lost" in headlines.headline(analysis.study)


def test_a_window_without_any_event_says_where_there_are_some() -> None:
    with pytest.raises(
        HpcmmError, match=r"nothing was recorded in the window .* at 0 s of the run, its last one at 70"
    ):
        analyze(INPUTS / "startup_gap", choice=Choice(from_s=10, to_s=30))


def test_one_step_of_one_gpu_is_one_gpu() -> None:
    analysis = analyze(INPUTS / "many_iterations", choice=Choice(steps="iteration 10"))
    counted = gpu_trace.counted(analysis.gpu())
    assert len(counted) == 1
    assert counted["span_s"].iloc[0] == pytest.approx(0.0019)
    assert "of each 1.9 ms step" in headlines.headline(analysis.study)


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        (Choice(from_s=0.55, to_s=1.05), range(6, 10)),
        (Choice(between="training_step_[5-9]"), range(5, 10)),
        (Choice(steps="training_step_1[0-9]"), range(10, 20)),
    ],
)
def test_a_window_that_begins_after_other_steps_has_no_warm_up_and_no_cut_step(choice: Choice, steps: range) -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=choice)
    assert list(analysis.steps()["step"].unique()) == list(steps)
    assert not analysis.steps()["warmup"].any()
    assert len(analysis.study.steps.numbers) == len(steps)
    assert set(analysis.idle()["scope"]) <= {"steps", "outside"}
    assert first(analysis) == LOADING
    assert analysis.startup().empty


def test_a_window_without_a_whole_step_says_so() -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(from_s=0.51, to_s=0.57))
    assert headlines.headline(analysis.study).startswith("No whole step lies in the window; of 60 ms on 2 GPUs")
    assert analysis.coverage()["reason"].str.contains("no step of it lies as a whole in the window").all()


def test_a_window_without_a_whole_step_tells_which_times_hold_one() -> None:
    inside = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(from_s=0.52, to_s=0.58))
    assert inside.study.no_steps == "No whole step lies in the window"
    (why,) = set(inside.coverage()["reason"].str.extract("(no step of it.*)", expand=False))
    found = re.fullmatch(
        "no step of it lies as a whole in the window that was asked for; "
        "--from ([0-9.]+) --to ([0-9.]+) holds the nearest one",
        why,
    )
    assert found
    choice = Choice(from_s=float(found[1]), to_s=float(found[2]))
    assert list(analyze(INPUTS / "steps_megatron_bridge", choice=choice).steps()["step"].unique()) == [5]
    assert inside.study.line_to_add == ""


def test_a_report_without_the_ranges_of_a_window_says_so(tmp_path: Path) -> None:
    other = "UPDATE StringIds SET value = 'else ' || substr(value, 15) WHERE value LIKE 'training_step%'"
    folder = changed(tmp_path, "steps_megatron_bridge", other, only="rank1")
    coverage = analyze(folder, choice=Choice(between="training_step_[5-9]")).coverage()
    assert list(coverage["status"]) == ["found", "no_steps"]
    assert coverage["reason"].iloc[1] == "none of its ranges is called so"


def test_a_window_from_the_first_step_on_begins_with_the_warm_up() -> None:
    steps = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(to_s=1.0)).steps()
    assert set(steps.loc[steps["warmup"], "step"]) == {0}


def test_a_part_of_a_run_is_called_one() -> None:
    part = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(from_s=0.5, between="training_step_.*"))
    whole = (
        "only a part of the run is looked at, between the ranges 'training_step_.*', from 0.5 s on, and times count "
        "from its begin"
    )
    assert ranges_line(part.study).startswith(f"{whole}; steps are the NVTX ranges")
    assert analyze(INPUTS / "steps_megatron_bridge").study.window == ""


def test_times_that_hold_a_step_hold_that_of_each_process() -> None:
    """Also the process that has no whole step in a window is there."""
    whole = analyze(INPUTS / "cpu_torchrun_plain")
    steps = whole.steps().query("step == 9")
    inside = Choice(from_s=float(steps["start_s"].max()) + 0.001, to_s=float(steps["start_s"].max()) + 0.002)
    analysis = analyze(INPUTS / "cpu_torchrun_plain", choice=inside)
    assert list(analysis.coverage()["status"]) == ["no_steps", "no_steps"]
    (hint,) = set(analysis.coverage()["reason"].str.extract("(--from [0-9.]+ --to [0-9.]+)", expand=False))
    _, begin, _, end = hint.split()
    found = analyze(INPUTS / "cpu_torchrun_plain", choice=Choice(from_s=float(begin), to_s=float(end)))
    assert len(found.steps()) == 2
    late = Choice(
        from_s=float(steps["start_s"].min()) - 0.0001, to_s=float((steps["start_s"] + steps["duration_s"]).min())
    )
    one = analyze(INPUTS / "cpu_torchrun_plain", choice=late)
    assert len(one.coverage()) == 2


def test_nobody_is_cleared_of_what_was_not_recorded() -> None:
    alike = analyze(INPUTS / "steps_megatron_bridge" / "rank0.sqlite")
    assert "and no rank is to blame" not in headlines.headline(alike.study)
    assert alike.efficiency()["parallel_efficiency"].isna().all() or len(alike.collectives())


@pytest.mark.parametrize(
    ("renamed", "told"),
    [
        ({}, "Whether ranks wait for one another was not recorded; nothing else stands out: no cause takes 2% of the "),
        ({"backward": "recv_forward"}, "Phase recv_forward, communication by its name, takes "),
        (
            {"backward": "recv", "forward": "all_reduce"},
            "Phases recv, all_reduce, communication by their names, take ",
        ),
    ],
)
def test_what_was_not_recorded_leads_if_nothing_stands_out(renamed: dict[str, str], told: str) -> None:
    study = analyze(INPUTS / "cpu_torchrun_plain").study
    phases = study.tables["phases_summary"].replace({"phase": renamed})
    share = phases.loc[phases["phase"].isin(renamed.values()), "step_share"].sum() / 2
    tables = {**study.tables, "phases_summary": phases, "bottlenecks": study.tables["bottlenecks"][:0]}
    said = headlines.headline(replace(study, tables=tables))
    assert said.startswith(told)
    assert "was not recorded" in said
    assert ("no cause takes 2%" in said) != bool(renamed)
    assert not renamed or abs(int(said.partition("%")[0].split()[-1]) - 100 * share) < 2


def test_steps_that_are_a_small_part_of_the_time_clear_nobody() -> None:
    part = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(steps="forward"))
    assert part.study.steps.mean_s < 0.25 * part.study.steps.period_s
    assert part.study.nobody_to_blame.startswith("; but most of the time lies between the steps")
