"""The files of an analysis: tables in two formats that agree, and a trace for Perfetto; all of them or none."""

import errno
import gzip
import json
from collections import defaultdict
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcmm.analyze import Analysis, analyze
from hpcmm.errors import HpcmmError
from hpcmm.files import write_together
from hpcmm.page import outputs
from hpcmm.page.outputs import to_arrow, write_all
from hpcmm.page.perfetto import write_trace

SAMPLES = Path(__file__).parents[2] / "profiles" / "samples"


@pytest.fixture(scope="module")
def slow_data(tmp_path_factory) -> Analysis:
    return analyze([SAMPLES / "slow_data"], tmp_path_factory.mktemp("written"))


def trace_of(study, **options) -> dict:
    file = BytesIO()
    write_trace(study, file, **options)
    return json.loads(gzip.decompress(file.getvalue()))


def test_csv_and_parquet_hold_the_same_values(slow_data: Analysis) -> None:
    for name, table in slow_data.tables.items():
        parquet = pd.read_parquet(slow_data.out / f"{name}.parquet")
        assert list(parquet.columns) == list(table.columns), name
        assert {column: str(kind) for column, kind in parquet.dtypes.items()} == {
            column: str(kind) for column, kind in table.dtypes.items()
        }, name
        csv = pd.read_csv(
            slow_data.out / f"{name}.csv",
            keep_default_na=False,
            na_values={"step": "", "rank": ""},
            float_precision="round_trip",
        )
        assert list(csv.columns) == list(table.columns), name
        assert len(csv) == len(parquet) == len(table), name
        for column in table.select_dtypes("float64"):
            values = [float(each or "nan") for each in csv[column].astype(str)]  # to_numeric of pandas 3.0 rounds
            np.testing.assert_array_equal(values, table[column].to_numpy(np.float64), err_msg=f"{name}.{column}")


def test_every_column_has_one_type_in_every_table_even_an_empty_one(slow_data: Analysis) -> None:
    assert slow_data.gpu().empty
    for name, table in slow_data.tables.items():
        for column, kind in table.dtypes.items():
            assert str(kind) in {"int64", "Int64", "float64", "bool", "str"}, f"{name}.{column}: {kind}"
            if str(column).endswith(("_s", "_share", "_efficiency", "_per_step")):
                assert str(kind) == "float64", f"{name}.{column}"


def test_tables_are_sorted(slow_data: Analysis) -> None:
    orders = {
        "steps": ["rank", "step"],
        "phases": ["rank", "step", "phase", "within"],
        "phases_summary": ["rank", "node", "phase", "within"],
        "comm_wait": ["rank", "phase"],
        "delays": ["rank", "step", "phase"],
        "bottlenecks": ["rank_order"],
        "waitpid": ["rank", "start_s"],
    }
    for name, key in orders.items():
        table = slow_data.tables[name]
        pd.testing.assert_frame_equal(table, table.sort_values(key, kind="stable", ignore_index=True))


def test_control_characters_do_not_reach_a_file() -> None:
    table = pd.DataFrame({"phase": ["a\x1b[31m\r\n\0b", 'q",', None], "n": [1, 2, 3]}).astype({"phase": "str"})
    file = BytesIO()
    outputs.table_files({"t": table})["t.csv"](file)
    text = file.getvalue().decode()
    assert text.count("\n") == 4
    assert "\x1b" not in text
    assert "\0" not in text
    back = pd.read_csv(BytesIO(file.getvalue()))
    assert back["phase"].tolist()[:2] == ["a\\x1b[31m\\r\\n\\x00b", 'q",']
    assert to_arrow(table)["phase"].to_pylist()[2] is None


def test_a_full_disk_leaves_the_earlier_analysis_whole(tmp_path: Path, monkeypatch) -> None:
    tables = {"t": pd.DataFrame({"a_s": [1.0]})}
    write_all(tmp_path, outputs.table_files(tables))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file) -> None:
        file.write(b"x" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HpcmmError, match=r"cannot be written \(No space left on device\): free some space"):
        write_all(tmp_path, {"t.csv": "new", "u.csv": full})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_the_place_of_a_file_changes_nothing(tmp_path: Path) -> None:
    write_together(tmp_path, {"a.csv": "old"})
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(IsADirectoryError):
        write_together(tmp_path, {"a.csv": "new", "b.csv": "new"})
    assert (tmp_path / "a.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_the_trace_has_a_process_a_rank_and_slices_that_nest(slow_data: Analysis) -> None:
    with gzip.open(slow_data.out / "trace.json.gz") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values()) == ["rank 0 (node1)", "rank 1 (node1)", "rank 2 (node2)", "rank 3 (node2)"]
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"steps and phases", "waits", "collectives"} <= threads
    slices = [event for event in events if event["ph"] == "X"]
    assert sum(event["name"].startswith("step ") for event in slices) == len(slow_data.steps())
    assert sum("sequence" in event.get("args", {}) for event in slices) == len(slow_data.collectives())
    by_thread = defaultdict(list)
    for event in slices:
        start = round(event["ts"] * 1000)
        by_thread[event["tid"]].append((start, start + round(event["dur"] * 1000)))
    for spans in by_thread.values():
        open_ends: list[int] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)
    assert any(event["name"] == "waits for rank 2" for event in slices)
    assert trace["otherData"]["note"] == ""


def test_the_trace_is_on_the_common_clock(slow_data: Analysis) -> None:
    trace = trace_of(slow_data.study)
    first = slow_data.steps().iloc[0]
    found = next(e for e in trace["traceEvents"] if e["pid"] == 1 and e["name"] == f"step {first['step']}")
    assert found["ts"] == pytest.approx(first["start_s"] * 1e6, abs=0.001)
    assert found["dur"] == pytest.approx(first["duration_s"] * 1e6, abs=0.001)


def test_a_long_trace_is_cut_at_one_time_for_all_ranks_and_says_so(slow_data: Analysis) -> None:
    trace = trace_of(slow_data.study, max_events=300)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert 250 < len(slices) <= 300
    cut = next(event for event in trace["traceEvents"] if event["ph"] == "i")
    assert cut["name"] == trace["otherData"]["note"]
    assert cut["name"].startswith("cut after ")
    assert "300 of " in cut["name"]
    assert max(event["ts"] + event["dur"] for event in slices) <= cut["ts"] + 0.01
    assert {event["pid"] for event in slices} == {1, 2, 3, 4}


def test_hostile_names_are_only_text_in_the_trace(slow_data: Analysis) -> None:
    evil = '"}]\x1b[31m\n</script>'
    traces = [replace(trace, node=evil, segments=trace.segments.assign(phase=evil)) for trace in slow_data.study.traces]
    study = replace(slow_data.study, traces=tuple(traces), name=evil)
    file = BytesIO()
    write_trace(study, file)
    text = gzip.decompress(file.getvalue()).decode("ascii")
    assert "\x1b" not in text
    phases = [event for event in json.loads(text)["traceEvents"] if "script" in event["name"]]
    assert len(phases) == sum(len(trace.segments) for trace in traces)


def test_a_study_without_steps_still_has_a_trace() -> None:
    run = analyze(SAMPLES / "h100_2gpu_nccl.sqlite")
    assert json.dumps(trace_of(run.study))
