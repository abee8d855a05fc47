import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.reports.events import read_report
from hpcmm.reports.sqlite import ReportDatabase

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"

THREAD = (7 << 24) | 7


def test_ranges_carry_domain_name_payload_and_thread(export) -> None:
    export.rows("StringIds", (5, "forward")).domains().range(10, 90, "step", payload=3)
    export.rows("NVTX_EVENTS", (20, 30, 59, None, THREAD, None, 5, 1, None))
    export.rows("NVTX_EVENTS", (25, 60, 60, "all_reduce group=0 seq=1 bytes=4", THREAD, THREAD + 2, None, 2, None))
    ranges = read_report(export.path, export.path).nvtx
    assert list(ranges["name"]) == ["step", "forward", "all_reduce group=0 seq=1 bytes=4"]
    assert list(ranges["domain"]) == ["hpcmm", "hpcmm", "hpcmm.comm"]
    assert ranges["payload"].iloc[0] == 3
    assert (ranges["pid"].iloc[0], ranges["tid"].iloc[0], ranges["end_tid"].iloc[2]) == (7, 7, 9)


def test_other_domains_and_marks_are_counted_but_not_read(export) -> None:
    export.domains().range(1, 2, "step").range(1, 2, "x", domain=0).range(1, None, "mark", kind=34)
    report = read_report(export.path, export.path)
    assert len(report.nvtx) == 1
    assert report.events == 5


def test_an_open_range_ends_with_the_report_and_an_inverted_one_is_dropped(export) -> None:
    export.domains().range(10, None, "step").range(20, 5, "data").range(30, 70, "forward")
    report = read_report(export.path, export.path)
    ranges = report.nvtx
    assert report.damage == ("1 ranges have times or threads that cannot be, and are left out",)
    assert list(ranges["name"]) == ["step", "forward"]
    assert (ranges["end_ns"].iloc[0], bool(ranges["closed"].iloc[0])) == (70, False)


@pytest.mark.parametrize(
    ("start", "end"), [(1, 1 << 62), (-(1 << 62), 5), (1, 9e99), ("abc", 5), (b"x", 5), (None, 5), (7, 3)]
)
def test_ranges_that_cannot_be_are_counted(export, start, end) -> None:
    export.domains().range(10, 90, "step").range(start, end, "data").range(20, None, "forward")
    report = read_report(export.path, export.path)
    assert list(report.nvtx["name"]) == ["step", "forward"]
    assert report.damage == ("1 ranges have times or threads that cannot be, and are left out",)


def test_rows_that_are_not_in_the_file_yet_are_told(export) -> None:
    export.domains().range(10, 90, "step")
    log = export.path.with_name(f"{export.path.name}-wal")
    log.touch()
    assert not read_report(export.path, export.path).damage
    log.write_bytes(b"x" * 100)
    assert f"{log.name} beside it holds rows" in read_report(export.path, export.path).damage[0]


def test_calls_are_named_and_markers_of_the_tracing_left_out(export) -> None:
    export.rows("StringIds", (1, "poll")).rows(
        "OSRT_API", (5, 9, 27, THREAD, 1), (6, 8, 27, THREAD, 99), (0, 0, 31, THREAD, 1), (9, 5, 27, THREAD, 1)
    )
    calls = read_report(export.path, export.path).osrt
    assert list(calls["function"]) == ["poll", "function 99"]


def test_a_normalised_export_is_not_shifted_again(export) -> None:
    export.rows("TARGET_INFO_SESSION_START_TIME", (1_700_000_000_000_000_000,)).domains()
    assert read_report(export.path, export.path).epoch_ns == 1_700_000_000_000_000_000
    export.rows("EXPORT_META_DATA", ("EXPORT_PARAM_TIME_NORMALIZE", "true"))
    utc = 1_700_000_000_000_000_000
    export.range(utc + 10, utc + 30, "step", payload=1)
    normalised = read_report(export.path, export.path)
    assert (normalised.nvtx["start_ns"] + normalised.epoch_ns).tolist() == [utc + 10]
    assert normalised.last_ns + normalised.epoch_ns == utc + 30


def test_the_h100_export_of_nsys_2026_is_read() -> None:
    path = SAMPLES / "h100_2gpu_nccl.sqlite"
    report = read_report(path, path)
    assert report.nsys_version.startswith("2026.2")
    assert report.traced == {"nvtx", "cuda"}
    assert report.nvtx.empty


