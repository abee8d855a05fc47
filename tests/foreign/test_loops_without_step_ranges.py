"""Programs that name the parts of their training loop, and nothing around them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from changed_inputs import LOADING, STEPS, changed, first

from hpcmm.analyze import Choice, analyze

NO_STEPS = f"DELETE FROM NVTX_EVENTS WHERE {STEPS}"  # noqa: S608


def named(name: str) -> str:
    return f"(text = '{name}' OR textId IN (SELECT id FROM StringIds WHERE value = '{name}'))"  # noqa: S608


def renamed(name: str, other: str) -> str:
    return f"UPDATE NVTX_EVENTS SET text = '{other}', textId = NULL WHERE {named(name)}"  # noqa: S608


def without(*names: str) -> str:
    return f"DELETE FROM NVTX_EVENTS WHERE {' OR '.join(map(named, names))}"  # noqa: S608


def repeated(name: str, times: int) -> str:
    """The range of each step as so many, one after the other."""
    pieces = " UNION ALL ".join(f"SELECT {k} AS k" for k in range(1, times))
    return f"""
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, textId, globalTid, domainId)
        SELECT start + k * 1000, start + k * 1000 + 500, eventType, text, textId, globalTid, domainId
        FROM NVTX_EVENTS, ({pieces}) WHERE {named(name)}
    """  # noqa: S608


def test_a_loop_of_which_the_phases_alone_are_named_has_steps(tmp_path: Path) -> None:
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS))
    assert first(analysis) == LOADING
    assert analysis.study.ranges.startswith("steps begin with each NVTX range 'data', phases are data, optimizer,")
    assert list(analysis.steps()["step"].unique()) == list(range(20))
    assert analysis.study.steps.mean_s == pytest.approx(0.0995, abs=0.0002)
    assert set(analysis.coverage()["status"]) == {"found"}


@pytest.mark.parametrize("missing", [("data",), ("data", "optimizer"), ("optimizer",)])
def test_without_loading_or_an_optimizer_a_step_begins_with_another_part(
    tmp_path: Path, missing: tuple[str, ...]
) -> None:
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS, without(*missing)))
    begins = "forward" if "data" in missing else "data"
    assert f"steps begin with each NVTX range {begins!r}" in analysis.study.ranges
    assert len(analysis.study.steps.numbers) in {18, 19}
    assert analysis.bottlenecks().iloc[0]["rank"] == 1


def test_micro_batches_make_one_step(tmp_path: Path) -> None:
    several = [repeated(name, 4) for name in ("data", "forward")]
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS, *several))
    assert len(analysis.study.steps.numbers) == 19
    assert first(analysis)[:3] == LOADING[:3]


def test_epochs_around_and_an_evaluation_now_and_then_change_nothing(tmp_path: Path) -> None:
    epochs = f"""
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT min(start) - 10, max("end") + 10, 59, 'epoch ' || e, globalTid, 0 FROM (
            SELECT start, "end", globalTid,
                   (row_number() OVER (PARTITION BY globalTid, text, textId ORDER BY start) - 1) / 5 AS e
            FROM NVTX_EVENTS WHERE {named("data")} OR {named("optimizer")}) GROUP BY globalTid, e
    """  # noqa: S608
    evaluation = f"""
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT "end" + 100, "end" + 2000, 59, 'validate', globalTid, 0 FROM (
            SELECT "end", globalTid, row_number() OVER (PARTITION BY globalTid ORDER BY start) AS n
            FROM NVTX_EVENTS WHERE {named("optimizer")}) WHERE n % 5 = 0
    """  # noqa: S608
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS, epochs, evaluation))
    assert first(analysis) == LOADING
    assert len(analysis.study.steps.numbers) == 19


@pytest.mark.parametrize(
    "statement",
    [
        f"DELETE FROM NVTX_EVENTS WHERE NOT ({named('data')})",  # noqa: S608 -- one kind of range alone
        f"{renamed('data', 'attention')}; {renamed('forward', 'mlp')}; {renamed('optimizer', 'norm')}",
        "DELETE FROM NVTX_EVENTS WHERE rowid % 3 = 0",  # irregular
    ],
)
def test_what_is_no_training_loop_for_certain_is_proposed_and_not_taken(tmp_path: Path, statement: str) -> None:
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS, *statement.split("; ")))
    assert analysis.steps().empty
    assert analysis.coverage()["reason"].str.contains("none of its NVTX ranges is clearly a step").all()


def test_a_window_of_such_a_loop_and_chosen_phases(tmp_path: Path) -> None:
    folder = changed(tmp_path, "steps_megatron_bridge", NO_STEPS)
    window = analyze(folder, choice=Choice(from_s=0.5, to_s=1.0))
    assert first(window) == LOADING
    assert list(window.steps()["step"].unique()) == list(range(5, 10))
    chosen = analyze(folder, choice=Choice(phases="data|forward"))
    assert set(chosen.phases().query("within == ''")["phase"]) == {"data", "forward", "other"}


def test_the_layers_of_an_engine_are_no_steps(tmp_path: Path) -> None:
    """TensorRT names each layer of its network in a domain of its own."""
    layers = [
        NO_STEPS,
        "DELETE FROM NVTX_EVENTS",
        "INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) "
        "SELECT 0, 75, 'TensorRT', globalTid, 7 FROM CUPTI_ACTIVITY_KIND_RUNTIME LIMIT 1",
        'INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId) '
        "SELECT 1000000 * k, 1000000 * k + 950000, 59, 'Identity_' || k, globalTid, 7 FROM "
        "(SELECT row_number() OVER (ORDER BY start) AS k, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME LIMIT 20)",
    ]
    assert analyze(changed(tmp_path, "steps_megatron_bridge", *layers)).steps().empty


def test_if_the_parts_of_some_ranks_alone_make_steps_nobody_has_them(tmp_path: Path) -> None:
    """Else the ranks without steps, for which the others wait, would be in no row."""
    folder = changed(tmp_path, "steps_megatron_bridge", NO_STEPS)
    irregular = f"DELETE FROM NVTX_EVENTS WHERE NOT ({named('forward')})"  # noqa: S608
    with closing(sqlite3.connect(folder / "rank1.sqlite")) as connection:
        connection.execute(irregular)
        connection.commit()
    analysis = analyze(folder)
    assert analysis.steps().empty
    assert len(analysis.gpu()) == 2
    assert not analysis.bottlenecks()["suggestion"].str.contains("capture each rank").any()


def only_on_rank1(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "rank1.sqlite")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_all_ranks_cut_their_steps_by_one_rule(tmp_path: Path) -> None:
    """A checkpoint after the optimizer, which rank 1 does not name, would be in the next step of rank 0 alone."""
    checkpoint = f"""
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT "end" + 100, "end" + 2000, 59, 'save_checkpoint', globalTid, 0 FROM (
            SELECT "end", globalTid, row_number() OVER (PARTITION BY globalTid ORDER BY start) AS n
            FROM NVTX_EVENTS WHERE {named("optimizer")}) WHERE n % 5 = 0
    """  # noqa: S608
    folder = changed(tmp_path, "steps_megatron_bridge", NO_STEPS, checkpoint)
    only_on_rank1(folder, without("optimizer"))
    saved = analyze(folder).phases().query("phase == 'save_checkpoint'")
    by_rank = [list(own["step"]) for _, own in saved.groupby("rank")]
    assert len(by_rank) == 2
    assert by_rank[0] == by_rank[1]


def test_if_no_rule_cuts_all_ranks_steps_alike_nobody_has_them(tmp_path: Path) -> None:
    """Rank 1 does not name its optimizer, so that each of its micro-batches would be a step."""
    micro_batches = [
        f"""INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
            SELECT start + {at}, start + {at} + 500, 59, '{name}', globalTid, 0
            FROM NVTX_EVENTS WHERE {named("data")}"""  # noqa: S608
        for batch in range(4)
        for name, at in (("next_batch", 10_000 * batch), ("fwd", 10_000 * batch + 1000), ("bwd", 10_000 * batch + 2000))
    ]
    rest = without("data", "forward", "backward")
    folder = changed(tmp_path, "steps_megatron_bridge", NO_STEPS, *micro_batches, rest)
    assert len(analyze(folder).study.steps.numbers) == 19
    only_on_rank1(folder, without("optimizer"))
    assert analyze(folder).steps().empty


def test_steps_are_called_by_what_most_of_them_begin_with(tmp_path: Path) -> None:
    warm_up = """
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT min(start) + {at}, min(start) + {at} + 2000, 59, 'warmup', globalTid, 0
        FROM NVTX_EVENTS WHERE {of_data} GROUP BY globalTid
    """
    three = [warm_up.format(at=at, of_data=named("data")) for at in (0, 3000, 6000)]
    after_it = f"""
        UPDATE NVTX_EVENTS SET start = start + 20000
        WHERE {named("data")} AND start < (SELECT min(start) + 100 FROM NVTX_EVENTS WHERE {named("data")})
    """  # noqa: S608
    analysis = analyze(changed(tmp_path, "steps_megatron_bridge", NO_STEPS, *three, after_it))
    assert analysis.study.ranges.startswith("steps begin with each NVTX range 'data',")


@pytest.mark.parametrize(
    ("name", "cause", "steps"),
    [("validate", "validate on all ranks", "6, 12, 18"), ("", "work outside the phases", "5, 11, 17")],
)
def test_what_all_ranks_do_now_and_then_is_told_whatever_it_is_called(
    tmp_path: Path, name: str, cause: str, steps: str
) -> None:
    later = f"""
        WITH ends AS (SELECT "end" AS at, globalTid AS thread, row_number() OVER (
            PARTITION BY globalTid ORDER BY start) AS n FROM NVTX_EVENTS WHERE {named("optimizer")})
    """  # noqa: S608
    shift = "400000000 * ((SELECT count(*) FROM ends WHERE thread = globalTid AND n % 6 = 0 AND at <= start))"
    moved = f'{later} UPDATE NVTX_EVENTS SET start = start + {shift}, "end" = "end" + {shift}'  # noqa: S608
    evaluation = f"""{later}
        INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId)
        SELECT at + 1000, at + 399000000, 59, '{name}', thread, 0 FROM ends WHERE n % 6 = 0
    """  # noqa: S608
    statements = [NO_ITERATIONS, moved, *([evaluation] if name else [])]
    table = analyze(changed(tmp_path, "cpu_torchrun_plain", *statements)).bottlenecks()
    told = table[table["cause"].str.startswith(cause)]
    assert len(told) == 1
    assert told["lost_s_per_step"].iloc[0] == pytest.approx(3 * 0.4 / 19, rel=0.1)
    assert f"in steps {steps}" in told["evidence"].iloc[0]


NO_ITERATIONS = "DELETE FROM NVTX_EVENTS WHERE textId IN (SELECT id FROM StringIds WHERE value LIKE 'iteration %')"


@pytest.mark.parametrize("waits", [True, False])
def test_what_one_rank_does_alone_now_and_then_is_named_if_the_others_take_as_much_longer(
    tmp_path: Path, waits: bool
) -> None:
    """No communication was recorded: the other rank is in its backward pass for as long."""
    folder = changed(tmp_path, "cpu_torchrun_plain", NO_ITERATIONS)
    (report,) = folder.glob("*.sqlite")
    long_ns = 400_000_000
    with closing(sqlite3.connect(report)) as connection:
        query = """SELECT NVTX_EVENTS.rowid, globalTid, start, "end", value FROM NVTX_EVENTS
            JOIN StringIds ON id = textId WHERE value IN ('data', 'forward', 'backward', 'optimizer') ORDER BY start"""
        ranges = connection.execute(query).fetchall()
        alone, other = sorted({thread for _, thread, *_ in ranges})
        for thread in (alone, other) if waits else (alone,):
            later, steps = 0, 0
            for row, _, start, end, name in [each for each in ranges if each[1] == thread]:
                steps += name == "data"
                is_at = steps in {7, 13, 19}
                if is_at and thread == alone and name == "data":
                    connection.execute(
                        'INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid, domainId) '
                        "VALUES (?, ?, 59, 'validate', ?, 0)",
                        (start + later - 1000, start + later - 1000 + long_ns, alone),
                    )
                    later += long_ns
                longer = long_ns if is_at and thread == other and name == "backward" else 0
                moved = (start + later, end + later + longer, row)
                connection.execute('UPDATE NVTX_EVENTS SET start = ?, "end" = ? WHERE rowid = ?', moved)
                later += longer
        connection.commit()
    table = analyze(folder).bottlenecks()
    named_alone = table[table["cause"].str.startswith("validate of ")]
    assert len(named_alone) == waits
    if waits:
        row = named_alone.iloc[0]
        assert (row["confidence"], row["lost_s_per_step"]) == ("medium", pytest.approx(3 * 0.4 / 19, rel=0.15))
        assert "communication that was not recorded" in row["evidence"]
