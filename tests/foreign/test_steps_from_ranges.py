"""Steps and phases that a program named for itself, whatever it calls them."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from hpcmm.analyze import Analysis, Choice, analyze
from hpcmm.errors import HpcmmError

INPUTS = Path(__file__).parent / "inputs"
LOADING = ("data loading", 1, "data", 0.04)


def changed(folder: Path, source: str, *statements: str, only: str = "*") -> Path:
    """A copy of an input after SQL has been run on its exports."""
    copy = folder / source
    shutil.copytree(INPUTS / source, copy)
    for report in copy.glob(f"{only}.sqlite"):
        with closing(sqlite3.connect(report)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
    return copy


def first(analysis: Analysis) -> tuple[str, int, str, float]:
    row = analysis.bottlenecks().iloc[0]
    return str(row["cause"]), int(row["rank"]), str(row["phase"]), round(float(row["lost_s_per_step"]), 4)


def renamed(name: str) -> str:
    return f"UPDATE StringIds SET value = replace(value, 'training_step_', '{name}')"  # noqa: S608


@pytest.mark.parametrize("source", ["steps_megatron_bridge", "steps_profilerstep"])
def test_a_program_s_own_ranges_give_the_verdict_of_annotated_ones(source: str) -> None:
    expected, found = analyze(INPUTS / "steps_expected"), analyze(INPUTS / source)
    assert first(found) == first(expected) == LOADING
    pd.testing.assert_frame_equal(found.steps().drop(columns="start_s"), expected.steps().drop(columns="start_s"))
    pd.testing.assert_frame_equal(found.efficiency(), expected.efficiency())
    assert set(found.coverage()["status"]) == {"found"}
    assert "phases are data, optimizer, forward, backward" in found.study.ranges


@pytest.mark.parametrize(
    "name",
    [
        "iteration ",
        "Iter:",
        "train_step[",
        "global_step=",
        "batch_",
        "epoch 0 step ",
        "TrainStep ",
        "mini_batch/",
        "GPT@",
    ],
)
def test_steps_are_found_under_many_names(tmp_path: Path, name: str) -> None:
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", renamed(name)))
    assert first(analysis) == LOADING
    assert list(analysis.steps()["step"].unique()) == list(range(20))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE StringIds SET value = 'step' WHERE value LIKE 'training_step%'",
        "UPDATE NVTX_EVENTS SET eventType = 60 WHERE textId IN "
        "(SELECT id FROM StringIds WHERE value LIKE 'training_step%')",
        "UPDATE NVTX_EVENTS SET domainId = 9",
        "UPDATE NVTX_EVENTS SET text = (SELECT value FROM StringIds WHERE id = textId), textId = NULL "
        "WHERE textId IS NOT NULL",
    ],
    ids=["no number", "start and end", "a domain", "plain names"],
)
def test_steps_are_found_however_they_were_written(tmp_path: Path, statement: str) -> None:
    assert first(analyze(changed(tmp_path, "steps_megatron_bridge", statement))) == LOADING


@pytest.mark.parametrize("name", ["forward_pass_", "layer ", "epoch ", "eval_step_", "optimizer.step "])
def test_what_may_be_something_else_is_proposed_and_not_taken(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path, "steps_megatron_bridge", renamed(name))
    unclear = analyze(folder)
    assert unclear.steps().empty
    reason = unclear.coverage()["reason"].iloc[0]
    assert f"'{name}{{n}}' (20 x 0.095 s)" in reason
    assert "--steps" in reason
    chosen = analyze(folder, choice=Choice(steps=f"{name}.*".replace(".step", "[.]step")))
    assert first(chosen) == LOADING


def test_of_messages_of_unknown_size_nothing_is_said_of_latency_or_bandwidth() -> None:
    table = analyze(INPUTS / "steps_megatron_bridge").bottlenecks()
    row = table[table["cause"].str.startswith("communication transfer")].iloc[0]
    assert row["cause"] == "communication transfer of gradients"
    assert "1 message a step and rank, whose size the report does not tell" in row["evidence"]


def test_all_ranks_take_the_same_ranges_for_steps(tmp_path: Path) -> None:
    around = """
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT start - 1000, "end" + 1000, 59, 'ProfilerStep#' || (100 + textId), globalTid, 0 FROM NVTX_EVENTS
        WHERE textId IN (SELECT id FROM StringIds WHERE value LIKE 'training_step%')
    """
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", around, only="rank1"))
    assert first(analysis) == LOADING
    assert "training_step_{n}" in analysis.study.ranges
    assert "ProfilerStep" not in analysis.study.ranges.partition("phases")[0]


def test_two_loops_by_turns_are_not_told_apart(tmp_path: Path) -> None:
    folder = changed(
        tmp_path,
        "steps_megatron_bridge",
        'UPDATE NVTX_EVENTS SET "end" = start + ("end" - start) * 6 / 10 WHERE textId IN '
        "(SELECT id FROM StringIds WHERE value LIKE 'training_step%')",
        """
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT "end" + 1000, "end" + 30000000, 59, 'rollout_step', globalTid, 0 FROM NVTX_EVENTS
        WHERE textId IN (SELECT id FROM StringIds WHERE value LIKE 'training_step%')
        """,
    )
    assert analyze(folder).steps().empty
    assert len(analyze(folder, choice=Choice(steps="rollout_step")).steps()) == 40


STEPS = "textId IN (SELECT id FROM StringIds WHERE value LIKE 'training_step%')"


def test_steps_are_run_by_a_thread_that_launches(tmp_path: Path) -> None:
    """A loader thread, and a loader process, have ranges that cover more of the time, and launch nothing."""
    elsewhere = """
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT start, start + 99900000, 59, 'batch ' || textId, {thread}, 0 FROM NVTX_EVENTS WHERE {steps}
    """
    thread, process = (
        elsewhere.format(thread=each, steps=STEPS) for each in ("globalTid + 7", "globalTid + (9 << 24)")
    )
    for name, statement in (("thread", thread), ("process", process)):
        analysis = analyze(changed(tmp_path / name, "steps_megatron_bridge", statement))
        assert first(analysis) == LOADING
        assert "training_step_{n}" in analysis.study.ranges


def test_steps_that_overlap_are_cut(tmp_path: Path) -> None:
    longer = f'UPDATE NVTX_EVENTS SET eventType = 60, "end" = start + 130000000 WHERE {STEPS}'  # noqa: S608
    steps = analyze(changed(tmp_path, "steps_megatron_bridge", longer)).steps()
    assert list(steps.loc[steps["rank"] == 0, "step"]) == list(range(20))


def test_phases_can_be_chosen() -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(phases="data|optimizer"))
    assert set(analysis.phases().query("within == ''")["phase"]) == {"data", "optimizer", "other"}
    own = analyze(INPUTS / "steps_expected", choice=Choice(phases="data"))
    assert set(own.phases().query("within == ''")["phase"]) == {"data", "other"}
    assert first(own) == LOADING


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
    ("options", "message"),
    [
        ({"steps": "nosuch"}, "--steps 'nosuch'.*'training_step_{n}'"),
        ({"phases": "nosuch"}, "--phases 'nosuch'"),
        ({"between": "nosuch"}, "--between 'nosuch'"),
        ({"from_s": 100.0}, "--from and --to"),
        ({"from_s": 2.0, "to_s": 1.0}, "--from before --to"),
        ({"to_s": -1.0}, "--from before --to"),
        ({"from_s": float("nan")}, "--from before --to"),
        ({"steps": "("}, "not a regular expression"),
    ],
)
def test_a_choice_that_nothing_fits_is_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(HpcmmError, match=message):
        analyze(INPUTS / "steps_megatron_bridge", choice=Choice(**options))


def test_who_is_waited_for_is_named_though_no_communication_was_recorded() -> None:
    analysis = analyze(INPUTS / "cpu_torchrun_plain")
    late = {trace.rank: trace.pid for trace in analysis.study.traces}
    cause, rank, phase, lost_s = first(analysis)
    assert (cause, late[rank], phase) == ("data loading", 28274, "data")
    assert lost_s == pytest.approx(0.05, rel=0.02)
    assert len(analysis.bottlenecks()["rank"].dropna()) == 1


def test_a_gap_before_the_loop_is_no_loss_of_the_loop() -> None:
    analysis = analyze(INPUTS / "startup_gap")
    assert analysis.bottlenecks().empty
    start = analysis.startup().set_index("part")["median_s"]
    assert start["before the first step"] == pytest.approx(60.0, rel=0.01)
    loop = analysis.gpu()
    loop = loop[loop["step"].notna()]
    assert loop["idle_s"].sum() / loop["span_s"].sum() == pytest.approx(0.01, abs=0.002)


def projected(source: str) -> pd.DataFrame:
    return analyze(INPUTS / source).projection().set_index("range")


def test_ranges_within_one_of_their_name_count_once_and_open_ones_are_there() -> None:
    table = projected("open_and_nested")
    assert table.loc["layer", "host_s"] == pytest.approx(0.1)
    assert table.loc["layer", "gpu_union_s"] == pytest.approx(0.06)
    assert table.loc["train", "open_calls"] == table.loc["train", "calls"] == 1


def test_what_autograd_launches_is_backward_s() -> None:
    table = projected("backward_thread")
    assert table.loc["backward", "kernels"] == 10
    assert table.loc["backward", "gpu_union_s"] == pytest.approx(0.2)
    assert table.loc["forward", "kernels"] == 10


def test_ranges_that_start_and_end_on_their_own_are_projected() -> None:
    assert projected("start_end_ranges").loc["train_step", "calls"] == 10


def test_names_that_count_are_one_row() -> None:
    table = projected("many_iterations")
    assert table.loc["iteration {n}", "calls"] == 3000
    assert len(table) == 2


def test_work_that_no_range_owns_is_told(tmp_path: Path) -> None:
    without = changed(tmp_path, "many_iterations", "DELETE FROM NVTX_EVENTS WHERE rowid > 3000")
    table = analyze(without).projection().set_index("range")
    assert table.loc["(in no range)", "kernels"] == 1500
