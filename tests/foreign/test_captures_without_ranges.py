"""Captures of scripts that nothing annotates, without a GPU: recorded with torchrun, two workers, nsys and OS calls."""

import shutil
import sqlite3
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from hpcmm.analyze import Analysis, analyze
from hpcmm.page.headlines import gaps, headline
from hpcmm.page.outputs import summary
from hpcmm.page.terminal import print_study

INPUTS = Path(__file__).parent / "inputs"
FAST, SLOW = 7964, 7965
SLEEP = "(SELECT id FROM StringIds WHERE value = 'clock_nanosleep')"
IN_MAIN_OF = "(globalTid & 0xFFFFFF) = "
WAIT = "communication, or waiting for other ranks or threads"


def changed(tmp_path: Path, name: str, *statements: str) -> Analysis:
    report = tmp_path / "report.sqlite"
    shutil.copy(INPUTS / name / "report.sqlite", report)
    with sqlite3.connect(report) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return analyze(report)


def named(analysis: Analysis) -> pd.DataFrame:
    rows = analysis.bottlenecks()
    rows = rows[rows["rank"].notna()]
    return rows.assign(who=[analysis.study.names[int(rank)] for rank in rows["rank"]])


def test_the_worker_that_sleeps_is_named_with_its_call_and_with_who_waits(tmp_path: Path) -> None:
    analysis = changed(tmp_path, "plain_sleep")
    row = named(analysis).iloc[0]
    assert (row["who"], row["cause"], row["confidence"]) == (
        f"process {SLOW} (rank unknown)",
        "sleep in the main thread",
        "medium",
    )
    assert row["lost_s_per_step"] == pytest.approx(2.416, abs=0.01)
    assert row["step_share"] == pytest.approx(0.66, abs=0.01)
    for told in ("clock_nanosleep() for 2.42 s (296 calls", "it waits 0.175 s", "the other 2.79 s", "10 of 10 parts"):
        assert told in row["evidence"]
    assert "time.sleep" in row["suggestion"]
    pointer = analysis.osrt().query("rank == @row['rank'] and thread_role == 'step' and function == 'clock_nanosleep'")
    assert list(pointer["calls"]) == [320]


def test_start_up_is_no_part_of_the_loop(tmp_path: Path) -> None:
    # Each worker imports for seconds, exchanges the first parameters, and imports again.
    analysis = changed(tmp_path, "plain_sleep")
    rows = analysis.bottlenecks()
    assert all("the loop, 3.67 s from 7.82 s after the start on" in told for told in rows["evidence"])


def test_every_output_has_the_verdict_and_the_line_that_gives_steps(tmp_path: Path) -> None:
    study = changed(tmp_path, "plain_sleep").study
    printed = StringIO()
    print_study(study, tmp_path, Console(file=printed))
    for text in (printed.getvalue(), summary(study)):
        assert "sleep in the main thread" in text
        assert "for batch in hpcmm.annotate.steps(loader):" in text
    assert headline(study) == (
        "No steps are annotated; of 3.67 s of the loop 66% are lost to this: sleep in the main thread of process "
        f"{SLOW} (rank unknown)."
    )


def test_what_is_said_of_all_processes_of_a_report_is_said_once(tmp_path: Path) -> None:
    ((who, status, why),) = gaps(changed(tmp_path, "plain_sleep").coverage())
    assert (who, status) == ("report.sqlite", "no nvtx")
    assert why.startswith("2 processes: no NVTX ranges at all")


@pytest.mark.parametrize(
    ("function", "cause", "advice"),
    [
        ("read", "reading in the main thread", "num_workers"),
        ("pread64", "reading in the main thread", "num_workers"),
        ("open64", "opening files in the main thread", "fewer files"),
        ("fsync", "writing in the main thread", "save less often"),
        ("waitpid", "waiting for a child process", "no child process"),
        ("ioctl", "other OS calls of the main thread", "osrt.csv"),
    ],
)
def test_the_advice_is_of_the_call(tmp_path: Path, function: str, cause: str, advice: str) -> None:
    rename = f"""UPDATE OSRT_API SET nameId = (SELECT id FROM StringIds WHERE value = '{function}')
        WHERE nameId = {SLEEP} AND {IN_MAIN_OF}{SLOW}"""  # noqa: S608
    add = f"""INSERT INTO StringIds SELECT max(id) + 1, '{function}' FROM StringIds
        WHERE NOT EXISTS (SELECT 1 FROM StringIds WHERE value = '{function}') HAVING count(*)"""  # noqa: S608
    row = named(changed(tmp_path, "plain_sleep", add, rename)).iloc[0]
    assert (row["cause"], row["who"]) == (cause, f"process {SLOW} (rank unknown)")
    assert advice in row["suggestion"]


def test_a_worker_with_children_that_polls_waits_for_them(tmp_path: Path) -> None:
    poll = "(SELECT id FROM StringIds WHERE value = 'poll')"
    rename = f"UPDATE OSRT_API SET nameId = {poll} WHERE nameId = {SLEEP} AND {IN_MAIN_OF}{SLOW}"  # noqa: S608
    assert named(changed(tmp_path, "plain_sleep", rename)).empty
    fork = f"""INSERT INTO OSRT_API (start, end, eventClass, globalTid, nameId, nestingLevel)
        SELECT start - 5000, start, eventClass, globalTid, (SELECT max(id) FROM StringIds), 0
        FROM OSRT_API WHERE {IN_MAIN_OF}{SLOW} LIMIT 1"""  # noqa: S608
    name = "INSERT INTO StringIds SELECT max(id) + 1, 'fork' FROM StringIds"
    row = named(changed(tmp_path, "plain_sleep", rename, name, fork)).iloc[0]
    assert row["cause"] == "waiting for another process, such as a data loader's"
    assert "num_workers" in row["suggestion"]


