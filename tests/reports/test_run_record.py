import json
import os
from pathlib import Path

import pytest

from hpcmm.reports.run_record import read_run_record
from hpcmm.runs.run_dir import RunDir


@pytest.mark.parametrize(
    ("profile", "ranks"),
    [
        ("{tool: nsys, ranks: all}", {0, 1, 2, 3}),
        ("{tool: nsys, ranks: one_per_node}", {0, 2}),
        ("{tool: nsys, ranks: '0,2-3'}", {0, 2, 3}),
        ("{tool: null, ranks: all}", set()),
        ("{tool: nsys, ranks: x}", set()),
    ],
)
def test_profiled_ranks_are_the_configuration_s(tmp_path: Path, profile: str, ranks: set[int]) -> None:
    text = f"cluster: {{nodes: 2, ranks_per_node: 2}}\nprofile: {profile}\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert read_run_record(RunDir(tmp_path)).profiled == ranks


def start(rank: int, **changes: object) -> str:
    return (
        json.dumps({"event": "start", "rank": rank, "node": "n1", "job_id": "17", "pid": 100 + rank} | changes) + "\n"
    )


def test_the_record_of_a_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.mkdir()
    run_dir.config.write_text("cluster: {nodes: 2, ranks_per_node: 2}\nprofile: {tool: nsys, ranks: one_per_node}\n")
    run_dir.rank_metrics(0).write_text(start(0) + '{"event": "step", "step": 0}\n' + start(0, pid=555))
    run_dir.rank_metrics(1).write_text("not json\n" + start(1))
    run_dir.rank_metrics(2).write_bytes(b"\xff\xfe")
    record = read_run_record(run_dir)
    assert record.world_size == 4
    assert record.profiled == {0, 2}
    assert record.starts.keys() == {0, 1}
    assert record.rank_of(555, "n1") == 0
    assert record.rank_of(100, None) is None
    assert record.job_id == "17"


@pytest.mark.parametrize(
    ("exit_status", "failures", "metrics", "failed"),
    [
        ("7 1\n", False, "", True),
        ("7 1\n8 0\n", True, "", False),
        ("7 stopped\n", False, "", False),
        (None, True, "", True),
        (None, False, "", False),
        ("7 1\n", True, '{"event": "step", "step": 0}\n', False),
    ],
)
def test_a_run_that_failed_before_its_first_step(
    tmp_path: Path, exit_status: str | None, *, failures: bool, metrics: str, failed: bool
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.mkdir()
    run_dir.rank_metrics(0).write_text(start(0) + metrics)
    run_dir.provenance.write_text('{"packages": {"nvtx": "0.2.11"}}')
    if exit_status is not None:
        run_dir.exit_status.write_text(exit_status)
    if failures:
        (run_dir.failures / "7.0").mkdir(parents=True)
        (run_dir.failures / "7.0" / "rank_0000.error.json").touch()
    record = read_run_record(run_dir)
    assert (record.failed_before_steps, record.nvtx) == (failed, "0.2.11")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "cluster: 3",
        "cluster: {nodes: many}",
        "a: [",
        "!!python/object:os.system x",
        "cluster: {nodes: 131072, ranks_per_node: 131072}\nprofile: {ranks: all}",
    ],
)
def test_a_damaged_configuration_leaves_nothing_expected(tmp_path: Path, text: str) -> None:
    RunDir(tmp_path).config.write_text(text)
    record = read_run_record(RunDir(tmp_path))
    assert (record.world_size, record.ranks_per_node, record.profiled) == (0, 0, frozenset())


def test_the_records_of_each_start_are_kept_with_the_first_step_alone(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.mkdir()
    part = {"event": "startup", "part": "imports", "duration_s": 1.5}
    steps = [{"event": "step", "step": step, "step_s": 0.1 + step} for step in range(3)]
    first = [start(0), *(json.dumps(record | {"attempt": 1}) + "\n" for record in (part, *steps))]
    second = [start(0), *(json.dumps(record | {"attempt": 2}) + "\n" for record in (part, *steps[1:]))]
    run_dir.rank_metrics(0).write_text("".join([*first, *second, "cut o"]), encoding="utf-8")
    kept = read_run_record(run_dir).startup[0]
    assert [(record["event"], record["attempt"]) for record in kept] == [
        ("startup", 1), ("step", 1), ("startup", 2), ("step", 2),
    ]  # fmt: skip
    assert kept[3]["step_s"] == 1.1


@pytest.mark.parametrize(
    "text", ["a: &a\n  b: *a\n", "a: &a [x, x]\ncluster: {nodes: *a}\n", f"name: {'x' * (1 << 20)}\n"]
)
def test_a_configuration_that_stands_for_one_without_end_is_not_read(tmp_path: Path, text: str) -> None:
    RunDir(tmp_path).config.write_text(text)
    assert read_run_record(RunDir(tmp_path)).config == {}


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.mkdir()
    os.mkfifo(run_dir.config)
    os.mkfifo(run_dir.rank_metrics(0))
    run_dir.rank_metrics(1).write_text(start(1))
    record = read_run_record(run_dir)
    assert (record.config, record.starts.keys()) == ({}, {1})