@pytest.mark.parametrize("kept", [0.001, 0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_export_is_an_error_or_is_marked(tmp_path, kept: float) -> None:
    whole = (SAMPLES / "slow_data" / "rank_0001.sqlite").read_bytes()
    path = tmp_path / "cut.sqlite"
    path.write_bytes(whole[: int(len(whole) * kept)])
    try:
        report = read_report(path, path)
    except HpcmmError:
        return
    assert report.damage


@pytest.mark.parametrize(
    "statement",
    [
        *(f"DROP TABLE {table}" for table in ("NVTX_EVENTS", "OSRT_API", "StringIds", "PROCESSES")),
        *(
            f"ALTER TABLE NVTX_EVENTS DROP COLUMN {column}"
            for column in ("int64Value", "domainId", "textId", "eventType")
        ),
        "ALTER TABLE OSRT_API DROP COLUMN nameId",
        "UPDATE NVTX_EVENTS SET start = 'soon'",
        "UPDATE NVTX_EVENTS SET int64Value = 1.5, globalTid = x'00ff'",
        'UPDATE OSRT_API SET "end" = 9223372036854775807',
        "UPDATE NVTX_EVENTS SET start = -9223372036854775807",
        "UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = 'now'",
        "UPDATE NVTX_EVENTS SET text = zeroblob(1000000)",
    ],
)
def test_a_damaged_schema_or_cell_costs_only_its_own_rows(damaged_sample, statement: str) -> None:
    path = damaged_sample(statement) / "rank_0001.sqlite"
    report = read_report(path, path)
    assert report.events > 0
    assert (report.nvtx["end_ns"] >= report.nvtx["start_ns"]).all()


ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x AS start FROM r"


@pytest.mark.parametrize("table", ["NVTX_EVENTS", "PROCESSES", "TARGET_INFO_SYSTEM_ENV"])
def test_a_table_that_stands_for_a_query_without_an_end_counts_as_absent(damaged_sample, table: str) -> None:
    with closing(sqlite3.connect(":memory:")) as here:
        if ("ENABLE_FTS4",) not in here.execute("PRAGMA compile_options").fetchall():
            pytest.skip("this SQLite has no FTS4, a kind of virtual table")
    path = damaged_sample() / "rank_0001.sqlite"
    with closing(sqlite3.connect(path)) as sample:
        names = [f'"{row[1]}"' for row in sample.execute(f"PRAGMA table_info({table})")]
        columns = ", ".join(f"x AS {name}" for name in ("rowid", "docid", *names))
        sample.execute(f"DROP TABLE {table}")
        sample.execute(f"CREATE VIEW evil AS SELECT {columns} FROM (SELECT start AS x FROM ({ENDLESS}))")  # noqa: S608
        sample.execute(f"CREATE VIRTUAL TABLE {table} USING fts4(content='evil', {', '.join(names)})")
        sample.commit()
    with ReportDatabase(path) as database:
        assert not database.has(table)
    assert read_report(path, path).events >= 0


def test_a_query_that_takes_far_longer_than_its_tables_account_for_is_given_up(damaged_sample, monkeypatch) -> None:
    monkeypatch.setattr("hpcmm.reports.sqlite._STEPS_A_LOOK", 1000)
    monkeypatch.setattr("hpcmm.reports.sqlite._LEAST_STEPS", 10_000)
    with ReportDatabase(damaged_sample() / "rank_0001.sqlite") as database:
        before = database.rows("SELECT COUNT(*) FROM NVTX_EVENTS")
        with pytest.raises(HpcmmError, match=r"rank_0001.sqlite is damaged: it takes far too long to be read\.$"):
            database.rows(f"SELECT MAX(start) FROM ({ENDLESS})")  # noqa: S608
        assert database.rows("SELECT COUNT(*) FROM NVTX_EVENTS") == before


def test_ids_of_strings_that_are_not_declared_as_integers_are_taken_once_each(damaged_sample) -> None:
    moved = "CREATE TABLE other(id TEXT PRIMARY KEY, value); INSERT INTO other SELECT * FROM StringIds"
    sample = damaged_sample()
    path = sample / "rank_0001.sqlite"
    wanted = list(read_report(path, path).nvtx["name"])
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"{moved}; DROP TABLE StringIds; ALTER TABLE other RENAME TO StringIds")
    with ReportDatabase(path) as database:
        assert database.strings() != "StringIds"
    assert list(read_report(path, path).nvtx["name"]) == wanted


def test_reading_locks_nothing_and_writes_nothing(damaged_sample) -> None:
    folder = damaged_sample()
    path = folder / "rank_0001.sqlite"
    before = path.read_bytes()
    with sqlite3.connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        read_report(path, path)
        other.rollback()
    assert path.read_bytes() == before
    assert sorted(child.suffix for child in folder.iterdir()) == [".sqlite"] * 4


def test_a_string_that_is_there_twice_makes_no_range_twice(export) -> None:
    export.rows("StringIds", (5, "forward"), (5, "forward")).domains()
    export.rows("NVTX_EVENTS", (20, 30, 59, None, THREAD, None, 5, 1, None))
    assert list(read_report(export.path, export.path).nvtx["name"]) == ["forward"]