RUNS = f"DELETE FROM OSRT_API WHERE nameId = {SLEEP} AND {IN_MAIN_OF}{SLOW}"  # noqa: S608


def test_a_worker_that_runs_for_longer_is_named_with_little_confidence(tmp_path: Path) -> None:
    row = named(changed(tmp_path, "plain_sleep", RUNS)).iloc[0]
    assert (row["cause"], row["confidence"]) == ("the main thread's own code", "low")
    assert "in no OS call for 3.49 s (it runs, or waits for a core)" in row["evidence"]
    assert "hpcmm.annotate.steps" in row["suggestion"]
    assert "py-spy" in row["suggestion"]


def test_a_worker_that_loses_its_core_is_not_named_for_what_it_runs(tmp_path: Path) -> None:
    signal = "(SELECT id FROM StringIds WHERE value = 'pthread_cond_signal')"
    put_off = f"UPDATE OSRT_API SET end = start + 2000000 WHERE nameId = {signal} AND {IN_MAIN_OF}{SLOW}"  # noqa: S608
    analysis = changed(tmp_path, "plain_sleep", RUNS, put_off)
    assert named(analysis).empty
    row = analysis.bottlenecks().iloc[0]
    assert (row["cause"], row["confidence"]) == ("imbalance without a culprit", "low")
    assert row["evidence"].startswith(f"process {SLOW} (rank unknown) lost its core in 100% of the calls")
    assert "cores of its own" in row["suggestion"]


def test_workers_alike_name_nobody(tmp_path: Path) -> None:
    rows = changed(tmp_path, "plain_alike").bottlenecks()
    assert list(rows["cause"]) == [WAIT]
    assert rows["rank"].isna().all()
    assert list(rows["confidence"]) == ["low"]


def test_a_worker_that_sleeps_until_the_others_have_come_is_not_the_late_one(tmp_path: Path) -> None:
    # One worker asks each millisecond whether the collective is over; the other computes for longer.
    analysis = changed(tmp_path, "plain_polling")
    assert analysis.bottlenecks().empty
    assert headline(analysis.study).startswith("No steps to analyse: ")
    assert "for batch in hpcmm.annotate.steps(loader):" in headline(analysis.study)


def test_what_both_workers_do_is_nobodys_fault(tmp_path: Path) -> None:
    both = f"""INSERT INTO OSRT_API (start, end, eventClass, globalTid, nameId, nestingLevel)
        SELECT start, end, eventClass, (globalTid >> 48 << 48) + ({FAST} << 24) + {FAST}, nameId, 0 FROM OSRT_API
        WHERE nameId = {SLEEP} AND {IN_MAIN_OF}{SLOW}"""  # noqa: S608
    no_waits = f"""DELETE FROM OSRT_API WHERE {IN_MAIN_OF}{FAST} AND end - start > 20000000
        AND nameId = (SELECT id FROM StringIds WHERE value = 'pthread_cond_wait')"""  # noqa: S608
    rows = changed(tmp_path, "plain_sleep", both, no_waits).bottlenecks()
    assert rows["rank"].isna().all()
    row = rows.iloc[0]
    assert (row["cause"], row["confidence"]) == ("sleep in the main thread", "medium")
    assert "all 2 workers 2.42 s" in row["evidence"]


ONE = f"DELETE FROM OSRT_API WHERE (globalTid >> 24 & 0xFFFFFF) != {SLOW} OR (globalTid & 0xFFFFFF) != {SLOW}"  # noqa: S608


def test_the_loop_of_one_process_is_where_its_calls_come_evenly(tmp_path: Path) -> None:
    rows = changed(tmp_path, "plain_sleep", ONE).bottlenecks()
    row = rows.iloc[0]
    assert (row["cause"], row["confidence"]) == ("sleep in the main thread", "medium")
    assert pd.isna(row["rank"])
    assert "while a call comes again and again" in row["evidence"]
    assert row["step_share"] == pytest.approx(0.66, abs=0.03)


@pytest.mark.parametrize(
    "statement",
    [
        f"DELETE FROM OSRT_API WHERE {IN_MAIN_OF}{SLOW}",  # noqa: S608
        "DELETE FROM OSRT_API WHERE globalTid & 0xFFFFFF != globalTid >> 24 & 0xFFFFFF AND end > 8000000000",
        f"UPDATE OSRT_API SET start = start / 100, end = end / 100 WHERE (globalTid >> 24 & 0xFFFFFF) = {SLOW}",  # noqa: S608
    ],
    ids=["a main thread was not traced", "no exchange in the loop", "the workers did not run at once"],
)
def test_what_cannot_be_compared_names_nobody(tmp_path: Path, statement: str) -> None:
    assert named(changed(tmp_path, "plain_sleep", statement)).empty


def test_a_main_thread_that_never_runs_does_not_train(tmp_path: Path) -> None:
    # As one that waits for a thread of its own: what it sleeps costs nothing.
    asleep = f"""INSERT INTO OSRT_API (start, end, eventClass, globalTid, nameId, nestingLevel)
        SELECT min(start), max(end), max(eventClass), max(globalTid), {SLEEP}, 0
        FROM OSRT_API WHERE {IN_MAIN_OF}{SLOW}"""  # noqa: S608
    assert changed(tmp_path, "plain_sleep", asleep).bottlenecks().empty
