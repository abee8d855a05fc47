"""Steps and phases that a program named for itself, whatever it calls them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from changed_inputs import INPUTS, LOADING, STEPS, changed, first

from hpcmm.analyze import Analysis, Choice, analyze
from hpcmm.analyze.__main__ import main
from hpcmm.errors import HpcmmError
from hpcmm.page import headlines


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
        "epoch 0 step ",
        "GPT@",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("Iter:", "train_step[", "global_step=", "batch_", "TrainStep ", "mini_batch/")
        ),
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


def test_ranges_that_may_be_steps_and_are_called_otherwise_are_counted(tmp_path: Path) -> None:
    """Such as those with digits that are letters, of numbers in hexadecimal."""
    letter = "UPDATE StringIds SET value = value || 'a' WHERE value = 'training_step_7'"
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", letter))
    assert "2 ranges that may be steps are left out, as 'training_step_7a'" in analysis.study.ranges
    assert 7 not in set(analysis.steps()["step"])


@pytest.mark.parametrize(
    "name",
    [
        "epoch ",
        "optimizer.step ",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("forward_pass_", "layer ", "eval_step_")),
    ],
)
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


def test_phases_that_launch_the_computation_cover_it() -> None:
    assert headlines.phases_line(analyze(INPUTS / "steps_expected").study) == ""
    chosen = analyze(INPUTS / "steps_expected", choice=Choice(phases="data"))
    assert headlines.phases_line(replace(chosen.study, ranges="")).startswith("no phase covers the computation")


def test_phases_can_be_chosen() -> None:
    analysis = analyze(INPUTS / "steps_megatron_bridge", choice=Choice(phases="data|optimizer"))
    assert set(analysis.phases().query("within == ''")["phase"]) == {"data", "optimizer", "other"}
    own = analyze(INPUTS / "steps_expected", choice=Choice(phases="data"))
    assert set(own.phases().query("within == ''")["phase"]) == {"data", "other"}
    assert first(own) == LOADING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "nosuch"}, "--steps 'nosuch'.*'training_step_{n}'"),
        ({"phases": "nosuch"}, "--phases 'nosuch'"),
        ({"between": "nosuch"}, "--between 'nosuch'"),
        (
            {"from_s": 100.0},
            "--from and --to leave nothing.* its first event is at 0 s .* last one at 2 s",
        ),
        ({"from_s": 0.0962, "to_s": 0.0963}, "--from and --to leave nothing.* its last one at 2 s"),
        ({"from_s": 2.0, "to_s": 1.0}, "--from before --to"),
        ({"from_s": 0.0, "to_s": 0.0}, "--from before --to"),
        ({"to_s": -1.0}, "--to -1 is no time of a run"),
        ({"to_s": 1e300}, "--to 1e[+]300 is no time of a run"),
        ({"to_s": float("inf")}, "--to inf is no time of a run"),
        ({"to_s": float("nan")}, "--to nan is no time of a run"),
        ({"from_s": float("nan")}, "--from nan is no time of a run"),
        ({"steps": "("}, "not a regular expression"),
        ({"steps": "a{99999999999}"}, "not a regular expression"),
        ({"steps": "(a+)+$"}, "--steps .* for ever"),
        ({"phases": "((?:x|y)*z)+"}, "--phases .* for ever"),
        ({"between": "(a|a)*b"}, "--between .* for ever"),
    ],
)
def test_a_choice_that_nothing_fits_is_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(HpcmmError, match=message) as error:
        analyze(INPUTS / "steps_megatron_bridge", choice=Choice(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "expression", ["iteration [0-9]+", "(train|eval)_step_[0-9]{1,9}", "[(+*)]+x", r"\(a+\)+", "(step [0-9]+)?", "a++"]
)
def test_an_expression_that_takes_little_time_is_taken(expression: str) -> None:
    assert Choice(steps=expression).steps == expression


@pytest.mark.parametrize("option", ["--from=nan", "--to=1e300", "--to=-1", "--steps=(a+)+$", "--from=100"])
def test_the_command_says_so_and_fails(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, f"--out={tmp_path / 'out'}", str(INPUTS / "steps_megatron_bridge")]) == 1
    assert option.split("=", 1)[0] in capsys.readouterr().err


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


def inserted(name: str, start: str, end: str, where: str = "1", thread: str = "globalTid") -> str:
    """SQL that puts ranges beside those of the steps that fit ``where``, in which ``n`` is the number of the step."""
    return f"""
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT {start}, {end}, 59, {name}, {thread}, 0
        FROM (SELECT start, "end", globalTid, CAST(substr(value, 15) AS INT) AS n FROM NVTX_EVENTS
              JOIN StringIds ON id = textId WHERE value LIKE 'training_step%') WHERE {where}
    """  # noqa: S608


def called(name: str) -> str:
    """SQL that calls the steps so."""
    return f"UPDATE StringIds SET value = {name} WHERE value LIKE 'training_step%'"  # noqa: S608


N = "CAST(substr(value, 15) AS INT)"
"""The number of a step, in SQL."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "label"),
    [
        (f"'iter ' || {N} || '/20 loss=' || (0.9 - 0.01 * {N})", "iter {n}/{n} loss={n}"),
        (f"'Step ' || {N} || ': loss=' || (2.3 - 0.1 * {N}) || ' lr=1e-' || ({N} % 5)", "Step {n}: loss={n} lr={n}"),
        (f"'iter ' || {N} || ' loss=' || iif({N} % 3, '-3e-05', 'nan')", "iter {n} loss={n}"),
        (f"'data_time=0.' || {N} || ' step ' || {N} || ' of ' || ({N} * 10)", "data_time={n} step {n} of {n}"),
        (f"'[' || {N} || '/100]'", "[{n}/{n}]"),
        (f"'step=' || {N}", "step={n}"),
        (f"'train/step/' || {N}", "train/step/{n}"),
        (f"char(27) || '[31mstep ' || {N} || char(27) || '[0m' || char(7)", "step {n}\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_number_of_the_step_counts_and_other_values_fold_away(tmp_path: Path, name: str, label: str) -> None:
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", called(name)))
    assert first(analysis) == LOADING
    assert f"steps are the NVTX ranges {label!r}" in analysis.study.ranges
    assert list(analysis.steps()["step"].unique()) == list(range(20))


EPOCHS = [inserted(f"'epoch {k}'", "start", "start + 995000000", f"n = {10 * k}") for k in range(2)]
"""Each begins with its first step, and ends with its tenth."""


def test_what_holds_steps_is_no_phase_of_one(tmp_path: Path) -> None:
    run = inserted("'train'", "start", "start + 1999000000", "n = 0")
    of_one_step = inserted("'epoch of one'", "start", '"end" + 2000', "n = 3")
    folder = changed(tmp_path, "steps_megatron_bridge", *EPOCHS, run, of_one_step)
    for choice in (Choice(), Choice(phases=".*")):
        analysis = analyze(folder, choice=choice)
        assert first(analysis) == LOADING
        assert set(analysis.phases().query("within == ''")["phase"]) <= {*PHASES, "other"}


PHASES = {"data", "forward", "backward", "optimizer"}


def test_micro_batches_are_parts_of_a_step_under_one_name(tmp_path: Path) -> None:
    micro = [
        inserted(f"'{name} {k}'", f"start + {at + k * 450000}", f"start + {at + k * 450000 + long}")
        for k in range(8)
        for name, at, long in (("micro_batch", 91100000, 440000), ("fwd", 91100000, 200000), ("bwd", 91300000, 200000))
    ]
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", *EPOCHS, *micro))
    assert first(analysis) == LOADING
    assert len(analysis.steps()) == 40
    phases = set(analysis.phases().query("within == ''")["phase"])
    assert "micro_batch {n}" in phases
    assert not {name for name in phases if name[-1].isdigit()}


def test_an_evaluation_between_steps_is_no_step(tmp_path: Path) -> None:
    shorter = f'UPDATE NVTX_EVENTS SET "end" = start + 93000000 WHERE {STEPS}'  # noqa: S608
    evaluation = inserted("'eval_step ' || n", "start + 93100000", "start + 99900000", "n % 3 = 0")
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", shorter, evaluation))
    assert first(analysis) == LOADING
    assert len(analysis.steps()) == 40


def test_of_loops_one_after_the_other_the_longer_is_taken_and_the_other_named(tmp_path: Path) -> None:
    loops = (
        called(f"'pretrain_step ' || {N}") + f" AND {N} < 8",
        called(f"'finetune_step ' || ({N} - 8)"),
    )
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", *loops))
    assert first(analysis) == LOADING
    assert list(analysis.steps()["step"].unique()) == list(range(12))
    assert "another loop is 'pretrain_step {n}' (8 x 0.095 s)" in analysis.study.ranges


def test_no_share_of_a_step_exceeds_the_whole(tmp_path: Path) -> None:
    """Of steps that cover little of the loop, and of a rank whose steps are far longer than the others'."""
    little = f'UPDATE NVTX_EVENTS SET "end" = start + 7000000 WHERE {STEPS}'  # noqa: S608
    empty = f'UPDATE NVTX_EVENTS SET "end" = start + 1000 WHERE {STEPS}'  # noqa: S608
    folders = [changed(tmp_path / name, "steps_megatron_bridge", sql) for name, sql in (("a", little), ("b", empty))]
    folders.append(changed(tmp_path / "c", "steps_megatron_bridge", little, only="rank0"))
    for folder in folders:
        analysis = analyze(folder, choice=Choice(steps="training_step_.*"))
        assert len(analysis.study.steps.numbers) == 19
        assert_shares(analysis)
        table = analysis.bottlenecks()
        assert table["step_share"].sum() <= 1 + 1e-9
        share = table["lost_s_per_step"] / analysis.study.steps.period_s
        assert np.allclose(table["step_share"], share)


def assert_shares(analysis: Analysis) -> None:
    for name in ("bottlenecks", "phases_summary", "comm_wait"):
        share = analysis.tables[name]["step_share"].dropna()
        assert ((share >= 0) & (share <= 1)).all(), name


OF_EACH_KIND = {"steps_expected", "steps_profilerstep", "sync_then_loading", "plain_sleep", "moderate_overlap"}
"""One input of each kind; `make test-all` takes all."""


@pytest.mark.parametrize(
    "source",
    [
        name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(path.name for path in INPUTS.iterdir())
        if name != "empty_beside_good"
    ],
)
def test_no_share_of_a_step_of_any_capture_exceeds_the_whole(source: str) -> None:
    assert_shares(analyze(INPUTS / source))


def test_a_rank_whose_loader_alone_has_the_usual_steps_keeps_its_own(tmp_path: Path) -> None:
    """Rank 1 calls its steps otherwise, and its loader, which launches nothing, calls its batches as rank 0's steps."""
    other = "UPDATE StringIds SET value = 'iteration ' || substr(value, 15) WHERE value LIKE 'training_step%'"
    for thread in ("globalTid + 7", "globalTid + (9 << 24)"):
        loaders = inserted("'training_step_' || n", "start", "start + 99000000", thread=thread)
        folder = changed(tmp_path / thread, "steps_megatron_bridge", loaders, other, only="rank1")
        analysis = analyze(folder)
        assert first(analysis) == LOADING
        assert "'training_step_{n}' and 'iteration {n}'" in analysis.study.ranges
        assert len(analysis.study.traces) == 2


def test_steps_that_are_chosen_are_of_a_thread_that_launches_if_one_has_them(tmp_path: Path) -> None:
    for thread in ("globalTid + 7", "globalTid + (9 << 24)"):
        loader = inserted("'training_step_' || n", "start", "start + 99900000", thread=thread)
        folder = changed(tmp_path / thread, "steps_megatron_bridge", loader)
        for choice in (Choice(), Choice(steps="training_step_.*")):
            analysis = analyze(folder, choice=choice)
            assert first(analysis) == LOADING
            assert len(analysis.study.traces) == 2
    alone = inserted("'load ' || n", "start", "start + 99900000", thread="globalTid + 7")
    chosen = analyze(changed(tmp_path / "alone", "steps_megatron_bridge", alone), choice=Choice(steps="load .*"))
    assert len(chosen.steps()) == 40


def test_a_single_gap_is_told_before_the_range_itself(tmp_path: Path) -> None:
    """Not before ``epoch {n}``, whichever that is."""
    tables = ("NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME")
    later = 'SET start = start + 3000000000, "end" = "end" + 3000000000 WHERE start > 100000000'
    statements = [*(f"UPDATE {table} {later}" for table in tables), called(f"'epoch ' || {N}")]
    table = analyze(changed(tmp_path, "steps_megatron_bridge", *statements)).idle()
    assert set(table["before"]) - {""} == {"epoch 1"}


def test_steps_can_be_chosen_by_the_name_that_a_message_gives_them(tmp_path: Path) -> None:
    folder = changed(tmp_path, "steps_megatron_bridge", renamed("layer ["))
    assert "'layer [{n}' (20 x 0.095 s)" in analyze(folder).coverage()["reason"].iloc[0]
    assert first(analyze(folder, choice=Choice(steps="layer [{n}"))) == LOADING


def test_a_first_step_that_compiles_for_a_minute_leaves_the_phases_of_the_others(tmp_path: Path) -> None:
    folder = changed(
        tmp_path,
        "steps_megatron_bridge",
        'UPDATE NVTX_EVENTS SET "end" = "end" + 60000000000 WHERE textId IN '
        "(SELECT id FROM StringIds WHERE value = 'training_step_0')",
        'UPDATE NVTX_EVENTS SET start = start + 60000000000, "end" = "end" + 60000000000 WHERE start > '
        "(SELECT start FROM NVTX_EVENTS WHERE textId IN (SELECT id FROM StringIds WHERE value = 'training_step_0'))",
        'UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = start + 60000000000, "end" = "end" + 60000000000',
        'UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET start = start + 60000000000, "end" = "end" + 60000000000',
    )
    assert first(analyze(folder)) == LOADING


def test_ranks_that_number_their_steps_differently_are_said_to(tmp_path: Path) -> None:
    """Each GPU's losses are those of its own steps then."""
    folder = changed(tmp_path, "steps_megatron_bridge")
    rank1 = changed(
        tmp_path / "other",
        "steps_megatron_bridge",
        "UPDATE StringIds SET value = replace(value, 'training_step_', 'iter 10') WHERE value LIKE 'training_step%'",
        only="rank1",
    )
    (rank1 / "rank1.sqlite").replace(folder / "rank1.sqlite")
    analysis = analyze(folder)
    told = headlines.headline(analysis.study)
    assert told.startswith("The ranks number their steps differently, so that no step is one of all ranks; of each ")
    assert " step on 2 GPUs" in told
    assert headlines.lost_heading(analysis.study) == "lost a step"
    assert not analysis.bottlenecks()["evidence"].str.contains("[0-9] s in all").any()
